//! Reports that cannot be made, and one of a VM that runs and that has ended.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use mce_relay_tests::guest::binary;
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::left::Place;
use mce_relay_tests::spinning::Spinning;
use serde_json::Value;

use crate::refused;
use crate::terminal::Terminal;

const EVENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/report/events.jsonl");

fn report(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("report").args(args).stdin(Stdio::null());
    command
}

fn done(mut command: Command) -> Output {
    command.output().unwrap()
}

pub fn that_cannot_be_made() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    fs::copy(EVENTS, at("events")).unwrap();
    let (events, page) = (at("events"), at("page"));
    for (args, status, named) in [
        (&["--events", &events][..], 2, &["--output <FILE>"][..]),
        (&["-o", &page], 2, &["--events <FILE>"]),
        (&["-o", &page, "--events", &events, "--vm", "x"], 2, &["cannot be used with"]),
        (&["-o", &page, "vm1"], 2, &["--vm vm1"]),
        (&["-o", &page, "--vm", "nobody-has-this-name"], 1, &["nobody-has-this-name"]),
        (&["-o", &page, "--api-socket", "/nowhere/api"], 1, &["/nowhere/api"]),
        (&["-o", &page, "--events", "/nowhere/events"], 1, &["cannot read events", "No such file"]),
        (&["-o", &page, "--events", &at("")], 1, &["cannot read events", "Is a directory"]),
        (&["-o", &page, "--events", "/dev/zero"], 1, &["/dev/zero", "256 MiB", "tail -n"]),
        (&["-o", &events, "--events", &events], 1, &["is the file of events that is read"]),
        (&["-o", &at(""), "--events", &events], 1, &["is a directory"]),
        (&["-o", "/dev/null", "--events", &events], 1, &["is no file", "- for stdout"]),
        (&["-o", "/nowhere/page", "--events", &events], 1, &["/nowhere/page", "mkdir -p"]),
    ] {
        refused(&done(report(args)), status, named);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was left behind");
    assert_eq!(fs::read(at("events")).unwrap(), fs::read(EVENTS).unwrap());

    let terminal = Terminal::new();
    let mut command = report(&["-o", "-", "--events", &events]);
    command.stdout(terminal.stdio()).stderr(Stdio::piped());
    refused(&done(command), 1, &["stdout is a terminal", "--json"]);
    // The file that is read is on stdin, or on stdout, too.
    let stdin = || File::open(&events).unwrap();
    let mut command = report(&["--events", "-", "-o", &events]);
    command.stdin(stdin());
    refused(&done(command), 1, &["is the file of events that is read"]);
    let mut command = report(&["--events", "-", "-o", "-"]);
    command.stdin(stdin()).stdout(File::options().append(true).open(&events).unwrap());
    command.stderr(Stdio::piped());
    refused(&done(command), 1, &["is the file of events that is read"]);
    assert_eq!(fs::read(&events).unwrap(), fs::read(EVENTS).unwrap());

    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut command = report(&["-o", "-", "--events", &events]);
    command.stdout(full).stderr(Stdio::piped());
    refused(&done(command), 1, &["cannot write the result", "No space left"]);
}

/// Nothing is left of a report that was cut short, and what was there is still there.
pub fn that_is_cut_short() {
    let dir = tempfile::tempdir().unwrap();
    if File::options().write(true).custom_flags(libc::O_TMPFILE).open(dir.path()).is_err() {
        return println!("SKIPPED: needs a file system with O_TMPFILE at {}", dir.path().display());
    }
    let page = dir.path().join("page");
    fs::write(&page, "the last one").unwrap();
    let mut command = Command::new("sh");
    // In blocks of 512 or 1024 bytes; a longer file is ended by SIGXFSZ.
    command.args(["-c", "ulimit -c 0; ulimit -f 4; exec \"$@\"", "sh"]).arg(binary());
    command.args(["report", "--events", EVENTS, "-o"]).arg(&page).stdin(Stdio::null());
    let out = done(command);
    assert_eq!(out.status.signal(), Some(libc::SIGXFSZ), "{out:?}");
    assert_eq!(fs::read_to_string(&page).unwrap(), "the last one");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was left behind");
}

/// A line that is no event is told in a few words, and where nobody can be told there is a report all the same.
pub fn of_a_broken_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("events");
    fs::write(&file, format!("{{\"timestamp\":\"{}\"}}\n", "x".repeat(500_000))).unwrap();
    let path = file.display().to_string();
    let out = done(report(&["--events", &path, "--json"]));
    assert!(out.status.success() && out.stderr.len() < 1000, "{} bytes", out.stderr.len());
    let why = json_of(&out)["log"]["first_broken"]["why"].as_str().unwrap().to_owned();
    assert!(why.starts_with("invalid type") && why.ends_with('…'), "{why}");

    let full = || File::options().write(true).open("/dev/full").unwrap();
    let mut command = report(&["--events", &path, "-o", "-"]);
    command.stdout(Stdio::piped()).stderr(full());
    let out = done(command);
    assert!(out.status.success() && out.stdout.ends_with(b"</html>\n"), "{:?}", out.status);
    let mut command = report(&["--events", &path, "-o", "-"]);
    command.stdout(full()).stderr(full());
    assert_eq!(done(command).status.code(), Some(1));
    let mut command = report(&["--events", "/nowhere", "-o", "-"]);
    command.stdout(Stdio::piped()).stderr(full());
    assert_eq!(done(command).status.code(), Some(1));
}

/// A file without events, one that is cut short, one with other bytes: a report, and words on stderr.
pub fn of_files_that_are_no_events() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("events");
    let path = file.display().to_string();
    for (bytes, told, shown) in [
        (&b""[..], "there are no events", "There are no events"),
        (b"\n\n", "there are no events", "There are no events"),
        (
            b"\xff\xfe\0\n{\"event\":\"se",
            "2 lines could not be read as events",
            "2 lines could not",
        ),
        (b"<html>\n", "the first is line 1", "1 line could not"),
    ] {
        fs::write(&file, bytes).unwrap();
        let out = done(report(&["--events", &path, "-o", "-"]));
        let (page, words) =
            (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
        println!("    {}", words.trim_end());
        assert!(out.status.success() && words.contains(told), "{words}");
        assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"), "{page}");
        assert!(page.contains(shown), "{page}");
    }
}

/// The same by stdin, as JSON and as a page.
pub fn of_a_pipe() {
    let by = |args: &[&str]| {
        let mut command = report(args);
        command.stdin(File::open(EVENTS).unwrap());
        let out = done(command);
        assert!(out.status.success(), "{out:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    let json: Value = serde_json::from_str(&by(&["--events", "-", "--json"])).unwrap();
    assert_eq!((&json["totals"]["bad"], &json["log"]["broken"]), (&521.into(), &1.into()));
    assert!(by(&["--events", "-", "-o", "-"]).contains("<title>Bad memory of a VM</title>"));
}

/// A hundred thousand events, of 25,000 pages: all pages are there, and not all lines.
pub fn of_many_events() {
    use std::fmt::Write;
    let mut text = String::new();
    for page in 0..25_000_u64 {
        let (gpa, hva) =
            (format!("{:#x}", page << 13), format!("{:#x}", 0x7f00_0000_0000 + (page << 13)));
        let mut event = |at: u64, name: &str, properties: String| {
            let at = page * 100 + at;
            let (secs, nanos) = (at / 1_000_000, at % 1_000_000 * 1000);
            writeln!(
                text,
                r#"{{"event":"{name}","properties":{{{properties}}},"source":"memory","timestamp":{{"nanos":{nanos},"secs":{secs}}}}}"#
            )
            .unwrap();
        };
        event(
            0,
            "caught",
            format!(r#""kind":"AO","hva":"{hva}","lsb":12,"thread":"relay","forged":false"#),
        );
        event(
            10,
            "seen",
            format!(
                r#""gpa":"{gpa}","hva":"{hva}","kind":"AO","found_by":"signal","extent":4096,"pages":1"#
            ),
        );
        event(
            20,
            "injected",
            format!(r#""gpa":"{gpa}","channel":"ghes","record":1,"pages":1,"after_micros":10"#),
        );
        event(30, "acknowledged", format!(r#""gpa":"{gpa}","channel":"ghes","record":1"#));
    }
    let dir = tempfile::tempdir().unwrap();
    let (events, page) = (dir.path().join("events"), dir.path().join("page"));
    fs::write(&events, text).unwrap();
    let args = ["--events", &events.display().to_string(), "-o", &page.display().to_string()];
    let start = Instant::now();
    let out = done(report(&args));
    let took = start.elapsed();
    assert!(out.status.success(), "{out:?}");
    let page = fs::read_to_string(page).unwrap();
    println!("    {took:?}, {} bytes", page.len());
    assert_eq!(page.matches("<tr data-kinds").count(), 25_000);
    assert!(page.contains("<strong>Only the last"), "raw lines are left out");
    assert!(took < Duration::from_secs(30), "{took:?}");
}

fn json_of(out: &Output) -> Value {
    assert!(out.status.success(), "{out:?}");
    serde_json::from_slice(&out.stdout).unwrap()
}

/// By its socket, of a VM without a name: the guest's memory is known, and so is the page.
pub fn of_a_vm_that_runs() {
    let vm = Spinning::start(&[]);
    let poisoned = vm.command("poison", &["--via", "signal", "--gpa", "0x3000"]);
    assert!(poisoned.status.success(), "{poisoned:?}");
    let json = json_of(&vm.command("report", &["--json"]));
    assert_eq!(json["memory"]["ram"][0]["gpa"], "0x0", "{json:#}");
    assert_eq!(
        (&json["totals"]["forged"], &json["pages"][0]["gpa"]),
        (&1.into(), &"0x3000".into())
    );
    let page = vm.path("page.html");
    let out = vm.command("report", &["-o", &page.display().to_string()]);
    assert!(out.status.success() && out.stdout.is_empty() && out.stderr.is_empty(), "{out:?}");
    let text = fs::read_to_string(&page).unwrap();
    assert!(
        text.contains("FORGED") && text.contains("0x3000") && text.contains("<dd>runs</dd>"),
        "{text}"
    );
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// By its name, while it runs and after its end.
pub fn of_a_vm_with_a_name() {
    let place = Place::new(&SPIN);
    let vm = place.start("mce-relay/n.sock", &["--name", "n", "--serial", "off"]);
    let shown = |stands: &str| {
        let json = json_of(&place.tool(&["report", "--vm", "n", "--json"]));
        assert_eq!(json["of"]["vm"], "n", "{json:#}");
        assert!(json["of"]["stands"].as_str().unwrap().contains(stands), "{json:#}");
        assert_eq!(json["vmms"][0]["boots"][0]["boot"], 1, "{json:#}");
    };
    shown("runs");
    vm.signal(libc::SIGKILL);
    vm.ended();
    shown("n ended without a word");
    let page = place.path("n.html");
    let out = place.tool(&["report", "--vm", "n", "-o", &page.display().to_string()]);
    assert!(out.status.success(), "{out:?}");
    assert!(is_page_of(&page, "n"));
}

fn is_page_of(page: &Path, name: &str) -> bool {
    fs::read_to_string(page).unwrap().contains(&format!("<title>Bad memory of {name}</title>"))
}
