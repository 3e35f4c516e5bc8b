//! How bad pages without a signal are found, and what the host shows of its page frames.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::{io, ptr};

use mce_relay::PAGE_SHIFT;
use mce_relay::internals::scan::{FailureCounter, Method, Scanner};
use mce_relay_vmm::host::pagemap;

use super::gap::{Found, Gap, to_see};
use super::section::{Section, Standing};

const PAGEMAP: &str = "/proc/self/pagemap";
const PAGE_LEN: usize = 1 << PAGE_SHIFT;

pub(super) fn look(section: &mut Section<'_>) {
    use Standing::Missing;

    section.add(
        "poison without a signal",
        without_signal(),
        Missing,
        "use Linux 5.14 or newer with CONFIG_MEMORY_FAILURE and CONFIG_PROC_PAGE_MONITOR",
    );
    section.add(
        "MADV_POPULATE_READ",
        populate_read(),
        Missing,
        "use Linux 5.14 or newer; without it poison cannot be told from swap",
    );
    section.add(
        "PAGEMAP_SCAN",
        pagemap_scan(),
        Missing,
        "use Linux 6.7 or newer; without it scans are slower and pass over hugetlb pages",
    );
    section.add(
        "failure counter",
        failure_counter(),
        Missing,
        "use a host kernel with CONFIG_MEMORY_FAILURE (per node: Linux 6.3)",
    );
    section.add("page frame numbers", frame_numbers(), Missing, to_see());
    let no_monitor = "use a host kernel with CONFIG_PROC_PAGE_MONITOR";
    section.add("kpageflags", per_frame("/proc/kpageflags"), Missing, no_monitor);
    section.add("kpagecount", per_frame("/proc/kpagecount"), Missing, no_monitor);
}

fn without_signal() -> Found {
    let scanner = Scanner::new().map_err(|error| Gap::of(PAGEMAP, &error))?;
    let method = scanner.method();
    match FailureCounter::new() {
        Some(_) => Ok(format!("found by {method}, whenever failures are counted")),
        None => Err(Gap::Missing(format!(
            "found by {method}, but there is no count of failures to notice it by"
        ))),
    }
}

fn populate_read() -> Found {
    let on_stack = 0u8;
    let page = (&raw const on_stack).addr() & !(PAGE_LEN - 1);
    // SAFETY: the page is this thread's own stack, is in memory already and keeps its contents: the
    // kernel only looks.
    let result = unsafe {
        libc::madvise(ptr::without_provenance_mut(page), PAGE_LEN, libc::MADV_POPULATE_READ)
    };
    if result == 0 {
        Ok("tells poison from everything else".to_owned())
    } else {
        Err(Gap::Missing(io::Error::last_os_error().to_string()))
    }
}

fn pagemap_scan() -> Found {
    match Scanner::with_method(Method::PagemapScan) {
        Ok(_) => Ok("there".to_owned()),
        Err(error) => Err(Gap::of(PAGEMAP, &error)),
    }
}

fn failure_counter() -> Found {
    match FailureCounter::new() {
        Some(counter) => Ok(counter.source().to_owned()),
        None => Err(Gap::Missing("the kernel does not count memory failures".to_owned())),
    }
}

fn frame_numbers() -> Found {
    let on_stack = 0u8;
    match pagemap::pfn(std::process::id(), (&raw const on_stack).addr() as u64) {
        Ok(_) => Ok("shown to this user".to_owned()),
        Err(error) => Err(Gap::of(PAGEMAP, &error)),
    }
}

/// Whether the entry of the first page frame can be read from a file with an entry for each frame.
fn per_frame(path: &str) -> Found {
    match File::open(path).and_then(|file| file.read_exact_at(&mut [0; 8], 0)) {
        Ok(()) => Ok("readable".to_owned()),
        Err(error) => Err(Gap::io(path, &error)),
    }
}
