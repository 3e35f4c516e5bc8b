//! The same with virtio-vsock, with packets that are more or less good, and with programs of the host's that come, say
//! something and go.
#![no_main]

#[path = "../virtio.rs"]
mod virtio;

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mce_relay_vmm::machine::devices::virtio::vsock::Vsock;
use mce_relay_vmm::machine::devices::virtio::vsock::host::VsockLine;
use virtio::{Machine, Step};

/// The guest's address.
const CID: u64 = 3;
/// The port of the host's at which a program waits.
const PORT: u32 = 5000;
/// Where a packet's header and data are; half of it is what a step has.
const HEADER: u16 = 0xc000;
const DATA: u16 = 0xe000;

#[derive(Arbitrary, Debug)]
enum Do {
    Step(Step),
    /// The guest sends a packet of one of few connections.
    Packet {
        own: bool,
        op: u8,
        len: u16,
        flags: u8,
        alloc: u32,
        taken: u32,
        data: u8,
    },
    /// The guest offers a buffer.
    Buffer(u8, u8),
    /// A program of the host's asks for a port, and says something.
    Ask(Vec<u8>),
    /// It says something more.
    Say(Vec<u8>),
    Close,
}

fn packet(own: bool, op: u8, words: [u32; 4]) -> Vec<u8> {
    // The first port that the host takes, and one of the guest's; or the guest's connection to the program that waits.
    let (host, guest) = if own { (1 << 30, 1) } else { (PORT, 77) };
    let [len, flags, alloc, taken] = words;
    let kind_and_op = 1 | u32::from(op % 9) << 16;
    let mut bytes = [CID.to_le_bytes(), 2_u64.to_le_bytes()].concat();
    for word in [guest, host, len, kind_and_op, flags, alloc, taken] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

fn steps(doings: Vec<Do>) -> Vec<Step> {
    let descriptor = |second, at, addr: u16, len, flags| {
        let addr = addr / 2;
        Step::Descriptor { second, at, addr, len, flags, next: at + 1 }
    };
    let input = |kind: u8, bytes: Vec<u8>| Step::Input([vec![kind], bytes].concat());
    let steps = doings.into_iter().flat_map(|one| match one {
        Do::Step(step) => vec![step],
        Do::Packet { own, op, len, flags, alloc, taken, data } => vec![
            Step::Memory(HEADER, packet(own, op, [len.into(), flags.into(), alloc, taken])),
            descriptor(true, 0, HEADER, 44, 1),
            descriptor(true, 1, DATA, data.into(), 0),
            Step::Offer { second: true, head: 0 },
        ],
        Do::Buffer(at, len) => vec![
            descriptor(false, at % 16, 0x8000, len.into(), 2),
            Step::Offer { second: false, head: at % 16 },
        ],
        Do::Ask(bytes) => vec![input(0, bytes)],
        Do::Say(bytes) => vec![input(1, bytes)],
        Do::Close => vec![input(2, Vec::new())],
    });
    [Step::SetUp].into_iter().chain(steps).collect()
}

struct Host {
    path: PathBuf,
    line: Arc<VsockLine>,
    waits: UnixListener,
}

static HOST: OnceLock<Host> = OnceLock::new();

fn host() -> Host {
    let path = std::env::temp_dir().join(format!("mce-relay-fuzz-vsock-{}", std::process::id()));
    let line = Arc::new(VsockLine::open(&path).unwrap());
    let at = format!("{}_{PORT}", path.display());
    let _ = std::fs::remove_file(&at);
    let waits = UnixListener::bind(at).unwrap();
    waits.set_nonblocking(true).unwrap();
    Host { path, line, waits }
}

fuzz_target!(|doings: Vec<Do>| {
    let host = HOST.get_or_init(host);
    // Nobody of the last run.
    while host.line.listener().accept().is_ok() {}
    let clients: RefCell<Vec<UnixStream>> = RefCell::default();
    let device = Vsock::new(CID as u32, Arc::clone(&host.line)).unwrap();
    Machine::new(device).run(steps(doings), |_, bytes| {
        let mut clients = clients.borrow_mut();
        let (kind, bytes) = bytes.split_first().unwrap_or((&2, &[]));
        match kind {
            0 => {
                let mut client = UnixStream::connect(&host.path).unwrap();
                client.set_nonblocking(true).unwrap();
                let _ = client.write_all(b"CONNECT 1\n");
                let _ = client.write_all(bytes);
                clients.push(client);
            }
            1 => {
                let client = clients.last_mut().map(|client| client.write_all(bytes));
                drop(client);
            }
            _ => drop(clients.pop()),
        }
        while let Ok((client, _)) = host.waits.accept() {
            clients.push(client);
        }
        for client in clients.iter_mut() {
            client.set_nonblocking(true).unwrap();
            let _ = client.read(&mut [0; 100]);
        }
    });
});
