//! What it costs to read guest memory with a guard, beside plain reads, while all of it is whole.
#![allow(missing_docs, reason = "criterion's macros")]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot be set up has nothing to say")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use mce_relay::guard::{self, Attempt, GuardedRegion};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryMmap, GuestRegionCollection, GuestRegionMmap, MmapRegion,
};

/// As much as a processor's nearer caches and its address translation hold: the guard is measured, and no miss.
const LEN: usize = 256 << 10;

/// The address of each of the reads, all over the memory.
fn offsets() -> impl Iterator<Item = usize> {
    (0..LEN - 8192).step_by(64 * 101).cycle()
}

/// Memory that is there.
fn mapping() -> MmapRegion {
    let mapping = MmapRegion::new(LEN).unwrap();
    // SAFETY: the whole of a mapping that nobody else has.
    unsafe { mapping.as_ptr().write_bytes(1, LEN) };
    mapping
}

/// Plain copies, and copies that end as an error where a page is bad.
fn copies(c: &mut Criterion) {
    let memory = mapping();
    let start = memory.as_ptr();
    let mut group = c.benchmark_group("guarded copies");
    for len in [8, 64, 512, 4096] {
        let mut to = vec![0_u8; len];
        let mut next = offsets();
        group.bench_function(BenchmarkId::new("plain", len), |b| {
            b.iter(|| {
                let (from, len) = (start.wrapping_add(next.next().unwrap()), black_box(len));
                // SAFETY: within the mapping, and `to` has `len` bytes.
                unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), len) };
                black_box(to.first());
            });
        });
        let mut next = offsets();
        group.bench_function(BenchmarkId::new("guarded", len), |b| {
            b.iter(|| {
                let (from, len) = (start.wrapping_add(next.next().unwrap()), black_box(len));
                // SAFETY: within the mapping.
                unsafe { guard::read(from, &mut to[..len]) }.unwrap();
                black_box(to.first());
            });
        });
    }
}

/// vm-memory's own regions, and guarded ones.
fn regions(c: &mut Criterion) {
    let base = GuestAddress(0);
    let plain = GuestRegionMmap::new(mapping(), base).unwrap();
    let plain = GuestMemoryMmap::from_regions(vec![plain]).unwrap();
    let guarded = GuardedRegion::new(mapping(), base).unwrap();
    let guarded = GuestRegionCollection::from_regions(vec![guarded]).unwrap();
    let mut group = c.benchmark_group("vm-memory");
    let mut to = [0_u8; 64];
    let mut next = offsets();
    group.bench_function("plain/64", |b| {
        b.iter(|| {
            plain.read_slice(&mut to, GuestAddress(next.next().unwrap() as u64)).unwrap();
            black_box(to.first());
        });
    });
    let mut next = offsets();
    group.bench_function("guarded/64", |b| {
        b.iter(|| {
            guarded.read_slice(&mut to, GuestAddress(next.next().unwrap() as u64)).unwrap();
            black_box(to.first());
        });
    });
    let mut next = offsets();
    group.bench_function("guarded and validated/64", |b| {
        b.iter(|| {
            let attempt = Attempt::begin();
            guarded.read_slice(&mut to, GuestAddress(next.next().unwrap() as u64)).unwrap();
            assert!(attempt.is_clean());
            black_box(to.first());
        });
    });
}

criterion_group!(benches, copies, regions);
criterion_main!(benches);
