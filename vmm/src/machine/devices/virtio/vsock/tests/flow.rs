//! Who sends how much.

use super::*;

#[test]
fn the_host_sends_what_the_guest_has_room_for() {
    let mut guest = Guest::new();
    let (client, ports) = guest.connected(1);
    let update = |guest: &mut Guest, room: u32, taken: u32| {
        let header = guest.header(CREDIT_UPDATE, ports);
        guest.put(&Header { buf_alloc: room.into(), fwd_cnt: taken.into(), ..header }, None);
    };
    update(&mut guest, 10_000, 0);
    let text = pattern(30_000);
    let sent = text.clone();
    let writer = std::thread::spawn(move || (&client).write_all(&sent).map(|()| client));
    let mut got = guest.read(ports, 10_000);
    guest.expect(CREDIT_REQUEST);
    // No more comes, and it does not ask again.
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.look().is_none());
    update(&mut guest, 10_000, 1);
    got.extend(guest.read(ports, 1));
    guest.expect(CREDIT_REQUEST);
    update(&mut guest, 5_000, 10_001);
    got.extend(guest.read(ports, 5_000));
    guest.expect(CREDIT_REQUEST);
    update(&mut guest, 1 << 20, 15_001);
    got.extend(guest.read(ports, 14_999));
    assert_eq!(got, text);
    drop(writer.join().unwrap().unwrap());
    guest.expect_end(ports);
}

#[test]
fn a_guest_without_room_keeps_nobody_else_waiting() {
    let mut guest = Guest::new();
    let (mut stuck, ports) = guest.connected(1);
    let header = guest.header(CREDIT_UPDATE, ports);
    guest.put(&Header { buf_alloc: 0.into(), ..header }, None);
    stuck.write_all(b"for later").unwrap();
    guest.expect(CREDIT_REQUEST);
    let (mut other, others) = guest.connected(2);
    guest.talk(&mut other, others);
    guest.say(CREDIT_UPDATE, ports);
    assert_eq!(guest.read(ports, 9), b"for later");
}

#[test]
fn a_guest_that_claims_to_have_taken_more_than_it_got_gets_nothing() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    let header = guest.header(CREDIT_UPDATE, ports);
    guest.put(&Header { fwd_cnt: 1000.into(), ..header }, None);
    client.write_all(b"x").unwrap();
    guest.expect(CREDIT_REQUEST);
    guest.say(CREDIT_UPDATE, ports);
    assert_eq!(guest.read(ports, 1), b"x");
}

/// What the guest may send, from the device's last word on it.
struct Sender {
    ports: Ports,
    sent: u32,
    taken: u32,
}

impl Sender {
    fn room(&self) -> u32 {
        ROOM as u32 - self.sent.wrapping_sub(self.taken)
    }

    fn look(&mut self, guest: &mut Guest) {
        while let Some((header, _)) = guest.look() {
            assert_eq!((header.op.get(), ports_of(&header)), (CREDIT_UPDATE, self.ports));
            self.taken = header.fwd_cnt.get();
        }
    }
}

#[test]
fn the_guest_sends_what_the_host_has_room_for_and_all_arrives() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    let text = pattern(4 << 20);
    let len = text.len();
    let reader = std::thread::spawn(move || read(&mut client, len));
    let mut sender = Sender { ports, sent: 0, taken: 0 };
    while (sender.sent as usize) < len {
        sender.look(&mut guest);
        let at = sender.sent as usize;
        let most = (sender.room() as usize).min(MOST_DATA).min(len - at);
        if most > 0 {
            guest.write(ports, &text[at..at + most]);
            sender.sent += most as u32;
        }
    }
    assert_eq!(reader.join().unwrap(), text);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_the_connection() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    let (mut other, others) = guest.connected(2);
    // Nobody reads: the socket takes some of it, the device its room.
    let mut sender = Sender { ports, sent: 0, taken: 0 };
    let chunk = pattern(MOST_DATA);
    loop {
        sender.look(&mut guest);
        if (sender.room() as usize) < MOST_DATA {
            break;
        }
        guest.write(ports, &chunk);
        sender.sent += MOST_DATA as u32;
    }
    let rest = sender.room() as usize;
    if rest > 0 {
        guest.write(ports, &chunk[..rest]);
    }
    guest.say(CREDIT_REQUEST, ports);
    let full = guest.expect(CREDIT_UPDATE);
    // The device holds no more than its room, and the guest goes beyond that.
    assert!(sender.sent + rest as u32 - full.fwd_cnt.get() <= ROOM as u32);
    guest.write(ports, &chunk);
    guest.write(ports, &chunk);
    guest.write(ports, &chunk);
    guest.write(ports, &chunk);
    guest.write(ports, &chunk);
    guest.expect_reset(ports);
    while guest.look().is_some() {}
    guest.talk(&mut other, others);
    // What arrived is a beginning of what was sent.
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert!(got.chunks(MOST_DATA).all(|part| *part == chunk[..part.len()]), "{}", got.len());
}

#[test]
fn credit_is_told_when_asked() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1);
    guest.write(ports, b"12345");
    assert_eq!(read(&mut client, 5), b"12345");
    guest.say(CREDIT_REQUEST, ports);
    let update = guest.expect(CREDIT_UPDATE);
    assert_eq!((update.fwd_cnt.get(), update.buf_alloc.get()), (5, ROOM as u32));
}
