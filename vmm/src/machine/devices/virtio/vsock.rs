//! virtio-vsock (virtio 1.2, 5.10): stream connections between programs of the guest and of the host, which has unix
//! sockets for them, as with Firecracker and Cloud Hypervisor.
//!
//! - A program of the host's connects to PATH, writes `CONNECT <port>\n`, reads `OK <its own port>\n`, and is connected to
//!   the guest's program at that port. Where there is none, or it does not answer, its connection is closed. So it is
//!   where the device has failed and waits for a reset.
//! - A program of the guest's that connects to the host (address 2) at port P is connected to the unix socket PATH_P.
//!
//! All of it is on the device's one thread, and no side waits for another: each connection has room for some data of the
//! guest's ([`connection::ROOM`]), the guest sends no more than it has been told there is room for, and a connection whose
//! guest sends more is reset. In the other direction nothing is read from a socket that the guest has no room for.
//!
//! Data of the guest's is copied, and validated, before a socket gets it. A packet whose data is in a bad page breaks its
//! connection, as a stream cannot go on with a hole; so does data for the guest that cannot be written to its buffer. A
//! packet whose header cannot be read might be of any connection, and so the device asks for a reset.
//!
//! A program of the host's sees the end of a connection that was broken as any other end: unix sockets have no better word.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use zerocopy::FromBytes;

use super::attempt::checked;
use super::config_space::ConfigSpace;
use super::device::{Active, Device, DeviceError, Served, Turn, Wait};
use super::queue::Request;
use crate::machine::memory::DeviceMemory;
use crate::sandbox::role::Role;
use connections::Connections;
use greetings::Greetings;
use host::VsockLine;
use packet::{HEADER, Header, MOST_DATA, RW};
use timer::Timer;

pub mod connection;
mod connections;
mod credit;
mod greetings;
pub mod host;
pub mod packet;
mod timer;

/// The queue of buffers for packets to the guest (5.10.2).
const RECEIVE: usize = 0;
/// The queue of packets from the guest. The third one is for events, of which there is none: its buffers stay there.
const TRANSMIT: usize = 1;

/// The device.
#[derive(Debug)]
pub struct Vsock {
    config: Arc<ConfigSpace>,
    greetings: Greetings,
    connections: Connections,
    timer: Timer,
    /// The data of one packet of the guest's.
    data: Vec<u8>,
}

impl Vsock {
    /// One for the guest with the address `cid`, whose host side is `line`.
    ///
    /// # Errors
    /// There are no more file descriptors.
    pub fn new(cid: u32, line: Arc<VsockLine>) -> io::Result<Self> {
        // struct virtio_vsock_config.
        let config = Arc::new(ConfigSpace::new(u64::from(cid).to_le_bytes().to_vec(), 0..0));
        let (greetings, connections) = (Greetings::at(line), Connections::new(cid));
        Ok(Self { config, greetings, connections, timer: Timer::new()?, data: Vec::new() })
    }

    /// One turn in both directions: what one queue has may have to be answered on the other.
    fn turn(&mut self, active: &mut Active) -> Result<Turn, DeviceError> {
        let now = Instant::now();
        let (sent, was_clogged) = self.transmit(active, now)?;
        let connections = &mut self.connections;
        let received =
            active.serve(RECEIVE, |memory, request| Ok(connections.fill(memory, request, now)))?;
        self.wind(now)?;
        let goes_on = was_clogged && !self.connections.is_clogged();
        let again = goes_on || [sent, received].contains(&Turn::Again);
        Ok(if again { Turn::Again } else { Turn::Done })
    }

    fn transmit(&mut self, active: &mut Active, now: Instant) -> Result<(Turn, bool), DeviceError> {
        let Self { connections, greetings, data, .. } = self;
        let mut was_clogged = false;
        let turn = active.serve(TRANSMIT, |memory, request| {
            if connections.is_clogged() {
                was_clogged = true;
                return Ok(Served::Later);
            }
            if let Some(header) = header(memory, request)? {
                let is_there = payload(memory, request, &header, data);
                let data = is_there.then_some(&**data);
                connections.guest_sent(&header, data, greetings.line(), now);
            }
            Ok(Served::Done(0))
        })?;
        Ok((turn, was_clogged))
    }

    /// Sets the clock to whatever is due next.
    fn wind(&mut self, now: Instant) -> Result<(), DeviceError> {
        let due = self.greetings.deadline().into_iter().chain(self.connections.deadline()).min();
        let set = self.timer.set(due, now);
        set.map_err(|source| DeviceError::Host { what: "set a timer", source })
    }
}

/// The header of a packet, if it has one.
fn header(memory: &DeviceMemory, request: &Request) -> Result<Option<Header>, DeviceError> {
    let mut bytes = [0; HEADER];
    match checked(|| request.read(memory, 0, &mut bytes)) {
        Ok(len) => Ok(Header::read_from_bytes(&bytes[..len]).ok()),
        Err(_) => Err(DeviceError::Request("the header of a packet cannot be read")),
    }
}

/// Copies the data of a packet. False if it is not to be had.
fn payload(memory: &DeviceMemory, request: &Request, header: &Header, data: &mut Vec<u8>) -> bool {
    data.clear();
    let len = usize::try_from(header.len.get()).unwrap_or(usize::MAX);
    if header.op.get() != RW || len == 0 {
        return true;
    }
    if len > MOST_DATA {
        return false;
    }
    data.resize(len, 0);
    let offset = u64::try_from(HEADER).unwrap_or(0);
    matches!(checked(|| request.read(memory, offset, data)), Ok(read) if read == len)
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn name(&self) -> &'static str {
        "vsock"
    }

    fn role(&self) -> Role {
        Role::VirtioVsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 16]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn kicked(&mut self, _: usize, active: &mut Active) -> Result<Turn, DeviceError> {
        self.turn(active)
    }

    fn waits_for(&self, waits: &mut Vec<Wait>) {
        waits.push(Wait { fd: self.timer.fd(), events: libc::POLLIN });
        self.greetings.waits_for(waits);
        self.connections.waits_for(waits);
    }

    fn ready(&mut self, wait: Wait, active: &mut Active) -> Result<Turn, DeviceError> {
        let now = Instant::now();
        // What is found may be of a descriptor that was closed meanwhile, and of which another one has the number: it is
        // taken as a hint only.
        if wait.fd == self.timer.fd() {
            self.greetings.expire(now);
            self.connections.expire(now);
        } else if self.greetings.has(wait.fd) {
            if let Some((stream, port)) = self.greetings.ready(wait.fd, now) {
                self.connections.ask(stream, port, now);
            }
        } else {
            self.connections.host_did(wait.fd, wait.events, now);
        }
        self.turn(active)
    }

    fn waits_for_when_failed(&self, waits: &mut Vec<Wait>) {
        waits.push(Wait { fd: self.timer.fd(), events: libc::POLLIN });
        self.greetings.waits_for(waits);
    }

    fn ready_when_failed(&mut self, wait: Wait) -> io::Result<()> {
        let now = Instant::now();
        self.greetings.expire(now);
        if wait.fd != self.timer.fd() {
            self.greetings.turn_away(now);
        }
        self.timer.set(self.greetings.deadline(), now)
    }

    fn resume(&mut self, _: &mut Active) -> Result<(), DeviceError> {
        let now = Instant::now();
        self.connections.forgive(now);
        self.wind(now)
    }

    fn stop(&mut self) {
        self.greetings.clear();
        self.connections.clear();
        self.data = Vec::new();
        if let Err(error) = self.timer.set(None, Instant::now()) {
            log::debug!("virtio-vsock: a timer: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
