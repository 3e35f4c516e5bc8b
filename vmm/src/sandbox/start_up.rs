//! Gives back what the start of the program has taken of memory, and a running VM does not need.

use std::io;

use super::allocator;

unsafe extern "C" {
    /// The first byte of the program's file as it is mapped; the linker defines it.
    static __ehdr_start: u8;
    /// The byte behind the program's code; the linker defines it.
    static etext: u8;
}

/// Takes the program's code and constants out of this process's page tables, and gives back free memory of the heap.
/// Call it when the command line has been read and the VM is not there yet.
///
/// What is used after that is mapped again when it is touched, from the host's page cache, where it has been all the
/// time. So what read the command line is no part of the process any more, and what the VM uses until its guest runs is
/// mapped by then. Under a debugger only the heap's memory is given back.
pub fn give_back() {
    allocator::give_back();
    if is_traced() {
        return;
    }
    let (start, end) = (&raw const __ehdr_start, &raw const etext);
    // SAFETY: it asks for a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let Some(page) = usize::try_from(page).ok().filter(|page| page.is_power_of_two()) else {
        return;
    };
    // The page of the last byte may have something else behind it.
    let len = end.addr().saturating_sub(start.addr()) & !(page - 1);
    // SAFETY: these are mappings of the program's file that nobody writes to (what the start relocates and all
    // variables are behind them), so the kernel maps the same bytes again. It changes no mapping.
    let done = unsafe { libc::madvise(start.cast_mut().cast(), len, libc::MADV_DONTNEED) };
    if done != 0 {
        log::debug!("the code that is not used stays mapped: {}", io::Error::last_os_error());
    }
}

/// Whether a debugger is at work: it writes its breakpoints into the code, and they would be lost.
fn is_traced() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"))
        .is_some_and(|pid| pid.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident memory of the mappings of this program's file that cannot be written to, in kB.
    fn mapped() -> u64 {
        let program = std::env::current_exe().unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut sum, mut ours) = (0, false);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("Rss:"), Some(kb)) if ours => sum += kb.parse::<u64>().unwrap(),
                (Some(first), Some(rights)) if !first.ends_with(':') => {
                    ours = line.ends_with(&*program.to_string_lossy()) && !rights.contains('w');
                }
                _ => {}
            }
        }
        sum
    }

    #[test]
    fn what_is_not_used_again_is_gone_and_the_rest_is_as_it_was() {
        static WORDS: [&str; 3] = ["code", "constants", "heap"];
        let (start, end) = (&raw const __ehdr_start, &raw const etext);
        for at in (start.addr()..end.addr()).step_by(1024) {
            // SAFETY: the program's file is mapped there, to be read; where it is not this test ends here.
            let _ = unsafe { std::ptr::with_exposed_provenance::<u8>(at).read_volatile() };
        }
        let kept: Vec<String> = WORDS.iter().map(|word| word.to_uppercase()).collect();
        let before = mapped();
        give_back();
        let after = mapped();
        assert_eq!(kept, ["CODE", "CONSTANTS", "HEAP"]);
        assert_eq!(WORDS.concat(), "codeconstantsheap");
        if is_traced() {
            println!("skipped: a debugger keeps the code mapped");
        } else {
            assert!(after < before, "{before} kB before, {after} kB after");
        }
    }
}
