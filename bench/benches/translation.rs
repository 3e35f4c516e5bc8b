//! One lookup: which guest-physical address shows a host virtual one?
#![allow(missing_docs, reason = "criterion's macros")]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot be set up has nothing to say")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use mce_relay::RamMap;
use mce_relay_bench::{SortedArray, addresses, regions};

fn translation(c: &mut Criterion) {
    let mut group = c.benchmark_group("translation");
    for n in [4, 100, 10_000] {
        let regions = regions(n);
        let wanted = addresses(&regions);
        let (map, array) = (RamMap::new(&regions).unwrap(), SortedArray::new(&regions));
        let mut next = wanted.iter().cycle();
        group.bench_function(BenchmarkId::new("RamMap", n), |b| {
            b.iter(|| map.gpas(black_box(*next.next().unwrap())).next());
        });
        group.bench_function(BenchmarkId::new("sorted array", n), |b| {
            b.iter(|| array.gpa(black_box(*next.next().unwrap())));
        });
        // vm-memory has no lookup by host address: its regions are gone through.
        group.bench_function(BenchmarkId::new("linear", n), |b| {
            b.iter(|| {
                let hva = black_box(*next.next().unwrap());
                let region = regions.iter().find(|r| hva >= r.hva() && hva - r.hva() < r.len())?;
                Some(region.gpa() + (hva - region.hva()))
            });
        });
    }
}

criterion_group!(benches, translation);
criterion_main!(benches);
