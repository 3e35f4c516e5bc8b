//! A guest that reads and writes its disk while the pages go bad that its requests are in, and what has to be true of it
//! afterwards: the VMM lives, a request with a bad page fails and is said to have failed, and no byte is wrong.

use std::fs::File;
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::Value;

use crate::agent::{PATIENCE, hex};
use crate::guest::{Guest, Options};
use crate::lab;

/// How much of the disk is written, in bytes.
pub const LEN: u64 = 8 << 20;
/// What one request is of.
pub const BLOCK: usize = 4096;
/// Of what is written.
pub const SEED: u64 = 20;

/// How many buffers go bad, and when.
#[derive(Debug)]
pub struct Plan {
    /// Seconds of reading and writing.
    pub seconds: u64,
    /// The buffers that go bad at most.
    pub buffers: usize,
    /// The longest pause before each, in milliseconds, of which a part is drawn from this.
    pub pause: (u64, Rng),
}

/// Boots a guest with a disk, and has buffers of its requests go bad; how many have.
pub fn lose_buffers(options: &Options, mut plan: Plan) -> usize {
    let mut guest = Guest::boot(options);
    let request = format!("disk-load /dev/vda {LEN} {SEED} {}", plan.seconds);
    guest.agent.tell(&request);
    let end = Instant::now() + Duration::from_secs(plan.seconds);
    let mut bad = Vec::new();
    // Some time before it ends, so that the last ones are met, too.
    while bad.len() < plan.buffers && end.saturating_duration_since(Instant::now()).as_secs() > 1 {
        let is_new = |event: &Value| event["event"] == "disk-load";
        let event = guest.agent.event(is_new);
        let event = event.unwrap_or_else(|error| panic!("{}", silent(&mut guest, &error)));
        // The one that has been lost last is another one now. One of the two at a time, and each in turn.
        let buffers = [&event["write"]["gpa"], &event["read"]["gpa"]].map(hex);
        let Some(gpa) =
            buffers.into_iter().cycle().skip(bad.len() % 2).find(|gpa| !bad.contains(gpa))
        else {
            break;
        };
        let (longest, random) = &mut plan.pause;
        std::thread::sleep(Duration::from_millis(random.u64(..=*longest)));
        guest.poison(gpa, "hwpoison-inject");
        bad.push(gpa);
    }
    let sum = guest.agent.reply(&request, Instant::now() + PATIENCE);
    let sum = sum.unwrap_or_else(|error| panic!("{}", silent(&mut guest, &error)));
    // Not with the thousands of generations.
    let counts = ["reads", "writes", "buffers_lost", "wrong"].map(|what| (what, &sum[what]));
    println!("    {} buffers went bad: {counts:?}", bad.len());
    assert_eq!(sum["ok"], true, "{sum}");
    assert_eq!(
        (&sum["wrong"], &sum["differences"]),
        (&0.into(), &Value::Array(Vec::new())),
        "{sum}"
    );
    assert_eq!(sum["written_though_failed"], 0, "{sum}");
    assert!(sum["buffers_lost"].as_u64() >= Some(bad.len() as u64 / 2), "{sum}");
    assert!(
        sum["writes"]["ok"].as_u64() > Some(100) && sum["reads"]["ok"].as_u64() > Some(100),
        "{sum}"
    );

    // The ledger has what was poisoned, and nothing else.
    let known = |guest: &Guest| {
        let status = guest.status();
        status["pages"].as_array().unwrap().iter().map(|page| hex(&page["gpa"])).collect::<Vec<_>>()
    };
    let start = Instant::now();
    bad.sort_unstable();
    while known(&guest) != bad {
        assert!(start.elapsed() < PATIENCE, "{:x?} {bad:x?}", known(&guest));
        std::thread::sleep(Duration::from_millis(50));
    }

    let is_rescue = |event: &&Value| event["event"] == "rescued";
    let rescues = guest.events().iter().filter(is_rescue).count();
    println!("    {rescues} huge pages were rescued");
    assert_eq!(rescues > 0, options.memory.contains("hugepages=on"));

    // It is read when the VMM has gone, and with it its name.
    let path = guest.path("disk");
    let image = File::options().read(true).write(true).open(path).unwrap();
    guest.power_off();
    is_what_the_guest_was_told(&options.disk.unwrap().reader(image), &sum["generations"]);
    bad.len()
}

/// Whether the image has each block as the guest was told last that it was written.
fn is_what_the_guest_was_told(read: &dyn Fn(&mut [u8], u64), generations: &Value) {
    let generations = generations.as_array().expect("a generation for each block");
    assert_eq!(generations.len() as u64, LEN / BLOCK as u64);
    let mut count = 0;
    for (number, generation) in (0..).zip(generations) {
        let Some(generation) = generation.as_u64() else { continue };
        let offset = number * BLOCK as u64;
        let mut block = [0; BLOCK];
        read(&mut block, offset);
        assert!(
            block == expected(offset, generation),
            "block {number} is not generation {generation}"
        );
        count += 1;
    }
    println!("    {count} blocks of the image are what the guest was told");
    assert!(count > 50);
}

/// What the agent writes to a block (guest-image/agent/src/disk/block.rs).
fn expected(offset: u64, generation: u64) -> [u8; BLOCK] {
    let key = mix(mix(mix(SEED) ^ offset) ^ generation);
    let mut block = [0; BLOCK];
    let header = [u64::from_le_bytes(*b"mcerelay"), SEED, offset, generation];
    for (number, word) in (0..).zip(block.chunks_exact_mut(8)) {
        let value = header.get(number).copied().unwrap_or_else(|| mix(key ^ number as u64));
        word.copy_from_slice(&value.to_le_bytes());
    }
    block
}

/// splitmix64.
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// Where the requests of a guest's disk are whose agent is silent, and whether it says more when its serial port has an
/// interrupt.
fn silent(guest: &mut Guest, error: &str) -> String {
    let before = rings(guest);
    guest.agent.tell("ping");
    let next = guest.agent.event(|_| true);
    format!("{error}; {before}; after a word to the agent it said {next:?}; {}", rings(guest))
}

/// What is in the rings of a guest's disk, for a failure's account.
pub fn rings(guest: &Guest) -> String {
    let info = guest.info();
    let Some(device) = info.devices.iter().find(|it| it.name == "virtio-blk") else {
        return "there is no disk".to_owned();
    };
    let Some(queue) = device.queues.first() else { return format!("{device:?}") };
    let word = |gpa: u64| {
        let byte = |at| {
            let block = info.block(at)?;
            lab::read_memory(info.pid, block.hva + (at - block.gpa)).ok()
        };
        Some(u16::from_le_bytes([byte(gpa)?, byte(gpa + 1)?]))
    };
    // virtio 1.2, 2.7.6 and 2.7.8
    let size = u64::from(queue.size);
    let avail = [0, 2, 4 + 2 * size].map(|at| word(queue.avail + at));
    let used = [0, 2, 4 + 8 * size].map(|at| word(queue.used + at));
    format!("{device:?}; flags, idx, event: avail {avail:?}, used {used:?}")
}
