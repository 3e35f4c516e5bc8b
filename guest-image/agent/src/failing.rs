//! Pages of its own that the agent has the kernel take for failed: how long that takes is what a page costs this kernel,
//! whoever told it.

use std::io;
use std::time::Instant;

use crate::pages::{FRAME, Mapping};
use crate::proto::Body;

/// Has `count` fresh pages fail, one after the other, and gives them up.
///
/// # Errors
/// The kernel has no memory failure handling, or there is no memory.
pub fn pages(count: u32) -> Result<Body, String> {
    let bytes = count as usize * FRAME;
    let named = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let mapping = Mapping::reserve(bytes).map_err(named("mmap"))?;
    mapping.map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).map_err(named("mmap"))?;
    let va = mapping.va();
    for at in (va..va + bytes).step_by(FRAME) {
        // SAFETY: a word of this mapping, which nothing else refers to. It is written so that there is a page, and no
        // page of zeros that all share.
        unsafe { std::ptr::with_exposed_provenance_mut::<u64>(at).write_volatile(!0) };
    }
    let start = Instant::now();
    for at in (va..va + bytes).step_by(FRAME) {
        let page = std::ptr::with_exposed_provenance_mut(at);
        // SAFETY: takes a page out of this mapping, which is not touched any more.
        if unsafe { libc::madvise(page, FRAME, libc::MADV_HWPOISON) } < 0 {
            return Err(named("madvise(MADV_HWPOISON)")(io::Error::last_os_error()));
        }
    }
    Ok(Body::Failing { seconds: start.elapsed().as_secs_f64() })
}
