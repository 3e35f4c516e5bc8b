//! Who holds the vCPUs, and who lets go of them: users, and pages that are being marked as bad.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use mce_relay::FailureKind;
use mce_relay_cli::client::requests;
use mce_relay_tests::spinning::Spinning;
use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::pages::{Gpa, Poison, Poisoning};

/// Pages that each of those who mark marks, one request for each.
const PAGES: u64 = 60;
/// How many mark at a time.
const MARKING: u64 = 3;

/// Three clients mark pages as bad while a fourth pauses and resumes the VM: every request is answered with what
/// was asked for, and the guest, which goes on in between, lives.
pub fn marking_beside_a_user_who_pauses_and_resumes() {
    let vm = Spinning::start(&["--cpus", "2"]);
    let socket = vm.socket();
    let over = AtomicBool::new(false);
    let pauses = thread::scope(|scope| {
        let user = scope.spawn(|| {
            let mut pauses = 0;
            while !over.load(Ordering::SeqCst) {
                requests::put(&socket, "vm.pause").unwrap();
                requests::put(&socket, "vm.resume").unwrap();
                pauses += 1;
            }
            pauses
        });
        let marking: Vec<_> = (0..MARKING)
            .map(|number| {
                let socket = &socket;
                scope.spawn(move || {
                    for page in 0..PAGES {
                        let gpa = 0x100_0000 + (number * PAGES + page) * 0x1000;
                        let (gpas, via) = (vec![Gpa(gpa)], Means::Uffd);
                        let asked =
                            Poison { gpas, via, kind: FailureKind::ActionOptional, vcpu: 0 };
                        let done: Vec<Poisoning> =
                            requests::put_json(socket, "vm.poison", &asked).unwrap();
                        assert_eq!(done[0].error, None, "{gpa:#x}");
                    }
                })
            })
            .collect();
        let marked: Vec<_> = marking.into_iter().map(thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::SeqCst);
        let pauses = user.join().unwrap();
        marked.into_iter().for_each(|done| done.unwrap());
        pauses
    });
    println!("    {} pages marked by {MARKING}, beside {pauses} pauses", MARKING * PAGES);
    assert!(pauses > 0);
    let info = vm.info();
    assert!(!info.paused, "{:?}", info.pause_reason);
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// The user's own pause outlasts the marking of pages, and is the user's to end.
pub fn marking_leaves_a_pause_as_it_is() {
    let vm = Spinning::start(&["--cpus", "2"]);
    requests::put(&vm.socket(), "vm.pause").unwrap();
    let out = vm.command("poison", &["--via", "uffd", "--gpa", "0x1000000"]);
    assert!(out.status.success(), "{out:?}");
    assert!(vm.info().paused);
    requests::put(&vm.socket(), "vm.resume").unwrap();
    assert!(!vm.info().paused);
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// A paused guest is told of nothing, so `retire` says so, as `inject` does.
pub fn nothing_is_retired_while_paused() {
    let vm = Spinning::start(&[]);
    requests::put(&vm.socket(), "vm.pause").unwrap();
    for (command, args) in [
        ("retire", &["--gpa", "0x5000"][..]),
        ("inject", &["--status", "ucna", "--addr", "0x5000"]),
    ] {
        let out = vm.command(command, args);
        let stderr = String::from_utf8_lossy(&out.stderr);
        println!("    {}", stderr.trim_end());
        assert_eq!(out.status.code(), Some(1), "{command}: {stderr}");
        assert!(stderr.contains("paused") && stderr.contains("resume it first"), "{stderr}");
    }
    assert!(vm.status().predicted.is_empty(), "nothing was asked for");
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// A VM that is paused while `retire` waits: the command does not wait for ever.
pub fn a_pause_ends_the_wait_of_retire() {
    // This guest takes no firmware-first record, and none is told that it will not before it has had its time.
    let vm = Spinning::start(&["--ao-channel", "ghes"]);
    let mut tool = vm.spawn("retire", &["--gpa", "0x5000", "--json"]);
    while vm.status().predicted.is_empty() && tool.try_wait().unwrap().is_none() {
        thread::yield_now();
    }
    requests::put(&vm.socket(), "vm.pause").unwrap();
    let out = tool.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&out.stdout);
    println!("    {}", words.trim_end());
    assert_eq!(out.status.code(), Some(1), "{words}");
    assert!(words.contains("paused meanwhile"), "{words}");
    assert_eq!(vm.shut_down().code(), Some(0));
}
