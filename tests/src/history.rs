//! Histories: errors, a guest's steps and the looks of its vCPU threads, one after the other in any
//! order; and what has to hold in all of them.
//!
//! A history is played by [`driver::play`], which does with `Delivery` what the relay's threads do,
//! on vCPUs that are a model of KVM ([`model`]) or KVM's own (`tests/kvm/stepper.rs`). What the guest
//! does is said once, in [`guest`], for both. [`audit`] holds every step against the invariants and
//! panics with the one that is broken; [`generate`] makes the histories.

pub mod audit;
pub mod driver;
pub mod generate;
pub mod guest;
pub mod model;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use mce_relay::mca::{Caps, McaState, Record};
use mce_relay::{PAGE_SIZE, Pace};

use guest::GuestStep;

/// One step of a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Pages go bad that nobody has touched, each with a signal to the relay's thread.
    Ao {
        /// The first page's number.
        first: u64,
        /// How many in a row.
        pages: u64,
    },
    /// A vCPU runs and touches a bad page. Its thread comes round before it runs again.
    Ar {
        /// The vCPU.
        vcpu: usize,
        /// The page's number.
        page: u64,
    },
    /// The vCPU leaves the guest while an interrupt is on its way in, if it takes interrupts.
    Interrupt(usize),
    /// The vCPU's thread comes round (`VcpuPort::before_run` with attention asked for).
    Look(usize),
    /// Time passes.
    Advance(Duration),
    /// The guest does this on this vCPU, which takes the machine check that is queued, if one is, first.
    Guest(usize, GuestStep),
    /// The vCPU is held by a pause, or no longer.
    Pause(usize, bool),
    /// The vCPU's thread is held up by something else and does not come round, or it does again.
    Late(usize, bool),
    /// The vCPU is unplugged (if the guest has another one), or plugged in anew.
    Plug(usize, bool),
    /// The page is not the guest's any more, or there is other memory in its place.
    Ram(u64, bool),
}

/// A virtual machine, and what happens to it. vCPU 0 runs from the start, the others wait for their
/// start-up IPI; CR4.MCE is clear and interrupts are off on all.
#[derive(Clone)]
pub struct History {
    /// What the guest is shown.
    pub caps: Caps,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// How fast it is told of AOs.
    pub pace: Pace,
    /// What happens. After the last, the guest becomes well: see [`driver`].
    pub ops: Vec<Op>,
}

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { caps, vcpus, pace, ops } = self;
        writeln!(f, "{caps:x?}, {vcpus} vCPUs, {pace:?}:")?;
        ops.iter().enumerate().try_for_each(|(index, op)| writeln!(f, "  {index:3}  {op:?}"))
    }
}

/// Guest-physical address of page `page`.
pub const fn gpa(page: u64) -> u64 {
    page * PAGE_SIZE
}

/// One vCPU, from both of its sides. The relay's side is that of `mce_relay::Mca`.
pub trait Vcpu {
    /// Its machine-check state now.
    fn state(&mut self) -> McaState;
    /// `KVM_X86_SET_MCE`: false when it is refused.
    fn inject(&mut self, record: &Record) -> bool;
    /// A start-up IPI: it leaves wait-for-SIPI.
    fn start(&mut self);
    /// An INIT: CR4.MCE is cleared, interrupts are off, what is queued or being handled is forgotten,
    /// and the vCPU waits for SIPI. The banks and MCG_STATUS survive.
    fn init(&mut self);

    /// The hypervisor has begun to deliver an interrupt, and goes on with it when the guest runs.
    fn interrupt(&mut self);

    /// Lets the guest run to its kernel's next instruction, into the handler if a machine check is
    /// queued. False when it shuts down (triple fault).
    fn resume(&mut self) -> bool;
    /// How many machine-check handlers it is in: more than one when its handler was interrupted.
    fn handlers(&self) -> u32;
    /// The guest's kernel reads a register.
    fn rdmsr(&mut self, index: u32) -> u64;
    /// The guest's kernel writes a register.
    fn wrmsr(&mut self, index: u32, value: u64);
    /// The guest's kernel sets or clears CR4.MCE.
    fn set_cr4_mce(&mut self, set: bool);
    /// The guest's kernel takes interrupts, or no longer.
    fn set_interrupts(&mut self, on: bool);
    /// The vCPU waits in HLT, or no longer.
    fn set_halted(&mut self, on: bool);
    /// The hypervisor's host writes a register.
    fn host_wrmsr(&mut self, index: u32, value: u64);
    /// The guest's kernel returns from the handler it is in.
    fn iret(&mut self);
}

/// What happened in one or many histories, by name.
#[derive(Debug, Clone, Default)]
pub struct Counts(BTreeMap<&'static str, u64>);

impl Counts {
    /// One more of `what`.
    pub fn count(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }

    /// Adds what happened in another history.
    pub fn add(&mut self, other: &Self) {
        for (what, count) in &other.0 {
            *self.0.entry(what).or_default() += count;
        }
    }

    /// How often `what` happened.
    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or_default()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.0.iter().map(|(what, count)| format!("{what} {count}")).collect();
        f.write_str(&all.join(", "))
    }
}
