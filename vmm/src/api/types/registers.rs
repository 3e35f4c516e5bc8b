//! A vCPU's registers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::api::types::pages::Gpa;

/// The registers of one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Its index.
    pub vcpu: u8,
    /// Values by register name (rax, rip, cs, gs_base, cr3, efer …), `"0x…"`; of a segment the selector.
    pub values: BTreeMap<String, Gpa>,
}
