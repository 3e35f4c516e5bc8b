//! The codes by which the kernel signals a memory failure.

use libc::c_int;

use crate::types::FailureKind;

/// `si_code` of an action-required memory failure (`include/uapi/asm-generic/siginfo.h`).
pub const BUS_MCEERR_AR: c_int = 4;
/// `si_code` of an action-optional memory failure.
pub const BUS_MCEERR_AO: c_int = 5;

/// `si_code` of a memory failure of this kind.
pub(crate) fn code_of(kind: FailureKind) -> c_int {
    match kind {
        FailureKind::ActionOptional => BUS_MCEERR_AO,
        FailureKind::ActionRequired => BUS_MCEERR_AR,
    }
}
