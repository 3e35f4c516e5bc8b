//! Pages go bad under the queues of a network device and of vsock, while something is on its way: it arrives whole or
//! breaks, and is never wrong; the VMM lives, and its ledger has each page. A guest whose kernel reads one of its own may
//! panic, which is the guest's affair: it starts over, on good memory.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use mce_relay_tests::agent::{Agent, PATIENCE, hex};
use mce_relay_tests::guest::{Guest, Options};

use serde_json::Value;

use crate::net::{self, GUEST, HOST};
use crate::virtio::Line;
use crate::vsock;

/// Entries of each queue here.
const ENTRIES: u16 = 256;
/// Of both devices.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// What the guest sends over and over.
const PATTERN: &[u8] = b"0123456789abcde\n";
/// After so long without a byte nothing more is expected.
const SILENCE: Duration = Duration::from_secs(10);

/// The device knows of the pages.
pub fn net() {
    net::in_a_network(|| of_net(Options::amd(2), true, "tap=t0"));
}

/// Nobody is told of a page before somebody touches it, and that is the device.
pub fn net_touched_first_by_the_device() {
    net::in_a_network(|| of_net(Options::amd(2).late(), true, "tap=t0"));
}

/// In the host's kernel, which calls a buffer of the guest's full that it could not fill: the guest's kernel meets those.
pub fn net_by_vhost() {
    net::in_a_network(|| of_net(Options::amd(2), false, "tap=t0,vhost=on"));
}

/// The device knows of the pages.
pub fn vsock() {
    of_vsock(Options::amd(2));
}

/// The device is the first to touch them.
pub fn vsock_touched_first_by_the_device() {
    of_vsock(Options::amd(2).late());
}

/// A guest, and how often it has booted.
struct Setup {
    guest: Guest,
    boot: u64,
    /// Events of before.
    past: usize,
}

impl Setup {
    fn boot(options: Options) -> Self {
        let guest = Guest::boot(&Options { reboot: true, ..options });
        let past = guest.events().len();
        Self { guest, boot: 1, past }
    }

    /// Since it came up its kernel has panicked, or it starts over for another reason.
    fn has_ended(&self) -> bool {
        let events = self.guest.events();
        let names = events[self.past..].iter().map(|event| &event["event"]);
        names.into_iter().any(|name| name == "panicked" || name == "reset" || name == "booting")
    }

    /// Has the guest start over, unless it does so by itself, and waits for it.
    fn next_boot(&mut self) {
        if !self.has_ended() {
            // It fails where the guest does so at this moment.
            self.guest.command("reset", &[]);
        }
        let next = |properties: &Value| properties["boot"].as_u64() > Some(self.boot);
        let event = self.guest.event_where("booting", "the next boot", next);
        self.boot = event["boot"].as_u64().unwrap();
        self.guest.up_again();
        self.past = self.guest.events().len();
    }

    /// Poisons these pages, at once: a guest may panic of one of them.
    fn lose(&self, pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
        let pages: BTreeSet<u64> = pages.into_iter().collect();
        self.guest.poison_many(&pages.iter().copied().collect::<Vec<_>>());
        pages
    }

    /// Waits until the relay has seen all of `pages`.
    fn knows(&self, pages: &BTreeSet<u64>) {
        for gpa in pages {
            self.guest
                .event_where("seen", &format!("{gpa:#x}"), |event| hex(&event["gpa"]) == *gpa);
        }
    }

    fn waits_for_a_reset(&self, name: &str) -> bool {
        self.guest.log().contains(&format!("virtio-{name} stops until the guest resets it"))
    }

    /// The pages of the buffers that the driver has offered on a queue and not got back, in the order of their turns.
    fn offered(&self, name: &str, index: usize) -> Vec<u64> {
        let [descriptors, avail, used] = self.guest.rings(name, index);
        let word = |at: u64| {
            let bytes = self.guest.memory(at).read(2);
            u16::from_le_bytes([bytes[0], bytes[1]])
        };
        let (mut next, end) = (word(used + 2), word(avail + 2));
        let mut pages = Vec::new();
        while next != end && pages.len() < 1000 {
            let head = word(avail + 4 + u64::from(next % ENTRIES) * 2);
            self.chain(descriptors, head, &mut |addr| pages.push(addr & !0xfff));
            next = next.wrapping_add(1);
        }
        pages.dedup();
        pages
    }

    fn chain(&self, table: u64, first: u16, found: &mut impl FnMut(u64)) {
        const NEXT: u16 = 1;
        const INDIRECT: u16 = 4;
        let mut at = first;
        for _ in 0..ENTRIES {
            let bytes = self.guest.memory(table + u64::from(at) * 16).read(16);
            let (addr, rest) = bytes.split_at(8);
            let addr = u64::from_le_bytes(addr.try_into().unwrap());
            let flags = u16::from_le_bytes([rest[4], rest[5]]);
            match flags & INDIRECT {
                0 => found(addr),
                _ => self.chain(addr, 0, found),
            }
            if flags & NEXT == 0 {
                return;
            }
            at = u16::from_le_bytes([rest[6], rest[7]]);
        }
    }
}

fn of_net(options: Options, receives: bool, net: &'static str) {
    let mut setup = Setup::boot(Options { virtio: true, net, ..options });
    let mut shell = Line::at(&setup.guest.path("shell"));
    net::up(&mut shell);
    if receives && !buffers_for_frames(&setup, &mut shell) {
        setup.next_boot();
        net::up(&mut shell);
    }
    frames_on_their_way(&setup, &mut shell);
    setup.next_boot();
    until_the_device_is_first(&mut setup, |setup| {
        net::up(&mut shell);
        a_ring_of_net(setup, &mut shell)
    });
    net::up(&mut shell);
    net::to_the_host(&setup.guest, &mut shell);
    net::to_the_guest(&setup.guest, &mut shell);
    setup.guest.power_off();
}

/// A frame whose buffer is bad goes into the next one, and all arrives. False if the guest has panicked before.
fn buffers_for_frames(setup: &Setup, shell: &mut Line) -> bool {
    let mut bad = BTreeSet::new();
    let lose = || {
        // Not those that the device may have in its hands. Of the 32 KiB that Linux cuts buffers from the first page has
        // no end of a buffer that begins elsewhere: such a buffer may be filled, and the driver writes to its end.
        let begins = |page: &u64| page.is_multiple_of(0x8000);
        let begun = Instant::now();
        // A guest that is slow to offer new buffers has none to spare for the moment.
        let pages = loop {
            let offered = setup.offered("net", RECEIVE).into_iter().skip(16);
            let pages: Vec<u64> = offered.filter(begins).take(4).collect();
            if pages.len() > 1 {
                break pages;
            }
            assert!(begun.elapsed() < PATIENCE, "no buffers to spare: {pages:x?}");
            std::thread::sleep(Duration::from_millis(20));
        };
        bad = setup.lose(pages);
    };
    let has_arrived = net::to_the_guest_with(shell, lose, || setup.has_ended());
    assert!(bad.len() > 1, "{bad:x?}");
    let end = if has_arrived { "all has arrived" } else { "a panic of the guest" };
    println!("    {} pages of buffers to fill: {end}", bad.len());
    if has_arrived {
        setup.knows(&bad);
    }
    has_arrived
}

/// A frame in a bad page is not sent. The guest's kernel has use for the page, too: it may panic.
fn frames_on_their_way(setup: &Setup, shell: &mut Line) {
    const BYTES: usize = 64 << 20;
    let listener = TcpListener::bind((HOST, 7002)).unwrap();
    shell.write(&format!("yes 0123456789abcde | head -c 64m | nc {HOST} 7002\n"));
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut got = 0;
    let mut bad = BTreeSet::new();
    while bad.is_empty() && got < BYTES / 2 {
        got += goes_on_as(PATTERN, got, &mut stream).unwrap_or_else(|end| panic!("{end:?}"));
        if got < 1 << 20 {
            continue;
        }
        setup.guest.put("vm.pause");
        let waiting = setup.offered("net", TRANSMIT);
        bad = setup.lose(waiting.last().copied());
        setup.guest.put("vm.resume");
    }
    assert!(!bad.is_empty(), "no frame was found on its way");
    let begun = Instant::now();
    let mut last = Instant::now();
    let end = loop {
        match goes_on_as(PATTERN, got, &mut stream) {
            Ok(0) => break "the end",
            Ok(more) => (got, last) = (got + more, Instant::now()),
            Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break "a reset",
        }
        if setup.has_ended() {
            break "a panic of the guest";
        }
        if last.elapsed() > SILENCE || begun.elapsed() > PATIENCE {
            break "silence";
        }
    };
    setup.knows(&bad);
    println!("    a page of a frame on its way: {got} bytes as they were sent, then {end}");
    assert!(got == BYTES || end != "the end", "an end that is none after {got} bytes");
}

/// Reads once. All that has come has to be `pattern`, over and over.
fn goes_on_as(pattern: &[u8], at: usize, stream: &mut impl Read) -> Result<usize, ErrorKind> {
    let mut bytes = [0; 65536];
    let len = stream.read(&mut bytes).map_err(|error| error.kind())?;
    let wrong =
        bytes[..len].iter().zip(at..).find(|(byte, at)| **byte != pattern[at % pattern.len()]);
    assert_eq!(wrong, None, "a wrong byte");
    Ok(len)
}

/// Loses the page of a ring, once in each boot, until the device touches it before the guest's driver does. The driver
/// writes to the page whenever it has a new buffer, and its kernel panics then: the device has had nothing to do.
fn until_the_device_is_first(setup: &mut Setup, mut lose: impl FnMut(&mut Setup) -> bool) {
    const BOOTS: usize = 5;
    for _ in 0..BOOTS {
        let device_was_first = lose(setup);
        setup.next_boot();
        if device_was_first {
            return;
        }
        println!("    a page of a ring: the guest touches it before the device does, and panics");
    }
    panic!("in {BOOTS} boots the guest touched the ring before the device did");
}

/// The device asks for a reset, and the guest goes on without a network. False if the guest has panicked before.
fn a_ring_of_net(setup: &Setup, shell: &mut Line) -> bool {
    let told = || setup.guest.log().matches("virtio-net stops until").count();
    let before = told();
    let bad = setup.lose([setup.guest.rings("net", RECEIVE)[0]]);
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    let begun = Instant::now();
    while told() == before {
        // The device may have asked between the two looks.
        if setup.has_ended() && told() == before {
            setup.knows(&bad);
            return false;
        }
        assert!(begun.elapsed() < PATIENCE, "it did not ask for a reset: {}", setup.guest.log());
        // No answer to who has this address is an error, too.
        let _ = socket.send_to(b"?", (GUEST, 9));
        std::thread::sleep(Duration::from_millis(20));
    }
    setup.knows(&bad);
    // Its driver may have touched the page, too.
    shell.write("echo it\\ lives=$?=\n");
    let lives = shell.wait_unless("it lives=0=", || setup.has_ended()).is_some();
    let guest = if lives { "lives" } else { "panics" };
    println!("    a page of a ring: the device asks for a reset, the guest {guest}");
    true
}

fn of_vsock(options: Options) {
    let mut setup = Setup::boot(Options { vsock: true, ..options });
    let listener = UnixListener::bind(setup.guest.path("vsock_5000")).unwrap();
    let socket = setup.guest.path("vsock");
    let mut agent = Agent::over_vsock(&socket, vsock::AGENT).unwrap();
    buffers_for_packets(&setup, &mut agent, &listener);
    setup.next_boot();
    drop(Agent::over_vsock(&socket, vsock::AGENT).unwrap());
    until_the_device_is_first(&mut setup, a_ring_of_vsock);
    let mut agent = Agent::over_vsock(&socket, vsock::AGENT).unwrap();
    vsock::echo(&mut agent, &listener);
    setup.guest.power_off();
}

/// The connection whose data it would have been breaks. The guest's kernel frees the buffer, and may write to it then.
fn buffers_for_packets(setup: &Setup, agent: &mut Agent, listener: &UnixListener) {
    agent.tell("echo 5000");
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let block = PATTERN.repeat(4096);
    let mut bad = BTreeSet::new();
    let (mut sent, mut got, mut last) = (0, 0, Instant::now());
    let end = loop {
        if bad.is_empty() && got > 1 << 20 {
            let offered: BTreeSet<u64> =
                setup.offered("vsock", RECEIVE).into_iter().skip(16).collect();
            bad = setup.lose(offered.into_iter().take(4));
        }
        // The write may end within a line.
        let from = sent % PATTERN.len();
        match stream.write(&block[from..]) {
            Ok(more) => sent += more,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break "a reset",
        }
        match goes_on_as(PATTERN, got, &mut stream) {
            Ok(0) => break "the end",
            Ok(more) => (got, last) = (got + more, Instant::now()),
            Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break "a reset",
        }
        if setup.has_ended() {
            break "a panic of the guest";
        }
        assert!(got < 1 << 30, "nothing has broken");
        if last.elapsed() > SILENCE {
            break "silence";
        }
    };
    assert!(!bad.is_empty());
    // The guest may panic of one before the device comes to the others.
    let is_one = |event: &Value| bad.contains(&hex(&event["gpa"]));
    setup.guest.event_where("seen", "one of the buffers", is_one);
    println!(
        "    {} pages of buffers to fill: {got} bytes as they were sent, then {end}",
        bad.len()
    );
}

/// The device asks for a reset and closes its connections, and the guest goes on without it. False if the guest has
/// panicked before.
fn a_ring_of_vsock(setup: &mut Setup) -> bool {
    let bad = setup.lose([setup.guest.rings("vsock", RECEIVE)[0]]);
    let mut stream = UnixStream::connect(setup.guest.path("vsock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The device may have met the page already, and close the connection before or behind the words.
    if let Err(error) = stream.write_all(b"CONNECT 1024\n") {
        assert_eq!(error.kind(), ErrorKind::BrokenPipe, "{error}");
    }
    let end = stream.read(&mut [0]).map_err(|error| error.kind());
    setup.knows(&bad);
    if !setup.waits_for_a_reset("vsock") {
        // Then it is closed by the end of the guest, or answered by the agent of the next boot.
        assert!(setup.has_ended(), "it did not ask for a reset: {end:?}, {}", setup.guest.log());
        return false;
    }
    assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "it is closed: {end:?}");
    // Its driver may have touched the page, too.
    setup.guest.agent.tell("ping");
    let begun = Instant::now();
    let guest = loop {
        if setup.guest.agent.reply("ping", Instant::now() + Duration::from_secs(1)).is_ok() {
            break "lives";
        }
        if setup.has_ended() {
            break "panics";
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "the guest neither answers nor says that it has panicked"
        );
    };
    println!("    a page of a ring: the device asks for a reset, the guest {guest}");
    true
}
