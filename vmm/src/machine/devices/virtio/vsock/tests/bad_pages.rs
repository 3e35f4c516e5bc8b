//! Pages that go bad: what touches one breaks its connection or is said again, and nothing wrong reaches anybody.

use super::*;

/// A page that goes bad, between two of the guest's.
const BAD: u64 = 0x9_0000;

#[test]
fn of_data_in_a_bad_page_the_host_sees_nothing() {
    let mut guest = Guest::new();
    let (mut other, others) = guest.connected(1);
    if !lose(&guest.driver.memory, BAD) {
        return;
    }
    // When nobody knows of the page, and when it is known.
    for port in 2..4 {
        let (mut client, ports) = guest.connected(port);
        guest.write(ports, b"good");
        let header = Header { len: 0x1800.into(), ..guest.header(RW, ports) };
        guest.put(&header, Some((BAD - 0x800, 0x1800, false)));
        guest.expect_reset(ports);
        assert_eq!(read(&mut client, 4), b"good");
        assert!(is_over(&mut client));
    }
    guest.talk(&mut other, others);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn a_header_in_a_bad_page_asks_for_a_reset() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.connected(1);
    if !lose(&guest.driver.memory, BAD) {
        return;
    }
    guest.driver.add(TRANSMIT, 0, &[(BAD - 8, HEADER as u32, false)]);
    guest.driver.kick(TRANSMIT as u32);
    eventually("a wish to be reset", || guest.driver.needs_reset());
    assert!(is_over(&mut client));
    guest.set_up();
    let (mut client, ports) = guest.connected(1);
    guest.talk(&mut client, ports);
}

#[test]
fn a_buffer_in_a_bad_page_comes_back_empty() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    let (mut other, others) = guest.connected(2);
    let next = guest.seen % COUNT;
    let lost = BUFFERS + u64::from(next) * BUFFER + 0x1000;
    if !lose(&guest.driver.memory, lost) {
        return;
    }
    client.write_all(&pattern(0x2000)).unwrap();
    eventually("the buffer", || guest.driver.used(RECEIVE) != guest.seen);
    let (head, len) = guest.driver.used_entry(RECEIVE, guest.seen);
    assert_eq!((head, len), (next.into(), 0), "a driver drops it");
    assert!(is_over(&mut client));
    guest.driver.descriptor(RECEIVE, next, (DATA, BUFFER as u32, 2, 0));
    guest.seen += 1;
    guest.driver.offer(RECEIVE, next);
    guest.driver.kick(RECEIVE as u32);
    guest.expect_reset(ports);
    guest.talk(&mut other, others);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn bad_rings_ask_for_a_reset() {
    for queue in [RECEIVE, TRANSMIT] {
        for lost in [0, 0x1000, 0x2000].map(|part| rings(queue) + part) {
            let mut guest = Guest::new();
            let (mut client, _) = guest.connected(1);
            if !lose(&guest.driver.memory, lost) {
                return;
            }
            // Something to do for each queue, as far as its rings are there.
            let _ = client.write_all(b"to the guest");
            if lost != rings(TRANSMIT) + 0x1000 {
                guest.driver.offer(TRANSMIT, 0);
            }
            guest.driver.kick(RECEIVE as u32);
            guest.driver.kick(TRANSMIT as u32);
            eventually("a wish to be reset", || guest.driver.needs_reset());
            assert!(is_over(&mut client));
        }
    }
}
