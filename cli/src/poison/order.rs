//! What is to be done.

use std::path::Path;

use mce_relay::FailureKind;
use mce_relay_vmm::api::types::means::Means;

use crate::poison::host::filter::Filter;
use crate::poison::target::PageRange;

/// Which of hwpoison-inject's filters to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilterChoice {
    /// The VM's own memory cgroup, where it has one, and what else this says: no wrong page frame can be
    /// somebody else's.
    OwnCgroup(Filter),
    /// None; what is in force stays in force.
    Nothing,
    /// This one.
    Given(Filter),
}

/// What is to be done.
#[derive(Debug)]
pub struct Order<'a> {
    /// API socket of the VM.
    pub socket: &'a Path,
    /// Which pages.
    pub ranges: &'a [PageRange],
    /// By what means.
    pub via: Means,
    /// For a forged signal: which.
    pub kind: FailureKind,
    /// For a forged AR: the vCPU that is to have touched the page.
    pub vcpu: u8,
    /// For hwpoison-inject: which filter.
    pub filter: FilterChoice,
    /// For hwpoison-inject: do it though no memory cgroup keeps everybody else's pages from it.
    pub force: bool,
    /// The process of the guest, in words, whose pages its agent has named.
    pub whose: Option<String>,
    /// It is not going to be done, so what would be refused is only said to be.
    pub dry_run: bool,
}
