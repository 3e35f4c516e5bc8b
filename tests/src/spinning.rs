//! A `mce-relay run` whose guest is a loop of a few instructions: a VM that is there, and nothing more.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use mce_relay_cli::client::requests;
use mce_relay_vmm::api::types::vm::{Status, VmInfo};
use tempfile::TempDir;

use crate::guest::binary;
use crate::hooked::SPIN;
use crate::tiny::elf;

const PATIENCE: Duration = Duration::from_secs(30);

/// An ordinary user, nobody, with a /dev/kvm of their own and nothing else.
#[derive(Debug, Clone, Copy)]
pub struct Nobody;

impl Nobody {
    /// Its number.
    pub const ID: u32 = 65534;
    /// In a mount namespace of its own, so that the machine's /dev/kvm stays as it is. Its arguments: a
    /// directory to mount at, the user's id, and what to run.
    const SCRIPT: &str = "set -e; dev=$1 id=$2; shift 2
        mount -t tmpfs -o mode=755 none $dev
        mknod $dev/kvm c $(stat -c '0x%t 0x%T' /dev/kvm)
        chown $id:$id $dev/kvm; chmod 600 $dev/kvm
        mount --bind $dev/kvm /dev/kvm
        exec setpriv --reuid $id --regid $id --clear-groups -- \"$@\"";

    /// Makes `dir` theirs, with copies of `files` in it, which they may not be able to read where these lie;
    /// the copies.
    pub fn settle<const N: usize>(self, dir: &Path, files: [&Path; N]) -> [PathBuf; N] {
        let mode = |path: &Path| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        std::fs::create_dir(dir.join("dev")).unwrap();
        mode(dir);
        std::os::unix::fs::chown(dir, Some(Self::ID), Some(Self::ID)).unwrap();
        files.map(|file| {
            let copy = dir.join(file.file_name().unwrap());
            std::fs::copy(file, &copy).unwrap();
            mode(&copy);
            copy
        })
    }

    /// Runs `program` as that user; `dir` was settled.
    pub fn command(self, program: &Path, dir: &Path) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", Self::SCRIPT, "sh"]);
        command.arg(dir.join("dev")).arg(Self::ID.to_string()).arg(program);
        command
    }
}

/// The VMM. Dropping it kills it.
#[derive(Debug)]
pub struct Spinning {
    child: Child,
    dir: TempDir,
    binary: PathBuf,
    user: Option<Nobody>,
}

impl Spinning {
    /// Starts it with `more` options and waits until it answers.
    pub fn start(more: &[&str]) -> Self {
        Self::of(&SPIN, None, more)
    }

    /// The same with `code` as its guest, see [`elf`].
    pub fn start_with(code: &[u8], more: &[&str]) -> Self {
        Self::of(code, None, more)
    }

    /// The same as another user, with a copy of the program that this user may read.
    pub fn start_as(user: Nobody, more: &[&str]) -> Self {
        Self::of(&SPIN, Some(user), more)
    }

    fn of(code: &[u8], user: Option<Nobody>, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("kernel"), elf(code)).unwrap();
        let mut program = binary();
        if let Some(user) = user {
            [program] = user.settle(dir.path(), [&program]);
        }
        let mut command = match user {
            Some(user) => user.command(&program, dir.path()),
            None => Command::new(&program),
        };
        command.args(["run", "--serial", "off", "--memory", "32M", "--kernel"]).arg(at("kernel"));
        command.args(["--api-socket", &format!("path={}", at("api").display())]).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(std::fs::File::create(at("stderr")).unwrap());
        let child = command.spawn().unwrap();
        let mut vmm = Self { child, dir, binary: program, user };
        let start = Instant::now();
        while requests::get::<VmInfo>(&vmm.socket(), "vm.info").is_err() {
            let ended = vmm.child.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "the VMM does not answer, exit status {ended:?}: {}",
                vmm.stderr()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        vmm
    }

    /// Its API socket.
    pub fn socket(&self) -> PathBuf {
        self.path("api")
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said on stderr.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    /// Runs `mce-relay <command> --api-socket … args` as the VMM's own user.
    pub fn command(&self, command: &str, args: &[&str]) -> Output {
        let socket = format!("path={}", self.socket().display());
        let mut all: Vec<&str> = command.split(' ').collect();
        all.extend(["--api-socket", &socket]);
        all.extend(args);
        self.tool(&all)
    }

    /// Runs `mce-relay args` as the VMM's own user.
    pub fn tool(&self, args: &[&str]) -> Output {
        let mut tool = match self.user {
            Some(user) => user.command(&self.binary, self.dir.path()),
            None => Command::new(&self.binary),
        };
        tool.args(args).stdin(Stdio::null()).output().unwrap()
    }

    /// Starts `mce-relay <command> --api-socket … args`, with what it prints in a pipe, and does not wait
    /// for it.
    pub fn spawn(&self, command: &str, args: &[&str]) -> Child {
        let socket = format!("path={}", self.socket().display());
        let mut tool = Command::new(&self.binary);
        tool.args([command, "--api-socket", &socket]).args(args);
        tool.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    }

    /// What runs.
    pub fn info(&self) -> VmInfo {
        requests::get(&self.socket(), "vm.info").unwrap()
    }

    /// What runs; `None` between two boots.
    pub fn running(&self) -> Option<VmInfo> {
        requests::get(&self.socket(), "vm.info").ok()
    }

    /// The ledger.
    pub fn status(&self) -> Status {
        requests::get(&self.socket(), "relay.status").unwrap()
    }

    /// Ends it by the API; its exit status.
    pub fn shut_down(self) -> ExitStatus {
        requests::put(&self.socket(), "vm.shutdown").unwrap();
        self.ended()
    }

    /// Waits for its end; its exit status.
    pub fn ended(mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status,
                None if start.elapsed() > PATIENCE => panic!("the VMM does not end"),
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("--- stderr of the VMM\n{}", self.stderr());
        }
    }
}
