//! How connections begin.

use super::*;

#[test]
fn the_host_asks_for_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected(1024);
    guest.talk(&mut client, ports);
    let (mut other, others) = guest.connected(1024);
    assert_ne!(others.host, ports.host);
    guest.talk(&mut other, others);
    guest.talk(&mut client, ports);
}

#[test]
fn the_guest_asks_for_a_port_of_the_host() {
    let mut guest = Guest::new();
    let ports = Ports { host: 5000, guest: 77 };
    let mut program = guest.connected_out(ports);
    guest.talk(&mut program, ports);
}

#[test]
fn what_follows_the_greeting_at_once_is_for_the_guest() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"connect 9\nearly").unwrap();
    let ports = ports_of(&guest.expect(REQUEST));
    guest.say(RESPONSE, ports);
    assert_eq!(guest.read(ports, 5), b"early");
    assert_eq!(read_line(&mut client), format!("OK {}", ports.host));
}

#[test]
fn a_greeting_may_come_in_pieces() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    for byte in b"CONNECT 4294967295\n" {
        client.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(guest.expect(REQUEST).dst_port, u32::MAX);
}

#[test]
fn nobody_is_there_for_the_host() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let ports = ports_of(&guest.expect(REQUEST));
    guest.say(RST, ports);
    assert!(is_over(&mut client));
    // The guest's late answer is one to nothing.
    guest.say(RESPONSE, ports);
    guest.expect_reset(ports);
}

#[test]
fn nobody_is_there_for_the_guest() {
    let mut guest = Guest::new();
    for (at, ports) in (1..10).map(|guest| Ports { host: 5000, guest }).enumerate() {
        if at == 5 {
            // What is there is no socket.
            std::fs::write(guest.dir.path().join("v_5000"), "").unwrap();
        }
        guest.say(REQUEST, ports);
        guest.expect_reset(ports);
    }
}

#[test]
fn packets_of_no_connection_are_refused() {
    let mut guest = Guest::new();
    let ports = Ports { host: 1, guest: 2 };
    for op in [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, 0xffff] {
        guest.say(op, ports);
        guest.expect_reset(ports);
    }
    // Another type, to another address: refused in the same words.
    let other = Header { kind: 2.into(), ..guest.header(REQUEST, ports) };
    guest.put(&other, None);
    let (answer, _) = guest.packet();
    assert_eq!((answer.op.get(), answer.kind.get()), (RST, 2));
    let other = Header { dst_cid: 9.into(), ..guest.header(REQUEST, ports) };
    guest.put(&other, None);
    let (answer, _) = guest.packet();
    assert_eq!((answer.op.get(), answer.src_cid.get()), (RST, 9));
    // No answer to a reset, nor to somebody else's packet.
    guest.say(RST, ports);
    let other = Header { src_cid: 8.into(), ..guest.header(REQUEST, ports) };
    guest.put(&other, None);
    guest.say(RW, Ports { host: 3, guest: 4 });
    guest.expect_reset(Ports { host: 3, guest: 4 });
}

#[test]
fn clients_who_ask_for_nothing_are_sent_away() {
    let mut guest = Guest::new();
    for words in ["GET / HTTP/1.1\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "\n"]
        .into_iter()
        .chain(["CONNECT 1 2\n", "\u{fc}\n", "CONNECT -1\n", &"x".repeat(100)])
    {
        let mut client = guest.client();
        // It may have heard enough before the end.
        let _ = client.write_all(words.as_bytes());
        assert!(is_over(&mut client), "{words}");
    }
    drop(guest.client());
    let (mut client, ports) = guest.connected(5);
    guest.talk(&mut client, ports);
}

#[test]
fn the_guest_reads_its_address() {
    let guest = Guest::new();
    let mut bytes = [0; 8];
    guest.driver.window.read(0x100, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), u64::from(CID));
}

#[test]
fn a_hundred_at_once() {
    let mut guest = Guest::new();
    let mut all: Vec<(UnixStream, Ports)> = Vec::new();
    for at in 0..50 {
        all.push(guest.connected(at));
        let ports = Ports { host: 5000 + at, guest: 9000 + at };
        all.push((guest.connected_out(ports), ports));
    }
    for (at, (client, _)) in all.iter_mut().enumerate() {
        client.write_all(format!("{at:04}").as_bytes()).unwrap();
    }
    let mut got: HashMap<Ports, Vec<u8>> = HashMap::new();
    while got.values().map(Vec::len).sum::<usize>() < 400 {
        let (header, data) = guest.packet();
        assert_eq!(header.op, RW);
        got.entry(ports_of(&header)).or_default().extend(data);
    }
    for (at, (_, ports)) in all.iter().enumerate() {
        assert_eq!(got[ports], format!("{at:04}").as_bytes());
        guest.write(*ports, format!("{at:05}").as_bytes());
    }
    for (at, (client, _)) in all.iter_mut().enumerate() {
        assert_eq!(read(client, 5), format!("{at:05}").as_bytes());
    }
}

#[test]
fn a_reset_closes_all_and_who_comes_meanwhile_waits() {
    let mut guest = Guest::new();
    let mut stay = Vec::new();
    for _ in 0..3 {
        let (mut client, _) = guest.connected(1);
        let mut program = guest.connected_out(Ports { host: 5000, guest: 1 });
        let mut mute = guest.client();
        // So that it has been accepted.
        drop(guest.connected(2));
        guest.driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
        assert!(is_over(&mut client) && is_over(&mut program) && is_over(&mut mute));
        std::fs::remove_file(guest.dir.path().join("v_5000")).unwrap();

        let mut early = guest.client();
        early.write_all(b"CONNECT 3\n").unwrap();
        guest.set_up();
        let ports = ports_of(&guest.expect(REQUEST));
        guest.say(RESPONSE, ports);
        assert_eq!(read_line(&mut early), format!("OK {}", ports.host));
        guest.talk(&mut early, ports);
        stay.push(early);
    }
}

#[test]
fn the_next_boots_device_takes_over_the_socket() {
    let mut guest = Guest::new();
    let line = Arc::clone(&guest.line);
    let (mut client, _) = guest.connected(1);
    let early = {
        // Its thread ends, and closes what it has.
        let device = Vsock::new(CID, line).unwrap();
        guest.driver = Driver::new(Box::new(device));
        assert!(is_over(&mut client));
        guest.client()
    };
    guest.set_up();
    drop(early);
    let (mut client, ports) = guest.connected(1);
    guest.talk(&mut client, ports);
}
