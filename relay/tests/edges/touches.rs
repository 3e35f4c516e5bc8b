//! Touches that come in twos or too late, that nobody saw, or that were none.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use mce_relay::internals::flush;
use mce_relay::mca::cap;
use mce_relay::{Event, Form, RamMap, Verdict};

use crate::forge::{BUS_MCEERR_AO, BUS_MCEERR_AR, forge};
use crate::model::*;

/// The guest touched one of the two; nobody knows which.
#[test]
fn a_page_at_two_addresses_is_one_ar_and_one_ao() {
    on_own_thread(|| {
        let alias = 0x4000_0000;
        let regions = [region(HVA, GPA, 0x4000), region(HVA, alias, 0x4000)];
        let (config, events) = config(1, intel(cap::LMCE_P), RamMap::new(&regions).unwrap());
        let relay = config.start().unwrap();
        let mut vcpu = Vcpu::new();
        vcpu.state.lock().unwrap().lmce = true;
        let mut port = attach(&relay, 0);
        let mut told = |touches: bool, count: usize| {
            if touches {
                forge(BUS_MCEERR_AR, HVA + 0x2000, 12);
            }
            let (start, mut told) = (Instant::now(), Vec::new());
            while told.len() < count {
                assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
                assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                vcpu.run();
                flush(&relay.handle());
                told.extend(forms(&events));
                std::thread::sleep(Duration::from_millis(1));
            }
            told
        };
        let first = told(true, 2);
        assert_eq!(first, [(GPA + 0x2000, Form::Srar), (alias + 0x2000, Form::Srao)]);
        // It was the other one.
        assert_eq!(told(true, 1), [(alias + 0x2000, Form::Srar)]);
    });
}

#[test]
fn of_two_touches_at_once_one_is_told_and_the_other_is_not_lost() {
    for caps in [intel(cap::LMCE_P), amd()] {
        on_own_thread(move || {
            let (relay, events) = start(1, caps);
            let mut vcpu = Vcpu::new();
            vcpu.state.lock().unwrap().lmce = true;
            let mut port = attach(&relay, 0);
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            std::thread::sleep(Duration::from_millis(1100));
            forge(BUS_MCEERR_AR, HVA, 12);
            forge(BUS_MCEERR_AR, HVA + 0x1000, 12);
            let start = Instant::now();
            while gpas(&relay, is_acknowledged).len() < 2 {
                assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
                assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                vcpu.run();
                std::thread::sleep(Duration::from_millis(2));
            }
            flush(&relay.handle());
            let told = forms(&events);
            let kinds: Vec<bool> =
                told.iter().map(|(_, form)| matches!(form, Form::Srar | Form::AmdAr)).collect();
            assert_eq!(kinds, [true, false], "{told:x?}");
        });
    }
}

/// An AR belongs to the instruction that met the page.
#[test]
fn a_touch_that_a_pause_has_let_go_is_no_machine_check_later() {
    on_own_thread(|| {
        let (relay, events) = start(2, intel(0));
        let relay = Arc::new(relay);
        let (resume, paused) = channel::<()>();
        let parked = Arc::new(Barrier::new(2));
        let over = Arc::new(AtomicBool::new(false));
        let other = std::thread::spawn({
            let (relay, parked, over) =
                (Arc::clone(&relay), Arc::clone(&parked), Arc::clone(&over));
            move || {
                let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 1));
                port.park(|| {
                    parked.wait();
                    paused.recv().unwrap();
                });
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                    vcpu.run();
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        parked.wait();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        forge(BUS_MCEERR_AR, HVA, 12);
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run, "it is to pause, too");
        flush(&relay.handle());
        assert_eq!(forms(&events), []);
        port.park(|| resume.send(()).unwrap());
        // It goes on somewhere else, and is told of the page as of one that nobody touches.
        run_until_told(&relay, &mut port, &mut vcpu, &[GPA]);
        flush(&relay.handle());
        assert_eq!(forms(&events), [(GPA, Form::Srao)]);
        over.store(true, Ordering::Relaxed);
        other.join().unwrap();
    });
}

#[test]
fn an_mmio_exit_of_good_memory_is_no_touch_of_a_bad_page() {
    on_own_thread(|| {
        let ram = RamMap::new(&[region(own_page(), GPA, 4096)]).unwrap();
        let (config, _events) = config(1, amd(), ram);
        let relay = config.start().unwrap();
        let mut port = attach(&relay, 0);
        assert!(!port.mmio_hit(GPA + 8), "a read-only slot, say");
        assert!(!port.mmio_hit(0xfee0_0000), "a device");
        assert_eq!(port.before_run(&mut Vcpu::new()), Verdict::Run);
        assert!(relay.pages().is_empty());
    });
}

/// As of guest_memfd: KVM says EHWPOISON, and nothing is mapped here that could be asked.
#[test]
fn a_memory_fault_is_a_touch_where_the_host_says_that_the_page_is_bad() {
    on_own_thread(|| {
        let (good, bad) = (own_page(), HVA);
        let regions = [region(good, 0, 4096), region(bad, GPA, 0x4000)];
        let (config, events) = config(1, amd(), RamMap::new(&regions).unwrap());
        let relay = config.start().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        assert!(!port.memory_fault(8, 8, libc::EFAULT), "the host says nothing of it");
        assert!(!port.memory_fault(0xfee0_0000, 4096, libc::EHWPOISON), "no RAM");
        for size in [0, 1, 1 << 30, u64::MAX] {
            assert!(
                !port.memory_fault(u64::MAX - 8, size, libc::EHWPOISON),
                "the end of all addresses"
            );
        }
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        assert!(relay.pages().is_empty());
        assert!(port.memory_fault(GPA + 0x1008, 8, libc::EHWPOISON));
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        flush(&relay.handle());
        assert_eq!(forms(&events), [(GPA + 0x1000, Form::AmdAr)]);
    });
}

/// A huge page that the kernel could not split, or keeps: it stays mapped, or can be mapped again, and 4 KiB of it are
/// lost.
#[test]
fn what_is_still_mapped_of_a_huge_page_is_not_lost() {
    const HUGE: u64 = 2 << 20;
    const LEN: usize = 2 << 20;
    /// Pages that are mapped, and pages that there are.
    const MAPPED: u64 = 256;
    const THERE: u64 = 384;
    let (prot, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
    // SAFETY: a new file of this test's alone; a new mapping at an address of the kernel's choice, which is never
    // unmapped, and in it one of the file.
    let (file, first) = unsafe {
        let file = libc::memfd_create(c"huge".as_ptr(), libc::MFD_CLOEXEC);
        assert_eq!(libc::ftruncate(file, THERE.cast_signed() * 4096), 0);
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = libc::mmap(std::ptr::null_mut(), 2 * LEN, prot, private, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        let first = at.map_addr(|at| at.next_multiple_of(LEN));
        assert_eq!(libc::mmap(first, LEN, prot, shared, file, 0), first);
        (file, first.cast::<u8>())
    };
    let start = first.expose_provenance() as u64;
    let touch = |pages: std::ops::Range<u64>| {
        for page in pages {
            let offset = usize::try_from(page * 4096).unwrap();
            // SAFETY: inside the mapping above, and of the file.
            unsafe { first.add(offset).write_volatile(1) };
        }
    };
    touch(0..MAPPED);
    // The last of these maps what there is.
    for (page_shift, lsb, lost_from) in [(21, 12, MAPPED), (21, 21, MAPPED), (12, 21, THERE)] {
        on_own_thread(move || {
            let huge = region(start, HUGE, HUGE).in_pages_of(page_shift);
            let (config, events) = config(1, amd(), RamMap::new(&[huge]).unwrap());
            let relay = config.start().unwrap();
            let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
            forge(BUS_MCEERR_AR, start + 0x5000, lsb);
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            let known: Vec<u64> = relay.pages().iter().map(|page| page.gpa - HUGE).collect();
            // What is mapped is whole, and of what is not, and cannot be, nobody can say so.
            let expected = [0x5000].into_iter().chain((lost_from..512).map(|page| page * 4096));
            assert_eq!(known, expected.collect::<Vec<u64>>(), "{page_shift} {lsb}");
            let lost = usize::try_from(1 + 512 - lost_from).unwrap();
            let touched = events.try_iter().any(|event| {
                matches!(event, Event::Seen { gpa, extent: HUGE, pages, .. }
                    if gpa == HUGE + 0x5000 && pages == lost)
            });
            assert!(touched);
        });
    }
    // SAFETY: the file above.
    assert_eq!(unsafe { libc::ftruncate(file, HUGE.cast_signed()) }, 0);
    touch(0..512);
    on_own_thread(move || {
        let huge = region(start, HUGE, HUGE).in_pages_of(21);
        let (config, _events) = config(1, amd(), RamMap::new(&[huge]).unwrap());
        let relay = config.start().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        forge(BUS_MCEERR_AR, start + 0x5000, 12);
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        let pages = relay.pages();
        assert_eq!(
            pages.iter().map(|page| (page.gpa, page.lsb)).collect::<Vec<_>>(),
            [(HUGE + 0x5000, 12)]
        );
    });
}

/// The kernel does not know at which address memory is that this process has not mapped.
#[test]
fn a_touch_without_an_address_is_not_somebody_elses() {
    on_own_thread(|| {
        let (relay, events) = start(1, amd());
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        for _ in 0..10 {
            forge(BUS_MCEERR_AR, 0, 0);
            assert_eq!(
                port.before_run(&mut vcpu),
                Verdict::Run,
                "given up, it would end this process"
            );
        }
        assert!(port.memory_fault(GPA, 4096, libc::EHWPOISON), "KVM says it at the next entry");
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        flush(&relay.handle());
        assert_eq!(forms(&events), [(GPA, Form::AmdAr)]);
    });
}

/// What a snapshot may write by write(2).
#[test]
fn the_parts_of_a_range_that_are_whole() {
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        let handle = relay.handle();
        let parts = |gpas: std::ops::Range<u64>| -> Vec<(u64, u64)> {
            handle.whole_parts(gpas).iter().map(|part| (part.start, part.end)).collect()
        };
        assert_eq!(parts(GPA..GPA + 0x4000), [(GPA, GPA + 0x4000)]);
        for page in [0, 3, 4, 6] {
            forge(BUS_MCEERR_AO, HVA + page * 4096, 12);
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        }
        let page = |number: u64| GPA + number * 4096;
        assert_eq!(
            parts(page(0)..page(8)),
            [(page(1), page(3)), (page(5), page(6)), (page(7), page(8))]
        );
        // In the middle of pages.
        assert_eq!(parts(page(3) + 8..page(5) + 8), [(page(5), page(5) + 8)]);
        assert_eq!(parts(page(2) + 8..page(3) + 8), [(page(2) + 8, page(3))]);
        assert!(parts(page(3)..page(5)).is_empty());
    });
}

/// A layer below the run loop takes MMIO exits itself, and has no port.
#[test]
fn an_mmio_exit_is_a_touch_whoever_saw_it() {
    on_own_thread(|| {
        let regions = [region(own_page(), 0, 4096)];
        let (config, _events) = config(1, amd(), RamMap::new(&regions).unwrap());
        let relay = config.start().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        let handle = relay.handle();
        assert!(!handle.mmio_hit(0, 8), "it is whole");
        assert!(!handle.mmio_hit(0, 0xfee0_0000), "no RAM");
        assert!(!port.wants_attention() && relay.pages().is_empty());
    });
}
