//! Manual pages and shell completions, from the same source as `--help`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

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
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let error = |source| ManualError { path: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(error)?;
    let mut pages = Vec::new();
    write_pages(&command, dir, &mut pages).map_err(error)?;
    pages.sort();
    Ok(pages)
}

/// Writes the page of a command that was built, and those of its subcommands.
fn write_pages(command: &Command, dir: &Path, pages: &mut Vec<PathBuf>) -> io::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        write_pages(below, dir, pages)?;
    }
    let page = Man::new(command.clone().override_usage(synopsis(command)));
    pages.push(page.generate_to(dir)?);
    Ok(())
}

/// How the command is called, with all its options and the names of their values, which clap_mangen leaves out.
fn synopsis(command: &Command) -> String {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    let groups: Vec<Vec<&Arg>> = command
        .get_groups()
        .filter(|group| group.is_required_set())
        .map(|group| {
            let is_of = |arg: &&Arg| group.get_args().any(|id| id == arg.get_id());
            command.get_arguments().filter(is_of).collect()
        })
        .collect();
    let is_alone = |arg: &&Arg| !groups.iter().flatten().any(|of| of.get_id() == arg.get_id());
    let shown = || command.get_arguments().filter(|arg| !arg.is_hide_set()).filter(is_alone);
    let options = |is_required: bool| {
        shown().filter(move |arg| !arg.is_positional() && arg.is_required_set() == is_required)
    };
    let mut words = vec![name.to_owned()];
    words.extend(options(false).map(|arg| format!("[{}]", call(arg))));
    words.extend(options(true).map(call));
    words.extend(groups.iter().map(|of| {
        let ways: Vec<String> = of.iter().map(|arg| call(arg)).collect();
        format!("<{}>", ways.join("|"))
    }));
    words.extend(command.get_positionals().filter(|arg| !arg.is_hide_set()).map(call));
    if command.has_subcommands() {
        words.push("<COMMAND>".to_owned());
    }
    words.join(" ")
}

/// An option or a value as it is given.
fn call(arg: &Arg) -> String {
    match (arg.get_short(), arg.get_long()) {
        (Some(short), Some(_)) => format!("-{short}|{arg}"),
        _ => arg.to_string(),
    }
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
        // Of the synopsis, without what stands for hyphens.
        let synopsis = |name: &str| {
            let text = text(name).replace('\\', "");
            let (_, behind) = text.split_once("SYNOPSIS").unwrap();
            behind.split_once("DESCRIPTION").unwrap().0.to_owned()
        };
        let run = synopsis("mce-relay-run.1");
        for part in
            ["[--memory <size=SIZE,...>]", "[--no-reboot]", "--kernel <PATH>", "[-h|--help]"]
        {
            assert!(run.contains(part), "{part}: {run}");
        }
        assert!(!run.contains("[--kernel"), "{run}");
        let dump = synopsis("mce-relay-memory-dump.1");
        let one_of = "<--vm <NAME|PATH>|--api-socket <path=PATH>> <FILE>";
        assert!(dump.contains(one_of), "{dump}");
        assert!(synopsis("mce-relay.1").contains("<COMMAND>"));
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
