//! The device in this process: each frame is copied by its thread.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::config::Offer;
use super::drops::Drops;
use super::incoming::{Filled, Incoming};
use super::layout::{QUEUE_SIZES, RECEIVE, TRANSMIT};
use super::outgoing::Outgoing;
use super::tap::Tap;
use crate::config::NetConfig;
use crate::machine::devices::virtio::config_space::ConfigSpace;
use crate::machine::devices::virtio::device::{Active, Device, DeviceError, Served, Turn, Wait};
use crate::sandbox::role::Role;

/// What poll(2) finds when a descriptor is of no more use, whatever was asked.
const OVER: i16 = libc::POLLERR | libc::POLLHUP;

/// The device.
#[derive(Debug)]
pub struct Net {
    tap: Tap,
    offer: Offer,
    drops: Arc<Drops>,
    incoming: Incoming,
    outgoing: Outgoing,
    /// There is a buffer for the next frame from the tap. While there is none, frames wait in the tap, which drops those that
    /// are too many.
    has_buffer: bool,
    /// A frame waits for the tap to take it.
    has_frame: bool,
}

impl Net {
    /// One on `tap`.
    #[must_use]
    pub fn new(tap: Tap, config: &NetConfig) -> Self {
        Self {
            offer: Offer::new(&tap, config),
            tap,
            drops: Arc::default(),
            incoming: Incoming::default(),
            outgoing: Outgoing::default(),
            has_buffer: false,
            has_frame: false,
        }
    }

    /// The frames that it drops, counted from now on by whoever keeps this.
    #[must_use]
    pub fn drops(&self) -> Arc<Drops> {
        Arc::clone(&self.drops)
    }

    fn receive(&mut self, active: &mut Active) -> Result<Turn, DeviceError> {
        let Self { tap, offer, drops, incoming, .. } = self;
        let (mut has_buffer, mut is_gone) = (false, !offer.is_link_up());
        let turn = active.serve(RECEIVE, |memory, request| {
            let filled = match is_gone {
                true => Filled::Gone,
                false => incoming.fill(tap, drops, memory, request),
            };
            Ok(match filled {
                Filled::Used(len) => Served::Done(len),
                Filled::NoFrame => {
                    has_buffer = true;
                    Served::Later
                }
                Filled::Gone => {
                    is_gone = true;
                    Served::Later
                }
            })
        });
        if is_gone {
            offer.link_is_down(&active.interrupt);
        }
        self.has_buffer = has_buffer;
        turn
    }

    fn transmit(&mut self, active: &mut Active) -> Result<Turn, DeviceError> {
        let Self { tap, drops, outgoing, .. } = self;
        let mut has_frame = false;
        let turn = active.serve(TRANSMIT, |memory, request| {
            let served = outgoing.send(tap, drops, memory, request);
            has_frame = served == Served::Later;
            Ok(served)
        });
        self.has_frame = has_frame;
        turn
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn role(&self) -> Role {
        Role::VirtioNet
    }

    fn features(&self) -> u64 {
        self.offer.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.offer.space()
    }

    fn kicked(&mut self, index: usize, active: &mut Active) -> Result<Turn, DeviceError> {
        match index {
            RECEIVE => self.receive(active),
            _ => self.transmit(active),
        }
    }

    fn waits_for(&self, waits: &mut Vec<Wait>) {
        let receive = if self.has_buffer { libc::POLLIN } else { 0 };
        let transmit = if self.has_frame { libc::POLLOUT } else { 0 };
        if receive | transmit != 0 {
            waits.push(Wait { fd: self.tap.as_raw_fd(), events: receive | transmit });
        }
    }

    fn ready(&mut self, wait: Wait, active: &mut Active) -> Result<Turn, DeviceError> {
        let mut turns = [Turn::Done; 2];
        if self.has_buffer && wait.events & (libc::POLLIN | OVER) != 0 {
            turns[RECEIVE] = self.receive(active)?;
        }
        if self.has_frame && wait.events & (libc::POLLOUT | OVER) != 0 {
            turns[TRANSMIT] = self.transmit(active)?;
        }
        Ok(if turns.contains(&Turn::Again) { Turn::Again } else { Turn::Done })
    }

    fn stop(&mut self) {
        self.incoming = Incoming::default();
        self.outgoing.clear();
        (self.has_buffer, self.has_frame) = (false, false);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if !self.drops.is_empty() {
            log::info!("virtio-net: {} dropped frames: {}", self.tap, self.drops);
        }
    }
}
