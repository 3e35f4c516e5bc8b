use std::time::Duration;

use crate::config::{
    ConsoleMode, CpuVendor, DeviceConfig, MAX_DEVICES, MemoryZone, SerialMode, VmConfig,
};
use crate::machine::boot::tiny::elf;
use crate::machine::lifecycle::reasons::ExitReason;
use crate::machine::memory::guest_ram::GuestRam;
use crate::machine::vm::Vm;
use crate::machine::vm::hooks::NoHooks;
use crate::machine::vm::kvm::open_kvm;

use super::*;
use crate::machine::devices::virtio::rng::Rng;
use crate::machine::devices::virtio::testing::ram;

#[test]
fn addresses_outside_the_windows_are_nobodys() {
    let empty = MmioBus::default();
    for gpa in [0, VIRTIO_START, VIRTIO_START + 1, u64::MAX] {
        assert!(empty.at(gpa).is_none());
    }
    let control = VmControl::new(0).unwrap();
    let window = || {
        let rng = Rng::open("/dev/urandom".as_ref()).unwrap();
        Window::new(Box::new(rng), 0, &ram(), &control, &Filters::default()).unwrap()
    };
    let bus = MmioBus { windows: vec![window(), window()], len: 2 * VIRTIO_WINDOW };
    let end = VIRTIO_START + 2 * VIRTIO_WINDOW;
    for gpa in [0, VIRTIO_START - 1, end, u64::MAX] {
        assert!(bus.at(gpa).is_none(), "{gpa:#x}");
    }
    for (gpa, index, expected) in [(VIRTIO_START, 0, 0), (end - 1, 1, VIRTIO_WINDOW - 1)] {
        let (window, offset) = bus.at(gpa).unwrap();
        assert!(std::ptr::eq(window, &raw const bus.windows[index]) && offset == expected);
    }
}

/// A guest writes random values into the registers of its devices, and reads them. Afterwards the devices answer as
/// ever, and the guest powers off.
#[test]
fn a_guest_writes_nonsense_into_every_register() {
    if let Err(error) = open_kvm() {
        println!("skipped: {error}");
        return;
    }
    let code = [
        // mov edi, 0xd0000000; mov ecx, 0x4000; mov eax, 1
        &[0xbf, 0, 0, 0, 0xd0, 0xb9, 0, 0x40, 0, 0, 0xb8, 1, 0, 0, 0][..],
        // again: imul eax, eax, 0x41c64e6d; add eax, 0x3039
        &[0x69, 0xc0, 0x6d, 0x4e, 0xc6, 0x41, 0x05, 0x39, 0x30, 0, 0],
        // mov ebx, eax; shr ebx, 14; and ebx, 0x11fc: a register of the first two windows
        &[0x89, 0xc3, 0xc1, 0xeb, 14, 0x81, 0xe3, 0xfc, 0x11, 0, 0],
        // mov [edi+ebx], eax; mov esi, [edi+ebx]; dec ecx; jnz again
        &[0x89, 0x04, 0x1f, 0x8b, 0x34, 0x1f, 0x49, 0x75, 0xe1],
        // mov dword [edi+0x70], 0; mov dword [edi+0x70], 1
        &[0xc7, 0x47, 0x70, 0, 0, 0, 0, 0xc7, 0x47, 0x70, 1, 0, 0, 0],
        // mov eax, [edi+0x70]; mov dx, 0x3f8; out dx, al; mov eax, [edi]; out dx, al
        &[0x8b, 0x47, 0x70, 0x66, 0xba, 0xf8, 0x03, 0xee, 0x8b, 0x07, 0xee],
        // mov eax, [edi+0x1008]; out dx, al: the second device's number
        &[0x8b, 0x87, 0x08, 0x10, 0, 0, 0xee],
        // Behind the last window: mov eax, [edi+0x2000]; out dx, al
        &[0x8b, 0x87, 0, 0x20, 0, 0, 0xee],
        // mov dx, 0x600; mov al, S5 and SLP_EN; out dx, al; hlt
        &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4],
    ]
    .concat();
    let dir = tempfile::tempdir().unwrap();
    let (kernel, com1) = (dir.path().join("kernel"), dir.path().join("com1"));
    std::fs::write(&kernel, elf(&code)).unwrap();
    let config = VmConfig {
        kernel,
        initramfs: None,
        cmdline: "test".into(),
        cpus: 2,
        serial: [SerialMode::File(com1.clone().into()), SerialMode::Off],
        devices: vec![
            DeviceConfig::Rng { src: "/dev/urandom".into() },
            DeviceConfig::Console(ConsoleMode::Null),
        ],
        cpu_vendor: CpuVendor::Host,
    };
    let ram = Arc::new(GuestRam::new(&[MemoryZone::new(32 << 20)]).unwrap());
    for _ in 0..2 {
        let vm = Vm::new(&config, &ram, &mut NoHooks).unwrap();
        assert_eq!(vm.run(), ExitReason::PowerOff);
        let told = std::fs::read(&com1).unwrap();
        // The boot's own line is before it, from the second boot on.
        assert!(told.ends_with(&[1, b'v', 3, 0xff]), "{told:?}");
        ram.heal(&[]);
    }
    let config = VmConfig {
        devices: vec![DeviceConfig::Rng { src: "/dev/urandom".into() }; MAX_DEVICES],
        ..config
    };
    let vm = Vm::new(&config, &ram, &mut NoHooks).unwrap();
    let control = vm.control().clone();
    let runner = std::thread::spawn(|| vm.run());
    std::thread::sleep(Duration::from_millis(1));
    control.stop(ExitReason::Reset);
    runner.join().unwrap();
}
