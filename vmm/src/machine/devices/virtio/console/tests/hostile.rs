//! Pages of others go bad meanwhile.

use super::*;
use crate::machine::devices::virtio::testing::{lose, memory};

/// Another device meets one bad page after the other. The console's own memory is good, and no output of it is lost: an
/// attempt that was not clean says only that some page was bad, and is made again, as other devices do.
#[test]
fn output_is_not_lost_for_another_devices_bad_page() {
    const PAGES: u64 = 3000;
    const ROUNDS: usize = 100;
    let others = memory(&[(0, PAGES * 4096)]);
    for page in 0..PAGES {
        if !lose(&others, page * 4096) {
            return;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let line = line(&SerialMode::File(path.clone().into()));
    let mut driver = driver(Some(&line));
    let text = vec![b'x'; 16 << 10];
    driver.memory.write_slice(&text, GuestAddress(0x8000)).unwrap();
    let other = std::thread::spawn(move || {
        for page in 0..PAGES {
            let _ = others.read_obj::<u8>(GuestAddress(page * 4096));
            std::thread::sleep(Duration::from_micros(20));
        }
    });
    let mut printed = 0;
    for _ in 0..ROUNDS {
        // The same buffer several times.
        let before = driver.used(TRANSMIT);
        driver.add(TRANSMIT, 0, &[(0x8000, text.len() as u32, false); 15]);
        driver.wait_used(TRANSMIT, before + 1);
        printed += 15 * text.len();
        // One after the other: a line drops what nobody takes in time, which is another matter.
        let arrived = || std::fs::metadata(&path).map_or(0, |file| file.len());
        let since = std::time::Instant::now();
        while arrived() < printed as u64 {
            let waited = since.elapsed();
            assert!(waited < Duration::from_secs(2), "{} of {printed} bytes arrived", arrived());
            std::thread::yield_now();
        }
    }
    other.join().unwrap();
}
