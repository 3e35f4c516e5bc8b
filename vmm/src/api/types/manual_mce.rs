//! A machine check that a user asks for: the request, the forecast, and the outcome.

use std::fmt;

use mce_relay::mca::{Record, status};
use serde::{Deserialize, Deserializer, Serialize};

use crate::api::types::mca_bits::{self};

/// A machine check that a user asks for. All values as KVM_X86_SET_MCE takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Index of the vCPU that gets it.
    #[serde(deserialize_with = "small")]
    pub vcpu: u8,
    /// The bank.
    #[serde(deserialize_with = "small")]
    pub bank: u8,
    /// MCi_STATUS.
    #[serde(with = "mce_relay::hex")]
    pub status: u64,
    /// MCG_STATUS.
    #[serde(with = "mce_relay::hex")]
    pub mcg_status: u64,
    /// MCi_ADDR.
    #[serde(with = "mce_relay::hex")]
    pub addr: u64,
    /// MCi_MISC.
    #[serde(with = "mce_relay::hex")]
    pub misc: u64,
    /// Give the other vCPUs a machine check without an error at the same time.
    #[serde(default)]
    pub broadcast: bool,
    /// Inject it even if the guest may not survive it.
    #[serde(default)]
    pub force: bool,
    /// Inject nothing; only forecast the outcome.
    #[serde(default)]
    pub dry_run: bool,
}

impl Request {
    /// The record as the relay's types have it.
    #[must_use]
    pub fn record(&self) -> Record {
        let Self { bank, status, addr, misc, mcg_status, .. } = *self;
        Record { bank, status, addr, misc, mcg_status }
    }

    /// Checks what does not depend on the guest's state.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn check(&self, vcpus: usize, banks: u8) -> Result<(), String> {
        let Self { vcpu, bank, .. } = self;
        if usize::from(*vcpu) >= vcpus {
            return Err(format!("there is no vCPU {vcpu}; this guest has 0 to {}", vcpus - 1));
        }
        if *bank >= banks {
            return Err(format!("there is no bank {bank}; this guest has 0 to {}", banks - 1));
        }
        if self.status & status::VAL == 0 {
            return Err(format!(
                "MCi_STATUS {:#x} has no VAL, and KVM takes no record without it; add VAL",
                self.status
            ));
        }
        Ok(())
    }
}

/// A whole number of 0 to 255 in JSON. JSON has one kind of number, so 9.0 is 9.
pub(crate) fn small<'de, D: Deserializer<'de>>(from: D) -> Result<u8, D::Error> {
    let number = f64::deserialize(from)?;
    let found = (0..=u8::MAX).find(|small| f64::from(*small) == number);
    let wrong = || format!("{number} is not a whole number of 0 to 255");
    found.ok_or_else(|| serde::de::Error::custom(wrong()))
}

/// What KVM does with the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kvm {
    /// Takes the call and does nothing.
    Ignores,
    /// Ends the vCPU, and so the guest.
    TripleFault,
    /// Writes the bank and raises a machine check.
    MachineCheck,
    /// Writes the bank and raises nothing.
    Logs,
    /// Marks in the bank, which is full, that an error was lost.
    MarksOverflow,
}

/// What a Linux guest does about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guest {
    /// Nothing that can be seen from outside.
    Nothing,
    /// Writes it to its log.
    Logs,
    /// Takes the page out of use.
    IsolatesPage,
    /// Takes the page out of use when it next polls its banks.
    IsolatesPageAtPoll,
    /// Kills the process that runs there, or panics if its kernel does.
    KillsWhatRuns,
    /// Panics, or is ended by KVM.
    Dies,
}

/// What is expected of KVM and of a Linux guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forecast {
    /// What KVM does.
    pub kvm: Kvm,
    /// Why KVM does that.
    pub kvm_why: String,
    /// What a Linux guest does.
    pub guest: Guest,
    /// Why the guest does that.
    pub guest_why: String,
    /// The guest may not survive it.
    pub lethal: bool,
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kvm = match self.kvm {
            Kvm::Ignores => "ignores it",
            Kvm::TripleFault => "ends the guest (triple fault)",
            Kvm::MachineCheck => "raises a machine check",
            Kvm::Logs => "writes it into the bank",
            Kvm::MarksOverflow => "only marks in the bank that an error was lost (OVER)",
        };
        let guest = match self.guest {
            Guest::Nothing => "does nothing",
            Guest::Logs => "writes it to its log",
            Guest::IsolatesPage => "takes the page out of use",
            Guest::IsolatesPageAtPoll => "takes the page out of use when it next polls its banks",
            Guest::KillsWhatRuns => {
                "kills the process that runs there, or panics if its kernel does"
            }
            Guest::Dies => "dies",
        };
        write!(f, "KVM {kvm}: {}\nLinux {guest}: {}", self.kvm_why, self.guest_why)
    }
}

impl Guest {
    pub(crate) fn is_lethal(self) -> bool {
        matches!(self, Self::Dies | Self::KillsWhatRuns)
    }
}

/// The outcome of a machine check that a user asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManualMce {
    /// The forecast, from the states of the vCPUs at that moment.
    #[serde(rename = "outlook")]
    pub forecast: Forecast,
    /// What was done on each vCPU; empty when nothing was injected.
    pub done: Vec<OnVcpu>,
}

/// What was done on one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnVcpu {
    /// Its index.
    pub vcpu: u8,
    /// The bank.
    pub bank: u8,
    /// The outcome on it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// The outcome of a record on one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// The bank holds it.
    Injected {
        /// MCi_STATUS as read back.
        #[serde(with = "mce_relay::hex")]
        status: u64,
        /// MCG_STATUS as read back.
        #[serde(with = "mce_relay::hex")]
        mcg_status: u64,
    },
    /// KVM took the call, and the bank holds something else.
    NotThere {
        /// MCi_STATUS as read back.
        #[serde(with = "mce_relay::hex")]
        status: u64,
        /// MCG_STATUS as read back.
        #[serde(with = "mce_relay::hex")]
        mcg_status: u64,
    },
    /// Nothing was tried.
    Skipped {
        /// Why.
        why: String,
    },
}

impl fmt::Display for OnVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vcpu, bank, outcome } = self;
        match outcome {
            Outcome::Injected { status, mcg_status } => write!(
                f,
                "injected: vCPU {vcpu}, bank {bank}: {} ({status:#018x}), MCG_STATUS {} ({mcg_status:#x})",
                mca_bits::status_words(*status),
                mca_bits::mcg_status_words(*mcg_status)
            ),
            Outcome::NotThere { status, mcg_status } => write!(
                f,
                "NOT injected: vCPU {vcpu}: KVM took the call, but bank {bank} holds {status:#018x} \
                 and MCG_STATUS is {mcg_status:#x}"
            ),
            Outcome::Skipped { why } => write!(f, "skipped: vCPU {vcpu}: {why}"),
        }
    }
}
