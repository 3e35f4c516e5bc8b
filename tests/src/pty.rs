//! A pseudo-terminal with a program on it, as a person has it before them, and a shell that is typed at.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::ptr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::guest::binary;

/// How long anything may take that is not said to take longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// What the programs on a terminal go by; set or taken away, so that it does not matter what this process has.
const ENVIRONMENT: [&str; 11] = [
    "TERM",
    "NO_COLOR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "COLUMNS",
    "LINES",
    "CI",
    "LC_ALL",
    "LC_CTYPE",
    "RUST_LOG",
    "RUST_LOG_STYLE",
];

/// A pseudo-terminal with so many rows and columns: what is typed at, and what programs have. Nothing that is started
/// inherits either.
pub fn open(rows: u16, columns: u16) -> [OwnedFd; 2] {
    let (mut master, mut slave) = (-1, -1);
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: two descriptors are written to the two integers, the size is read; the rest is optional.
    let made = unsafe {
        let none = ptr::null_mut();
        libc::openpty(&raw mut master, &raw mut slave, none, ptr::null(), &raw const size)
    };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    [master, slave].map(|fd| {
        // SAFETY: a descriptor that openpty has just made, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sets a flag of it. A program that had the other end itself would not see the terminal go.
        assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
        fd
    })
}

/// A pseudo-terminal. What is written on it is kept.
#[derive(Debug)]
pub struct Pty {
    master: OwnedFd,
    slave: OwnedFd,
    text: Arc<Mutex<Vec<u8>>>,
}

impl Pty {
    /// One with so many rows and columns; 0 is what a serial console says.
    pub fn new(rows: u16, columns: u16) -> Self {
        let [master, slave] = open(rows, columns);
        let text: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (mut from, to) = (File::from(master.try_clone().unwrap()), Arc::clone(&text));
        std::thread::spawn(move || {
            let mut some = [0; 4096];
            // It ends with an error when nobody has the other side any more.
            while let Ok(n @ 1..) = from.read(&mut some) {
                to.lock().unwrap().extend_from_slice(&some[..n]);
            }
        });
        Self { master, slave, text }
    }

    /// Starts `program` on it, with a colour terminal and UTF-8 around it unless `configure` says otherwise.
    pub fn start(
        &self,
        program: impl AsRef<OsStr>,
        configure: impl FnOnce(&mut Command),
    ) -> Started {
        let slave = || Stdio::from(self.slave.try_clone().unwrap());
        let mut command = Command::new(program);
        for name in ENVIRONMENT {
            command.env_remove(name);
        }
        command.env("TERM", "xterm-256color").env("LANG", "C.UTF-8");
        command.stdin(slave()).stdout(slave()).stderr(slave());
        configure(&mut command);
        // SAFETY: both calls are async-signal-safe, and take no pointer.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Started(command.spawn().unwrap())
    }

    /// Everything that was written on it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap()).into_owned()
    }

    /// Types.
    pub fn type_in(&self, keys: &[u8]) {
        File::from(self.master.try_clone().unwrap()).write_all(keys).unwrap();
    }

    /// Waits until `what` finds in the text what it looks for; that.
    pub fn wait_for<T>(&self, name: &str, what: impl Fn(&str) -> Option<T>) -> T {
        self.wait_long_for(PATIENCE, name, what)
    }

    /// The same, which may take so long.
    pub fn wait_long_for<T>(
        &self,
        patience: Duration,
        name: &str,
        what: impl Fn(&str) -> Option<T>,
    ) -> T {
        let start = Instant::now();
        loop {
            let text = self.text();
            if let Some(found) = what(&text) {
                return found;
            }
            let waited = start.elapsed() < patience;
            assert!(waited, "{name} does not come; there is\n{}", text.escape_debug());
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until it has this text on it.
    pub fn wait_for_text(&self, words: &str) {
        self.wait_for(words, |text| text.contains(words).then_some(()));
    }

    /// Whether it is raw: the keys go to the program as they are.
    pub fn is_raw(&self) -> bool {
        // SAFETY: termios is plain data, and tcgetattr fills it.
        let modes = unsafe {
            let mut modes: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.slave.as_raw_fd(), &raw mut modes), 0);
            modes
        };
        modes.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    /// Waits until it is raw, or no longer.
    pub fn wait_until_raw(&self, raw: bool) {
        self.wait_for(if raw { "raw mode" } else { "the end of raw mode" }, |_| {
            (self.is_raw() == raw).then_some(())
        });
    }
}

/// A program on a terminal. Dropping it kills it.
#[derive(Debug)]
pub struct Started(Child);

impl Started {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Waits for its end.
    pub fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "process {} does not end", self.pid());
            std::thread::sleep(LOOK);
        }
    }

    /// How it has ended; `None` while it runs.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().unwrap()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `mce-relay` with `args` on a terminal of this size to its end; what it printed.
pub fn shown(
    rows: u16,
    columns: u16,
    args: &[&str],
    configure: impl FnOnce(&mut Command),
) -> (ExitStatus, String) {
    const END: &str = "<the end>";
    let pty = Pty::new(rows, columns);
    let mut started = pty.start(binary(), |command| {
        command.args(args);
        configure(command);
    });
    let status = started.ended();
    // The terminal keeps the order.
    File::from(pty.slave.try_clone().unwrap()).write_all(END.as_bytes()).unwrap();
    let text = pty.wait_for(END, |text| text.strip_suffix(END).map(str::to_owned));
    (status, text.replace("\r\n", "\n"))
}

/// bash, interactive and with job control, before which somebody sits.
#[derive(Debug)]
pub struct Shell {
    pty: Pty,
    _bash: Started,
    dir: TempDir,
    /// What of the text has been seen.
    seen: usize,
}

impl Shell {
    /// The prompt says with what status the last command ended.
    const PROMPT: &str = "[$?]>ready> ";
    const END: &str = "]>ready> ";

    /// One with `mce-relay` on its path, in a directory of its own.
    pub fn start(configure: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let inputrc = dir.path().join("inputrc");
        std::fs::write(&inputrc, "set enable-bracketed-paste off\n").unwrap();
        let pty = Pty::new(50, 200);
        let near = binary().parent().unwrap().to_owned();
        let path = std::env::var("PATH").unwrap_or_default();
        let bash = pty.start("bash", |command| {
            command.args(["--norc", "--noprofile", "-i"]).current_dir(dir.path());
            command.env("PS1", Self::PROMPT).env("INPUTRC", &inputrc).env("HOME", dir.path());
            command.env("PATH", format!("{}:{path}", near.display()));
            configure(command);
        });
        let mut shell = Self { pty, _bash: bash, dir, seen: 0 };
        shell.prompt(PATIENCE);
        shell
    }

    /// The directory that it began in.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Its terminal.
    pub fn pty(&self) -> &Pty {
        &self.pty
    }

    /// Waits for the next prompt; the status in it, and what was written before it.
    fn prompt(&mut self, patience: Duration) -> (u8, String) {
        let from = self.seen;
        let (status, text, end) = self.pty.wait_long_for(patience, "the prompt", |all| {
            let new = all.get(from..)?;
            let end = new.find(Self::END)?;
            let start = new[..end].rfind('[')?;
            let status = new[start + 1..end].parse().ok()?;
            Some((status, new[..start].to_owned(), from + end + Self::END.len()))
        });
        self.seen = end;
        (status, text.replace("\r\n", "\n"))
    }

    /// Types a command and a return, and waits for the prompt; its status, and what it printed, with its
    /// echo before.
    pub fn run(&mut self, command: &str) -> (u8, String) {
        self.run_long(command, PATIENCE)
    }

    /// The same with a command that may take so long.
    pub fn run_long(&mut self, command: &str, patience: Duration) -> (u8, String) {
        self.pty.type_in(format!("{command}\r").as_bytes());
        let (status, text) = self.prompt(patience);
        println!("    $ {}", text.trim_end().replace('\n', "\n    | "));
        (status, text)
    }

    /// Types a command and a return, and waits for words of it instead of the prompt.
    pub fn run_until(&mut self, command: &str, words: &str) {
        let from = self.seen;
        self.pty.type_in(format!("{command}\r").as_bytes());
        self.pty.wait_for(words, |all| all.get(from..)?.contains(words).then_some(()));
    }

    /// Waits for the prompt of a command that [`Self::run_until`] has left under way.
    pub fn back(&mut self) -> (u8, String) {
        self.prompt(PATIENCE)
    }
}
