//! A queue that the driver has set up, as the device's thread uses it.
//!
//! Everything in the rings is the guest's, and may be nonsense. What cannot be a queue is a [`QueueError`], after which
//! the device asks for a reset. What is wrong with the buffers of one request fails this request.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::attempt::{Attempt, MAX_ATTEMPTS};
use crate::machine::memory::DeviceMemory;

/// The most entries of a queue that a driver may ask for.
pub const MAX_QUEUE_SIZE: u16 = 256;
/// The most descriptors of one request; an indirect table may have more of them than the queue has entries.
pub const MAX_DESCRIPTORS: usize = 1024;

/// Why a queue cannot be used any more.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The rings: memory that is bad or absent, or an index that is too far ahead.
    #[error("its rings are not usable: {0}")]
    Ring(virtio_queue::Error),
    /// A descriptor chain.
    #[error("the descriptor chain at {head} {why}")]
    Chain {
        /// Its first descriptor.
        head: u16,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A page of the rings or of a descriptor table has gone bad while they were used.
    #[error("a page of its rings or descriptors is bad")]
    BadPage,
}

impl From<virtio_queue::Error> for QueueError {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Ring(error)
    }
}

/// A piece of a request's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte; it need not be RAM.
    pub addr: GuestAddress,
    /// Length in bytes, 0 and more.
    pub len: u32,
}

/// One request of the driver: buffers to read, and buffers to write to. Together they are no longer than 4 GiB, and the
/// descriptors no more than [`MAX_DESCRIPTORS`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Request {
    /// The number by which it is given back: see [`ActiveQueue::push`].
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver has written, in order.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// What the device writes to, in order.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// The bytes in [`Self::readable`].
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// The bytes in [`Self::writable`].
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Copies bytes of the readable buffers from `offset` on. Returns how many there were, at most as many as `into`
    /// takes. They are to be used only if the [`Attempt`] around it is clean.
    ///
    /// # Errors
    /// A buffer is not RAM, or known to be bad.
    pub fn read(
        &self,
        memory: &DeviceMemory,
        offset: u64,
        into: &mut [u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (addr, len) in pieces(&self.readable, offset, into.len()) {
            memory.read_slice(&mut into[done..done + len], addr?)?;
            done += len;
        }
        Ok(done)
    }

    /// Copies `bytes` into the writable buffers from `offset` on. Returns how many had room. They count as written only
    /// if the [`Attempt`] around it is clean.
    ///
    /// # Errors
    /// A buffer is not RAM, or known to be bad. Those before it may have been written.
    pub fn write(
        &self,
        memory: &DeviceMemory,
        offset: u64,
        bytes: &[u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (addr, len) in pieces(&self.writable, offset, bytes.len()) {
            memory.write_slice(&bytes[done..done + len], addr?)?;
            done += len;
        }
        Ok(done)
    }
}

/// The addresses and lengths of at most `len` bytes of `segments`, from `offset` on.
fn pieces(
    segments: &[Segment],
    offset: u64,
    len: usize,
) -> impl Iterator<Item = (Result<GuestAddress, GuestMemoryError>, usize)> + '_ {
    let (mut skip, mut left) = (offset, len);
    segments.iter().filter_map(move |segment| {
        let before = skip.min(u64::from(segment.len));
        skip -= before;
        let room = u64::from(segment.len) - before;
        let take = usize::try_from(room).unwrap_or(left).min(left);
        left -= take;
        let addr = segment.addr.0.checked_add(before).map(GuestAddress);
        (take > 0).then(|| (addr.ok_or(GuestMemoryError::GuestAddressOverflow), take))
    })
}

/// A queue of a device that is active.
#[derive(Debug)]
pub struct ActiveQueue {
    queue: Queue,
    kick: Arc<EventFd>,
}

impl ActiveQueue {
    pub(super) fn new(queue: Queue, kick: Arc<EventFd>) -> Self {
        Self { queue, kick }
    }

    /// The addresses of its rings, and what else is known of it.
    #[must_use]
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Its number of entries.
    #[must_use]
    pub fn entries(&self) -> u16 {
        self.queue.size()
    }

    /// What the driver writes to when it has added requests, by way of KVM. The device's thread reads it, unless the
    /// device has taken the queue out of [`Active::queues`](super::device::Active::queues) to hand it to somebody
    /// else (vhost).
    #[must_use]
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Takes the next request, if there is one.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn pop(&mut self, memory: &DeviceMemory) -> Result<Option<Request>, QueueError> {
        self.in_good_memory(|queue| queue.take(memory))
    }

    /// Does `work` on the rings, again if a page has turned out to be bad meanwhile: it may have been another device's. One
    /// of the rings is not given out a second time, so that this ends with an error.
    fn in_good_memory<T>(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<T, QueueError>,
    ) -> Result<T, QueueError> {
        let (avail, used) = (self.queue.next_avail(), self.queue.next_used());
        for _ in 0..MAX_ATTEMPTS {
            let attempt = Attempt::begin();
            let result = work(self);
            if attempt.is_clean() {
                return result;
            }
            self.queue.set_next_avail(avail);
            self.queue.set_next_used(used);
        }
        Err(QueueError::BadPage)
    }

    fn take(&mut self, memory: &DeviceMemory) -> Result<Option<Request>, QueueError> {
        let added = self.queue.avail_idx(memory, Ordering::Acquire)?;
        if added.0 == self.queue.next_avail() {
            return Ok(None);
        }
        // It is checked here that no more has been added than there are entries.
        let chain = self.queue.iter(memory)?.next();
        // There is one, so the entry cannot be read.
        let chain = chain.ok_or(virtio_queue::Error::InvalidAvailRingIndex)?;
        let mut request = Request { head: chain.head_index(), ..Request::default() };
        let bad = |why| QueueError::Chain { head: request.head, why };
        let mut goes_on = true;
        // The iterator ends after as many descriptors as the table has, at an index beyond it, at one that cannot be
        // read, and where the length in all overflows 32 bits. Whatever it was, the last descriptor names another one then.
        for (count, descriptor) in (1..).zip(chain) {
            if count > MAX_DESCRIPTORS {
                return Err(bad("has more than 1024 descriptors"));
            }
            let segment = Segment { addr: descriptor.addr(), len: descriptor.len() };
            match descriptor.is_write_only() {
                true => request.writable.push(segment),
                false if request.writable.is_empty() => request.readable.push(segment),
                false => return Err(bad("has a buffer to read after one to write to")),
            }
            goes_on = descriptor.has_next();
        }
        if goes_on {
            return Err(bad("does not end, or cannot be read to its end"));
        }
        Ok(Some(request))
    }

    /// Puts back the request that was taken last: the next [`Self::pop`] returns it.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back to the driver: `written` bytes have been written to its buffers.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn push(
        &mut self,
        memory: &DeviceMemory,
        request: &Request,
        written: u32,
    ) -> Result<(), QueueError> {
        self.in_good_memory(|queue| Ok(queue.queue.add_used(memory, request.head, written)?))
    }

    /// Whether the driver is to be interrupted for what has been pushed.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn needs_interrupt(&mut self, memory: &DeviceMemory) -> Result<bool, QueueError> {
        let attempt = Attempt::begin();
        let mut needed = self.queue.needs_notification(memory)?;
        if needed && !self.queue.event_idx_enabled() {
            let flags: u16 = memory
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .map_err(virtio_queue::Error::GuestMemory)?;
            needed = u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        // One interrupt too many does no harm.
        Ok(needed || !attempt.is_clean())
    }

    /// The driver need not kick from now on.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn disable_kicks(&mut self, memory: &DeviceMemory) -> Result<(), QueueError> {
        self.in_good_memory(|queue| Ok(queue.queue.disable_notification(memory)?))
    }

    /// The driver is to kick when it adds a request. Returns whether there is one already.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn enable_kicks(&mut self, memory: &DeviceMemory) -> Result<bool, QueueError> {
        self.in_good_memory(|queue| Ok(queue.queue.enable_notification(memory)?))
    }
}
