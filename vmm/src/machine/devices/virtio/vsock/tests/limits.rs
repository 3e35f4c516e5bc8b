//! What one side may use up, and how long it may take.

use super::super::connection::{Connection, Fate, HANDSHAKE, LINGER};
use super::super::connections::MOST_CONNECTIONS;
use super::*;

#[test]
fn clients_who_say_nothing_keep_others_waiting_no_longer_than_they_stay() {
    let mut guest = Guest::new();
    let mut mute: Vec<UnixStream> = (0..40).map(|_| guest.client()).collect();
    std::thread::sleep(Duration::from_millis(20));
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    mute.truncate(8);
    guest.expect(REQUEST);
    // Those who are left, too.
    mute[0].write_all(b"CONNECT 2\n").unwrap();
    assert_eq!(guest.expect(REQUEST).dst_port, 2);
}

#[test]
fn there_are_only_so_many_connections() {
    let mut guest = Guest::new();
    let all: Vec<_> = (0..MOST_CONNECTIONS as u32).map(|port| guest.connected(port)).collect();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    assert!(is_over(&mut client));
    let ports = Ports { host: 5000, guest: 1 };
    let _listener = guest.listener(5000);
    guest.say(REQUEST, ports);
    guest.expect_reset(ports);
    let (_, first) = &all[0];
    guest.say(RST, *first);
    guest.say(REQUEST, ports);
    guest.expect(RESPONSE);
}

#[test]
fn a_guest_that_takes_no_answers_is_heard_no_more_until_it_does() {
    let mut guest = Guest::new();
    guest.driver.set_up(3);
    guest.seen = 0;
    let ports = |at: u32| Ports { host: at, guest: 1 };
    let mut said = 0;
    // It has no buffers.
    loop {
        let header = guest.header(RW, ports(said));
        guest.driver.memory.write_slice(header.as_bytes(), GuestAddress(HEADERS)).unwrap();
        let before = guest.driver.used(TRANSMIT);
        guest.driver.add(TRANSMIT, 0, &[(HEADERS, HEADER as u32, false)]);
        guest.driver.kick(TRANSMIT as u32);
        said += 1;
        let end = Instant::now() + Duration::from_millis(200);
        while guest.driver.used(TRANSMIT) == before && Instant::now() < end {
            std::thread::yield_now();
        }
        if guest.driver.used(TRANSMIT) == before {
            break;
        }
        assert!(said < 1000, "there is an end to what it keeps");
    }
    for head in 0..COUNT {
        let at = BUFFERS + u64::from(head) * BUFFER;
        guest.driver.add(RECEIVE, head, &[(at, BUFFER as u32, true)]);
    }
    guest.driver.kick(RECEIVE as u32);
    for at in 0..said {
        guest.expect_reset(ports(at));
    }
}

/// As long as it may take.
#[test]
fn a_guest_that_never_answers_is_not_waited_for() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    let start = Instant::now();
    client.write_all(b"CONNECT 1\n").unwrap();
    let ports = ports_of(&guest.expect(REQUEST));
    // Others come and go meanwhile.
    let (mut other, others) = guest.connected(2);
    assert!(is_over(&mut client));
    assert!(start.elapsed() >= HANDSHAKE);
    guest.expect_reset(ports);
    guest.talk(&mut other, others);
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours, patient(theirs))
}

const PORTS: Ports = Ports { host: 1, guest: 2 };

fn says(op: u16, flags: u32) -> Header {
    let (op, flags) = (op.into(), flags.into());
    let (src_port, dst_port) = (PORTS.guest.into(), PORTS.host.into());
    Header { op, flags, src_port, dst_port, buf_alloc: 1000.into(), ..Header::default() }
}

#[test]
fn a_guest_may_take_so_long_to_answer() {
    let (ours, mut theirs) = pair();
    let start = Instant::now();
    let mut connection = Connection::asked_by_host(PORTS, ours, start);
    let late = start + HANDSHAKE;
    assert!(!connection.expired(late - Duration::from_secs(1)));
    assert!(connection.expired(late));
    // It was paused.
    connection.forgive(late);
    assert!(!connection.expired(late));
    let mut data = Box::new([0; MOST_DATA]);
    let request = connection.next(1000, &mut data).unwrap();
    connection.said(request, late);
    assert_eq!(connection.guest_sent(&says(RESPONSE, 0), &[], late), Fate::Stays);
    assert_eq!(read_line(&mut theirs), "OK 1");
    assert_eq!(connection.deadline(), None);
}

#[test]
fn a_host_that_reads_no_further_is_waited_for_and_not_for_ever() {
    let (ours, mut theirs) = pair();
    let start = Instant::now();
    let mut connection = Connection::asked_by_guest(&says(REQUEST, 0), ours);
    let chunk = pattern(MOST_DATA);
    // Until the socket takes no more.
    while !connection.still_drains() {
        assert_eq!(connection.guest_sent(&says(RW, 0), &chunk, start), Fate::Stays);
    }
    assert_eq!(connection.guest_sent(&says(SHUTDOWN, NEITHER), &[], start), Fate::Stays);
    let later = start + LINGER - Duration::from_secs(1);
    assert!(!connection.expired(later));
    assert!(connection.expired(start + LINGER));
    // It reads on.
    let mut got = vec![0; 1 << 20];
    let len = theirs.read(&mut got).unwrap();
    assert!(len > 0);
    eventually("room", || {
        connection.host_did(libc::POLLOUT, later);
        connection.deadline() == Some(later + LINGER)
    });
    assert!(!connection.expired(start + LINGER));
    assert_eq!(
        connection.guest_sent(&says(RST, 0), &[], later),
        match connection.still_drains() {
            true => Fate::Drains,
            false => Fate::Gone,
        }
    );
}

#[test]
fn a_guest_that_takes_no_note_of_the_end_is_not_waited_for_for_ever() {
    let (ours, theirs) = pair();
    let start = Instant::now();
    let mut connection = Connection::asked_by_guest(&says(REQUEST, 0), ours);
    let mut data = Box::new([0; MOST_DATA]);
    let response = connection.next(1000, &mut data).unwrap();
    connection.said(response, start);
    drop(theirs);
    connection.host_did(libc::POLLIN | libc::POLLHUP, start);
    while let Some(say) = connection.next(1000, &mut data) {
        connection.said(say, start);
    }
    assert!(!connection.expired(start + LINGER - Duration::from_secs(1)));
    assert!(connection.expired(start + LINGER));
}

#[test]
fn what_is_found_at_another_socket_hangs_nobody_up() {
    let (ours, mut theirs) = pair();
    let mut connection = Connection::asked_by_guest(&says(REQUEST, 0), ours);
    let events = libc::POLLHUP | libc::POLLERR | libc::POLLIN | libc::POLLOUT;
    assert_eq!(connection.host_did(events, Instant::now()), Fate::Stays);
    connection.guest_sent(&says(RW, 0), b"fine", Instant::now());
    assert_eq!(read(&mut theirs, 4), b"fine");
}
