//! Reports a system call that a filter refuses: a SIGSYS, on the thread that made it.

use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::{io, ptr};

use libc::siginfo_t;

use super::role::Role;
use crate::sandbox::{sigbus_fallback, terminal};

/// Exit status of a VMM that made a system call that its filter refuses.
pub const STATUS: u8 = 8;

/// `si_code` of a SIGSYS by seccomp (include/uapi/asm-generic/siginfo.h).
const SYS_SECCOMP: c_int = 1;

/// `siginfo` of a SIGSYS.
#[repr(C)]
struct SysInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    _call_addr: *mut c_void,
    number: c_int,
    _arch: c_uint,
}

thread_local! {
    /// The role of this thread. Without destructor and lazy initialisation, as the signal handler reads it.
    static KIND: Cell<Option<Role>> = const { Cell::new(None) };
}

/// Sets the role of the calling thread.
pub(super) fn name(thread: Role) {
    KIND.set(Some(thread));
}

/// Installs the handler.
pub(super) fn install() -> io::Result<()> {
    let handler = on_sigsys as extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
    // SAFETY: sigaction is plain data; all zero is a valid value to start from.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is complete, and its handler is async-signal-safe.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_sigsys(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // tcsetattr is async-signal-safe.
    terminal::restore();
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO; one of SIGSYS begins as SysInfo does.
    let SysInfo { code, number, .. } = unsafe { info.cast::<SysInfo>().read() };
    let mut line = Line::default();
    line.push(b"mce-relay: ");
    line.push(match KIND.get() {
        Some(Role::Vcpu) => b"a vCPU's thread",
        Some(Role::Relay) => b"the relay's thread",
        Some(Role::Api) => b"the API's thread",
        Some(Role::Serial) => b"a serial port's thread",
        Some(Role::VirtioBlk) => b"the thread of virtio-blk",
        Some(Role::VirtioRng) => b"the thread of virtio-rng",
        Some(Role::VirtioConsole) => b"the thread of virtio-console",
        Some(Role::VirtioNet | Role::VirtioVhostNet) => b"the thread of virtio-net",
        Some(Role::VirtioVsock) => b"the thread of virtio-vsock",
        Some(Role::Events) => b"the events' thread",
        Some(Role::Main) | None => b"the main thread",
    });
    if code == SYS_SECCOMP {
        line.push(b" made system call ");
        line.number(number.unsigned_abs());
        line.push(b", which its seccomp filter does not have");
    } else {
        line.push(b" was sent SIGSYS");
    }
    line.push(
        b"; the VMM ends (exit status 8). If nobody has attacked it this is a defect: \
          run it with --seccomp log, and please report what the host's kernel logs\n",
    );
    const _: () = assert!(STATUS == 8, "as the words say");
    // SAFETY: write is async-signal-safe; the buffer is valid for its length. Every filter has it.
    unsafe { libc::write(libc::STDERR_FILENO, line.text.as_ptr().cast(), line.len) };
    sigbus_fallback::end(STATUS);
}

/// Text built without allocation.
struct Line {
    text: [u8; 320],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { text: [0; 320], len: 0 }
    }
}

impl Line {
    /// Appends as much as fits.
    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(place) = self.text.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: u32) {
        let mut digits = [b'0'; 10];
        let mut rest = number;
        let mut first = digits.len();
        while first > 0 {
            first -= 1;
            // Less than 10.
            digits[first] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.push(&digits[first..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_whole() {
        for number in [0, 7, 59, 435, u32::MAX] {
            let mut line = Line::default();
            line.number(number);
            assert_eq!(line.text[..line.len], *number.to_string().as_bytes());
        }
    }
}
