//! Transfers to and from a disk, each checked: what was written where, what became of it, and whether
//! what is read is that.

mod block;
mod device;
mod load;
pub mod reply;
pub mod words;

use crate::words::Hex;
use block::{BLOCK, Found, Label};
use device::{Buffer, Device};
use reply::{Different, Failures, MAX_NAMED, Place, Reply};
use words::Request;

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
