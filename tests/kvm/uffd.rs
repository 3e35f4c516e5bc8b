//! A page that is really bad for this process, made by UFFDIO_POISON: no privileges, and no
//! CONFIG_MEMORY_FAILURE. The kernel raises the AR itself when the guest touches the page.

use std::io;
use std::ops::Range;

use mce_relay::internals::flush;
pub use mce_relay::internals::uffd::{UFFDIO_REGISTER_MODE_MISSING, Uffd};
use mce_relay::mca::record;
use mce_relay::{Event, FailureKind, Form, SignalledThread, State};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use crate::payload::{Did, Start, TARGET, handled};
use crate::relayed::{AR_MCG_STATUS, Relayed};

// include/uapi/linux/userfaultfd.h
const UFFDIO: u32 = 0xaa;
pub const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub const UFFDIO_REGISTER_MODE_WP: u64 = 2;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

vmm_sys_util::ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, UFFDIO, 0x06, WriteProtect);

/// Write-protects `range`, holes and all.
pub fn write_protect(uffd: &Uffd, range: Range<u64>) -> io::Result<()> {
    let len = range.end - range.start;
    let mode = UFFDIO_WRITEPROTECT_MODE_WP;
    let mut protect = WriteProtect { start: range.start, len, mode };
    // SAFETY: the ioctl reads one uffdio_writeprotect.
    match unsafe { ioctl_with_mut_ref(uffd, UFFDIO_WRITEPROTECT(), &mut protect) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether this kernel has UFFDIO_POISON (Linux 6.6).
pub fn available() -> Result<(), String> {
    Uffd::open().map(drop).map_err(|error| format!("needs UFFDIO_POISON (Linux 6.6): {error}"))
}

pub fn a_real_ar_from_guest_user_mode() {
    let mut relayed = Relayed::new(Start::LoadAsUser, true);
    let uffd = Uffd::open().unwrap();
    let hva = relayed.payload.ram.hva() + TARGET;
    uffd.poison(hva, 4096).unwrap();

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
