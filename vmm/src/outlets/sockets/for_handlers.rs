//! The list of this process's sockets for signal handlers, which may take no lock and allocate nothing.

use std::ffi::{CString, c_char};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// More than a VM has: two serial ports and the API.
const MOST: usize = 8;

struct Place {
    /// A path that is never freed; null in a free place.
    path: AtomicPtr<c_char>,
    dev: AtomicU64,
    ino: AtomicU64,
}

static PLACES: [Place; MOST] = [const {
    Place { path: AtomicPtr::new(ptr::null_mut()), dev: AtomicU64::new(0), ino: AtomicU64::new(0) }
}; MOST];

/// A socket that is in the list until this is dropped.
#[derive(Debug)]
pub(super) struct Entry(*mut c_char);

// SAFETY: the pointer is compared, and never used.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

impl Entry {
    /// Adds the socket; `None` where there is no room: a handler then leaves it behind.
    pub(super) fn new(path: &Path, (dev, ino): (u64, u64)) -> Option<Self> {
        // Leaked, as a handler may be reading it at any time. A VMM has three of them.
        let text = CString::new(path.as_os_str().as_bytes()).ok()?.into_raw();
        // An inode other than 0 claims the place. The path is set last: until then handlers skip the place.
        let place = PLACES.iter().find(|place| {
            place.ino.compare_exchange(0, ino, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })?;
        place.dev.store(dev, Ordering::Release);
        place.path.store(text, Ordering::Release);
        Some(Self(text))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        for place in &PLACES {
            if place.path.load(Ordering::Acquire) == self.0 {
                place.path.store(ptr::null_mut(), Ordering::Release);
                place.dev.store(0, Ordering::Release);
                place.ino.store(0, Ordering::Release);
            }
        }
    }
}

/// Removes the sockets of this process, except where another socket is at the path by now. For the process's end; may
/// be called in a signal handler.
pub fn remove_all() {
    for place in &PLACES {
        let path = place.path.load(Ordering::Acquire).cast_const();
        if path.is_null() {
            continue;
        }
        let mut found = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: both calls are async-signal-safe; the path is never given back, and lstat that returns 0 has
        // filled `found`.
        unsafe {
            if libc::lstat(path, found.as_mut_ptr()) != 0 {
                continue;
            }
            let found = found.assume_init();
            let same = found.st_dev == place.dev.load(Ordering::Acquire)
                && found.st_ino == place.ino.load(Ordering::Acquire);
            if same {
                libc::unlink(path);
            }
        }
    }
}
