//! Pages that the kernel really takes for bad: the component without a guest, on any architecture, and on aarch64 with a vCPU of
//! a few instructions. Each test costs the machine a page or a few until it boots again, so they run where it is meant for that
//! (`make arm`).
#![cfg(all(feature = "internals", feature = "vm-memory"))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    reason = "a test; and it does not use all of `guarded`"
)]
#![allow(clippy::cast_possible_truncation, reason = "a test")]

mod guarded;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use guarded::{
    GPA, Memory, PAGE, alone, at, devices, guests, hva, relay, shared_at, until, validated,
};
use mce_relay::guard;
use mce_relay::signal::{Signals, set_up};
use mce_relay::watch::Watch;
use mce_relay::{AccessError, FailureKind, FoundBy, PAGE_SHIFT};
use vm_memory::Bytes;

/// Has the kernel find that the frame behind `address` of the process `pid` is bad, as its handler of hardware errors does.
fn poison_of(pid: u32, address: u64) {
    let map = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let mut entry = [0; 8];
    map.read_exact_at(&mut entry, address / PAGE * 8).unwrap();
    let entry = u64::from_le_bytes(entry);
    assert!(entry >> 63 == 1, "there is no memory at {address:#x}: {entry:#x}");
    let pfn = entry & ((1 << 55) - 1);
    fs::write("/sys/kernel/debug/hwpoison/corrupt-pfn", format!("{pfn:#x}")).unwrap();
}

fn poison(address: u64) {
    poison_of(std::process::id(), address);
}

/// Guest memory that devices have mapped, too. The guest has touched all of it: the frame is looked up there.
fn memory() -> Memory {
    let memory = shared_at(16, 0);
    for page in 0..16 {
        assert_eq!(guests(&memory, page), page + 100);
    }
    memory
}

#[test]
#[ignore = "takes a page from this machine: make arm"]
fn a_page_that_nobody_touches_is_signalled_and_in_the_ledger() {
    let _alone = alone();
    let memory = memory();
    let relay = relay(&memory);
    // Else it may find the page before the signal is taken.
    until("the first look at the page tables", || relay.handle().scans() > 0);
    poison(hva(&memory, 3));
    until("the page is in the ledger", || !relay.pages().is_empty());
    let [page] = &relay.pages()[..] else { panic!("{:?}", relay.pages()) };
    assert_eq!((page.gpa, page.hva, page.lsb), (GPA + 3 * PAGE, hva(&memory, 3), PAGE_SHIFT));
    assert_eq!((page.kind, page.found_by), (FailureKind::ActionOptional, FoundBy::Signal));
    let handle = relay.handle();
    assert!(handle.is_bad(page.gpa..page.gpa + 1) && !handle.is_bad(GPA..page.gpa));
    assert!(memory.read_obj::<u64>(at(3)).is_err());
    assert_eq!(validated(&memory, 2).unwrap(), 102);
    let mut bytes = [0; 8];
    assert!(matches!(handle.read(page.gpa, &mut bytes), Err(AccessError::Poisoned { .. })));
    assert_eq!(handle.read(page.gpa + PAGE, &mut bytes).unwrap(), 8);
    assert_eq!(u64::from_le_bytes(bytes), 104);
}

/// There is no relay here whose marks would be in the way of the access.
#[test]
#[ignore = "takes a page from this machine: make arm"]
fn guarded_accesses_of_a_bad_page_end_as_errors() {
    let _alone = alone();
    set_up(Signals::Install).unwrap();
    let memory = memory();
    let base = hva(&memory, 0);
    poison(base + 3 * PAGE);
    let page = (base + 3 * PAGE) as *mut u64;
    for len in [1, 7, 8, 15, 16, 31, 32, 33, 64, 65, 128, 1000, 3000] {
        let mut to = vec![0xaa; len];
        unsafe {
            assert_eq!(guard::read(page.cast(), &mut to).unwrap_err().done, 0, "{len}");
            assert_eq!(guard::write(page.cast(), &to).unwrap_err().done, 0, "{len}");
            // It begins in the page before.
            let before = page.cast::<u8>().sub(len);
            guard::write(before, &vec![0x5a; len]).unwrap();
            let mut long = vec![0; 2 * len];
            let done = guard::read(before, &mut long).unwrap_err().done;
            assert!(done <= len && long[..done].iter().all(|&byte| byte == 0x5a), "{len}: {done}");
        }
    }
    unsafe {
        guard::load(page).unwrap_err();
        guard::load(page.cast::<u8>()).unwrap_err();
        guard::store(page, 7).unwrap_err();
        guard::store(page.cast::<u16>(), 7).unwrap_err();
        guard::compare_exchange(page, 103, 7).unwrap_err();
        guard::compare_exchange(page.cast::<u32>(), 103, 7).unwrap_err();
        let good = (base + 4 * PAGE) as *mut u64;
        assert_eq!(guard::load(good).unwrap(), 104);
        guard::store(good, 7).unwrap();
        assert_eq!(guard::compare_exchange(good, 8, 9).unwrap(), 7);
        assert_eq!(guard::compare_exchange(good, 7, 9).unwrap(), 7);
        assert_eq!(guard::load(good).unwrap(), 9);
    }
}

#[test]
#[ignore = "takes a page from this machine: make arm"]
fn a_device_that_meets_a_bad_page_lets_nothing_out() {
    let _alone = alone();
    set_up(Signals::Install).unwrap();
    let memory = memory();
    let view = devices(&memory, 5);
    poison(hva(&memory, 5));
    // It has its slice already, and no relay has said a word yet.
    let attempt = guard::Attempt::begin();
    let seen = unsafe { (view as *const u64).read_volatile() };
    assert_eq!(seen, 0, "a scratch page");
    assert!(!attempt.is_clean());
    assert!(guard::is_bad(hva(&memory, 5), 8) && memory.read_obj::<u64>(at(5)).is_err());
    assert_eq!(validated(&memory, 6).unwrap(), 106);
}

#[test]
#[ignore = "takes a page from this machine: make arm"]
fn a_watch_says_what_is_lost_and_a_guarded_read_is_an_error() {
    let _alone = alone();
    let memory = memory();
    let (tx, rx) = channel();
    let watch = Watch::start(Signals::Install, move |lost| tx.send(lost).unwrap_or(())).unwrap();
    watch.add(hva(&memory, 0), 16 * PAGE, PAGE_SHIFT).unwrap();
    poison(hva(&memory, 9));
    let lost = rx.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!((lost.address, lost.extent, lost.range), (hva(&memory, 9), PAGE, hva(&memory, 0)));
    let mut bytes = [0; 8];
    assert!(watch.read(hva(&memory, 9), &mut bytes).is_err());
    assert_eq!(watch.read(hva(&memory, 8), &mut bytes).unwrap(), 8);
}

struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "takes a page from this machine: make arm"]
fn the_cache_of_the_examples_loses_one_entry() {
    let mut program = std::env::current_exe().unwrap();
    program.pop();
    program.pop();
    program.push("examples/cache");
    let run = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut cache = Program(run.unwrap());
    let mut ask = cache.0.stdin.take().unwrap();
    let out = BufReader::new(cache.0.stdout.take().unwrap());
    let (tx, lines) = channel();
    std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|l| tx.send(l)));
    let wait_for = |start: &str| loop {
        let line = lines.recv_timeout(Duration::from_secs(20)).expect(start);
        if line.starts_with(start) {
            return line;
        }
    };
    wait_for("ready");
    writeln!(ask, "put a first\nput b second\nwhere a").unwrap();
    let line = wait_for("a at 0x");
    poison_of(cache.0.id(), u64::from_str_radix(&line["a at 0x".len()..], 16).unwrap());
    wait_for("lost a: 4096 bytes");
    writeln!(ask, "get a\nget b\nquit").unwrap();
    wait_for("a is not there");
    wait_for("b = second");
    assert_eq!(cache.0.wait().unwrap().code(), Some(0));
}

/// A vCPU of KVM's that touches a bad page: the relay has the AR, and the guest, which cannot be told, is not entered again.
#[test]
#[cfg(target_arch = "aarch64")]
#[ignore = "takes a page from this machine: make arm"]
fn a_vcpu_that_touches_a_bad_page_is_not_entered_again() {
    use kvm_bindings::{kvm_userspace_memory_region, kvm_vcpu_init};
    use kvm_ioctls::{Kvm, VcpuExit};
    use mce_relay::{
        ExitByte, KillPolicy, NoMachineChecks, RamMap, RamRegion, Relay, State, Verdict,
    };

    // 1: ldr x1, [x0]; str x1, [x2]; b 1b
    const CODE: [u32; 3] = [0xf940_0001, 0xf900_0041, 0x17ff_fffe];
    const DEVICE: u64 = 0x1000; // no RAM is there
    const X: u64 = 0x6030_0000_0010_0000; // KVM_REG_ARM_CORE, 64 bits: X0, then two for each register
    const PC: u64 = X + 64;

    let _alone = alone();
    let memory = memory();
    unsafe { (hva(&memory, 1) as *mut [u32; 3]).write_volatile(CODE) };
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let region = kvm_userspace_memory_region {
        guest_phys_addr: GPA,
        memory_size: 16 * PAGE,
        userspace_addr: hva(&memory, 0),
        ..Default::default()
    };
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut init = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init).unwrap();
    vcpu.vcpu_init(&init).unwrap();

    // Late: there is no AO, and no look at the page tables.
    let regions = unsafe { RamRegion::all_of(&memory) }.unwrap();
    let relay = Relay::builder(RamMap::new(&regions).unwrap()).vcpus(1).policy(KillPolicy::Late);
    let relay = relay.start().unwrap();
    let exit = unsafe { ExitByte::new(&raw mut vcpu.get_kvm_run().immediate_exit) };
    let mut port = relay.handle().attach(0, exit, || ()).unwrap();
    for (register, value) in [(X, GPA + 5 * PAGE), (X + 4, DEVICE), (PC, GPA + PAGE)] {
        vcpu.set_one_reg(register, &value.to_le_bytes()).unwrap();
    }
    let mut enter = || match vcpu.run() {
        Ok(VcpuExit::MmioWrite(DEVICE, data)) => Ok(data.to_vec()),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.errno()),
    };
    port.clear_exit();
    assert_eq!(port.before_run(&mut NoMachineChecks), Verdict::Run);
    assert_eq!(enter().unwrap(), 105_u64.to_le_bytes());

    poison(hva(&memory, 5));
    port.clear_exit();
    let before = port.before_run(&mut NoMachineChecks);
    if before == Verdict::Run {
        assert_eq!(enter().unwrap_err(), libc::EINTR);
        port.clear_exit();
    }
    let verdict = port.before_run(&mut NoMachineChecks);
    assert!(
        matches!(verdict, Verdict::Undeliverable { gpa, .. } if gpa == GPA + 5 * PAGE),
        "{before:?}, then {verdict:?}"
    );
    let [page] = &relay.pages()[..] else { panic!("{:?}", relay.pages()) };
    assert_eq!((page.kind, page.lsb), (FailureKind::ActionRequired, PAGE_SHIFT));
    assert!(matches!(page.state, State::Undeliverable { .. }), "{:?}", page.state);
}
