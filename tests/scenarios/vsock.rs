//! Virtio sockets: programs of the guest and of the host find each other through them.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Instant;

use mce_relay_tests::agent::{Agent, PATIENCE};
use mce_relay_tests::guest::{Guest, Options};

pub(crate) const AGENT: u32 = 1024;
const ECHO: u32 = 5000;
/// As many bytes in each direction.
const BYTES: usize = 8 << 20;

/// The host reaches the guest's agent, which tells of a bad page as it does on the serial port; the guest reaches a program
/// of the host's, and some MiB come back from there as they went. And again after the guest has started over, at the same
/// sockets.
pub fn the_agent_and_some_mib() {
    let options = Options { vsock: true, reboot: true, ..Options::amd(2).ghes() };
    let mut guest = Guest::boot(&options);
    let socket = guest.path("vsock");
    let listener = UnixListener::bind(guest.path(&format!("vsock_{ECHO}"))).unwrap();
    for boot in 1..=2 {
        let mut agent = Agent::over_vsock(&socket, AGENT).unwrap();
        nobody_is_at_another_port(&socket);
        let pages = agent.alloc("anon", 8);
        guest.poison(pages[3].gpa, "hwpoison-inject");
        agent.sigbus_ao(pages[3]);
        agent.others_intact(&pages, &[pages[3]]);

        let start = Instant::now();
        echo(&mut agent, &listener);
        let took = start.elapsed().as_secs_f64();
        println!("    boot {boot}: {} MiB to the guest and back in {took:.1} s", BYTES >> 20);

        if boot == 1 {
            agent.tell("reboot");
            assert!(agent.is_hung_up(), "no connection outlives its guest");
            guest.event_where("booting", "the next boot", |event| event["boot"] == 2);
            guest.up_again();
        }
    }
    guest.power_off();
}

fn nobody_is_at_another_port(socket: &Path) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the guest has refused it");
}

/// Has the agent come to `listener` and send back all that it gets.
pub(crate) fn echo(agent: &mut Agent, listener: &UnixListener) {
    agent.tell(&format!("echo {ECHO}"));
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let sent: Vec<u8> = (0..BYTES).map(|at| (at ^ at >> 8 ^ at >> 16).to_le_bytes()[0]).collect();
    let got = std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(&sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        (&stream).read_to_end(&mut got).unwrap();
        got
    });
    assert_eq!(got.len(), sent.len());
    assert!(got == sent, "the same bytes");
    let reply = agent.reply("echo", Instant::now() + PATIENCE).unwrap();
    assert_eq!(reply["bytes"], BYTES);
}
