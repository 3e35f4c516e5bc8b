//! Why the guest is not told of an error now, or not at all; for people and for programs.

use std::fmt;

/// Why the guest cannot be told of an error now, though it may be later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "reason"))]
pub enum WaitReason {
    /// The vCPU has not been started by the guest.
    NotStarted {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// CR4.MCE is clear: the guest has not opened its machine-check handler (yet).
    Cr4MceClear {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// MCG_STATUS.MCIP is set: the guest is in its handler.
    Mcip {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// MCG_CTL is not all ones: the guest has switched reporting off.
    McgCtlOff {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// MCi_CTL is not all ones: the guest has switched this bank off.
    BankCtlOff {
        /// The vCPU in question.
        vcpu: u32,
        /// The bank in question.
        bank: u8,
    },
    /// MCi_STATUS.VAL is set: the guest has not yet taken the last error out of the bank.
    BankValid {
        /// The vCPU in question.
        vcpu: u32,
        /// The bank in question.
        bank: u8,
    },
    /// The guest was shown too few banks for this kind of error.
    NoBank {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// The guest has cleared MCG_STATUS.MCIP, but may not have left its handler yet. Linux returns from it by a stack
    /// that the next machine check would overwrite.
    InHandler {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// An interrupt or exception is being delivered to the guest; a machine check on top of it would make the
    /// hypervisor drop it.
    EventInFlight {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// CR4.MCE was set less than a second ago: the guest may be about to clear its banks unread.
    JustOpened {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// The guest started over on the vCPU before it took the record out of its bank; it will be told again.
    Restarted {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// The virtual machine is paused, and with it this vCPU.
    Paused {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// The vCPU's thread has not called `before_run` in time, so a machine check cannot reach every processor.
    NotComing {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// The guest has taken the processor offline, or a crash kernel left it behind, with the record in its bank. The
    /// relay removed the record; the guest is told of the page elsewhere.
    Offline {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// The vCPU was unplugged with the record in its bank; the guest is told of the page elsewhere.
    Unplugged {
        /// The vCPU in question.
        vcpu: u32,
    },
    /// The guest has as many untreated errors as its own queue can surely hold ([`Pace`](crate::Pace)).
    Pace,
    /// The guest is booting and has not taken the ACPI error source into use yet.
    NoSourceYet,
    /// The guest has not taken the firmware-first record that lies in the status block.
    InBlock,
    /// The guest is to be told by machine check, because the firmware-first channel cannot be used.
    NotByFirmware {
        /// Why it cannot be used.
        why: FallbackReason,
    },
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotStarted { vcpu } => write!(f, "vCPU {vcpu} waits for its start-up IPI"),
            Self::Cr4MceClear { vcpu } => write!(f, "CR4.MCE is clear on vCPU {vcpu}"),
            Self::Mcip { vcpu } => write!(f, "vCPU {vcpu} is in its machine-check handler (MCIP)"),
            Self::McgCtlOff { vcpu } => write!(f, "MCG_CTL is off on vCPU {vcpu}"),
            Self::BankCtlOff { vcpu, bank } => write!(f, "MC{bank}_CTL is off on vCPU {vcpu}"),
            Self::BankValid { vcpu, bank } => {
                write!(f, "bank {bank} of vCPU {vcpu} still holds an error (VAL)")
            }
            Self::NoBank { vcpu } => write!(f, "vCPU {vcpu} has no bank for it"),
            Self::InHandler { vcpu } => {
                write!(f, "vCPU {vcpu} may not have left its machine-check handler")
            }
            Self::EventInFlight { vcpu } => {
                write!(f, "an interrupt or exception is being delivered on vCPU {vcpu}")
            }
            Self::JustOpened { vcpu } => {
                write!(f, "CR4.MCE has only just been set on vCPU {vcpu}, which may wipe its banks")
            }
            Self::Restarted { vcpu } => {
                write!(f, "the guest started over on vCPU {vcpu} before it took the record")
            }
            Self::Paused { vcpu } => write!(f, "vCPU {vcpu} is paused"),
            Self::NotComing { vcpu } => write!(f, "the thread of vCPU {vcpu} does not come round"),
            Self::Offline { vcpu } => {
                write!(
                    f,
                    "vCPU {vcpu} is offline and did not take the record, which was taken back"
                )
            }
            Self::Unplugged { vcpu } => {
                write!(f, "vCPU {vcpu} was unplugged before it took the record")
            }
            Self::Pace => f.write_str("the guest has its share of errors to work off (pace)"),
            Self::NoSourceYet => {
                f.write_str("the guest has not taken the ACPI error source into use yet")
            }
            Self::InBlock => f.write_str("the last record still lies in the status block"),
            Self::NotByFirmware { why } => write!(f, "{why}; it is to be told by machine check"),
        }
    }
}

/// Why the guest cannot be told of an error at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "reason"))]
pub enum UndeliverableReason {
    /// The guest was shown no form of error report that it survives (no SER_P, or no SUCCOR).
    NoForm,
    /// An action-required error cannot wait for the reason given.
    Blocked {
        /// What it would have to wait for.
        by: WaitReason,
    },
    /// The hypervisor refused the record, or took it without effect.
    Refused,
    /// The state of the vCPU cannot be read from the hypervisor, so it is not known what it can take.
    NoState,
    /// The guest was told of its touches of the page again and again, and still touches it.
    Loop {
        /// How often, in a row.
        rounds: u32,
    },
    /// A page is predicted to fail, and the guest takes no firmware-first record, the only way to tell it.
    NoTaker {
        /// Why it takes none.
        why: FallbackReason,
    },
    /// A page that was predicted to fail went bad before the guest was told; the guest is told that it is bad.
    WentBad,
}

impl fmt::Display for UndeliverableReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoForm => f.write_str(
                "the guest's machine-check architecture has no form of it that the guest survives",
            ),
            Self::Blocked { by } => write!(f, "an AR cannot wait, and {by}"),
            Self::Refused => f.write_str("the hypervisor did not put the record into the bank"),
            Self::NoState => {
                f.write_str("the hypervisor does not say what machine-check state the vCPU is in")
            }
            Self::Loop { rounds } => write!(
                f,
                "the guest was told {rounds} times in a row and touches the page again without progress"
            ),
            Self::NoTaker { why } => write!(f, "{why}"),
            Self::WentBad => f.write_str("the page went bad before the guest was told of it"),
        }
    }
}

/// Why a guest is not told of a page by a firmware-first record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum FallbackReason {
    /// The guest has been up for some time and has not taken the error source into use.
    NoSource,
    /// The guest did not take the record in time. The record was withdrawn; whether the guest was about to act on it
    /// cannot be known.
    NotTaken,
    /// The guest did not take the last record that it was given; the next one is tried after a minute.
    Silent,
    /// The guest wrote something else than the acknowledging zero into the status block. Whether it has acted on the
    /// record cannot be known.
    Overwritten,
    /// The status block cannot be read or written (its own page is bad, say).
    Unreachable,
    /// The guest could not be notified.
    NotNotified,
}

impl fmt::Display for FallbackReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSource => "the guest has not taken the ACPI error source into use",
            Self::NotTaken => "the guest did not take the firmware-first record in time",
            Self::Silent => "the guest did not take the last firmware-first record",
            Self::Overwritten => "the guest wrote over the status block",
            Self::Unreachable => "the status block cannot be read or written",
            Self::NotNotified => "the guest could not be notified of the record",
        })
    }
}
