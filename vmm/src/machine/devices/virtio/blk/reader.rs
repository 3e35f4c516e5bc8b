//! Reads a file into guest memory by two threads, several reads at a time: the kernel's copy of one of them is what a long
//! read takes, when the file is in the page cache.
//!
//! Reads are cut into pieces, and whichever thread is free takes the next piece. So where the second one gets no processor,
//! the first does what the second has not begun with, and none waits for the other between two reads. Both are at rest when
//! a turn of the device is over, and so when the device stops or the VM is paused.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::machine::devices::virtio::panics;
use crate::sandbox::role::Role;
use crate::sandbox::seccomp::Filters;

/// Bytes of a piece, at least. A shorter read is not worth another thread.
pub(super) const PIECE: usize = 128 << 10;
/// As many as preadv(2) takes.
const IOV_MAX: usize = 1024;

/// Where bytes go: addresses of guest memory in this process.
#[derive(Debug)]
struct Piece {
    /// The number of the read that it is a part of.
    read: u64,
    file: RawFd,
    at: u64,
    places: Vec<libc::iovec>,
}

// SAFETY: the addresses are the kernel's to write to, on any thread.
unsafe impl Send for Piece {}

/// A read that has been begun.
#[derive(Debug, Default)]
struct Progress {
    /// Pieces that are not done.
    left: usize,
    error: Option<io::Error>,
}

#[derive(Debug, Default)]
struct State {
    /// Those that nobody has begun with, the oldest first.
    pieces: VecDeque<Piece>,
    /// In the order in which they were begun.
    reads: VecDeque<Progress>,
    /// The number of the first of `reads`.
    first: u64,
    /// The second thread has a piece.
    busy: bool,
    end: bool,
}

impl State {
    /// A piece of `read` has been done.
    fn note(&mut self, read: u64, done: io::Result<()>) {
        // It is gone if the turn was given up meanwhile.
        let Some(at) = read.checked_sub(self.first).and_then(|at| usize::try_from(at).ok()) else {
            return;
        };
        let Some(progress) = self.reads.get_mut(at) else { return };
        progress.left -= 1;
        let Err(error) = done else { return };
        let before = self.pieces.len();
        self.pieces.retain(|piece| piece.read != read);
        progress.left -= before - self.pieces.len();
        // A bad page is looked for, whatever else was wrong.
        if progress.error.is_none() || error.raw_os_error() == Some(libc::EFAULT) {
            progress.error = Some(error);
        }
    }
}

#[derive(Debug, Default)]
struct Desk {
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn second(&self) {
        panics::be_brief();
        let mut state = self.state();
        loop {
            let rests = |state: &mut State| state.pieces.is_empty() && !state.end;
            state = self.work.wait_while(state, rests).unwrap_or_else(PoisonError::into_inner);
            if state.end {
                return;
            }
            let Some(piece) = state.pieces.pop_front() else { continue };
            state.busy = true;
            drop(state);
            let read = piece.read;
            let done = catch_unwind(AssertUnwindSafe(|| read_all(piece)));
            let done = done.unwrap_or_else(|_| Err(io::Error::other("the second thread panicked")));
            state = self.state();
            state.busy = false;
            state.note(read, done);
            self.done.notify_one();
        }
    }
}

/// What reads. Without a second thread all is done by the one that calls.
#[derive(Debug, Default)]
pub(super) struct Reader {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    /// One with a second thread, under the filter of the device's.
    pub(super) fn of_two(filters: &Filters) -> io::Result<Self> {
        let desk = Arc::<Desk>::default();
        let seconds = Arc::clone(&desk);
        let body = move || seconds.second();
        let thread = filters.spawn(Role::VirtioBlk, "virtio-blk-read".into(), body)?;
        Ok(Self { desk, thread: Some(thread) })
    }

    /// Begins to read from `at` on until all of `places` is full, which are guest memory. Before `file` or the memory goes,
    /// all that was begun has to be at rest: see [`Self::until_rest`].
    pub(super) fn begin(&mut self, file: &File, at: u64, places: &[libc::iovec]) {
        let mut state = self.desk.state();
        let read = state.first + state.reads.len() as u64;
        let before = state.pieces.len();
        state.pieces.extend(pieces(read, file.as_raw_fd(), at, places));
        let left = state.pieces.len() - before;
        state.reads.push_back(Progress { left, error: None });
        // One piece alone is the caller's own.
        if self.thread.is_some() && state.pieces.len() > 1 {
            self.desk.work.notify_one();
        }
    }

    /// Reads until the oldest that was begun is done; `None` if there is none.
    ///
    /// # Errors
    /// The file's, EFAULT where a page is bad; some may have been read.
    pub(super) fn finish(&mut self) -> Option<io::Result<()>> {
        let mut state = self.desk.state();
        while state.reads.front()?.left > 0 {
            let Some(piece) = state.pieces.pop_front() else {
                // The second thread has the last one.
                state = self.desk.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let read = piece.read;
            let done = read_all(piece);
            state = self.desk.state();
            state.note(read, done);
        }
        let Progress { error, .. } = state.reads.pop_front()?;
        state.first += 1;
        Some(error.map_or(Ok(()), Err))
    }

    /// When this is dropped nobody reads any more, and what was begun and not finished is forgotten.
    pub(super) fn until_rest(&self) -> UntilRest {
        UntilRest(Arc::clone(&self.desk))
    }
}

/// See [`Reader::until_rest`].
pub(super) struct UntilRest(Arc<Desk>);

impl Drop for UntilRest {
    fn drop(&mut self) {
        let Self(desk) = self;
        let mut state = desk.state();
        state.pieces.clear();
        let waits = |state: &mut State| state.busy;
        state = desk.done.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
        state.first += state.reads.len() as u64;
        state.reads.clear();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.desk.state().end = true;
        self.desk.work.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the second thread of a virtio disk panicked");
        }
    }
}

/// Cuts a read into pieces, between two places.
fn pieces(read: u64, file: RawFd, mut at: u64, places: &[libc::iovec]) -> Vec<Piece> {
    let piece = |at| Piece { read, file, at, places: Vec::new() };
    let mut pieces = Vec::new();
    let (mut rest, mut len) = (piece(at), 0);
    for place in places {
        rest.places.push(*place);
        len += place.iov_len;
        if len >= PIECE {
            at += len as u64;
            pieces.push(std::mem::replace(&mut rest, piece(at)));
            len = 0;
        }
    }
    if len > 0 {
        pieces.push(rest);
    }
    pieces
}

/// Reads from `at` on until all of `places` is full, which are guest memory, on this thread.
///
/// # Errors
/// As of [`Reader::finish`].
pub(super) fn read_now(file: &File, at: u64, places: &[libc::iovec]) -> io::Result<()> {
    read_all(Piece { read: 0, file: file.as_raw_fd(), at, places: places.to_vec() })
}

/// Reads until all of the piece is full.
fn read_all(piece: Piece) -> io::Result<()> {
    let Piece { file, mut at, mut places, .. } = piece;
    let mut rest = places.as_mut_slice();
    while let [first, ..] = rest {
        if first.iov_len == 0 {
            rest = &mut rest[1..];
            continue;
        }
        let count = libc::c_int::try_from(rest.len().min(IOV_MAX)).unwrap_or(1);
        let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
        // SAFETY: the kernel writes to guest memory, as far as the places go, which no Rust reference leads to. It
        // is mapped as long as the device has it, and the file is open, until the turn is over (`UntilRest`).
        let read = unsafe { libc::preadv(file, rest.as_ptr(), count, offset) };
        let mut read = match usize::try_from(read) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        at += read as u64;
        while let [first, ..] = rest
            && read > 0
        {
            let some = first.iov_len.min(read);
            first.iov_base = first.iov_base.wrapping_byte_add(some);
            first.iov_len -= some;
            read -= some;
            if first.iov_len == 0 {
                rest = &mut rest[1..];
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;
    use crate::sandbox::seccomp::Mode;

    const LEN: usize = 3 << 20;

    fn file() -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..LEN).map(|at| at.to_le_bytes()[0]).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    /// Places of these lengths, one behind the other.
    fn places(bytes: &mut [u8], lens: &[usize]) -> Vec<libc::iovec> {
        let mut rest = bytes;
        let mut places = Vec::new();
        for len in lens {
            let (first, others) = rest.split_at_mut(*len);
            places.push(libc::iovec { iov_base: first.as_mut_ptr().cast(), iov_len: *len });
            rest = others;
        }
        places
    }

    fn readers() -> [Reader; 2] {
        [Reader::default(), Reader::of_two(&Filters::new(Mode::On).unwrap()).unwrap()]
    }

    #[test]
    fn all_comes_to_its_place() {
        let (file, bytes) = file();
        let lens: [&[usize]; 6] = [
            &[512],
            &[0, 4096, 0],
            &[4096; 512],
            &[PIECE - 1, 1, PIECE + 1, 3, 0],
            &[1 << 20, 1, 1 << 20],
            &[1000; 1500],
        ];
        for mut reader in readers() {
            for (round, lens) in (0..60).zip(lens.iter().cycle()) {
                let len: usize = lens.iter().sum();
                let mut into = vec![0xee; len + 1];
                let at = round * 777;
                reader.begin(&file, at as u64, &places(&mut into, lens));
                reader.finish().unwrap().unwrap();
                assert!(reader.finish().is_none());
                assert_eq!(into[..len], bytes[at..at + len]);
                assert_eq!(into[len], 0xee);
            }
        }
    }

    #[test]
    fn an_error_is_told_once_and_the_next_read_is_whole() {
        let (file, bytes) = file();
        for mut reader in readers() {
            for bad in 0..8 {
                let mut into = vec![0; 1 << 20];
                let mut places = places(&mut into, &[PIECE; 8]);
                places[bad].iov_base = std::ptr::without_provenance_mut(4096);
                let mut others = vec![0; 2 << 20];
                let (before, after) = others.split_at_mut(1 << 20);
                reader.begin(&file, 5, &self::places(before, &[PIECE; 8]));
                reader.begin(&file, 0, &places);
                reader.begin(&file, 9, &self::places(after, &[PIECE; 8]));
                reader.begin(&file, LEN as u64 - (1 << 19), &self::places(&mut into, &[PIECE; 8]));
                reader.finish().unwrap().unwrap();
                let error = reader.finish().unwrap().unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
                reader.finish().unwrap().unwrap();
                let error = reader.finish().unwrap().unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                assert!(reader.finish().is_none());
                assert_eq!(before, &bytes[5..5 + (1 << 20)]);
                assert_eq!(after, &bytes[9..9 + (1 << 20)]);
            }
        }
    }

    #[test]
    fn a_turn_that_is_given_up_leaves_nobody_reading_and_the_next_one_whole() {
        let (file, bytes) = file();
        for mut reader in readers() {
            for round in 0..50 {
                let mut into = vec![0; 3 << 20];
                let rest = reader.until_rest();
                for begun in into.chunks_mut(1 << 20).take(round % 4) {
                    reader.begin(&file, 0, &places(begun, &[PIECE; 8]));
                }
                if round % 3 == 0 {
                    let _ = reader.finish();
                }
                drop(rest);
                into.fill(0xee);
                let mut next = vec![0; 1 << 20];
                reader.begin(&file, 3, &places(&mut next, &[PIECE; 8]));
                reader.finish().unwrap().unwrap();
                assert!(reader.finish().is_none());
                assert_eq!(next, bytes[3..3 + (1 << 20)]);
                assert!(into.iter().all(|byte| *byte == 0xee));
            }
        }
    }
}
