//! virtio devices: the drivers of a guest's own kernel find them and use them, and do so again after a reset.

use std::time::{Duration, Instant};

use mce_relay_tests::agent::{PATIENCE, hex};
use mce_relay_tests::guest::{Guest, Options};
pub(crate) use mce_relay_tests::line::Line;
use mce_relay_vmm::api::types::device::DriverState;

/// The guest reads random bytes and writes lines to its console and reads them, before and after it
/// resets itself; and again after its driver was taken away and came back.
pub fn random_bytes_and_a_console() {
    let mut guest = Guest::boot(&Options { virtio: true, reboot: true, ..Options::amd(2) });
    let mut shell = Line::at(&guest.path("shell"));
    let mut console = Line::at(&guest.path("hvc"));
    for boot in 1..=2 {
        shell.wait_for("a shell");
        let source = shell.run("cat /sys/class/misc/hw_random/rng_current");
        assert!(source.contains("virtio_rng"), "{source}");
        let read = "head -c 256 /dev/hwrng | md5sum";
        let (one, two) = (shell.run(read), shell.run(read));
        println!(
            "    boot {boot}: {}",
            two.lines().find(|line| line.contains("  -")).unwrap_or(&two)
        );
        assert_ne!(one, two, "random bytes");

        shell.run("stty -F /dev/hvc0 raw -echo");
        shell.run(&format!("echo \"from the guest, boot {boot}\" >/dev/hvc0"));
        console.wait_for(&format!("from the guest, boot {boot}"));
        // Longer than a queue of single bytes.
        shell.run("yes 0123456789abcdef | head -n 100 >/dev/hvc0; echo that\\ is all >/dev/hvc0");
        let long = console.wait_for("that is all");
        assert_eq!(long.matches("0123456789abcdef").count(), 100);
        console.write(&format!("from the host, boot {boot}\n"));
        let got = shell.run("head -n 1 /dev/hvc0");
        assert!(got.contains(&format!("from the host, boot {boot}")), "{got}");

        let driver = "/sys/bus/virtio/drivers/virtio_rng";
        let again = format!(
            "cd {driver}; d=$(echo virtio*); echo $d >unbind; echo $d >bind; cd /; head -c 100 /dev/hwrng | wc -c"
        );
        assert!(shell.run(&again).contains("100"), "the driver comes back");

        if boot == 1 {
            pause_and_resume(&guest, &mut shell, &mut console);
            shell.write("reboot -f\n");
            guest.event_where("booting", "the next boot", |event| event["boot"] == 2);
            guest.up_again();
        }
    }
    guest.power_off();
}

/// A page goes bad that the console's rings are in, and the device is the first to touch it: it asks for a reset, the VM
/// lives, the guest is told of the page, and after a reset of the guest the device has good memory.
pub fn rings_that_go_bad() {
    let options = Options { virtio: true, reboot: true, ..Options::amd(2).late() };
    let mut guest = Guest::boot(&options);
    let mut shell = Line::at(&guest.path("shell"));
    let mut console = Line::at(&guest.path("hvc"));
    let mut lost = Vec::new();
    for (boot, part) in (1_u64..).zip(["descriptors", "used ring", "nothing"]) {
        shell.wait_for("a shell");
        shell.run("stty -F /dev/hvc0 raw -echo");
        console.write("still here\n");
        let got = shell.run("head -n 1 /dev/hvc0");
        assert!(got.contains("still here"), "{got}");
        let of =
            || guest.info().devices.into_iter().find(|it| it.name == "virtio-console").unwrap();
        let before = of();
        assert_eq!(before.driver, DriverState::Working, "boot {boot}");
        // What comes from the host goes through the first queue, which waits until then.
        let queue = before.queues.iter().find(|queue| queue.index == 0).unwrap();
        let at = match part {
            "descriptors" => queue.descriptors,
            "used ring" => queue.used,
            _ => break,
        };
        let gpa = at & !4095;
        guest.poison(gpa, "hwpoison-inject");
        console.write("and one more\n");
        let start = Instant::now();
        while of().driver != DriverState::NeedsReset {
            assert!(
                start.elapsed() < PATIENCE,
                "{part}: the device does not ask for a reset: {:?}",
                of()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        let entry = loop {
            let entry = guest.pages().into_iter().find(|page| hex(&page["gpa"]) == gpa);
            if let Some(entry) = entry.filter(|page| page["state"] == "injected") {
                break entry;
            }
            assert!(start.elapsed() < PATIENCE, "{part}: {:?}", guest.pages());
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(entry["found_by"], "access", "{entry}");
        assert!(shell.run("echo lives").contains("lives"), "the guest goes on");
        println!("    boot {boot}, {part} at {gpa:#x}: the device asks for a reset; {entry}");
        lost.push(gpa);
        guest.put("vm.reset");
        guest.event_where("booting", "the next boot", |event| event["boot"] == boot + 1);
        guest.up_again();
    }
    assert_eq!(lost.len(), 2);
    assert!(guest.pages().is_empty(), "after a reset all memory is good: {:?}", guest.pages());
    guest.power_off();
}

/// A pause is over when the devices are idle, too. What the host writes meanwhile waits.
fn pause_and_resume(guest: &Guest, shell: &mut Line, console: &mut Line) {
    for round in 0..3 {
        shell.write(
            "head -n 1 /dev/hvc0; cat /dev/hwrng | head -c 2000 >/dev/null; echo read\\ on\n",
        );
        let out = guest.command("pause", &[]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        console.write(&format!("round {round}\n"));
        let out = guest.command("resume", &[]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let got = shell.wait_for("read on");
        assert!(got.contains(&format!("round {round}")), "{got}");
    }
}
