//! The blocks of a disk.
//!
//! A block is 4 KiB and names itself: words of 64 bits, little-endian, that say the seed, the offset and the
//! generation, and then words that follow from these three, so that a part of a block in another one's
//! place is seen. A test on the host reads the same in the disk's image:
//!
//! | word | |
//! |---|---|
//! | 0 | the bytes `mcerelay` |
//! | 1, 2, 3 | seed, offset on the disk in bytes, generation |
//! | i, from 4 on | `mix(mix(mix(mix(seed) ^ offset) ^ generation) ^ i)`, [`mix`] being splitmix64's |

use std::fmt;

/// Bytes of a block: what a transfer is of.
pub const BLOCK: usize = 4096;
pub const WORDS: usize = BLOCK / 8;
/// Words that say what the block is.
pub const HEADER: usize = 4;
const MAGIC: u64 = u64::from_le_bytes(*b"mcerelay");

/// What a block holds.
pub type Words = [u64; WORDS];

/// What a block says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Of the one who wrote it.
    pub seed: u64,
    /// Where it belongs, in bytes.
    pub offset: u64,
    /// How manieth of this place it is.
    pub generation: u64,
}

/// The finaliser of splitmix64: each bit of the result depends on each of the argument.
pub fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

impl Label {
    /// All of the block.
    pub fn words(self) -> Words {
        let key = mix(mix(mix(self.seed) ^ self.offset) ^ self.generation);
        let mut words: Words = std::array::from_fn(|index| mix(key ^ index as u64));
        words[..HEADER].copy_from_slice(&[MAGIC, self.seed, self.offset, self.generation]);
        words
    }
}

/// What was found in a block's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// This block, whole.
    Whole(Label),
    /// What begins as this block and goes on otherwise from this word on.
    Torn(Label, usize),
    /// Nothing but zeros.
    Zeros,
    /// Something else; the first word of it.
    Foreign(u64),
}

impl Found {
    pub fn of(words: &Words) -> Self {
        if words[0] != MAGIC {
            return match words.iter().all(|word| *word == 0) {
                true => Self::Zeros,
                false => Self::Foreign(words[0]),
            };
        }
        let label = Label { seed: words[1], offset: words[2], generation: words[3] };
        let expected = label.words();
        match (0..WORDS).find(|index| words[*index] != expected[*index]) {
            None => Self::Whole(label),
            Some(index) => Self::Torn(label, index),
        }
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {} offset {:#x} generation {}", self.seed, self.offset, self.generation)
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(label) => label.fmt(f),
            Self::Torn(label, word) => write!(f, "{label}, another one from byte {} on", word * 8),
            Self::Zeros => f.write_str("zeros"),
            Self::Foreign(word) => write!(f, "no block of this kind: {word:#018x}"),
        }
    }
}
