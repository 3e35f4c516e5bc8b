//! The part that a thread other than a vCPU's has in a VM's run and pause: a device's, which uses guest memory.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::machine::lifecycle::{State, VmControl};

/// A thread's part in the pauses of a VM: a pause is complete only when the thread is parked, too. Dropping it ends
/// that.
#[derive(Debug)]
pub(crate) struct Seat {
    control: VmControl,
    index: usize,
}

impl Seat {
    /// One in the VM of `control`. `wake` is written to whenever the VM is paused, goes on or ends.
    pub(crate) fn take(control: &VmControl, wake: Arc<EventFd>) -> Self {
        Self { control: control.clone(), index: control.add_worker(wake) }
    }

    /// Whether the VM runs. A thread that is not parked may work until it has asked this again, soon.
    pub(crate) fn may_work(&self) -> bool {
        self.control.state() == State::Running
    }

    /// The thread does nothing to guest memory from now on.
    pub(crate) fn park(&self) {
        self.control.park_worker(self.index);
    }

    /// Whether the parked thread may work again; it is not parked then.
    pub(crate) fn go_on(&self) -> bool {
        self.control.unpark_worker(self.index)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.control.remove_worker(self.index);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::machine::lifecycle::reasons::{ExitReason, Parked};

    #[test]
    fn a_pause_is_complete_when_the_thread_is_parked() {
        let control = VmControl::new(1).unwrap();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let seat = Seat::take(&control, Arc::clone(&wake));
        assert!(seat.may_work() && wake.read().is_err());
        let short = Duration::from_millis(1);
        assert_eq!(control.pause_within(short), Parked::Not(1));
        assert!(!seat.may_work() && wake.read().is_ok());
        seat.park();
        assert!(!seat.go_on());
        assert_eq!(control.pause_within(short), Parked::All);
        control.resume();
        assert!(wake.read().is_ok() && seat.may_work() && seat.go_on());
        // A thread that parks late finds that it may go on.
        let hold = control.hold();
        drop(hold);
        seat.park();
        assert!(wake.read().is_ok() && seat.go_on());
        assert_eq!(control.pause_within(short), Parked::Not(1));
        drop(seat);
        assert_eq!(control.pause_within(short), Parked::All);
        let seat = Seat::take(&control, Arc::clone(&wake));
        while wake.read().is_ok() {}
        control.stop(ExitReason::PowerOff);
        assert!(wake.read().is_ok() && !seat.may_work());
        seat.park();
        assert!(!seat.go_on());
    }
}
