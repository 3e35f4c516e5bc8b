//! What a device is, and what it has while a driver uses it.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::config_space::ConfigSpace;
use super::interrupt::Interrupt;
use super::queue::{ActiveQueue, QueueError, Request};
use crate::machine::memory::DeviceMemory;
use crate::sandbox::role::Role;

/// Why a device cannot go on. It asks for a reset then; the VM lives.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// A queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A request, of which too little is known to fail it alone.
    #[error("{0}")]
    Request(&'static str),
    /// The host's side.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Its code has a fault.
    #[error("it panicked: {0}")]
    Panicked(String),
}

/// What is left in a queue after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing, or what waits for something else than a kick.
    Done,
    /// More requests: the thread calls again after it has looked for orders.
    Again,
}

/// What a device did with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is done, also if it failed; so many bytes were written to its buffers.
    Done(u32),
    /// It stays in the queue, and the device has itself called by [`Device::waits_for`] when it can go on.
    Later,
    /// It is given back by [`Server::finish`].
    InHand,
}

/// A descriptor to wait for, or what has come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// It is open as long as the device waits for it.
    pub fd: RawFd,
    /// `POLLIN` and the like; what poll(2) has found in [`Device::ready`].
    pub events: i16,
}

/// A device that the transport presents and a thread of its own runs.
///
/// The calls from [`Self::activate`] on come on that thread, under the filter of [`Self::role`], one at a time. They do
/// not wait: a driver that resets the device waits for the end of the call, and so does a pause. An error or a panic in
/// one of them ends nothing but the device's work until the driver resets it.
///
/// Between [`Self::pause`] and [`Self::resume`], and when it is stopped, it does nothing to guest memory.
pub trait Device: Send {
    /// Its number (`VIRTIO_ID_…`; virtio 1.2, 5).
    fn id(&self) -> u32;

    /// What it is called in messages and as a thread; at most ten characters.
    fn name(&self) -> &'static str;

    /// The role of its thread, which says what that may call.
    fn role(&self) -> Role;

    /// The features of its own that it offers, as bits. `VIRTIO_F_VERSION_1` is added, and the next ones are.
    fn features(&self) -> u64 {
        0
    }

    /// The features of its rings that it offers, as bits: by default those that [`ActiveQueue`] has.
    fn ring_features(&self) -> u64 {
        1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// The largest size of each of its queues: powers of two up to [`MAX_QUEUE_SIZE`](super::queue::MAX_QUEUE_SIZE).
    fn queue_sizes(&self) -> &[u16];

    /// Its configuration space, of which it may keep a clone. The driver reads and writes it on the vCPUs' threads.
    fn config(&self) -> Arc<ConfigSpace> {
        Arc::default()
    }

    /// The driver has set it up. Every queue is called for once after this.
    ///
    /// # Errors
    /// It cannot work.
    fn activate(&mut self, _active: &mut Active) -> Result<(), DeviceError> {
        Ok(())
    }

    /// There may be requests in queue `index`, which the driver has set up. It does at most about as much as the queue
    /// has entries; see [`Active::serve`].
    ///
    /// # Errors
    /// It cannot go on.
    fn kicked(&mut self, index: usize, active: &mut Active) -> Result<Turn, DeviceError>;

    /// Adds what else to wait for, before each wait while the device is active.
    fn waits_for(&self, _waits: &mut Vec<Wait>) {}

    /// Something of [`Self::waits_for`] has come. With [`Turn::Again`] every queue is called for, too.
    ///
    /// # Errors
    /// It cannot go on.
    fn ready(&mut self, _wait: Wait, _active: &mut Active) -> Result<Turn, DeviceError> {
        Ok(Turn::Done)
    }

    /// Adds what to wait for after an error or a panic, until the driver resets the device: its host's side may have
    /// programs that come and would wait for ever.
    fn waits_for_when_failed(&self, _waits: &mut Vec<Wait>) {}

    /// Something of [`Self::waits_for_when_failed`] has come.
    ///
    /// # Errors
    /// It is not waited for any more until the reset.
    fn ready_when_failed(&mut self, _wait: Wait) -> io::Result<()> {
        Ok(())
    }

    /// The VM is being paused. For a device that has work under way elsewhere (a kernel thread, asynchronous I/O):
    /// that is at rest when this returns.
    ///
    /// # Errors
    /// It cannot go on.
    fn pause(&mut self, _active: &mut Active) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The VM goes on.
    ///
    /// # Errors
    /// It cannot go on.
    fn resume(&mut self, _active: &mut Active) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Back to the first state: what was under way is dropped or at its end when this returns, and guest memory is not
    /// touched any more. It may be called again, and after an error or a panic of any other call.
    fn stop(&mut self) {}
}

/// What a device has from the driver's DRIVER_OK to the next reset.
#[derive(Debug)]
pub struct Active {
    /// Guest memory.
    pub memory: DeviceMemory,
    /// What the driver has accepted of the features, as bits.
    pub features: u64,
    /// How the driver is told.
    pub interrupt: Arc<Interrupt>,
    /// The queues; `None` for one that the driver does not use, or that the device has taken out to hand it to
    /// somebody else. For such a one the device is not called.
    pub queues: Vec<Option<ActiveQueue>>,
}

impl Active {
    /// Whether the driver has accepted feature `bit`.
    #[must_use]
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features.checked_shr(bit).is_some_and(|rest| rest & 1 == 1)
    }

    /// Has `handle` serve the requests of queue `index`, at most as many as the queue has entries, and interrupts the
    /// driver if it wants that.
    ///
    /// # Errors
    /// The queue cannot be used any more, or an error of `handle`.
    pub fn serve(
        &mut self,
        index: usize,
        handle: impl FnMut(&DeviceMemory, &Request) -> Result<Served, DeviceError>,
    ) -> Result<Turn, DeviceError> {
        self.serve_by(index, &mut OneByOne(handle))
    }

    /// As [`Self::serve`], by a server that may have several requests in hand.
    ///
    /// # Errors
    /// As there. The server may have requests in hand then.
    pub fn serve_by(
        &mut self,
        index: usize,
        server: &mut impl Server,
    ) -> Result<Turn, DeviceError> {
        let Self { memory, interrupt, queues, .. } = self;
        let Some(Some(queue)) = queues.get_mut(index) else { return Ok(Turn::Done) };
        let (mut used, mut waits) = (false, false);
        queue.disable_kicks(memory)?;
        let mut left = queue.entries();
        loop {
            let takes = left > 0 && !waits && !server.is_full();
            if takes && let Some(request) = queue.pop(memory)? {
                left -= 1;
                match server.begin(memory, &request)? {
                    Served::Done(written) => {
                        queue.push(memory, &request, written)?;
                        used = true;
                    }
                    Served::Later => {
                        queue.put_back();
                        waits = true;
                    }
                    Served::InHand => {}
                }
                continue;
            }
            let Some((request, written)) = server.finish(memory) else { break };
            queue.push(memory, &request, written)?;
            // The driver gets its next one ready while the others are worked on.
            used = !queue.needs_interrupt(memory)?;
            if !used {
                interrupt.used();
            }
        }
        if used && queue.needs_interrupt(memory)? {
            interrupt.used();
        }
        let more = queue.enable_kicks(memory)?;
        Ok(if more && !waits { Turn::Again } else { Turn::Done })
    }
}

/// What serves the requests of a queue.
pub trait Server {
    /// Does what `request` asks for, or begins with it.
    ///
    /// # Errors
    /// The device cannot go on.
    fn begin(&mut self, memory: &DeviceMemory, request: &Request) -> Result<Served, DeviceError>;

    /// Whether one in hand is to be finished before the next is begun; there is one then.
    fn is_full(&self) -> bool {
        false
    }

    /// Works on those in hand until the oldest is done, also if it failed; so many bytes were written to its buffers.
    /// `None` if there is none.
    fn finish(&mut self, _memory: &DeviceMemory) -> Option<(Request, u32)> {
        None
    }
}

struct OneByOne<F>(F);

impl<F> Server for OneByOne<F>
where
    F: FnMut(&DeviceMemory, &Request) -> Result<Served, DeviceError>,
{
    fn begin(&mut self, memory: &DeviceMemory, request: &Request) -> Result<Served, DeviceError> {
        (self.0)(memory, request)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::machine::devices::virtio::testing::{Driver, SIZE};

    /// Has at most two requests in hand; those of one byte are done at once.
    #[derive(Default)]
    struct Pairs(VecDeque<Request>);

    impl Server for Pairs {
        fn begin(&mut self, _: &DeviceMemory, request: &Request) -> Result<Served, DeviceError> {
            assert!(!self.is_full(), "it was given a third one");
            if request.writable_len() == 1 {
                return Ok(Served::Done(1));
            }
            self.0.push_back(request.clone());
            Ok(Served::InHand)
        }

        fn is_full(&self) -> bool {
            self.0.len() == 2
        }

        fn finish(&mut self, _: &DeviceMemory) -> Option<(Request, u32)> {
            self.0.pop_front().map(|request| (request, 4))
        }
    }

    struct Pairing;

    impl Device for Pairing {
        fn id(&self) -> u32 {
            77
        }

        fn name(&self) -> &'static str {
            "pairing"
        }

        fn role(&self) -> Role {
            Role::VirtioRng
        }

        fn queue_sizes(&self) -> &[u16] {
            &[SIZE]
        }

        fn kicked(&mut self, index: usize, active: &mut Active) -> Result<Turn, DeviceError> {
            active.serve_by(index, &mut Pairs::default())
        }
    }

    #[test]
    fn a_server_has_no_more_in_hand_than_it_takes_and_gives_each_back_once() {
        let mut driver = Driver::ready(Box::new(Pairing), 1);
        let short = |nth: u16| nth % 5 == 4;
        for nth in 0..SIZE {
            driver.add(0, nth, &[(0x8000, if short(nth) { 1 } else { 4 }, true)]);
        }
        driver.wait_used(0, SIZE);
        let mut came: Vec<_> = (0..SIZE).map(|nth| driver.used_entry(0, nth)).collect();
        let long: Vec<u32> =
            came.iter().filter(|(_, len)| *len == 4).map(|(head, _)| *head).collect();
        assert!(long.is_sorted(), "{came:?}");
        came.sort_unstable();
        let expected = (0..SIZE).map(|nth| (nth.into(), if short(nth) { 1 } else { 4 }));
        assert!(came.iter().copied().eq(expected), "{came:?}");
        assert!(!driver.needs_reset() && driver.take_interrupt().is_some());
    }
}
