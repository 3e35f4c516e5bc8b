//! Transfers to and from a disk, each checked: what was written where, what became of it, and whether
//! what is read is that.
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

mod device;
mod load;
mod words;

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::proto::Hex;
use device::{Buffer, Device};
pub use words::{Request, parse};

/// Bytes of a block: what a transfer is of.
pub const BLOCK: usize = 4096;
const WORDS: usize = BLOCK / 8;
/// Words that say what the block is.
const HEADER: usize = 4;
const MAGIC: u64 = u64::from_le_bytes(*b"mcerelay");
/// Most single blocks and runs of blocks that a reply names; their number it says in full.
const MAX_NAMED: usize = 64;

/// What a block holds.
type Words = [u64; WORDS];

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
    fn words(self) -> Words {
        let key = mix(mix(mix(self.seed) ^ self.offset) ^ self.generation);
        let mut words: Words = std::array::from_fn(|index| mix(key ^ index as u64));
        words[..HEADER].copy_from_slice(&[MAGIC, self.seed, self.offset, self.generation]);
        words
    }
}

/// What was found in a block's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
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
    fn of(words: &Words) -> Self {
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

/// A block that holds something else than it should.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Different {
    /// Where, in bytes.
    offset: Hex,
    /// What it holds, in words.
    found: String,
}

/// Blocks one behind the other whose transfer failed in the same way.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Failed {
    /// Where the first is, in bytes.
    offset: Hex,
    /// How many they are.
    blocks: u64,
    /// The name of the errno, `SIGBUS` where the buffer was lost, or how many bytes a short one was of.
    errno: String,
}

/// Transfers of one direction.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    ok: u64,
    /// By what they failed with, as in [`Failed`].
    failed: BTreeMap<String, u64>,
}

/// What the replies to requests for a disk hold.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Reply {
    /// To `disk-write`.
    Written {
        /// Whether the page cache was left out, which not every file system allows.
        direct: bool,
        /// Blocks of which the kernel said that they are written.
        written: u64,
        /// The first of the others.
        failed: Vec<Failed>,
        /// How many those are.
        failures: u64,
        /// What the flush behind them failed with.
        #[serde(skip_serializing_if = "Option::is_none")]
        flush: Option<String>,
    },
    /// To `disk-verify`.
    Verified {
        direct: bool,
        /// Blocks that hold what was asked for.
        intact: u64,
        /// The first of those that hold something else.
        different: Vec<Different>,
        /// How many those are.
        differences: u64,
        /// The first of those that could not be read.
        failed: Vec<Failed>,
        /// How many those are.
        failures: u64,
    },
    /// To `disk-load`.
    Loaded(load::Summary),
}

/// Runs of failed transfers, as they come in ascending order.
#[derive(Default)]
struct Failures {
    runs: Vec<Failed>,
    count: u64,
}

impl Failures {
    fn add(&mut self, offset: u64, errno: String) {
        self.count += 1;
        let full = self.runs.len() == MAX_NAMED;
        match self.runs.last_mut() {
            Some(run)
                if run.errno == errno && run.offset.0 + run.blocks * BLOCK as u64 == offset =>
            {
                run.blocks += 1;
            }
            _ if full => {}
            _ => self.runs.push(Failed { offset: Hex(offset), blocks: 1, errno }),
        }
    }
}

/// Where a buffer is, for whoever wants it lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Its virtual address in the agent.
    va: Hex,
    /// Its guest-physical address; absent where the kernel hides it (not root).
    #[serde(skip_serializing_if = "Option::is_none")]
    gpa: Option<Hex>,
}

/// Does what was asked. `machine` says whether the agent is in a machine of its own, whose disks it may
/// write to; `announce` is told where the buffers of a load are, the one for writes first.
///
/// # Errors
/// The device cannot be used, or not for this, or there is no memory. What became of a transfer is no error.
pub fn perform(
    request: &Request,
    machine: bool,
    announce: impl FnMut(Place, Place),
) -> Result<Reply, String> {
    let open = |path, write, end| {
        let device = Device::open(path, write)?;
        if write && device.is_disk && !machine {
            return Err(format!("{path}: refused: not with -, it may be your own machine's"));
        }
        device.holds(end)?;
        Ok(device)
    };
    match request {
        Request::Write { path, range, seed, generation } => {
            write(&open(path, true, range.end)?, range.clone(), *seed, *generation)
        }
        Request::Verify { path, range, seed, generation } => {
            verify(&open(path, false, range.end)?, range.clone(), *seed, *generation)
        }
        Request::Load { path, bytes, seed, time } => {
            load::run(&open(path, true, *bytes)?, *bytes, *seed, *time, announce).map(Reply::Loaded)
        }
    }
}

type Range = std::ops::Range<u64>;

fn write(device: &Device, range: Range, seed: u64, generation: u64) -> Result<Reply, String> {
    let mut buffer = Buffer::new()?;
    let (mut written, mut failures) = (0, Failures::default());
    for offset in range.step_by(BLOCK) {
        match device.write(&buffer, offset, &Label { seed, offset, generation }.words()) {
            Ok(()) => written += 1,
            Err(errno) => {
                failures.add(offset, errno);
                buffer.renew()?;
            }
        }
    }
    Ok(Reply::Written {
        direct: device.direct,
        written,
        failed: failures.runs,
        failures: failures.count,
        flush: device.flush().err(),
    })
}

fn verify(device: &Device, range: Range, seed: u64, generation: u64) -> Result<Reply, String> {
    let mut buffer = Buffer::new()?;
    let (mut intact, mut differences, mut failures) = (0, 0, Failures::default());
    let mut different = Vec::new();
    for offset in range.step_by(BLOCK) {
        match device.read(&buffer, offset).map(|words| Found::of(&words)) {
            Ok(Found::Whole(label)) if label == (Label { seed, offset, generation }) => intact += 1,
            Ok(found) => {
                differences += 1;
                if different.len() < MAX_NAMED {
                    different.push(Different { offset: Hex(offset), found: found.to_string() });
                }
            }
            Err(errno) => {
                failures.add(offset, errno);
                buffer.renew()?;
            }
        }
    }
    Ok(Reply::Verified {
        direct: device.direct,
        intact,
        different,
        differences,
        failed: failures.runs,
        failures: failures.count,
    })
}

#[cfg(test)]
pub mod tests;
