//! Forged memory failures, for tests: `rt_tgsigqueueinfo(2)` lets a thread send itself any siginfo.

use std::io;

#[allow(dead_code, reason = "not every test forges ARs")]
pub const BUS_MCEERR_AR: i32 = 4;
pub const BUS_MCEERR_AO: i32 = 5;

/// Sends the calling thread a SIGBUS with this code, address and lsb, as the kernel would.
pub fn forge(code: i32, addr: u64, lsb: i16) {
    #[repr(C)]
    struct Info {
        signo: i32,
        errno: i32,
        code: i32,
        addr: u64,
        lsb: i16,
        rest: [u8; 102],
    }
    let info = Info { signo: libc::SIGBUS, errno: 0, code, addr, lsb, rest: [0; 102] };
    // SAFETY: `info` is a siginfo_t of full size (128 bytes), sent to this very thread.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            libc::getpid(),
            libc::gettid(),
            libc::SIGBUS,
            &raw const info,
        )
    };
    assert_eq!(sent, 0, "{}", io::Error::last_os_error());
}
