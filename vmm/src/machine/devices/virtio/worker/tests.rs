#![allow(clippy::cast_possible_truncation, reason = "the numbers are small")]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::devices::virtio::device::Served;
use crate::machine::devices::virtio::testing::{Driver, SIZE, eventually};
use crate::machine::lifecycle::reasons::{ExitReason, Parked};
use crate::sandbox::role::Role;

mod hostile;

/// What a test sees of its device, and what the device is to do.
#[derive(Debug, Default)]
struct Told {
    served: AtomicU32,
    stops: AtomicU32,
    pauses: AtomicU32,
    resumes: AtomicU32,
    panics: AtomicBool,
    fails: AtomicBool,
    panics_in_a_wait: AtomicBool,
    /// It takes its first queue for itself.
    takes: AtomicBool,
    /// It is within a call.
    works: AtomicBool,
}

/// Writes its count of requests into each.
struct Counting(Arc<Told>);

impl Device for Counting {
    fn id(&self) -> u32 {
        77
    }

    fn name(&self) -> &'static str {
        "counting"
    }

    fn role(&self) -> Role {
        Role::VirtioRng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[SIZE, SIZE]
    }

    fn activate(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        if self.0.takes.load(Ordering::SeqCst) {
            active.queues[0] = None;
        }
        Ok(())
    }

    fn kicked(&mut self, index: usize, active: &mut Active) -> Result<Turn, DeviceError> {
        let told = &self.0;
        told.works.store(true, Ordering::SeqCst);
        let turn = active.serve(index, |memory, request| {
            let count = told.served.fetch_add(1, Ordering::SeqCst);
            assert!(!told.panics.load(Ordering::SeqCst), "as the test wants it");
            if told.fails.load(Ordering::SeqCst) {
                let source = io::ErrorKind::Other.into();
                return Err(DeviceError::Host { what: "do it", source });
            }
            let written = request.write(memory, 0, &count.to_le_bytes()).unwrap_or(0);
            Ok(Served::Done(written as u32))
        });
        told.works.store(false, Ordering::SeqCst);
        turn
    }

    fn waits_for(&self, _: &mut Vec<Wait>) {
        assert!(!self.0.panics_in_a_wait.load(Ordering::SeqCst), "as the test wants it");
    }

    fn pause(&mut self, _: &mut Active) -> Result<(), DeviceError> {
        self.0.pauses.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&mut self, _: &mut Active) -> Result<(), DeviceError> {
        self.0.resumes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn stop(&mut self) {
        self.0.stops.fetch_add(1, Ordering::SeqCst);
        self.0.works.store(false, Ordering::SeqCst);
    }
}

fn counting() -> (Driver, Arc<Told>) {
    let told = Arc::new(Told::default());
    (Driver::ready(Box::new(Counting(Arc::clone(&told))), 1), told)
}

const BUFFER: [(u64, u32, bool); 1] = [(0x8000, 4, true)];

#[test]
fn requests_come_back_and_interrupt() {
    let (mut driver, _) = counting();
    for nth in 0..u32::from(SIZE) * 3 {
        driver.add(0, (nth % u32::from(SIZE)) as u16, &BUFFER);
        driver.wait_used(0, nth as u16 + 1);
        let count: u32 = driver.memory.read_obj(GuestAddress(0x8000)).unwrap();
        assert_eq!(count, nth);
        eventually("an interrupt", || driver.take_interrupt() == Some(1));
    }
    assert!(!driver.needs_reset());
}

#[test]
fn a_reset_returns_when_the_device_has_stopped_and_it_begins_anew() {
    let (mut driver, told) = counting();
    for round in 1..50 {
        (0..SIZE).for_each(|head| driver.add(0, head, &BUFFER));
        driver.kick(0);
        driver.write(VIRTIO_MMIO_STATUS, 0);
        // Nothing is touched from here on.
        assert!(!told.works.load(Ordering::SeqCst));
        let served = told.served.load(Ordering::SeqCst);
        let used = driver.used(0);
        driver.kick(0);
        assert_eq!(told.stops.load(Ordering::SeqCst), round * 2);
        assert_eq!((told.served.load(Ordering::SeqCst), driver.used(0)), (served, used));
        driver.set_up(1);
        driver.add(0, 0, &BUFFER);
        driver.wait_used(0, 1);
    }
}

#[test]
fn a_paused_vm_has_idle_devices() {
    let (mut driver, told) = counting();
    for round in 1..20 {
        driver.add(0, 0, &BUFFER);
        driver.kick(0);
        assert_eq!(driver.control.pause(), Parked::All);
        let used = driver.used(0);
        driver.add(0, 1, &BUFFER);
        driver.kick(0);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(driver.used(0), used, "while paused");
        driver.control.resume();
        eventually("going on", || driver.used(0) == 2 * round);
    }
    assert!(told.pauses.load(Ordering::SeqCst) > 0 && told.resumes.load(Ordering::SeqCst) > 0);
}

#[test]
fn a_driver_resets_the_device_of_a_paused_vm() {
    let (mut driver, _) = counting();
    assert_eq!(driver.control.pause(), Parked::All);
    driver.set_up(1);
    driver.add(0, 0, &BUFFER);
    driver.kick(0);
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(driver.used(0), 0);
    driver.control.resume();
    eventually("the request", || driver.used(0) == 1);
}

#[test]
fn an_error_or_a_panic_is_the_devices_alone() {
    for which in 0..3 {
        let (mut driver, told) = counting();
        let trouble = [&told.panics, &told.fails, &told.panics_in_a_wait][which];
        // More often than it is told of.
        for _ in 0..MOST_WARNINGS + 2 {
            trouble.store(true, Ordering::SeqCst);
            driver.add(0, 0, &BUFFER);
            driver.kick(0);
            eventually("a wish to be reset", || driver.needs_reset());
            let cause = || driver.read(VIRTIO_MMIO_INTERRUPT_STATUS) & 2 == 2;
            eventually("an interrupt", cause);
            driver.kick(0);
            trouble.store(false, Ordering::SeqCst);
            driver.set_up(1);
            assert!(!driver.needs_reset());
            driver.add(0, 0, &BUFFER);
            driver.wait_used(0, 1);
        }
    }
}

#[test]
fn a_driver_that_never_stops_adding_does_not_keep_a_reset_waiting() {
    let (mut driver, _) = counting();
    (0..SIZE).for_each(|head| driver.add(0, head, &BUFFER));
    let adding = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // As far ahead as it may be, whatever the device does.
            while adding.load(Ordering::SeqCst) {
                driver.set_avail_index(0, driver.used(0).wrapping_add(SIZE));
                driver.kick(0);
            }
        });
        eventually("work", || driver.used(0) > 1000);
        driver.write(VIRTIO_MMIO_STATUS, 0);
        adding.store(false, Ordering::SeqCst);
    });
    assert_eq!(driver.status(), 0);
}

#[test]
fn the_kicks_of_a_queue_that_the_device_took_are_not_taken_from_it() {
    let told = Arc::new(Told::default());
    told.takes.store(true, Ordering::SeqCst);
    let mut driver = Driver::ready(Box::new(Counting(Arc::clone(&told))), 2);
    // The second queue shows that the thread has looked.
    for nth in 0..10 {
        driver.add(0, 0, &BUFFER);
        driver.kick(0);
        driver.add(1, 0, &BUFFER);
        driver.wait_used(1, nth + 1);
    }
    assert_eq!((told.served.load(Ordering::SeqCst), driver.used(0)), (10, 0));
    assert_eq!(driver.window.kicks[0].read().unwrap(), 10);
}

#[test]
fn the_end_of_the_vm_leaves_the_device_idle_and_its_thread_ends() {
    let (mut driver, told) = counting();
    driver.control.stop(ExitReason::PowerOff);
    std::thread::sleep(Duration::from_millis(2));
    driver.add(0, 0, &BUFFER);
    driver.kick(0);
    // vCPUs may still make their last accesses.
    driver.write(VIRTIO_MMIO_STATUS, 0);
    drop(driver);
    assert_eq!(Arc::strong_count(&told), 1, "the device is gone");
}
