//! The processor that the guest sees: what KVM supports, with changes.
//!
//! Three things are changed: the topology (every vCPU is a core of one socket), the vendor if the user asked for
//! another, and what relaying errors needs: machine-check bits, and on an AMD-style guest the recovery bits without
//! which Linux panics at any uncorrected error.

use std::arch::x86_64::{__cpuid, CpuidResult};

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2 as Leaf};

use crate::config::CpuVendor;

pub use mce_relay::mca::Vendor;

/// What the leaves depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuSpec {
    /// The vendor asked for.
    pub vendor: CpuVendor,
    /// Number of vCPUs, 1 or more.
    pub cpus: u8,
    /// KVM has a TSC-deadline timer (KVM_CAP_TSC_DEADLINE_TIMER; not in its CPUID).
    pub tsc_deadline: bool,
    /// The host's name for its processor, padded with zeros; KVM's CPUID leaves it out. Used
    /// where the guest sees the host's vendor.
    pub brand: [u8; BRAND_LEN],
}

/// Length of a processor's name.
pub const BRAND_LEN: usize = 48;

/// CPUID of this processor.
#[allow(unused_unsafe, reason = "it is safe since Rust 1.94")]
fn host_leaf(function: u32) -> CpuidResult {
    // SAFETY: every processor that KVM runs on has the instruction.
    unsafe { __cpuid(function) }
}

/// The name of this host's processor, for [`CpuSpec::brand`].
#[must_use]
pub fn host_brand() -> [u8; BRAND_LEN] {
    let mut brand = [0; BRAND_LEN];
    if host_leaf(0x8000_0000).eax >= 0x8000_0004 {
        for (function, part) in (0x8000_0002..).zip(brand.chunks_exact_mut(16)) {
            let leaf = host_leaf(function);
            for (to, from) in part.chunks_exact_mut(4).zip([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
            {
                to.copy_from_slice(&from.to_le_bytes());
            }
        }
    }
    brand
}

const INTEL: &[u8; 12] = b"GenuineIntel";
const AMD: &[u8; 12] = b"AuthenticAMD";
/// Hygon's processors have AMD's machine checks.
const HYGON: &[u8; 12] = b"HygonGenuine";

/// Leaf 1 EAX of family 6, model 85, stepping 7 (Cascade Lake).
const INTEL_SIGNATURE: u32 = 0x0005_0657;
/// Leaf 1 EAX of family 25, model 1, stepping 1 (Milan).
const AMD_SIGNATURE: u32 = 0x00a0_0f11;

const KVM_FEATURES: u32 = 0x4000_0001;
/// KVM_FEATURE_PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD, HC_MAP_GPA_RANGE, MIGRATION_CONTROL: these
/// make a guest use hypercalls, whose instruction the guest picks by the vendor it sees.
const KVM_HYPERCALL_FEATURES: u32 = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16 | 1 << 17;

/// Leaf 1 ECX.
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: machine-check exception, machine-check architecture, more than one logical CPU.
const EDX1_MCE: u32 = 1 << 7;
const EDX1_MCA: u32 = 1 << 14;
const EDX1_HTT: u32 = 1 << 28;
/// Leaf 8000_0001 ECX.
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;
/// Leaf 8000_0001 bits that Intel has too: LAHF, LZCNT, PREFETCHW; SYSCALL, NX, 1 GiB pages,
/// RDTSCP, long mode.
const INTEL_EXT_ECX: u32 = 1 | 1 << 5 | 1 << 8;
const INTEL_EXT_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;
/// Leaf 8000_0007 EBX: overflow recovery, SUCCOR, scalable MCA.
const RAS_OVERFLOW_RECOV: u32 = 1;
const RAS_SUCCOR: u32 = 1 << 1;
const RAS_SMCA: u32 = 1 << 3;

fn vendor_id(leaves: &[Leaf]) -> Option<[u8; 12]> {
    let leaf = leaves.iter().find(|leaf| leaf.function == 0)?;
    let mut id = [0; 12];
    for (part, register) in id.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
        part.copy_from_slice(&register.to_le_bytes());
    }
    Some(id)
}

fn host_vendor(supported: &[Leaf]) -> Vendor {
    match vendor_id(supported) {
        Some(id) if id == *AMD || id == *HYGON => Vendor::Amd,
        _ => Vendor::Intel,
    }
}

/// The vendor that a guest will see, given what KVM supports on this host.
#[must_use]
pub fn guest_vendor(wanted: CpuVendor, supported: &[Leaf]) -> Vendor {
    match wanted {
        CpuVendor::Host => host_vendor(supported),
        CpuVendor::Intel => Vendor::Intel,
        CpuVendor::Amd => Vendor::Amd,
    }
}

/// The leaves that all vCPUs have in common (see [`for_vcpu`]).
#[must_use]
pub fn guest_leaves(supported: &[Leaf], spec: CpuSpec) -> Vec<Leaf> {
    let vendor = guest_vendor(spec.vendor, supported);
    let foreign = vendor != host_vendor(supported);
    let mut leaves = supported.to_vec();
    let brand = match vendor {
        _ if !foreign => spec.brand,
        Vendor::Intel => padded("Intel Xeon (Cascade Lake style, virtual)"),
        Vendor::Amd => padded("AMD EPYC (Milan style, virtual)"),
    };
    set_brand(&mut leaves, &brand);
    if foreign {
        match vendor {
            Vendor::Intel => make_intel(&mut leaves, spec),
            Vendor::Amd => make_amd(&mut leaves),
        }
        for leaf in leaves.iter_mut().filter(|leaf| leaf.function == KVM_FEATURES) {
            leaf.eax &= !KVM_HYPERCALL_FEATURES;
        }
    }
    if let Some(leaf) = find(&mut leaves, 1) {
        leaf.ecx |= ECX1_HYPERVISOR;
        if spec.tsc_deadline {
            leaf.ecx |= ECX1_TSC_DEADLINE;
        }
        leaf.edx |= EDX1_MCE | EDX1_MCA;
    }
    if vendor == Vendor::Amd {
        let ras = find_or_add(&mut leaves, 0x8000_0007);
        ras.ebx = (ras.ebx | RAS_OVERFLOW_RECOV | RAS_SUCCOR) & !RAS_SMCA;
    }
    set_topology(&mut leaves, vendor, spec.cpus);
    leaves
}

/// The leaves of one vCPU: its APIC id is its index.
#[must_use]
pub fn for_vcpu(leaves: &[Leaf], index: u8) -> Vec<Leaf> {
    let id = u32::from(index);
    let mut leaves = leaves.to_vec();
    for leaf in &mut leaves {
        match leaf.function {
            1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24,
            0xb => leaf.edx = id,
            0x8000_001e => {
                leaf.eax = id;
                leaf.ebx = id;
                leaf.ecx = 0;
            }
            _ => {}
        }
    }
    leaves
}

fn find(leaves: &mut [Leaf], function: u32) -> Option<&mut Leaf> {
    leaves.iter_mut().find(|leaf| leaf.function == function)
}

fn find_or_add(leaves: &mut Vec<Leaf>, function: u32) -> &mut Leaf {
    let at = leaves.iter().position(|leaf| leaf.function == function).unwrap_or_else(|| {
        leaves.push(Leaf { function, ..Leaf::default() });
        leaves.len() - 1
    });
    // The largest leaf has to say that this one exists.
    let first = function & 0x8000_0000;
    if let Some(range) = find(leaves, first) {
        range.eax = range.eax.max(function);
    }
    &mut leaves[at]
}

fn subleaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
    let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    Leaf { function, index, flags, eax, ebx, ecx, edx, ..Leaf::default() }
}

fn set_vendor_id(leaves: &mut [Leaf], function: u32, id: &[u8; 12]) {
    if let Some(leaf) = find(leaves, function) {
        let word = |at: usize| u32::from_le_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]);
        (leaf.ebx, leaf.edx, leaf.ecx) = (word(0), word(4), word(8));
    }
}

/// Pads a name with zeros; the last byte stays zero.
fn padded(name: &str) -> [u8; BRAND_LEN] {
    let mut text = [0; BRAND_LEN];
    for (to, from) in text.iter_mut().zip(name.bytes().take(BRAND_LEN - 1)) {
        *to = from;
    }
    text
}

fn set_brand(leaves: &mut Vec<Leaf>, brand: &[u8; BRAND_LEN]) {
    for (function, part) in (0x8000_0002..).zip(brand.chunks_exact(16)) {
        let word =
            |at: usize| u32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]]);
        let leaf = find_or_add(leaves, function);
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (word(0), word(4), word(8), word(12));
    }
}

fn make_intel(leaves: &mut Vec<Leaf>, spec: CpuSpec) {
    // Beyond 8000_0008 everything is AMD's; 2 and 4 are Intel's and replaced.
    leaves.retain(|leaf| {
        !(0x8000_0009..=0x8fff_ffff).contains(&leaf.function)
            && !matches!(leaf.function, 2 | 4 | 0x8000_0005)
    });
    set_vendor_id(leaves, 0, INTEL);
    if let Some(leaf) = find(leaves, 0x8000_0000) {
        leaf.eax = 0x8000_0008;
        (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0);
    }
    if let Some(leaf) = find(leaves, 1) {
        leaf.eax = INTEL_SIGNATURE;
    }
    if let Some(leaf) = find(leaves, 0x8000_0001) {
        (leaf.eax, leaf.ebx) = (0, 0);
        leaf.ecx &= INTEL_EXT_ECX;
        leaf.edx &= INTEL_EXT_EDX;
    }
    if let Some(leaf) = find(leaves, 0x8000_0006) {
        // L2: 1 MiB, 16 ways, 64-byte lines.
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 1024 << 16 | 8 << 12 | 64, 0);
    }
    if let Some(leaf) = find(leaves, 0x8000_0007) {
        (leaf.eax, leaf.ebx, leaf.ecx) = (0, 0, 0);
        leaf.edx &= 1 << 8;
    }
    if let Some(leaf) = find(leaves, 0x8000_0008) {
        leaf.eax &= 0xffff;
        (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0);
    }
    // Leaf 2: one pass, caches are in leaf 4.
    *find_or_add(leaves, 2) = Leaf { function: 2, eax: 0x00fe_ff01, ..Leaf::default() };
    add_intel_caches(leaves, spec.cpus);
}

/// Deterministic cache parameters (leaf 4).
fn add_intel_caches(leaves: &mut Vec<Leaf>, cpus: u8) {
    /// Kinds of caches as leaf 4 numbers them.
    const DATA: u32 = 1;
    const CODE: u32 = 2;
    const UNIFIED: u32 = 3;
    const SELF_INITIALISING: u32 = 1 << 8;
    const LINE: u32 = 64;
    let cores = ids(cpus) - 1;
    // Kind, level, ways, sets, sharers beyond the first.
    let caches = [
        (DATA, 1, 8, 64, 0),
        (CODE, 1, 8, 64, 0),
        (UNIFIED, 2, 16, 1024, 0),
        (UNIFIED, 3, 16, 16384, cores),
    ];
    for (index, (kind, level, ways, sets, sharers)) in (0..).zip(caches) {
        let eax = kind | level << 5 | SELF_INITIALISING | sharers << 14 | cores.min(63) << 26;
        leaves.push(subleaf(4, index, [eax, (LINE - 1) | (ways - 1) << 22, sets - 1, 0]));
    }
    leaves.push(subleaf(4, 4, [0; 4]));
}

fn make_amd(leaves: &mut Vec<Leaf>) {
    leaves.retain(|leaf| !matches!(leaf.function, 2 | 4 | 0xa | 0x14 | 0x15 | 0x16));
    set_vendor_id(leaves, 0, AMD);
    set_vendor_id(leaves, 0x8000_0000, AMD);
    let mut signature = 0;
    if let Some(leaf) = find(leaves, 1) {
        leaf.eax = AMD_SIGNATURE;
        signature = leaf.edx;
    }
    let leaf = find_or_add(leaves, 0x8000_0001);
    leaf.eax = AMD_SIGNATURE;
    // AMD repeats these bits of leaf 1: 0 to 9, 12 to 17, 23, 24.
    leaf.edx |= signature & 0x0183_f3ff;
}

/// How many APIC ids `cpus` CPUs take: the next power of two.
fn ids(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two()
}

fn set_topology(leaves: &mut Vec<Leaf>, vendor: Vendor, cpus: u8) {
    let count = u32::from(cpus);
    let shift = ids(cpus).trailing_zeros();
    // Only leaf 0xb describes the topology.
    leaves.retain(|leaf| !matches!(leaf.function, 0xb | 0x1f | 0x8000_0026));
    if let Some(range) = find(leaves, 0) {
        range.eax = range.eax.max(0xb);
    }
    // Levels: SMT with one thread, then cores; the type is in ECX bits 8 to 15.
    leaves.push(subleaf(0xb, 0, [0, 1, 1 << 8, 0]));
    leaves.push(subleaf(0xb, 1, [shift, count, 2 << 8 | 1, 0]));
    leaves.push(subleaf(0xb, 2, [0, 0, 2, 0]));

    for leaf in leaves.iter_mut() {
        match leaf.function {
            1 => {
                leaf.ebx = leaf.ebx & 0xff00_ffff | ids(cpus).min(255) << 16;
                leaf.edx = if cpus > 1 { leaf.edx | EDX1_HTT } else { leaf.edx & !EDX1_HTT };
            }
            4 if vendor == Vendor::Intel && leaf.eax & 0x1f != 0 => {
                let level = leaf.eax >> 5 & 7;
                let sharers = if level >= 3 { ids(cpus) - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharers << 14 | (ids(cpus) - 1).min(63) << 26;
            }
            0x8000_0001 if vendor == Vendor::Amd => {
                leaf.ecx = if cpus > 1 {
                    leaf.ecx | AMD_ECX_CMP_LEGACY
                } else {
                    leaf.ecx & !AMD_ECX_CMP_LEGACY
                };
            }
            0x8000_0008 if vendor == Vendor::Amd => {
                leaf.ecx = shift << 12 | (count - 1);
            }
            0x8000_001d if leaf.eax & 0x1f != 0 => {
                let sharers = if leaf.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharers << 14;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported(id: &[u8; 12]) -> Vec<Leaf> {
        let mut leaves: Vec<Leaf> = [0, 1, 2, 7, 0xb, 0xd]
            .into_iter()
            .chain(0x8000_0000..=0x8000_000a)
            .chain([0x8000_001d, 0x8000_001e, 0x8000_001f, 0x4000_0000, KVM_FEATURES])
            .map(|function| Leaf { function, ..Leaf::default() })
            .collect();
        set_vendor_id(&mut leaves, 0, id);
        find(&mut leaves, 0).unwrap().eax = 0xd;
        find(&mut leaves, 1).unwrap().eax = 0x0080_0f12;
        find(&mut leaves, 0x8000_0000).unwrap().eax = 0x8000_001f;
        let ext = find(&mut leaves, 0x8000_0001).unwrap();
        (ext.ecx, ext.edx) = (u32::MAX, u32::MAX);
        find(&mut leaves, KVM_FEATURES).unwrap().eax = u32::MAX;
        find(&mut leaves, 0x8000_0007).unwrap().ebx = RAS_SMCA;
        find(&mut leaves, 0x8000_0008).unwrap().ebx = u32::MAX;
        leaves
    }

    fn spec(vendor: CpuVendor, cpus: u8) -> CpuSpec {
        CpuSpec { vendor, cpus, tsc_deadline: true, brand: padded("Host") }
    }

    fn leaf(leaves: &[Leaf], function: u32) -> Leaf {
        *leaves.iter().find(|leaf| leaf.function == function).unwrap()
    }

    #[test]
    fn vendor_asked_for_or_host() {
        for (id, host) in [(AMD, Vendor::Amd), (HYGON, Vendor::Amd), (INTEL, Vendor::Intel)] {
            assert_eq!(guest_vendor(CpuVendor::Host, &supported(id)), host);
            assert_eq!(guest_vendor(CpuVendor::Intel, &supported(id)), Vendor::Intel);
            assert_eq!(guest_vendor(CpuVendor::Amd, &supported(id)), Vendor::Amd);
        }
    }

    #[test]
    fn amd_guest_can_recover_and_is_not_scalable() {
        for id in [AMD, INTEL] {
            let leaves = guest_leaves(&supported(id), spec(CpuVendor::Amd, 2));
            assert_eq!(leaf(&leaves, 0x8000_0007).ebx, RAS_OVERFLOW_RECOV | RAS_SUCCOR);
            assert_eq!(vendor_id(&leaves).unwrap(), *AMD);
        }
    }

    #[test]
    fn host_style_keeps_signature_and_paravirtual_features() {
        let leaves = guest_leaves(&supported(AMD), spec(CpuVendor::Host, 2));
        assert_eq!(leaf(&leaves, 1).eax, 0x0080_0f12);
        assert_eq!(leaf(&leaves, KVM_FEATURES).eax, u32::MAX);
        assert_eq!(leaf(&leaves, 0x8000_0002).eax, u32::from_le_bytes(*b"Host"));
    }

    #[test]
    fn intel_guest_on_amd_has_nothing_of_amd() {
        let leaves = guest_leaves(&supported(AMD), spec(CpuVendor::Intel, 2));
        assert_eq!(vendor_id(&leaves).unwrap(), *INTEL);
        assert_eq!(leaf(&leaves, 1).eax, INTEL_SIGNATURE);
        assert!(leaves.iter().all(|leaf| leaf.function <= 0x8000_0008));
        assert_eq!(leaf(&leaves, 0x8000_0008).ebx, 0);
        assert_eq!(leaf(&leaves, 0x8000_0001).ecx, INTEL_EXT_ECX);
        assert_eq!(leaf(&leaves, 0x8000_0007).ebx, 0);
        let features = leaf(&leaves, KVM_FEATURES).eax;
        assert_eq!(features & KVM_HYPERCALL_FEATURES, 0);
        assert_eq!(features & 1 << 3, 1 << 3, "kvmclock stays");
        assert_eq!(leaves.iter().filter(|leaf| leaf.function == 4).count(), 5);
    }

    #[test]
    fn machine_checks_are_always_there() {
        for vendor in [CpuVendor::Host, CpuVendor::Intel, CpuVendor::Amd] {
            let leaves = guest_leaves(&supported(AMD), spec(vendor, 1));
            let one = leaf(&leaves, 1);
            assert_eq!(one.edx & (EDX1_MCE | EDX1_MCA), EDX1_MCE | EDX1_MCA);
            assert_ne!(one.ecx & ECX1_HYPERVISOR, 0);
            assert_ne!(one.ecx & ECX1_TSC_DEADLINE, 0);
            assert_eq!(one.edx & EDX1_HTT, 0, "one CPU");
        }
    }

    #[test]
    fn topology_counts_every_cpu_once() {
        for cpus in [1, 2, 3, 8, 254] {
            let leaves = guest_leaves(&supported(AMD), spec(CpuVendor::Host, cpus));
            let levels: Vec<_> = leaves.iter().filter(|leaf| leaf.function == 0xb).collect();
            assert_eq!(levels.len(), 3);
            assert_eq!(levels[1].ebx, u32::from(cpus));
            assert!(1 << levels[1].eax >= u32::from(cpus));
            for index in [0, cpus - 1] {
                let own = for_vcpu(&leaves, index);
                assert_eq!(leaf(&own, 1).ebx >> 24, u32::from(index));
                assert!(
                    own.iter()
                        .filter(|leaf| leaf.function == 0xb)
                        .all(|leaf| leaf.edx == u32::from(index))
                );
            }
        }
    }
}
