//! What is shown on a terminal: in colour where there are colours, whichever thread says it; plain where there
//! are none; in ASCII where that is all there is; and never wider than the terminal.

use std::process::Command;

use mce_relay_cli::client::requests;
use mce_relay_tests::guest::mce_relay;
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::pty::{Pty, Started, shown};
use mce_relay_tests::spinning::Spinning;
use mce_relay_tests::tiny::{elf, takes_machine_checks};
use mce_relay_vmm::api::types::vm::VmInfo;
use tempfile::TempDir;

const ESCAPE: char = '\u{1b}';

/// `mce-relay run` with a guest of a few instructions, on a terminal with colours.
struct OnTerminal {
    pty: Pty,
    run: Started,
    dir: TempDir,
}

impl OnTerminal {
    fn start(code: &[u8], more: &[&str], configure: impl FnOnce(&mut Command)) -> Self {
        let (pty, dir) = (Pty::new(24, 80), tempfile::tempdir().unwrap());
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("kernel"), elf(code)).unwrap();
        let run = pty.start(mce_relay_tests::guest::binary(), |command| {
            command.args(["run", "--kernel"]).arg(at("kernel"));
            if !more.contains(&"--memory") {
                command.args(["--memory", "32M"]);
            }
            command.args(["--api-socket", &format!("path={}", at("api").display())]).args(more);
            configure(command);
        });
        let mut vm = Self { pty, run, dir };
        let start = std::time::Instant::now();
        while vm.info().is_none() {
            vm.lives();
            assert!(start.elapsed().as_secs() < 60, "no answer: {}", vm.pty.text());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        vm
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("api")
    }

    fn info(&self) -> Option<VmInfo> {
        requests::get(&self.socket(), "vm.info").ok()
    }

    fn lives(&mut self) {
        let ended = self.run.has_ended();
        assert!(ended.is_none(), "it has ended with {ended:?}: {}", self.pty.text());
    }

    fn poison(&self, more: &[&str]) {
        let at = format!("path={}", self.socket().display());
        let out = mce_relay(&[&["poison", "--api-socket", &at], more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    /// Waits for these words of the log.
    fn says(&mut self, words: &str) {
        self.pty.wait_for(words, |text| {
            assert!(!text.contains("made system call"), "{text}");
            text.contains(words).then_some(())
        });
        self.lives();
    }
}

const AS_INTEL: [&str; 5] = ["-v", "--cpu-vendor", "intel", "--ao-channel", "mce"];

/// Each thread that has something to say says it in colour, and lives: boot, errors of two kinds, a pause, the end.
pub fn every_thread_may_say_what_it_has_to_say() {
    let mut vm = OnTerminal::start(takes_machine_checks(), &AS_INTEL, |_| ());
    vm.pty.wait_until_raw(true);
    vm.says("boot 1");
    vm.poison(&["--via", "signal", "--gpa", "0x3000"]);
    vm.says("acknowledged: FORGED");
    vm.poison(&["--via", "signal", "--gpa", "0x4000", "--kind", "ar", "--force"]);
    vm.says("GPA 0x4000");
    requests::put(&vm.socket(), "vm.pause").unwrap();
    vm.says("paused");
    requests::put(&vm.socket(), "vm.resume").unwrap();
    vm.says("resumed");
    vm.pty.type_in(b"\x01x");
    assert_eq!(vm.run.ended().code(), Some(0), "{}", vm.pty.text());
    assert!(vm.pty.text().contains("\u{1b}["), "in colour: {}", vm.pty.text());
    assert!(!vm.pty.is_raw());
}

/// The same of a page that really is bad, which the API's thread runs into.
pub fn a_page_that_is_really_bad() {
    let mut vm = OnTerminal::start(takes_machine_checks(), &AS_INTEL, |_| ());
    vm.poison(&["--via", "uffd", "--gpa", "0x3000"]);
    let at = format!("path={}", vm.socket().display());
    let out = mce_relay(&["memory", "read", "--api-socket", &at, "--gpa", "0x3000"]);
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    vm.says("seen: AO");
    vm.says("acknowledged: GPA 0x3000");
    requests::put(&vm.socket(), "vm.shutdown").unwrap();
    assert_eq!(vm.run.ended().code(), Some(0), "{}", vm.pty.text());
}

/// What the guest cannot be told of pauses it, and is said without -v.
pub fn an_undeliverable_ar_pauses_the_vm() {
    let mut vm = OnTerminal::start(&SPIN, &["--on-undeliverable", "pause"], |_| ());
    vm.poison(&["--via", "signal", "--kind", "ar", "--force", "--gpa", "0x3000"]);
    vm.says("paused: vCPU 0 touched the bad page at 0x3000");
    assert!(vm.info().unwrap().pause_reason.is_some());
    requests::put(&vm.socket(), "vm.shutdown").unwrap();
    assert_eq!(vm.run.ended().code(), Some(0), "{}", vm.pty.text());
}

/// Colours can be asked for where there is no terminal.
pub fn colours_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut vm = OnTerminal::start(takes_machine_checks(), &AS_INTEL, |command| {
        command.env("RUST_LOG_STYLE", "always").stderr(std::fs::File::create(&log).unwrap());
    });
    vm.poison(&["--via", "signal", "--gpa", "0x3000"]);
    requests::put(&vm.socket(), "vm.shutdown").unwrap();
    assert_eq!(vm.run.ended().code(), Some(0), "{}", vm.pty.text());
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains(ESCAPE) && log.contains("caught: FORGED"), "{log}");
}

/// Long work shows how far it is and how long it will take yet, on a terminal. Ctrl-C ends it, and what became of
/// all pages is a line and not one for each.
pub fn long_work_can_be_watched_and_interrupted() {
    let vm = OnTerminal::start(&SPIN, &["--memory", "512M", "--serial", "off"], |_| ());
    let at = format!("path={}", vm.socket().display());
    let poison = ["poison", "--api-socket", &at, "--via", "signal", "--gpa"];
    let pty = Pty::new(24, 80);
    let mut long = pty.start(mce_relay_tests::guest::binary(), |command| {
        command.args(poison).arg("0x100000..0x10100000");
    });
    pty.wait_for_text(" of 65536 pages, ");
    pty.type_in(b"\x03");
    assert_eq!(long.ended().code(), Some(128 + libc::SIGINT), "{}", pty.text());
    pty.wait_for_text("not tried is as it was");
    let text = console_text(&pty.text());
    println!("    {}", text.trim_end().replace(['\r', '\n'], "\n    "));
    assert!(text.contains("poisoning [") && text.contains(" left"), "{text}");
    assert!(text.contains("interrupted: of 65536 pages "), "{text}");
    assert!(text.lines().count() < 60, "{text}");

    let piped = mce_relay(&[&poison[..], &["0x11000000..0x12000000"]].concat());
    let (out, err) =
        (String::from_utf8_lossy(&piped.stdout), String::from_utf8_lossy(&piped.stderr));
    assert!(piped.status.success() && err.is_empty(), "{err}");
    assert!(out.starts_with("FORGED (the page is whole): 4096 of 4096 pages"), "{out}");
}

/// A VM with a page of each kind that takes no privileges, and what shows it.
fn with_bad_pages() -> (Spinning, Vec<Vec<String>>) {
    let vm = Spinning::start(&["--cpus", "2"]);
    let via_signal = ["--via", "signal", "--gpa", "0x3000..0x5000,0x1ff0000"];
    assert!(vm.command("poison", &via_signal).status.success());
    let socket = vm.socket().display().to_string();
    let of_it = [
        "status",
        "events",
        "pages --map",
        "pages --gpa 0x1000..0x6000",
        "inject --status srao --dry-run",
        "memory read --gpa 0x100000 --len 256",
        "poison --via signal --gpa 0x8000 --dry-run",
        "poison --via uffd --gpa 0x99999999999",
    ];
    let mut all: Vec<Vec<String>> = of_it
        .iter()
        .map(|line| {
            let words = line.split(' ').map(str::to_owned);
            words.chain(["--api-socket".into(), format!("path={socket}")]).collect()
        })
        .collect();
    all.extend([vec!["check".into()], vec!["list".into()]]);
    (vm, all)
}

fn on_screen(
    columns: u16,
    args: &[String],
    configure: impl Fn(&mut Command),
) -> (std::process::ExitStatus, String) {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let shown = shown(24, columns, &args, configure);
    println!("    {columns} columns: {}\n{}", args.join(" "), shown.1);
    shown
}

fn set(command: &mut Command, name: &str, value: &str) {
    command.env(name, value);
}

/// NO_COLOR and TERM=dumb: no escape. The C locale: nothing but ASCII.
pub fn only_what_the_terminal_can_show() {
    let (vm, lines) = with_bad_pages();
    let mut coloured = 0;
    for line in &lines {
        coloured += usize::from(on_screen(80, line, |_| ()).1.contains(ESCAPE));
        for (name, value) in [("NO_COLOR", "1"), ("TERM", "dumb")] {
            let (_, text) = on_screen(80, line, |command| set(command, name, value));
            assert!(!text.contains(ESCAPE), "{name}={value}: {line:?}: {text:?}");
        }
        for (name, value) in [("LC_ALL", "C"), ("LC_ALL", "POSIX"), ("LANG", "")] {
            let (_, text) = on_screen(80, line, |command| set(command, name, value));
            assert!(text.is_ascii(), "{name}={value}: {line:?}: {text}");
        }
    }
    assert!(coloured >= 4, "of {} outputs {coloured} have colours", lines.len());
    drop(vm);
}

/// Help is for any terminal.
pub fn help_is_ascii() {
    let commands = [
        "",
        "run",
        "list",
        "poison",
        "unpoison",
        "inject",
        "status",
        "events",
        "pages",
        "retire",
        "memory",
        "memory read",
        "memory dump",
        "pause",
        "resume",
        "shutdown",
        "check",
        "completions",
        "man",
    ];
    for command in commands {
        let words = command.split(' ').filter(|word| !word.is_empty()).chain(["--help"]);
        let line: Vec<String> = words.map(str::to_owned).collect();
        for columns in [80, 0] {
            let (status, text) = on_screen(columns, &line, |command| set(command, "LC_ALL", "C"));
            assert!(status.success() && text.is_ascii(), "{line:?}: {text}");
        }
    }
}

/// No line is longer than the terminal is wide, 80 where it does not know; addresses are whole.
pub fn tables_fit() {
    let (vm, lines) = with_bad_pages();
    let status = vm.status();
    let hvas = status.pages.iter().map(|page| format!("{:#x}", page.hva));
    let wanted: Vec<String> =
        hvas.chain(["0x3000", "0x4000", "0x1ff0000"].map(str::to_owned)).collect();
    for line in lines.iter().filter(|line| ["status", "pages", "check"].contains(&&*line[0])) {
        let is_map = line.contains(&"--map".to_owned());
        for (columns, width) in [(80, 80), (0, 80), (132, 132)] {
            let (_, text) = on_screen(columns, line, |_| ());
            let text = console_text(&text);
            for one in text.lines().filter(|one| one.contains(['│', '┌', '╞'])) {
                assert!(one.chars().count() <= width, "{columns} columns, {line:?}:\n{text}");
            }
            if line[0] == "status" {
                for word in &wanted {
                    assert!(text.contains(word), "{columns} columns: {word} is broken:\n{text}");
                }
            }
            assert!(is_map || text.lines().any(|one| one.chars().count() > width / 2), "{text}");
        }
    }
    drop(vm);
}

/// Without escapes.
fn console_text(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("\u{1b}[") {
        plain.push_str(&rest[..start]);
        let escape = &rest[start + 2..];
        let end = escape.find(|c: char| c.is_ascii_alphabetic()).map_or(escape.len(), |at| at + 1);
        rest = &escape[end..];
    }
    plain.push_str(rest);
    plain
}
