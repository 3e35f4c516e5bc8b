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

/// Processor time of this process's vsock threads.
fn spent() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let nanos = tasks.map(|task| {
        let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        match read("comm").trim() {
            "virtio-vsock" => {
                let stat = read("stat");
                let fields: Vec<u64> =
                    stat.split(' ').map(|field| field.parse().unwrap_or(0)).collect();
                // In hundredths of a second: of the user's, and of the system's.
                (fields[13] + fields[14]) * 10_000_000
            }
            _ => 0_u64,
        }
    });
    Duration::from_nanos(nanos.sum())
}

/// In one of several moments: on a slow machine what went before may not be over in the first. A loop is busy in all of them.
fn idles(what: &str) {
    let mut least = Duration::MAX;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(50));
        let before = spent();
        std::thread::sleep(Duration::from_millis(500));
        least = least.min(spent().saturating_sub(before));
        if least < Duration::from_millis(100) {
            break;
        }
    }
    println!("{what}: {least:?} of 500 ms");
    assert!(least < Duration::from_millis(100), "{what}: the device's thread is busy: {least:?}");
}

/// As [`Guest::connected`], whatever comes for others meanwhile.
fn join(guest: &mut Guest, port: u32) -> (UnixStream, Ports) {
    let mut client = guest.client();
    client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    let ports = loop {
        let (header, _) = guest.packet();
        if (header.op.get(), header.dst_port.get()) == (REQUEST, port) {
            break ports_of(&header);
        }
    };
    guest.say(RESPONSE, ports);
    assert_eq!(read_line(&mut client), format!("OK {}", ports.host));
    (client, ports)
}

/// Whatever state the connections are in, the thread sleeps while nobody does anything.
#[test]
fn no_state_of_a_connection_keeps_the_thread_busy() {
    let mut guest = Guest::new();
    let mut kept = Vec::new();
    // The host's program writes, the guest has no room, and the program goes; or ends its side; or stays.
    for port in 0..3 {
        let (mut client, ports) = join(&mut guest, port);
        let none = Header { buf_alloc: 0.into(), ..guest.header(CREDIT_UPDATE, ports) };
        guest.put(&none, None);
        client.write_all(b"nobody takes it").unwrap();
        guest.expect(CREDIT_REQUEST);
        match port {
            0 => drop(client),
            1 => {
                client.shutdown(Shutdown::Write).unwrap();
                kept.push(client);
            }
            _ => kept.push(client),
        }
    }
    while guest.look().is_some() {}
    idles("without credit");
    // More than sent was taken.
    let (mut client, ports) = join(&mut guest, 10);
    let lie = Header { fwd_cnt: 77.into(), ..guest.header(CREDIT_UPDATE, ports) };
    guest.put(&lie, None);
    client.write_all(b"nobody takes it").unwrap();
    kept.push(client);
    idles("with a lie about credit");
    // Either side ends one direction, or both, in either order.
    for (port, how) in (20..).zip([Shutdown::Read, Shutdown::Write, Shutdown::Both]) {
        for flags in [0, NO_RECEIVE, NO_SEND] {
            let (client, ports) = join(&mut guest, port);
            if flags != 0 {
                guest.shut(flags, ports);
            }
            client.shutdown(how).unwrap();
            guest.write(ports, b"x");
            kept.push(client);
            while guest.look().is_some() {}
        }
    }
    std::thread::sleep(Duration::from_millis(50));
    while guest.look().is_some() {}
    idles("half closed");
    // One that is full, and one that drains.
    for port in 30..32 {
        let (client, ports) = join(&mut guest, port);
        for _ in 0..5 {
            guest.write(ports, &pattern(MOST_DATA));
            while guest.look().is_some() {}
        }
        if port == 31 {
            guest.shut(NO_SEND, ports);
            guest.say(RST, ports);
        }
        kept.push(client);
    }
    while guest.look().is_some() {}
    idles("full and draining");
    // Programs that say nothing, or half of it, or have gone in the middle.
    for words in [&b""[..], b"CONN", b"CONNECT 5"] {
        let mut client = guest.client();
        client.write_all(words).unwrap();
        kept.push(client);
        let mut client = guest.client();
        client.write_all(words).unwrap();
    }
    idles("half greetings");
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    for round in 0..3000 {
        let mut client = guest.client();
        if round % 2 == 0 {
            let _ = client.write_all(b"CONNECT 99\n");
        }
        drop(client);
        if round % 16 == 0 {
            while guest.look().is_some() {}
        }
    }
    eventually("the end of all of them", || {
        while guest.look().is_some() {}
        std::fs::read_dir("/proc/self/fd").unwrap().count() <= before + 3
    });
    idles("after a storm of connections");
    // A guest that has no buffers and has filled what waits for it.
    guest.driver.set_up(3);
    guest.seen = 0;
    for at in 0..300 {
        let header = guest.header(RW, Ports { host: at, guest: 1 });
        guest.driver.memory.write_slice(header.as_bytes(), GuestAddress(HEADERS)).unwrap();
        let before = guest.driver.used(TRANSMIT);
        guest.driver.add(TRANSMIT, 0, &[(HEADERS, HEADER as u32, false)]);
        guest.driver.kick(TRANSMIT as u32);
        std::thread::sleep(Duration::from_micros(300));
        if guest.driver.used(TRANSMIT) == before && at > 260 {
            break;
        }
    }
    idles("clogged");
    let mut client = guest.client();
    client.write_all(b"CONNECT 5\n").unwrap();
    drop(client);
    idles("clogged, and a client that has gone");
    assert!(!guest.driver.needs_reset());
    assert!(spent() > Duration::ZERO, "the clock works");
    drop(kept);
}
