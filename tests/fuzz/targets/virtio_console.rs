//! The same with virtio-console, and with input from the host.
#![no_main]

#[path = "../virtio.rs"]
mod virtio;

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use mce_relay_vmm::config::SerialMode;
use mce_relay_vmm::machine::devices::serial::SerialLine;
use mce_relay_vmm::machine::devices::virtio::console::Console;
use mce_relay_vmm::machine::lifecycle::VmControl;
use mce_relay_vmm::sandbox::seccomp::Filters;
use virtio::{Machine, Step};

static LINE: OnceLock<Arc<SerialLine>> = OnceLock::new();

fuzz_target!(|steps: Vec<Step>| {
    let line = LINE.get_or_init(|| {
        let mode = SerialMode::File("/dev/null".into());
        let line = SerialLine::open_console(&mode, &Filters::default());
        Arc::new(line.unwrap().unwrap())
    });
    let console = Console::new(Some(line), &VmControl::new(0).unwrap()).unwrap();
    Machine::new(console).run(steps, |console, bytes| {
        let _ = console.offer(bytes);
    });
});
