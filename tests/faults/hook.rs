//! Preloaded into `mce-relay run`: a thread with memory of its own in the VMM's process, which does to it
//! what it is told to. So a test can have the VMM's own memory go bad, and be touched, when it wants.
//!
//! MCE_RELAY_HOOK names a directory. The thread writes the address of its page there (`page`), and does
//! what a file `do` says that appears: `touch` the page, `forge-ao` or `forge-ar` a memory failure of it,
//! or touch a mapped file that has been cut short (`adrerr`, its address in the file `cut`).
//!
//! On SIGUSR1 any thread makes the system call that comes with the signal (see `Stray` in
//! tests/src/hooked.rs), and adds a byte to the file `strays`.
//!
//! A thread has its name a moment before it has its filter of system calls. That moment is made long here, so
//! that a test which takes the one for the other fails every time, and not once in a thousand.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they saw by panicking")]

use std::fs::{self, File};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

#[path = "../../relay/tests/forge/mod.rs"]
mod siginfo;
use siginfo::{BUS_MCEERR_AO, BUS_MCEERR_AR, forge};

const PAGE: usize = 4096;

#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

extern "C" fn start() {
    if let Some(dir) = std::env::var_os("MCE_RELAY_HOOK") {
        take_strays(Path::new(&dir));
        std::thread::spawn(move || serve(&PathBuf::from(dir)));
    }
}

/// The file `strays`, opened while everybody may.
static STRAYS: AtomicI32 = AtomicI32::new(-1);

fn take_strays(dir: &Path) {
    let file = File::create(dir.join("strays")).unwrap();
    STRAYS.store(file.into_raw_fd(), Ordering::Relaxed);
    // SAFETY: sigaction is plain data; all zero is a valid value to start from.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler = on_stray as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: a complete action, whose handler is async-signal-safe.
    assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut()) }, 0);
}

extern "C" fn on_stray(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo, here one with a value.
    let asked = unsafe { (*info).si_value() }.sival_ptr.addr() as u64;
    let mut arguments = [-1_i64; 6];
    if let Some(index) = usize::from(asked.to_le_bytes()[2]).checked_sub(1) {
        arguments[index] = (asked >> 32) as i64;
    }
    let [a, b, c, d, e, f] = arguments;
    let number = i64::from(u16::from_le_bytes([asked.to_le_bytes()[0], asked.to_le_bytes()[1]]));
    // SAFETY: the test asks for calls that can do nothing with such arguments.
    unsafe {
        let errno = *libc::__errno_location();
        libc::syscall(number, a, b, c, d, e, f);
        libc::write(STRAYS.load(Ordering::Relaxed), c"x".as_ptr().cast(), 1);
        *libc::__errno_location() = errno;
    }
}

/// Between the name and the filter.
const UNFILTERED: Duration = Duration::from_millis(20);

/// In place of the C library's, which is called before a filter is put in force (PR_SET_NO_NEW_PRIVS).
#[unsafe(no_mangle)]
pub extern "C" fn prctl(
    option: libc::c_int,
    a: libc::c_ulong,
    b: libc::c_ulong,
    c: libc::c_ulong,
    d: libc::c_ulong,
) -> libc::c_int {
    if option == libc::PR_SET_NO_NEW_PRIVS {
        std::thread::sleep(UNFILTERED);
    }
    // SAFETY: the call is the caller's, with the caller's arguments.
    let done = unsafe { libc::syscall(libc::SYS_prctl, option, a, b, c, d) };
    // The kernel's results are as small.
    libc::c_int::try_from(done).unwrap_or(-1)
}

/// A page of this process, of `file` or of nobody else.
fn page(file: Option<&File>) -> *mut u8 {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let (flags, fd) = match file {
        Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
    };
    // SAFETY: a new mapping at an address of the kernel's choice; it stays as long as the process.
    let page = unsafe { libc::mmap(ptr::null_mut(), PAGE, prot, flags, fd, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    page.cast()
}

fn touch(page: *const u8) {
    // SAFETY: a mapping of this process that is never unmapped. If it is bad, that is the point.
    unsafe { page.read_volatile() };
}

/// Whole or not there at all, for who looks at it.
fn tell(path: &Path, address: *const u8) {
    fs::write(path.with_extension("new"), format!("{:#x}", address.addr())).unwrap();
    fs::rename(path.with_extension("new"), path).unwrap();
}

fn serve(dir: &Path) {
    let own = page(None);
    // SAFETY: as in `touch`. Written, so that there is memory of its own behind it.
    unsafe { own.write_volatile(1) };
    tell(&dir.join("page"), own);
    loop {
        std::thread::sleep(Duration::from_millis(5));
        let order = dir.join("do");
        let Ok(what) = fs::read_to_string(&order) else { continue };
        let _ = fs::remove_file(&order);
        match what.as_str() {
            "touch" => touch(own),
            "forge-ao" => forge(BUS_MCEERR_AO, own.addr() as u64, 12),
            "forge-ar" => forge(BUS_MCEERR_AR, own.addr() as u64, 12),
            "adrerr" => {
                let path = dir.join("mapped");
                fs::write(&path, [1; PAGE]).unwrap();
                let file = File::options().read(true).write(true).open(path).unwrap();
                let cut = page(Some(&file));
                touch(cut);
                file.set_len(0).unwrap();
                tell(&dir.join("cut"), cut);
                touch(cut);
            }
            other => panic!("{other:?} is none of the orders"),
        }
    }
}
