//! What happened, as data. "Injected" is said only of what was injected: see [`Mca::read_back`](crate::Mca::read_back).

use std::fmt;

use crate::types::{
    FailureKind, Form, FoundBy, Place, RescueRefusal, Rescued, State, UndeliverableReason,
    WaitReason,
};
#[cfg(feature = "serde")]
use crate::types::{hex, hex_option};

/// Which thread took a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum SignalledThread {
    /// The relay's own thread.
    Relay,
    /// The thread of this vCPU.
    Vcpu(usize),
    /// Some other thread of the process.
    Other,
    /// The thread that had the page poisoned itself ([`crate::Handle::poisoning`]).
    Caller,
}

impl fmt::Display for SignalledThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relay => f.write_str("the relay's thread"),
            Self::Vcpu(vcpu) => write!(f, "the thread of vCPU {vcpu}"),
            Self::Other => f.write_str("a thread outside the relay"),
            Self::Caller => f.write_str("the thread that had the page poisoned"),
        }
    }
}

/// The word that marks a forged failure in messages.
fn label(forged: bool) -> &'static str {
    if forged { "FORGED " } else { "" }
}

/// How a machine check reached the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Reach {
    /// On this vCPU alone, as the vendor's architecture has it.
    Local,
    /// On this vCPU alone, as LMCE.
    Lmce,
    /// On every online vCPU at once.
    Rendezvous,
    /// Logged in the bank, without a machine check.
    Logged,
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Lmce => "LMCE",
            Self::Rendezvous => "rendezvous",
            Self::Logged => "logged",
        })
    }
}

/// How a page was told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "channel"))]
pub enum Injection {
    /// By a record in a bank; the first of each form in each bank of a vCPU was read back from there.
    Mce {
        /// The vCPU that was given it.
        vcpu: usize,
        /// The bank it lies in.
        bank: u8,
        /// The form it was told in.
        form: Form,
        /// How it reached the guest.
        reach: Reach,
        /// MCi_STATUS as it was set, or read back.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        status: u64,
        /// MCG_STATUS as it was set, or read back.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        mcg_status: u64,
    },
    /// By a record in the status block of the ACPI error source, and the guest was notified.
    Ghes {
        /// Number of the record; 1 for the first.
        record: u32,
        /// How many pages it names.
        pages: usize,
    },
}

/// One step on the way of an error.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(rename_all = "kebab-case", tag = "event", content = "properties")
)]
pub enum Event {
    /// The kernel signalled a memory failure.
    Caught {
        /// AO or AR.
        kind: FailureKind,
        /// `si_addr`.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        hva: u64,
        /// `si_addr_lsb`.
        lsb: u8,
        /// Which thread took it.
        thread: SignalledThread,
        /// It was forged ([`crate::Handle::forge`]); the page is whole.
        #[cfg_attr(feature = "serde", serde(default))]
        forged: bool,
    },
    /// The address is not guest RAM.
    Outside {
        /// AO or AR.
        kind: FailureKind,
        /// `si_addr`.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        hva: u64,
        /// `si_addr_lsb`.
        lsb: u8,
    },
    /// A page entered the ledger.
    Seen {
        /// Guest-physical address of the page.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// Host virtual address of the page.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        hva: u64,
        /// AO or AR.
        kind: FailureKind,
        /// How it became known.
        found_by: FoundBy,
        /// Bytes that were lost with it: 4096, or a huge page's 2 MiB or 1 GiB.
        extent: u64,
        /// Pages of 4 KiB that entered the ledger with this one, itself among them.
        pages: usize,
    },
    /// A huge page of which a part went bad was rescued; the pages that are gone follow, each by [`Self::Seen`].
    Rescued(Rescued),
    /// It was not: all of it is gone, and is in what follows.
    NotRescued {
        /// Guest-physical address of its first byte.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// Host virtual address of its first byte.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        hva: u64,
        /// Its length in bytes.
        extent: u64,
        /// Why not.
        #[cfg_attr(feature = "serde", serde(flatten))]
        why: RescueRefusal,
    },
    /// A page of the ledger was signalled again.
    Again {
        /// Guest-physical address of the page.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// AO or AR.
        kind: FailureKind,
        /// This signal was forged.
        #[cfg_attr(feature = "serde", serde(default))]
        forged: bool,
    },
    /// The page waits to be told.
    Waiting {
        /// Guest-physical address of the page.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// AO or AR.
        kind: FailureKind,
        /// For what.
        wait: WaitReason,
        /// The page is whole: the signal was forged.
        #[cfg_attr(feature = "serde", serde(default))]
        forged: bool,
    },
    /// The record was written where the guest finds it.
    Injected {
        /// Guest-physical address of the page.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// How it was told of.
        #[cfg_attr(feature = "serde", serde(flatten))]
        by: Injection,
        /// How long after the page became known, in microseconds, where this is the first time; `None`
        /// where the guest was told of it before.
        #[cfg_attr(feature = "serde", serde(default))]
        after_micros: Option<u64>,
        /// The page is whole: the signal was forged.
        #[cfg_attr(feature = "serde", serde(default))]
        forged: bool,
    },
    /// The guest cleared the bank and MCIP, or zeroed the status word.
    Acknowledged {
        /// Guest-physical address of the page.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// Where the record lay.
        #[cfg_attr(feature = "serde", serde(flatten))]
        place: Place,
        /// How long after the page became known, in microseconds, where this is the first time; `None`
        /// where the guest had taken one before.
        #[cfg_attr(feature = "serde", serde(default))]
        after_micros: Option<u64>,
        /// The page is whole: the signal was forged.
        #[cfg_attr(feature = "serde", serde(default))]
        forged: bool,
    },
    /// The guest cannot be told of the page.
    Undeliverable {
        /// Guest-physical address of the page.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// AO or AR.
        kind: FailureKind,
        /// The vCPU that touched it, or was to be told.
        vcpu: usize,
        /// Why not.
        why: UndeliverableReason,
        /// RIP of that vCPU, where it is known.
        #[cfg_attr(feature = "serde", serde(with = "hex_option"))]
        rip: Option<u64>,
        /// The page is whole: the signal was forged.
        #[cfg_attr(feature = "serde", serde(default))]
        forged: bool,
    },
    /// The guest started over, and has good memory where the page was bad.
    Healed {
        /// Guest-physical address of the page.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// It was whole before: the signal was forged.
        #[cfg_attr(feature = "serde", serde(default))]
        forged: bool,
    },
    /// Pages are no longer part of the guest's memory: they were unplugged, or there was no good memory to replace them
    /// with when the guest started over.
    Removed {
        /// Guest-physical address of the first of them.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// How many bytes.
        len: u64,
    },
    /// A page that is whole was predicted to fail, and the guest was to stop using it.
    Predicted {
        /// Guest-physical address of the page.
        #[cfg_attr(feature = "serde", serde(with = "hex"))]
        gpa: u64,
        /// How far telling the guest has come.
        #[cfg_attr(feature = "serde", serde(flatten))]
        state: State,
    },
    /// Signals arrived faster than they were taken; their addresses are not known.
    Overrun {
        /// How many.
        signals: u32,
    },
    /// Guest RAM was looked through for pages that no signal named, and there were some.
    Scanned {
        /// How many.
        pages: usize,
        /// How long it took, in microseconds.
        micros: u64,
    },
}

/// A number of things, in words: singular or plural.
struct Counted(u64, &'static str);

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.0, self.1, if self.0 == 1 { "" } else { "s" })
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caught { kind, hva, lsb, thread, forged } => {
                let forged = label(*forged);
                write!(
                    f,
                    "caught: {forged}SIGBUS BUS_MCEERR_{kind}, HVA {hva:#x}, lsb {lsb}, on {thread}"
                )
            }
            Self::Outside { kind, hva, lsb } => {
                write!(f, "outside: {kind} at HVA {hva:#x} (lsb {lsb}) is not guest RAM")
            }
            Self::Seen { gpa, hva, kind, found_by, extent, pages } => {
                let pfn = gpa >> 12;
                write!(
                    f,
                    "seen: {kind}, by {found_by}, HVA {hva:#x} is GPA {gpa:#x} (pfn {pfn:#x})"
                )?;
                match extent {
                    4096 => Ok(()),
                    _ => write!(
                        f,
                        ", one of {} in {} KiB",
                        Counted(*pages as u64, "new bad page"),
                        extent >> 10
                    ),
                }
            }
            Self::Rescued(rescued) => write!(f, "rescued: {rescued}"),
            Self::NotRescued { gpa, extent, why, .. } => {
                write!(f, "not rescued: all {} KiB at GPA {gpa:#x} are gone: {why}", extent >> 10)
            }
            Self::Again { gpa, kind, forged } => {
                write!(f, "again: {}{kind} for GPA {gpa:#x}, known", label(*forged))
            }
            Self::Waiting { gpa, kind, wait, forged } => {
                write!(f, "waiting: {}{kind} for GPA {gpa:#x}: {wait}", label(*forged))
            }
            Self::Injected {
                gpa,
                by: Injection::Mce { vcpu, bank, form, reach, status, mcg_status },
                forged,
                ..
            } => write!(
                f,
                "injected: {}{form} for GPA {gpa:#x} in bank {bank} of vCPU {vcpu}, {reach}, \
                 status {status:#018x}, MCG_STATUS {mcg_status:#x}",
                label(*forged)
            ),
            Self::Injected { gpa, by: Injection::Ghes { record, pages }, forged, .. } => write!(
                f,
                "injected: {}GPA {gpa:#x} in firmware-first record {record}, of {}",
                label(*forged),
                Counted(*pages as u64, "page")
            ),
            Self::Acknowledged { gpa, place, forged, .. } => {
                write!(f, "acknowledged: {}GPA {gpa:#x}, the guest ", label(*forged))?;
                match place {
                    Place::Mce { vcpu, bank, .. } => {
                        write!(f, "cleared bank {bank} of vCPU {vcpu}")
                    }
                    Place::Ghes { record } => write!(f, "took firmware-first record {record}"),
                }
            }
            Self::Predicted { gpa, state } => write!(f, "predicted to fail: GPA {gpa:#x}: {state}"),
            Self::Undeliverable { gpa, kind, vcpu, why, rip, forged } => {
                let forged = label(*forged);
                write!(f, "undeliverable: {forged}{kind} for GPA {gpa:#x} on vCPU {vcpu}")?;
                if let Some(rip) = rip {
                    write!(f, " (RIP {rip:#x})")?;
                }
                write!(f, ": {why}")
            }
            Self::Healed { gpa, forged } => {
                write!(f, "healed: {}GPA {gpa:#x} has good memory", label(*forged))
            }
            Self::Removed { gpa, len } => write!(
                f,
                "removed: {} KiB from GPA {gpa:#x} are no longer part of the guest's memory",
                len >> 10
            ),
            Self::Overrun { signals } => {
                write!(f, "overrun: {} not stored", Counted(u64::from(*signals), "signal"))
            }
            Self::Scanned { pages, micros } => {
                let pages = Counted(*pages as u64, "page");
                write!(f, "scanned: found {pages} that no signal named, in {micros} us")
            }
        }
    }
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use super::*;

    #[test]
    fn json_names_what_people_look_for() {
        let by = Injection::Mce {
            vcpu: 0,
            bank: 9,
            form: Form::Srao,
            reach: Reach::Rendezvous,
            status: 0xBD00_0000_0000_00C0,
            mcg_status: 5,
        };
        let event =
            Event::Injected { gpa: 0x1_0000_2000, by, after_micros: Some(20_000), forged: true };
        let json = serde_json::to_value(&event).unwrap();
        assert!(event.to_string().starts_with("injected: FORGED SRAO for GPA"), "{event}");
        assert_eq!(json["event"], "injected");
        assert_eq!(json["properties"]["gpa"], "0x100002000");
        assert_eq!(json["properties"]["channel"], "mce");
        assert_eq!(json["properties"]["after_micros"], 20_000);
        assert_eq!(json["properties"]["form"], "SRAO");
        assert_eq!(json["properties"]["status"], "0xbd000000000000c0");
        assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);

        let state = State::Acknowledged { place: Place::Ghes { record: 3 } };
        let event = Event::Predicted { gpa: 0x1000, state };
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!(json["properties"]["state"], "acknowledged");
        assert_eq!(json["properties"]["channel"], "ghes");
        assert_eq!(json["properties"]["record"], 3);
        assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);
    }
}
