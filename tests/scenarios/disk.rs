//! A guest's disk while the memory goes bad that its requests are in: the VMM lives, a request with a bad page fails and is
//! said to have failed, and no byte is wrong, neither in what the guest reads nor in what is on the disk afterwards.

use std::time::{Duration, Instant};

use fastrand::Rng;
use mce_relay_tests::agent::PATIENCE;
use mce_relay_tests::disk_load::{BLOCK, LEN, Plan, SEED, lose_buffers, rings};
use mce_relay_tests::guest::{DiskImage, Guest, Options};
use mce_relay_tests::lab;
use mce_relay_tests::memory::{HUGE, RAM};
use mce_relay_vmm::api::types::device::{DeviceInfo, DriverState};
use mce_relay_vmm::api::types::vm::VmInfo;
use serde_json::Value;

/// How many of the buffers of the guest's program go bad.
const BUFFERS: usize = 12;

fn loses_buffers(options: &Options) {
    let plan = Plan { seconds: 15, buffers: BUFFERS, pause: (200, Rng::with_seed(SEED)) };
    lose_buffers(options, plan);
}

/// Raw, AMD.
pub fn raw_amd() {
    loses_buffers(&Options { disk: Some(DiskImage::Raw), ..Options::amd(2) });
}

/// qcow2, Intel-style.
pub fn qcow2_intel() {
    loses_buffers(&Options { disk: Some(DiskImage::Qcow2), ..Options::intel(2, true) });
}

/// Nobody is told of a page before somebody touches it: now and then the device is the first.
pub fn touched_first_by_the_device() {
    loses_buffers(&Options { disk: Some(DiskImage::Raw), ..Options::amd(2).late() });
}

/// The buffers are in huge pages, of which the guest keeps all but the bad 4 KiB: the disk finds the rest where it was.
pub fn in_huge_pages() {
    lab::set_pool("2048kB", RAM / HUGE + BUFFERS as u64);
    let memory = "size=256M,hugepages=on";
    loses_buffers(&Options { disk: Some(DiskImage::Raw), memory, ..Options::amd(2) });
    lab::set_pool("2048kB", 0);
}

/// A page of the disk's rings goes bad under load. Whoever touches it first, the guest's driver or the device, the VM lives:
/// the guest's kernel panics, as it has told that it cannot go on without this page, or the device asks for a reset. After a
/// reset the guest has its disk again, on good memory.
pub fn rings_that_go_bad() {
    let options = Options { disk: Some(DiskImage::Raw), reboot: true, ..Options::amd(2).late() };
    let mut guest = Guest::boot(&options);
    for boot in 1_u32.. {
        let devices = guest.info().devices;
        let before = devices.iter().find(|it| it.name == "virtio-blk").unwrap();
        assert_eq!(before.driver, DriverState::Working, "boot {boot}");
        let queue = before.queues.first().unwrap();
        let (part, at) = match boot {
            1 => ("descriptors", queue.descriptors),
            2 => ("available ring", queue.avail),
            3 => ("used ring", queue.used),
            _ => break,
        };
        let is_panic = |event: &&Value| event["event"] == "panicked";
        let panics = guest.events().iter().filter(is_panic).count();
        guest.agent.tell(&format!("disk-load /dev/vda {LEN} {SEED} 30"));
        guest.agent.event(|event| event["event"] == "disk-load").unwrap();
        let gpa = at & !(BLOCK as u64 - 1);
        guest.poison(gpa, "hwpoison-inject");
        let start = Instant::now();
        let end = loop {
            assert!(start.elapsed() < PATIENCE, "{part}: {:#?}", guest.events());
            // After a panic the guest resets itself.
            if guest.events().iter().filter(is_panic).count() > panics {
                break "the guest's kernel panics";
            }
            let asks = |info: VmInfo| {
                let asks = |it: &DeviceInfo| it.driver == DriverState::NeedsReset;
                info.boot == boot && info.devices.iter().any(asks)
            };
            // Between two boots there is none.
            if guest.try_info().is_some_and(asks) {
                guest.put("vm.reset");
                break "the device asks for a reset";
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        println!("    boot {boot}, {part} at {gpa:#x}: {end}");
        guest.event_where("booting", "the next boot", |event| event["boot"] == boot + 1);
        guest.up_again();
    }
    assert_eq!(guest.info().boot, 4);
    for what in ["disk-write", "disk-verify"] {
        let request = format!("{what} /dev/vda 0 {LEN} {SEED}");
        guest.agent.tell(&request);
        let done = guest.agent.reply(&request, Instant::now() + PATIENCE);
        let done = done.unwrap_or_else(|error| panic!("{what}: {error}: {}", rings(&guest)));
        assert_eq!(done["ok"], true, "{done}");
    }
    guest.power_off();
}
