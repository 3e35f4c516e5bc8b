//! What is said of the transfers to and from a disk.

use std::collections::BTreeMap;

use serde::Serialize;

use super::block::BLOCK;
use crate::words::Hex;

/// Most single blocks and runs of blocks that a reply names; their number it says in full.
pub const MAX_NAMED: usize = 64;

/// A block that holds something else than it should.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Different {
    /// Where, in bytes.
    pub offset: Hex,
    /// What it holds, in words.
    pub found: String,
}

/// Blocks one behind the other whose transfer failed in the same way.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Failed {
    /// Where the first is, in bytes.
    pub offset: Hex,
    /// How many they are.
    pub blocks: u64,
    /// The name of the errno, `SIGBUS` where the buffer was lost, or how many bytes a short one was of.
    pub errno: String,
}

/// Transfers of one direction.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    pub ok: u64,
    /// By what they failed with, as in [`Failed`].
    pub failed: BTreeMap<String, u64>,
}

/// What a load came to.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Whether the page cache was left out, which not every file system allows.
    pub direct: bool,
    /// How many blocks there are.
    pub blocks: usize,
    pub writes: Count,
    pub reads: Count,
    /// Reads that gave something that was never written there, or not last: the disk lies.
    pub wrong: u64,
    /// The first of these.
    pub differences: Vec<Different>,
    /// Writes that failed and are on the disk all the same, whole.
    pub written_though_failed: u64,
    /// Buffers that were lost and replaced.
    pub buffers_lost: u64,
    /// What the flush at the end failed with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush: Option<String>,
    /// The generation that each block was last read with, after all else; none where it could not
    /// be read or has not been written. Only of few blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generations: Option<Vec<Option<u64>>>,
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
    Loaded(Summary),
}

/// Runs of failed transfers, as they come in ascending order.
#[derive(Default)]
pub struct Failures {
    pub runs: Vec<Failed>,
    pub count: u64,
}

impl Failures {
    /// One at `offset` more.
    pub fn add(&mut self, offset: u64, errno: String) {
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
    pub va: Hex,
    /// Its guest-physical address; absent where the kernel hides it (not root).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpa: Option<Hex>,
}
