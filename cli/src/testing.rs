//! For tests: a VM as its API shows it.

use mce_relay::mca::Vendor;
use mce_relay::{AoChannel, KillPolicy, Pace};
use mce_relay_vmm::api::types::policy::OnUndeliverable;
use mce_relay_vmm::api::types::vm::{Extent, VmInfo};

/// One without RAM.
pub(crate) fn an_info() -> VmInfo {
    VmInfo {
        name: None,
        version: String::new(),
        pid: 1,
        boot: 1,
        vcpus: 1,
        vendor: Vendor::Amd,
        mcg_cap: "0x10a".into(),
        mce_kill: KillPolicy::Early,
        rescue: true,
        ao_channel: AoChannel::Auto,
        ghes: None,
        ao_pace: Pace::default(),
        on_undeliverable: OnUndeliverable::Stop,
        paused: false,
        pause_reason: None,
        panic: None,
        relay_alive: true,
        kernel: Extent { gpa: 0x100_0000, len: 0x200_0000 },
        memory: Vec::new(),
        devices: Vec::new(),
    }
}
