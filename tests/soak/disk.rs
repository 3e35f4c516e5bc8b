//! Random poison under a disk's requests, for MCE_RELAY_SOAK_MINUTES each.

use std::time::{Duration, Instant};

use fastrand::Rng;
use mce_relay_tests::agent::hex;
use mce_relay_tests::debian::{Debian, HOST};
use mce_relay_tests::disk_load::{Plan, lose_buffers};
use mce_relay_tests::guest::{DiskImage, Options};
use mce_relay_tests::network;

use crate::soak::number;

/// One guest's part of the time. Each buffer that is lost costs the lab a page.
const SECONDS: u64 = 100;

fn random() -> (Duration, Rng) {
    let minutes = number("MCE_RELAY_SOAK_MINUTES").unwrap_or(10);
    let seed = number("MCE_RELAY_SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("    {minutes} minutes; the same again: MCE_RELAY_SOAK_SEED={seed}");
    (Duration::from_secs(60 * minutes), Rng::with_seed(seed))
}

/// Buffers of reads and writes go bad at random moments, told early or touched first by whoever it is: nothing is wrong in
/// what the guest reads and in what is on the disk.
pub fn buffers() {
    let (time, mut random) = random();
    let end = Instant::now() + time;
    let mut all = 0;
    while Instant::now() < end {
        let image = if random.bool() { DiskImage::Raw } else { DiskImage::Qcow2 };
        let guest = if random.bool() { Options::amd(2) } else { Options::intel(2, true) };
        let guest = if random.bool() { guest.late() } else { guest };
        println!("    {} {image:?}, --mce-kill {}", guest.vendor, guest.kill);
        let pause = (random.u64(50..1000), Rng::with_seed(random.u64(..)));
        let plan = Plan { seconds: SECONDS, buffers: 500, pause };
        all += lose_buffers(&Options { disk: Some(image), ..guest }, plan);
    }
    println!("    {all} buffers went bad");
    assert!(all > 20);
}

/// fio writes and verifies in a Debian guest while pages of its processes go bad: it ends well or is killed, and never
/// finds a wrong byte; the guest's services live.
pub fn fio_in_debian() {
    const FIO: &str = "fio --name=v --filename=/var/tmp/v --size=8M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio \
                       --iodepth=8 --verify=crc32c --do_verify=1 --verify_fatal=1 --output=/tmp/fio";
    let (time, mut random) = random();
    network::with_a_tap(HOST, move || {
        let mut debian = Debian::boot(Options::intel(2, true));
        let end = Instant::now() + time;
        let (mut whole, mut killed, mut lost) = (0, 0, 0);
        while Instant::now() < end || whole == 0 {
            debian.run(&format!(
                "rm -f /tmp/ended; ({FIO} >/tmp/said 2>&1; echo $? >/tmp/ended) & true"
            ));
            // Every other one is left alone: it finds what the one before has left.
            let may_poison = Instant::now() < end && (whole + killed) % 2 == 0;
            let mut ended = String::new();
            while ended.is_empty() {
                if may_poison {
                    std::thread::sleep(Duration::from_millis(random.u64(..4000)));
                    let process = debian.over_vsock.try_to_ask("process fio 256");
                    let pages = process["pages"].as_array().cloned().unwrap_or_default();
                    if !pages.is_empty() {
                        let gpa = hex(&pages[random.usize(..pages.len())]["gpa"]);
                        debian.guest.poison(gpa, "hwpoison-inject");
                        lost += 1;
                    }
                }
                ended = debian.run("cat /tmp/ended 2>/dev/null || true").trim().to_owned();
            }
            let said = debian.run("cat /tmp/said /tmp/fio 2>/dev/null || true");
            assert!(
                !said.contains("verify:") && !said.contains("bad "),
                "fio has found a wrong byte: {said}"
            );
            match ended.as_str() {
                "0" => whole += 1,
                _ => killed += 1,
            }
        }
        println!(
            "    {lost} pages of fio's went bad: {killed} runs of it were ended by that, {whole} were whole"
        );
        println!("    {}", debian.services());
        assert!(whole > 0 && lost > 0);
        debian.shut_down();
    });
}
