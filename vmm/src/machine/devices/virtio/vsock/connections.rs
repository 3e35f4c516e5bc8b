//! All connections of a guest, and what it has to be told.

use std::collections::{HashMap, VecDeque};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use zerocopy::IntoBytes;

use super::connection::{Connection, Fate};
use super::host::VsockLine;
use super::packet::{HEADER, HOST_CID, Header, MOST_DATA, Ports, REQUEST, RST, RW, STREAM, Say};
use crate::machine::devices::virtio::attempt::checked;
use crate::machine::devices::virtio::device::{Served, Wait};
use crate::machine::devices::virtio::queue::Request;
use crate::machine::memory::DeviceMemory;

/// How many connections there may be, those that end included. With their room that is 64 MiB.
pub const MOST_CONNECTIONS: usize = 256;
/// How many resets may wait for the guest. While there are so many nothing is taken from it.
const MOST_RESETS: usize = 256;
/// Where the host's ports begin, for connections that it asks for.
const FIRST_PORT: u32 = 1 << 30;

/// What is put into a buffer of the guest's.
enum Packet {
    Reset(Header),
    Of(Ports, Say, Header),
}

/// All connections.
pub struct Connections {
    cid: u64,
    all: HashMap<Ports, Connection>,
    by_fd: HashMap<RawFd, Ports>,
    /// The guest knows that they have ended, and the host has not taken all yet.
    draining: HashMap<RawFd, Connection>,
    /// Those that may have something for the guest, in the order of their turns.
    turns: VecDeque<Ports>,
    resets: VecDeque<Header>,
    next_port: u32,
    data: Box<[u8; MOST_DATA]>,
}

impl std::fmt::Debug for Connections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connections").field("cid", &self.cid).field("all", &self.all).finish()
    }
}

impl Connections {
    /// None yet, of the guest with the address `cid`.
    #[must_use]
    pub fn new(cid: u32) -> Self {
        Self {
            cid: cid.into(),
            all: HashMap::new(),
            by_fd: HashMap::new(),
            draining: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            data: Box::new([0; MOST_DATA]),
        }
    }

    /// All of them go.
    pub fn clear(&mut self) {
        (self.all, self.by_fd, self.draining) = Default::default();
        (self.turns, self.resets) = Default::default();
        // The host's ports go on: a program that still knows one does not take another connection for its own.
    }

    /// Adds what to wait for.
    pub fn waits_for(&self, waits: &mut Vec<Wait>) {
        let all = self.all.values().chain(self.draining.values());
        waits.extend(all.filter_map(Connection::waits_for).map(|(fd, events)| Wait { fd, events }));
    }

    /// When [`Self::expire`] is to be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let all = self.all.values().chain(self.draining.values());
        all.filter_map(Connection::deadline).min()
    }

    /// Ends those that take too long.
    pub fn expire(&mut self, now: Instant) {
        self.draining.retain(|_, connection| !connection.expired(now));
        let late = self.all.values().filter(|connection| connection.expired(now));
        let late: Vec<_> = late.map(|late| (late.ports(), late.broken())).collect();
        for (ports, fate) in late {
            self.settle(ports, fate);
        }
    }

    /// Time went by in which the guest could do nothing.
    pub fn forgive(&mut self, now: Instant) {
        let all = self.all.values_mut().chain(self.draining.values_mut());
        all.for_each(|connection| connection.forgive(now));
    }

    fn has_room(&self) -> bool {
        self.all.len() + self.draining.len() < MOST_CONNECTIONS
    }

    /// A program of the host's asks for `port` of the guest. Where there are too many connections it is sent away.
    pub fn ask(&mut self, stream: UnixStream, port: u32, now: Instant) {
        if !self.has_room() {
            log::debug!(
                "virtio-vsock: a client is sent away: there are {MOST_CONNECTIONS} connections"
            );
            return;
        }
        let mut ports = Ports { host: self.next_port, guest: port };
        // There are fewer connections than ports.
        while self.all.contains_key(&ports) {
            ports.host = ports.host.checked_add(1).unwrap_or(FIRST_PORT);
        }
        self.next_port = ports.host.checked_add(1).unwrap_or(FIRST_PORT);
        self.add(Connection::asked_by_host(ports, stream, now));
    }

    fn add(&mut self, connection: Connection) {
        let ports = connection.ports();
        self.by_fd.insert(connection.fd(), ports);
        self.all.insert(ports, connection);
        self.take_turn(ports);
    }

    fn take_turn(&mut self, ports: Ports) {
        if let Some(connection) = self.all.get_mut(&ports)
            && !std::mem::replace(&mut connection.in_turn, true)
        {
            self.turns.push_back(ports);
        }
    }

    /// Something has happened at a socket.
    pub fn host_did(&mut self, fd: RawFd, events: i16, now: Instant) {
        if let Some(connection) = self.draining.get_mut(&fd) {
            connection.host_did(events, now);
            if !connection.still_drains() {
                self.draining.remove(&fd);
            }
        } else if let Some(ports) = self.by_fd.get(&fd).copied()
            && let Some(connection) = self.all.get_mut(&ports)
        {
            let fate = connection.host_did(events, now);
            self.settle(ports, fate);
        }
    }

    fn settle(&mut self, ports: Ports, fate: Fate) {
        if fate == Fate::Stays {
            self.take_turn(ports);
            return;
        }
        let Some(connection) = self.all.remove(&ports) else { return };
        self.by_fd.remove(&connection.fd());
        if connection.in_turn {
            // Else the guest could have as many left behind as it likes.
            self.turns.retain(|other| *other != ports);
        }
        if fate == Fate::Reset {
            let header = connection.header(Say::op(RST));
            self.resets.push_back(self.addressed(header));
        } else if fate == Fate::Drains {
            self.draining.insert(connection.fd(), connection);
        }
    }

    fn addressed(&self, header: Header) -> Header {
        let (src_cid, dst_cid) = (HOST_CID.into(), self.cid.into());
        Header { src_cid, dst_cid, kind: STREAM.into(), ..header }
    }

    /// Whether nothing may be taken from the guest before it has taken something.
    #[must_use]
    pub fn is_clogged(&self) -> bool {
        self.resets.len() >= MOST_RESETS
    }

    /// The guest has sent a packet; its data is `None` where it is not to be had.
    pub fn guest_sent(
        &mut self,
        packet: &Header,
        data: Option<&[u8]>,
        line: &VsockLine,
        now: Instant,
    ) {
        let op = packet.op.get();
        if packet.src_cid.get() != self.cid {
            log::debug!("virtio-vsock: a packet from {} is dropped", packet.src_cid.get());
        } else if packet.dst_cid.get() != HOST_CID || packet.kind.get() != STREAM {
            self.refuse(packet);
        } else if let Some(connection) = self.all.get_mut(&Ports::of(packet)) {
            let fate = match data {
                Some(data) => connection.guest_sent(packet, data, now),
                None => Fate::Reset,
            };
            self.settle(Ports::of(packet), fate);
        } else if op == REQUEST {
            self.dial(packet, line);
        } else {
            self.refuse(packet);
        }
    }

    fn refuse(&mut self, packet: &Header) {
        // Never an answer to one.
        if packet.op.get() != RST {
            self.resets.push_back(packet.reset());
        }
    }

    /// The guest asks for a port of the host's.
    fn dial(&mut self, request: &Header, line: &VsockLine) {
        let port = request.dst_port.get();
        if !self.has_room() {
            log::debug!(
                "virtio-vsock: port {port} is refused: there are {MOST_CONNECTIONS} connections"
            );
            return self.refuse(request);
        }
        match line.dial(port) {
            Ok(stream) => self.add(Connection::asked_by_guest(request, stream)),
            Err(error) => {
                log::debug!("virtio-vsock: port {port} is refused: {error}");
                self.refuse(request);
            }
        }
    }

    /// Puts what the guest has to be told next into a buffer of its.
    pub fn fill(&mut self, memory: &DeviceMemory, request: &Request, now: Instant) -> Served {
        let room = usize::try_from(request.writable_len()).unwrap_or(usize::MAX);
        let Some(room) = room.checked_sub(HEADER).filter(|room| *room > 0) else {
            // Nothing fits.
            return Served::Done(0);
        };
        let Some(packet) = self.next(room) else { return Served::Later };
        let (header, data) = match &packet {
            Packet::Reset(header) => (header, &[][..]),
            Packet::Of(_, say, header) => (header, &self.data[..say.len]),
        };
        let offset = u64::try_from(HEADER).unwrap_or(0);
        let written = checked(|| {
            request.write(memory, 0, header.as_bytes())?;
            request.write(memory, offset, data)
        });
        let is_good = written.is_ok();
        let len = HEADER + data.len();
        self.was_put(&packet, is_good, now);
        match is_good {
            true => Served::Done(u32::try_from(len).unwrap_or(0)),
            false => Served::Done(0),
        }
    }

    fn next(&mut self, room: usize) -> Option<Packet> {
        if let Some(reset) = self.resets.front() {
            return Some(Packet::Reset(*reset));
        }
        while let Some(ports) = self.turns.front().copied() {
            if let Some(connection) = self.all.get_mut(&ports) {
                if let Some(say) = connection.next(room, &mut self.data) {
                    let header = connection.header(say);
                    return Some(Packet::Of(ports, say, self.addressed(header)));
                }
                connection.in_turn = false;
            }
            self.turns.pop_front();
        }
        None
    }

    /// `packet` is in the guest's buffer, or is not. What does not need its data is tried again with the next buffer.
    fn was_put(&mut self, packet: &Packet, is_good: bool, now: Instant) {
        match packet {
            Packet::Reset(_) if is_good => {
                self.resets.pop_front();
            }
            Packet::Of(ports, say, _) if is_good => {
                if let Some(connection) = self.all.get_mut(ports) {
                    connection.said(*say, now);
                }
                // It was the first one, and gets another turn after all others.
                self.turns.rotate_left(1);
            }
            Packet::Of(ports, Say { op: RW, .. }, _) => {
                log::debug!("virtio-vsock: a connection breaks: its data cannot be written");
                self.settle(*ports, Fate::Reset);
            }
            Packet::Reset(_) | Packet::Of(..) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::super::connection::HANDSHAKE;
    use super::*;

    /// A guest that takes nothing has only so much kept for it, whatever it and the host's programs do.
    #[test]
    fn what_waits_for_the_guest_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let line = Arc::new(VsockLine::open(&dir.path().join("v")).unwrap());
        let listener = std::os::unix::net::UnixListener::bind(dir.path().join("v_5")).unwrap();
        let mut connections = Connections::new(3);
        let packet = |op: u16| Header {
            src_cid: 3.into(),
            dst_cid: HOST_CID.into(),
            dst_port: 5.into(),
            kind: STREAM.into(),
            op: op.into(),
            ..Header::default()
        };
        let now = Instant::now();
        for _ in 0..1000 {
            connections.guest_sent(&packet(REQUEST), Some(&[]), &line, now);
            connections.guest_sent(&packet(RST), Some(&[]), &line, now);
            drop(listener.accept().unwrap());
        }
        for round in 0..1000 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            connections.ask(ours, 1, now);
            let fd = *connections.by_fd.keys().next().unwrap();
            if round % 2 == 0 {
                drop(theirs);
                connections.host_did(fd, libc::POLLHUP, now);
            } else {
                connections.expire(now + HANDSHAKE + Duration::from_secs(1));
            }
        }
        assert!(connections.all.is_empty() && connections.by_fd.is_empty());
        assert_eq!((connections.turns.len(), connections.resets.len()), (0, 0));
    }
}
