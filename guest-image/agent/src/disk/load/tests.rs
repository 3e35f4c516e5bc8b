use super::*;
use crate::disk::tests::Blocks;

fn load(device: &Device, blocks: usize) -> Load<'_> {
    Load::new(device, blocks, 7).unwrap()
}

#[test]
fn a_disk_that_is_whole_gives_what_was_written() {
    let file = Blocks::new("load", 32);
    let device = Device::open(&file.0, true).unwrap();
    let mut places = Vec::new();
    let time = Duration::from_millis(50);
    let sum = run(&device, 32 * BLOCK as u64, 7, time, |write, read| places.push((write, read)));
    let sum = sum.unwrap();
    assert_eq!(places.len(), 1);
    assert_ne!(places[0].0.va, places[0].1.va);
    assert!(sum.writes.ok > 0 && sum.reads.ok > 0, "{sum:?}");
    assert_eq!((sum.wrong, sum.buffers_lost, &sum.flush), (0, 0, &None), "{sum:?}");
    assert!(sum.writes.failed.is_empty() && sum.reads.failed.is_empty(), "{sum:?}");
    // What the reply says of a block is what it holds.
    let buffer = Buffer::new().unwrap();
    for (block, generation) in sum.generations.unwrap().into_iter().enumerate() {
        let offset = (block * BLOCK) as u64;
        let found = Found::of(&device.read(&buffer, offset).unwrap());
        let expected = match generation {
            Some(generation) => Found::Whole(Label { seed: 7, offset, generation }),
            None => Found::Zeros,
        };
        assert_eq!(found, expected, "block {block}");
    }
}

#[test]
fn a_disk_that_lies_is_wrong() {
    let file = Blocks::new("lies", 2);
    let device = Device::open(&file.0, true).unwrap();
    let mut load = load(&device, 2);
    load.write(0).unwrap();
    load.write(1).unwrap();
    file.put(&[0; 8], 4096 + 2048);
    load.read(0).unwrap();
    load.read(1).unwrap();
    assert_eq!((load.sum.wrong, load.sum.reads.ok), (1, 2));
    let found = &load.sum.differences[0].found;
    assert!(found.contains("from byte 2048 on, expected Is(2)"), "{found}");
    assert_eq!(load.known, [Known::Is(1), Known::Nothing]);
}

#[test]
fn a_failed_write_is_the_old_or_the_new_and_nothing_between() {
    let file = Blocks::new("failed", 4);
    let device = Device::open(&file.0, true).unwrap();
    let mut load = load(&device, 4);
    (0..4).for_each(|block| load.write(block).unwrap());
    let new = |block| Label { seed: 7, offset: (block * BLOCK) as u64, generation: 9 };
    (0..4).for_each(|block| load.known[block] = Known::Either(Some(block as u64 + 1), 9));
    load.known[3] = Known::Either(None, 9);
    let bytes = |block| new(block).words().map(u64::to_le_bytes).concat();
    file.put(&bytes(1), 4096);
    file.put(&bytes(2)[..2048], 2 * 4096);
    (0..4).for_each(|block| load.read(block).unwrap());
    assert_eq!(load.known, [Known::Is(1), Known::Is(9), Known::Nothing, Known::Nothing]);
    assert_eq!((load.sum.written_though_failed, load.sum.wrong), (1, 1));
}

#[test]
fn lost_buffers_are_replaced_and_the_load_goes_on() {
    let file = Blocks::new("buffers", 2);
    let device = Device::open(&file.0, true).unwrap();
    let mut load = load(&device, 2);
    load.write(0).unwrap();
    load.to_write.lose();
    load.to_read.lose();
    load.write(0).unwrap();
    assert_eq!((load.known[0], load.renewed), (Known::Either(Some(1), 2), true));
    load.read(0).unwrap();
    load.read(0).unwrap();
    load.write(1).unwrap();
    let sum = load.finish().unwrap();
    assert_eq!((sum.writes.ok, sum.buffers_lost, sum.wrong), (2, 2, 0));
    assert_eq!(sum.writes.failed["SIGBUS"], 1);
    assert_eq!(sum.reads.failed["SIGBUS"], 1);
    assert_eq!(sum.generations, Some(vec![Some(1), Some(3)]));
}
