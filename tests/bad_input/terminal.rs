//! The terminal of a VM whose first serial port it is: raw while the VM runs, as it was after.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mce_relay_tests::guest::{binary, image};
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::pty;
use mce_relay_tests::spinning::Nobody;
use mce_relay_tests::tiny::elf;

/// A pseudo-terminal with a program on it.
pub struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    pub fn new() -> Self {
        let [master, slave] = pty::open(0, 0);
        Self { master, slave }
    }

    /// It, as one of a program's streams.
    pub fn stdio(&self) -> Stdio {
        self.slave.try_clone().unwrap().into()
    }

    /// Input, output, control and local modes.
    pub fn modes(&self) -> [libc::tcflag_t; 4] {
        // SAFETY: termios is plain data, and tcgetattr fills it.
        let modes = unsafe {
            let mut modes: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.slave.as_raw_fd(), &raw mut modes), 0);
            modes
        };
        [modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag]
    }

    /// Runs `mce-relay run` on it, as `configure` says in addition. All three streams are the
    /// terminal, unless that says otherwise.
    pub fn start_with(&self, configure: impl FnOnce(&mut Command)) -> Child {
        self.start_as(Command::new(binary()), configure)
    }

    /// The same by `command`, which has the program.
    fn start_as(&self, mut command: Command, configure: impl FnOnce(&mut Command)) -> Child {
        let slave = || Stdio::from(self.slave.try_clone().unwrap());
        command.args(["run", "--serial", "tty"]).stdin(slave()).stdout(slave()).stderr(slave());
        configure(&mut command);
        // Its controlling terminal, as a shell would have it.
        // SAFETY: both calls are async-signal-safe, and take no pointer.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command.spawn().unwrap()
    }

    fn start(&self, kernel: &std::path::Path) -> Child {
        self.start_with(|command| {
            command.args(["--memory", "size=128M", "--kernel"]).arg(kernel);
        })
    }

    /// For one of a program's streams.
    pub fn stream(&self) -> Stdio {
        Stdio::from(self.slave.try_clone().unwrap())
    }

    /// Has somebody read what is written on it, which the guest's console may fill.
    pub fn drain(&self) {
        let mut master = File::from(self.master.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut master, &mut std::io::sink()));
    }

    fn type_in(&self, keys: &[u8]) {
        File::from(self.master.try_clone().unwrap()).write_all(keys).unwrap();
    }

    pub fn wait_for(&self, what: impl Fn([libc::tcflag_t; 4]) -> bool) {
        let start = Instant::now();
        while !what(self.modes()) {
            assert!(start.elapsed() < Duration::from_secs(60), "the modes stay {:?}", self.modes());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Starts a VM, waits until the terminal is raw, ends the VM, and looks at the terminal.
fn restored_after(end: impl Fn(&Terminal, &Child), status: i32) {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut child = terminal.start(&image("vmlinux"));
    terminal.drain();
    terminal.wait_for(|modes| modes != before);
    end(&terminal, &child);
    let ended = child.wait().unwrap();
    assert_eq!(ended.code(), Some(status), "{ended}");
    assert_eq!(terminal.modes(), before);
}

pub fn is_restored_after_sigterm() {
    let end = |_: &Terminal, child: &Child| {
        // SAFETY: sends a signal to a child that has not been waited for.
        unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) };
    };
    restored_after(end, 128 + libc::SIGTERM);
}

pub fn is_restored_after_ctrl_a_x() {
    restored_after(|terminal, _| terminal.type_in(b"\x01x"), 0);
}

/// The terminal is closed under a VM whose name is among temporary files: nothing is left there.
pub fn leaves_nothing_behind_when_it_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let tmp = dir.path().join("tmp");
    std::fs::create_dir(&tmp).unwrap();
    std::os::unix::fs::chown(&tmp, Some(Nobody::ID), Some(Nobody::ID)).unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, elf(&SPIN)).unwrap();
    let [program] = Nobody.settle(dir.path(), [&binary()]);
    let terminal = Terminal::new();
    let mut child = terminal.start_as(Nobody.command(&program, dir.path()), |command| {
        command.args(["--name", "a", "--memory", "32M", "--kernel"]).arg(&kernel);
        command.args(["--serial2", "socket=agent"]).current_dir(&tmp);
        command.env("TMPDIR", &tmp).env_remove("XDG_RUNTIME_DIR");
    });
    let start = Instant::now();
    while std::fs::read_dir(&tmp).unwrap().count() < 2 {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none() && start.elapsed() < Duration::from_secs(60), "{ended:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(terminal);
    assert_eq!(child.wait().unwrap().code(), Some(128 + libc::SIGHUP));
    let left: Vec<_> = std::fs::read_dir(&tmp).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A VM of a few instructions on a terminal that is raw by now; how the terminal was before.
fn raw() -> (Terminal, [libc::tcflag_t; 4], Child) {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, elf(&SPIN)).unwrap();
    let terminal = Terminal::new();
    let before = terminal.modes();
    let child = terminal.start_with(|command| {
        command.args(["--memory", "32M", "--kernel"]).arg(&kernel);
        // SAFETY: async-signal-safe; the limit is read.
        unsafe {
            command.pre_exec(|| {
                let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
                Ok(())
            });
        }
    });
    terminal.drain();
    terminal.wait_for(|modes| modes != before);
    (terminal, before, child)
}

fn send(child: &Child, signal: i32) {
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id().cast_signed(), signal) };
}

/// Each signal that ends the VM by default ends it so, and the terminal is as it was.
pub fn is_restored_after_any_deadly_signal() {
    for signal in [
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGQUIT,
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGIO,
        libc::SIGPWR,
        libc::SIGSTKFLT,
        libc::SIGXCPU,
        libc::SIGSEGV,
        libc::SIGABRT,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGRTMIN() + 2,
    ] {
        let (terminal, before, mut child) = raw();
        send(&child, signal);
        let ended = child.wait().unwrap();
        assert_eq!(ended.signal(), Some(signal), "{ended}");
        assert_eq!(terminal.modes(), before, "{signal}");
    }
}

/// A signal of a program's faults is sent to the process, and the kernel gives it to whichever thread it likes: nobody can
/// block it. It ends the VM as it ends it on the main thread.
pub fn is_restored_on_whichever_thread_a_fault_is_sent_to() {
    for name in ["mce-relay", "mce-relay-ao", "vcpu0", "serial0", "events-log"] {
        for signal in [libc::SIGFPE, libc::SIGSEGV] {
            let (terminal, before, mut child) = raw();
            let thread = wait_for_thread(child.id(), name);
            // SAFETY: sends a signal to a thread of a child that has not been waited for.
            let sent = unsafe {
                libc::syscall(libc::SYS_tgkill, child.id().cast_signed(), thread, signal)
            };
            assert_eq!(sent, 0, "{name}");
            let ended = child.wait().unwrap();
            assert_eq!(ended.signal(), Some(signal), "{name}: {ended}");
            assert_eq!(terminal.modes(), before, "{name}, {signal}");
        }
    }
}

/// The thread of `pid` that is called so, under its filter: it has a moment for that after it has its name.
fn wait_for_thread(pid: u32, name: &str) -> libc::pid_t {
    let start = Instant::now();
    loop {
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let read =
                |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let is_filtered = read("status").lines().any(|line| line == "Seccomp:\t2");
            if read("comm").trim_end() == name && is_filtered {
                return task.file_name().to_str().unwrap().parse().unwrap();
            }
        }
        assert!(start.elapsed() < Duration::from_secs(20), "there is no thread {name}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The VM goes on after a stop, as it believes, and is ended before it has looked at its terminal, or while it does.
pub fn is_restored_after_going_on_and_ending() {
    for round in 0..20 {
        let end = [libc::SIGSYS, libc::SIGTERM, libc::SIGUSR1][round % 3];
        let (terminal, before, mut child) = raw();
        send(&child, libc::SIGCONT);
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(20 * round as u64) {
            std::hint::spin_loop();
        }
        send(&child, end);
        let ended = child.wait().unwrap();
        assert!(!ended.success(), "{ended}");
        assert_eq!(terminal.modes(), before, "{end}, round {round}");
    }
}

pub fn is_untouched_by_a_failed_start() {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut child = terminal.start(std::path::Path::new("/nowhere/vmlinux"));
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(terminal.modes(), before);
}
