//! What a guest's console says of bad pages: a Linux that has been told of one writes a line when it is done with it. That
//! is how the relay learns that the guest can take the next one.

use std::collections::VecDeque;
use std::sync::Arc;

/// Is called with the guest-physical address of each page that the guest is done with.
pub type Finished = Arc<dyn Fn(u64) + Send + Sync>;

/// What Linux writes when it is done with a page: what stands before the number of its frame, in hexadecimal, and after
/// it (`mm/memory-failure.c`; Linux 6.1 to 7.1).
const FAILURE: &[u8] = b"Memory failure: 0x";
const DONE: [&[u8]; 2] = [b": recovery action for", b": already hardware poisoned"];
/// What stands before a record's address, in hexadecimal, where Linux writes its log of machine checks to the console
/// (`__print_mce`, `arch/x86/kernel/cpu/mce/core.c`), which it does if nothing else in the guest reads that log.
const RECORD: &[u8] = b"[Hardware Error]: TSC ";
const ADDRESS: &[u8] = b" ADDR ";
/// The most of a line that is looked at, in bytes: a time, and what is above.
const LONGEST: usize = 128;
/// Records that Linux's log of machine checks holds (6.1: 32). More pages than that cannot wait for their record.
const LOG: usize = 32;
const PAGE_SHIFT: u32 = 12;
const PAGE_MASK: u64 = (1 << PAGE_SHIFT) - 1;

/// What a line says of a page, by its guest-physical address.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// Linux is done with it.
    Done(u64),
    /// Its record has left the log of machine checks.
    Written(u64),
}

/// The output of one guest, by lines.
///
/// A guest told by firmware is done with a page long before the page's record has left the log, where writing to the
/// console is slow, and drops what does not fit. So once a record was seen, a page counts as finished when its record was
/// written, too.
#[derive(Debug, Default)]
pub struct Lines {
    line: Vec<u8>,
    /// The guest writes its log of machine checks to the console.
    writes_log: bool,
    /// Pages of which one of the two has been said, the oldest first.
    done: VecDeque<u64>,
    written: VecDeque<u64>,
}

impl Lines {
    /// Takes what the guest has put out next; calls `finished` for each page that it is finished with.
    pub fn take(&mut self, bytes: &[u8], finished: &dyn Fn(u64)) {
        for byte in bytes {
            // What draws over its line ends none, and the kernel's begins there.
            if matches!(*byte, b'\n' | b'\r') {
                match said(&self.line) {
                    Some(Said::Done(gpa)) => self.done(gpa, finished),
                    Some(Said::Written(gpa)) => self.written(gpa, finished),
                    None => {}
                }
                self.line.clear();
            } else if self.line.len() < LONGEST {
                self.line.push(*byte);
            }
        }
    }

    fn done(&mut self, gpa: u64, finished: &dyn Fn(u64)) {
        if !self.writes_log || take_out(&mut self.written, gpa) {
            finished(gpa);
            return;
        }
        // Some kernels say it twice of a page that is touched again.
        if self.done.contains(&gpa) {
            return;
        }
        self.done.push_back(gpa);
        if self.done.len() > LOG {
            // It writes them no more: something in the guest has begun to read the log.
            self.writes_log = false;
            self.done.drain(..).for_each(finished);
        }
    }

    fn written(&mut self, gpa: u64, finished: &dyn Fn(u64)) {
        self.writes_log = true;
        if take_out(&mut self.done, gpa) {
            finished(gpa);
            return;
        }
        self.written.push_back(gpa);
        if self.written.len() > LOG {
            self.written.pop_front();
        }
    }
}

/// Takes `gpa` out of `pages`; false if it is not there.
fn take_out(pages: &mut VecDeque<u64>, gpa: u64) -> bool {
    let at = pages.iter().position(|page| *page == gpa);
    at.is_some_and(|at| pages.remove(at).is_some())
}

/// What `line` says of a page.
fn said(line: &[u8]) -> Option<Said> {
    if let Some(rest) = after(line, FAILURE) {
        let (frame, rest) = number(rest)?;
        // A frame that no address has is of no page; the guest may print any number.
        let gpa = frame.checked_mul(1 << PAGE_SHIFT)?;
        return DONE.iter().any(|done| rest.starts_with(done)).then_some(Said::Done(gpa));
    }
    let (address, _) = number(after(after(line, RECORD)?, ADDRESS)?)?;
    Some(Said::Written(address & !PAGE_MASK))
}

/// What of `line` stands behind `words`.
fn after<'a>(line: &'a [u8], words: &[u8]) -> Option<&'a [u8]> {
    let at = line.windows(words.len()).position(|part| part == words)?;
    Some(&line[at + words.len()..])
}

/// The hexadecimal number with which `text` begins, and what stands behind it.
fn number(text: &[u8]) -> Option<(u64, &[u8])> {
    let end = text.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    Some((u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn pages(parts: &[&[u8]]) -> Vec<u64> {
        let found = RefCell::new(Vec::new());
        let mut lines = Lines::default();
        parts.iter().for_each(|part| lines.take(part, &|gpa| found.borrow_mut().push(gpa)));
        found.into_inner()
    }

    #[test]
    fn lines_of_linux_name_the_pages_that_are_done() {
        let text = b"[   12.345678] Memory failure: 0x2928: recovery action for dirty LRU page: Recovered\r\n\
            [   12.4] Memory failure: 0x45fc: Sending SIGBUS to agent:99 due to hardware memory corruption\r\n\
            Memory failure: 0x1ffff: already hardware poisoned\r\n";
        assert_eq!(pages(&[text]), [0x0292_8000, 0x1fff_f000]);
        // As a UART has it.
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(pages(&bytes), [0x0292_8000, 0x1fff_f000]);
    }

    #[test]
    fn a_line_that_is_drawn_over_hides_no_other() {
        let bar = "[ ***  ] A start job is running for Wait for Network to be Configured (12s / no limit)\r";
        assert_eq!(
            pages(&[&[bar.as_bytes(), bar.as_bytes(), &of(0x3081)].concat()]),
            [0x0308_1000]
        );
    }

    const LOGGED: &[u8] = b"[    9.231193] mce: [Hardware Error]: TSC 0 ADDR 3082000 MISC 8c \n";

    fn of(frame: u64) -> Vec<u8> {
        format!("Memory failure: {frame:#x}: recovery action for dirty LRU page: Recovered\n")
            .into()
    }

    #[test]
    fn a_page_is_finished_when_its_record_is_written_in_a_guest_that_does_so() {
        // Nothing is known of that before the first record.
        assert_eq!(pages(&[&of(0x3081)]), [0x0308_1000]);
        assert_eq!(pages(&[LOGGED]), [0; 0]);
        assert_eq!(pages(&[LOGGED, &of(0x3081)]), [0; 0]);
        assert_eq!(pages(&[LOGGED, &of(0x3082)]), [0x0308_2000]);
        let twice = [LOGGED, &of(0x3082), &of(0x3082), LOGGED].concat();
        assert_eq!(pages(&[&twice]), [0x0308_2000; 2]);
    }

    #[test]
    fn a_guest_that_writes_its_log_no_more_is_believed_without() {
        let lines: Vec<Vec<u8>> = (0..40).map(of).collect();
        let mut parts = vec![LOGGED];
        parts.extend(lines.iter().map(Vec::as_slice));
        assert_eq!(pages(&parts), (0..40).map(|frame| frame << 12).collect::<Vec<u64>>());
    }

    #[test]
    fn other_output_names_none_whatever_it_is() {
        for text in [
            "Memory failure: 0x: recovery action for\n",
            "Memory failure: 0x12345678901234567: recovery action for\n",
            "Memory failure: 0xfffffffffffffff: recovery action for\n",
            "Memory failure: 0x2928: recovery action for", // it does not end
            "Memory failure: 2928: recovery action for\n",
            "mce: [Hardware Error]: TSC 0 ADDR \n",
            "mce: [Hardware Error]: TSC 0 MISC 8c\n",
            "mce: [Hardware Error]: TSC 0 ADDR",
            "\n\n\r\n\0",
        ] {
            assert_eq!(pages(&[text.as_bytes()]), [0; 0], "{text:?}");
        }
        let long = [b'x'; 100_000];
        let mut lines = Lines::default();
        lines.take(&long, &|_| panic!());
        assert!(lines.line.len() <= LONGEST);
    }
}
