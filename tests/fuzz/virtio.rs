//! A virtio device as a guest has it, driven by the fuzzer's bytes: its registers, its rings, and whatever is in RAM.

use std::sync::Arc;

use arbitrary::Arbitrary;
use mce_relay_vmm::machine::devices::virtio::device::{Active, Device, Turn, Wait};
use mce_relay_vmm::machine::devices::virtio::transport::{Action, Transport};
use mce_relay_vmm::machine::memory::DeviceMemory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Guest RAM in bytes.
const RAM: u64 = 0x1_0000;
/// Turns of a queue for one kick; a device may always want another one.
const TURNS: usize = 4;

/// What the guest or the host does.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// Writes a register of four bytes.
    Register(u8, u32),
    /// Writes anywhere in the window or beyond it.
    Write(u16, [u8; 8], u8),
    Read(u16, u8),
    /// Writes memory.
    Memory(u16, Vec<u8>),
    /// Writes a descriptor of queue 0 or 1.
    Descriptor {
        second: bool,
        at: u8,
        addr: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// Makes a chain available and kicks.
    Offer {
        second: bool,
        head: u8,
    },
    /// Sets the device up as a driver does.
    SetUp,
    /// Input of the host's.
    Input(Vec<u8>),
}

/// The device and its driver.
pub struct Machine<D> {
    device: D,
    transport: Transport,
    memory: DeviceMemory,
    kicks: Vec<Arc<EventFd>>,
    active: Option<Active>,
    added: [u16; 2],
}

fn rings(second: bool) -> u64 {
    if second { 0x4000 } else { 0x1000 }
}

impl<D: Device> Machine<D> {
    pub fn new(device: D) -> Self {
        let eventfd = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let memory = DeviceMemory::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let transport = Transport::new(&device, eventfd());
        let kicks = device.queue_sizes().iter().map(|_| eventfd()).collect();
        Self { device, transport, memory, kicks, active: None, added: [0; 2] }
    }

    /// `input` gives the device input of the host's.
    pub fn run(&mut self, steps: Vec<Step>, input: impl Fn(&D, &[u8])) {
        for step in steps {
            match step {
                Step::Register(at, value) => {
                    self.write(u64::from(at) & !3, &value.to_le_bytes());
                }
                Step::Write(at, bytes, len) => {
                    self.write(at.into(), &bytes[..usize::from(len % 9)]);
                }
                Step::Read(at, len) => {
                    let mut bytes = [0; 8];
                    self.transport.read(at.into(), &mut bytes[..usize::from(len % 9)]);
                }
                Step::Memory(at, bytes) => {
                    let _ = self.memory.write(&bytes, GuestAddress(at.into()));
                }
                Step::Descriptor { second, at, addr, len, flags, next } => {
                    let to = rings(second) + u64::from(at % 16) * 16;
                    // Some beyond the end of RAM, and of 32 bits.
                    let addr = u64::from(addr) * 2;
                    let len = u64::from(len) * if len & 1 == 0 { 1 } else { 0x1_0001 };
                    self.put(to, addr);
                    self.put(to + 8, len | u64::from(flags & 7) << 32 | u64::from(next) << 48);
                }
                Step::Offer { second, head } => self.offer(second, head.into()),
                Step::SetUp => self.set_up(),
                Step::Input(bytes) => {
                    input(&self.device, &bytes);
                    self.ready();
                }
            }
        }
        // Whatever has happened, it can be set up again.
        self.set_up();
        assert!(self.active.is_some());
    }

    fn put(&self, at: u64, word: u64) {
        self.memory.write_obj(word, GuestAddress(at)).unwrap();
    }

    fn offer(&mut self, second: bool, head: u16) {
        let (avail, queue) = (rings(second) + 0x1000, usize::from(second));
        let entry = avail + 4 + u64::from(self.added[queue] % 16) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.added[queue] = self.added[queue].wrapping_add(1);
        self.memory.write_obj(self.added[queue], GuestAddress(avail + 2)).unwrap();
        self.write(0x50, &u32::from(second).to_le_bytes());
    }

    fn set_up(&mut self) {
        let register = |machine: &mut Self, at: u64, value: u32| {
            machine.write(at, &value.to_le_bytes());
        };
        for (at, value) in [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
            register(self, at, value);
        }
        self.added = [0; 2];
        for queue in 0..self.kicks.len() as u32 {
            let at = rings(queue == 1);
            self.memory.write_slice(&[0; 0x3000], GuestAddress(at)).unwrap();
            let at = at as u32;
            for (register_at, value) in [
                (0x30, queue),
                (0x38, 16),
                (0x80, at),
                (0x90, at + 0x1000),
                (0xa0, at + 0x2000),
                (0x44, 1),
            ] {
                register(self, register_at, value);
            }
        }
        register(self, 0x70, 15);
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        match self.transport.write(at, bytes, &self.memory) {
            Action::None => {}
            Action::Activate(activation) => {
                self.active = Some(activation.into_active(self.memory.clone(), &self.kicks));
                (0..self.kicks.len()).for_each(|queue| self.kicked(queue));
            }
            Action::Stop | Action::Reset => {
                self.active = None;
                self.device.stop();
            }
            Action::Notify(queue) => self.kicked(queue),
        }
    }

    /// As the device's thread does it.
    fn kicked(&mut self, queue: usize) {
        for _ in 0..TURNS {
            let Some(active) = &mut self.active else { return };
            match self.device.kicked(queue, active) {
                Ok(Turn::Done) => return,
                Ok(Turn::Again) => {}
                Err(_) => self.fail(),
            }
        }
    }

    fn ready(&mut self) {
        let Some(active) = &mut self.active else { return };
        let mut waits = Vec::new();
        self.device.waits_for(&mut waits);
        for Wait { fd, events } in waits {
            if self.device.ready(Wait { fd, events }, active).is_err() {
                return self.fail();
            }
        }
    }

    fn fail(&mut self) {
        if let Some(active) = self.active.take() {
            active.interrupt.ask_for_reset();
        }
        self.device.stop();
    }
}
