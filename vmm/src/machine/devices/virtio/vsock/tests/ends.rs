//! How connections end, in each order.

use super::*;

#[test]
fn the_host_closes_first() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    client.write_all(&pattern(100_000)).unwrap();
    drop(client);
    // Before or within the data the guest learns that nobody reads on; all that was written still comes.
    let (mut got, mut flags) = (Vec::new(), 0);
    while flags != NEITHER {
        let (header, data) = guest.packet();
        got.extend(data);
        match header.op.get() {
            RW => assert_eq!(flags & NO_SEND, 0, "data after its end"),
            SHUTDOWN => flags |= header.flags.get(),
            op => panic!("{op}"),
        }
    }
    assert_eq!(got, pattern(100_000));
    // What is on its way meanwhile disturbs nobody.
    guest.write(ports, b"too late");
    guest.say(RST, ports);
    guest.say(RW, ports);
    guest.expect_reset(ports);
}

#[test]
fn the_guest_closes_first() {
    let mut guest = Guest::new();
    let ports = Ports { host: 5000, guest: 1 };
    let mut program = guest.connected_out(ports);
    guest.write(ports, b"the end");
    guest.shut(NEITHER, ports);
    // The answer to which the guest knows that all has arrived.
    guest.expect_reset(ports);
    assert_eq!(read(&mut program, 7), b"the end");
    assert!(is_over(&mut program));
    program.write_all(b"x").unwrap_err();
}

#[test]
fn the_guest_closes_while_the_host_is_behind() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    let text = pattern(MOST_DATA);
    let mut sent = 0;
    // More than the socket takes.
    for _ in 0..4 {
        guest.write(ports, &text);
        sent += 1;
    }
    guest.shut(NEITHER, ports);
    for _ in 0..sent {
        assert!(read(&mut client, MOST_DATA) == text);
    }
    assert!(is_over(&mut client));
    while guest.packet().0.op != RST {}
}

#[test]
fn a_guest_that_waits_no_longer_still_has_delivered() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    let text = pattern(MOST_DATA);
    for _ in 0..4 {
        guest.write(ports, &text);
    }
    guest.shut(NEITHER, ports);
    guest.say(RST, ports);
    for _ in 0..4 {
        assert!(read(&mut client, MOST_DATA) == text);
    }
    assert!(is_over(&mut client));
    // Its name is free at once.
    while guest.look().is_some() {}
    guest.say(RW, ports);
    while ports_of(&guest.expect(RST)) != ports {}
}

#[test]
fn each_side_may_end_alone() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    client.write_all(b"all").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.read(ports, 3), b"all");
    guest.expect_shut(NO_SEND, ports);
    guest.write(ports, b"the other direction goes on");
    assert_eq!(read(&mut client, 27), b"the other direction goes on");
    guest.shut(NO_SEND, ports);
    assert!(is_over(&mut client));
    drop(client);
    guest.expect_shut(NEITHER, ports);

    let (mut client, ports) = guest.connected(2);
    guest.shut(NO_SEND, ports);
    assert!(is_over(&mut client));
    client.write_all(b"the other direction goes on").unwrap();
    assert_eq!(guest.read(ports, 27), b"the other direction goes on");
    // It has said that it sends no more.
    guest.write(ports, b"and yet");
    guest.expect_reset(ports);
}

#[test]
fn a_guest_that_reads_no_more_is_sent_no_more() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    guest.shut(NO_RECEIVE, ports);
    client.write_all(b"x").unwrap_err();
    guest.write(ports, b"still");
    assert_eq!(read(&mut client, 5), b"still");
    drop(client);
    guest.expect_shut(NO_RECEIVE, ports);
    guest.shut(NO_SEND, ports);
    guest.expect_reset(ports);
}

#[test]
fn a_reset_by_the_guest_ends_it_at_once() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    guest.say(RST, ports);
    assert!(is_over(&mut client));
    let (mut client, ports) = guest.connected(1);
    // A second request on the same connection is nonsense.
    guest.say(REQUEST, ports);
    guest.expect_reset(ports);
    assert!(is_over(&mut client));
}

#[test]
fn a_program_that_leaves_before_the_guest_has_answered() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    let ports = ports_of(&guest.expect(REQUEST));
    drop(client);
    guest.expect_reset(ports);
    // Its late answer is one to nothing.
    guest.say(RESPONSE, ports);
    guest.expect_reset(ports);
}

#[test]
fn a_program_that_leaves_with_something_unread() {
    let mut guest = Guest::new();
    let (client, ports) = guest.connected(1);
    guest.write(ports, b"nobody reads this");
    drop(client);
    guest.expect_end(ports);
    guest.shut(NEITHER, ports);
    guest.expect_reset(ports);
}

/// Many short ones in all orders: none is left behind.
#[test]
fn they_come_and_go() {
    let mut guest = Guest::new();
    for round in 0..600 {
        let (client, ports) = guest.connected(round);
        match round % 3 {
            0 => guest.say(RST, ports),
            1 => {
                guest.shut(NEITHER, ports);
                guest.expect_reset(ports);
            }
            _ => {
                drop(client);
                guest.expect_end(ports);
                guest.say(RST, ports);
            }
        }
    }
    // More than there may be at once.
    let (mut client, ports) = guest.connected(1);
    guest.talk(&mut client, ports);
}
