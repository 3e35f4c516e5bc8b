//! The means by which a page is made to go bad.

use serde::{Deserialize, Serialize};

/// The means by which a page is made to go bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Means {
    /// The hwpoison-inject module, by page frame number. The VMM gets an AO. Root.
    HwpoisonInject,
    /// madvise(MADV_HWPOISON). If the memory is shared, this command calls it on a mapping of its own; else the VMM
    /// does. The caller gets an AR, the VMM an AO. Root.
    Madvise,
    /// madvise(MADV_SOFT_OFFLINE): the page moves to another frame and the old one is never used
    /// again. The guest notices nothing, and nothing goes into the ledger. Root.
    SoftOffline,
    /// The mce-inject module, which makes the host's own machine-check code handle an error of the page. The VMM gets
    /// an AO. Root; the host's `unpoison` is off from then on.
    MceInject,
    /// The host's firmware, which makes a real error (ACPI's EINJ). The VMM gets an AO. Root; the host's `unpoison` is off
    /// from then on.
    Einj,
    /// UFFDIO_POISON, by the VMM on its own memory. Nothing is signalled before the page is touched; the touch raises
    /// an AR. No privileges, no CONFIG_MEMORY_FAILURE (Linux 6.6).
    Uffd,
    /// A signal that the VMM forges for itself; the page is whole. Everything about it is labelled as
    /// forged. No privileges.
    Signal,
}

impl std::fmt::Display for Means {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HwpoisonInject => "hwpoison-inject",
            Self::Madvise => "madvise",
            Self::SoftOffline => "soft-offline",
            Self::MceInject => "mce-inject",
            Self::Einj => "einj",
            Self::Uffd => "uffd",
            Self::Signal => "signal",
        })
    }
}

impl Means {
    /// What this did to a page that was whole before, in a word or two.
    #[must_use]
    pub fn done(self) -> &'static str {
        match self {
            Self::Signal => "FORGED (the page is whole)",
            Self::SoftOffline => "taken out of use",
            _ => "poisoned",
        }
    }

    /// Whether it is the host's page frame that goes bad.
    pub fn is_of_frames(self) -> bool {
        !matches!(self, Self::Uffd | Self::Signal)
    }
}
