//! `hold COMMAND [ARGUMENT...]`: runs a command in the lab while two idle virtual machines exist, from now on; its
//! exit status is the command's.
//!
//! KVM patches the kernel's code when the first vCPU of a kind appears and when the last one goes
//! (static keys). The lab's emulator does not always survive that ("Oops: int3"), so it is done once
//! for all that runs in a lab, and not at its end: a process that stays behind keeps the machines.
#![allow(clippy::unwrap_used, reason = "without KVM there is no lab")]

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, Stdio};

use kvm_ioctls::Kvm;

/// What the process that stays behind is asked for.
const STAY: &str = "--stay";

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let Some(command) = words.next() else {
        eprintln!("usage: hold COMMAND [ARGUMENT...]");
        return ExitCode::from(2);
    };
    if command == STAY {
        loop {
            std::thread::park();
        }
    }
    let kvm = Kvm::new().unwrap();
    // One with interrupt controllers, one without.
    let with = kvm.create_vm().unwrap();
    with.create_irq_chip().unwrap();
    let without = kvm.create_vm().unwrap();
    let held = (with.create_vcpu(0).unwrap(), without.create_vcpu(0).unwrap());
    let machines = [&with, &without].map(AsRawFd::as_raw_fd);
    // Elsewhere nothing switches it off.
    if std::env::var_os("MCE_RELAY_LAB").is_some() {
        stay([machines[0], machines[1], held.0.as_raw_fd(), held.1.as_raw_fd()]);
    }

    let status = match Command::new(&command).args(words).status() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("hold: cannot run {}: {error}", command.display());
            return ExitCode::from(127);
        }
    };
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// Starts the process that keeps `kept` until the lab is switched off. It has no terminal, and nobody waits for what it prints.
fn stay(kept: [RawFd; 4]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .arg(STAY)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let inherit = move || {
        for fd in kept {
            // SAFETY: the descriptor is open, and takes flags only.
            if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        // SAFETY: takes nothing.
        unsafe { libc::setsid() };
        Ok(())
    };
    // SAFETY: between fork and exec only fcntl and setsid are called, which are async-signal-safe, and nothing is allocated.
    unsafe { command.pre_exec(inherit) };
    #[allow(clippy::zombie_processes, reason = "it stays when this one has gone")]
    let _ = command.spawn().unwrap();
}
