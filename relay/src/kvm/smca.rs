//! The deferred-error registers of AMD's scalable MCA, which KVM does not have, and the filters that show them.

use crate::x86::mca::MAX_BANKS;

/// The first MSR of AMD's scalable MCA (SMCA, AMD PPR: MCA_CTL of bank 0), which has 16 for each
/// bank. `arch/x86/include/asm/msr-index.h`: MSR_AMD64_SMCA_MC0_CTL.
pub(super) const SMCA_MC0_CTL: u32 = 0xc000_2000;
/// MSRs of each bank.
pub(super) const SMCA_BANK_MSRS: u32 = 16;
/// The one of a bank's MSRs that holds the status of a deferred error (MCA_DESTAT).
const SMCA_DESTAT: u32 = 8;
/// The one that holds its address (MCA_DEADDR).
const SMCA_DEADDR: u32 = 9;

/// Whether `index` is MCA_DESTAT or MCA_DEADDR of one of the first `banks` banks.
pub(super) fn is_deferred_msr(index: u32, banks: u8) -> bool {
    let Some(offset) = index.checked_sub(SMCA_MC0_CTL) else {
        return false;
    };
    offset / SMCA_BANK_MSRS < u32::from(banks)
        && [SMCA_DESTAT, SMCA_DEADDR].contains(&(offset % SMCA_BANK_MSRS))
}

/// Bits of a filter range: set for an MSR that KVM handles, clear for one whose accesses go to user space. KVM reads
/// them in units of eight bytes, whatever the number of MSRs
/// (`kvm_add_msr_filter` in arch/x86/kvm/x86.c).
type FilterBits = [u8; MAX_BANKS * SMCA_BANK_MSRS as usize / 8];
/// Everything goes to user space.
pub(super) static ALL: FilterBits = [0; size_of::<FilterBits>()];
/// Accesses to MCA_DESTAT and MCA_DEADDR of every bank go to user space.
pub(super) static DEFERRED: FilterBits = deferred_bits();

const fn deferred_bits() -> FilterBits {
    let mut bits = [u8::MAX; size_of::<FilterBits>()];
    let mut bank = 0;
    while bank < MAX_BANKS {
        bits[2 * bank + 1] &= !(1 << (SMCA_DESTAT - 8) | 1 << (SMCA_DEADDR - 8));
        bank += 1;
    }
    bits
}
