//! One connection: a port of the guest's and a unix socket of the host's.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::credit::Credit;
use super::host::has_hung_up;
use super::packet::{
    CREDIT_REQUEST, CREDIT_UPDATE, Header, MOST_DATA, NEITHER, NO_RECEIVE, NO_SEND, Ports, REQUEST,
    RESPONSE, RST, RW, SHUTDOWN, Say,
};

/// The room for data of the guest's that the host has not taken yet, in bytes for each connection.
pub const ROOM: usize = 256 << 10;
/// The guest is told of room again once it is this much more than it knows of, in bytes. When all its room is used up, more
/// than this has to have been taken, so it never waits for a word that does not come.
const WORTH_TELLING: u32 = 64 << 10;
/// How long the guest may take to answer that it accepts a connection.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a connection whose end is known stays for what it still has to do, from its last progress on: the host's
/// program to take data, or the guest to take note.
pub const LINGER: Duration = Duration::from_secs(60);

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Stays,
    /// It ends, and the guest is told so.
    Reset,
    /// The guest knows that it has ended.
    Gone,
    /// The same, and the host has not taken yet what the guest sent before that.
    Drains,
}

/// One connection. It reads from its socket only what the guest has room for, and is never kept waiting by it.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    stream: UnixStream,
    /// Both sides have agreed to it.
    is_open: bool,
    /// The guest is to be asked (REQUEST) or told (RESPONSE).
    greets: Option<u16>,

    /// Data of the guest's that the socket had no room for.
    outgoing: VecDeque<u8>,
    /// Bytes of the guest's that are not in `outgoing` any more.
    taken: Wrapping<u32>,
    /// What the guest knows of that.
    told: Wrapping<u32>,
    wants_update: bool,
    /// What the guest has said by SHUTDOWN.
    guest_shut: u32,
    /// The host has been told that there is no more.
    host_knows_end: bool,

    credit: Credit,
    asked_for_credit: bool,
    /// The socket may have something to read.
    readable: bool,
    /// The host's side of SHUTDOWN, and what the guest has been told of it.
    host_shut: u32,
    host_shut_told: u32,
    /// Both directions of the socket are closed.
    hung_up: bool,

    deadline: Option<Instant>,
    /// It is in the queue of those that may have something for the guest.
    pub in_turn: bool,
}

impl Connection {
    fn new(ports: Ports, stream: UnixStream) -> Self {
        Self {
            ports,
            stream,
            is_open: false,
            greets: None,
            outgoing: VecDeque::new(),
            taken: Wrapping(0),
            told: Wrapping(0),
            wants_update: false,
            guest_shut: 0,
            host_knows_end: false,
            credit: Credit::default(),
            asked_for_credit: false,
            readable: false,
            host_shut: 0,
            host_shut_told: 0,
            hung_up: false,
            deadline: None,
            in_turn: false,
        }
    }

    /// One that the host asks the guest for.
    #[must_use]
    pub fn asked_by_host(ports: Ports, stream: UnixStream, now: Instant) -> Self {
        let (greets, deadline) = (Some(REQUEST), Some(now + HANDSHAKE));
        Self { greets, deadline, ..Self::new(ports, stream) }
    }

    /// One that the guest has asked for by `request`, and that `stream` was opened for.
    #[must_use]
    pub fn asked_by_guest(request: &Header, stream: UnixStream) -> Self {
        let mut connection = Self::new(Ports::of(request), stream);
        connection.credit.update(request.buf_alloc.get(), request.fwd_cnt.get());
        Self { greets: Some(RESPONSE), is_open: true, ..connection }
    }

    /// Its name.
    #[must_use]
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// When [`Self::expired`] is to be asked.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Time went by in which the guest could do nothing.
    pub fn forgive(&mut self, now: Instant) {
        if self.deadline.is_some() {
            self.deadline = Some(now + if self.is_open { LINGER } else { HANDSHAKE });
        }
    }

    /// Whether it has to end now.
    #[must_use]
    pub fn expired(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// What becomes of it when it cannot go on.
    #[must_use]
    pub fn broken(&self) -> Fate {
        match self.greets {
            // The guest has not heard of it yet.
            Some(REQUEST) => Fate::Gone,
            _ => Fate::Reset,
        }
    }

    /// Its socket, and what to wait for there.
    #[must_use]
    pub fn waits_for(&self) -> Option<(RawFd, i16)> {
        let mut events = 0;
        let reads =
            self.is_open && (self.host_shut & NO_SEND, self.guest_shut & NO_RECEIVE) == (0, 0);
        if reads && !self.readable {
            events |= libc::POLLIN;
        }
        if !self.outgoing.is_empty() {
            events |= libc::POLLOUT;
        }
        // Without any event there still is POLLHUP, which would come again and again.
        (!self.hung_up).then(|| (self.stream.as_raw_fd(), events))
    }

    /// Its socket.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Something may have happened at the socket.
    pub fn host_did(&mut self, events: i16, now: Instant) -> Fate {
        // Looked at again, as what was found may be of another socket that had this one's number before.
        if events & (libc::POLLHUP | libc::POLLERR) != 0 && has_hung_up(&self.stream) {
            self.hung_up = true;
            if !self.is_open {
                return self.broken();
            }
            self.deafen();
            self.readable = true;
        }
        if events & libc::POLLIN != 0 {
            self.readable = true;
        }
        if events & libc::POLLOUT != 0 {
            self.flush(now);
        }
        self.fate()
    }

    /// The guest has sent a packet.
    pub fn guest_sent(&mut self, packet: &Header, data: &[u8], now: Instant) -> Fate {
        self.credit.update(packet.buf_alloc.get(), packet.fwd_cnt.get());
        if self.credit.left() > 0 {
            self.asked_for_credit = false;
        }
        match packet.op.get() {
            // What came before its orderly end is good.
            RST if self.guest_shut & NO_SEND != 0 && !self.outgoing.is_empty() => {
                self.deadline = Some(now + LINGER);
                Fate::Drains
            }
            RST => Fate::Gone,
            RESPONSE if !self.is_open && self.greets.is_none() => self.accepted(),
            _ if !self.is_open => Fate::Reset,
            RW => self.put(data, now),
            SHUTDOWN => self.shut(packet.flags.get(), now),
            CREDIT_UPDATE => Fate::Stays,
            CREDIT_REQUEST => {
                self.wants_update = true;
                Fate::Stays
            }
            _ => Fate::Reset,
        }
    }

    /// The guest has agreed; the host's program is told the port that it has.
    fn accepted(&mut self) -> Fate {
        let words = format!("OK {}\n", self.ports.host);
        // There is room for these first words, unless the program has gone.
        if !matches!((&self.stream).write(words.as_bytes()), Ok(len) if len == words.len()) {
            return Fate::Reset;
        }
        (self.is_open, self.deadline) = (true, None);
        Fate::Stays
    }

    fn put(&mut self, mut data: &[u8], now: Instant) -> Fate {
        let over = self.outgoing.len() + data.len() > ROOM;
        if over || self.guest_shut & NO_SEND != 0 {
            return Fate::Reset;
        }
        if self.outgoing.is_empty() && self.host_shut & NO_RECEIVE == 0 {
            let written = self.write(data);
            data = &data[written..];
        }
        // Not an else: the write may have found that the program takes nothing any more.
        if self.host_shut & NO_RECEIVE == 0 {
            // No more than it takes: by itself a queue takes up to twice that.
            self.outgoing.reserve_exact(data.len());
            self.outgoing.extend(data);
        } else {
            self.has_taken(data.len());
        }
        self.flush(now);
        self.fate()
    }

    fn shut(&mut self, flags: u32, now: Instant) -> Fate {
        self.guest_shut |= flags & NEITHER;
        if self.guest_shut & NO_RECEIVE != 0 {
            self.readable = false;
            // A program that writes on is to learn of it. It fails where the program has gone.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if self.guest_shut == NEITHER {
            self.deadline = Some(now + LINGER);
        }
        self.flush(now);
        self.fate()
    }

    /// The host's program takes nothing any more, so what it has not taken is lost.
    fn deafen(&mut self) {
        self.host_shut |= NO_RECEIVE;
        self.has_taken(self.outgoing.len());
        self.outgoing = VecDeque::new();
    }

    /// Writes what the socket takes of `data`.
    fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        while done < data.len() {
            match (&self.stream).write(&data[done..]) {
                Ok(len) => done += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.deafen();
                    break;
                }
            }
        }
        self.has_taken(done);
        done
    }

    fn has_taken(&mut self, len: usize) {
        #[allow(clippy::cast_possible_truncation, reason = "it counts modulo 2^32")]
        let len = len as u32;
        self.taken += len;
        self.wants_update |= (self.taken - self.told).0 >= WORTH_TELLING;
    }

    /// Has the socket take what it can of what waits for it.
    fn flush(&mut self, now: Instant) {
        let mut waiting = std::mem::take(&mut self.outgoing);
        let mut progress = false;
        while !waiting.is_empty() && self.host_shut & NO_RECEIVE == 0 {
            let written = self.write(waiting.as_slices().0);
            if written == 0 {
                break;
            }
            waiting.drain(..written);
            progress = true;
        }
        if self.host_shut & NO_RECEIVE != 0 {
            self.has_taken(waiting.len());
            waiting = VecDeque::new();
        }
        // An idle connection keeps no memory.
        self.outgoing = if waiting.is_empty() { VecDeque::new() } else { waiting };
        if progress && self.deadline.is_some() {
            self.deadline = Some(now + LINGER);
        }
        if self.guest_shut & NO_SEND != 0 && self.outgoing.is_empty() && !self.host_knows_end {
            self.host_knows_end = true;
            // It fails where the program has gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn fate(&self) -> Fate {
        match self.guest_shut == NEITHER && self.outgoing.is_empty() {
            // Which tells the guest that all has arrived.
            true => Fate::Reset,
            false => Fate::Stays,
        }
    }

    /// Without the guest: whether there is still something for the host to take.
    #[must_use]
    pub fn still_drains(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Bytes of memory that it keeps for data.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.outgoing.capacity()
    }

    /// What it has to tell the guest next, with at most `most` bytes of data, which are put into `data`. Data has been taken
    /// from the socket then; the rest changes only by [`Self::said`].
    pub fn next(&mut self, most: usize, data: &mut [u8; MOST_DATA]) -> Option<Say> {
        if let Some(op) = self.greets {
            return Some(Say::op(op));
        }
        if !self.is_open {
            return None;
        }
        self.shutdown().or_else(|| self.update()).or_else(|| self.read(most, data))
    }

    fn shutdown(&self) -> Option<Say> {
        let flags = self.host_shut;
        let new = flags & !self.host_shut_told != 0;
        new.then_some(Say { op: SHUTDOWN, flags, len: 0 })
    }

    fn update(&self) -> Option<Say> {
        self.wants_update.then(|| Say::op(CREDIT_UPDATE))
    }

    fn read(&mut self, most: usize, data: &mut [u8; MOST_DATA]) -> Option<Say> {
        if !self.readable || self.host_shut & NO_SEND != 0 || self.guest_shut & NO_RECEIVE != 0 {
            return None;
        }
        let credit = self.credit.left();
        if credit == 0 {
            return (!self.asked_for_credit).then(|| Say::op(CREDIT_REQUEST));
        }
        let most = most.min(credit).min(MOST_DATA);
        let read = loop {
            match (&self.stream).read(&mut data[..most]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        match read {
            Ok(len) if len > 0 => Some(Say { op: RW, flags: 0, len }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            // An error is that the program has closed it with something unread.
            Ok(_) | Err(_) => {
                self.readable = false;
                self.host_shut |= NO_SEND;
                self.shutdown()
            }
        }
    }

    /// The header of what [`Self::next`] has returned.
    #[must_use]
    pub fn header(&self, say: Say) -> Header {
        Header {
            src_port: self.ports.host.into(),
            dst_port: self.ports.guest.into(),
            len: u32::try_from(say.len).unwrap_or(0).into(),
            op: say.op.into(),
            flags: say.flags.into(),
            buf_alloc: u32::try_from(ROOM).unwrap_or(u32::MAX).into(),
            fwd_cnt: self.taken.0.into(),
            ..Header::default()
        }
    }

    /// The guest has got it.
    pub fn said(&mut self, say: Say, now: Instant) {
        (self.told, self.wants_update) = (self.taken, false);
        match say.op {
            REQUEST | RESPONSE => self.greets = None,
            RW => self.credit.sent(say.len),
            CREDIT_REQUEST => self.asked_for_credit = true,
            SHUTDOWN => {
                self.host_shut_told |= say.flags;
                if self.host_shut_told == NEITHER {
                    self.deadline = Some(now + LINGER);
                }
            }
            _ => {}
        }
    }
}
