//! One error on its way to a guest with many vCPUs: the decisions alone, and the whole relay with a thread
//! for each vCPU.
#![allow(missing_docs, reason = "criterion's macros")]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot be set up has nothing to say")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use mce_relay::internals::machine_check::{Delivery, Step};
use mce_relay::mca::McaState;
use mce_relay::{Event, ExitByte, Pace, RamMap, Relay, Verdict};
use mce_relay_bench::{Quick, caps, regions};

const INTERVALS: u64 = 10_000;
const VCPUS: [usize; 6] = [1, 2, 4, 8, 16, 512];
const PACE: Pace = Pace { burst: 1_000_000, rate: 1_000_000 };

fn decisions(c: &mut Criterion) {
    let mut group = c.benchmark_group("decisions");
    for vcpus in VCPUS {
        group.bench_function(BenchmarkId::new("AR by LMCE", vcpus), |b| {
            let mut delivery = Delivery::new(Some(caps(true)), vcpus, PACE);
            let vcpu = Quick::new(true);
            let mut now = Duration::ZERO;
            b.iter(|| {
                now += Duration::from_secs(10);
                delivery.push_ar(vcpus - 1, 0x1000, true, now);
                let Step::Inject(told) = delivery.next(vcpus - 1, vcpu.empty(), now) else {
                    panic!("it is not told");
                };
                delivery.told(&told);
                delivery.taken(vcpus - 1, vcpu.empty(), now + Duration::from_secs(5))
            });
        });
        group.bench_function(BenchmarkId::new("AO by rendezvous", vcpus), |b| {
            let mut delivery = Delivery::new(Some(caps(false)), vcpus, PACE);
            let vcpu = Quick::new(false);
            let states: Vec<Option<McaState>> = vec![Some(*vcpu.empty()); vcpus];
            let mut now = Duration::ZERO;
            b.iter(|| {
                now += Duration::from_secs(10);
                delivery.push_ao(0x1000);
                let Step::Rendezvous(error) = delivery.next(0, vcpu.empty(), now) else {
                    panic!("nobody is called");
                };
                let told =
                    delivery.rendezvous(0, error, &states, Duration::from_secs(100)).unwrap();
                told.iter().for_each(|told| {
                    let _ = delivery.told(told);
                });
                (0..vcpus)
                    .map(|index| delivery.taken(index, vcpu.empty(), now).len())
                    .sum::<usize>()
            });
        });
    }
}

/// A vCPU's thread that is asleep until it is kicked, as one is whose guest has nothing to do.
#[derive(Default)]
struct Sleeper {
    kicked: Mutex<bool>,
    kick: Condvar,
}

fn whole(c: &mut Criterion) {
    let mut group = c.benchmark_group("AO, from the signal to the bank");
    group.sample_size(10).measurement_time(Duration::from_secs(3));
    for vcpus in VCPUS {
        for (name, lmce) in [("LMCE", true), ("rendezvous", false)] {
            let (send, events) = channel();
            let observer = move |event: &Event| {
                if matches!(event, Event::Injected { .. } | Event::Acknowledged { .. }) {
                    let _ = send.send(Instant::now());
                }
            };
            let ram = RamMap::new(&regions(INTERVALS)).unwrap();
            let relay = Relay::builder(ram).vcpus(vcpus).machine_checks(caps(lmce));
            let relay = Arc::new(relay.pace(PACE).observer(observer).start().unwrap());
            let (stop, ready) =
                (Arc::new(AtomicBool::new(false)), Arc::new(Barrier::new(vcpus + 1)));
            let sleepers: Vec<Arc<Sleeper>> = (0..vcpus).map(|_| Arc::default()).collect();
            let threads: Vec<_> = sleepers
                .iter()
                .cloned()
                .enumerate()
                .map(|(index, sleeper)| {
                    let (relay, stop, ready) =
                        (Arc::clone(&relay), Arc::clone(&stop), Arc::clone(&ready));
                    std::thread::spawn(move || {
                        let own = Arc::clone(&sleeper);
                        let kick = move || {
                            *own.kicked.lock().unwrap() = true;
                            own.kick.notify_one();
                        };
                        let mut port = relay.attach(index, ExitByte::NONE, kick).unwrap();
                        ready.wait();
                        let mut vcpu = Quick::new(lmce);
                        while !stop.load(Ordering::Relaxed) {
                            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                            let kicked = sleeper.kicked.lock().unwrap();
                            *sleeper.kick.wait_while(kicked, |kicked| !*kicked).unwrap() = false;
                        }
                    })
                })
                .collect();
            ready.wait();
            let handle = relay.handle();
            let mut page = 0;
            group.bench_function(BenchmarkId::new(name, vcpus), |b| {
                b.iter_custom(|times| {
                    (0..times)
                        .map(|_| {
                            page += 1;
                            let begun = Instant::now();
                            // Regions have a gap of their own length behind them.
                            handle.forge(page / 512 * (4 << 20) + page % 512 * 4096, None).unwrap();
                            let told = events.recv_timeout(Duration::from_secs(30)).unwrap();
                            // The next one begins when the guest is done with this.
                            events.recv_timeout(Duration::from_secs(30)).unwrap();
                            told - begun
                        })
                        .sum()
                });
            });
            stop.store(true, Ordering::Relaxed);
            for sleeper in &sleepers {
                *sleeper.kicked.lock().unwrap() = true;
                sleeper.kick.notify_one();
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        }
    }
}

criterion_group!(benches, decisions, whole);
criterion_main!(benches);
