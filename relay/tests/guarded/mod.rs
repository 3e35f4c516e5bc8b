//! For tests: guarded guest memory of which pages go bad, relays for it, and threads that are held up in a system call.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mce_relay::guard::{Attempt, GuardedRegion};
use mce_relay::internals::uffd::Uffd;
use mce_relay::signal::{Handled, handle_in};
use mce_relay::{HugePage, MemoryOwner, RamMap, RamRegion, Relay, Rescue, RescueRefusal};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestRegionCollection, MmapRegion,
};

pub type Memory = GuestRegionCollection<GuardedRegion>;

pub const PAGE: u64 = 4096;
pub const GPA: u64 = 1 << 30;
pub const HUGE: u64 = 2 << 20;

/// One at a time: the table is the process's.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn marker() -> Uffd {
    Uffd::open().unwrap()
}

pub fn memfd(len: u64, flags: u32) -> File {
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), flags)) };
    file.set_len(len).unwrap();
    file
}

pub fn of_mapping(mapping: MmapRegion) -> Memory {
    let region = GuardedRegion::new(mapping, GuestAddress(GPA)).unwrap();
    Memory::from_regions(vec![region]).unwrap()
}

/// Guest memory at this address, in the place of what was there, of this file.
pub fn mapped_at(at: u64, file: File, len: u64) -> Memory {
    let (prot, size) = (libc::PROT_READ | libc::PROT_WRITE, len as usize);
    let builder = unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let got = libc::mmap(at as *mut _, size, prot, flags, file.as_raw_fd(), 0);
        assert_ne!(got, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        MmapRegionBuilder::new(size).with_raw_mmap_pointer(at as *mut u8)
    };
    let builder = builder.with_mmap_prot(prot).with_mmap_flags(libc::MAP_SHARED);
    let memory = of_mapping(builder.with_file_offset(FileOffset::new(file, 0)).build().unwrap());
    assert!(memory.iter().all(GuardedRegion::has_view));
    memory
}

/// Guest memory at `skew` bytes behind a multiple of 2 MiB, of this file.
pub fn of_file(file: File, len: u64, skew: u64) -> Memory {
    let room = unsafe {
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), (len + 3 * HUGE) as usize, 0, none, -1, 0)
    };
    assert_ne!(room, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    mapped_at((room as u64).next_multiple_of(HUGE) + skew, file, len)
}

/// Each page begins with its number and 100.
pub fn numbered(memory: Memory, pages: u64) -> Memory {
    for page in 0..pages {
        memory.write_obj(page + 100, at(page)).unwrap();
    }
    memory
}

/// Guest memory at `skew` bytes behind a multiple of 2 MiB, each page of which begins with its number and 100.
pub fn shared_at(pages: u64, skew: u64) -> Memory {
    numbered(of_file(memfd(pages * PAGE, 0), pages * PAGE, skew), pages)
}

pub fn at(page: u64) -> GuestAddress {
    GuestAddress(GPA + page * PAGE)
}

pub fn devices(memory: &Memory, page: u64) -> u64 {
    memory.get_slice(at(page), 1).unwrap().ptr_guard().as_ptr().expose_provenance() as u64
}

pub fn hva(memory: &Memory, page: u64) -> u64 {
    memory.get_host_address(at(page)).unwrap().expose_provenance() as u64
}

/// What the guest has there.
pub fn guests(memory: &Memory, page: u64) -> u64 {
    unsafe { (hva(memory, page) as *const u64).read_volatile() }
}

pub fn relay(memory: &Memory) -> Relay {
    let regions = unsafe { RamRegion::all_of(memory) }.unwrap();
    Relay::builder(RamMap::new(&regions).unwrap()).start().unwrap()
}

pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a device reads at the page, validated by the rules.
pub fn validated(memory: &Memory, page: u64) -> Result<u64, Option<GuestMemoryError>> {
    let attempt = Attempt::begin();
    let read = memory.read_obj::<u64>(at(page));
    if attempt.is_clean() { read.map_err(Some) } else { Err(None) }
}

/// As the kernel's signal for an access of this thread at `addr`.
pub fn signal(addr: u64, lsb: i16) -> Handled {
    #[repr(C)]
    struct Info {
        signo: i32,
        errno: i32,
        code: i32,
        addr: u64,
        lsb: i16,
        rest: [u8; 102],
    }
    let info = Info { signo: libc::SIGBUS, errno: 0, code: 4, addr, lsb, rest: [0; 102] };
    unsafe { handle_in(&*(&raw const info).cast::<libc::siginfo_t>(), std::ptr::null_mut()) }
}

/// A huge page at the region's beginning that the host has lost, of which 7 is gone: see `tests/rescue.rs`. Its file is
/// /proc/self/mem at another mapping, whose address is returned.
pub fn huge() -> (Memory, u64) {
    let memory = shared_at(512, 0);
    let marker = marker();
    let file = memory.find_region(at(0)).unwrap().file_offset().unwrap().file();
    let other = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), HUGE as usize, prot, libc::MAP_SHARED, file.as_raw_fd(), 0)
            as u64
    };
    marker.poison(other + 7 * PAGE, PAGE).unwrap();
    let view = devices(&memory, 0);
    marker.poison(view, HUGE).unwrap();
    marker.poison(hva(&memory, 0), HUGE).unwrap();
    (memory, other)
}

type InRelease = Box<dyn FnMut() + Send>;

struct Owner {
    file: File,
    offset: u64,
    release: InRelease,
}

impl MemoryOwner for Owner {
    fn release(&mut self, _: HugePage) -> Result<(BorrowedFd<'_>, u64), RescueRefusal> {
        (self.release)();
        Ok((self.file.as_fd(), self.offset))
    }
}

/// A relay that rescues what `huge` returns. Its thread calls `on_thread` at its start, and `release` in each rescue.
pub fn rescuer(
    memory: &Memory,
    other: u64,
    release: InRelease,
    on_thread: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Relay {
    let file = File::open("/proc/self/mem").unwrap();
    let region = unsafe { RamRegion::new(hva(memory, 0), GPA, HUGE) }.in_pages_of(21);
    let rescue = Rescue::new(Owner { file, offset: other, release });
    let relay = Relay::builder(RamMap::new(&[region]).unwrap()).rescue(rescue);
    relay.on_thread(on_thread).start().unwrap()
}

/// One whose rescue says that it has begun, and goes on when it is told to.
pub fn held_rescuer(memory: &Memory, other: u64) -> (Relay, Receiver<()>, Sender<()>) {
    let (entered, begun) = channel();
    let (go, leave) = channel();
    let release = Box::new(move || {
        let _ = entered.send(());
        let _ = leave.recv_timeout(Duration::from_secs(30));
    });
    (rescuer(memory, other, release, || Ok(())), begun, go)
}

// --- seccomp: another thread decides when a system call of the calling thread goes on ---

#[repr(C)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    data: [u64; 8],
}

#[repr(C)]
struct Answer {
    id: u64,
    val: i64,
    error: i32,
    flags: u32,
}

/// The calling thread's calls of `call` whose argument of this number, from 0 on, is `value` in its lower half wait for
/// whoever has what is returned.
pub fn hold_of_this_thread(call: i64, argument: u32, value: u32) -> OwnedFd {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        op(0x20, 0, 0, 0),
        op(0x15, 0, 3, call as u32),
        op(0x20, 0, 0, 16 + argument * 8),
        op(0x15, 0, 1, value),
        op(0x06, 0, 0, 0x7fc0_0000),
        op(0x06, 0, 0, 0x7fff_0000),
    ];
    let program = libc::sock_fprog { len: 6, filter: filter.as_mut_ptr() };
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let fd = libc::syscall(libc::SYS_seccomp, 1, 1 << 3, &raw const program);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// The calling thread's calls of mmap(2) for a scratch page wait for whoever has what is returned.
pub fn hold_scratch_of_this_thread() -> OwnedFd {
    const SCRATCH: i32 =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    hold_of_this_thread(libc::SYS_mmap, 3, SCRATCH as u32)
}

/// The next call that waits.
pub fn next(fd: &OwnedFd) -> io::Result<u64> {
    let mut got: Notification = unsafe { std::mem::zeroed() };
    let request = libc::_IOWR::<Notification>(u32::from(b'!'), 0);
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut got) } {
        0 => Ok(got.id),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets the call go on. It is an error if it does not wait any more.
pub fn go_on(fd: &OwnedFd, id: u64) -> io::Result<()> {
    let mut answer = Answer { id, val: 0, error: 0, flags: 1 };
    let request = libc::_IOWR::<Answer>(u32::from(b'!'), 1);
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut answer) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
