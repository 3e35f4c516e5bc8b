//! `mce-relay run` as a job of a shell, as people type it: the terminal is its own while it is in the foreground,
//! and only then.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use mce_relay_cli::client::requests;
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::pty::Shell;
use mce_relay_tests::tiny::elf;
use serde_json::Value;

const RUN: &str = "mce-relay run -v --memory 32M --kernel kernel --api-socket path=api";
/// What a run in the foreground says once.
const HOW_TO_LEAVE: &str = "Ctrl-A x ends the VM";

/// A shell with a kernel in its directory.
fn shell() -> Shell {
    let shell = Shell::start(|_| ());
    std::fs::write(shell.dir().join("kernel"), elf(&SPIN)).unwrap();
    shell
}

fn socket(shell: &Shell) -> PathBuf {
    shell.dir().join("api")
}

/// Waits until the VM answers; its process.
fn pid(shell: &Shell) -> i32 {
    shell.pty().wait_for("an answer of the VM", |_| {
        let ping: Value = requests::get(&socket(shell), "vmm.ping").ok()?;
        requests::get::<Value>(&socket(shell), "vm.info").ok()?;
        i32::try_from(ping["pid"].as_i64()?).ok()
    })
}

fn signal(pid: i32, signal: i32) {
    // SAFETY: sends a signal to a process that this test has started and that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// The third field of /proc/PID/stat.
fn state(pid: i32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

fn wait_until_stopped(pid: i32) {
    let start = Instant::now();
    while state(pid) != 'T' {
        assert!(start.elapsed().as_secs() < 30, "{pid} does not stop");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The keys go to the shell, and the VM runs on; in the foreground it has the terminal.
fn keys_are_the_shells(shell: &mut Shell) {
    for word in ["one", "two", "three"] {
        let (status, text) = shell.run(&format!("echo typed-${{#PWD}}-{word}"));
        let typed = format!("typed-{}-{word}", shell.dir().as_os_str().len());
        assert!(status == 0 && text.contains(&typed), "{text}");
    }
    let (_, text) = shell.run("jobs");
    assert!(text.contains("Running") && !text.contains("Stopped"), "{text}");
}

/// Takes the job to the foreground, and leaves it by Ctrl-A x.
fn leave(shell: &mut Shell, command: &str) {
    shell.run_until(command, "mce-relay run");
    shell.pty().wait_until_raw(true);
    shell.pty().type_in(b"\x01x");
    let (status, text) = shell.back();
    assert_eq!(status, 0, "{text}");
    assert!(text.contains("mce-relay: stopped by Ctrl-A x on the terminal\r\n"), "{text:?}");
    assert!(!shell.pty().text().contains("made system call"), "{}", shell.pty().text());
}

/// In the background the terminal is the shell's, and the keys are, too.
pub fn in_the_background() {
    let mut shell = shell();
    shell.run(&format!("{RUN} &"));
    pid(&shell);
    keys_are_the_shells(&mut shell);
    assert!(!shell.pty().text().contains(HOW_TO_LEAVE), "nothing is to be left");
    leave(&mut shell, "fg");
    let said = shell.pty().text().matches(HOW_TO_LEAVE).count();
    assert_eq!(said, 1, "{}", shell.pty().text());
    let (status, text) = shell.run("stty -a");
    assert!(status == 0 && !text.contains("-icanon") && !text.contains("-isig"), "{text}");
}

/// A stop and `fg`: raw mode again. A stop and `bg`: the keys are the shell's.
pub fn stopped_and_taken_up_again() {
    let mut shell = shell();
    shell.run_until(RUN, HOW_TO_LEAVE);
    shell.pty().wait_until_raw(true);
    let vmm = pid(&shell);
    for _ in 0..2 {
        signal(vmm, libc::SIGSTOP);
        wait_until_stopped(vmm);
        let (status, text) = shell.back();
        assert!(status == 128 + 19 && text.contains("Stopped"), "{status}: {text}");
        let (_, text) = shell.run("stty -a");
        assert!(!text.contains("-icanon"), "the shell has its own modes: {text}");
        shell.run_until("fg", "mce-relay run");
        shell.pty().wait_until_raw(true);
    }
    signal(vmm, libc::SIGTSTP);
    wait_until_stopped(vmm);
    shell.back();
    shell.run("bg");
    keys_are_the_shells(&mut shell);
    leave(&mut shell, "fg");
    let said = shell.pty().text().matches(HOW_TO_LEAVE).count();
    assert_eq!(said, 1, "once, however often it comes back: {}", shell.pty().text());
}

/// `stty tostop`: what is written from the background stops nobody.
pub fn tostop() {
    let mut shell = shell();
    shell.run("stty tostop");
    shell.run(&format!("{RUN} &"));
    let vmm = pid(&shell);
    requests::put(&socket(&shell), "vm.pause").unwrap();
    shell.pty().wait_for_text("paused");
    requests::put(&socket(&shell), "vm.resume").unwrap();
    shell.pty().wait_for_text("resumed");
    keys_are_the_shells(&mut shell);
    signal(vmm, libc::SIGTERM);
    let (status, text) = shell.run("wait %1");
    assert_eq!(status, 128 + 15, "{text}");
}

/// nohup(1) has it outlive a hang-up.
pub fn nohup() {
    let mut shell = shell();
    shell.run(&format!("nohup {RUN} &"));
    let vmm = pid(&shell);
    signal(vmm, libc::SIGHUP);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(50));
        requests::get::<Value>(&socket(&shell), "vm.info").unwrap();
    }
    keys_are_the_shells(&mut shell);
    signal(vmm, libc::SIGTERM);
    let (status, text) = shell.run("wait %1");
    assert_eq!(status, 128 + 15, "{text}");
}
