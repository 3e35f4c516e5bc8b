//! Writes and reads of blocks in any order, with an account of what each has to hold.

use std::time::{Duration, Instant};

use super::block::{BLOCK, Found, Label, mix};
use super::device::{Buffer, Device};
use super::reply::{Count, Different, MAX_NAMED, Place, Summary};
use crate::words::Hex;

/// Most blocks whose generations a reply has, each of them.
const MAX_GENERATIONS: usize = 4096;

/// What is known of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// It has not been written.
    Nothing,
    /// It was written, and the kernel said so.
    Is(u64),
    /// A write failed: it may be as before (if that is known) or the one that failed.
    Either(Option<u64>, u64),
}

/// Writes and reads blocks of the first `bytes` of `device` for `time`, then reads them all.
///
/// # Errors
/// There is no memory or no /proc.
pub fn run(
    device: &Device,
    bytes: u64,
    seed: u64,
    time: Duration,
    mut announce: impl FnMut(Place, Place),
) -> Result<Summary, String> {
    let blocks = usize::try_from(bytes / BLOCK as u64).map_err(|e| e.to_string())?;
    let mut load = Load::new(device, blocks, seed)?;
    announce(load.to_write.place()?, load.to_read.place()?);
    let end = Instant::now() + time;
    while Instant::now() < end {
        load.step()?;
        if load.renewed {
            load.renewed = false;
            announce(load.to_write.place()?, load.to_read.place()?);
        }
    }
    load.finish()
}

struct Load<'d> {
    device: &'d Device,
    seed: u64,
    to_write: Buffer,
    to_read: Buffer,
    /// Whether one of them is another than before.
    renewed: bool,
    known: Vec<Known>,
    generation: u64,
    /// Of the numbers that decide what is next.
    state: u64,
    sum: Summary,
}

impl<'d> Load<'d> {
    fn new(device: &'d Device, blocks: usize, seed: u64) -> Result<Self, String> {
        let sum = Summary {
            direct: device.direct,
            blocks,
            writes: Count::default(),
            reads: Count::default(),
            wrong: 0,
            differences: Vec::new(),
            written_though_failed: 0,
            buffers_lost: 0,
            flush: None,
            generations: None,
        };
        let known = vec![Known::Nothing; blocks];
        let (to_write, to_read) = (Buffer::new()?, Buffer::new()?);
        let (renewed, generation, state) = (false, 0, mix(seed));
        Ok(Self { device, seed, to_write, to_read, renewed, known, generation, state, sum })
    }

    fn random(&mut self, below: usize) -> usize {
        self.state = mix(self.state);
        usize::try_from(self.state % below as u64).unwrap_or(0)
    }

    /// One transfer of a block of chance. One that may be the one or the other is read first.
    fn step(&mut self) -> Result<(), String> {
        let block = self.random(self.known.len());
        let either = self.random(2) == 0;
        match self.known[block] {
            Known::Nothing => self.write(block),
            Known::Is(_) if either => self.write(block),
            Known::Is(_) | Known::Either(..) => self.read(block),
        }
    }

    fn write(&mut self, block: usize) -> Result<(), String> {
        self.generation += 1;
        let (offset, generation) = ((block * BLOCK) as u64, self.generation);
        let words = Label { seed: self.seed, offset, generation }.words();
        match self.device.write(&self.to_write, offset, &words) {
            Ok(()) => {
                self.known[block] = Known::Is(generation);
                self.sum.writes.ok += 1;
            }
            Err(errno) => {
                // Whether the kernel was called at all before the buffer was lost makes no difference: a
                // read will tell.
                let before = match self.known[block] {
                    Known::Is(before) => Some(before),
                    _ => None,
                };
                self.known[block] = Known::Either(before, generation);
                self.renewed |= replace(&mut self.to_write, &errno, &mut self.sum.buffers_lost)?;
                *self.sum.writes.failed.entry(errno).or_default() += 1;
            }
        }
        Ok(())
    }

    fn read(&mut self, block: usize) -> Result<(), String> {
        let offset = (block * BLOCK) as u64;
        match self.device.read(&self.to_read, offset) {
            Ok(words) => {
                self.sum.reads.ok += 1;
                self.judge(block, Found::of(&words));
            }
            Err(errno) => {
                self.renewed |= replace(&mut self.to_read, &errno, &mut self.sum.buffers_lost)?;
                *self.sum.reads.failed.entry(errno).or_default() += 1;
            }
        }
        Ok(())
    }

    fn judge(&mut self, block: usize, found: Found) {
        let offset = (block * BLOCK) as u64;
        let generation = match found {
            Found::Whole(label) if label.seed == self.seed && label.offset == offset => {
                Some(label.generation)
            }
            _ => None,
        };
        self.known[block] = match (self.known[block], generation) {
            (Known::Is(expected), Some(is)) if is == expected => return,
            (Known::Either(_, failed), Some(is)) if is == failed => {
                self.sum.written_though_failed += 1;
                Known::Is(failed)
            }
            (Known::Either(Some(before), _), Some(is)) if is == before => Known::Is(before),
            // What was there before anything was written is anything but a part of what failed.
            (Known::Either(None, failed), _) if !is_part_of(found, self.seed, offset, failed) => {
                Known::Nothing
            }
            (Known::Nothing, _) => return,
            _ => {
                self.sum.wrong += 1;
                if self.sum.differences.len() < MAX_NAMED {
                    let found = format!("{found}, expected {:?}", self.known[block]);
                    self.sum.differences.push(Different { offset: Hex(offset), found });
                }
                Known::Nothing
            }
        };
    }

    /// Reads all that was written once more.
    fn finish(mut self) -> Result<Summary, String> {
        self.sum.flush = self.device.flush().err();
        let mut generations = Vec::new();
        for block in 0..self.known.len() {
            let before = self.sum.reads.ok;
            if self.known[block] != Known::Nothing {
                self.read(block)?;
            }
            generations.push(match self.known[block] {
                Known::Is(generation) if self.sum.reads.ok > before => Some(generation),
                _ => None,
            });
        }
        self.sum.generations = (generations.len() <= MAX_GENERATIONS).then_some(generations);
        Ok(self.sum)
    }
}

fn is_part_of(found: Found, seed: u64, offset: u64, generation: u64) -> bool {
    matches!(found, Found::Torn(label, _) if label == Label { seed, offset, generation })
}

/// Replaces a buffer that `errno` says is lost; returns whether it did. After EIO it may be whole, and
/// is used again: whether the next transfer works is what is looked for.
fn replace(buffer: &mut Buffer, errno: &str, lost: &mut u64) -> Result<bool, String> {
    if !matches!(errno, "SIGBUS" | "EFAULT" | "EHWPOISON") {
        return Ok(false);
    }
    *lost += 1;
    buffer.renew()?;
    Ok(true)
}

#[cfg(test)]
mod tests;
