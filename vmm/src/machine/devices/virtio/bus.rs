//! The windows of the devices in guest-physical memory, and their ways to KVM: ioeventfds for kicks, irqfds for
//! interrupts.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::Device;
use super::transport::{Action, Transport};
use super::worker::Worker;
use crate::machine::boot::layout::{VIRTIO_START, VIRTIO_WINDOW};
use crate::machine::devices::interrupts::VIRTIO_GSI;
use crate::machine::lifecycle::VmControl;
use crate::machine::memory::DeviceMemory;
use crate::sandbox::seccomp::Filters;

/// Why a device cannot be given to a VM.
#[derive(Debug, Error)]
pub enum BusError {
    /// Its thread or its eventfds.
    #[error("virtio-{device}: cannot start it")]
    Start {
        /// Its name.
        device: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Its interrupt or its kicks.
    #[error("virtio-{device}: KVM: cannot {what}")]
    Kvm {
        /// Its name.
        device: &'static str,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// One device in its window.
#[derive(Debug)]
pub struct Window {
    transport: Mutex<Transport>,
    worker: Worker,
    pub(super) kicks: Vec<Arc<EventFd>>,
    memory: DeviceMemory,
    line: Arc<EventFd>,
}

impl Window {
    /// Puts `device` behind a window, without KVM: its interrupt is a write to [`Self::line`].
    ///
    /// # Errors
    /// There are no more threads or file descriptors.
    pub fn new(
        device: Box<dyn Device>,
        memory: &DeviceMemory,
        control: &VmControl,
        filters: &Filters,
    ) -> io::Result<Self> {
        let eventfd = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Arc::new);
        let line = eventfd()?;
        let kicks = device.queue_sizes().iter().map(|_| eventfd());
        let kicks = kicks.collect::<io::Result<Vec<_>>>()?;
        let transport = Mutex::new(Transport::new(device.as_ref(), Arc::clone(&line)));
        let worker = Worker::start(device, kicks.clone(), memory.clone(), control, filters)?;
        Ok(Self { transport, worker, kicks, memory: memory.clone(), line })
    }

    /// What is written to for each interrupt.
    #[must_use]
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// The guest reads `data.len()` bytes at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    /// The guest writes `data` at `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) {
        // Held until the device has stopped: whoever comes next finds it so.
        let mut transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
        match transport.write(offset, data, &self.memory) {
            Action::None => {}
            Action::Activate(activation) => self.worker.begin(activation),
            Action::Stop | Action::Reset => self.worker.stop(),
            Action::Notify(index) => {
                // It fails only when the counter is full, and then the thread is awake anyway.
                let _ = self.kicks.get(index).map(|kick| kick.write(1));
            }
        }
    }

    fn connect(&self, vm: &VmFd, index: u32) -> Result<(), (&'static str, kvm_ioctls::Error)> {
        let gsi = VIRTIO_GSI + index;
        vm.register_irqfd(&self.line, gsi).map_err(|error| ("register its interrupt", error))?;
        let notify = VIRTIO_START + u64::from(index) * VIRTIO_WINDOW;
        let notify = IoEventAddress::Mmio(notify + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        for (queue, kick) in (0_u32..).zip(&self.kicks) {
            vm.register_ioevent(kick, &notify, queue)
                .map_err(|error| ("register its kicks", error))?;
        }
        Ok(())
    }
}

/// All windows of a VM.
#[derive(Debug, Default)]
pub struct MmioBus {
    windows: Vec<Window>,
    /// In bytes; 0 without a device.
    len: u64,
}

impl MmioBus {
    /// Puts `devices` into windows, in this order, and connects them with `vm`. Their number is at most
    /// [`MAX_DEVICES`](crate::config::MAX_DEVICES).
    ///
    /// # Errors
    /// See [`BusError`].
    pub fn new(
        devices: Vec<Box<dyn Device>>,
        vm: &VmFd,
        memory: &DeviceMemory,
        control: &VmControl,
        filters: &Filters,
    ) -> Result<Self, BusError> {
        let mut bus = Self::default();
        for (index, device) in (0..).zip(devices) {
            let name = device.name();
            let window = Window::new(device, memory, control, filters)
                .map_err(|source| BusError::Start { device: name, source })?;
            window.connect(vm, index).map_err(|(what, source)| BusError::Kvm {
                device: name,
                what,
                source,
            })?;
            bus.windows.push(window);
            bus.len += VIRTIO_WINDOW;
        }
        Ok(bus)
    }

    /// The window at guest-physical address `gpa`, and the offset in it.
    #[inline]
    #[must_use]
    pub fn at(&self, gpa: u64) -> Option<(&Window, u64)> {
        let offset = gpa.wrapping_sub(VIRTIO_START);
        if offset >= self.len {
            return None;
        }
        let index = usize::try_from(offset / VIRTIO_WINDOW).ok()?;
        self.windows.get(index).map(|window| (window, offset % VIRTIO_WINDOW))
    }
}

#[cfg(test)]
mod tests;
