//! Buffers that are no good memory.

use super::*;

/// What is not RAM; bad pages are answered in the same way.
const BAD: u64 = RAM;

#[test]
fn bad_data_of_the_guest_breaks_its_connection_alone() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    let (mut other, others) = guest.connected(2);
    guest.write(ports, b"good");
    for data in [(BAD, 8), (BAD - 4, 8), (u64::MAX - 3, 8)] {
        let header = Header { len: 8.into(), ..guest.header(RW, ports) };
        guest.put(&header, Some((data.0, data.1, false)));
        guest.expect_reset(ports);
    }
    // Nothing of the bad packet.
    assert_eq!(read(&mut client, 4), b"good");
    assert!(is_over(&mut client));
    guest.talk(&mut other, others);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn a_bad_header_might_be_of_any_connection() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.connected(1);
    guest.driver.add(TRANSMIT, 0, &[(BAD - 8, HEADER as u32, false)]);
    guest.driver.kick(TRANSMIT as u32);
    eventually("a wish to be reset", || guest.driver.needs_reset());
    assert!(is_over(&mut client));
    // Nobody waits for what will not be before the driver resets the device, and that may be never.
    for _ in 0..3 {
        assert!(is_over(&mut guest.client()));
    }
    guest.set_up();
    let (mut client, ports) = guest.connected(1);
    guest.talk(&mut client, ports);
}

#[test]
fn data_that_the_guest_has_no_good_buffer_for_breaks_its_connection_alone() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    let (mut other, others) = guest.connected(2);
    // They are used and come back in the same order all the time.
    let next = guest.seen % COUNT;
    guest.driver.descriptor(RECEIVE, next, (BAD - HEADER as u64 - 2, BUFFER as u32, 2, 0));
    client.write_all(b"lost").unwrap();
    eventually("the buffer", || guest.driver.used(RECEIVE) != guest.seen);
    let (_, len) = guest.driver.used_entry(RECEIVE, guest.seen);
    assert_eq!(len, 0);
    assert!(is_over(&mut client));
    let addr = BUFFERS + u64::from(next) * BUFFER;
    guest.driver.descriptor(RECEIVE, next, (addr, BUFFER as u32, 2, 0));
    guest.seen += 1;
    guest.driver.offer(RECEIVE, next);
    guest.driver.kick(RECEIVE as u32);
    guest.expect_reset(ports);
    guest.talk(&mut other, others);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn words_without_data_are_said_again_in_the_next_buffer() {
    let mut guest = Guest::new();
    for at in 0..COUNT - 1 {
        guest.driver.descriptor(RECEIVE, at, (BAD, BUFFER as u32, 2, 0));
    }
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    eventually("all buffers", || guest.driver.used(RECEIVE) == COUNT);
    for nth in 0..COUNT - 1 {
        assert_eq!(guest.driver.used_entry(RECEIVE, nth), (nth.into(), 0));
        let addr = BUFFERS + u64::from(nth) * BUFFER;
        guest.driver.descriptor(RECEIVE, nth, (addr, BUFFER as u32, 2, 0));
        guest.driver.offer(RECEIVE, nth);
    }
    guest.seen = COUNT - 1;
    let ports = ports_of(&guest.expect(REQUEST));
    guest.say(RESPONSE, ports);
    assert_eq!(read_line(&mut client), format!("OK {}", ports.host));
}

#[test]
fn buffers_without_room_come_back() {
    let mut guest = Guest::new();
    for at in 0..COUNT / 2 {
        let len = [0, 1, HEADER as u32 - 1, HEADER as u32][usize::from(at)];
        guest.driver.descriptor(RECEIVE, at, (BUFFERS, len, 2, 0));
    }
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    eventually("a packet", || guest.driver.used(RECEIVE) == COUNT / 2 + 1);
    guest.seen = COUNT / 2;
    guest.expect(REQUEST);
    assert!(!guest.driver.needs_reset());
}
