//! The terminal of a VM whose first serial port it is: raw while the VM runs, as it was after.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::ptr;
use std::time::{Duration, Instant};

use mce_relay_tests::guest::{binary, image};
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::spinning::Nobody;
use mce_relay_tests::tiny::elf;

/// A pseudo-terminal with a program on it.
pub struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    pub fn new() -> Self {
        let (mut master, mut slave) = (-1, -1);
        // SAFETY: two descriptors are written to the two integers; the rest is optional.
        let made = unsafe {
            libc::openpty(
                &raw mut master,
                &raw mut slave,
                ptr::null_mut(),
                ptr::null(),
                ptr::null(),
            )
        };
        assert_eq!(made, 0);
        // A program that has the terminal's other end itself would not see it go.
        // SAFETY: sets a flag of a descriptor that openpty has just made.
        assert_eq!(unsafe { libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
        // SAFETY: descriptors that openpty has just made, owned by nobody else.
        let ours = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
        // Copies that no program inherits: one would keep the terminal open.
        let [master, slave] = [master, slave].map(|fd| ours(fd).try_clone().unwrap());
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

pub fn is_untouched_by_a_failed_start() {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut child = terminal.start(std::path::Path::new("/nowhere/vmlinux"));
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(terminal.modes(), before);
}
