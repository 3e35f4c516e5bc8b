//! Many descriptors at once.

use std::time::Instant;

use super::*;

/// How many descriptors are ready, and how long a device is busy with each.
const MANY: usize = 60;
const EACH: Duration = Duration::from_millis(20);

/// Always has something at each of its descriptors, as vsock has while many programs of the host's write and the guest takes
/// all of it: a turn of 256 buffers of 64 KiB for each.
struct Busy {
    fds: Vec<EventFd>,
    calls: Arc<AtomicU32>,
}

impl Device for Busy {
    fn id(&self) -> u32 {
        77
    }

    fn name(&self) -> &'static str {
        "busy"
    }

    fn role(&self) -> Role {
        Role::VirtioRng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[SIZE]
    }

    fn kicked(&mut self, _: usize, _: &mut Active) -> Result<Turn, DeviceError> {
        Ok(Turn::Done)
    }

    fn waits_for(&self, waits: &mut Vec<Wait>) {
        let wait = |fd: &EventFd| Wait { fd: fd.as_raw_fd(), events: libc::POLLIN };
        waits.extend(self.fds.iter().map(wait));
    }

    fn ready(&mut self, _: Wait, _: &mut Active) -> Result<Turn, DeviceError> {
        let since = Instant::now();
        while since.elapsed() < EACH {
            std::hint::spin_loop();
        }
        self.calls.fetch_add(1, Ordering::SeqCst);
        Ok(Turn::Done)
    }
}

/// A reset and a pause wait for one call of the device's, as is said of `Device`, and not for one for each descriptor.
#[test]
fn an_order_waits_for_one_call_and_not_for_all_that_are_ready() {
    let calls = Arc::new(AtomicU32::new(0));
    let fds: Vec<EventFd> =
        (0..MANY).map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap()).collect();
    fds.iter().for_each(|fd| fd.write(1).unwrap());
    let driver = Driver::ready(Box::new(Busy { fds, calls: Arc::clone(&calls) }), 1);
    eventually("work", || calls.load(Ordering::SeqCst) > 0);
    let before = calls.load(Ordering::SeqCst);
    driver.write(VIRTIO_MMIO_STATUS, 0);
    let more = calls.load(Ordering::SeqCst) - before;
    assert!(more <= 2, "a vCPU that resets the device waited for {more} calls of {EACH:?} each");
}
