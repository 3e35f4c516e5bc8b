//! Tier 3: real poison under real guests, in the lab. Each scenario is a page long and says first
//! what it shows.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they saw by panicking")]

mod ao;
mod ar;
mod bad_queues;
mod burst;
mod debian;
mod delivery;
mod disk;
mod firmware;
mod first_hour;
mod hardware;
mod kinds;
mod mce_test;
mod means;
mod memory;
mod net;
mod not_ours;
mod offline;
mod placement;
mod power;
mod rescue;
mod undeliverable;
mod unprivileged;
mod virtio;
mod vsock;
mod watch;
mod wrong_page;

use std::process::ExitCode;

use mce_relay_tests::lab::{has_hardware, may_poison};
use mce_relay_tests::suite;

/// For what differs little from its neighbour (in the number of vCPUs, the vendor, the kind of file): a test
/// run has twenty minutes.
fn may_soak() -> Result<(), String> {
    may_poison()?;
    match std::env::var_os("MCE_RELAY_SOAK") {
        Some(_) => Ok(()),
        None => {
            Err("is left to make soak; a neighbour that differs from it little is run".to_owned())
        }
    }
}

fn may_poison_the_vmm() -> Result<(), String> {
    may_poison().and_then(|()| mce_relay_tests::hooked::library("libhook.so").map(drop))
}

fn may_crash() -> Result<(), String> {
    may_poison().and_then(|()| mce_relay_tests::guest::has_crash_kernel())
}

fn may_crash_and_soak() -> Result<(), String> {
    may_soak().and_then(|()| mce_relay_tests::guest::has_crash_kernel())
}

/// All of a huge page, untold.
fn may_lose_a_huge_page() -> Result<(), String> {
    may_poison().and_then(|()| mce_relay_tests::guest::splits_unread())
}

fn may_map_a_guest_memfd() -> Result<(), String> {
    may_poison().and_then(|()| mce_relay_tests::lab::has_guest_memfd())
}

fn may_rescue() -> Result<(), String> {
    may_poison().and_then(|()| mce_relay_tests::lab::has_lists_of_bad_frames())
}

fn in_lab_with_hardware() -> Result<(), String> {
    may_poison().and_then(|()| has_hardware())
}

/// The kernel's mce-inject module needs processors of AMD's make, as the lab's are.
fn may_inject_into_the_host() -> Result<(), String> {
    may_poison()?;
    mce_relay_cli::poison::host::host_mce_injector::check_processor()
        .map_err(|error| error.to_string())
}

fn may_boot_debian() -> Result<(), String> {
    may_poison().and_then(|()| mce_relay_tests::guest::has_debian())
}

fn may_use_vhost() -> Result<(), String> {
    may_poison().and_then(|()| net::has_vhost())
}

fn main() -> ExitCode {
    suite::run(mce_relay_tests::tests![
        ao::amd_one_vcpu needs may_soak,
        ao::amd_two_vcpus needs may_poison,
        ao::intel_one_vcpu needs may_soak,
        ao::intel_two_vcpus_by_rendezvous needs may_poison,
        ao::intel_one_vcpu_by_lmce needs may_soak,
        ao::intel_two_vcpus_by_lmce needs may_poison,
        ar::amd_one_vcpu needs may_soak,
        ar::amd_two_vcpus needs may_poison,
        ar::intel_one_vcpu needs may_soak,
        ar::intel_two_vcpus_by_rendezvous needs may_poison,
        ar::intel_one_vcpu_by_lmce needs may_soak,
        ar::intel_two_vcpus_by_lmce needs may_poison,
        ar::amd_kernel_copy needs may_poison,
        ar::intel_kernel_copy needs may_soak,
        ar::while_the_ao_waits_to_be_polled needs may_poison,
        burst::amd needs may_poison,
        burst::of_a_guest_that_says_when_it_is_done needs may_poison,
        burst::intel_by_rendezvous needs may_soak,
        burst::intel_by_lmce needs may_poison,
        delivery::while_the_handler_runs needs may_poison,
        delivery::while_an_amd_guest_boots needs may_poison,
        delivery::while_an_intel_guest_boots needs may_soak,
        delivery::a_touch_after_the_ao needs may_poison,
        delivery::a_touch_while_the_ao_waits needs may_poison,
        delivery::a_touch_before_the_ao_amd needs may_poison,
        delivery::a_touch_before_the_ao_intel needs may_soak,
        delivery::a_page_without_a_signal_amd needs may_poison,
        delivery::a_page_without_a_signal_intel needs may_soak,
        firmware::amd_one_vcpu needs may_soak,
        firmware::amd_two_vcpus needs may_poison,
        firmware::intel_one_vcpu needs may_soak,
        firmware::intel_two_vcpus needs may_poison,
        firmware::a_guest_that_polls needs may_poison,
        firmware::auto_is_the_machine_check_for_intel needs may_poison,
        firmware::burst_amd needs may_soak,
        firmware::burst_intel needs may_soak,
        firmware::a_touch_is_a_machine_check needs may_poison,
        firmware::a_guest_without_the_driver_amd needs may_poison,
        firmware::a_guest_without_the_driver_intel needs may_soak,
        firmware::a_guest_without_acpi needs may_soak,
        firmware::a_guest_without_the_reserved_page needs may_poison,
        firmware::a_record_that_is_never_taken needs may_poison,
        firmware::a_block_that_is_scribbled_over needs may_poison,
        firmware::the_blocks_own_page_goes_bad needs may_poison,
        firmware::reboot needs may_poison,
        firmware::retire_amd needs may_poison,
        firmware::retire_intel needs may_soak,
        firmware::retire_without_the_driver needs may_soak,
        first_hour::every_command needs may_poison,
        offline::intel_by_rendezvous needs may_poison,
        offline::amd_by_machine_check needs may_poison,
        offline::the_boot_processor_of_an_intel_guest needs may_poison,
        offline::left_behind_by_an_intel_guests_crash needs may_crash,
        offline::left_behind_by_an_amd_guests_crash needs may_crash_and_soak,
        debian::rasdaemon_records_it needs may_boot_debian,
        debian::rasdaemon_records_a_firmware_first_record needs may_boot_debian,
        disk::raw_amd needs may_poison,
        disk::qcow2_intel needs may_poison,
        disk::touched_first_by_the_device needs may_poison,
        disk::in_huge_pages needs may_poison,
        memory::anonymous needs may_poison,
        memory::thp needs may_poison,
        memory::file needs may_poison,
        memory::guest_memfd needs may_map_a_guest_memfd,
        memory::hugetlb needs may_lose_a_huge_page,
        memory::a_huge_page_that_cannot_be_replaced needs may_poison,
        memory::core needs may_poison,
        memory::dump needs may_poison,
        memory::the_vmms_own_touch needs may_poison,
        memory::while_paused needs may_poison,
        rescue::of_2_mib needs may_rescue,
        rescue::and_no_huge_page_to_spare needs may_poison,
        rescue::of_1_gib needs may_poison,
        rescue::by_a_touch needs may_rescue,
        rescue::several_frames needs may_poison,
        rescue::not_where_it_cannot_be needs may_poison,
        rescue::within_a_memory_cgroup needs may_poison,
        rescue::many needs may_poison,
        not_ours::a_page_of_the_vmm needs may_poison_the_vmm,
        virtio::random_bytes_and_a_console needs may_poison,
        virtio::rings_that_go_bad needs may_poison,
        disk::rings_that_go_bad needs may_poison,
        net::tcp_both_ways needs may_poison,
        net::tcp_both_ways_by_vhost needs may_use_vhost,
        vsock::the_agent_and_some_mib needs may_poison,
        bad_queues::net needs may_poison,
        bad_queues::net_touched_first_by_the_device needs may_poison,
        bad_queues::net_by_vhost needs may_use_vhost,
        bad_queues::vsock needs may_poison,
        bad_queues::vsock_touched_first_by_the_device needs may_poison,
        watch::a_relay_in_an_event_loop needs may_poison,
        watch::a_cache_loses_one_entry needs may_poison,
        watch::the_guest_of_another_vmm_lives needs may_poison,
        unprivileged::real_failures_under_nobodys_vmm needs may_poison,
        power::a_panic_and_a_reset needs may_poison,
        power::the_button needs may_poison,
        undeliverable::stop needs may_poison,
        undeliverable::pause needs may_poison,
        undeliverable::reset needs may_poison,
        means::madvise needs may_poison,
        means::madvise_by_the_vmm needs may_poison,
        means::uffd_and_signal needs may_poison,
        means::a_process_of_the_guest needs may_poison,
        means::by_hand needs may_poison,
        means::filters_and_unpoison needs may_poison,
        means::late_kill_says_nothing_until_a_touch needs may_poison,
        wrong_page::the_zero_page needs may_poison,
        wrong_page::the_huge_zero_page needs may_poison,
        wrong_page::a_page_of_ksm needs may_poison,
        wrong_page::it_is_looked_at_right_before needs may_poison,
        wrong_page::huge_pages needs may_poison,
        wrong_page::what_is_said_before needs may_poison,
        kinds::as_on_bare_metal needs may_poison,
        kinds::touched_as_on_bare_metal needs may_poison,
        mce_test::kvm_suite needs may_poison,
        placement::a_page_above_4_gib needs may_poison,
        // Last: after a hardware error the kernel refuses to heal pages until it reboots.
        means::mce_inject needs may_inject_into_the_host,
        rescue::from_the_hardware_down needs may_inject_into_the_host,
        hardware::from_the_bank_to_the_guests_process needs in_lab_with_hardware,
        hardware::where_the_processors_stand needs in_lab_with_hardware,
    ])
}
