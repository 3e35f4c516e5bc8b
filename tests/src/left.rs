//! A `mce-relay run` with a guest of a few instructions and a directory for all that it writes: for what a VM
//! leaves, and to whom.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use mce_relay_cli::client::requests;
use mce_relay_vmm::api::types::vm::VmInfo;
use tempfile::TempDir;

use crate::guest::binary;
use crate::lab;
use crate::tiny::elf;

const PATIENCE: Duration = Duration::from_secs(60);

/// The guest of [`WAIT`] goes on when there is a byte here.
pub const GO: u64 = 0x100_0000;

/// mov dx, 0x602; mov al, 1; out dx, al; hlt: the guest resets itself.
pub const RESET: [u8; 8] = [0x66, 0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4];

/// 1: cmp byte [GO], 0; je 1b.
pub const WAIT: [u8; 9] = [0x80, 0x3d, 0, 0, 0, 0x01, 0, 0x74, 0xf7];

/// mov byte [GO], 0.
pub const AGAIN: [u8; 7] = [0xc6, 0x05, 0, 0, 0, 0x01, 0];

/// A guest writes `text` to the serial port at `port`.
pub fn say(port: u16, text: &str) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    // mov dx, port; then for each mov al, byte; out dx, al
    let mut code = vec![0x66, 0xba, low, high];
    code.extend(text.bytes().flat_map(|byte| [0xb0, byte, 0xee]));
    code
}

/// A directory with a kernel for VMs in it.
#[derive(Debug)]
pub struct Place(TempDir);

impl Place {
    /// One with `code` as the kernel.
    pub fn new(code: &[u8]) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.path("kernel"), elf(code)).unwrap();
        place
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An option's value with a path in it: `form=PATH`.
    pub fn argument(&self, form: &str, name: &str) -> String {
        format!("{form}={}", self.path(name).display())
    }

    /// What a file in it holds; nothing if it is not there.
    pub fn text(&self, name: &str) -> String {
        let bytes = std::fs::read(self.path(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// `mce-relay args`, with this directory as that of the sockets of named VMs.
    pub fn tool(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// The same, to be started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(args).env("XDG_RUNTIME_DIR", self.0.path()).stdin(Stdio::null());
        command.env_remove("RUST_LOG");
        command
    }

    /// The command line of a VM, with `more` options.
    pub fn run(&self, more: &[&str]) -> Command {
        let mut command = self.command(&["run", "--memory", "32M", "--kernel"]);
        command.arg(self.path("kernel")).args(more);
        command
    }

    /// Starts it, what it says in the file `stderr`, and waits until it answers at `socket`.
    pub fn start(&self, socket: &str, more: &[&str]) -> Running<'_> {
        self.started(self.run(more), socket)
    }

    /// The same with a command line that was made before.
    pub fn started(&self, mut command: Command, socket: &str) -> Running<'_> {
        let stderr = std::fs::File::create(self.path("stderr")).unwrap();
        let child = command.stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        let mut running = Running { place: self, child, socket: self.path(socket) };
        running.wait("an answer", |running| running.info().is_some());
        running
    }
}

/// A VM in a [`Place`]. Dropping it kills it.
#[derive(Debug)]
pub struct Running<'a> {
    place: &'a Place,
    child: Child,
    socket: PathBuf,
}

impl Running<'_> {
    /// Waits until `done`.
    pub fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "{what} does not come, exit status {ended:?}: {}\n{}",
                self.place.text("stderr"),
                lab::threads(self.pid())
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What runs; `None` between two boots.
    pub fn info(&self) -> Option<VmInfo> {
        requests::get(&self.socket, "vm.info").ok()
    }

    /// Its API socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Puts a byte at [`GO`].
    pub fn go(&self) {
        let info = self.info().unwrap();
        let block = info.block(GO).unwrap();
        lab::write_memory(self.pid(), block.hva + (GO - block.gpa), 1);
    }

    /// Has a guest of [`WAIT`] and [`AGAIN`] do once what is between them.
    pub fn go_once(&mut self) {
        self.go();
        self.wait("the guest", |running| {
            let info = running.info().unwrap();
            let block = info.block(GO).unwrap();
            lab::read_memory(running.pid(), block.hva + (GO - block.gpa)).unwrap() == 0
        });
    }

    /// Has the guest of [`WAIT`] go on, and waits for its boot `boot`.
    pub fn next_boot(&mut self, boot: u32) {
        self.go();
        self.wait("the next boot", |running| running.info().is_some_and(|info| info.boot == boot));
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: sends a signal to a child that has not been waited for.
        unsafe { libc::kill(self.pid().cast_signed(), signal) };
    }

    /// Waits for its end.
    pub fn ended(mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status,
                None => assert!(
                    start.elapsed() < PATIENCE,
                    "it lives: {}\n{}",
                    self.place.text("stderr"),
                    lab::threads(self.pid())
                ),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it by the API, and sees that it ends well.
    pub fn shut_down(self) {
        requests::put(&self.socket, "vm.shutdown").unwrap();
        let place = self.place;
        assert_eq!(self.ended().code(), Some(0), "{}", place.text("stderr"));
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
