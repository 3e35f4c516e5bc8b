#![allow(clippy::cast_possible_truncation, reason = "the numbers are small")]

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER as DRIVER;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FAILED as FAILED;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::machine::devices::virtio::device::{Active, DeviceError, Turn};
use crate::machine::devices::virtio::testing::{RAM, ram};
use crate::sandbox::role::Role;

/// A device with a feature, three queues and four bytes of configuration.
struct Sample;

impl Device for Sample {
    fn id(&self) -> u32 {
        77
    }

    fn name(&self) -> &'static str {
        "sample"
    }

    fn role(&self) -> Role {
        Role::VirtioRng
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 64, 1]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::new(ConfigSpace::new(vec![1, 2, 3, 4], 0..2))
    }

    fn kicked(&mut self, _: usize, _: &mut Active) -> Result<Turn, DeviceError> {
        Ok(Turn::Done)
    }
}

struct Registers {
    transport: Transport,
    memory: DeviceMemory,
    line: Arc<EventFd>,
}

impl Registers {
    fn new() -> Self {
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let transport = Transport::new(&Sample, Arc::clone(&line));
        Self { transport, memory: ram(), line }
    }

    fn write(&mut self, offset: u32, value: u32) -> Action {
        self.transport.write(offset.into(), &value.to_le_bytes(), &self.memory)
    }

    fn read(&self, offset: u32) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn status(&self) -> u32 {
        self.read(VIRTIO_MMIO_STATUS)
    }

    fn accept(&mut self, features: u64) -> u32 {
        assert!(matches!(self.write(VIRTIO_MMIO_STATUS, 0), Action::Reset));
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for half in [0, 1] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, (features >> (half * 32)) as u32);
        }
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status()
    }

    fn set_up_queue(&mut self, index: u32, size: u32, addr: u32) -> u32 {
        self.write(VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(VIRTIO_MMIO_QUEUE_NUM, size);
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, addr);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, addr.wrapping_add(0x1000));
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, addr.wrapping_add(0x2000));
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        self.read(VIRTIO_MMIO_QUEUE_READY)
    }
}

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const ALL: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

#[test]
fn a_driver_finds_the_device_and_sets_it_up() {
    let mut registers = Registers::new();
    assert_eq!(registers.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(registers.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(registers.read(VIRTIO_MMIO_DEVICE_ID), 77);
    assert_eq!(registers.read(VIRTIO_MMIO_DEVICE_FEATURES), 1 << 5 | 1 << 28 | 1 << 29);
    registers.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(registers.read(VIRTIO_MMIO_DEVICE_FEATURES), 1, "version 1");
    registers.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(registers.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    assert_eq!(registers.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX, "no shared memory");

    let features = VERSION_1 | 1 << 29 | 1 << 5;
    assert_eq!(registers.accept(features), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(registers.set_up_queue(0, 256, 0x1000), 1);
    assert_eq!(registers.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 256);
    assert_eq!(registers.set_up_queue(2, 1, 0x4000), 1);
    let Action::Activate(Activation { features: accepted, queues, .. }) =
        registers.write(VIRTIO_MMIO_STATUS, ALL)
    else {
        panic!("not activated");
    };
    assert_eq!((accepted, registers.status()), (features, ALL));
    let [Some(first), None, Some(third)] = &queues[..] else { panic!("{queues:?}") };
    assert_eq!((first.size(), first.desc_table(), first.used_ring()), (256, 0x1000, 0x3000));
    assert!(first.event_idx_enabled() && first.is_valid(&registers.memory));
    assert_eq!((third.size(), third.avail_ring()), (1, 0x5000));

    assert!(matches!(registers.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1), Action::Notify(1)));
    assert!(matches!(registers.write(VIRTIO_MMIO_QUEUE_NOTIFY, 3), Action::None));
    // A running queue is not changed.
    registers.write(VIRTIO_MMIO_QUEUE_NUM, 8);
    registers.write(VIRTIO_MMIO_DRIVER_FEATURES, 0);
    assert!(matches!(registers.write(VIRTIO_MMIO_STATUS, ALL), Action::None), "once only");
    assert!(matches!(registers.write(VIRTIO_MMIO_STATUS, 0), Action::Reset));
    assert_eq!(registers.status(), 0);
    assert_eq!(registers.read(VIRTIO_MMIO_QUEUE_READY), 0);
    assert!(matches!(registers.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1), Action::None));
}

#[test]
fn features_have_to_be_offered_and_of_version_1() {
    for (features, is_ok) in [
        (VERSION_1, true),
        (VERSION_1 | 1 << 5, true),
        (0, false),
        (1 << 5, false),
        (VERSION_1 | 1 << 6, false),
        (VERSION_1 | 1 << 34, false),
        (u64::MAX, false),
    ] {
        let mut registers = Registers::new();
        let status = registers.accept(features);
        assert_eq!(status & FEATURES_OK != 0, is_ok, "{features:#x}");
        // Without them nothing else goes on.
        let action = registers.write(VIRTIO_MMIO_STATUS, ALL);
        assert_eq!(matches!(action, Action::Activate(_)), is_ok);
        assert_eq!(registers.status() & DRIVER_OK != 0, is_ok);
    }
    // A bit beyond the 64 that there are.
    let mut registers = Registers::new();
    registers.accept(0);
    registers.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2);
    registers.write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    registers.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(registers.status() & FEATURES_OK, 0);
}

#[test]
fn the_order_is_kept() {
    let mut registers = Registers::new();
    for early in [DRIVER, FEATURES_OK, DRIVER_OK, ACKNOWLEDGE | DRIVER_OK, NEEDS_RESET, 1 << 31] {
        registers.write(VIRTIO_MMIO_STATUS, 0);
        registers.write(VIRTIO_MMIO_STATUS, early);
        assert_eq!(registers.status() & !ACKNOWLEDGE, 0, "{early:#x}");
    }
    assert_eq!(registers.set_up_queue(0, 16, 0x1000), 0, "before the features");
    registers.accept(VERSION_1);
    // A bit is not taken back.
    registers.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    assert_eq!(registers.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

#[test]
fn a_driver_that_gives_up_stops_the_device() {
    let mut registers = Registers::new();
    registers.accept(VERSION_1);
    assert!(matches!(registers.write(VIRTIO_MMIO_STATUS, ALL), Action::Activate(_)));
    assert!(matches!(registers.write(VIRTIO_MMIO_STATUS, ALL | FAILED), Action::Stop));
    assert_eq!(registers.status(), ALL | FAILED);
    assert!(matches!(registers.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0), Action::None));
    assert!(matches!(registers.write(VIRTIO_MMIO_STATUS, ALL), Action::None));
    assert_eq!(registers.status(), ALL | FAILED, "until it resets the device");
    registers.write(VIRTIO_MMIO_STATUS, 0);
    registers.write(VIRTIO_MMIO_STATUS, FAILED);
    assert!(matches!(registers.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE), Action::None));
    assert_eq!(registers.status(), FAILED);
}

#[test]
fn a_queue_that_cannot_be_asks_for_a_reset() {
    let mut registers = Registers::new();
    registers.accept(VERSION_1);
    assert_eq!(registers.set_up_queue(0, 16, RAM as u32 - 0x1000), 0);
    assert_eq!(registers.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(registers.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    registers.line.read().unwrap();
    let action = registers.write(VIRTIO_MMIO_STATUS, registers.status() | DRIVER_OK);
    assert!(matches!(action, Action::None), "it does not begin");
    assert_eq!(registers.status(), ALL | NEEDS_RESET);
    registers.line.read().unwrap();
    registers.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((registers.status(), registers.read(VIRTIO_MMIO_INTERRUPT_STATUS)), (0, 0));
}

#[test]
fn a_queue_that_is_taken_away_stops_the_device() {
    let mut registers = Registers::new();
    registers.accept(VERSION_1);
    registers.set_up_queue(0, 16, 0x1000);
    assert!(matches!(registers.write(VIRTIO_MMIO_QUEUE_READY, 0), Action::None), "not running");
    registers.set_up_queue(0, 16, 0x1000);
    registers.write(VIRTIO_MMIO_STATUS, ALL);
    assert!(matches!(registers.write(VIRTIO_MMIO_QUEUE_READY, 0), Action::Stop));
    assert_eq!(registers.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(matches!(registers.write(VIRTIO_MMIO_QUEUE_READY, 0), Action::None), "not there");
}

#[test]
fn the_configuration_takes_any_access() {
    let mut registers = Registers::new();
    let mut data = [0xaa; 8];
    registers.transport.read(0x101, &mut data);
    assert_eq!(data, [2, 3, 4, 0, 0, 0, 0, 0]);
    let _ = registers.transport.write(0x101, &[9, 9], &registers.memory);
    registers.transport.read(0x100, &mut data[..4]);
    assert_eq!(data[..4], [1, 9, 3, 4]);
    // The registers are of four bytes.
    registers.transport.read(0, &mut data[..2]);
    assert_eq!(data[..2], [0, 0]);
    registers.transport.read(1, &mut data[..4]);
    assert_eq!(data[..4], [0; 4]);
}

proptest! {
    /// Whatever is written: no panic, no arithmetic overflow, and a queue that a device gets is one.
    #[test]
    fn any_writes_are_safe(
        writes in prop::collection::vec(
            (
                prop_oneof![
                    4 => (0_u64..0x110).prop_map(|offset| offset & !3),
                    1 => 0_u64..0x1000,
                    1 => any::<u64>(),
                ],
                prop_oneof![
                    2 => prop::sample::select(vec![0, 1, 3, 8, 0xb, 0xf, 16, 256, 0x1000, 0x8f]),
                    1 => any::<u32>(),
                ],
                prop_oneof![8 => Just(4_usize), 1 => 0_usize..=8],
            ),
            0..200,
        ),
        set_up: bool,
    ) {
        let mut registers = Registers::new();
        if set_up {
            registers.accept(VERSION_1);
        }
        for (offset, value, len) in writes {
            let bytes = u64::from(value).to_le_bytes();
            let action = registers.transport.write(offset, &bytes[..len], &registers.memory);
            if let Action::Activate(activation) = action {
                prop_assert_eq!(activation.queues.len(), 3);
                for queue in activation.queues.iter().flatten() {
                    prop_assert!(queue.is_valid(&registers.memory) && queue.size() <= 256);
                }
            }
            let mut data = [0; 8];
            registers.transport.read(offset, &mut data[..len]);
        }
        prop_assert!(matches!(registers.write(VIRTIO_MMIO_STATUS, 0), Action::Reset));
        prop_assert_eq!(registers.status(), 0);
    }
}
