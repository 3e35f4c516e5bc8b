//! A host of the relay without KVM: a processor that takes everything, and memory failures that never
//! happened.

use std::io;
use std::ptr;

use libc::{c_int, c_void};
use mce_relay::Mca;
use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap};
use mce_relay::signal::BUS_MCEERR_AR;

/// Sends this thread an AR as the kernel would.
pub fn forge_ar(addr: usize) {
    forge(BUS_MCEERR_AR, addr);
}

/// Sends this thread a memory failure of this `si_code` as the kernel would.
pub fn forge(code: c_int, addr: usize) {
    #[repr(C)]
    struct Info {
        signo: c_int,
        errno: c_int,
        code: c_int,
        addr: *mut c_void,
        lsb: i16,
        rest: [u8; 100],
    }
    let addr = ptr::without_provenance_mut(addr);
    let mut info = Info { signo: libc::SIGBUS, errno: 0, code, addr, lsb: 12, rest: [0; 100] };
    // SAFETY: the kernel reads a siginfo, which is no longer than that.
    let done = unsafe {
        let (pid, tid) = (libc::getpid(), libc::gettid());
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, libc::SIGBUS, &raw mut info)
    };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// A processor that takes everything.
#[derive(Debug, Default)]
pub struct Ready(Vec<Record>);

impl Ready {
    /// What it has of a machine-check architecture.
    pub const CAPS: Caps =
        Caps { vendor: Vendor::Amd, mcg_cap: BANKS as u64 | cap::CTL_P, succor: true };
}

impl Mca for Ready {
    fn state(&mut self) -> io::Result<McaState> {
        let mut state = McaState::up();
        if let Some(record) = self.0.last() {
            state.banks[usize::from(record.bank)].status = record.status;
            state.mcg_status = record.mcg_status;
        }
        Ok(state)
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        self.0.push(*record);
        Ok(())
    }
}
