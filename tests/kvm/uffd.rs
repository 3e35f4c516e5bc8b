//! A page that is really bad for this process, made by UFFDIO_POISON: no privileges, and no
//! CONFIG_MEMORY_FAILURE. The kernel raises the AR itself when the guest touches the page.

use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};

use mce_relay::internals::flush;
use mce_relay::mca::record;
use mce_relay::{Event, FailureKind, Form, SignalledThread, State};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use crate::payload::{Did, Start, TARGET, handled};
use crate::relayed::{AR_MCG_STATUS, Relayed};

// include/uapi/linux/userfaultfd.h
const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
pub const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub const UFFD_FEATURE_POISON: u64 = 1 << 14;
pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
pub const UFFDIO_REGISTER_MODE_WP: u64 = 2;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct PoisonPage {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

mod ioctls {
    use super::{Api, PoisonPage, Register, UFFDIO, WriteProtect};
    use vmm_sys_util::ioctl_iowr_nr;

    ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
    ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, UFFDIO, 0x06, WriteProtect);
    ioctl_iowr_nr!(UFFDIO_POISON, UFFDIO, 0x08, PoisonPage);
    ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
}
use ioctls::{UFFDIO_API, UFFDIO_POISON, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT};

pub struct Uffd(OwnedFd);

impl Uffd {
    pub fn open() -> io::Result<Self> {
        Self::with_features(UFFD_FEATURE_POISON)
    }

    pub fn with_features(features: u64) -> io::Result<Self> {
        // SAFETY: takes flags only.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel has just made, owned by nobody else.
        let uffd = Self(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) });
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the ioctl reads and writes one uffdio_api.
        check(unsafe { ioctl_with_mut_ref(&uffd.0, UFFDIO_API(), &mut api) })?;
        Ok(uffd)
    }

    /// Puts `range` into the care of this userfaultfd.
    pub fn register(&self, range: Range<u64>, mode: u64) -> io::Result<()> {
        let len = range.end - range.start;
        let mut register = Register { start: range.start, len, mode, ioctls: 0 };
        // SAFETY: the ioctl reads and writes one uffdio_register.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut register) })
    }

    /// Marks the empty page at `hva`, in a range that is registered, as bad.
    pub fn mark(&self, hva: u64) -> io::Result<()> {
        let mut poison = PoisonPage { start: hva, len: 4096, mode: 0, updated: 0 };
        // SAFETY: the ioctl reads and writes one uffdio_poison.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_POISON(), &mut poison) })
    }

    /// Write-protects `range`, holes and all.
    pub fn write_protect(&self, range: Range<u64>) -> io::Result<()> {
        let len = range.end - range.start;
        let mode = UFFDIO_WRITEPROTECT_MODE_WP;
        let mut protect = WriteProtect { start: range.start, len, mode };
        // SAFETY: the ioctl reads one uffdio_writeprotect.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_WRITEPROTECT(), &mut protect) })
    }

    /// Marks the page at `hva` as bad. What it held is gone.
    pub fn poison(&self, hva: u64) -> io::Result<()> {
        let page = std::ptr::with_exposed_provenance_mut(usize::try_from(hva).unwrap());
        // A page that nobody has touched yet would be missing for a guest that comes to it before the
        // mark is there.
        // SAFETY: populating changes no contents.
        check(unsafe { libc::madvise(page, 4096, libc::MADV_POPULATE_WRITE) })?;
        self.register(hva..hva + 4096, UFFDIO_REGISTER_MODE_MISSING)?;
        loop {
            // SAFETY: the page is guest RAM, into which no reference exists.
            check(unsafe { libc::madvise(page, 4096, libc::MADV_DONTNEED) })?;
            match self.mark(hva) {
                // A guest that runs has touched it in between.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                done => return done,
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether this kernel has UFFDIO_POISON (Linux 6.6).
pub fn available() -> Result<(), String> {
    Uffd::open().map(drop).map_err(|error| format!("needs UFFDIO_POISON (Linux 6.6): {error}"))
}

pub fn a_real_ar_from_guest_user_mode() {
    let mut relayed = Relayed::new(Start::LoadAsUser, true);
    let uffd = Uffd::open().unwrap();
    let hva = relayed.payload.ram.hva() + TARGET;
    uffd.poison(hva).unwrap();

    let expected = record(Form::AmdAr, TARGET, 8, false);
    assert_eq!(expected.mcg_status, AR_MCG_STATUS);
    let did = relayed.run_to(|did| matches!(did, Did::Handled { .. }));
    assert_eq!(did, handled(&expected));
    assert_eq!(relayed.run_to(|did| did == Did::UserDone), Did::UserDone, "the guest goes on");

    flush(&relayed.relay.handle());
    let caught: Vec<Event> = relayed.events.try_iter().collect();
    let by_kernel = Event::Caught {
        kind: FailureKind::ActionRequired,
        hva,
        lsb: 12,
        thread: SignalledThread::Vcpu(0),
        forged: false,
    };
    assert!(caught.contains(&by_kernel), "{caught:?}");
    let state = relayed.relay.pages()[0].state;
    assert!(matches!(state, State::Injected { .. } | State::Acknowledged { .. }), "{state:?}");
    // Until here: closing it would forget the mark.
    drop(uffd);
}
