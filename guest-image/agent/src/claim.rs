//! Takes memory from the kernel until it comes by page frames that a test names, and uses those.

use std::io;
use std::ops::RangeInclusive;
use std::ptr;

use crate::pages::{FRAME, frames, is_pattern, meminfo, pattern};
use crate::proto::Body;
use crate::touch;

/// So much is taken at once.
const CHUNK: usize = 4 << 20;
/// So much is left to everybody else, in kB: the agent would be the first to be killed for want of it.
const LEFT: u64 = 16 << 10;
const WORDS: usize = FRAME / 8;

/// Memory of pages of 4 KiB, all of them there.
struct Chunk(usize);

impl Chunk {
    fn new() -> Result<Self, String> {
        let failed = |e: io::Error| format!("cannot take {CHUNK} bytes more: {e}");
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice changes nothing that exists.
        let base = unsafe { libc::mmap(ptr::null_mut(), CHUNK, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let chunk = Self(base.expose_provenance());
        // Of huge pages only whole ones are to be had, and the frames that are wanted may lie between
        // others. A kernel without huge pages needs no such advice.
        // SAFETY: advice about huge pages does not change what our own mapping holds.
        unsafe { libc::madvise(base, CHUNK, libc::MADV_NOHUGEPAGE) };
        for va in chunk.pages() {
            // SAFETY: a word of the mapping, which nothing else refers to.
            unsafe { touch::write(va, 0) }.map_err(|fault| {
                format!("SIGBUS (code {}) while new memory was filled", fault.code)
            })?;
        }
        Ok(chunk)
    }

    fn pages(&self) -> impl Iterator<Item = usize> {
        (self.0..self.0 + CHUNK).step_by(FRAME)
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and nothing refers to it but its address here.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.0), CHUNK) };
    }
}

/// Takes memory, `limit` bytes at most, until it holds the page frames `wanted` or little is left; fills
/// those with a pattern, reads them back, and gives all of it back.
///
/// # Errors
/// There is no memory, or the kernel hides page frames.
pub fn claim(wanted: &[RangeInclusive<u32>], limit: usize) -> Result<Body, String> {
    let sum = |run: &RangeInclusive<u32>| u64::from(run.end() - run.start()) + 1;
    let count = wanted.iter().map(sum).sum();
    let (mut chunks, mut held) = (Vec::new(), Vec::new());
    while (held.len() as u64) < count
        && chunks.len() * CHUNK < limit
        && meminfo("MemAvailable")? > LEFT + CHUNK as u64 / 1024
    {
        let chunk = Chunk::new()?;
        let frames = frames(chunk.0, CHUNK)?;
        if frames.contains(&0) {
            return Err("the kernel shows page frames to root only; run the agent as root".into());
        }
        held.extend(chunk.pages().zip(frames).filter_map(|(va, frame)| {
            let frame = u32::try_from(frame).ok()?;
            wanted.iter().any(|run| run.contains(&frame)).then_some((va, frame))
        }));
        chunks.push(chunk);
    }

    // All are written before the first is read: pages that were one would be seen.
    let mut words = vec![0u64; WORDS];
    let mut filled = Vec::new();
    for (va, frame) in &held {
        words.iter_mut().enumerate().for_each(|(index, word)| *word = pattern(*frame, index));
        // SAFETY: a page of ours, and `words` is as long.
        let done = unsafe { touch::copy(*va, words.as_ptr().expose_provenance(), WORDS) };
        filled.push(done.is_ok());
    }
    let mut intact = 0;
    for ((va, frame), filled) in held.iter().zip(filled) {
        // SAFETY: the same, the other way round.
        let read = unsafe { touch::copy(words.as_mut_ptr().expose_provenance(), *va, WORDS) };
        intact += usize::from(filled && read.is_ok() && is_pattern(*frame, 0, &words));
    }
    let mib = (chunks.len() * CHUNK) >> 20;
    Ok(Body::Claim { wanted: count, held: held.len(), intact, mib })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_that_are_met_are_used_and_no_more_is_taken_than_is_allowed() {
        touch::install(2).unwrap();
        match claim(&[0..=u32::MAX], 2 * CHUNK) {
            Ok(Body::Claim { wanted, held, intact, mib }) => {
                let pages = 2 * CHUNK / FRAME;
                assert_eq!((wanted, held, intact, mib), (1 << 32, pages, pages, 8));
                // Frame 0 is nobody's.
                let reply = claim(&[0..=0], CHUNK).unwrap();
                assert!(matches!(reply, Body::Claim { wanted: 1, held: 0, mib: 4, .. }));
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => assert!(error.contains("root"), "{error}"),
        }
    }
}
