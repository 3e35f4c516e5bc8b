//! Preloaded into `mce-relay run` (LD_PRELOAD): makes one of its calls to the kernel fail, so that
//! a test can see what comes of it. Each call of KVM, for memory, for an eventfd, for the memory-failure
//! policy and before a seccomp filter has a number, from 1 on in the order in which they are made.
//!
//! * MCE_RELAY_FAIL_AT: the number of the call that fails; without it none does.
//! * MCE_RELAY_FAIL_CALLS: or, calls as the log has them ("ioctl 0xae80,mmap"; without a detail all of that
//!   name), each of which fails while there is a file MCE_RELAY_FAIL_WHILE.
//! * MCE_RELAY_FAIL_ERRNO: what it fails with, as a number; ENOMEM without it.
//! * MCE_RELAY_READ_ONLY: with any value KVM is told that guest RAM is read-only, so that stores come to the VMM.
//! * MCE_RELAY_FAIL_LOG: a file that gets a line for each call, "NUMBER NAME DETAIL", and " fails"
//!   behind that for those that fail.
//!
//! `mmap64` is left alone: only Rust's standard library calls it, above all for the stacks that
//! signal handlers run on, and it panics when it gets none. So are KVM_RUNs after the first few,
//! as there is no end of them, and every ioctl that is not KVM's, such as the terminal's.

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::io::Write;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// What ends the line of the call that fails.
const FAILS: &str = " fails";

/// The type of KVM's ioctls, and the one that runs a vCPU: include/uapi/linux/kvm.h.
const KVMIO: c_ulong = 0xae;
const KVM_RUN: c_ulong = 0xae80;
/// Its argument begins with the slot's number and its flags.
const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;
const KVM_MEM_READONLY: u32 = 1 << 1;
/// So many KVM_RUNs count, those of all vCPUs together.
const RUNS: u64 = 3;
/// Shorter mappings do not count.
const PAGE: usize = 4096;

/// What the environment asks for.
struct Settings {
    at: Option<u64>,
    calls: Option<&'static str>,
    during: Option<&'static CStr>,
    errno: c_int,
    log: Option<&'static CStr>,
}

/// Read at the first call that counts.
static SETTINGS: OnceLock<Settings> = OnceLock::new();
/// The number of the last call that counts.
static CALLS: AtomicU64 = AtomicU64::new(0);
static KVM_RUNS: AtomicU64 = AtomicU64::new(0);

impl Settings {
    fn read() -> Self {
        Self {
            at: number(c"MCE_RELAY_FAIL_AT"),
            calls: variable(c"MCE_RELAY_FAIL_CALLS").and_then(|calls| calls.to_str().ok()),
            during: variable(c"MCE_RELAY_FAIL_WHILE"),
            errno: number(c"MCE_RELAY_FAIL_ERRNO").unwrap_or(libc::ENOMEM),
            log: variable(c"MCE_RELAY_FAIL_LOG"),
        }
    }

    /// Whether the call is one of those that fail for a while, and it is that while.
    fn fails_now(&self, name: &str, detail: c_ulong) -> bool {
        let (Some(calls), Some(file)) = (self.calls, self.during) else { return false };
        let is_it = |call: &str| match call.split_once(" 0x") {
            Some((of, text)) => of == name && c_ulong::from_str_radix(text, 16) == Ok(detail),
            None => call == name,
        };
        // SAFETY: the path ends in a NUL.
        calls.split(',').any(is_it) && unsafe { libc::access(file.as_ptr(), libc::F_OK) } == 0
    }
}

/// A variable of the environment. Not std's, which allocates.
fn variable(name: &CStr) -> Option<&'static CStr> {
    // SAFETY: the name ends in a NUL. What comes back is null or a string of the environment, which
    // the program under test never changes.
    unsafe {
        let value = libc::getenv(name.as_ptr());
        if value.is_null() { None } else { Some(CStr::from_ptr(value)) }
    }
}

fn number<T: FromStr>(name: &CStr) -> Option<T> {
    variable(name)?.to_str().ok()?.parse().ok()
}

/// Counts a call. Whether it has to fail; errno is set then.
fn fails(name: &str, detail: c_ulong) -> bool {
    let settings = SETTINGS.get_or_init(Settings::read);
    let number = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    let fails = settings.at == Some(number) || settings.fails_now(name, detail);
    if let Some(log) = settings.log {
        write_down(log, number, name, detail, if fails { FAILS } else { "" });
    }
    if fails {
        // SAFETY: the calling thread's errno, which is always there.
        unsafe { *libc::__errno_location() = settings.errno };
    }
    fails
}

/// Appends a line to `log`: one write, as other threads do the same.
fn write_down(log: &CStr, number: u64, name: &str, detail: c_ulong, end: &str) {
    let mut line = [0_u8; 96];
    let mut rest = line.as_mut_slice();
    if writeln!(rest, "{number} {name} {detail:#x}{end}").is_err() {
        return; // it does not fit, which no line of ours is long enough for
    }
    let left = rest.len();
    let line = &line[..line.len() - left];
    // SAFETY: the path ends in a NUL, the bytes are those of `line`, and the descriptor is nobody
    // else's.
    unsafe {
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
        let file = libc::open(log.as_ptr(), flags, 0o600);
        if file >= 0 {
            libc::write(file, line.as_ptr().cast(), line.len());
            libc::close(file);
        }
    }
}

/// What a system call returned, as the C library's functions have it.
fn int(result: c_long) -> c_int {
    c_int::try_from(result).unwrap_or(-1)
}

fn counts(request: c_ulong) -> bool {
    let is_kvm = (request >> 8) & 0xff == KVMIO;
    is_kvm && (request != KVM_RUN || KVM_RUNS.fetch_add(1, Ordering::Relaxed) < RUNS)
}

/// In place of the C library's; the requests of KVM count.
///
/// # Safety
/// As for ioctl.
// A C function with a variable number of arguments is called like any other on x86-64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    if counts(request) && fails("ioctl", request) {
        return -1;
    }
    if request == KVM_SET_USER_MEMORY_REGION && variable(c"MCE_RELAY_READ_ONLY").is_some() {
        let flags = std::ptr::with_exposed_provenance_mut::<u32>(argument + size_of::<u32>());
        // SAFETY: the caller's promise: a struct kvm_userspace_memory_region, which is the caller's own.
        unsafe { *flags |= KVM_MEM_READONLY };
    }
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, c_long::from(fd), request, argument) };
    int(result)
}

/// In place of the C library's; mappings of a page and more count.
///
/// # Safety
/// As for mmap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    if len >= PAGE && fails("mmap", c_ulong::from(flags.cast_unsigned())) {
        return libc::MAP_FAILED;
    }
    let (protection, flags, fd) = (c_long::from(protection), c_long::from(flags), c_long::from(fd));
    // SAFETY: the caller's promise.
    let result =
        unsafe { libc::syscall(libc::SYS_mmap, address, len, protection, flags, fd, offset) };
    // The only value below 0 is -1, and MAP_FAILED is the same.
    usize::try_from(result).map_or(libc::MAP_FAILED, std::ptr::with_exposed_provenance_mut)
}

/// In place of the C library's; settings of the memory-failure policy count.
///
/// # Safety
/// As for prctl.
// As for ioctl: what the caller did not give is not looked at by the kernel either.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prctl(
    option: c_int,
    second: c_ulong,
    third: c_ulong,
    fourth: c_ulong,
    fifth: c_ulong,
) -> c_int {
    let counts = [libc::PR_MCE_KILL, libc::PR_SET_NO_NEW_PRIVS].contains(&option);
    if counts && fails("prctl", c_ulong::from(option.cast_unsigned())) {
        return -1;
    }
    let option = c_long::from(option);
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_prctl, option, second, third, fourth, fifth) };
    int(result)
}

/// In place of the C library's; every call counts.
///
/// # Safety
/// As for eventfd, which takes no pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn eventfd(value: c_uint, flags: c_int) -> c_int {
    if fails("eventfd", c_ulong::from(flags.cast_unsigned())) {
        return -1;
    }
    let (value, flags) = (c_ulong::from(value), c_long::from(flags));
    // SAFETY: the call takes two integers.
    let result = unsafe { libc::syscall(libc::SYS_eventfd2, value, flags) };
    int(result)
}

/// In place of the C library's; every call counts.
///
/// # Safety
/// As for memfd_create.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memfd_create(name: *const c_char, flags: c_uint) -> c_int {
    let flags = c_ulong::from(flags);
    if fails("memfd_create", flags) {
        return -1;
    }
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_memfd_create, name, flags) };
    int(result)
}

/// In place of the C library's; every call counts.
///
/// # Safety
/// As for madvise.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, len: usize, advice: c_int) -> c_int {
    if fails("madvise", c_ulong::from(advice.cast_unsigned())) {
        return -1;
    }
    let advice = c_long::from(advice);
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_madvise, address, len, advice) };
    int(result)
}

/// In place of the C library's; every call counts.
///
/// # Safety
/// As for fallocate, which takes no pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, offset: i64, len: i64) -> c_int {
    if fails("fallocate", c_ulong::from(mode.cast_unsigned())) {
        return -1;
    }
    let (fd, mode) = (c_long::from(fd), c_long::from(mode));
    // SAFETY: the call takes four integers.
    int(unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, len) })
}
