//! The commands in README.md, docs/ and the help, as they stand there, and somebody who types them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::agent::PATIENCE;
use crate::guest::mce_relay;
use crate::pty::Shell;

/// What a block of commands without prompts begins with.
const PROGRAMS: [&str; 4] = ["mce-relay", "make", "curl", "cargo"];

/// Commands that are not typed, and why. One that is in no document any more fails the test.
const LEFT_OUT: [(&str, &str); 12] = [
    ("make run", "it is what `make run` does, and takes the lab"),
    ("make test", "it is what this is a part of"),
    ("make build guest-image lab-image", "it has been done, or this would not run"),
    ("make lab", "the lab is where this runs"),
    ("make lab CMD='target/release/mce-relay check'", "the lab is where this runs"),
    ("target/release/hold bash", "the lab's own runner holds the idle VMs"),
    (
        "mce-relay pause --vm vm1 && mce-relay memory dump --vm vm1 vm1.core && mce-relay resume --vm vm1",
        "README.md has it, too, where there is a VM of that name",
    ),
    (
        "makedumpfile --dump-dmesg vm1.core dmesg && head -1 dmesg",
        "memory::core has it read a Linux guest's dump in the lab",
    ),
    ("crash --osrelease vm1.core", "memory::core has it read a Linux guest's dump in the lab"),
    ("crash vmlinux vm1.core", "needs the guest kernel's debug information, a gigabyte"),
    ("drgn -c vm1.core -s vmlinux", "needs the guest kernel's debug information, a gigabyte"),
    ("python3 tests/judges/dmesg.py vm1.core", "memory::core runs it in the lab"),
];

/// A command of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Typed {
    /// Where it stands.
    pub place: String,
    /// What is to be typed; of several lines where it has been written so.
    pub text: String,
}

impl Typed {
    /// Whether it takes a page frame of the host out of use, or needs Linux in the guest.
    pub fn is_for_the_lab(&self) -> bool {
        ["hwpoison-inject", "via madvise", "soft-offline", "mce-inject", "mce-relay retire"]
            .iter()
            .any(|words| self.text.contains(words))
    }
}

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// README.md and what is in docs/, by name.
pub fn documents() -> Vec<String> {
    let docs = std::fs::read_dir(top().join("docs")).unwrap();
    let names = docs.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut all: Vec<String> =
        names.filter(|name| name.ends_with(".md")).map(|name| format!("docs/{name}")).collect();
    all.sort();
    all.insert(0, "README.md".to_owned());
    all
}

/// The commands of a document.
pub fn of_document(name: &str) -> Vec<Typed> {
    let text = std::fs::read_to_string(top().join(name)).unwrap();
    let mut all = Vec::new();
    // The language of the block, and the lines that are in it.
    let mut block: Option<(&str, Vec<(usize, &str)>)> = None;
    for (number, line) in text.lines().enumerate() {
        match (&mut block, line.trim_start().strip_prefix("```")) {
            (None, Some(language)) => block = Some((language, Vec::new())),
            (Some((_, lines)), None) => lines.push((number + 1, line)),
            (Some((language, lines)), Some(_)) => {
                if ["", "sh", "console"].contains(language) {
                    all.extend(of_block(name, lines));
                }
                block = None;
            }
            (None, None) => {}
        }
    }
    all
}

fn of_block(name: &str, lines: &[(usize, &str)]) -> Vec<Typed> {
    let is_transcript = lines.iter().any(|(_, line)| line.starts_with("$ "));
    let first_word = lines.first().and_then(|(_, line)| line.split(' ').next()).unwrap_or_default();
    if !is_transcript && !PROGRAMS.contains(&first_word) {
        return Vec::new();
    }
    let mut all: Vec<Typed> = Vec::new();
    let mut goes_on = false;
    for (number, line) in lines {
        if goes_on {
            let text = &mut all.last_mut().unwrap().text;
            text.push('\n');
            text.push_str(line);
        } else {
            let command = if is_transcript { line.strip_prefix("$ ") } else { Some(*line) };
            let Some(command) = command.filter(|command| !command.is_empty()) else { continue };
            all.push(Typed { place: format!("{name}:{number}"), text: without_comment(command) });
        }
        let text = &all.last().unwrap().text;
        goes_on = text.ends_with('\\') || text.matches('\'').count() % 2 == 1;
    }
    all
}

/// Without what a shell takes for a comment, and the spaces before it.
fn without_comment(text: &str) -> String {
    text.split(" # ").next().unwrap_or_default().trim_end().to_owned()
}

/// The examples in the help of `mce-relay` and of its commands.
pub fn of_help() -> Vec<Typed> {
    let help = |words: &[&str]| {
        let out = mce_relay(&[words, &["--help"]].concat());
        String::from_utf8(out.stdout).unwrap()
    };
    let all = help(&[]);
    let listed = all.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = listed.take_while(|line| !line.is_empty());
    let commands: Vec<&str> = listed
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.len() > 10, "{all}");
    let mut examples = examples_in("mce-relay --help", &all);
    for command in commands {
        examples.extend(examples_in(&format!("mce-relay {command} --help"), &help(&[command])));
    }
    examples
}

fn examples_in(place: &str, help: &str) -> Vec<Typed> {
    let mut all: Vec<Typed> = Vec::new();
    let mut goes_on = false;
    for line in help.lines() {
        if let Some(line) = line.strip_prefix("    ").filter(|_| goes_on) {
            let text = &mut all.last_mut().unwrap().text;
            text.push('\n');
            text.push_str(line);
            goes_on = line.ends_with('\\');
        } else if let Some(line) = line.strip_prefix("    mce-relay ") {
            all.push(Typed { place: place.to_owned(), text: format!("mce-relay {line}") });
            goes_on = line.ends_with('\\');
        }
    }
    all
}

/// Sees that what is left out is in the documents still.
pub fn nothing_is_left_out_for_nothing() {
    let all: Vec<Typed> =
        documents().iter().flat_map(|name| of_document(name)).chain(of_help()).collect();
    println!("    {} commands in the documents", all.len());
    for (text, _) in LEFT_OUT {
        assert!(all.iter().any(|typed| typed.text == text), "{text:?} is in no document");
    }
}

/// Somebody who types what is in the documents.
#[derive(Debug)]
pub struct Reader {
    shell: Shell,
    /// What is typed instead of what the documents have: paths, and addresses that differ from guest to guest.
    instead: Vec<(String, String)>,
    /// Commands that end with another status than 0.
    statuses: &'static [(&'static str, &'static [u8])],
}

impl Reader {
    /// One at a shell.
    pub fn start(
        statuses: &'static [(&'static str, &'static [u8])],
        configure: impl FnOnce(&mut Command),
    ) -> Self {
        Self { shell: Shell::start(configure), instead: Vec::new(), statuses }
    }

    /// Its shell.
    pub fn shell(&mut self) -> &mut Shell {
        &mut self.shell
    }

    /// From now on types `there` where the documents have `here`.
    pub fn instead(&mut self, here: &str, there: impl Into<String>) {
        self.instead.push((here.to_owned(), there.into()));
    }

    /// Types it, and sees that it ends as it should; what it printed.
    pub fn types(&mut self, typed: &Typed) -> String {
        let Typed { place, text } = typed;
        if let Some((_, why)) = LEFT_OUT.iter().find(|(left, _)| left == text) {
            println!("    LEFT OUT {place}: {text}: {why}");
            return String::new();
        }
        let mut line = text.clone();
        for (here, there) in &self.instead {
            line = line.replace(here, there);
        }
        let follows = line.contains("--follow") && !line.ends_with('&');
        let (status, printed) = if follows {
            self.shell.run_until(&line, "boot 1");
            self.shell.pty().type_in(b"\x03");
            self.shell.back()
        } else {
            self.shell.run_long(&line, Duration::from_secs(240))
        };
        let known = self.statuses.iter().find(|(known, _)| text.starts_with(known));
        let expected = match known {
            Some((_, expected)) => *expected,
            None if follows => &[130][..],
            None => &[0],
        };
        assert!(expected.contains(&status), "{place}: {line}: exit status {status}:\n{printed}");
        assert!(!printed.contains("made system call"), "{place}: {line}:\n{printed}");
        if line.starts_with("mce-relay run ") {
            self.wait_for_guest(&line);
        }
        printed
    }

    /// The VM is there when it is listed; a guest with Linux in it is when its console says so.
    fn wait_for_guest(&mut self, line: &str) {
        let start = Instant::now();
        while !self.shell.run("mce-relay list").1.contains("running") {
            assert!(start.elapsed() < PATIENCE, "{line}: no VM is listed");
            std::thread::sleep(Duration::from_millis(200));
        }
        let file = line.split_once("--serial file=").unwrap().1;
        let file = file.split_whitespace().next().unwrap();
        let is_up = format!("grep -q 'mce-relay guest: ready' {file}");
        while line.contains("guest-image") && self.shell.run(&is_up).0 != 0 {
            assert!(start.elapsed() < PATIENCE, "{line}: the guest does not come up");
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lines: &[&str]) -> Vec<String> {
        let numbered: Vec<(usize, &str)> = (1..).zip(lines.iter().copied()).collect();
        of_block("x", &numbered).into_iter().map(|typed| typed.text).collect()
    }

    #[test]
    fn commands_are_told_from_what_they_print() {
        assert_eq!(texts(&["$ a \\", "  b", "printed", "$ c"]), ["a \\\n  b", "c"]);
        assert_eq!(texts(&["$ ask() { x '", "  y' }", "printed"]), ["ask() { x '\n  y' }"]);
        assert_eq!(
            texts(&["mce-relay check # what's there", "make test"]),
            ["mce-relay check", "make test"]
        );
        assert!(texts(&["[Unit]", "ExecStart=mce-relay run"]).is_empty());
    }
}
