//! The locks by which users of an image keep out of each other's way, as QEMU takes them (block/file-posix.c).
//!
//! A user takes a read lock of one byte for each thing that it does to the image, and of another for each thing that
//! nobody else may do meanwhile; then it looks whether somebody has the opposite. As all of these are read locks, they
//! say who does what, and nothing more: two that only read the image have it at the same time.
//!
//! They are locks of the open file (`F_OFD_SETLK`): they go when the process does, however it ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Where the bytes of what a user does begin (`RAW_LOCK_PERM_BASE`).
const DOES: libc::off_t = 100;
/// Where the bytes of what nobody else may do begin (`RAW_LOCK_SHARED_BASE`).
const FORBIDS: libc::off_t = 200;
// The bits of QEMU's permissions (include/block/block-common.h), of which the bytes have the numbers.
/// `BLK_PERM_CONSISTENT_READ`.
const READ: libc::off_t = 0;
/// `BLK_PERM_WRITE`.
const WRITE: libc::off_t = 1;
/// `BLK_PERM_RESIZE`.
const RESIZE: libc::off_t = 3;

/// What came of a lock.
#[derive(Debug)]
pub enum Locked {
    /// It is held as long as the file is open.
    Yes,
    /// Somebody else has what excludes it.
    InUse,
    /// The file system has no such locks.
    Impossible(io::Error),
}

/// Takes `file`, which is open for reading at least, for a user that reads it or also writes it. Nobody else may write
/// it in either case.
pub fn take(file: &File, readonly: bool) -> Locked {
    let does = if readonly { &[READ][..] } else { &[READ, WRITE, RESIZE] };
    let forbids = [WRITE, RESIZE];
    // All are taken before any is looked for: of two users at the same time one at least sees the other.
    let own = does.iter().map(|what| DOES + what).chain(forbids.map(|what| FORBIDS + what));
    for at in own {
        match read_lock(file, at) {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Locked::InUse;
            }
            Err(error) => return Locked::Impossible(error),
        }
    }
    let opposite = does.iter().map(|what| FORBIDS + what).chain(forbids.map(|what| DOES + what));
    for at in opposite {
        match is_held(file, at) {
            Ok(false) => {}
            Ok(true) => return Locked::InUse,
            Err(error) => return Locked::Impossible(error),
        }
    }
    Locked::Yes
}

fn one_byte(kind: libc::c_int, at: libc::off_t) -> libc::flock {
    // SAFETY: flock is plain data, of which all zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // The constants are 0 to 2.
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    (lock.l_start, lock.l_len) = (at, 1);
    lock
}

fn read_lock(file: &File, at: libc::off_t) -> io::Result<()> {
    let lock = one_byte(libc::F_RDLCK, at);
    // SAFETY: reads one flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether another open file has a lock of byte `at`.
fn is_held(file: &File, at: libc::off_t) -> io::Result<bool> {
    let mut lock = one_byte(libc::F_WRLCK, at);
    // SAFETY: reads and writes one flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } {
        0 => Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}
