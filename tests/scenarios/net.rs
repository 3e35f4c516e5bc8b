//! virtio-net: a guest talks TCP with its host over a tap, and what arrives is what was sent.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mce_relay_tests::agent::PATIENCE;
use mce_relay_tests::guest::{Guest, Options};
use mce_relay_tests::network;

use crate::virtio::Line;

/// Of the host and of the guest, which nobody has (RFC 5737).
pub(crate) const HOST: &str = "192.0.2.1";
pub(crate) const GUEST: &str = "192.0.2.2";
/// What is sent each way, in MiB.
const MIB: usize = 4;

/// In this process.
pub fn tcp_both_ways() {
    in_a_network(|| talk("tap=t0,mac=02:00:00:00:00:02"));
}

/// In the host's kernel.
pub fn tcp_both_ways_by_vhost() {
    in_a_network(|| talk("tap=t0,mac=02:00:00:00:00:02,vhost=on"));
}

/// Whether the host's kernel has vhost-net.
pub fn has_vhost() -> Result<(), String> {
    match Path::new("/dev/vhost-net").exists() {
        true => Ok(()),
        false => Err("needs /dev/vhost-net (module vhost_net)".to_owned()),
    }
}

/// In a network where there is nothing but the tap `t0`.
pub(crate) fn in_a_network(body: fn()) {
    network::with_a_tap(&format!("{HOST}/24"), body);
}

/// Transfers before and after the guest resets itself.
fn talk(net: &'static str) {
    let options = Options { virtio: true, net, reboot: true, ..Options::amd(2) };
    let mut guest = Guest::boot(&options);
    let mut shell = Line::at(&guest.path("shell"));
    for boot in 1..=2 {
        up(&mut shell);
        let mac = shell.run("cat /sys/class/net/eth0/address");
        assert!(mac.contains("02:00:00:00:00:02"), "{mac}");
        to_the_host(&guest, &mut shell);
        to_the_guest(&guest, &mut shell);
        if boot == 1 {
            shell.write("reboot -f\n");
            guest.event_where("booting", "the next boot", |event| event["boot"] == 2);
            guest.up_again();
        }
    }
    guest.power_off();
}

/// Waits for the guest's shell, and gives the guest its address.
pub(crate) fn up(shell: &mut Line) {
    shell.wait_for("a shell");
    shell.run("ip link set eth0 up");
    shell.run(&format!("ip addr add {GUEST}/24 dev eth0"));
}

/// The guest sends, and the host compares.
pub(crate) fn to_the_host(guest: &Guest, shell: &mut Line) {
    let listener = TcpListener::bind((HOST, 7000)).unwrap();
    shell.run(&format!("head -c {MIB}m /dev/urandom >/tmp/out"));
    let sent = sum_in(&shell.run("sha256sum /tmp/out"));
    shell.write(&format!("nc {HOST} 7000 </tmp/out; echo it\\ is sent=$?=\n"));
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let begun = Instant::now();
    let mut bytes = vec![0; MIB << 19];
    stream.read_exact(&mut bytes).unwrap();
    // In the middle of it nothing goes on for a while.
    guest.put("vm.pause");
    std::thread::sleep(Duration::from_millis(50));
    guest.put("vm.resume");
    stream.read_to_end(&mut bytes).unwrap();
    println!("    {MIB} MiB from the guest in {:.1} s", begun.elapsed().as_secs_f64());
    drop(stream);
    shell.wait_for("it is sent=0=");
    shell.run("rm /tmp/out");
    assert_eq!(bytes.len(), MIB << 20);
    assert_eq!(sum_of(&bytes), sent, "what came is what was sent");
}

/// The host sends, and the guest says what came.
pub(crate) fn to_the_guest(guest: &Guest, shell: &mut Line) {
    let pause = || {
        guest.put("vm.pause");
        std::thread::sleep(Duration::from_millis(50));
        guest.put("vm.resume");
    };
    assert!(to_the_guest_with(shell, pause, || false));
}

/// The same, with something that happens in the middle of it. False if the guest has `ended` before all was there.
pub(crate) fn to_the_guest_with(
    shell: &mut Line,
    happens: impl FnOnce(),
    mut ended: impl FnMut() -> bool,
) -> bool {
    shell.write("nc -l -p 7001 </dev/null >/tmp/in; echo it\\ has come=$?=\n");
    let mut bytes = vec![0; MIB << 20];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    let begun = Instant::now();
    let mut stream = loop {
        match TcpStream::connect_timeout(&format!("{GUEST}:7001").parse().unwrap(), PATIENCE) {
            Ok(stream) => break stream,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let begun = Instant::now();
    stream.write_all(&bytes[..MIB << 19]).unwrap();
    happens();
    // A guest that has gone takes nothing, and is not waited for.
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut at = MIB << 19;
    while at < bytes.len() && !ended() {
        match stream.write(&bytes[at..]) {
            Ok(more) => at += more,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                assert!(begun.elapsed() < 3 * PATIENCE, "{} of {} bytes", at, bytes.len());
            }
            Err(error) => {
                assert!(ended(), "after {at} bytes: {error}");
                break;
            }
        }
    }
    drop(stream);
    if shell.wait_unless("it has come=0=", ended).is_none() {
        return false;
    }
    println!("    {MIB} MiB to the guest in {:.1} s", begun.elapsed().as_secs_f64());
    let came = sum_in(&shell.run("sha256sum /tmp/in; rm /tmp/in"));
    assert_eq!(came, sum_of(&bytes), "what came is what was sent");
    true
}

/// The checksum in what sha256sum printed, somewhere in `text`.
fn sum_in(text: &str) -> String {
    let is_sum = |word: &&str| word.len() == 64 && word.bytes().all(|one| one.is_ascii_hexdigit());
    text.split_whitespace().find(is_sum).unwrap_or_else(|| panic!("no sum in {text:?}")).to_owned()
}

fn sum_of(bytes: &[u8]) -> String {
    let mut tool = Command::new("busybox");
    tool.arg("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = tool.spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    sum_in(&String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap())
}
