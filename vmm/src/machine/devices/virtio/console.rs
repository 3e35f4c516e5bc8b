//! virtio-console (virtio 1.2, 5.3) with one port: the guest's `hvc0`, on a line as a serial port has.
//!
//! What the host's side does is the line's: it never waits here, and drops the oldest output where nobody reads it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::attempt::checked;
use super::config_space::ConfigSpace;
use super::device::{Active, Device, DeviceError, Served, Turn, Wait};
use super::queue::Request;
use crate::machine::devices::serial::SerialLine;
use crate::machine::devices::serial::attached::Attached;
use crate::machine::devices::serial::link::Taker;
use crate::machine::lifecycle::VmControl;
use crate::machine::memory::DeviceMemory;
use crate::sandbox::role::Role;

/// The queue of buffers for input (5.3.2).
const RECEIVE: usize = 0;
/// The queue of output.
const TRANSMIT: usize = 1;
/// The most input that waits for the guest, in bytes. The rest stays with the line.
const MOST_INPUT: usize = 4096;
/// The most output that one request has, in bytes; the rest of it is dropped. A line holds no more.
const MOST_OUTPUT: usize = 1 << 20;
/// struct virtio_console_config: columns, rows, the number of ports, and a register for early output. None of the
/// features that they belong to is offered.
const CONFIG: usize = 12;

/// Input on its way from the line's thread to the device's.
#[derive(Debug)]
struct Input {
    bytes: Mutex<VecDeque<u8>>,
    wake: EventFd,
}

impl Input {
    fn bytes(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // Any bytes will do.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taker for Input {
    fn take(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.bytes();
        let taken = bytes.len().min(MOST_INPUT.saturating_sub(waiting.len()));
        waiting.extend(&bytes[..taken]);
        drop(waiting);
        // It fails only when the counter is full, and then the thread is awake anyway.
        let _ = self.wake.write(1);
        taken
    }
}

/// The device.
#[derive(Debug)]
pub struct Console {
    input: Arc<Input>,
    /// `None` for the null console.
    line: Option<Attached>,
    /// The output of one request.
    output: Vec<u8>,
}

impl Console {
    /// A console of the VM of `control` on `line`; without a line all output is dropped.
    ///
    /// # Errors
    /// There are no more file descriptors.
    pub fn new(line: Option<&Arc<SerialLine>>, control: &VmControl) -> io::Result<Self> {
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let input = Arc::new(Input { bytes: Mutex::default(), wake });
        let taker: Arc<Input> = Arc::clone(&input);
        let line = line.map(|line| Attached::on(line, control, taker));
        Ok(Self { input, line, output: Vec::new() })
    }

    /// Has input for the guest, as from a line; returns how much of it there was room for. The device is ready then.
    #[must_use]
    pub fn offer(&self, bytes: &[u8]) -> usize {
        self.input.take(bytes)
    }

    /// Puts input into the guest's buffers.
    fn receive(&mut self, active: &mut Active) -> Result<Turn, DeviceError> {
        let input = &self.input;
        let turn = active.serve(RECEIVE, |memory, request| Ok(give(input, memory, request)));
        if let Some(line) = &self.line {
            line.has_room();
        }
        turn
    }

    fn transmit(&mut self, active: &mut Active) -> Result<Turn, DeviceError> {
        let Self { line, output, .. } = self;
        active.serve(TRANSMIT, |memory, request| {
            if let Some(line) = line {
                put(line, output, memory, request);
            }
            Ok(Served::Done(0))
        })
    }
}

/// Gives a buffer as much of the input as it takes. Input for a buffer that is no good memory waits for the next one.
fn give(input: &Input, memory: &DeviceMemory, request: &Request) -> Served {
    let mut waiting = input.bytes();
    if waiting.is_empty() {
        return Served::Later;
    }
    let written = checked(|| request.write(memory, 0, waiting.make_contiguous())).unwrap_or(0);
    waiting.drain(..written);
    Served::Done(u32::try_from(written).unwrap_or(0))
}

/// Puts out what a request has, all of it or, where its memory is not good, nothing.
fn put(line: &Attached, output: &mut Vec<u8>, memory: &DeviceMemory, request: &Request) {
    let len = usize::try_from(request.readable_len()).unwrap_or(MOST_OUTPUT).min(MOST_OUTPUT);
    output.resize(len, 0);
    match checked(|| request.read(memory, 0, output)) {
        Ok(len) => line.push(&output[..len]),
        Err(error) => log::debug!("virtio-console: output is dropped: {error}"),
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> &'static str {
        "console"
    }

    fn role(&self) -> Role {
        Role::VirtioConsole
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::new(ConfigSpace::new(vec![0; CONFIG], 0..0))
    }

    fn kicked(&mut self, index: usize, active: &mut Active) -> Result<Turn, DeviceError> {
        match index {
            RECEIVE => self.receive(active),
            _ => self.transmit(active),
        }
    }

    fn waits_for(&self, waits: &mut Vec<Wait>) {
        waits.push(Wait { fd: self.input.wake.as_raw_fd(), events: libc::POLLIN });
    }

    fn ready(&mut self, _: Wait, active: &mut Active) -> Result<Turn, DeviceError> {
        let _ = self.input.wake.read();
        self.receive(active)
    }

    fn stop(&mut self) {
        self.output = Vec::new();
    }
}

#[cfg(test)]
mod tests;
