//! A guest that writes anything into the registers, the rings and the memory of virtio-blk, on a small raw disk.
#![no_main]

#[path = "../virtio.rs"]
mod virtio;

use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use mce_relay_vmm::config::{DiskConfig, ImageType};
use mce_relay_vmm::machine::devices::virtio::blk::Blk;
use mce_relay_vmm::machine::devices::virtio::blk::disk::Disk;
use virtio::{Machine, Step};

/// Length of the disk, in bytes.
const LEN: u64 = 64 << 10;

fuzz_target!(|steps: Vec<Step>| {
    // SAFETY: takes a string; the descriptor is checked by the next call, and owned by nobody else.
    let file = unsafe { std::fs::File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), 0)) };
    file.set_len(LEN).unwrap();
    let config = DiskConfig {
        path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        readonly: false,
        direct: false,
        image_type: Some(ImageType::Raw),
        id: Some("fuzz".to_owned()),
    };
    let disk = Arc::new(Mutex::new(Disk::open(&config).unwrap()));
    Machine::new(Blk::new(&disk)).run(steps, |_, _| {});
    assert_eq!(file.metadata().unwrap().len(), LEN, "a disk does not grow");
});
