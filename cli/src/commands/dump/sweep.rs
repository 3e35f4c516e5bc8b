//! Reads all of a guest's memory once.

use std::path::Path;

use mce_relay_vmm::api::types::limits::MAX_READ;
use mce_relay_vmm::api::types::registers::Registers;
use mce_relay_vmm::api::types::vm::{Extent, VmInfo};
use mce_relay_vmm::machine::memory::block::PAGE_SIZE;

use super::account::Dumped;
use super::error::DumpError;
use super::file::each_part;
use super::form::Form;
use super::interrupt::Interrupt;
use super::ram::{Ram, add};
use super::vm::{Piece, Vm};
use super::vmcoreinfo::Finder;

/// A dump of one VM.
pub(super) struct Job<'a> {
    pub(super) vm: Vm<'a>,
    pub(super) ram: Ram,
    /// The stretches that have memory, ascending.
    pub(super) extents: Vec<Extent>,
    pub(super) interrupt: Interrupt,
}

/// What reading found.
#[derive(Debug, Default)]
pub(super) struct Found {
    poisoned: Vec<Extent>,
    unreadable: Vec<Extent>,
    /// Bytes of pages that are not all zeros.
    bytes: u64,
    finder: Finder,
}

/// The progress of reading.
pub(super) struct Steps<'a> {
    done: u64,
    all: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Steps<'a> {
    /// For `all` bytes.
    pub(super) fn new(all: u64, progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        Self { done: 0, all, progress }
    }

    fn advance(&mut self, len: u64) {
        self.done += len;
        (self.progress)(self.done, self.all);
    }
}

/// Called with data that is not all zeros, and its guest-physical address.
pub(super) type Take<'a> = dyn FnMut(u64, &[u8]) -> Result<(), DumpError> + 'a;

impl<'a> Job<'a> {
    pub(super) fn start(socket: &'a Path) -> Result<Self, DumpError> {
        let interrupt = Interrupt::new();
        let vm = Vm::open(socket)?;
        let extents = vm.extents()?;
        Ok(Self { ram: Ram::of(&vm.info.memory), extents, interrupt, vm })
    }

    /// Reads all of `extents`.
    pub(super) fn sweep(
        &self,
        extents: &[Extent],
        found: &mut Found,
        steps: &mut Steps<'_>,
        take: &mut Take<'_>,
    ) -> Result<(), DumpError> {
        for extent in extents {
            let end = extent.gpa + extent.len;
            let mut gpa = extent.gpa;
            while gpa < end {
                self.interrupt.check()?;
                let next = self.step(gpa, end, found, take)?;
                steps.advance(next - gpa);
                gpa = next;
            }
        }
        Ok(())
    }

    /// Reads a piece at `gpa`, which is below `end`; returns where the next piece begins.
    fn step(
        &self,
        gpa: u64,
        end: u64,
        found: &mut Found,
        take: &mut Take<'_>,
    ) -> Result<u64, DumpError> {
        let page_end = (gpa - gpa % PAGE_SIZE + PAGE_SIZE).min(end);
        Ok(match self.vm.piece(gpa, (end - gpa).min(MAX_READ))? {
            Piece::Bytes(data) => {
                found.finder.look(gpa, &data);
                found.bytes += each_part(&data, |at, part| take(gpa + at, part))?;
                gpa + data.len() as u64
            }
            Piece::Poisoned => {
                add(&mut found.poisoned, gpa, page_end - gpa);
                page_end
            }
            Piece::NoMemory(_) => {
                add(&mut found.unreadable, gpa, page_end - gpa);
                page_end
            }
        })
    }

    /// The account of the dump; an error if the guest started over meanwhile.
    pub(super) fn account(
        &self,
        form: Form,
        found: Found,
        registers: &[Registers],
    ) -> Result<Dumped, DumpError> {
        self.interrupt.check()?;
        let kernel = found.finder.choose(&self.vm)?;
        let now = self.vm.again()?;
        let VmInfo { version, pid, boot, paused, memory, .. } = &self.vm.info;
        let memory = memory.iter().map(|block| Extent { gpa: block.gpa, len: block.len });
        Ok(Dumped {
            version: version.clone(),
            pid: *pid,
            boot: *boot,
            paused: *paused && now.paused,
            memory: memory.collect(),
            poisoned: found.poisoned,
            unreadable: found.unreadable,
            late: Vec::new(),
            bytes: found.bytes,
            form,
            kernel,
            registers: registers.len(),
            file: None,
            path: None,
        })
    }
}
