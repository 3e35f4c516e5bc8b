//! Reads long stretches of a file into guest memory by two threads: the kernel's copy of one of them is what such a read
//! takes, when the file is in the page cache.
//!
//! Whichever thread is free takes the next piece. So where the second one gets no processor, the first does what the second
//! has not begun with. Both are at rest when the read is over, and so when the device stops or the VM is paused.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::machine::devices::virtio::panics;
use crate::sandbox::role::Role;
use crate::sandbox::seccomp::Filters;

/// Bytes of a piece, at least.
const PIECE: usize = 128 << 10;
/// As many as preadv(2) takes.
const IOV_MAX: usize = 1024;

/// Where bytes go: addresses of guest memory in this process.
#[derive(Debug)]
struct Piece {
    at: u64,
    places: Vec<libc::iovec>,
}

// SAFETY: the addresses are the kernel's to write to, on any thread.
unsafe impl Send for Piece {}

#[derive(Debug, Default)]
struct State {
    file: RawFd,
    /// Those that nobody has begun with.
    pieces: Vec<Piece>,
    /// The second thread has one.
    busy: bool,
    error: Option<io::Error>,
    end: bool,
}

impl State {
    fn take(&mut self) -> Option<(RawFd, Piece)> {
        self.pieces.pop().map(|piece| (self.file, piece))
    }

    fn note(&mut self, done: io::Result<()>) {
        let Err(error) = done else { return };
        self.pieces.clear();
        // A bad page is looked for, whatever else was wrong.
        if self.error.is_none() || error.raw_os_error() == Some(libc::EFAULT) {
            self.error = Some(error);
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

    /// Returns when nobody reads, with what went wrong; nobody has the file or guest memory in use any more.
    fn at_rest(&self) -> Option<io::Error> {
        let mut state = self.state();
        state.pieces.clear();
        let waits = |state: &mut State| state.busy;
        state = self.done.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
        state.error.take()
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
            let Some((file, piece)) = state.take() else { continue };
            state.busy = true;
            drop(state);
            let done = catch_unwind(AssertUnwindSafe(|| read_all(file, piece)));
            let done = done.unwrap_or_else(|_| Err(io::Error::other("the second thread panicked")));
            state = self.state();
            state.busy = false;
            state.note(done);
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

    /// Reads from `at` on until all of `places` is full, which are guest memory.
    ///
    /// # Errors
    /// The file's, EFAULT where a page is bad; some may have been read.
    pub(super) fn read(&mut self, file: &File, at: u64, places: &[libc::iovec]) -> io::Result<()> {
        let mut pieces = pieces(at, places);
        if self.thread.is_none() || pieces.len() < 2 {
            return pieces.into_iter().try_for_each(|piece| read_all(file.as_raw_fd(), piece));
        }
        // The first one is taken first.
        pieces.reverse();
        let _reading = Reading(&self.desk);
        let mut state = self.desk.state();
        (state.file, state.pieces) = (file.as_raw_fd(), pieces);
        self.desk.work.notify_one();
        while let Some((file, piece)) = state.take() {
            drop(state);
            let done = read_all(file, piece);
            state = self.desk.state();
            state.note(done);
        }
        drop(state);
        self.desk.at_rest().map_or(Ok(()), Err)
    }
}

/// Also a read that ends by a panic leaves nobody at it.
struct Reading<'a>(&'a Desk);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let _ = self.0.at_rest();
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
fn pieces(mut at: u64, places: &[libc::iovec]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let (mut rest, mut len) = (Piece { at, places: Vec::new() }, 0);
    for place in places {
        rest.places.push(*place);
        len += place.iov_len;
        if len >= PIECE {
            at += len as u64;
            pieces.push(std::mem::replace(&mut rest, Piece { at, places: Vec::new() }));
            len = 0;
        }
    }
    if len > 0 {
        pieces.push(rest);
    }
    pieces
}

/// Reads until all of the piece is full.
fn read_all(file: RawFd, piece: Piece) -> io::Result<()> {
    let Piece { mut at, mut places } = piece;
    let mut rest = places.as_mut_slice();
    while let [first, ..] = rest {
        if first.iov_len == 0 {
            rest = &mut rest[1..];
            continue;
        }
        let count = libc::c_int::try_from(rest.len().min(IOV_MAX)).unwrap_or(1);
        let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
        // SAFETY: the kernel writes to guest memory, as far as the places go, which no Rust reference leads to; it is
        // mapped as long as the device has it. The file is open as long as `Reader::read` has not returned.
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
                reader.read(&file, at as u64, &places(&mut into, lens)).unwrap();
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
                let error = reader.read(&file, 0, &places).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
                let places = self::places(&mut into, &[PIECE; 8]);
                reader.read(&file, 9, &places).unwrap();
                assert_eq!(into, bytes[9..9 + (1 << 20)]);
                let error = reader.read(&file, LEN as u64 - (1 << 19), &places).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            }
        }
    }
}
