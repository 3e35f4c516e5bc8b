//! virtio devices: the drivers of a guest's own kernel find them and use them, and do so again after a reset.

use mce_relay_tests::guest::{Guest, Options};
pub(crate) use mce_relay_tests::line::Line;

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
