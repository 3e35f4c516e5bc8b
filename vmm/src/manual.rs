//! Manual pages and shell completions, from the same source as `--help`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;

/// The manual could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}", path = .path.display())]
pub struct ManualError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Writes completions for `shell` to `out`.
pub fn completions(shell: Shell, out: &mut dyn Write) -> io::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "mce-relay", &mut text);
    out.write_all(&text)
}

/// Writes the manual pages into `dir`, which is made if it is not there; their paths.
///
/// # Errors
/// The directory or a page cannot be written.
pub fn pages(dir: &Path) -> Result<Vec<PathBuf>, ManualError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| ManualError { path, source }
    };
    fs::create_dir_all(dir).map_err(failed(dir))?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut written = Vec::new();
    let mut left = vec![("mce-relay".to_owned(), command)];
    while let Some((name, command)) = left.pop() {
        for sub in command.get_subcommands() {
            left.push((format!("{name}-{}", sub.get_name()), sub.clone()));
        }
        let path = dir.join(format!("{name}.1"));
        // The page's title wants a name that lives as long as the program, which writes each once.
        let name: &'static str = String::leak(name);
        let page = clap_mangen::Man::new(command.name(name));
        let mut file = File::create(&path).map_err(failed(&path))?;
        page.render(&mut file).map_err(failed(&path))?;
        written.push(path);
    }
    written.sort();
    Ok(written)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_command_has_a_page_that_names_its_options() {
        let dir = tempfile::tempdir().unwrap();
        let pages = pages(&dir.path().join("man")).unwrap();
        let text = |name: &str| {
            let path = pages.iter().find(|path| path.file_name().unwrap() == name);
            fs::read_to_string(path.unwrap_or_else(|| panic!("no {name}"))).unwrap()
        };
        // A hyphen is an escaped one in a page.
        assert!(text("mce-relay-poison.1").contains("filter\\-memcg"));
        assert!(text("mce-relay-run.1").contains("on\\-undeliverable"));
        assert!(text("mce-relay-memory-dump.1").contains("FILE"));
        for command in Cli::command().get_subcommands() {
            text(&format!("mce-relay-{}.1", command.get_name()));
        }
    }

    #[test]
    fn every_shell_has_completions() {
        for shell in Shell::value_variants() {
            let mut text = Vec::new();
            completions(*shell, &mut text).unwrap();
            let text = String::from_utf8(text).unwrap();
            assert!(text.contains("poison") && text.contains("hwpoison-inject"), "{shell}");
        }
    }
}
