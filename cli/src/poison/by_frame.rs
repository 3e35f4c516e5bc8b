//! Poisons pages from outside the VMM: by page frame number, or through a mapping of this process's own.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::{io, ptr};

use libc::{c_int, c_void, siginfo_t};
use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::vm::VmInfo;
use mce_relay_vmm::host::flags::{self, FlagsFilter};
use vmm_sys_util::signal::register_signal_handler;

use super::asked::{Asked, Until, untried};
use super::error::PoisonError;
use super::look::Looked;
use super::order::{FilterChoice, Order};
use super::target::Target;
use crate::poison::host::einj;
use crate::poison::host::filter::{Filter, FilterInForce};
use crate::poison::host::host_mce_injector::X86Injector;
use crate::poison::host::hwpoison_inject::Injector;
use crate::poison::host::memcg::{self, Memcg, NoMemcg};

/// Size of an ordinary page in bytes.
const PAGE_SIZE: u64 = 4096;

/// One of the means, ready for use.
pub(super) enum Poisoner {
    Inject {
        injector: Injector,
        /// The previous filter is restored when this is dropped.
        filter: Option<FilterInForce>,
    },
    Mce(X86Injector),
    Einj(einj::Injector),
    /// For the process `pid`, with the files of its memory that have been opened.
    Madvise {
        pid: u32,
        advice: c_int,
        files: HashMap<i32, File>,
    },
}

/// The filter to put in force, with notes about it.
pub(super) fn filter(
    vm: &VmInfo,
    order: &Order<'_>,
    targets: &[Target],
) -> Result<(Option<Filter>, Vec<String>), PoisonError> {
    if order.via != Means::HwpoisonInject {
        return Ok((None, Vec::new()));
    }
    let mut notes = Vec::new();
    let filter = match &order.filter {
        FilterChoice::Nothing => {
            notes.push(
                "no memory cgroup keeps everybody else's pages from it (--filter-memcg none)"
                    .to_owned(),
            );
            None
        }
        FilterChoice::Given(filter) => Some(filter.clone()),
        FilterChoice::OwnCgroup(others) => match own_cgroup(vm, targets, others)? {
            Ok(own) => {
                notes.push(own.to_string());
                Some(own.filter(others))
            }
            Err(why) if order.force => {
                notes.push(format!(
                    "{why}, so nothing keeps everybody else's pages from it (--force)"
                ));
                Some(others.clone()).filter(|others| *others != Filter::default())
            }
            Err(why) if order.dry_run => {
                let error = PoisonError::Unprotected { why };
                notes.push(format!("it would be refused: {error}"));
                Some(others.clone()).filter(|others| *others != Filter::default())
            }
            Err(why) => return Err(PoisonError::Unprotected { why }),
        },
    };
    // The note on the VM's own cgroup is there already.
    let more = match &order.filter {
        FilterChoice::OwnCgroup(more) | FilterChoice::Given(more) => more.to_string(),
        FilterChoice::Nothing => String::new(),
    };
    if !more.is_empty() {
        notes.push(format!("only pages {more} can be hit"));
    }
    if let Some(left) = crate::poison::host::filter::left_over()? {
        notes.push(about_another(&left, filter.is_some()));
    }
    Ok((filter, notes))
}

/// A note on a filter that another program has set. `replaced`: ours replaces it while this command works.
fn about_another(left: &str, replaced: bool) -> String {
    let found = format!(
        "a filter that another program has set, or left when it was killed, is in force: {left}"
    );
    let mend = "echo 0 > /sys/kernel/debug/hwpoison/corrupt-filter-enable";
    match replaced {
        true => format!("{found}; it is put back afterwards ({mend} ends it)"),
        false => format!("{found} ({mend} ends it)"),
    }
}

/// The filter that is used if the user does not choose one.
#[derive(Debug, PartialEq, Eq)]
enum Own {
    Cgroup(Memcg),
    /// For pages that are charged to no cgroup.
    Hugetlb,
}

impl Own {
    /// The filter that protects other processes' pages when `targets` are poisoned, if the VM has the cgroup `group`.
    fn new(group: Memcg, targets: &[Target], others: &Filter) -> Result<Self, NoMemcg> {
        let is_huge = |target: &Target| target.page_size > PAGE_SIZE;
        match targets.iter().filter(|target| is_huge(target)).count() {
            0 => Ok(Self::Cgroup(group)),
            _ if group.has_hugetlb => Ok(Self::Cgroup(group)),
            // If the user gave a filter by flags, that one counts.
            huge if huge == targets.len() && others.flags.is_none() => Ok(Self::Hugetlb),
            _ => Err(NoMemcg::Mixed),
        }
    }

    fn filter(&self, others: &Filter) -> Filter {
        match self {
            Self::Cgroup(group) => Filter { memcg: Some(group.inode), ..others.clone() },
            Self::Hugetlb => {
                let flags = Some(FlagsFilter { mask: flags::HUGE, value: flags::HUGE });
                Filter { flags, ..others.clone() }
            }
        }
    }
}

impl std::fmt::Display for Own {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cgroup(Memcg { path, processes, .. }) => {
                let path = path.display();
                write!(f, "only pages of the VM's own memory cgroup can be hit ({path})")?;
                match processes {
                    0 | 1 => Ok(()),
                    processes => write!(f, ", which has {processes} processes in it"),
                }
            }
            Self::Hugetlb => f.write_str(
                "only huge pages of hugetlb can be hit, whoever's (this host charges them to no memory cgroup)",
            ),
        }
    }
}

/// The filter by the VM's memory cgroup, where the kernel has one.
fn own_cgroup(
    vm: &VmInfo,
    targets: &[Target],
    others: &Filter,
) -> Result<Result<Own, NoMemcg>, PoisonError> {
    // First it has to be known whether the module is there at all.
    Injector::open()?;
    if !crate::poison::host::filter::has_memcg() {
        return Ok(Err(NoMemcg::NoFilter));
    }
    Ok(memcg::of(vm.pid)?.and_then(|group| Own::new(group, targets, others)))
}

impl Poisoner {
    /// Prepares the means, for the VMM's process `pid`.
    pub(super) fn open(pid: u32, via: Means, filter: Option<Filter>) -> Result<Self, PoisonError> {
        let madvise = |advice| {
            register_signal_handler(libc::SIGBUS, ignore)
                .map_err(|error| PoisonError::Madvise(error.into()))?;
            Ok(Self::Madvise { pid, advice, files: HashMap::new() })
        };
        match via {
            Means::Madvise => madvise(libc::MADV_HWPOISON),
            Means::SoftOffline => madvise(libc::MADV_SOFT_OFFLINE),
            Means::MceInject => Ok(Self::Mce(X86Injector::open()?)),
            Means::Einj => Ok(Self::Einj(einj::Injector::open()?)),
            Means::HwpoisonInject | Means::Uffd | Means::Signal => {
                let injector = Injector::open()?;
                let filter = filter.map(|filter| filter.apply()).transpose()?;
                Ok(Self::Inject { injector, filter })
            }
        }
    }

    fn poison(&mut self, target: &Target, pfn: u64) -> Result<(), PoisonError> {
        match self {
            Self::Inject { injector, .. } => Ok(injector.corrupt(pfn)?),
            Self::Mce(injector) => Ok(injector.inject(pfn)?),
            Self::Einj(injector) => Ok(injector.inject(pfn)?),
            Self::Madvise { pid, advice, files } => {
                // Without a descriptor the VMM is asked to do it.
                let fd = target.fd.unwrap_or(-1);
                let file = match files.entry(fd) {
                    Entry::Occupied(file) => file.into_mut(),
                    Entry::Vacant(place) => {
                        let path = PathBuf::from(format!("/proc/{pid}/fd/{fd}"));
                        let file = File::options().read(true).write(true).open(&path);
                        place.insert(file.map_err(|source| PoisonError::Memory { path, source })?)
                    }
                };
                madvise(file, target.offset, target.page_size, *advice)
            }
        }
    }

    /// Restores what was changed; returns a note if that failed.
    pub(super) fn close(self) -> Option<String> {
        let Self::Inject { filter: Some(filter), .. } = self else { return None };
        let error = filter.restore().err()?;
        Some(format!(
            "the filter that was in force before is not: {}",
            mce_relay_vmm::words::with_causes(&error)
        ))
    }
}

/// Poisons all targets; returns the kernel's answer for each.
pub(super) fn poison(
    poisoner: &mut Poisoner,
    targets: &[Target],
    looked: &Looked,
    until: &Until<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Vec<Asked> {
    let mut each = |target: &Target| {
        // The host may have moved the page since it was looked up, and its old frame may belong to another process by
        // now. Looking it up again right before leaves only the time that poisoning one page takes.
        match looked.fit(target) {
            Ok(pfn) => Asked::new(Some(pfn), poisoner.poison(target, pfn)),
            Err(error) => Asked::new(None, Err(error)),
        }
    };
    one_by_one(targets, &mut each, until, progress)
}

fn one_by_one(
    targets: &[Target],
    each: &mut dyn FnMut(&Target) -> Asked,
    until: &Until<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Vec<Asked> {
    let mut asked = Vec::with_capacity(targets.len());
    progress(0, targets.len());
    for target in targets {
        let why = until.reached().or_else(|| {
            let done = each(target);
            match &done.result {
                Err(error) if until.is_behind(error) => return Some(PoisonError::Ended),
                _ => asked.push(done),
            }
            progress(asked.len(), targets.len());
            None
        });
        if let Some(why) = why {
            asked.extend(untried(&why, targets.len() - asked.len()));
            break;
        }
    }
    asked
}

/// The kernel treats the caller of MADV_HWPOISON as if it had touched the page, and sends it an AR whatever its policy.
/// This process does not use the page, so it ignores the signal.
extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Poisons the page at `offset` of the VM's memory through a mapping of our own, so that the VMM has the page mapped
/// without being the caller.
fn madvise(memory: &File, offset: u64, page_size: u64, advice: c_int) -> Result<(), PoisonError> {
    const LEN: usize = 4096;
    let map_error = |source| PoisonError::Map { offset, source };
    let odd = |error| map_error(io::Error::other(error));
    // A file of huge pages is mapped in whole huge pages.
    let inside = usize::try_from(offset % page_size).map_err(odd)?;
    let at = libc::off_t::try_from(offset - offset % page_size).map_err(odd)?;
    let all = usize::try_from(page_size).map_err(odd)?;
    // SAFETY: a new mapping at an address of the kernel's choice; the file outlives the call, and
    // nothing but madvise and munmap is done with it.
    let page = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(ptr::null_mut(), all, prot, libc::MAP_SHARED, memory.as_raw_fd(), at)
    };
    if page == libc::MAP_FAILED {
        return Err(map_error(io::Error::last_os_error()));
    }
    // SAFETY: `page` is the mapping made above, and nothing refers into it.
    let result = unsafe { libc::madvise(page.byte_add(inside), LEN, advice) };
    let error = io::Error::last_os_error();
    // SAFETY: as above; it is not used afterwards.
    unsafe { libc::munmap(page, all) };
    if result == 0 { Ok(()) } else { Err(PoisonError::Madvise(error)) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::client::life::Life;
    use crate::poison::frame::FrameError;
    use crate::poison::interrupted::Interrupted;
    use mce_relay_vmm::host::error::HostError;

    fn target(page_size: u64) -> Target {
        Target { gpa: 0, hva: 0, fd: None, offset: 0, page_size, is_private_file: false }
    }

    /// The memory goes with the VM: that is not said of each page as if it were the page's fault.
    #[test]
    fn an_end_is_the_end_for_all_pages() {
        let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let life = Life::of(Path::new("/nowhere/api"), process.id());
        let interrupted = Interrupted::new();
        let until = Until { life: &life, interrupted: &interrupted };
        let mut count = 0;
        let mut each = |_: &Target| {
            count += 1;
            if count == 2 {
                process.kill().unwrap();
                let absent = HostError::Absent { hva: 0x1000 };
                return Asked::new(None, Err(FrameError::from(absent).into()));
            }
            Asked::new(Some(1), Ok(()))
        };
        let targets: Vec<Target> = (0..5).map(|_| target(4096)).collect();
        let asked = one_by_one(&targets, &mut each, &until, &mut |_, _| ());
        process.wait().unwrap();
        assert_eq!((count, asked.len()), (2, 5), "none is tried any more");
        assert!(asked[0].result.is_ok());
        assert!(asked[1..].iter().all(|page| matches!(page.result, Err(PoisonError::Ended))));
    }

    #[test]
    fn a_filter_that_was_left_is_said_whatever_ours_is() {
        for replaced in [false, true] {
            let words = about_another("corrupt-filter-memcg = 0x1c", replaced);
            assert!(words.contains("memcg = 0x1c") && words.contains("echo 0 >"), "{words}");
            assert_eq!(words.contains("put back"), replaced, "{words}");
        }
    }

    #[test]
    fn what_keeps_others_pages_from_it() {
        let group = |has_hugetlb| Memcg {
            path: "/sys/fs/cgroup/vm".into(),
            inode: 77,
            processes: 1,
            has_hugetlb,
        };
        let (small, huge) = ([target(4096)], [target(2 << 20), target(2 << 20)]);
        let mixed = [target(4096), target(2 << 20)];
        let none = Filter::default();
        let flags = Filter { flags: Some("dirty=dirty".parse().unwrap()), ..Filter::default() };
        let own = |has_hugetlb, targets: &[Target], others| {
            Own::new(group(has_hugetlb), targets, others).map(|own| own.filter(others))
        };
        let by_cgroup = Filter { memcg: Some(77), ..Filter::default() };
        let by_flags = Filter { flags: Some("huge=huge".parse().unwrap()), ..Filter::default() };
        assert_eq!(own(false, &small, &none), Ok(by_cgroup.clone()));
        assert_eq!(own(false, &small, &flags), Ok(Filter { memcg: Some(77), ..flags.clone() }));
        assert_eq!(own(true, &huge, &none), Ok(by_cgroup.clone()));
        assert_eq!(own(true, &mixed, &none), Ok(by_cgroup));
        assert_eq!(own(false, &huge, &none), Ok(by_flags));
        assert_eq!(own(false, &huge, &flags), Err(NoMemcg::Mixed));
        assert_eq!(own(false, &mixed, &none), Err(NoMemcg::Mixed));
    }
}
