//! On real taps, in a network namespace that goes with the thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{config, frame};
use crate::config::{NetConfig, TapSource};
use crate::machine::devices::virtio::device::Device;
use crate::machine::devices::virtio::net::layout::{HEADER, RECEIVE, TRANSMIT};
use crate::machine::devices::virtio::net::{Net, Tap, VhostError, VhostNet, tap};
use crate::machine::devices::virtio::testing::{Driver, eventually, lose, ram, rings};
use crate::words::with_causes;

/// For local experiments (IEEE 802): nobody's but the test's.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Runs `body` on a thread in a namespace of its own, where interface `t0` is a tap. Skipped where that cannot be had.
fn with_a_tap(more: &'static str, body: impl FnOnce() + Send + 'static) {
    let run = move || {
        // SAFETY: without pointers.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return println!("SKIPPED: no network namespace: {}", io::Error::last_os_error());
        }
        if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
            return println!("SKIPPED: no taps: {error}");
        }
        if let Err(error) = Command::new("ip").arg("-V").output() {
            return println!("SKIPPED: no ip: {error}");
        }
        ip(&format!("tuntap add dev t0 mode tap {more}"));
        ip("link set t0 up");
        body();
    };
    std::thread::spawn(run).join().unwrap();
}

fn ip(words: &str) {
    let out = Command::new("ip").args(words.split_whitespace()).output().unwrap();
    assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
}

fn by_name(name: &str) -> NetConfig {
    NetConfig { tap: TapSource::Name(name.into()), ..config() }
}

/// The kernel's side of interface `t0`.
struct Wire(OwnedFd);

impl Wire {
    fn new() -> Self {
        let protocol = i32::from(u16::from_ne_bytes(ETHERTYPE));
        // SAFETY: without pointers; the descriptor is new.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, protocol);
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        let wire = Self(socket);
        let address = wire.address();
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is valid and of that length.
        let bound = unsafe { libc::bind(wire.0.as_raw_fd(), (&raw const address).cast(), len) };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        wire
    }

    fn address(&self) -> libc::sockaddr_ll {
        // SAFETY: plain data; all zero is valid. The name is a string.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = u16::from_ne_bytes(ETHERTYPE);
            address.sll_ifindex = libc::if_nametoindex(c"t0".as_ptr()) as i32;
            address
        }
    }

    fn send(&self, bytes: &[u8]) {
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(sent, bytes.len() as isize, "{}", io::Error::last_os_error());
    }

    fn receive(&self) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(20);
        let mut bytes = vec![0; 70_000];
        loop {
            // SAFETY: the buffer is valid for its length.
            let len = unsafe {
                libc::recv(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0)
            };
            if let Ok(len) = usize::try_from(len) {
                bytes.truncate(len);
                return bytes;
            }
            assert!(Instant::now() < end, "no frame came: {}", io::Error::last_os_error());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Between two cards that nobody has.
fn addressed(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = frame(len, seed);
    bytes[..12].copy_from_slice(&[2, 0, 0, 0, 0, 7, 2, 0, 0, 0, 0, 8]);
    bytes[12..14].copy_from_slice(&ETHERTYPE);
    bytes
}

/// Waits until the kernel sends on `t0`. It begins some time after somebody opened the tap, by work of its own that waits
/// for every other interface of the machine (net/core/link_watch.c), and until then it drops frames without an error.
fn carries() {
    eventually("the kernel sends on t0", || {
        let out = Command::new("ip").args(["-o", "link", "show", "t0"]).output().unwrap();
        String::from_utf8_lossy(&out.stdout).contains("state UP")
    });
}

/// One frame each way. The kernel has its own to send, too, so the guest takes what comes until the right one is there.
fn exchange(driver: &mut Driver, wire: &Wire, seed: u8) {
    carries();
    let out = addressed(1514, seed);
    let bytes = [&[0; HEADER][..], &out].concat();
    driver.memory.write_slice(&bytes, GuestAddress(0x8000)).unwrap();
    let before = driver.used(TRANSMIT);
    driver.add(TRANSMIT, 0, &[(0x8000, 12, false), (0x800c, 1514, false)]);
    driver.wait_used(TRANSMIT, before.wrapping_add(1));
    assert_eq!(wire.receive(), out);
    let expected = addressed(1514, seed.wrapping_add(1));
    wire.send(&expected);
    loop {
        let before = driver.used(RECEIVE);
        driver.add(RECEIVE, 0, &[(0xa000, 2000, true)]);
        driver.wait_used(RECEIVE, before.wrapping_add(1));
        let len = driver.used_entry(RECEIVE, before).1 as usize;
        let mut bytes = vec![0; len];
        driver.memory.read_slice(&mut bytes, GuestAddress(0xa000)).unwrap();
        // Behind it the number of buffers, which the host's kernel says from Linux 6.14 on.
        assert_eq!(bytes[..10], [0; 10]);
        if bytes[HEADER..] == expected {
            return;
        }
        assert_ne!(bytes[24..26], ETHERTYPE, "another frame than was sent");
    }
}

#[test]
fn frames_pass_both_ways_until_the_tap_is_taken_away() {
    with_a_tap("", || {
        let config = by_name("t0");
        let tap = Tap::open(&config.tap).unwrap();
        assert_eq!(tap.mtu(), Some(1500));
        let mut driver = Driver::ready(Box::new(Net::new(tap, &config)), 2);
        let wire = Wire::new();
        for seed in 0..3 {
            exchange(&mut driver, &wire, seed);
            driver.set_up(2);
        }
        driver.add(RECEIVE, 0, &[(0xa000, 2000, true)]);
        driver.kick(RECEIVE as u32);
        ip("link del t0");
        let link = |driver: &Driver| {
            let mut bytes = [0xaa; 2];
            driver.window.read(u64::from(VIRTIO_MMIO_CONFIG) + 6, &mut bytes);
            u16::from_le_bytes(bytes)
        };
        eventually("the link goes down", || {
            // A frame of the kernel's may have taken the buffer.
            driver.add(RECEIVE, 0, &[(0xa000, 2000, true)]);
            driver.kick(RECEIVE as u32);
            link(&driver) == 0
        });
        assert!(!driver.needs_reset());
    });
}

/// A descriptor of an interface as somebody else hands it over.
fn attached(name: &str, flags: i32) -> File {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = tap::request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_NO_PI | flags) as i16;
    // A child that another test has just started may have the last descriptor of it still.
    eventually("the interface is free", || {
        // SAFETY: the kernel reads an ifreq, which the reference is to.
        let done = unsafe { ioctl_with_ref(&tap, libc::TUNSETIFF, &request) };
        let error = io::Error::last_os_error();
        assert!(done == 0 || error.raw_os_error() == Some(libc::EBUSY), "{error}");
        done == 0
    });
    tap
}

#[test]
fn by_descriptor_also_with_headers_and_at_each_boot() {
    with_a_tap("", || {
        let wire = Wire::new();
        for header in [0, libc::IFF_VNET_HDR] {
            let held = attached("t0", libc::IFF_TAP | header);
            for boot in 0..2 {
                let config = NetConfig { tap: TapSource::Fd(held.as_raw_fd()), ..config() };
                let tap = Tap::open(&config.tap).unwrap();
                assert_eq!((tap.has_header(), tap.mtu()), (header != 0, None));
                assert_eq!(tap.to_string(), "t0");
                let mut driver = Driver::ready(Box::new(Net::new(tap, &config)), 2);
                exchange(&mut driver, &wire, boot);
            }
        }
    });
}

#[test]
fn with_several_queues() {
    with_a_tap("multi_queue", || {
        let config = by_name("t0");
        let tap = Tap::open(&config.tap).unwrap();
        let mut driver = Driver::ready(Box::new(Net::new(tap, &config)), 2);
        exchange(&mut driver, &Wire::new(), 1);
    });
}

#[test]
fn what_is_no_tap_is_named() {
    with_a_tap("", || {
        let error = |source: TapSource| with_causes(&Tap::open(&source).unwrap_err());
        let of_name = |name: &str| error(TapSource::Name(name.into()));
        let absent = of_name("nosuch");
        assert!(absent.contains("\"nosuch\"") && absent.contains("ip tuntap add"), "{absent}");
        let lo = of_name("lo");
        assert!(lo.contains("not a tap"), "{lo}");
        let first = Tap::open(&TapSource::Name("t0".into())).unwrap();
        let held = of_name("t0");
        assert!(held.contains("another process uses it"), "{held}");
        // As the kernel may still have it when a guest starts over.
        let closing = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(first);
        });
        let _held = Tap::open(&TapSource::Name("t0".into())).unwrap();
        closing.join().unwrap();
        let (null, _pair) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let socket = error(TapSource::Fd(null.as_raw_fd()));
        assert!(socket.contains("is not a tap"), "{socket}");
        let tun = attached("t1", libc::IFF_TUN);
        let tun = error(TapSource::Fd(tun.as_raw_fd()));
        assert!(tun.contains("is a tun"), "{tun}");
        let closed = error(TapSource::Fd(100_000));
        assert!(closed.contains("100000") && closed.contains("is not a tap"), "{closed}");
    });
}

/// Opens a device in the host's kernel, or says why not.
fn vhost(config: &NetConfig, memory: &crate::machine::memory::DeviceMemory) -> Option<VhostNet> {
    let tap = Tap::open(&config.tap).unwrap();
    match VhostNet::open(tap, config, memory) {
        Ok(device) => Some(device),
        Err(error @ VhostError::Open(_)) => {
            println!("SKIPPED: {}", with_causes(&error));
            None
        }
        Err(error) => panic!("{}", with_causes(&error)),
    }
}

#[test]
fn in_the_hosts_kernel() {
    with_a_tap("", || {
        let (config, memory) = (by_name("t0"), ram());
        let Some(device) = vhost(&config, &memory) else { return };
        assert_eq!(device.queue_sizes().len(), 2);
        let mut driver = Driver::with_memory(Box::new(device), memory);
        let wire = Wire::new();
        for seed in 0..3 {
            driver.set_up(2);
            exchange(&mut driver, &wire, seed);
            eventually("an interrupt", || driver.take_interrupt().is_some());
            driver.control.pause();
            wire.send(&addressed(100, 77));
            driver.add(RECEIVE, 0, &[(0xa000, 2000, true)]);
            driver.kick(RECEIVE as u32);
            let before = driver.used(RECEIVE);
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(driver.used(RECEIVE), before, "it is at rest while the VM is paused");
            driver.control.resume();
            eventually("a frame", || driver.used(RECEIVE) != before);
        }
    });
}

/// The kernel finds rings that it cannot use: the device asks for a reset, and works after it.
#[test]
fn in_the_hosts_kernel_with_rings_that_are_none() {
    with_a_tap("", || {
        let (config, memory) = (by_name("t0"), ram());
        let Some(device) = vhost(&config, &memory) else { return };
        let mut driver = Driver::with_memory(Box::new(device), memory);
        let wire = Wire::new();
        for seed in 0..2 {
            driver.set_up(2);
            driver.set_avail_index(TRANSMIT, 1000);
            driver.kick(TRANSMIT as u32);
            eventually("a wish to be reset", || driver.needs_reset());
            driver.set_up(2);
            exchange(&mut driver, &wire, seed);
        }
        // A head beyond the queue.
        driver.set_up(2);
        driver.offer(TRANSMIT, u16::MAX);
        driver.kick(TRANSMIT as u32);
        eventually("a wish to be reset", || driver.needs_reset());
    });
}

/// The kernel reads and writes the guest's own mapping, whose bad pages it does not survive there by itself.
#[test]
fn in_the_hosts_kernel_with_bad_pages() {
    with_a_tap("", || {
        let (config, memory) = (by_name("t0"), ram());
        let Some(device) = vhost(&config, &memory) else { return };
        let mut driver = Driver::with_memory(Box::new(device), memory);
        let wire = Wire::new();
        driver.set_up(2);
        let start = 0x8_1000 - 0x100;
        let bytes = [&[0; HEADER][..], &addressed(1000, 9)].concat();
        driver.memory.write_slice(&bytes, GuestAddress(start)).unwrap();
        if !lose(&driver.memory, 0x8_1000) {
            return;
        }
        for times in 1..3 {
            driver.add(TRANSMIT, 0, &[(start, 1012, false)]);
            driver.wait_used(TRANSMIT, times);
        }
        // The next one on the wire is this one's.
        exchange(&mut driver, &wire, 1);
        assert!(!driver.needs_reset());
        // The kernel says that this frame is whole (tun_put_user of Linux 6.1 to 6.12 at least), and goes on.
        let expected = addressed(1000, 10);
        wire.send(&expected);
        loop {
            let before = driver.used(RECEIVE);
            driver.add(RECEIVE, 0, &[(start, 2000, true)]);
            driver.wait_used(RECEIVE, before.wrapping_add(1));
            if driver.used_entry(RECEIVE, before).1 == 1012 {
                break;
            }
        }
        let mut begin = [0; 0x100 - HEADER];
        driver.memory.read_slice(&mut begin, GuestAddress(start + HEADER as u64)).unwrap();
        assert_eq!(begin, expected[..begin.len()], "up to the bad page");
        exchange(&mut driver, &wire, 20);
        assert!(!driver.needs_reset());
        // Of a header it does see that it cannot be written.
        driver.add(RECEIVE, 0, &[(0x8_1000, 2000, true)]);
        driver.kick(RECEIVE as u32);
        wire.send(&expected);
        eventually("a wish to be reset", || driver.needs_reset());
        driver.set_up(2);
        exchange(&mut driver, &wire, 30);
        for ring in [0x1000, 0x2000, 0] {
            let memory = ram();
            drop(driver);
            let device = vhost(&config, &memory).unwrap();
            driver = Driver::with_memory(Box::new(device), memory);
            driver.set_up(2);
            driver.descriptor(TRANSMIT, 0, (0x8000, 100, 0, 0));
            lose(&driver.memory, rings(TRANSMIT) + ring);
            if ring != 0x1000 {
                driver.offer(TRANSMIT, 0);
            }
            driver.kick(TRANSMIT as u32);
            eventually("a wish to be reset", || driver.needs_reset());
        }
    });
}
