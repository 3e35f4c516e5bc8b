//! What a user gets for what cannot work: a clear error on stderr, a status that is not 0, nothing
//! lost, and a terminal that is as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they saw by panicking")]

mod colours;
mod documents;
mod dumps;
mod ends;
mod faults;
mod files;
mod followers;
mod handlers;
mod host;
mod jobs;
mod midway;
mod not_ours;
mod reports;
mod schema;
mod seccomp;
mod silent;
mod sockets;
mod terminal;
mod tools;
mod triple_fault;
mod unprivileged;
mod values;
mod watching;

use std::path::Path;
use std::process::{ExitCode, Output};

use mce_relay_tests::lab::has_kvm;
use mce_relay_tests::suite;

/// Sees that `out` is a failure with `status`, whose words name all of `named`, and no panic.
fn refused(out: &Output, status: i32, named: &[&str]) {
    let stderr = String::from_utf8_lossy(&out.stderr);
    println!("    {}", stderr.trim_end());
    assert_eq!(out.status.code(), Some(status), "{stderr}");
    for name in named {
        assert!(stderr.contains(name), "{name:?} is not named: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(out.stdout.is_empty(), "an error goes to stderr only");
}

fn anywhere() -> Result<(), String> {
    Ok(())
}

fn a_disk_below_tmp() -> Result<(), String> {
    has_kvm()?;
    match values::is_on_disk(&std::env::temp_dir()) {
        true => Ok(()),
        false => Err("needs temporary files on a disk's file system, not on tmpfs".to_owned()),
    }
}

fn as_root() -> Result<(), String> {
    // SAFETY: geteuid cannot fail and takes nothing.
    match unsafe { libc::geteuid() } {
        0 => Ok(()),
        _ => Err("needs root, to take things away from the program under test".to_owned()),
    }
}

fn has_kvm_and_preload() -> Result<(), String> {
    has_kvm().and_then(|()| faults::preload_available())
}

fn has_kvm_and_hook() -> Result<(), String> {
    has_kvm().and_then(|()| not_ours::available())
}

fn has_kvm_and_bash() -> Result<(), String> {
    has_kvm()?;
    match Path::new("/bin/bash").exists() {
        true => Ok(()),
        false => Err("needs bash, a shell with job control".to_owned()),
    }
}

fn as_root_with_kvm() -> Result<(), String> {
    as_root().and_then(|()| has_kvm())
}

/// A guest kernel and /dev/kvm, for a VM that has to be there but need not get anywhere.
fn has_vm() -> Result<(), String> {
    has_kvm()?;
    match mce_relay_tests::guest::image("vmlinux").try_exists() {
        Ok(true) => Ok(()),
        _ => Err("needs the guest image (make guest-image)".to_owned()),
    }
}

fn has_vm_but_no_memory_failure() -> Result<(), String> {
    has_vm()?;
    if Path::new("/proc/sys/vm/memory_failure_early_kill").exists() {
        return Err("this host's kernel has memory failure handling".to_owned());
    }
    Ok(())
}

/// A kernel that comes up in moments.
fn in_the_lab() -> Result<(), String> {
    match std::env::var_os("MCE_RELAY_LAB") {
        Some(_) => has_vm(),
        None => Err("is run in the lab, where Linux boots whatever this machine is".to_owned()),
    }
}

/// What does not depend on the kernel, and takes long.
fn once() -> Result<(), String> {
    has_kvm().and_then(|()| once_anywhere())
}

/// The same without a VM.
fn once_anywhere() -> Result<(), String> {
    match std::env::var_os("MCE_RELAY_LAB") {
        Some(_) => Err("is run outside the lab; nothing in it depends on the kernel".to_owned()),
        None => Ok(()),
    }
}

fn once_as_root() -> Result<(), String> {
    once().and_then(|()| as_root())
}

fn once_with_bash() -> Result<(), String> {
    once().and_then(|()| has_kvm_and_bash())
}

fn uffd_that_poisons() -> Result<(), String> {
    match mce_relay_vmm::relaying::uffd::Uffd::open() {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("needs UFFDIO_POISON (Linux 6.6): {error}")),
    }
}

fn has_kvm_and_uffd() -> Result<(), String> {
    has_kvm().and_then(|()| uffd_that_poisons())
}

fn empty_pool() -> Result<(), String> {
    has_kvm()?;
    let free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    match std::fs::read_to_string(free) {
        Ok(pages) if pages.trim() != "0" => Err("this host has free huge pages".to_owned()),
        _ => Ok(()),
    }
}

fn no_memory_failure() -> Result<(), String> {
    if Path::new("/proc/sys/vm/memory_failure_early_kill").exists() {
        return Err("this host's kernel has memory failure handling".to_owned());
    }
    Ok(())
}

fn main() -> ExitCode {
    suite::run(mce_relay_tests::tests![
        dumps::places_that_are_none needs has_kvm,
        dumps::no_room needs as_root_with_kvm,
        dumps::ended_by_a_signal needs has_kvm,
        dumps::registers_of_a_paused_vm needs has_kvm,
        ends::events_and_ledger_after_exit_6 needs has_kvm_and_hook,
        ends::events_and_ledger_after_exit_7 needs has_kvm_and_hook,
        ends::events_and_ledger_after_exit_8 needs has_kvm_and_hook,
        ends::events_and_ledger_after_a_kill needs has_kvm_and_hook,
        ends::those_that_have_ended_are_listed needs has_kvm,
        ends::what_a_failed_boot_left_among_temporary_files_stays needs as_root_with_kvm,
        ends::a_client_stays_connected_over_reboots needs has_kvm,
        ends::the_vsock_socket_stays_over_reboots needs has_kvm,
        ends::sockets_that_were_left_behind needs has_kvm,
        ends::of_ten_that_start_at_once_one_runs needs once,
        faults::every_call_that_can_fail needs has_kvm_and_preload,
        faults::every_call_of_a_reboot needs has_kvm_and_preload,
        faults::an_ar_that_cannot_be_told needs has_kvm_and_preload,
        faults::an_ao_that_cannot_be_told needs has_kvm_and_preload,
        faults::a_reboot_without_good_memory needs has_kvm_and_preload,
        faults::a_store_that_kvm_hands_over needs has_kvm_and_preload,
        faults::no_filters_in_this_kernel needs has_kvm_and_preload,
        files::all_boots_are_on_the_console needs has_kvm,
        files::all_panics_of_linux_are_on_the_console needs in_the_lab,
        files::who_is_refused_touches_nothing needs has_kvm,
        files::a_long_file_is_put_aside needs once,
        files::sighup_has_them_opened_again needs has_kvm,
        files::a_sighup_during_the_start_does_not_end_it needs has_kvm,
        files::a_terminal_that_goes_ends_it needs has_kvm,
        files::one_vm_writes_to_a_file needs has_kvm,
        files::a_file_that_was_moved_away_is_not_put_aside needs has_kvm,
        files::a_later_boot_that_fails_is_an_end needs has_kvm,
        files::a_full_disk_is_waited_for needs once_as_root,
        files::a_full_disk_keeps_what_was_and_how_it_ended needs once_as_root,
        files::a_limit_of_sizes_does_not_kill_it needs once,
        files::a_fifo_has_only_what_the_guest_says needs has_kvm,
        handlers::the_default_action_has_what_is_not_ours needs anywhere,
        handlers::a_foreign_handler_has_what_is_not_ours needs anywhere,
        handlers::a_handler_that_was_replaced_is_said needs anywhere,
        host::no_dev_kvm needs as_root,
        host::no_permission_for_dev_kvm needs as_root_with_kvm,
        host::what_check_advises_for_dev_kvm needs as_root_with_kvm,
        host::check_knows_what_it_does_not_know needs no_memory_failure,
        host::check_without_memory_failure needs no_memory_failure,
        host::poison_without_memory_failure needs has_vm_but_no_memory_failure,
        midway::a_poison_is_over needs has_kvm,
        midway::a_dump_is_over needs has_kvm,
        not_ours::kill_bus_ends_it_with_the_default_action needs has_kvm_and_hook,
        not_ours::a_bus_adrerr_ends_it_with_the_default_action needs has_kvm_and_hook,
        not_ours::an_ar_of_its_own_memory_ends_it_with_a_status_of_its_own needs has_kvm_and_hook,
        not_ours::an_ao_of_its_own_memory_is_reported_and_it_goes_on needs has_kvm_and_hook,
        not_ours::guest_ram_that_is_cut_short_is_an_error_of_kvm needs has_kvm_and_hook,
        not_ours::sigbus_that_is_blocked_is_unblocked needs has_kvm_and_hook,
        followers::three_of_them_one_stuck needs once,
        followers::places_come_back_with_their_clients_end needs has_kvm,
        watching::followers_end_with_their_reader needs has_kvm,
        reports::that_cannot_be_made needs anywhere,
        reports::that_is_cut_short needs anywhere,
        reports::of_a_broken_line needs anywhere,
        reports::of_files_that_are_no_events needs anywhere,
        reports::of_a_pipe needs anywhere,
        reports::of_many_events needs anywhere,
        reports::of_a_vm_that_runs needs has_kvm,
        reports::of_a_vm_with_a_name needs has_kvm,
        schema::events needs once_anywhere,
        schema::pages needs once_anywhere,
        schema::the_api needs has_kvm,
        seccomp::a_forbidden_call_ends_it needs has_kvm_and_hook,
        seccomp::it_is_carried_out_where_nobody_forbids_it needs has_kvm_and_hook,
        seccomp::the_document_has_the_components_lists needs anywhere,
        seccomp::the_components_lists_are_exact needs uffd_that_poisons,
        silent::a_list_says_who_is_stopped needs once,
        silent::a_list_of_one_that_many_have_asked needs once,
        silent::commands_do_not_wait_for_ever needs once,
        silent::a_command_goes_on_when_the_vm_does needs once,
        sockets::requests needs once,
        sockets::clients_that_hang needs once,
        tools::command_lines needs once_anywhere,
        tools::of_a_vm_that_runs needs has_kvm,
        tools::a_socket_that_names_another_process needs has_kvm,
        tools::a_machine_check_that_kills needs has_kvm,
        tools::a_forged_ar_of_a_guest_that_cannot_be_told needs has_kvm,
        triple_fault::it_starts_again_with_whole_memory needs has_kvm_and_uffd,
        triple_fault::three_at_once_end_it needs has_kvm,
        unprivileged::what_works_and_what_does_not needs as_root_with_kvm,
        watching::events_and_status_are_followed_to_the_end needs has_kvm,
        watching::a_vm_is_found_by_its_name needs has_kvm,
        watching::a_panic_is_seen_until_the_guest_starts_over needs has_kvm,
        watching::the_power_button_is_the_guests_to_answer needs has_kvm,
        watching::a_guest_that_does_not_power_off_goes_on needs has_kvm,
        watching::a_reset_with_no_reboot_is_the_end needs has_kvm,
        watching::vms_of_other_users_are_named_to_root needs as_root_with_kvm,
        watching::metrics_have_the_page needs has_kvm,
        values::devices_that_cannot_be needs anywhere,
        values::commas_in_paths_and_keys_twice needs anywhere,
        values::directories_that_are_not_there needs has_kvm,
        values::disks_that_end_within_a_sector needs has_kvm,
        values::sources_of_random_bytes_that_are_none needs has_kvm,
        values::two_on_one_terminal needs anywhere,
        values::memory_of_zero needs has_kvm,
        values::more_memory_than_there_is needs has_kvm,
        values::memory_that_is_not_a_size needs anywhere,
        values::memory_of_kinds_that_do_not_go_together needs anywhere,
        values::a_memory_file_that_is_not_there needs has_kvm,
        values::a_memory_file_that_is_too_short needs has_kvm,
        values::a_shared_memory_file_on_a_disk needs a_disk_below_tmp,
        values::a_pool_of_huge_pages_that_is_too_small needs empty_pool,
        values::memory_of_a_vm_that_is_not_there needs anywhere,
        values::a_kernel_that_is_not_one needs has_kvm,
        values::a_kernel_that_is_cut_short needs has_kvm,
        values::a_kernel_that_is_not_there needs has_kvm,
        values::an_initramfs_that_is_not_there needs has_vm,
        values::no_vcpus needs anywhere,
        values::a_serial_mode_that_is_none needs anywhere,
        values::an_ao_channel_that_is_none needs anywhere,
        values::a_vm_to_retire_from_that_is_not_there needs anywhere,
        values::an_api_socket_path_that_exists needs anywhere,
        values::an_event_monitor_that_cannot_be_written needs anywhere,
        values::a_vm_that_is_not_there needs anywhere,
        values::a_gpa_outside_ram needs has_vm,
        values::a_gpa_that_is_not_a_number needs anywhere,
        values::a_gpa_list_that_is_not_one needs anywhere,
        values::a_pace_that_is_none needs anywhere,
        values::a_policy_that_is_none needs anywhere,
        values::a_pause_of_a_vm_that_is_not_there needs anywhere,
        values::a_pause_too_many needs has_vm,
        colours::every_thread_may_say_what_it_has_to_say needs has_kvm,
        colours::a_page_that_is_really_bad needs has_kvm_and_uffd,
        colours::an_undeliverable_ar_pauses_the_vm needs has_kvm,
        colours::colours_in_a_file needs has_kvm,
        colours::long_work_can_be_watched_and_interrupted needs has_kvm,
        colours::only_what_the_terminal_can_show needs once,
        colours::help_is_ascii needs once_anywhere,
        colours::tables_fit needs has_kvm,
        documents::nothing_is_left_out_for_nothing needs anywhere,
        documents::every_command_that_takes_no_page_frame needs once_with_bash,
        jobs::in_the_background needs has_kvm_and_bash,
        jobs::stopped_and_taken_up_again needs has_kvm_and_bash,
        jobs::tostop needs has_kvm_and_bash,
        jobs::nohup needs has_kvm_and_bash,
        terminal::is_restored_after_sigterm needs has_vm,
        terminal::is_restored_after_ctrl_a_x needs has_vm,
        terminal::is_restored_after_any_deadly_signal needs has_kvm,
        terminal::is_restored_on_whichever_thread_a_fault_is_sent_to needs has_kvm,
        terminal::is_restored_after_going_on_and_ending needs has_kvm,
        terminal::is_untouched_by_a_failed_start needs has_kvm,
        terminal::leaves_nothing_behind_when_it_is_closed needs as_root_with_kvm,
    ])
}
