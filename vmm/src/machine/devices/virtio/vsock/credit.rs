//! How much the host may send to the guest on a connection (virtio 1.2, 5.10.6.3).

use std::num::Wrapping;

/// The guest's room, as far as is known here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Credit {
    alloc: u32,
    taken: Wrapping<u32>,
    sent: Wrapping<u32>,
}

impl Credit {
    /// What the guest says of it in each of its packets.
    pub fn update(&mut self, alloc: u32, taken: u32) {
        (self.alloc, self.taken) = (alloc, Wrapping(taken));
    }

    /// Bytes have been sent.
    pub fn sent(&mut self, len: usize) {
        #[allow(clippy::cast_possible_truncation, reason = "it counts modulo 2^32")]
        let len = len as u32;
        self.sent += len;
    }

    /// How many bytes may be sent. None where the guest says that it took more than it got.
    #[must_use]
    pub fn left(&self) -> usize {
        let on_the_way = (self.sent - self.taken).0;
        usize::try_from(self.alloc.saturating_sub(on_the_way)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_way_uses_it_up() {
        let mut credit = Credit::default();
        assert_eq!(credit.left(), 0);
        credit.update(100, 0);
        credit.sent(60);
        assert_eq!(credit.left(), 40);
        credit.update(100, 50);
        assert_eq!(credit.left(), 90);
        // Its room became smaller than what is on the way.
        credit.update(5, 50);
        assert_eq!(credit.left(), 0);
        credit.update(100, 61);
        assert_eq!(credit.left(), 0, "more than it got");
    }

    #[test]
    fn counts_wrap() {
        let start = Wrapping(u32::MAX - 9);
        let mut credit = Credit { alloc: 64, taken: start, sent: start };
        credit.sent(30);
        assert_eq!(credit.left(), 34);
        credit.update(64, 20);
        assert_eq!(credit.left(), 64);
    }
}
