//! Poisons pages in the ways that only the VMM itself can use, on request of the API.

use std::io;
use std::time::{Duration, Instant};

use mce_relay::{FailureKind, ForgeError, Handle};

use super::uffd::Uffd;
use crate::api::current::Running;
use crate::api::types::means::Means;
use crate::api::types::pages::{Gpa, Poison, Poisoning};
use crate::api::types::vm::MemoryBlock;
use crate::machine::lifecycle::Hold;
use crate::machine::lifecycle::reasons::Parked;
use crate::machine::memory::block::PAGE_SIZE;

/// How long the vCPUs may take to leave the guest.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the thread of a vCPU may take to come, and how often it is looked for.
const COMES: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(5);

/// Why no page was touched.
#[derive(Debug, thiserror::Error)]
pub enum InsideError {
    /// `mce-relay poison` does it, not the VMM.
    #[error(
        "{0} is not done by the VMM itself, but by `mce-relay poison`, which takes the host's page frame from it"
    )]
    Outside(Means),
    /// The address is not guest RAM.
    #[error("GPA {gpa:#x} is not guest RAM; this guest has {ram}")]
    NotRam {
        /// Its address.
        gpa: u64,
        /// Where there is RAM.
        ram: String,
    },
    /// There is no such vCPU.
    #[error("there is no vCPU {vcpu}; this guest has 0 to {last}")]
    NoVcpu {
        /// The vCPU that was asked for.
        vcpu: u8,
        /// The last there is.
        last: usize,
    },
    /// The kernel offers no such userfaultfd to this process.
    #[error(
        "this process cannot have a userfaultfd that poisons (Linux 6.6; a seccomp filter may forbid it)"
    )]
    Uffd(#[source] io::Error),
    /// The vCPUs did not stop, as they have to.
    #[error(
        "the vCPUs did not stop, which they have to while pages are marked; nothing was touched"
    )]
    NotParked,
    /// The guest has ended.
    #[error("the guest ended meanwhile; nothing was touched")]
    Ended,
}

/// The outcome for a page: whether it was bad before, where that was checked, and whether it was done.
type Done = (Option<bool>, Result<(), String>);

/// Poisons the pages that `asked` names, by its means; returns the outcome for each.
///
/// # Errors
/// See [`InsideError`]; no page was touched then.
pub fn poison(running: &Running, asked: &Poison) -> Result<Vec<Poisoning>, InsideError> {
    let info = running.info();
    for Gpa(gpa) in &asked.gpas {
        if info.block(*gpa).is_none() {
            return Err(InsideError::NotRam { gpa: *gpa, ram: info.ram_in_words() });
        }
    }
    let each = |poison: &dyn Fn(&Place) -> Done| {
        let pages = asked.gpas.iter().map(|gpa| {
            // Looked up above.
            let (was_bad, done) = match info.block(gpa.0) {
                Some(block) => poison(&Place::new(block, gpa.0)),
                None => (None, Err("not guest RAM".to_owned())),
            };
            Poisoning { gpa: *gpa, was_bad, error: done.err() }
        });
        pages.collect()
    };
    let is_bad = |place: &Place| {
        let gpa = place.gpa & !(PAGE_SIZE - 1);
        let known = running.relay.inspect(|l| l.get(gpa).is_some_and(|page| !page.is_forged()));
        known || place.is_bad()
    };
    match asked.via {
        Means::HwpoisonInject | Means::MceInject | Means::Einj => {
            Err(InsideError::Outside(asked.via))
        }
        Means::Signal => {
            let vcpu =
                (asked.kind == FailureKind::ActionRequired).then_some(usize::from(asked.vcpu));
            if let Some(vcpu) = vcpu.filter(|vcpu| *vcpu >= info.vcpus) {
                let last = info.vcpus - 1;
                return Err(InsideError::NoVcpu {
                    vcpu: u8::try_from(vcpu).unwrap_or(u8::MAX),
                    last,
                });
            }
            let until = Instant::now() + COMES;
            Ok(each(&|place| {
                let was_bad = Some(is_bad(place));
                (was_bad, forge(&running.relay, place.gpa, vcpu, until).map_err(|e| e.to_string()))
            }))
        }
        Means::Madvise => Ok(each(&|place| {
            let done = place.make_private().and_then(|()| {
                let done = running.relay.poisoning(|| advise(place.hva, libc::MADV_HWPOISON));
                done.and_then(|done| done).map_err(|error| refused("MADV_HWPOISON", &error))
            });
            (None, done)
        })),
        Means::SoftOffline => Ok(each(&|place| {
            let done = place.make_private().and_then(|()| {
                advise(place.hva, libc::MADV_SOFT_OFFLINE)
                    .map_err(|error| refused("MADV_SOFT_OFFLINE", &error))
            });
            (None, done)
        })),
        Means::Uffd => {
            let uffd = Uffd::open().map_err(InsideError::Uffd)?;
            let held = hold_vcpus(running)?;
            let done = each(&|place| {
                if is_bad(place) {
                    return (Some(true), Err("it is bad already; nothing was done".to_owned()));
                }
                let page = place.hva - place.hva % place.page_size;
                let done = uffd.poison(page, place.page_size);
                (Some(false), done.map_err(|error| format!("UFFDIO_POISON: {error}")))
            });
            drop(held);
            Ok(done)
        }
    }
}

/// Forges a failure. The API answers before the thread of each vCPU is there, which is waited for.
fn forge(relay: &Handle, gpa: u64, vcpu: Option<usize>, until: Instant) -> Result<(), ForgeError> {
    loop {
        match relay.forge(gpa, vcpu) {
            Err(ForgeError::NoVcpu { .. }) if Instant::now() < until => {
                std::thread::park_timeout(LOOK);
            }
            done => return done,
        }
    }
}

/// A page of guest RAM in this process.
struct Place {
    gpa: u64,
    hva: u64,
    /// In bytes.
    page_size: u64,
    /// It is a private mapping: what is written there is seen by no other process.
    is_private: bool,
}

impl Place {
    fn new(block: &MemoryBlock, gpa: u64) -> Self {
        let hva = block.hva + (gpa - block.gpa);
        Self { gpa, hva, page_size: block.page_size, is_private: !block.shared }
    }

    /// Whether the kernel says that it is bad. A page without memory gets some by the question.
    fn is_bad(&self) -> bool {
        advise(self.hva, libc::MADV_POPULATE_READ)
            .is_err_and(|error| error.raw_os_error() == Some(libc::EHWPOISON))
    }

    /// Gives this process a page of its own there. A page that it has only read may be the zero page of the whole host,
    /// a page shared by KSM, or the file's own. Populating it for writing makes it a copy, with the same contents.
    fn make_private(&self) -> Result<(), String> {
        if !self.is_private {
            return Ok(());
        }
        advise(self.hva, libc::MADV_POPULATE_WRITE).map_err(|error| match error.raw_os_error() {
            Some(libc::EHWPOISON) => "it is bad already; nothing was done".to_owned(),
            Some(libc::EINVAL) => format!(
                "madvise(MADV_POPULATE_WRITE): {error}; it takes Linux 5.14, without which nobody can tell \
                 whose page it is"
            ),
            _ => format!("madvise(MADV_POPULATE_WRITE): {error}; the page has no memory of its own"),
        })
    }
}

fn refused(what: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => format!(
            "madvise({what}) is refused to the VMM, which needs CAP_SYS_ADMIN for it: {error}; \
             start it as root, or use --via uffd or signal"
        ),
        Some(libc::EINVAL) => format!(
            "madvise({what}): {error}; this kernel has no memory failure handling (CONFIG_MEMORY_FAILURE)"
        ),
        _ => format!("madvise({what}): {error}"),
    }
}

/// madvise on the 4 KiB page that holds `hva`.
fn advise(hva: u64, advice: libc::c_int) -> io::Result<()> {
    let page = hva & !0xfff;
    let page = usize::try_from(page).map_err(io::Error::other)?;
    // SAFETY: the page is guest RAM, into which no reference exists; all its users expect that it may go bad.
    let result =
        unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(page), 4096, advice) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Holds the vCPUs until the returned value is dropped, and waits until they have left the guest.
fn hold_vcpus(running: &Running) -> Result<Hold, InsideError> {
    let hold = running.control.hold();
    match running.control.wait_parked(PAUSE_PATIENCE) {
        Parked::All => Ok(hold),
        Parked::Not(_) => Err(InsideError::NotParked),
        Parked::Unpaused => Err(InsideError::Ended),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use mce_relay::mca::{BANKS, Caps, Vendor, cap};
    use mce_relay::{ExitByte, RamMap, RamRegion, Relay};

    use super::*;

    const GPA: u64 = 0x10_0000;

    fn relay() -> Relay {
        let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P;
        let caps = Caps { vendor: Vendor::Intel, mcg_cap, succor: false };
        // SAFETY: nothing is mapped there, so no reference of Rust's leads there.
        let ram = unsafe { RamRegion::new(0x7f00_0000_0000, GPA, 0x10_0000) };
        let map = RamMap::new(&[ram]).unwrap();
        Relay::builder(map).vcpus(1).machine_checks(caps).start().unwrap()
    }

    #[test]
    fn a_touch_is_forged_when_the_thread_of_the_vcpu_has_come() {
        let relay = relay();
        let handle = relay.handle();
        let (begin, begun) = std::sync::mpsc::channel();
        let poisons = std::thread::spawn(move || {
            begin.send(()).unwrap();
            let until = Instant::now() + Duration::from_secs(60);
            (forge(&handle, GPA, Some(0), until), until)
        });
        begun.recv().unwrap();
        std::thread::sleep(4 * LOOK);
        let port = relay.attach(0, ExitByte::NONE, || {}).unwrap();
        let (forged, until) = poisons.join().unwrap();
        drop(port);
        assert_eq!(forged, Ok(()));
        assert!(Instant::now() < until);
    }

    #[test]
    fn a_touch_by_a_vcpu_whose_thread_does_not_come_is_refused_in_the_end() {
        let relay = relay();
        let since = Instant::now();
        let forged = forge(&relay.handle(), GPA, Some(0), since + 10 * LOOK);
        assert!(matches!(forged, Err(ForgeError::NoVcpu { .. })), "{forged:?}");
        assert!(since.elapsed() >= 10 * LOOK);
    }
}
