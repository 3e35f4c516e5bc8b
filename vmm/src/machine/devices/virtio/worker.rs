//! The thread of a device: it waits for kicks, for what the device waits for, and for orders of the vCPUs.
//!
//! It is made when the VM is built, as a vCPU's thread may make none, and lives until the VM is dropped; the driver
//! may begin and reset the device as often as it likes meanwhile. A reset is over when the device has stopped. While
//! the VM is paused the thread is parked, as a vCPU is, and still takes the order to stop.

use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Active, Device, DeviceError, Turn, Wait};
use super::panics;
use super::transport::Activation;
use crate::machine::lifecycle::VmControl;
use crate::machine::lifecycle::seat::Seat;
use crate::machine::memory::DeviceMemory;
use crate::sandbox::seccomp::Filters;

/// How many failures of a device are told in one boot: a guest can cause as many as it likes.
const MOST_WARNINGS: u32 = 8;

/// What the vCPUs want of the thread.
#[derive(Debug, Default)]
struct Orders {
    begin: Option<Activation>,
    /// Until the device has stopped.
    stop: bool,
    end: bool,
    /// The thread is gone, and so the device has stopped for good.
    gone: bool,
}

#[derive(Debug)]
struct Desk {
    orders: Mutex<Orders>,
    stopped: Condvar,
    wake: Arc<EventFd>,
}

impl Desk {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        // Each change is whole.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, give: impl FnOnce(&mut Orders)) -> MutexGuard<'_, Orders> {
        let mut orders = self.orders();
        give(&mut orders);
        // It fails only when the counter is full, and then the thread is awake anyway.
        let _ = self.wake.write(1);
        orders
    }
}

/// A device's thread, as the vCPUs' threads see it. Dropping it ends the thread.
#[derive(Debug)]
pub struct Worker {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread of `device`, which is kicked by `kicks`, one for each of its queues.
    ///
    /// # Errors
    /// There are no more threads or file descriptors.
    pub fn start(
        device: Box<dyn Device>,
        kicks: Vec<Arc<EventFd>>,
        memory: DeviceMemory,
        control: &VmControl,
        filters: &Filters,
    ) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let seat = Seat::take(control, Arc::clone(&wake));
        let (orders, stopped) = (Mutex::default(), Condvar::new());
        let desk = Arc::new(Desk { orders, stopped, wake });
        let (role, name) = (device.role(), format!("virtio-{}", device.name()));
        let runner = Runner {
            pending: vec![false; kicks.len()],
            device,
            kicks,
            memory,
            desk: Arc::clone(&desk),
            seat,
            parked: false,
            begin: None,
            active: None,
            failed: false,
            warnings: 0,
        };
        let thread = Some(filters.spawn(role, name, move || runner.run())?);
        Ok(Self { desk, thread })
    }

    /// Has the device begin to work, soon.
    pub fn begin(&self, activation: Activation) {
        drop(self.desk.order(|orders| orders.begin = Some(activation)));
    }

    /// Has the device stop, and returns when it has.
    pub fn stop(&self) {
        let orders = self.desk.order(|orders| {
            orders.begin = None;
            orders.stop = true;
        });
        let waits = |orders: &mut Orders| orders.stop && !orders.gone;
        drop(self.desk.stopped.wait_while(orders, waits));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.desk.order(|orders| orders.end = true));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of a virtio device panicked");
        }
    }
}

/// What is on the thread.
struct Runner {
    device: Box<dyn Device>,
    kicks: Vec<Arc<EventFd>>,
    memory: DeviceMemory,
    desk: Arc<Desk>,
    seat: Seat,
    parked: bool,
    /// What to begin with when the VM is not paused.
    begin: Option<Activation>,
    active: Option<Active>,
    /// It waits for a reset, and may have something to do meanwhile.
    failed: bool,
    /// The queues that may have requests.
    pending: Vec<bool>,
    warnings: u32,
}

impl Drop for Runner {
    fn drop(&mut self) {
        // Also when a panic unwinds: a vCPU that waits for a stop must not wait for ever.
        self.desk.orders().gone = true;
        self.desk.stopped.notify_all();
    }
}

impl Runner {
    fn run(mut self) {
        panics::be_brief();
        while self.obey() {
            self.park_or_go_on();
            if !self.parked {
                self.work();
            }
            self.wait();
        }
    }

    /// Takes the orders; false at the end.
    fn obey(&mut self) -> bool {
        let desk = Arc::clone(&self.desk);
        let mut orders = desk.orders();
        if orders.stop || orders.end {
            drop(orders);
            self.begin = None;
            self.stop();
            orders = desk.orders();
            orders.stop = false;
            desk.stopped.notify_all();
        }
        if let Some(activation) = orders.begin.take() {
            self.begin = Some(activation);
        }
        !orders.end
    }

    fn park_or_go_on(&mut self) {
        if !self.parked && !self.seat.may_work() {
            self.guarded(|device, active| device.pause(active));
            self.seat.park();
            self.parked = true;
        } else if self.parked && self.seat.go_on() {
            self.parked = false;
            self.guarded(|device, active| device.resume(active));
        }
    }

    /// One turn of each queue that may have requests.
    fn work(&mut self) {
        if let Some(activation) = self.begin.take() {
            self.begin_with(activation);
        }
        for index in 0..self.pending.len() {
            let kicked = self.active.as_ref().is_some_and(|active| has_queue(active, index))
                && std::mem::take(&mut self.pending[index]);
            if kicked {
                let turn = self.guarded(|device, active| device.kicked(index, active));
                self.pending[index] = turn == Some(Turn::Again);
            }
        }
    }

    fn begin_with(&mut self, activation: Activation) {
        let active = activation.into_active(self.memory.clone(), &self.kicks);
        for (index, queue) in active.queues.iter().enumerate() {
            let Some(queue) = queue.as_ref().map(|queue| queue.queue()) else { continue };
            log::debug!(
                "virtio-{}: queue {index} has {} descriptors at {:#x}, its driver's ring at {:#x}, the device's at {:#x}",
                self.device.name(),
                queue.size(),
                queue.desc_table(),
                queue.avail_ring(),
                queue.used_ring()
            );
        }
        self.active = Some(active);
        // The driver may have kicked before.
        self.pending.fill(true);
        self.guarded(|device, active| device.activate(active));
    }

    /// Has the active device do something. If that fails it works no more until it is reset.
    fn guarded<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Device, &mut Active) -> Result<T, DeviceError>,
    ) -> Option<T> {
        let Self { device, active: Some(active), .. } = self else { return None };
        // What a panic leaves half done is the device's own: it is stopped, and used no more before that.
        let done = catch_unwind(AssertUnwindSafe(|| call(device.as_mut(), active)));
        let error = match done {
            Ok(Ok(value)) => return Some(value),
            Ok(Err(error)) => error,
            Err(panic) => DeviceError::Panicked(words_of(panic.as_ref())),
        };
        active.interrupt.ask_for_reset();
        self.warn(&error);
        self.stop();
        self.failed = true;
        None
    }

    fn stop(&mut self) {
        self.active = None;
        self.failed = false;
        self.pending.fill(false);
        let device = &mut self.device;
        if catch_unwind(AssertUnwindSafe(|| device.stop())).is_err() {
            log::error!("virtio-{}: it panicked while it was stopped", device.name());
        }
    }

    fn warn(&mut self, error: &DeviceError) {
        self.warnings = self.warnings.saturating_add(1);
        let (name, error) = (self.device.name(), crate::words::with_causes(error));
        match self.warnings {
            ..MOST_WARNINGS => log::warn!("virtio-{name} stops until the guest resets it: {error}"),
            MOST_WARNINGS => log::warn!(
                "virtio-{name} stops until the guest resets it: {error}; this is not told again before the guest \
                 starts over"
            ),
            _ => log::debug!("virtio-{name} stops: {error}"),
        }
    }

    /// Whether there is an order that does not wait.
    fn is_asked(&self) -> bool {
        let orders = self.desk.orders();
        orders.stop || orders.end || !self.seat.may_work()
    }

    /// The same for a device that waits for a reset. After an error or a panic it has nothing to do any more.
    fn after_failure<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Device) -> io::Result<T>,
    ) -> Option<T> {
        let device = &mut self.device;
        let done = catch_unwind(AssertUnwindSafe(|| call(device.as_mut())));
        let error = match done {
            Ok(Ok(value)) => return Some(value),
            Ok(Err(error)) => error,
            Err(panic) => io::Error::other(format!("it panicked: {}", words_of(panic.as_ref()))),
        };
        log::debug!(
            "virtio-{} does nothing more until the guest resets it: {error}",
            self.device.name()
        );
        self.failed = false;
        None
    }

    /// What the device waits for beside its kicks.
    fn own_waits(&mut self) -> Vec<Wait> {
        let mut own = Vec::new();
        self.guarded(|device, _| {
            device.waits_for(&mut own);
            Ok(())
        });
        if self.failed {
            own.clear();
            self.after_failure(|device| {
                device.waits_for_when_failed(&mut own);
                Ok(())
            });
        }
        own
    }

    /// Waits for something to do, and takes note of the kicks.
    fn wait(&mut self) {
        let mut waits = vec![Wait { fd: self.desk.wake.as_raw_fd(), events: libc::POLLIN }];
        let mut kicks = Vec::new();
        if !self.parked {
            let own = self.own_waits();
            if let Some(active) = &self.active {
                for (index, kick) in self.kicks.iter().enumerate() {
                    if has_queue(active, index) {
                        waits.push(Wait { fd: kick.as_raw_fd(), events: libc::POLLIN });
                        kicks.push(index);
                    }
                }
            }
            waits.extend(own);
        }
        let at_once = !self.parked && self.active.is_some() && self.pending.contains(&true);
        let Some(ready) = poll(&waits, at_once) else { return };
        if ready.first().is_some_and(|wait| wait.events != 0) {
            let _ = self.desk.wake.read();
        }
        for (index, _) in kicks.iter().zip(&ready[1..]).filter(|(_, wait)| wait.events != 0) {
            let _ = self.kicks[*index].read();
            self.pending[*index] = true;
        }
        for wait in ready.into_iter().skip(1 + kicks.len()).filter(|wait| wait.events != 0) {
            // An order waits for one call. What else is ready is so the next time.
            if self.is_asked() {
                break;
            }
            if self.failed {
                self.after_failure(|device| device.ready_when_failed(wait));
            } else if self.guarded(|device, active| device.ready(wait, active)) == Some(Turn::Again)
            {
                self.pending.fill(true);
            }
        }
    }
}

fn has_queue(active: &Active, index: usize) -> bool {
    matches!(active.queues.get(index), Some(Some(_)))
}

/// What a panic said.
fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// Waits until one of `waits` is ready, or not at all. Returns them with what was found; `None` if a signal came.
fn poll(waits: &[Wait], at_once: bool) -> Option<Vec<Wait>> {
    let pollfd = |wait: &Wait| libc::pollfd { fd: wait.fd, events: wait.events, revents: 0 };
    let mut fds: Vec<libc::pollfd> = waits.iter().map(pollfd).collect();
    let timeout = if at_once { 0 } else { -1 };
    // SAFETY: the array is valid and as long as said.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
    let found = |fd: libc::pollfd| Wait { fd: fd.fd, events: fd.revents };
    (ready >= 0).then(|| fds.into_iter().map(found).collect())
}

#[cfg(test)]
mod tests;
