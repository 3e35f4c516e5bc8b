//! `hold COMMAND [ARGUMENT...]`: runs a command in the lab while two idle virtual machines exist; its
//! exit status is the command's.
//!
//! KVM patches the kernel's code when the first vCPU of a kind appears and when the last one goes
//! (static keys). The lab's emulator does not always survive that ("Oops: int3"), so it is done once
//! for all that runs in a lab.
#![allow(clippy::unwrap_used, reason = "without KVM there is no lab")]

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use kvm_ioctls::Kvm;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let Some(command) = words.next() else {
        eprintln!("usage: hold COMMAND [ARGUMENT...]");
        return ExitCode::from(2);
    };
    let kvm = Kvm::new().unwrap();
    // One with interrupt controllers, one without.
    let with = kvm.create_vm().unwrap();
    with.create_irq_chip().unwrap();
    let without = kvm.create_vm().unwrap();
    let held = (with.create_vcpu(0).unwrap(), without.create_vcpu(0).unwrap());

    let status = match Command::new(&command).args(words).status() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("hold: cannot run {}: {error}", command.display());
            return ExitCode::from(127);
        }
    };
    drop(held);
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}
