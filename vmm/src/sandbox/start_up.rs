//! Gives back what the start of the program has taken of memory, and a running VM does not need.

use std::io;
use std::ops::Range;

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
/// mapped by then. Code that somebody has written to since (a debugger's breakpoints, uprobes) stays as it is, and all of it
/// where that cannot be seen.
pub fn give_back() {
    allocator::give_back();
    let (start, end) = (&raw const __ehdr_start, &raw const etext);
    let smaps = match std::fs::read_to_string("/proc/self/smaps") {
        Ok(smaps) => smaps,
        Err(error) => {
            log::debug!("the code that is not used stays mapped: /proc/self/smaps: {error}");
            return;
        }
    };
    for mapping in as_in_the_file(&smaps, &(start.addr()..end.addr())) {
        let len = mapping.end - mapping.start;
        let at = start.cast_mut().wrapping_add(mapping.start - start.addr());
        // SAFETY: a mapping of the program's file, of which nobody has written to a byte and which cannot be written to, so
        // the kernel maps the same bytes again. It changes no mapping.
        let done = unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) };
        if done != 0 {
            log::debug!("the code that is not used stays mapped: {}", io::Error::last_os_error());
        }
    }
}

/// Of `smaps`, the mappings that are within `range` and have the bytes of a file, none of which is or can be changed.
fn as_in_the_file(smaps: &str, range: &Range<usize>) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut mapping = None;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("Anonymous:"), Some("0")) => found.extend(mapping.take()),
            // Address, rights, offset, device, inode and name.
            (Some(first), Some(rights)) if !first.ends_with(':') => {
                let address = |text| usize::from_str_radix(text, 16).ok();
                mapping = first
                    .split_once('-')
                    .and_then(|(start, end)| Some(address(start)?..address(end)?))
                    .filter(|it| it.start >= range.start && it.start < range.end)
                    .filter(|_| !rights.contains('w') && words.nth(3).is_some());
            }
            _ => {}
        }
    }
    found
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
        assert!(after < before, "{before} kB before, {after} kB after");
    }

    #[test]
    fn what_was_written_to_stays() {
        let smaps = "\
55d0a000-55d0b000 r--p 00000000 fe:00 12 /usr/bin/mce-relay
Rss:                   4 kB
Anonymous:             0 kB
55d0b000-55d0d000 r-xp 00001000 fe:00 12 /usr/bin/mce-relay
Rss:                   8 kB
Anonymous:             4 kB
55d0d000-55d0e000 rw-p 00003000 fe:00 12 /usr/bin/mce-relay
Anonymous:             0 kB
55d0e000-55d0f000 r-xp 00000000 00:00 0
Anonymous:             0 kB
55d0f000-55d10000 r--p 00000000 fe:00 12 /usr/bin/mce-relay
Anonymous:             0 kB
";
        let of = |end| as_in_the_file(smaps, &(0x55d0_a000..end));
        assert_eq!(of(0x55d0_f000), vec![0x55d0_a000_usize..0x55d0_b000]);
        assert_eq!(of(0x55d0_f001).len(), 2);
        assert!(as_in_the_file("", &(0..usize::MAX)).is_empty());
    }
}
