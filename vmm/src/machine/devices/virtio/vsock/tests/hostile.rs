//! A guest and programs of the host's that send anything.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_oneof, proptest};

use super::*;
use crate::machine::devices::virtio::testing::SIZE;

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![0..4_u32, Just(1 << 30), Just(u32::MAX), Just(MOST_DATA as u32 + 1), any::<u32>()]
}

fn packet() -> impl Strategy<Value = Header> {
    let addresses = (
        prop_oneof![8 => Just(u64::from(CID)), 1 => any::<u64>()],
        prop_oneof![8 => Just(HOST_CID), 1 => any::<u64>()],
    );
    let kinds = (prop_oneof![8 => Just(STREAM), 1 => any::<u16>()], 0..9_u16);
    let ports = (prop_oneof![Just(5000_u32), (1_u32 << 30)..(1 << 30) + 3], 1..3_u32);
    (addresses, kinds, ports, number(), number(), number(), number()).prop_map(
        |((src, dst), (kind, op), (host, guest), len, flags, alloc, taken)| Header {
            src_cid: src.into(),
            dst_cid: dst.into(),
            src_port: guest.into(),
            dst_port: host.into(),
            len: len.into(),
            kind: kind.into(),
            op: op.into(),
            flags: flags.into(),
            buf_alloc: alloc.into(),
            fwd_cnt: taken.into(),
        },
    )
}

#[derive(Clone, Debug)]
enum Step {
    Packet(Header, Option<Buffer>),
    Connect(Vec<u8>),
    Write(usize, Vec<u8>),
    Close(usize),
    Take,
}

fn step() -> impl Strategy<Value = Step> {
    let data = (
        prop_oneof![Just(DATA), RAM - 64..RAM + 64, any::<u64>()],
        prop_oneof![0..100_u32, Just(MOST_DATA as u32), any::<u32>()],
        Just(false),
    );
    let bytes = || prop::collection::vec(any::<u8>(), 0..100);
    prop_oneof![
        6 => (packet(), prop::option::of(data)).prop_map(|(header, data)| Step::Packet(header, data)),
        1 => prop_oneof![Just(b"CONNECT 1\n".to_vec()), bytes()].prop_map(Step::Connect),
        1 => (any::<usize>(), bytes()).prop_map(|(at, bytes)| Step::Write(at, bytes)),
        1 => any::<usize>().prop_map(Step::Close),
        1 => Just(Step::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Whatever is sent: a connection that is nobody's business but its own goes on.
    #[test]
    fn any_packets_leave_others_alone(steps in prop::collection::vec(step(), 0..40)) {
        let mut guest = Guest::new();
        let (mut client, ports) = guest.connected(7777);
        let _listener = guest.listener(5000);
        let mut clients = Vec::new();
        for step in steps {
            match step {
                Step::Packet(header, data) => guest.put(&header, data),
                Step::Connect(words) => {
                    let mut client = guest.client();
                    let _ = client.write_all(&words);
                    clients.push(client);
                }
                Step::Write(at, bytes) if !clients.is_empty() => {
                    let at = at % clients.len();
                    let _ = clients[at].write_all(&bytes);
                }
                Step::Close(at) if !clients.is_empty() => {
                    clients.swap_remove(at % clients.len());
                }
                Step::Take => while guest.look().is_some() {},
                _ => {}
            }
        }
        client.write_all(b"still here").unwrap();
        assert_eq!(guest.read_among_others(ports, 10), b"still here");
        guest.write(ports, b"and here");
        assert_eq!(read(&mut client, 8), b"and here");
        assert!(!guest.driver.needs_reset());
    }

    /// Whatever is in the rings: the device goes on or asks for a reset, and works after one.
    #[test]
    fn any_rings_are_survived(
        descriptors in prop::collection::vec(
            (
                0_usize..3,
                prop_oneof![0..RAM, RAM - 64..RAM + 64, any::<u64>()],
                prop_oneof![Just(0_u32), 1..64_u32, Just(u32::MAX), any::<u32>()],
                0_u16..8,
                0..SIZE + 1,
            ),
            0..32,
        ),
        heads in prop::collection::vec((0_usize..3, 0..SIZE + 1), 0..30),
    ) {
        let mut guest = Guest::new();
        for (at, (queue, addr, len, flags, next)) in (0_u16..).zip(descriptors) {
            guest.driver.descriptor(queue, at % SIZE, (addr, len, flags, next));
        }
        for (queue, head) in heads {
            guest.driver.offer(queue, head);
        }
        let mut client = guest.client();
        let _ = client.write_all(b"CONNECT 1\n");
        (0..3).for_each(|queue| guest.driver.kick(queue));
        guest.driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
        drop(client);
        guest.set_up();
        // The one before may have come too late for the reset.
        let mut client = guest.client();
        client.write_all(b"CONNECT 2\n").unwrap();
        let ports = loop {
            let (header, _) = guest.packet();
            if header.op == REQUEST && header.dst_port == 2 {
                break ports_of(&header);
            }
        };
        guest.say(RESPONSE, ports);
        assert_eq!(read_line(&mut client), format!("OK {}", ports.host));
        client.write_all(b"to the guest").unwrap();
        assert_eq!(guest.read_among_others(ports, 12), b"to the guest");
        guest.write(ports, b"to the host");
        assert_eq!(read(&mut client, 11), b"to the host");
    }
}
