//! Keeps small what the process holds of memory that it has freed.
//!
//! glibc gives each thread an arena of its own, and raises the size from which a block is given back at
//! once to that of the largest one freed so far. With one client that sends large requests, every thread
//! of the API keeps some megabytes for good; a VMM is one of hundreds on a host.

/// Blocks of this size and more are mapped on their own, and given back as soon as they are freed. Setting it also
/// keeps glibc from raising it by itself.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD: libc::c_int = 128 << 10;

/// Free memory at the end of the heap above this many bytes is given back.
#[cfg(target_env = "gnu")]
const TRIM_THRESHOLD: libc::c_int = 128 << 10;

/// Makes the allocator give back what is freed. Call it before the first thread is started.
///
/// One arena serves all threads: vCPU threads do not allocate while they run the guest, so its lock is never held for
/// long. Without a limit on arenas glibc asks for the number of processors when it makes another one, and opens a file
/// for that; the thread's filter may have no such call.
pub fn keep_small() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD),
        (libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD),
    ] {
        // SAFETY: it changes settings of the allocator only, and refuses values that it does not know.
        if unsafe { libc::mallopt(option, value) } == 0 {
            log::debug!("the C library does not take option {option} of its allocator");
        }
    }
}

/// Gives back every free page of the heap, and not only those at its end. It takes the allocator's lock, and
/// milliseconds where the heap is large.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches only what holds no allocation.
    unsafe {
        libc::malloc_trim(0);
    }
}
