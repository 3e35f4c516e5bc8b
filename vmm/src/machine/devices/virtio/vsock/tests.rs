#![allow(clippy::cast_possible_truncation, reason = "the numbers are small")]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::connection::ROOM;
use super::packet::*;
use super::*;
use crate::machine::devices::virtio::testing::{Buffer, Driver, RAM, eventually, lose, rings};

mod bad_memory;
mod bad_pages;
mod ends;
mod flow;
mod hostile;
mod hostile2;
mod limits;
mod meeting;

const CID: u32 = 7;
/// Where the guest's buffers are, and how long each is.
const BUFFERS: u64 = 0x4_0000;
const BUFFER: u64 = 0x4000;
const COUNT: u16 = 8;
/// Where the guest's packets are.
const HEADERS: u64 = 0x8000;
const DATA: u64 = 0x8_0000;
/// The guest's room for each connection.
const GUEST_ROOM: u32 = 1 << 20;

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// A guest with a driver, and the host's programs.
struct Guest {
    driver: Driver,
    dir: TempDir,
    line: Arc<VsockLine>,
    /// Buffers that came back and were looked at.
    seen: u16,
    /// What was received on each connection, as the guest tells it.
    taken: HashMap<Ports, u32>,
}

/// As in a VMM no arena of glibc's is given back in part, for which it would open a file: one of a test's threads would be.
fn keep_arenas() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    // SAFETY: it changes a setting of the allocator only.
    ONCE.call_once(|| unsafe {
        assert_eq!(libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX), 1);
    });
}

impl Guest {
    fn new() -> Self {
        keep_arenas();
        let dir = tempfile::tempdir().unwrap();
        let line = Arc::new(VsockLine::open(&dir.path().join("v")).unwrap());
        let device = Vsock::new(CID, Arc::clone(&line)).unwrap();
        let driver = Driver::new(Box::new(device));
        let mut guest = Self { driver, dir, line, seen: 0, taken: HashMap::new() };
        guest.set_up();
        guest
    }

    fn set_up(&mut self) {
        self.driver.set_up(3);
        (self.seen, self.taken) = (0, HashMap::new());
        for head in 0..COUNT {
            let at = BUFFERS + u64::from(head) * BUFFER;
            self.driver.add(RECEIVE, head, &[(at, BUFFER as u32, true)]);
        }
        self.driver.kick(RECEIVE as u32);
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    fn client(&self) -> UnixStream {
        patient(UnixStream::connect(self.path()).unwrap())
    }

    /// A program that waits for the guest.
    fn listener(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    fn header(&self, op: u16, ports: Ports) -> Header {
        Header {
            src_cid: u64::from(CID).into(),
            dst_cid: HOST_CID.into(),
            src_port: ports.guest.into(),
            dst_port: ports.host.into(),
            kind: STREAM.into(),
            op: op.into(),
            buf_alloc: GUEST_ROOM.into(),
            fwd_cnt: self.taken.get(&ports).copied().unwrap_or(0).into(),
            ..Header::default()
        }
    }

    /// Sends these bytes as a packet, of which the data is said to be at `data`.
    fn put(&mut self, header: &Header, data: Option<Buffer>) {
        self.driver.memory.write_slice(header.as_bytes(), GuestAddress(HEADERS)).unwrap();
        let first = (HEADERS, HEADER as u32, false);
        let buffers: Vec<Buffer> = [first].into_iter().chain(data).collect();
        let before = self.driver.used(TRANSMIT);
        self.driver.add(TRANSMIT, 0, &buffers);
        self.driver.wait_used(TRANSMIT, before.wrapping_add(1));
    }

    fn say(&mut self, op: u16, ports: Ports) {
        let header = self.header(op, ports);
        self.put(&header, None);
    }

    fn shut(&mut self, flags: u32, ports: Ports) {
        let header = Header { flags: flags.into(), ..self.header(SHUTDOWN, ports) };
        self.put(&header, None);
    }

    fn write(&mut self, ports: Ports, data: &[u8]) {
        let len = data.len() as u32;
        self.driver.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        let header = Header { len: len.into(), ..self.header(RW, ports) };
        self.put(&header, Some((DATA, len, false)));
    }

    /// The next packet, if there is one.
    fn look(&mut self) -> Option<(Header, Vec<u8>)> {
        if self.driver.used(RECEIVE) == self.seen {
            return None;
        }
        let (head, len) = self.driver.used_entry(RECEIVE, self.seen);
        self.seen = self.seen.wrapping_add(1);
        let at = BUFFERS + u64::from(head) * BUFFER;
        let mut bytes = vec![0; len as usize];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        self.driver.offer(RECEIVE, head as u16);
        self.driver.kick(RECEIVE as u32);
        let (header, data) = bytes.split_at(HEADER);
        let header = Header::read_from_bytes(header).unwrap();
        assert_eq!(header.len.get() as usize, data.len());
        if header.op.get() == RW {
            *self.taken.entry(ports_of(&header)).or_default() += header.len.get();
        }
        Some((header, data.to_vec()))
    }

    fn packet(&mut self) -> (Header, Vec<u8>) {
        let mut found = None;
        eventually("a packet", || {
            found = self.look();
            found.is_some()
        });
        found.unwrap()
    }

    /// The next packet, which has to be of this kind; from now on without its data.
    fn expect(&mut self, op: u16) -> Header {
        let (header, data) = self.packet();
        assert_eq!(header.op, op, "{header:?} {data:?}");
        assert_eq!((header.src_cid.get(), header.dst_cid.get()), (HOST_CID, u64::from(CID)));
        header
    }

    fn expect_shut(&mut self, flags: u32, ports: Ports) {
        let header = self.expect(SHUTDOWN);
        assert_eq!((header.flags.get(), ports_of(&header)), (flags, ports));
    }

    /// The host's program has gone: the guest learns it in one or two packets.
    fn expect_end(&mut self, ports: Ports) {
        let mut flags = 0;
        while flags != NEITHER {
            let header = self.expect(SHUTDOWN);
            assert_eq!(ports_of(&header), ports);
            flags |= header.flags.get();
        }
    }

    fn expect_reset(&mut self, ports: Ports) {
        let header = self.expect(RST);
        assert_eq!(ports_of(&header), ports);
    }

    /// Takes data until there are `len` bytes.
    fn read(&mut self, ports: Ports, len: usize) -> Vec<u8> {
        let mut got = Vec::new();
        while got.len() < len {
            let (header, data) = self.packet();
            assert_eq!((header.op.get(), ports_of(&header)), (RW, ports), "{header:?}");
            got.extend(data);
        }
        assert_eq!(got.len(), len);
        got
    }

    /// The same, whatever comes for others.
    fn read_among_others(&mut self, ports: Ports, len: usize) -> Vec<u8> {
        let mut got = Vec::new();
        while got.len() < len {
            let (header, data) = self.packet();
            if ports_of(&header) == ports {
                assert_eq!(header.op, RW);
                got.extend(data);
            }
        }
        got
    }

    /// A program of the host's is connected to the guest's `port`.
    fn connected(&mut self, port: u32) -> (UnixStream, Ports) {
        let mut client = self.client();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let request = self.expect(REQUEST);
        assert_eq!(request.dst_port, port);
        let ports = ports_of(&request);
        self.say(RESPONSE, ports);
        assert_eq!(read_line(&mut client), format!("OK {}", ports.host));
        (client, ports)
    }

    /// The guest is connected to a program of the host's.
    fn connected_out(&mut self, ports: Ports) -> UnixStream {
        let listener = self.listener(ports.host);
        self.say(REQUEST, ports);
        let response = self.expect(RESPONSE);
        assert_eq!((ports_of(&response), response.buf_alloc.get()), (ports, ROOM as u32));
        patient(listener.accept().unwrap().0)
    }

    /// The connections work in both directions.
    fn talk(&mut self, client: &mut UnixStream, ports: Ports) {
        client.write_all(b"to the guest").unwrap();
        assert_eq!(self.read(ports, 12), b"to the guest");
        self.write(ports, b"to the host");
        assert_eq!(read(client, 11), b"to the host");
    }
}

/// Of a packet to the guest.
fn ports_of(header: &Header) -> Ports {
    Ports { host: header.src_port.get(), guest: header.dst_port.get() }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    loop {
        match read(stream, 1)[0] {
            b'\n' => return String::from_utf8(line).unwrap(),
            byte => line.push(byte),
        }
    }
}

/// Nothing more comes, as the other side has closed.
fn is_over(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(len) => len == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ (at / 251 % 256) as u8).collect()
}
