//! What only the VMM itself can do to its guest's pages, asked for through the API.

use std::io;
use std::time::Duration;

use mce_relay::mca::Kind;

use super::Means;
use super::uffd::Uffd;
use crate::api::{Gpa, Poison, Poisoning, Running};
use crate::control::{Hold, Parked};

/// How long the vCPUs may take to leave the guest.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// Why none of the pages was touched.
#[derive(Debug, thiserror::Error)]
pub enum InsideError {
    /// It is done from outside.
    #[error(
        "{0} is not done by the VMM itself, but by `mce-relay poison`, which takes the host's page frame from it"
    )]
    Outside(Means),
    /// A page that is not there.
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
        /// As asked for.
        vcpu: u8,
        /// The last there is.
        last: usize,
    },
    /// The kernel has no such thing for this process.
    #[error(
        "this process cannot have a userfaultfd that poisons (Linux 6.6; a seccomp filter may forbid it)"
    )]
    Uffd(#[source] io::Error),
    /// The guest runs on, and must not meanwhile.
    #[error(
        "the vCPUs did not stop, which they have to while pages are marked; nothing was touched"
    )]
    NotParked,
    /// There is no guest any more.
    #[error("the guest ended meanwhile; nothing was touched")]
    Ended,
}

/// Does to the pages what `asked` says; what became of each.
///
/// # Errors
/// See [`InsideError`]; no page has been touched then.
pub fn poison(running: &Running, asked: &Poison) -> Result<Vec<Poisoning>, InsideError> {
    let info = running.info();
    for Gpa(gpa) in &asked.gpas {
        if info.block(*gpa).is_none() {
            return Err(InsideError::NotRam { gpa: *gpa, ram: info.ram_in_words() });
        }
    }
    let one = |gpa: &Gpa, result: Result<(), String>| Poisoning { gpa: *gpa, error: result.err() };
    let each = |poison: &dyn Fn(u64, u64, u64) -> Result<(), String>| {
        let pages = asked.gpas.iter().map(|gpa| {
            // Looked up above.
            let block = info.block(gpa.0).ok_or_else(|| "not guest RAM".to_owned());
            let done = block.and_then(|block| {
                let hva = block.hva + (gpa.0 - block.gpa);
                poison(gpa.0, hva, block.page_size)
            });
            one(gpa, done)
        });
        pages.collect()
    };
    match asked.via {
        Means::HwpoisonInject | Means::MceInject => Err(InsideError::Outside(asked.via)),
        Means::Signal => {
            let vcpu = (asked.kind == Kind::ActionRequired).then_some(usize::from(asked.vcpu));
            if let Some(vcpu) = vcpu.filter(|vcpu| *vcpu >= info.vcpus) {
                let last = info.vcpus - 1;
                return Err(InsideError::NoVcpu {
                    vcpu: u8::try_from(vcpu).unwrap_or(u8::MAX),
                    last,
                });
            }
            Ok(each(&|gpa, _, _| running.relay.forge(gpa, vcpu).map_err(|e| e.to_string())))
        }
        Means::Madvise => Ok(each(&|_, hva, _| {
            let done = running.relay.poisoning(|| advise(hva, libc::MADV_HWPOISON));
            done.and_then(|done| done).map_err(|error| refused("MADV_HWPOISON", &error))
        })),
        Means::SoftOffline => Ok(each(&|_, hva, _| {
            advise(hva, libc::MADV_SOFT_OFFLINE)
                .map_err(|error| refused("MADV_SOFT_OFFLINE", &error))
        })),
        Means::Uffd => {
            let uffd = Uffd::open().map_err(InsideError::Uffd)?;
            let held = held(running)?;
            let done = each(&|_, hva, size| {
                let page = hva - hva % size;
                uffd.poison(page, size).map_err(|error| format!("UFFDIO_POISON: {error}"))
            });
            drop(held);
            Ok(done)
        }
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

/// madvise on the 4 KiB page at `hva`.
fn advise(hva: u64, advice: libc::c_int) -> io::Result<()> {
    let page = hva & !0xfff;
    let page = usize::try_from(page).map_err(io::Error::other)?;
    // SAFETY: the page is guest RAM, into which no reference exists; that it goes bad is what everybody
    // who uses it is made for.
    let result =
        unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(page), 4096, advice) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The vCPUs, held until the returned value goes and out of the guest.
fn held(running: &Running) -> Result<Hold, InsideError> {
    let hold = running.control.hold();
    match running.control.wait_parked(PAUSE_PATIENCE) {
        Parked::All => Ok(hold),
        Parked::Not(_) => Err(InsideError::NotParked),
        Parked::Unpaused => Err(InsideError::Ended),
    }
}
