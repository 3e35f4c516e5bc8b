//! More of what guests and programs of the host's may do.

use super::*;

/// What the guest sent before the host's program went is that program's, in whatever order the two are seen.
#[test]
fn a_program_that_ends_its_side_gets_all_that_the_guest_answers() {
    let mut guest = Guest::new();
    for round in 0..50 {
        let (mut client, ports) = guest.connected(round);
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(guest.read(ports, 8), b"question");
        guest.expect_shut(NO_SEND, ports);
        for _ in 0..8 {
            guest.write(ports, b"answer ");
        }
        guest.shut(NEITHER, ports);
        guest.expect_reset(ports);
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"answer ".repeat(8));
    }
}

/// The room that all connections may use up is as much as is said: 64 MiB.
#[test]
fn a_connection_keeps_no_more_than_its_room() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let ports = Ports { host: 1, guest: 2 };
    let header = |op: u16| Header {
        op: op.into(),
        src_port: ports.guest.into(),
        dst_port: ports.host.into(),
        buf_alloc: 1000.into(),
        ..Header::default()
    };
    let now = Instant::now();
    let mut connection = connection::Connection::asked_by_guest(&header(REQUEST), ours);
    let chunk = pattern(40_000);
    let mut kept = 0;
    while connection.guest_sent(&header(RW), &chunk, now) == connection::Fate::Stays {
        kept = connection.kept();
    }
    drop(theirs);
    assert!(kept <= ROOM, "{kept} bytes are kept for one connection; expected at most {ROOM}");
}
