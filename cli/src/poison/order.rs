//! An order to poison pages.

use std::path::Path;

use mce_relay::FailureKind;
use mce_relay_vmm::api::types::means::Means;

use crate::poison::host::filter::Filter;
use crate::poison::target::PageRange;

/// Which of hwpoison-inject's filters to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilterChoice {
    /// By the VM's own memory cgroup, if it has one, and by these criteria: no frame of another process can be hit by
    /// mistake.
    OwnCgroup(Filter),
    /// None; a filter that is in force stays.
    Nothing,
    /// This one.
    Given(Filter),
}

/// An order to poison pages.
#[derive(Debug)]
pub struct Order<'a> {
    /// API socket of the VM.
    pub socket: &'a Path,
    /// Which pages.
    pub ranges: &'a [PageRange],
    /// The means.
    pub via: Means,
    /// The kind of a forged signal.
    pub kind: FailureKind,
    /// For a forged AR: the vCPU that is to have touched the page.
    pub vcpu: u8,
    /// For hwpoison-inject: which filter.
    pub filter: FilterChoice,
    /// For hwpoison-inject: do it although no memory cgroup protects other processes' pages.
    pub force: bool,
    /// The guest's process that has the pages, in words, if the agent was asked.
    pub whose: Option<String>,
    /// Nothing will be done, so a refusal is only a note.
    pub dry_run: bool,
}
