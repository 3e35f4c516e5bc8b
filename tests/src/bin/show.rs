//! `make run`: the main job, for a person to watch. A guest boots, a page of its RAM goes bad on the
//! host, the relay tells the guest, and the guest's own kernel names that very page and goes on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a step that fails ends the show")]

use std::process::{Command, ExitCode};
use std::time::Instant;

use mce_relay_tests::debian::{Debian, HOST};
use mce_relay_tests::guest::{Guest, Options, has_debian, mce_relay};
use mce_relay_tests::network;

/// What run.sh chose for the lab, in words.
const EMULATOR: &str = "MCE_RELAY_LAB_EMULATOR";

fn main() -> ExitCode {
    // A step that fails is an error for a person to read; where in this program it was is of no use to them.
    std::panic::set_hook(Box::new(|info| {
        let said = info.payload().downcast_ref::<String>().map(String::as_str);
        let what = said.or(info.payload().downcast_ref().copied()).unwrap_or("a step failed");
        eprintln!("error: the show stopped here: {what}\n{}", advice());
    }));
    std::panic::catch_unwind(show).unwrap_or(ExitCode::FAILURE)
}

/// What to do when the show has failed.
fn advice() -> String {
    std::env::var(EMULATOR).map_or_else(
        |_| "`mce-relay check` says what this host lacks; `make run` without NATIVE=1 uses the lab".into(),
        |emulator| {
            format!(
                "The lab's emulator is {emulator}. The lab has been tried with QEMU 6.2, 7.2 and 8.2 without \
                 nested paging, and with 10.0 to 10.2 and 11.1 with it. LAB_QEMU=PATH has it use another QEMU (tests/peer/qemu.sh \
                 fetches one and prints its path), LAB_NPT=0 or 1 switches nested paging off or on: \
                 LAB_NPT=1 make run"
            )
        },
    )
}

fn show() -> ExitCode {
    let native = std::env::var("MCE_RELAY_NATIVE").is_ok_and(|value| value == "1");
    if native {
        println!(
            "This poisons one page (4 KiB) of this host's own memory, under a guest that is started\n\
             for it. The host's kernel takes the page out of use and logs a memory failure; afterwards\n\
             it is asked to take it back (unpoison), which it refuses once it has seen a real hardware\n\
             error. Needs root and the hwpoison-inject module.\n"
        );
        // It is in most distributions' kernels, but loaded by nobody. What is missing after that is
        // said by the check below.
        let _ = Command::new("modprobe").arg("hwpoison-inject").status();
    }
    let check = mce_relay(&["check"]);
    if !check.status.success() {
        print!("{}", String::from_utf8_lossy(&check.stdout));
        return ExitCode::FAILURE;
    }

    let vendor = std::env::var("MCE_RELAY_VENDOR").unwrap_or_else(|_| "intel".to_owned());
    let options = match vendor.as_str() {
        "intel" => Options::intel(2, true),
        "amd" => Options::amd(2),
        other => {
            eprintln!("VENDOR={other} is not a vendor; expected intel or amd");
            return ExitCode::from(2);
        }
    };
    match std::env::var("MCE_RELAY_GUEST").as_deref() {
        Ok("debian") => return debian(Options { ao_channel: "mce", ..options }),
        Ok("small") | Err(_) => {}
        Ok(other) => {
            eprintln!("GUEST={other} is not a guest; expected small or debian");
            return ExitCode::from(2);
        }
    }
    let start = Instant::now();
    println!("== A Linux guest boots: {vendor}-style, 2 vCPUs, 256 MiB. This takes some seconds.");
    let booted = Guest::try_boot(&Options { echo: true, ao_channel: "auto", ..options });
    let mut guest = match booted {
        Ok(guest) => guest,
        Err(error) => {
            let seconds = start.elapsed().as_secs();
            eprintln!(
                "error: two guests were started in {seconds} s, and neither came up: {error}\n{}",
                advice()
            );
            return ExitCode::FAILURE;
        }
    };
    println!("== Its agent is there after {:.0} s.", start.elapsed().as_secs_f64());
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[3];
    println!(
        "== The agent owns 8 pages. One of them, at guest-physical {:#x} (pfn {:#x}), goes bad now.",
        bad.gpa,
        bad.gpa >> 12
    );
    let poisoned = guest.poison(bad.gpa, "hwpoison-inject");
    println!(
        "== Poisoned on the host: GPA {} = HVA {} of the VMM = host pfn {}.",
        poisoned["gpa"].as_str().unwrap(),
        poisoned["hva"].as_str().unwrap(),
        poisoned["pfn"].as_str().unwrap()
    );
    let line = guest.agent.memory_failure(bad);
    let sigbus = guest.agent.sigbus_ao(bad);
    guest.event("acknowledged", bad);
    guest.agent.others_intact(&pages, &[bad]);
    println!("\n== The guest's own kernel log, with pfn {:#x} in it:", bad.gpa >> 12);
    println!("   {line}");
    println!(
        "== The process that owns the page: SIGBUS BUS_MCEERR_{} at {}, lsb {}; its 7 other pages are intact.",
        sigbus["code"].as_str().unwrap(),
        sigbus["addr"].as_str().unwrap(),
        sigbus["lsb"]
    );
    println!("== The relay's ledger (mce-relay status):");
    let status = guest.command("status", &[]);
    print!("{}", String::from_utf8_lossy(&status.stdout));
    assert!(line.contains(&format!("{:#x}", bad.gpa >> 12)));
    guest.power_off();
    println!(
        "== The guest has powered off by itself. {:.0} s in all.",
        start.elapsed().as_secs_f64()
    );
    ExitCode::SUCCESS
}

/// The Debian guest: what its kernel, rasdaemon and the journal say of a page of a running program.
fn debian(options: Options) -> ExitCode {
    if let Err(error) = has_debian() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    network::with_a_tap(HOST, move || {
        let start = Instant::now();
        let vendor = options.vendor;
        println!(
            "== Debian boots from its disk: {vendor}-style, 2 vCPUs, 512 MiB, with disk, net and vsock. This takes a minute or two."
        );
        let mut debian = Debian::boot(options);
        println!(
            "== It is up after {:.0} s. sshd says: {}",
            start.elapsed().as_secs_f64(),
            debian.services()
        );
        if vendor == "amd" {
            // An AMD guest finds the record when it polls its banks: every five minutes, if nobody says otherwise.
            debian.guest.agent.ask("interval 1");
        }
        let bad = debian.over_vsock.alloc("anon", 8)[3];
        println!(
            "== Its agent, asked over vsock, owns 8 pages. One of them, at guest-physical {:#x} (pfn {:#x}), goes bad now.",
            bad.gpa,
            bad.gpa >> 12
        );
        debian.guest.poison(bad.gpa, "hwpoison-inject");
        debian.over_vsock.sigbus_ao(bad);
        debian.guest.event("acknowledged", bad);
        println!(
            "== The agent's process has had its SIGBUS (AO). rasdaemon's own record (ras-mc-ctl --errors):"
        );
        debian.recorded(bad);
        print!("{}", indented(&debian.run("ras-mc-ctl --errors")));
        println!("== The guest's kernel (dmesg):");
        print!("{}", indented(&debian.run("dmesg | grep -E 'Hardware Error|Memory failure'")));
        println!("== The journal of rasdaemon (journalctl -u rasdaemon):");
        print!(
            "{}",
            indented(&debian.run("journalctl -u rasdaemon -o cat --no-pager | tail -n 12"))
        );
        println!("== The relay's ledger (mce-relay status):");
        print!(
            "{}",
            indented(&String::from_utf8_lossy(&debian.guest.command("status", &[]).stdout))
        );
        println!("== systemd, rasdaemon and sshd live. Its power button is pressed.");
        debian.services();
        debian.shut_down();
        println!(
            "== The guest has shut down in order. {:.0} s in all.",
            start.elapsed().as_secs_f64()
        );
        ExitCode::SUCCESS
    })
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("   {line}\n")).collect()
}
