//! Any bytes as a qcow2 image: it is refused; or every request ends, what was written is read again, and the image is as
//! sound afterwards as it was found to be.
#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use mce_relay_vmm::config::{DiskConfig, ImageType};
use mce_relay_vmm::machine::devices::virtio::blk::disk::Disk;

/// As long a request as there is, in bytes.
const LEN: u64 = 4096;
/// An image may say that the guest sees exabytes: so much at each end of it is used.
const USED: u64 = 64 << 10;

/// A panic that the disk makes an error of is none; libFuzzer's own hook ends the process before it can.
fn panics_may_be_caught() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|panic| eprintln!("{panic}"))));
}

/// Where requests go: all of a small disk, both ends of a large one.
fn places(len: u64) -> impl Iterator<Item = u64> {
    let behind = len.saturating_sub(USED) / LEN * LEN;
    let first = (0..len.min(USED)).step_by(LEN as usize);
    first.chain((behind.max(USED)..len).step_by(LEN as usize))
}

fn exercise(disk: &mut Disk) {
    let end = disk.sectors() * 512;
    for (nth, at) in places(end).enumerate() {
        let len = LEN.min(end - at) as usize;
        let (mut before, mut after) = (vec![0; len], vec![0; len]);
        let was_read = disk.read(at, &mut before).is_ok();
        let done = match nth % 4 {
            0 => disk.write(at, &vec![nth as u8 + 1; len]).map(|()| Some(nth as u8 + 1)),
            1 => disk.write_zeroes(at, len as u64, nth % 8 == 1).map(|()| Some(0)),
            2 => disk.discard(at, len as u64).map(|()| None),
            _ => {
                assert!(disk.read(at, &mut after).is_ok() == was_read, "a read changes nothing");
                assert!(!was_read || before == after, "at {at:#x} it reads something else");
                continue;
            }
        };
        if let Ok(Some(byte)) = done {
            disk.read(at, &mut after).unwrap();
            assert!(after.iter().all(|one| *one == byte), "at {at:#x} not what was written");
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    panics_may_be_caught();
    let Some((how, image)) = bytes.split_first() else { return };
    // SAFETY: takes a string; the descriptor is checked by the next call, and owned by nobody else.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), 0)) };
    file.write_all_at(image, 0).unwrap();
    let config = DiskConfig {
        path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        readonly: how & 1 == 1,
        direct: false,
        image_type: Some(ImageType::Qcow2),
        id: None,
    };
    let Ok(mut disk) = Disk::open(&config) else { return };
    exercise(&mut disk);
    let flushed = disk.flush();
    drop(disk);
    if config.readonly {
        let mut left = vec![0; image.len()];
        file.read_exact_at(&mut left, 0).unwrap();
        assert!(left == image, "an image that is only read does not change");
    }
    if flushed.is_ok() {
        Disk::open(&config).expect("it was sound");
    }
});
