//! A VM that ends while a command works on it: the command stops, and says that.

use std::io::Read;
use std::process::Stdio;

use mce_relay_cli::client::requests;
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::left::{Place, Running};
use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::pages::{Gpa, Poison, Poisoning};
use mce_relay_vmm::api::types::vm::Status;
use serde_json::Value;

const PAGES: usize = 65536;
const LEN: usize = 64 << 20;

fn start<'a>(place: &'a Place, memory: &str) -> Running<'a> {
    let mut command = place.command(&["run", "--name", "n", "--serial", "off"]);
    command.args(["--memory", memory, "--kernel"]).arg(place.path("kernel"));
    place.started(command, "mce-relay/n.sock")
}

/// A forged AR that a guest without a handler cannot be told of: exit status 6.
fn end(vm: &Running<'_>) {
    let (via, kind) = (Means::Signal, mce_relay::FailureKind::ActionRequired);
    let asked = Poison { gpas: vec![Gpa(0x3000)], via, kind, vcpu: 0 };
    let _: Vec<Poisoning> = requests::put_json(vm.socket(), "vm.poison", &asked).unwrap();
}

fn poisoning(place: &Place, more: &[&str]) -> (String, String) {
    let mut vm = start(place, "512M");
    let mut command = place.command(&["poison", "--vm", "n", "--via", "signal"]);
    command.args(["--gpa", "0x100000..0x10100000"]).args(more);
    let poison = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    vm.wait("the first pages", |vm| {
        let status = requests::get::<Status>(vm.socket(), "relay.status");
        status.is_ok_and(|status| status.pages.len() > 1000)
    });
    end(&vm);
    assert_eq!(vm.ended().code(), Some(6), "{}", place.text("stderr"));
    let out = poison.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
}

/// How the VM ended, and how many pages were not tried; not each of them with a reason of its own.
pub fn a_poison_is_over() {
    let place = Place::new(&SPIN);
    let (_, words) = poisoning(&place, &[]);
    println!("    {}", words.trim_end().replace('\n', "\n    "));
    let last = words.lines().last().unwrap();
    assert!(last.contains("has ended (exit status 6: vCPU 0 touched"), "{words}");
    assert!(last.contains("of 65536 pages ") && last.ends_with(" not tried"), "{words}");
    assert!(words.lines().count() < 5 && !words.contains("cannot reach"), "{words}");

    let (json, _) = poisoning(&place, &["--json"]);
    let pages: Vec<Value> = serde_json::from_str(&json).unwrap();
    let last = pages.last().unwrap();
    assert_eq!(pages.len(), PAGES);
    assert_eq!(last["error"], "the VM had ended before this page was reached");
}

/// It is the VM that ended, not its answer that was wrong; and of a file nothing is left.
pub fn a_dump_is_over() {
    let place = Place::new(&SPIN);
    // Data, and more than a pipe takes at once: the dump waits for its reader.
    std::fs::write(place.path("ram"), vec![0x55; LEN]).unwrap();
    let vm =
        start(&place, &format!("size={LEN},{},shared=on,lossy=on", place.argument("file", "ram")));
    let mut command = place.command(&["memory", "dump", "--vm", "n", "--raw", "-"]);
    let mut dump = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = dump.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 4096]).unwrap();
    end(&vm);
    assert_eq!(vm.ended().code(), Some(6), "{}", place.text("stderr"));
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let out = dump.wait_with_output().unwrap();
    let words = String::from_utf8(out.stderr).unwrap();
    println!("    {}", words.trim_end());
    assert_eq!(out.status.code(), Some(1));
    assert!(words.contains("has ended (exit status 6: vCPU 0 touched"), "{words}");
    assert!(!words.contains("did not answer"), "{words}");
}
