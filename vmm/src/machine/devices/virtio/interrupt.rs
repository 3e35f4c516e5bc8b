//! How a device tells its driver something: the interrupt, its two causes, and DEVICE_NEEDS_RESET.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

/// What the transport and the thread of a device share from one reset of the device to the next. A thread that is late
/// has the value from before the reset, and changes nothing that the driver sees after it.
///
/// The driver reads the causes, acknowledges those that it read, and then looks at its queues and the configuration. A
/// cause that is set between its read and its acknowledgement was either not among those, and stays, or what it tells
/// of was there before the driver looks. The interrupt is an edge, after the cause.
#[derive(Debug)]
pub struct Interrupt {
    causes: AtomicU32,
    needs_reset: AtomicBool,
    /// An irqfd.
    line: Arc<EventFd>,
}

impl Interrupt {
    /// One without a cause yet, that is raised by writing to `line`.
    #[must_use]
    pub fn new(line: Arc<EventFd>) -> Self {
        Self { causes: AtomicU32::new(0), needs_reset: AtomicBool::new(false), line }
    }

    /// There are used buffers in a queue. See [`ActiveQueue::needs_interrupt`](super::queue::ActiveQueue::needs_interrupt).
    pub fn used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The device has changed its configuration space.
    pub fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The device does nothing more until the driver resets it.
    pub fn ask_for_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Whether the device has asked for a reset.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn line(&self) -> &Arc<EventFd> {
        &self.line
    }

    pub(super) fn causes(&self) -> u32 {
        self.causes.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, causes: u32) {
        self.causes.fetch_and(!causes, Ordering::SeqCst);
    }

    fn raise(&self, cause: u32) {
        self.causes.fetch_or(cause, Ordering::SeqCst);
        if let Err(error) = self.line.write(1) {
            // It is full only if KVM does not take it, and then there is an edge to come.
            log::debug!("a device's interrupt: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    /// The driver misses no cause, in whatever order both sides act.
    #[test]
    fn every_use_is_seen_by_a_driver_that_reads_acknowledges_and_looks() {
        const USES: u32 = 20_000;
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let interrupt = Arc::new(Interrupt::new(Arc::clone(&line)));
        let used = Arc::new(AtomicU32::new(0));
        let device = {
            let (interrupt, used) = (Arc::clone(&interrupt), Arc::clone(&used));
            std::thread::spawn(move || {
                for _ in 0..USES {
                    used.fetch_add(1, Ordering::SeqCst);
                    interrupt.used();
                }
            })
        };
        let mut seen = 0;
        let mut handle_one = || {
            let causes = interrupt.causes();
            interrupt.acknowledge(causes);
            if causes & VIRTIO_MMIO_INT_VRING != 0 {
                seen = used.load(Ordering::SeqCst);
            }
            seen
        };
        while !device.is_finished() {
            if line.read().is_ok() {
                handle_one();
            }
        }
        device.join().unwrap();
        while line.read().is_ok() {
            handle_one();
        }
        assert_eq!(seen, USES);
        assert_eq!(interrupt.causes(), 0);
        assert!(!interrupt.needs_reset());
        interrupt.ask_for_reset();
        assert!(interrupt.needs_reset() && line.read().is_ok());
        assert_eq!(interrupt.causes(), VIRTIO_MMIO_INT_CONFIG);
    }
}
