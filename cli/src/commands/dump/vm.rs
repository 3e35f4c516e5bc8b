//! The VM whose memory is read, as its API shows it.

use std::path::Path;

use mce_relay_vmm::api::types::registers::Registers;
use mce_relay_vmm::api::types::vm::{Extent, VmInfo};

use super::error::DumpError;
use crate::client::error::ClientError;
use crate::client::life::Life;
use crate::client::requests;

/// A VM whose memory is read.
pub(super) struct Vm<'a> {
    socket: &'a Path,
    /// The VM as it was when the reading began.
    pub(super) info: VmInfo,
    life: Life,
}

/// The result of one request for memory.
pub(super) enum Piece {
    /// At least one byte, and at most what was asked for.
    Bytes(Vec<u8>),
    /// The first byte is of a bad page.
    Poisoned,
    /// There is no memory behind the first byte any more; the reason.
    NoMemory(String),
}

impl<'a> Vm<'a> {
    pub(super) fn open(socket: &'a Path) -> Result<Self, DumpError> {
        let (pid, info) = requests::get_and_pid(socket, "vm.info")?;
        let life = Life::of(socket, pid);
        Ok(Self { socket, info, life })
    }

    /// Reads at `gpa`: `len` bytes, 1 to [`MAX_READ`](mce_relay_vmm::api::types::limits::MAX_READ), or fewer.
    pub(super) fn piece(&self, gpa: u64, len: u64) -> Result<Piece, DumpError> {
        match requests::get_bytes(self.socket, &format!("vm.memory?gpa={gpa:#x}&len={len}")) {
            Ok(bytes) if (1..=len).contains(&(bytes.len() as u64)) => Ok(Piece::Bytes(bytes)),
            Ok(bytes) => Err(DumpError::Client(ClientError::Stranger {
                path: self.socket.to_owned(),
                what: format!(
                    "it answers with {} bytes where {len} bytes were asked for",
                    bytes.len()
                ),
            })),
            Err(ClientError::Refused { status: 410, .. }) => Ok(Piece::Poisoned),
            Err(ClientError::Refused { status: 409, error }) => Ok(Piece::NoMemory(error)),
            Err(error) => Err(self.later(error)),
        }
    }

    /// The VM as it is now; an error if it is not the same boot of the same guest.
    pub(super) fn again(&self) -> Result<VmInfo, DumpError> {
        let now: VmInfo =
            requests::get(self.socket, "vm.info").map_err(|error| self.later(error))?;
        // Another VM may have been given the same path.
        if (now.pid, now.boot) == (self.info.pid, self.info.boot) {
            Ok(now)
        } else {
            Err(DumpError::StartedOver)
        }
    }

    /// The stretches that have memory behind them, ascending; bad pages are in them.
    pub(super) fn extents(&self) -> Result<Vec<Extent>, DumpError> {
        requests::get(self.socket, "vm.extents").map_err(|error| self.later(error))
    }

    /// The vCPUs' registers; none when the vCPUs run, or when the VMM does not support the request.
    pub(super) fn registers(&self) -> Result<Vec<Registers>, DumpError> {
        match requests::get(self.socket, "vm.registers") {
            Err(ClientError::Refused { status: 404 | 409, .. }) => Ok(Vec::new()),
            answer => answer.map_err(|error| self.later(error)),
        }
    }

    /// Checks that all `len` bytes (at least 1) from `gpa` on are guest RAM.
    pub(super) fn check_ram(&self, gpa: u64, len: u64) -> Result<(), DumpError> {
        // RAM does not reach the end of the address space, so an address that saturates is outside anyway.
        let last = gpa.saturating_add(len - 1);
        let mut at = gpa;
        while at <= last {
            at = match self.info.block(at) {
                Some(block) => block.gpa + block.len,
                None => {
                    return Err(DumpError::OutsideRam { gpa: at, ram: self.info.ram_in_words() });
                }
            };
        }
        Ok(())
    }

    /// What an error means after the VM was asked successfully before.
    fn later(&self, error: ClientError) -> DumpError {
        match error {
            // Between two boots there is no guest, and none either in a VM that ends.
            ClientError::Refused { status: 503, .. } if self.life.ends() => {
                DumpError::Client(self.life.ended())
            }
            ClientError::Refused { status: 503, .. } => DumpError::StartedOver,
            error => DumpError::Client(self.life.explain(error)),
        }
    }
}
