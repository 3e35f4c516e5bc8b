//! Records the end of a VMM from a signal handler: only what is allowed there.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicUsize, Ordering};

/// Descriptor of the file for the end; open as long as the process, or -1.
static FILE: AtomicI32 = AtomicI32::new(-1);
/// Text for stderr, kept as long as the process.
static WORDS: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());
static WORDS_LEN: AtomicUsize = AtomicUsize::new(0);

/// Prepares for an end in a handler: it is recorded in `file`, and `words` go to stderr.
pub(super) fn prepare(file: RawFd, words: &'static mut [u8]) {
    WORDS_LEN.store(words.len(), Ordering::Release);
    WORDS.store(words.as_mut_ptr(), Ordering::Release);
    FILE.store(file, Ordering::Release);
}

/// The file, if there is one.
pub(super) fn file() -> Option<ManuallyDrop<File>> {
    let fd = FILE.load(Ordering::Acquire);
    // SAFETY: `prepare` was given a descriptor that stays open, and is not closed here either.
    (fd >= 0).then(|| ManuallyDrop::new(unsafe { File::from_raw_fd(fd) }))
}

/// Records that the VMM ends now with this status, and says where its record is. May be called in a signal handler.
pub fn note_end(status: u8) {
    let file = FILE.load(Ordering::Acquire);
    if file < 0 {
        return;
    }
    let mut line = Line { text: [0; 64], len: 0 };
    line.push(b"{\"status\":");
    line.number(u64::from(status));
    line.push(b",\"unix_time\":");
    // SAFETY: time is async-signal-safe, and a null pointer is allowed.
    line.number(unsafe { libc::time(ptr::null_mut()) }.unsigned_abs());
    line.push(b"}\n");
    let (words, len) = (WORDS.load(Ordering::Acquire), WORDS_LEN.load(Ordering::Acquire));
    // SAFETY: write is async-signal-safe; both buffers are valid for their length, the second as long as the
    // process.
    unsafe {
        libc::write(file, line.text.as_ptr().cast(), line.len);
        libc::write(libc::STDERR_FILENO, words.cast_const().cast(), len);
    }
}

/// Text built without allocation.
struct Line {
    text: [u8; 64],
    len: usize,
}

impl Line {
    /// Appends as much as fits.
    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(place) = self.text.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: u64) {
        let mut unit = 1;
        while number / unit >= 10 {
            unit *= 10;
        }
        while unit > 0 {
            self.push(&[b'0' + (number / unit % 10) as u8]);
            unit /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_whole() {
        for number in [0, 7, 10, 1_795_596_695, u64::MAX] {
            let mut line = Line { text: [0; 64], len: 0 };
            line.number(number);
            assert_eq!(line.text[..line.len], *number.to_string().as_bytes());
        }
    }
}
