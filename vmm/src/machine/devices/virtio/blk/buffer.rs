//! Memory for what is on its way, aligned as direct I/O wants it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a buffer is made of; the alignment is that of any disk's blocks.
#[repr(C, align(4096))]
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Page([u8; 4096]);

/// So much is kept from one request to the next, in pages.
const KEPT: usize = 512;

/// A buffer that grows as it has to.
#[derive(Default)]
pub struct Buffer(Vec<Page>);

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer of {} pages", self.0.len())
    }
}

impl Buffer {
    /// `len` bytes, with whatever was there.
    pub fn of(&mut self, len: usize) -> &mut [u8] {
        let pages = len.div_ceil(4096);
        if self.0.len() < pages {
            self.0.resize(pages, Page([0; 4096]));
        }
        &mut self.0.as_mut_slice().as_mut_bytes()[..len]
    }

    /// Gives back what only a large request needs.
    pub fn shrink(&mut self) {
        if self.0.len() > KEPT {
            self.0.truncate(KEPT);
            self.0.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_aligned_and_gives_back_what_is_large() {
        let mut buffer = Buffer::default();
        for len in [0, 1, 512, 4096, 4097, 8 << 20] {
            let bytes = buffer.of(len);
            assert_eq!((bytes.len(), bytes.as_ptr().addr() % 4096), (len, 0));
        }
        buffer.shrink();
        assert_eq!(buffer.0.len(), KEPT);
    }
}
