//! Manual pages and shell completions, from the same source as `--help`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::commands::Cli;

/// The manual could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the manual pages into {path}", path = .path.display())]
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
    let written = fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
        .map_err(|source| ManualError { path: dir.to_owned(), source });
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut pages: Vec<PathBuf> =
        names(&command).into_iter().map(|name| dir.join(format!("{name}.1"))).collect();
    pages.sort();
    written.map(|()| pages)
}

/// The names of a command that was built, and of all its subcommands.
fn names(command: &clap::Command) -> Vec<String> {
    let own = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let below = command.get_subcommands().filter(|sub| !sub.is_hide_set()).flat_map(names);
    std::iter::once(own).chain(below).collect()
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_command_has_a_page_that_names_its_options() {
        let dir = tempfile::tempdir().unwrap();
        let pages = pages(&dir.path().join("man")).unwrap();
        let mut there: Vec<PathBuf> = fs::read_dir(dir.path().join("man"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        there.sort();
        assert_eq!(pages, there, "what was written is named");
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
