//! What a UART and the thread of its port share: the queue of output, and who wakes whom.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::machine::lifecycle::VmControl;

#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) bytes: VecDeque<u8>,
    /// Bytes that were dropped since the port is there.
    pub(super) dropped: u64,
    /// Those of them that nobody was told of in the output itself; they were before all that is in the queue.
    pub(super) untold: u64,
    /// What was queued last does not end a line.
    pub(super) mid_line: bool,
}

impl Queue {
    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.bytes.len() == QUEUE_LEN {
                self.bytes.pop_front();
                self.drop_one();
            }
            self.bytes.push_back(*byte);
        }
        if let Some(last) = bytes.last() {
            self.mid_line = *last != b'\n';
        }
    }

    fn drop_one(&mut self) {
        self.dropped += 1;
        self.untold += 1;
    }
}

/// The guest's side of a port, which is another one at each boot.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) uart: Arc<Mutex<Uart>>,
    pub(super) control: VmControl,
}

/// What the UART and the port's thread share.
#[derive(Debug)]
pub(super) struct Link {
    queue: Mutex<Queue>,
    guest: Mutex<Option<Guest>>,
    /// Counts the guests that there were.
    pub(super) guests: AtomicU64,
    pub(super) wake: EventFd,
    /// The thread will look at the queue by itself in a moment.
    pub(super) looking: AtomicBool,
    /// The thread has input that the UART had no room for.
    pub(super) input_waits: AtomicBool,
    pub(super) ending: AtomicBool,
}

impl Link {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            queue: Mutex::default(),
            guest: Mutex::default(),
            guests: AtomicU64::new(0),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            looking: AtomicBool::new(false),
            input_waits: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        })
    }

    pub(super) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose lock keeps the UART alive: with it goes the VM that it interrupts.
    pub(super) fn guest(&self) -> MutexGuard<'_, Option<Guest>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another guest has the port from now on, or none. What was meant for the one before is dropped.
    pub(super) fn set_guest(&self, guest: Option<Guest>) {
        let mut current = self.guest();
        self.guests.fetch_add(1, Ordering::SeqCst);
        *current = guest;
        drop(current);
        self.wake();
    }

    pub(super) fn wake(&self) {
        // It can only fail when the counter is full, and then the thread is awake anyway.
        let _ = self.wake.write(1);
    }

    pub(super) fn push(&self, bytes: &[u8]) {
        let mut queue = self.queue();
        let was_empty = queue.bytes.is_empty();
        queue.push(bytes);
        drop(queue);
        // The thread clears the flag before it looks a last time, so one of the two sees the other.
        if was_empty && !self.looking.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Puts a line of the VMM's own between what guests say.
    pub(super) fn push_line(&self, line: &str) {
        let begin = if self.queue().mid_line { "\n" } else { "" };
        self.push(format!("{begin}{line}\n").as_bytes());
    }
}

/// Called by the UART, most often on the vCPU's own thread in the middle of its port access. An
/// irqfd would have a kernel worker on another processor do it, and kick the vCPU for each byte.
pub(super) struct Irq(pub(super) IrqLine);

impl std::fmt::Debug for Irq {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Irq")
    }
}

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        (self.0)();
        Ok(())
    }
}

/// The UART's output.
#[derive(Debug)]
pub(super) struct Output(pub(super) Arc<Link>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the thread when the guest has taken all input.
#[derive(Debug)]
pub(super) struct Events(pub(super) Arc<Link>);

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.0.input_waits.load(Ordering::Relaxed) {
            self.0.wake();
        }
    }
}

pub(super) type Uart = Serial<Irq, Events, Output>;

/// How much output waits for a reader, in bytes.
pub const QUEUE_LEN: usize = 1 << 20;

/// Raises a serial port's interrupt: an edge.
pub type IrqLine = Arc<dyn Fn() + Send + Sync>;
