//! Makes a page of a running guest's RAM go bad, on the host, as software can.
//!
//! This side only poisons. What the VMM then catches, and what it tells its guest, is in the VM's
//! own account (`mce-relay status`, the event monitor).

use std::io;
use std::path::{Path, PathBuf};
use std::ptr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use libc::{c_int, c_void, siginfo_t};
use serde::Serialize;
use vmm_sys_util::signal::register_signal_handler;

use crate::api::VmInfo;
use crate::client::{self, ClientError};
use crate::host::{self, HostError};

const PAGE_SIZE: usize = 4096;
/// How long the kernel may take to mark the page.
const PATIENCE: Duration = Duration::from_secs(5);

/// By what the host is asked to poison the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Means {
    /// The hwpoison-inject module, by page frame number: the VMM gets an AO.
    HwpoisonInject,
    /// madvise(MADV_HWPOISON) on a second mapping of the page: the VMM gets an AO.
    Madvise,
}

/// What was done.
#[derive(Debug, Serialize)]
pub struct Poisoned {
    /// Guest-physical address of the page.
    pub gpa: String,
    /// Host virtual address of the page in the VMM.
    pub hva: String,
    /// The host's page frame number.
    pub pfn: String,
    /// By what it was poisoned.
    pub via: Means,
}

impl std::fmt::Display for Poisoned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let via = self.via.to_possible_value();
        let via = via.as_ref().map_or("", |value| value.get_name());
        let Self { gpa, hva, pfn, .. } = self;
        write!(f, "poisoned: GPA {gpa} = HVA {hva} of the VMM = host pfn {pfn}, via {via}")
    }
}

/// Why a page was not poisoned.
#[derive(Debug, thiserror::Error)]
pub enum PoisonError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The host cannot be asked or told.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The kernel cannot poison memory.
    #[error(
        "this host's kernel has no memory failure handling (CONFIG_MEMORY_FAILURE: {path} is missing); \
         boot one that has it, or use the lab (make lab)",
        path = host::EARLY_KILL_SYSCTL
    )]
    NoMemoryFailure,
    /// The address is not RAM of that guest.
    #[error("GPA {gpa:#x} is not guest RAM; this guest has {ram}")]
    OutsideRam {
        /// The address asked for.
        gpa: u64,
        /// Where there is RAM.
        ram: String,
    },
    /// The VMM's memory cannot be opened.
    #[error("cannot open the VM's memory {path}; run it as root", path = .path.display())]
    Memory {
        /// The path in /proc.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The page cannot be mapped here.
    #[error("cannot map the page at offset {offset:#x} of the VM's memory")]
    Map {
        /// Offset in the VM's memory file.
        offset: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// madvise was refused.
    #[error("madvise(MADV_HWPOISON) was refused; it needs root (CAP_SYS_ADMIN)")]
    Madvise(#[source] io::Error),
    /// The kernel took the request and did nothing.
    #[error(
        "the kernel took the request, but page frame {pfn:#x} is not marked as poisoned; \
         a hwpoison filter may hold it back (/sys/kernel/debug/hwpoison/corrupt-filter-*), and its log says more"
    )]
    NotDone {
        /// The page frame.
        pfn: u64,
    },
}

/// Poisons the page that holds `gpa` in the VM behind `socket`, and sees that it is done.
///
/// # Errors
/// See [`PoisonError`]; the page is unharmed then.
pub fn poison(socket: &Path, gpa: u64, via: Means) -> Result<Poisoned, PoisonError> {
    let vm: VmInfo = client::get(socket, "vm.info")?;
    let gpa = gpa & !(PAGE_SIZE as u64 - 1);
    let Some(block) = vm.block(gpa) else {
        let ram: Vec<String> = vm
            .memory
            .iter()
            .map(|block| format!("{:#x} to {:#x}", block.gpa, block.gpa + block.len - 1))
            .collect();
        return Err(PoisonError::OutsideRam { gpa, ram: ram.join(", ") });
    };
    if !Path::new(host::EARLY_KILL_SYSCTL).exists() {
        return Err(PoisonError::NoMemoryFailure);
    }
    let hva = block.hva + (gpa - block.gpa);
    let pfn = host::pfn(vm.pid, hva)?;
    match via {
        Means::HwpoisonInject => host::corrupt(pfn)?,
        Means::Madvise => madvise(&vm, block.fd_offset + (gpa - block.gpa))?,
    }
    let since = Instant::now();
    while !host::is_poisoned(pfn)? {
        if since.elapsed() > PATIENCE {
            return Err(PoisonError::NotDone { pfn });
        }
        sleep(Duration::from_millis(10));
    }
    let hex = |value: u64| format!("{value:#x}");
    Ok(Poisoned { gpa: hex(gpa), hva: hex(hva), pfn: hex(pfn), via })
}

/// The kernel takes the caller of MADV_HWPOISON for one who touched the page, and sends it an AR,
/// whatever its policy. The page is of no use to this process, so there is nothing to do about it.
extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Poisons the page at `offset` of the VM's memory through a mapping of our own, so that the VMM is
/// one of those who have it mapped and not the one who asked.
fn madvise(vm: &VmInfo, offset: u64) -> Result<(), PoisonError> {
    let path = PathBuf::from(format!("/proc/{}/fd/{}", vm.pid, vm.memory_fd));
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|source| PoisonError::Memory { path, source })?;
    register_signal_handler(libc::SIGBUS, ignore)
        .map_err(|error| PoisonError::Madvise(error.into()))?;
    let map_error = |source| PoisonError::Map { offset, source };
    let at = libc::off_t::try_from(offset).map_err(|error| map_error(io::Error::other(error)))?;
    // SAFETY: a new mapping at an address of the kernel's choice; the file outlives the call, and
    // nothing but madvise and munmap is done with it.
    let page = unsafe {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(ptr::null_mut(), PAGE_SIZE, prot, libc::MAP_SHARED, fd, at)
    };
    if page == libc::MAP_FAILED {
        return Err(map_error(io::Error::last_os_error()));
    }
    // SAFETY: `page` is the mapping made above, and nothing refers into it.
    let result = unsafe { libc::madvise(page, PAGE_SIZE, libc::MADV_HWPOISON) };
    let error = io::Error::last_os_error();
    // SAFETY: as above; it is not used afterwards.
    unsafe { libc::munmap(page, PAGE_SIZE) };
    if result == 0 { Ok(()) } else { Err(PoisonError::Madvise(error)) }
}
