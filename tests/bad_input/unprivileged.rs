//! Everything as a user who may use /dev/kvm and nothing else: what works works, and what does not says
//! why.

use std::process::Output;

use mce_relay_tests::spinning::{Nobody, Spinning};
use serde_json::Value;

use crate::refused;

/// Sees that it worked; what it printed.
fn works(out: &Output) -> String {
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

pub fn what_works_and_what_does_not() {
    let vm = Spinning::start_as(Nobody, &["--on-undeliverable", "pause"]);
    let at = |name: &str| vm.path(name).display().to_string();

    works(&vm.command("status", &[]));
    let listed = works(&vm.command("events", &["--json"]));
    assert_eq!(
        serde_json::from_str::<Value>(listed.lines().next().unwrap()).unwrap()["source"],
        "vm"
    );
    works(&vm.command("pause", &[]));
    works(&vm.command("resume", &[]));
    works(&vm.command("memory read", &["--gpa", "0x1000"]));
    works(&vm.command("memory dump", &[&at("image")]));
    works(&vm.command("pages", &["--map"]));
    works(&vm.tool(&["man", &at("man")]));
    works(&vm.tool(&["completions", "bash"]));
    works(&vm.command("inject", &["--status", "deferred", "--addr", "0x1000"]));
    works(&vm.command("poison", &["--via", "signal", "--gpa", "0x9000"]));
    let pages: Value =
        serde_json::from_str(&works(&vm.command("pages", &["--gpa", "0x9000", "--json"]))).unwrap();
    let page = &pages["pages"][0];
    assert_eq!((&page["pfn"], &page["ledger"]["found_by"]), (&Value::Null, &"forged".into()));
    assert_eq!(page["presence"], "present", "{pages}");
    assert!(pages["notes"][0].as_str().unwrap().contains("root"), "{pages}");

    // UFFDIO_POISON where the kernel has it (Linux 6.6).
    let out = vm.command("poison", &["--via", "uffd", "--gpa", "0xa000"]);
    match mce_relay_vmm::relaying::uffd::Uffd::open() {
        Ok(_) => drop(works(&out)),
        Err(_) => refused(&out, 1, &["userfaultfd", "6.6"]),
    }

    for via in ["hwpoison-inject", "mce-inject", "einj", "madvise", "soft-offline"] {
        let out = vm.command("poison", &["--via", via, "--gpa", "0xb000"]);
        let words = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            ["root", "CAP_SYS_ADMIN", "CONFIG_MEMORY_FAILURE"]
                .iter()
                .any(|word| words.contains(word)),
            "{via}: {words}"
        );
        refused(&out, 1, &[]);
    }
    refused(&vm.tool(&["unpoison", "--pfn", "0x1000"]), 1, &["root", "hwpoison"]);
    let out = vm.tool(&["check", "--json"]);
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    let lines = report["lines"].as_array().unwrap();
    let kvm = lines.iter().find(|line| line["name"] == "/dev/kvm").unwrap();
    assert_eq!(kvm["standing"], "ok", "{kvm}");
    let gaps = lines.iter().filter(|line| line["standing"] != "ok");
    assert!(gaps.clone().count() > 3, "{report}");
    assert!(gaps.clone().all(|line| !line["mend"].as_str().unwrap().is_empty()), "{report}");

    // Nobody else may ask this VM anything, but for root.
    assert_eq!(vm.status().pages.len(), 1, "as it is left: {:?}", vm.status().pages);
    assert_eq!(vm.shut_down().code(), Some(0));
}
