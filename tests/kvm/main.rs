//! Tier 2: the real KVM, with payloads of a few instructions. Milliseconds each, no privileges, and
//! no memory failure needed; the same binary runs again in the lab.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they saw by panicking")]

mod bare;
mod destat;
mod embed;
mod exits;
mod loops;
mod pauses;
mod payload;
mod policy;
mod relayed;
mod replay;
mod scan;
mod stepper;
mod uffd;
mod whole;

use std::process::ExitCode;

use mce_relay_tests::lab::{has_kvm, may_poison};
use mce_relay_tests::suite;

fn has_kvm_and_uffd_poison() -> Result<(), String> {
    has_kvm().and_then(|()| uffd::available())
}

fn main() -> ExitCode {
    suite::run(mce_relay_tests::tests![
        bare::a_record_reaches_the_handler_as_it_was_written needs has_kvm,
        bare::a_second_record_while_mcip_shuts_the_guest_down needs has_kvm,
        bare::a_record_with_cr4_mce_clear_shuts_the_guest_down needs has_kvm,
        bare::a_record_for_a_disabled_bank_is_swallowed needs has_kvm,
        bare::a_deferred_record_is_logged_without_a_machine_check needs has_kvm,
        bare::a_bank_that_is_not_there_is_refused needs has_kvm,
        destat::a_guest_that_clears_destat_survives needs has_kvm,
        destat::the_other_registers_of_scalable_mca_stay_faults needs has_kvm,
        destat::a_guest_of_mce_relay_run_survives needs has_kvm,
        embed::the_example_runs_and_is_short needs has_kvm,
        exits::come_when_they_were_asked_for needs has_kvm,
        exits::are_of_the_last_exit needs has_kvm,
        exits::of_before_are_dropped needs has_kvm,
        exits::say_what_is_in_flight needs has_kvm,
        exits::make_the_same_state needs has_kvm,
        relayed::a_forged_ar_is_told_by_machine_check needs has_kvm,
        relayed::a_forged_ao_to_oneself_is_logged needs has_kvm,
        relayed::an_ao_waits_while_mcip needs has_kvm,
        relayed::an_ao_waits_for_cr4_mce needs has_kvm,
        relayed::an_ao_waits_for_its_bank_to_be_enabled needs has_kvm,
        relayed::an_ar_before_cr4_mce_stops_the_vcpu_and_harms_nobody needs has_kvm,
        loops::a_guest_that_ignores_it needs has_kvm_and_uffd_poison,
        loops::a_stack_that_is_bad needs has_kvm_and_uffd_poison,
        scan::marks_are_found_and_nothing_is_populated needs uffd::available,
        scan::a_marker_that_is_not_poison_is_left_alone needs scan::has_markers,
        scan::what_is_swapped_out_stays_there needs scan::has_zram_swap,
        scan::poison_without_a_signal_is_found needs may_poison,
        scan::a_poisoned_huge_page_is_found_page_by_page needs may_poison,
        replay::the_model_is_kvm needs has_kvm,
        replay::histories_amd needs has_kvm,
        replay::histories_intel needs has_kvm,
        uffd::a_real_ar_from_guest_user_mode needs has_kvm_and_uffd_poison,
        policy::stop_ends_the_vm_with_the_reason needs has_kvm_and_uffd_poison,
        policy::reset_starts_the_guest_again_with_whole_memory needs has_kvm_and_uffd_poison,
        policy::reset_without_reboot_ends_the_vm needs has_kvm_and_uffd_poison,
        policy::pause_holds_the_vm_and_resume_tries_again needs has_kvm_and_uffd_poison,
        policy::pause_and_resume_as_often_as_one_likes needs has_kvm,
        pauses::marking_beside_a_user_who_pauses_and_resumes needs has_kvm_and_uffd_poison,
        pauses::marking_leaves_a_pause_as_it_is needs has_kvm_and_uffd_poison,
        pauses::nothing_is_retired_while_paused needs has_kvm,
        pauses::a_pause_ends_the_wait_of_retire needs has_kvm,
    ])
}
