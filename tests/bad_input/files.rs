//! What a guest has said, and what happened to it, is in the files that it is written to: whatever the guest
//! does, whoever starts a second VM by mistake, and when the disk is full for a while.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mce_relay_cli::client::requests;
use mce_relay_tests::guest::image;
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::left::{AGAIN, Place, RESET, Running, WAIT, say};
use mce_relay_tests::tiny::POWER_OFF;
use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::pages::{Gpa, Poison, Poisoning};
use mce_relay_vmm::events::hub::KEPT;
use serde_json::Value;

use crate::refused;
use crate::terminal::Terminal;

const COM1: u16 = 0x3f8;
/// What a guest says before it dies.
const LAST: &str = "Kernel panic - not syncing: of a few instructions";

/// A guest that says its last words when it is told to, and resets itself.
fn panics() -> Vec<u8> {
    [&WAIT[..], &say(COM1, LAST), &RESET].concat()
}

/// A guest that does it again and again.
fn forever(mut code: Vec<u8>) -> Vec<u8> {
    // jmp to the start
    let back = i32::try_from(code.len() + 5).unwrap();
    code.push(0xe9);
    code.extend((-back).to_le_bytes());
    code
}

/// A guest that says `text` each time it is told to.
fn talks(text: &str) -> Vec<u8> {
    forever([&WAIT[..], &say(COM1, text), &AGAIN].concat())
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

/// What boots each line of `text` is of, by the lines between them: the last words of each.
fn boots(text: &str) -> Vec<(u32, usize)> {
    let mut boots = vec![(0, 0)];
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("--- mce-relay: boot ") {
            let (boot, time) = rest.split_once(", ").unwrap();
            assert!(time.starts_with("20") && time.ends_with("Z ---"), "{line}");
            boots.push((boot.parse().unwrap(), 0));
        }
        boots.last_mut().unwrap().1 += line.matches("Kernel panic").count();
    }
    boots
}

/// A guest that panics and resets itself three times: the console has all of it, and the next VM's, too.
pub fn all_boots_are_on_the_console() {
    let place = Place::new(&panics());
    let (console, events) = (place.argument("file", "console"), place.argument("path", "events"));
    let api = place.argument("path", "api");
    let options = ["--serial", &console, "--event-monitor", &events, "--api-socket", &api];
    for run in 0..2 {
        let mut vm = place.start("api", &options);
        for boot in 2..5 {
            vm.next_boot(boot);
        }
        vm.shut_down();
        let text = place.text("console");
        println!("    {}", text.replace('\n', "\n    "));
        let one = [(1, 1), (2, 1), (3, 1), (4, 0)];
        let first = [(0, 1), (2, 1), (3, 1), (4, 0)];
        let expected = if run == 0 { first.to_vec() } else { [first, one].concat() };
        assert_eq!(boots(&text), expected);
        let count = |what: &str| place.text("events").matches(what).count();
        assert_eq!((count(r#""booting""#), count(r#""ended""#)), (4 * (run + 1), run + 1));
    }
    assert_eq!((mode(&place.path("console")), mode(&place.path("events"))), (0o600, 0o600));
}

/// The same with Linux, which finds no root file system.
pub fn all_panics_of_linux_are_on_the_console() {
    let place = Place::new(&[]);
    let (console, api) = (place.argument("file", "console"), place.argument("path", "api"));
    let mut command = place.command(&["run", "--memory", "256M", "--serial", &console]);
    command.args(["--cmdline", "console=ttyS0,115200 loglevel=4 panic=-1 noxsave"]);
    command.args(["--api-socket", &api, "--kernel"]).arg(image("vmlinux"));
    let mut vm = place.started(command, "api");
    vm.wait("the fourth boot", |vm| vm.info().is_some_and(|info| info.boot == 4));
    vm.shut_down();
    let text = place.text("console");
    let panics: Vec<&str> = text.lines().filter(|line| line.contains("Kernel panic")).collect();
    println!("    {}", panics.join("\n    "));
    let panics: Vec<(u32, bool)> =
        boots(&text).into_iter().map(|(boot, panics)| (boot, panics > 0)).collect();
    assert_eq!(panics[..3], [(0, true), (2, true), (3, true)], "{text}");
}

/// A second VM of the same name, one whose kernel is not there, and one whose socket cannot be made, leave the
/// files of the first as they are.
pub fn who_is_refused_touches_nothing() {
    let place = Place::new(&talks("all is well\n"));
    let (console, events) = (place.argument("file", "console"), place.argument("path", "events"));
    let files = ["--serial", &console, "--event-monitor", &events];
    let named = [&files[..], &["--name", "a"]].concat();
    let mut vm = place.start("mce-relay/a.sock", &named);
    vm.go_once();
    vm.wait("its words", |_| place.text("console").contains("well\n"));
    vm.wait("its boot", |_| place.text("events").contains("booting"));
    let before = (place.text("console"), place.text("events"));

    refused(&place.run(&named).output().unwrap(), 1, &["\"a\"", "another name"]);
    let mut no_kernel = place.command(&["run", "--kernel", "/nowhere/vmlinux"]);
    refused(&no_kernel.args(files).output().unwrap(), 1, &["/nowhere/vmlinux"]);
    let mut no_socket = place.run(&files);
    no_socket.args(["--api-socket", "path=/nowhere/api"]);
    refused(&no_socket.output().unwrap(), 1, &["/nowhere/api"]);
    let taken = place.argument("path", "mce-relay/a.sock");
    let mut same_socket = place.run(&files);
    same_socket.args(["--api-socket", &taken]);
    refused(&same_socket.output().unwrap(), 1, &["a.sock", "listens there already"]);
    assert_eq!((place.text("console"), place.text("events")), before);

    vm.go_once();
    vm.wait("more words", |_| place.text("console").matches("well\n").count() == 2);
    vm.shut_down();
    assert!(place.text("events").contains("ended"), "{}", place.text("events"));
}

/// A console that grows without end has two files of limited length.
pub fn a_long_file_is_put_aside() {
    const MAX: u64 = 64 << 10;
    let place = Place::new(&forever(say(COM1, "0123456789abcde\n")));
    let console = format!("{},max-size=64K", place.argument("file", "console"));
    let api = place.argument("path", "api");
    let mut vm = place.start("api", &["--serial", &console, "--api-socket", &api]);
    let older = place.path("console.1");
    vm.wait("the older file", |_| older.exists());
    let first = fs::metadata(&older).unwrap().ino();
    // Put aside once more.
    vm.wait("the next older file", |_| fs::metadata(&older).unwrap().ino() != first);
    vm.shut_down();
    let len = fs::metadata(&older).unwrap().len();
    println!("    {len} and {} bytes", place.text("console").len());
    // What comes until the main thread has opened another goes there, too.
    assert!((MAX..MAX + (1 << 20)).contains(&len), "{len}");
    assert_eq!(mode(&older), 0o600);
    let other = fs::read_dir(place.path("")).unwrap().filter_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name.starts_with("console").then_some(name)
    });
    assert_eq!(other.count(), 2);
}

/// SIGHUP, as logrotate sends it: the files are opened again by their paths, and the VM goes on. Where it was
/// ignored from the start (nohup) nothing happens.
pub fn sighup_has_them_opened_again() {
    for ignored in [false, true] {
        let place = Place::new(&talks("word\n"));
        let (console, events) =
            (place.argument("file", "console"), place.argument("path", "events"));
        let api = place.argument("path", "api");
        let mut command = place.run(&["--serial", &console, "--event-monitor", &events]);
        command.args(["--api-socket", &api]);
        // Without a terminal, as a service.
        // SAFETY: both are async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                libc::setsid();
                libc::signal(libc::SIGHUP, if ignored { libc::SIG_IGN } else { libc::SIG_DFL });
                Ok(())
            });
        }
        let mut vm = place.started(command, "api");
        let said = |name: &str| place.text(name).matches("word\n").count();
        vm.go_once();
        vm.wait("a word", |_| said("console") == 1);
        for name in ["console", "events"] {
            fs::rename(place.path(name), place.path(&format!("{name}.old"))).unwrap();
        }
        vm.signal(libc::SIGHUP);
        if !ignored {
            vm.wait("new files", |_| {
                place.path("console").exists() && place.path("events").exists()
            });
        }
        vm.go_once();
        let (now, old) = if ignored { ("console.old", 2) } else { ("console", 1) };
        vm.wait("another word", |_| said(now) == old);
        requests::put(vm.socket(), "vm.pause").unwrap();
        requests::put(vm.socket(), "vm.resume").unwrap();
        let now = if ignored { "events.old" } else { "events" };
        vm.wait("its events", |_| place.text(now).contains("resumed"));
        vm.shut_down();
        assert_eq!(place.path("console").exists(), !ignored);
    }
}

/// One that comes while guest memory is made waits until there is a VM.
pub fn a_sighup_during_the_start_does_not_end_it() {
    let place = Place::new(&talks("word\n"));
    let (console, api) = (place.argument("file", "console"), place.argument("path", "api"));
    let mut command = place.command(&["run", "--memory", "size=256M,prefault=on", "--kernel"]);
    command.arg(place.path("kernel")).args(["--serial", &console, "--api-socket", &api]);
    // SAFETY: it is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    let holds = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
        let mask = u64::from_str_radix(mask.unwrap_or("0").trim(), 16).unwrap_or(0);
        // Alone: all of them are held while a thread is being made.
        mask == 1 << (libc::SIGHUP - 1)
    };
    let start = Instant::now();
    while !holds(child.id()) {
        assert!(start.elapsed() < Duration::from_secs(30), "it does not hold SIGHUP back");
        std::hint::spin_loop();
    }
    // SAFETY: takes numbers only; the child is ours and was not waited for.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), libc::SIGHUP) }, 0);
    let socket = place.path("api");
    while requests::get::<mce_relay_vmm::api::types::vm::VmInfo>(&socket, "vm.info").is_err() {
        assert_eq!(child.try_wait().unwrap(), None, "it has ended");
        assert!(start.elapsed() < Duration::from_secs(30), "it does not run");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!holds(child.id()));
    requests::put(&socket, "vm.shutdown").unwrap();
    child.wait().unwrap();
}

/// The terminal goes: so does a VM that was started on it, in the foreground or not.
pub fn a_terminal_that_goes_ends_it() {
    for serial in ["tty", "file"] {
        let place = Place::new(&talks("word\n"));
        let terminal = Terminal::new();
        let before = terminal.modes();
        let console = place.argument("file", "console");
        let ready = place.path("api");
        let child = terminal.start_with(|command| {
            // In place of its --serial tty.
            let mut own = place.run(&["--api-socket", &place.argument("path", "api")]);
            own.args(["--serial", if serial == "tty" { "tty" } else { &console }]);
            let slave = || terminal.stream();
            *command = own;
            command.stdin(slave()).stdout(slave()).stderr(slave());
        });
        let start = Instant::now();
        let runs =
            || requests::get::<mce_relay_vmm::api::types::vm::VmInfo>(&ready, "vm.info").is_ok();
        while !runs() || (serial == "tty" && terminal.modes() == before) {
            assert!(start.elapsed() < Duration::from_secs(30), "it does not run");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(terminal);
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(128 + libc::SIGHUP), "{serial}: {:?}", out.status);
        assert!(!ready.exists(), "it has removed its socket");
    }
}

/// A file system of its own for a directory, as long as this lives.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    fn mount(at: &'a Path, options: &str) -> Self {
        fs::create_dir(at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "none"]).arg(at);
        assert!(mount.status().unwrap().success());
        Self(at)
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

/// Forges failures of 4096 pages, each of which is some events.
fn forge(vm: &Running<'_>, from: u64) {
    forge_from(vm, from, 4096);
}

fn forge_from(vm: &Running<'_>, from: u64, count: u64) {
    let gpas = (0..count).map(|page| Gpa(from + page * 4096)).collect();
    let (via, kind) = (Means::Signal, mce_relay::FailureKind::ActionOptional);
    let asked = Poison { gpas, via, kind, vcpu: 0 };
    let done: Vec<Poisoning> = requests::put_json(vm.socket(), "vm.poison", &asked).unwrap();
    let failed = done.iter().find_map(|page| page.error.as_ref());
    assert!(failed.is_none(), "{failed:?}");
}

/// How many events of memory there were.
fn events_of_memory(vm: &Running<'_>) -> f64 {
    let mut stream = UnixStream::connect(vm.socket()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let count = r#"mce_relay_events_total{source="memory"} "#;
    let line = answer.lines().find_map(|line| line.strip_prefix(count));
    line.map_or(0.0, |number| number.parse().unwrap())
}

/// A disk that is full keeps a named VM's last ledger that was written whole, and has room for how it ended.
pub fn a_full_disk_keeps_what_was_and_how_it_ended() {
    let place = Place::new(&SPIN);
    let at = place.path("mce-relay");
    let _disk = Disk::mount(&at, "size=512k,mode=700");
    let mut vm = place.start("mce-relay/n.sock", &["--name", "n", "--serial", "off"]);
    let ledger = |which: u8| place.text(&format!("mce-relay/records/n/ledger.{which}"));
    let has = |text: &str| text.contains("0x3000") && serde_json::from_str::<Value>(text).is_ok();
    forge_from(&vm, 0x3000, 1);
    vm.wait("the page on disk", |_| (0..2).any(|which| has(&ledger(which))));
    let full = fs::write(at.join("filler"), vec![0; 1 << 20]).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    // A ledger with these is longer than what can be had of the disk.
    forge_from(&vm, 0x10_0000, 4096);
    vm.wait("the words", |_| place.text("stderr").contains("the ledger cannot be kept"));
    // With each event it is tried again.
    for _ in 0..3 {
        requests::put(vm.socket(), "vm.pause").unwrap();
        requests::put(vm.socket(), "vm.resume").unwrap();
        std::thread::sleep(Duration::from_millis(1100));
    }
    assert!((0..2).any(|which| has(&ledger(which))), "none of the two is whole");
    vm.signal(libc::SIGTERM);
    assert_eq!(vm.ended().code(), Some(128 + libc::SIGTERM), "{}", place.text("stderr"));
    let out = place.tool(&["status", "--vm", "n"]);
    let text = String::from_utf8(out.stdout).unwrap();
    println!("    {}", text.trim_end().replace('\n', "\n    "));
    assert!(
        text.starts_with("n ended, exit status 143, at 2") && text.contains("0x3000"),
        "{text}"
    );
}

/// A file that another VM writes to is refused, whichever option it is of, and left as it is; and so is one that two
/// options name.
pub fn one_vm_writes_to_a_file() {
    let place = Place::new(&talks("all is well\n"));
    let (shared, api) = (place.argument("file", "shared"), place.argument("path", "api"));
    let mut vm = place.start("api", &["--serial", &shared, "--api-socket", &api]);
    vm.go_once();
    vm.wait("its words", |_| place.text("shared").contains("well\n"));
    let before = place.text("shared");
    let events = place.argument("path", "shared");
    let limited = format!("{shared},max-size=1K");
    for more in [
        &["--serial", &shared][..],
        &["--serial", &limited],
        &["--serial", "off", "--event-monitor", &events],
    ] {
        let out = place.run(more).output().unwrap();
        refused(&out, 1, &["shared", "a running VM", "a file of its own"]);
    }
    let twice = place.argument("file", "twice");
    let out = place.run(&["--serial", &twice, "--serial2", &twice]).output().unwrap();
    refused(&out, 1, &["twice", "a file of its own"]);
    assert_eq!(place.text("shared"), before);
    vm.shut_down();
}

/// The file was moved away, and somebody else has made one in its place: that one is not put aside when the first is
/// too long.
pub fn a_file_that_was_moved_away_is_not_put_aside() {
    let place = Place::new(&talks(&"0123456789abcde\n".repeat(64)));
    let console = format!("{},max-size=4K", place.argument("file", "console"));
    let api = place.argument("path", "api");
    let mut vm = place.start("api", &["--serial", &console, "--api-socket", &api]);
    vm.go_once();
    vm.wait("its words", |_| place.text("console").ends_with("e\n"));
    fs::rename(place.path("console"), place.path("moved")).unwrap();
    fs::write(place.path("console"), "made for it\n").unwrap();
    let goes_on = || place.text("console").len() > 100 || place.path("console.1").exists();
    for _ in 0..100 {
        if !goes_on() {
            vm.go_once();
        }
    }
    assert!(!place.path("console.1").exists(), "it is somebody else's file");
    assert!(place.text("console").starts_with("made for it\n"), "{}", place.text("console"));
    assert!(place.text("moved").len() > 4096);
    vm.shut_down();
}

/// The kernel's file has gone when the guest starts over: the VM ends, and its events say so.
pub fn a_later_boot_that_fails_is_an_end() {
    let place = Place::new(&[&WAIT[..], &RESET].concat());
    let (events, api) = (place.argument("path", "events"), place.argument("path", "api"));
    let options = ["--serial", "off", "--event-monitor", &events, "--api-socket", &api];
    let mut vm = place.start("api", &options);
    vm.next_boot(2);
    fs::remove_file(place.path("kernel")).unwrap();
    vm.go();
    assert_eq!(vm.ended().code(), Some(1), "{}", place.text("stderr"));
    let text = place.text("events");
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((&last["event"], &last["properties"]["status"]), (&"ended".into(), &1.into()));
    assert!(
        last["properties"]["how"].as_str().unwrap().contains("cannot read the kernel"),
        "{last}"
    );
}

/// The disk is full, and later it is not: both files go on, and say how much is missing.
pub fn a_full_disk_is_waited_for() {
    let place = Place::new(&talks(&"0123456789abcde\n".repeat(64)));
    let at = place.path("disk");
    let _disk = Disk::mount(&at, "size=512k,mode=700");
    let api = place.argument("path", "api");
    let (console, events) =
        (place.argument("file", "disk/console"), place.argument("path", "disk/events"));
    let options = ["--serial", &console, "--event-monitor", &events, "--api-socket", &api];
    let mut vm = place.start("api", &options);
    vm.go_once();
    vm.wait("its words", |_| place.text("disk/console").ends_with("e\n"));
    // Somebody else fills it.
    let filler = at.join("filler");
    let full = fs::write(&filler, vec![0; 1 << 20]).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    let said = |vm: &mut Running<'_>, what: &str| {
        vm.wait(what, |_| place.text("stderr").contains(what));
    };
    // More than the queue holds, and more than the ring.
    let words = (5 << 18) / 1024;
    for _ in 0..words {
        vm.go_once();
    }
    // They happen some time after they are asked for.
    vm.wait("more events than the ring holds", |vm| {
        forge(vm, 0);
        events_of_memory(vm) > 2.0 * KEPT as f64
    });
    said(&mut vm, "cannot write serial output");
    said(&mut vm, "event monitor");
    fs::remove_file(&filler).unwrap();
    // The queue is longer than the disk now, so it may be full again; what is missing has been said by then.
    let missing = |name: &str, what: &str| {
        let text = place.text(name);
        text.lines().find(|line| line.contains(what)).map(str::to_owned)
    };
    let _ = Command::new("mount").args(["-o", "remount,size=64m"]).arg(&at).status().unwrap();
    vm.wait("the console's count", |_| missing("disk/console", "bytes are missing here").is_some());
    vm.wait("the events' count", |_| missing("disk/events", r#""missed""#).is_some());
    vm.go_once();
    vm.wait("more words", |_| {
        let text = place.text("disk/console");
        text.ends_with("e\n")
            && text.rsplit("missing here").next().is_some_and(|rest| rest.len() > 1 << 20)
    });
    println!("    {}", missing("disk/console", "bytes are missing").unwrap());
    println!("    {}", missing("disk/events", "missed").unwrap().trim_end());
    vm.shut_down();
    let console = place.text("disk/console");
    let counts = console
        .lines()
        .filter_map(|line| line.strip_prefix("--- mce-relay: ")?.split(' ').next())
        .map(|number| number.parse::<usize>().unwrap());
    let count: usize = counts.sum();
    let whole = (words + 2) * 1024;
    let note = |line: &&str| line.starts_with("--- mce-relay: ");
    let notes: usize = console.lines().filter(note).map(|line| line.len() + 2).sum();
    assert_eq!(console.len() - notes + count, whole, "each byte is there or counted");
    let events = place.text("disk/events");
    assert!(events.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
    assert!(events.contains(r#""ended""#));
}

/// A limit of files' sizes (RLIMIT_FSIZE) is an error like a full disk, and not the end of the VM.
pub fn a_limit_of_sizes_does_not_kill_it() {
    const LIMIT: u64 = 64 << 10;
    let limit = |soft| libc::rlimit { rlim_cur: soft, rlim_max: libc::RLIM_INFINITY };
    let place = Place::new(&forever(say(COM1, "0123456789abcde\n")));
    let (console, api) = (place.argument("file", "console"), place.argument("path", "api"));
    let mut command = place.run(&["--serial", &console, "--api-socket", &api]);
    // SAFETY: setrlimit is async-signal-safe, and reads what lives in the closure.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_FSIZE, &limit(LIMIT)) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let mut vm = place.started(command, "api");
    vm.wait("the error", |_| place.text("stderr").contains("cannot write serial output"));
    let len = || fs::metadata(place.path("console")).unwrap().len();
    assert_eq!(len(), LIMIT);
    let (pid, none) = (vm.pid().cast_signed(), std::ptr::null_mut());
    // SAFETY: reads a limit that lives, and writes nothing.
    let done = unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &limit(libc::RLIM_INFINITY), none) };
    assert_eq!(done, 0);
    vm.wait("more words", |_| len() > 2 * LIMIT);
    vm.shut_down();
}

/// A FIFO and a device are what they were: nothing but the guest's own words goes there.
pub fn a_fifo_has_only_what_the_guest_says() {
    let place = Place::new(&[&say(COM1, "all\n")[..], &POWER_OFF].concat());
    let fifo = place.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let mut reader = Command::new("cat");
    reader.arg(&fifo).stdout(Stdio::piped());
    let reader = reader.spawn().unwrap();
    let console = place.argument("file", "fifo");
    // The reader may come later than the VM, which does not wait for it.
    let start = Instant::now();
    while !place.run(&["--serial", &console]).output().unwrap().status.success() {
        assert!(start.elapsed() < Duration::from_secs(30), "no reader");
    }
    assert_eq!(reader.wait_with_output().unwrap().stdout, b"all\n");
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
    let out = place.run(&["--serial", "file=/dev/stdout"]).output().unwrap();
    assert_eq!((out.status.code(), &out.stdout[..]), (Some(0), &b"all\n"[..]));
    let limited = "file=/dev/null,max-size=1M";
    refused(&place.run(&["--serial", limited]).output().unwrap(), 1, &["/dev/null", "regular"]);
}
