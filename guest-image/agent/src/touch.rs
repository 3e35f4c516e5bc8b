//! Accesses that may hit poison, and the SIGBUS handler that survives them.
//!
//! The accesses are a few instructions of assembly between two symbols. They use no stack, so
//! when one of them faults the handler can send the thread to a third symbol that just returns
//! to the caller: no setjmp, no access that is tried again, no loop. A SIGBUS from any other
//! instruction means that the agent's own memory is gone, and ends it.

use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::proto::{Code, Sigbus};
use crate::words::Hex;

/// `si_code` of a memory error that the thread ran into (Linux, siginfo.h).
pub const BUS_MCEERR_AR: i32 = 4;
/// `si_code` of a memory error that the process is merely told of.
pub const BUS_MCEERR_AO: i32 = 5;

core::arch::global_asm!(
    ".pushsection .text.agent_touch, \"ax\", @progbits",
    ".globl agent_touch_begin, agent_touch_end, agent_touch_recover",
    ".globl agent_touch_read, agent_touch_write, agent_touch_spin, agent_touch_copy",
    ".globl agent_touch_syscall",
    "agent_touch_begin:",
    "agent_touch_read:",
    "mov rax, [rdi]",
    "ret",
    "agent_touch_write:",
    "mov [rdi], rsi",
    "ret",
    "agent_touch_spin:", // rdi from, rsi times
    "mov rax, [rdi]",
    "dec rsi",
    "jnz agent_touch_spin",
    "ret",
    "agent_touch_copy:", // rdi to, rsi from, rdx words
    "mov rcx, rdx",
    "rep movsq",
    "ret",
    // A signal that the kernel raises while it copies arrives with the instruction after
    // `syscall`; that has to be inside the symbols too, so libc's wrapper will not do.
    "agent_touch_syscall:", // edi its number, esi fd, rdx buffer, rcx bytes, r8 offset
    "mov eax, edi",
    "mov edi, esi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov r10, r8",
    "syscall",
    "nop",
    "ret",
    "agent_touch_end:",
    "agent_touch_recover:",
    "xor eax, eax",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    static agent_touch_begin: u8;
    static agent_touch_end: u8;
    static agent_touch_recover: u8;
    fn agent_touch_read(addr: usize) -> u64;
    fn agent_touch_write(addr: usize, value: u64);
    fn agent_touch_spin(addr: usize, times: u64);
    fn agent_touch_copy(to: usize, from: usize, words: usize);
    fn agent_touch_syscall(call: i32, fd: i32, buffer: usize, bytes: usize, offset: u64) -> isize;
}

/// The start of Linux' `siginfo_t` for SIGBUS; libc does not show `si_addr_lsb`.
#[repr(C)]
struct BusInfo {
    signo: i32,
    errno: i32,
    code: i32,
    pad: i32,
    addr: u64,
    lsb: i16,
}

/// A SIGBUS, as the kernel described it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// `si_code`.
    pub code: i32,
    /// `si_addr`.
    pub addr: u64,
    /// `si_addr_lsb`; means something for AR and AO only.
    pub lsb: i16,
}

impl From<Fault> for Sigbus {
    fn from(fault: Fault) -> Self {
        let code = match fault.code {
            BUS_MCEERR_AR => Code::Name("AR"),
            BUS_MCEERR_AO => Code::Name("AO"),
            other => Code::Number(other),
        };
        Self {
            code,
            addr: Hex(fault.addr),
            lsb: matches!(code, Code::Name(_)).then_some(fault.lsb),
        }
    }
}

/// Where the handler leaves a fault for whoever reads it outside the handler.
struct Slot {
    /// 0 while free; written last, and with release order, so what it publishes is whole.
    ready: AtomicU32,
    code: AtomicI32,
    lsb: AtomicI32,
    addr: AtomicU64,
}

impl Slot {
    const fn new() -> Self {
        Self {
            ready: AtomicU32::new(0),
            code: AtomicI32::new(0),
            lsb: AtomicI32::new(0),
            addr: AtomicU64::new(0),
        }
    }

    fn put(&self, fault: Fault) {
        self.code.store(fault.code, Ordering::Relaxed);
        self.lsb.store(fault.lsb.into(), Ordering::Relaxed);
        self.addr.store(fault.addr, Ordering::Relaxed);
        self.ready.store(1, Ordering::Release);
    }

    fn take(&self) -> Option<Fault> {
        if self.ready.load(Ordering::Acquire) == 0 {
            return None;
        }
        let fault = Fault {
            code: self.code.load(Ordering::Relaxed),
            lsb: i16::try_from(self.lsb.load(Ordering::Relaxed)).unwrap_or(0),
            addr: self.addr.load(Ordering::Relaxed),
        };
        self.ready.store(0, Ordering::Release);
        Some(fault)
    }
}

const RING: u32 = 64;
static AO: [Slot; RING as usize] = [const { Slot::new() }; RING as usize];
static AO_HEAD: AtomicU32 = AtomicU32::new(0);
static AO_TAIL: AtomicU32 = AtomicU32::new(0);
static AO_LOST: AtomicU32 = AtomicU32::new(0);
/// All AOs so far.
static AO_COUNT: AtomicU32 = AtomicU32::new(0);
/// Whether AOs are only counted.
static QUIET: AtomicBool = AtomicBool::new(false);
static TOUCHED: Slot = Slot::new();
/// Held across every touch: there is one slot for its fault.
static TOUCHING: Mutex<()> = Mutex::new(());
static WAKE: AtomicI32 = AtomicI32::new(-1);
static LAST_WORDS: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a whole siginfo_t (128 bytes), of which BusInfo
    // is the beginning for SIGBUS.
    let bus = unsafe { &*info.cast::<BusInfo>() };
    let fault = Fault { code: bus.code, addr: bus.addr, lsb: bus.lsb };
    if fault.code == BUS_MCEERR_AO {
        AO_COUNT.fetch_add(1, Ordering::Relaxed);
        if !QUIET.load(Ordering::Relaxed) {
            keep_ao(fault);
        }
        return;
    }
    // SAFETY: with SA_SIGINFO the third argument is this thread's ucontext_t, ours to change
    // until the handler returns.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let rip = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
    // The linker gives these their addresses; nothing behind them is read.
    let begin = (&raw const agent_touch_begin).addr() as u64;
    let end = (&raw const agent_touch_end).addr() as u64;
    if fault.code > 0 && (begin..end).contains(&rip.cast_unsigned()) {
        TOUCHED.put(fault);
        *rip = ((&raw const agent_touch_recover).addr() as u64).cast_signed();
        return;
    }
    die(fault.code);
}

fn keep_ao(fault: Fault) {
    // Several threads may be here at once, so the place is claimed before it is filled.
    let claim = AO_HEAD.fetch_update(Ordering::AcqRel, Ordering::Acquire, |head| {
        let used = head.wrapping_sub(AO_TAIL.load(Ordering::Acquire));
        (used < RING).then(|| head.wrapping_add(1))
    });
    match claim {
        Ok(place) => AO[(place % RING) as usize].put(fault),
        Err(_) => {
            AO_LOST.fetch_add(1, Ordering::Relaxed);
        }
    }
    let one = 1u64.to_ne_bytes();
    // SAFETY: __errno_location is this thread's errno, which the code that was interrupted may
    // be about to read; write(2) is async-signal-safe and gets 8 valid bytes. A full or missing
    // eventfd is no loss: its reader is awake then, or not there yet.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(WAKE.load(Ordering::Relaxed), one.as_ptr().cast(), one.len());
        *libc::__errno_location() = errno;
    }
}

/// Says so and lets the signal end the process: the default action is set, and the fault
/// happens again when the handler returns. A signal that somebody sent is sent once more.
fn die(code: i32) {
    let words = b"\n{\"event\":\"error\",\"error\":\"SIGBUS outside a touch: the agent ends\"}\n";
    // SAFETY: write, signal and raise are async-signal-safe; the buffer is a constant.
    unsafe {
        let fd = LAST_WORDS.load(Ordering::Relaxed);
        libc::write(fd, words.as_ptr().cast(), words.len());
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
        if code <= 0 {
            libc::raise(libc::SIGBUS);
        }
    }
}

/// Installs the handler and returns the descriptor that becomes readable when an AO waits.
/// `last_words` is the descriptor that hears of a SIGBUS the agent cannot survive.
///
/// # Errors
/// What eventfd(2) or sigaction(2) refused.
pub fn install(last_words: i32) -> io::Result<i32> {
    LAST_WORDS.store(last_words, Ordering::Relaxed);
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    WAKE.store(fd, Ordering::Relaxed);
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    // SAFETY: all-zero is a valid sigaction; the handler has the signature that SA_SIGINFO asks
    // for and does only what a handler may.
    let result = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut())
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// The oldest AO that was not reported yet.
pub fn next_ao() -> Option<Fault> {
    let tail = AO_TAIL.load(Ordering::Relaxed);
    let fault = AO[(tail % RING) as usize].take()?;
    AO_TAIL.store(tail.wrapping_add(1), Ordering::Release);
    Some(fault)
}

/// Has AOs only counted, or kept for [`next_ao`] again.
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Whether AOs are only counted, and how many there were so far.
pub fn aos() -> (bool, u32) {
    (QUIET.load(Ordering::Relaxed), AO_COUNT.load(Ordering::Relaxed))
}

/// How many AOs found the ring full since the last call.
pub fn lost_aos() -> u32 {
    AO_LOST.swap(0, Ordering::Relaxed)
}

fn begin() -> MutexGuard<'static, ()> {
    let guard = TOUCHING.lock().unwrap_or_else(PoisonError::into_inner);
    TOUCHED.take();
    guard
}

fn end<T>(value: T) -> Result<T, Fault> {
    TOUCHED.take().map_or(Ok(value), Err)
}

/// Loads one word.
///
/// # Safety
/// `addr..addr + 8` must be mapped readable; it may be poisoned.
///
/// # Errors
/// The SIGBUS that the load raised.
pub unsafe fn read(addr: usize) -> Result<u64, Fault> {
    let _one = begin();
    // SAFETY: the caller's promise; a SIGBUS comes back by agent_touch_recover.
    end(unsafe { agent_touch_read(addr) })
}

/// Stores one word.
///
/// # Safety
/// `addr..addr + 8` must be mapped writable and nothing that Rust refers to; it may be poisoned.
///
/// # Errors
/// The SIGBUS that the store raised.
pub unsafe fn write(addr: usize, value: u64) -> Result<(), Fault> {
    let _one = begin();
    // SAFETY: as for `read`.
    unsafe { agent_touch_write(addr, value) };
    end(())
}

/// How often [`spin`] loads the word: some hundredths of a second.
const LOADS: u64 = 1 << 24;

/// Loads one word again and again for a moment.
///
/// # Safety
/// As for [`read`].
///
/// # Errors
/// The SIGBUS that one of the loads raised, or that came meanwhile.
pub unsafe fn spin(addr: usize) -> Result<(), Fault> {
    let _one = begin();
    // SAFETY: as for `read`; the count is not 0, so it comes to its end.
    unsafe { agent_touch_spin(addr, LOADS) };
    end(())
}

/// Copies `words` words upwards.
///
/// # Safety
/// Both ranges must be mapped, apart, and not in use elsewhere; either may be poisoned.
///
/// # Errors
/// The SIGBUS that the copy raised; part of it is done then.
pub unsafe fn copy(to: usize, from: usize, words: usize) -> Result<(), Fault> {
    let _one = begin();
    // SAFETY: as for `read`; `rep movsq` only changes registers a callee may change, and the
    // direction flag is clear at any call.
    unsafe { agent_touch_copy(to, from, words) };
    end(())
}

/// Has the kernel copy `bytes` bytes by write(2), and returns what that returned: a count, or a
/// negative errno.
///
/// # Safety
/// None beyond a descriptor that may be written: the kernel checks the range. Unsafe only
/// because it can raise SIGBUS where a SIGBUS handler is not installed.
///
/// # Errors
/// The SIGBUS that the call raised, on kernels that signal as well as fail.
pub unsafe fn kernel_copy(fd: i32, from: usize, bytes: usize) -> Result<isize, Fault> {
    // SAFETY: the caller's promise; write(2) changes no memory.
    unsafe { transfer(libc::SYS_write, fd, from, bytes, 0) }
}

/// Has the kernel transfer `bytes` bytes by pread64(2), pwrite64(2) or a call with the same or fewer
/// arguments, and returns what that returned: a count, or a negative errno.
///
/// # Safety
/// Where the call writes to the buffer, nothing in Rust may refer to it. Else as for [`kernel_copy`].
///
/// # Errors
/// The SIGBUS that the call raised, on kernels that signal as well as fail.
pub unsafe fn transfer(
    call: libc::c_long,
    fd: i32,
    buffer: usize,
    bytes: usize,
    offset: u64,
) -> Result<isize, Fault> {
    let call = i32::try_from(call).unwrap_or(-1); // which the kernel answers with ENOSYS
    let _one = begin();
    // SAFETY: the kernel validates all arguments; the caller's promise covers what it writes.
    end(unsafe { agent_touch_syscall(call, fd, buffer, bytes, offset) })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};

    /// Sends this thread a SIGBUS as a memory failure would look.
    pub fn forge(code: i32, addr: u64, lsb: i16) {
        let mut info = [0u8; 128];
        let bus = BusInfo { signo: libc::SIGBUS, errno: 0, code, pad: 0, addr, lsb };
        // SAFETY: BusInfo fits into the 128 bytes of a siginfo_t; all pointers are to locals.
        let result = unsafe {
            ptr::write_unaligned(info.as_mut_ptr().cast(), bus);
            libc::syscall(
                libc::SYS_rt_tgsigqueueinfo,
                libc::getpid(),
                libc::gettid(),
                libc::SIGBUS,
                info.as_ptr(),
            )
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    /// A mapping whose file was truncated: any access raises a real SIGBUS (BUS_ADRERR).
    fn hollow() -> usize {
        // SAFETY: a fresh descriptor and a fresh mapping, both given to this function alone.
        unsafe {
            let fd = libc::memfd_create(c"hollow".as_ptr(), 0);
            let file = File::from_raw_fd(fd);
            file.set_len(4096).unwrap();
            let va = libc::mmap(
                ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(va, libc::MAP_FAILED);
            va.cast::<u64>().write(7);
            file.set_len(0).unwrap();
            va.addr()
        }
    }

    #[test]
    fn touches_of_a_lost_page_are_recovered_again_and_again() {
        install(2).unwrap();
        let va = hollow();
        let mut buffer = [0u64; 512];
        for _ in 0..3 {
            // SAFETY: `va` is mapped for 4096 bytes and `buffer` is as large.
            unsafe {
                let expected =
                    |offset: usize| Err(Fault { code: 2, addr: (va + offset) as u64, lsb: 0 });
                assert_eq!(read(va).map(|_| ()), expected(0));
                assert_eq!(write(va + 8, 1), expected(8));
                assert_eq!(spin(va), expected(0));
                let to = buffer.as_mut_ptr().addr();
                assert_eq!(copy(to, va, 512), expected(0));
                let null = File::options().write(true).open("/dev/null").unwrap();
                // /dev/null copies nothing, so it cannot fail.
                assert_eq!(kernel_copy(null.as_raw_fd(), va, 8), Ok(8));
                let pipe = io::pipe().unwrap();
                let efault = -isize::try_from(libc::EFAULT).unwrap();
                assert_eq!(kernel_copy(pipe.1.as_raw_fd(), va, 4096), Ok(efault));
            }
        }
        let word = 42u64;
        // SAFETY: a local variable.
        assert_eq!(unsafe { read((&raw const word).addr()) }, Ok(42));
        // SAFETY: the same.
        assert_eq!(unsafe { spin((&raw const word).addr()) }, Ok(()));
    }
}
