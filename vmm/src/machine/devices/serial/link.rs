//! What a UART and the thread of its port share: the queue of output, and the means to wake each other.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::machine::devices::serial::finished::{Finished, Lines};
use crate::machine::lifecycle::VmControl;

#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) bytes: VecDeque<u8>,
    /// Bytes that were dropped since the port was opened.
    pub(super) dropped: u64,
    /// Those of them that the output does not report yet; they came before all that is in the queue.
    pub(super) unreported: u64,
    /// The last queued byte does not end a line.
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
        self.unreported += 1;
    }
}

/// What takes a guest's input.
pub(crate) trait Taker: std::fmt::Debug + Send + Sync {
    /// Takes the first ones of `bytes`, as many as there is room for, and returns how many.
    fn take(&self, bytes: &[u8]) -> usize;
}

impl Taker for Mutex<Uart> {
    fn take(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock().unwrap_or_else(PoisonError::into_inner);
        if uart.fifo_capacity() == 0 {
            return 0;
        }
        uart.enqueue_raw_bytes(bytes).unwrap_or_else(|error| {
            log::warn!("serial input: {error}");
            0
        })
    }
}

/// The guest's side of a port, made anew for each boot.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) taker: Arc<dyn Taker>,
    pub(super) control: VmControl,
}

/// Who wants to know with which bad pages the guest is done.
struct Watch {
    lines: Lines,
    finished: Finished,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

/// What the UART and the port's thread share.
#[derive(Debug)]
pub(super) struct Link {
    queue: Mutex<Queue>,
    watch: Mutex<Option<Watch>>,
    guest: Mutex<Option<Guest>>,
    /// Number of guests so far.
    pub(super) guests: AtomicU64,
    pub(super) wake: EventFd,
    /// The thread is going to look at the queue by itself, and need not be woken.
    pub(super) looking: AtomicBool,
    /// The thread has input that the UART had no room for.
    pub(super) input_waits: AtomicBool,
    pub(super) ending: AtomicBool,
}

impl Link {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            queue: Mutex::default(),
            watch: Mutex::default(),
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

    /// The guest's side. While this lock is held the UART lives, and with it the VM that it interrupts.
    pub(super) fn guest(&self) -> MutexGuard<'_, Option<Guest>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the port to another guest, or to none. Input for the previous guest is dropped.
    pub(super) fn set_guest(&self, guest: Option<Guest>) {
        let mut current = self.guest();
        self.guests.fetch_add(1, Ordering::SeqCst);
        *current = guest;
        drop(current);
        self.wake();
    }

    pub(super) fn wake(&self) {
        // It fails only when the counter is full, and then the thread is awake anyway.
        let _ = self.wake.write(1);
    }

    /// The guest can take input again.
    pub(super) fn has_room(&self) {
        if self.input_waits.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    /// See [`SerialLine::watch`](super::SerialLine::watch).
    pub(super) fn watch(&self, finished: Option<Finished>) {
        let watch = finished.map(|finished| Watch { lines: Lines::default(), finished });
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = watch;
    }

    /// Puts out what the guest says.
    pub(super) fn push_guests(&self, bytes: &[u8]) {
        self.push(bytes);
        if let Some(Watch { lines, finished }) =
            self.watch.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
        {
            lines.take(bytes, &**finished);
        }
    }

    fn push(&self, bytes: &[u8]) {
        let mut queue = self.queue();
        let was_empty = queue.bytes.is_empty();
        queue.push(bytes);
        drop(queue);
        // The thread clears the flag before its last look at the queue, so either it sees these bytes or this sees the
        // cleared flag.
        if was_empty && !self.looking.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Adds a line of the VMM's own between the guests' output.
    pub(super) fn push_line(&self, line: &str) {
        let begin = if self.queue().mid_line { "\n" } else { "" };
        self.push(format!("{begin}{line}\n").as_bytes());
    }
}

/// Called by the UART, mostly on the vCPU's own thread in the middle of its port access. With an irqfd a kernel worker
/// on another processor would do it, and kick the vCPU for each byte.
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
        self.0.push_guests(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Wakes the thread when the guest has read all input.
#[derive(Debug)]
pub(super) struct Events(pub(super) Arc<Link>);

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.has_room();
    }
}

pub(super) type Uart = Serial<Irq, Events, Output>;

/// How much output the queue holds, in bytes.
pub const QUEUE_LEN: usize = 1 << 20;

/// Raises a serial port's interrupt, as an edge.
pub type IrqLine = Arc<dyn Fn() + Send + Sync>;
