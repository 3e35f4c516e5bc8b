//! A `mce-relay run` with a guest of a few instructions and tests/faults/hook.rs in it: a VMM whose own
//! memory a test can reach.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mce_relay_cli::client::requests;
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::binary;
use crate::tiny::elf;

const PATIENCE: Duration = Duration::from_secs(30);

/// 1: pause; jmp 1b: a guest that is there and does nothing. KVM ends a guest's turn that only pauses: on the emulated Intel
/// host (tests/lab/intel.sh) nothing else does while the guest's interrupts are off.
pub const SPIN: [u8; 4] = [0xf3, 0x90, 0xeb, 0xfc];

/// A library to preload, beside the program that runs: target/release/deps/ has the one, and
/// target/release/examples/ the other.
///
/// # Errors
/// It is not there; says how it is built.
pub fn library(name: &str) -> Result<PathBuf, String> {
    let me = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut near = me.ancestors().skip(1).take(3).map(|dir| dir.join("examples").join(name));
    near.find(|path| path.is_file()).ok_or_else(|| {
        format!(
            "needs target/release/examples/{name} \
             (cargo build --release --examples -p mce-relay-tests)"
        )
    })
}

/// Has `command`, a `mce-relay run`, run `code` with the hook in it, and leave what it leaves in `dir`.
pub fn prepare(command: &mut Command, dir: &Path, code: &[u8]) {
    let at = |name: &str| dir.join(name);
    std::fs::write(at("kernel"), elf(code)).unwrap();
    command
        .arg("--kernel")
        .arg(at("kernel"))
        .args(["--api-socket", &format!("path={}", at("api").display())])
        .args(["--event-monitor", &format!("path={}", at("events").display())])
        .stderr(std::fs::File::create(at("stderr")).unwrap())
        .env("MCE_RELAY_HOOK", dir)
        .env("LD_PRELOAD", library("libhook.so").unwrap());
}

/// The VMM. Dropping it kills it.
#[derive(Debug)]
pub struct Hooked {
    child: Child,
    dir: TempDir,
    strays: u64,
}

/// A system call that a thread is made to make. Its arguments are such that nothing comes of it, whoever makes
/// it.
#[derive(Debug, Clone, Copy)]
pub struct Stray {
    /// Its number.
    pub number: libc::c_long,
    /// One argument that is not -1.
    argument: Option<(u8, u32)>,
}

impl Stray {
    /// The call `number`.
    pub const fn any(number: libc::c_long) -> Self {
        Self { number, argument: None }
    }

    /// The call `number` with this argument, from 0 on.
    pub const fn with(number: libc::c_long, index: u8, value: u32) -> Self {
        Self { number, argument: Some((index, value)) }
    }

    /// Asks tests/faults/hook.rs for it, in the value that comes with a signal.
    fn send(self, process: libc::pid_t, thread: libc::pid_t) {
        #[repr(C)]
        struct Queued {
            signo: libc::c_int,
            errno: libc::c_int,
            code: libc::c_int,
            pid: libc::pid_t,
            uid: libc::uid_t,
            value: u64,
            rest: [u8; 88],
        }
        let (index, value) = self.argument.map_or((0, 0), |(index, value)| (index + 1, value));
        let number = u64::try_from(self.number).unwrap();
        let value = number | u64::from(index) << 16 | u64::from(value) << 32;
        let (signo, code) = (libc::SIGUSR1, libc::SI_QUEUE);
        let mut info = Queued { signo, errno: 0, code, pid: 0, uid: 0, value, rest: [0; 88] };
        // SAFETY: the kernel reads a siginfo, which is no longer than that.
        let done = unsafe {
            libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, signo, &raw mut info)
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
}

/// How many filters of system calls are in force for the process or thread at `dir` in /proc.
fn filters_of(dir: &Path) -> Option<u32> {
    let status = std::fs::read_to_string(dir.join("status")).ok()?;
    let count = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"))?;
    count.trim().parse().ok()
}

/// The directory in /proc of the thread of process `pid` that is called `thread`.
fn find(pid: u32, thread: &str) -> Option<PathBuf> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    tasks.map_while(|task| Some(task.ok()?.path())).find(|task| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == thread)
    })
}

/// Whether a thread of process `pid` has the filters that it is to have: the process's, if there is one beside those
/// that this test was started under, and its own. Linux counts them from 5.9 on.
fn is_filtered(pid: u32, task: &Path) -> bool {
    let (Some(outside), Some(process), Some(own)) = (
        filters_of(Path::new("/proc/self")),
        filters_of(&PathBuf::from(format!("/proc/{pid}"))),
        filters_of(task),
    ) else {
        return true;
    };
    let is_main = task.ends_with(pid.to_string());
    own >= if process > outside && !is_main { process + 1 } else { process }
}

/// Has the thread called `thread` of process `pid`, which has the hook in it, make a system call, once it has its
/// filter: the API answers before the guest runs, and a thread without its filter has only the process's, which
/// allows more.
pub fn stray(pid: u32, thread: &str, stray: Stray) {
    let start = Instant::now();
    let task = loop {
        match find(pid, thread) {
            Some(task) if is_filtered(pid, &task) => break task,
            found => {
                assert!(start.elapsed() < PATIENCE, "thread {thread} without its filter: {found:?}")
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let thread: libc::pid_t = task.file_name().unwrap().to_str().unwrap().parse().unwrap();
    stray.send(pid.try_into().unwrap(), thread);
}

impl Hooked {
    /// Takes a VMM that was prepared with `dir`, and waits until it answers.
    pub fn of(child: Child, dir: TempDir) -> Self {
        let mut hooked = Self { child, dir, strays: 0 };
        hooked.wait_for("an answer of the API", |hooked| {
            requests::get::<Value>(&hooked.path("api"), "vm.info").is_ok()
        });
        hooked
    }

    /// Starts one that has no terminal.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with `more` options.
    pub fn start_with(more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(binary());
        command.args(["run", "--memory", "32M"]).args(more);
        command.args(["--serial", &format!("file={}", dir.path().join("serial").display())]);
        prepare(&mut command, dir.path(), &SPIN);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        Self::of(child, dir)
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `done`.
    fn wait_for(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "{what} did not come, exit status {ended:?}: {}",
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn address(&self, file: &str) -> u64 {
        let text = std::fs::read_to_string(self.path(file)).unwrap();
        u64::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap()
    }

    /// Where its page is.
    pub fn page(&mut self) -> u64 {
        self.wait_for("the hook's page", |hooked| hooked.path("page").exists());
        self.address("page")
    }

    /// Where the file was that it touched after it had been cut short.
    pub fn cut(&self) -> u64 {
        self.address("cut")
    }

    /// Has the hook do something.
    pub fn order(&self, what: &str) {
        std::fs::write(self.path("new"), what).unwrap();
        std::fs::rename(self.path("new"), self.path("do")).unwrap();
    }

    /// Has the thread called `thread` make a system call, once it has its filter.
    pub fn stray(&mut self, thread: &str, stray: Stray) {
        self.strays = self.calls_made();
        self::stray(self.pid(), thread, stray);
    }

    /// How many such calls have returned.
    fn calls_made(&self) -> u64 {
        std::fs::metadata(self.path("strays")).map_or(0, |meta| meta.len())
    }

    /// Waits until the call has been carried out.
    pub fn strayed(&mut self) {
        let before = self.strays;
        self.wait_for("the end of a call", |hooked| hooked.calls_made() > before);
    }

    /// Waits for an event of this name; its properties.
    pub fn event(&mut self, name: &str) -> Value {
        let find = |hooked: &Self| {
            let text = std::fs::read_to_string(hooked.path("events")).unwrap_or_default();
            let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            events.into_iter().find(|event| event["event"] == name)
        };
        self.wait_for(name, |hooked| find(hooked).is_some());
        find(self).unwrap()["properties"].clone()
    }

    /// `PUT /api/v1/<what>`.
    pub fn put(&self, what: &str) {
        requests::put(&self.path("api"), what).unwrap();
    }

    /// Waits for its end; how it ended, and what it said.
    pub fn ended(&mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return (status, self.stderr()),
                None => assert!(start.elapsed() < PATIENCE, "it lives: {}", self.stderr()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn stderr(&self) -> String {
        let text = std::fs::read(self.path("stderr")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Hooked {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
