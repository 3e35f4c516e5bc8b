//! A device's configuration space: bytes that both sides may change, with a generation (virtio 1.2, 2.5).

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The bytes from register 0x100 on. Beyond its end all reads give zeros and writes have no effect.
#[derive(Debug, Default)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    /// What the driver may write.
    writable: Range<usize>,
    generation: AtomicU32,
}

impl ConfigSpace {
    /// A space of these bytes, of which the driver may write those in `writable`.
    #[must_use]
    pub fn new(bytes: Vec<u8>, writable: Range<usize>) -> Self {
        Self { bytes: Mutex::new(bytes), writable, generation: AtomicU32::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        // Every value of each byte is valid.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The generation, which changes with each [`Self::set`]: a driver that sees the same one before and after several
    /// reads has read one state.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Fills `data` with the bytes from `offset` on.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.lock();
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    /// The driver writes `data` from `offset` on; what it may not write stays as it is.
    pub(super) fn driver_writes(&self, offset: u64, data: &[u8]) {
        let Ok(start) = usize::try_from(offset) else { return };
        for ((at, to), from) in self.lock().iter_mut().enumerate().skip(start).zip(data) {
            if self.writable.contains(&at) {
                *to = *from;
            }
        }
    }

    /// The device changes the bytes from `offset` on. It tells the driver by [`Interrupt::config_changed`].
    ///
    /// [`Interrupt::config_changed`]: super::interrupt::Interrupt::config_changed
    pub fn set(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.lock();
        for (to, from) in bytes.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
        // Within the lock: whoever reads the new bytes finds the new generation afterwards.
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_writable_changes_and_nothing_lies_beyond_the_end() {
        let space = ConfigSpace::new(vec![1, 2, 3, 4], 1..3);
        space.driver_writes(0, &[9; 8]);
        space.driver_writes(u64::MAX - 1, &[9; 2]);
        let mut data = [7; 6];
        space.read(0, &mut data);
        assert_eq!(data, [1, 9, 9, 4, 0, 0]);
        for beyond in [4, 1 << 20, u64::MAX] {
            space.read(beyond, &mut data);
            assert_eq!(data, [0; 6]);
        }
        assert_eq!(space.generation(), 0, "the driver knows what it writes");
        space.set(3, &[5, 6]);
        space.read(3, &mut data);
        assert_eq!(data, [5, 0, 0, 0, 0, 0]);
        assert_eq!(space.generation(), 1);
    }
}
