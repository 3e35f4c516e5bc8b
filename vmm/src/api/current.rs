//! What the API serves: the VM as it runs, and between two boots what remains of the last one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mce_relay::Handle;

use crate::api::types::vm::VmInfo;
use crate::machine::devices::power_button::PowerButton;
use crate::machine::devices::virtio::registers::Registers;
use crate::machine::lifecycle::VmControl;
use crate::machine::memory::guest_ram::GuestRam;
use crate::relaying::manual_mce::injector::Injector;

/// The virtual machine as the API sees it; it changes with every boot.
#[derive(Clone)]
pub struct Running {
    /// What runs. Whether it is paused, and whether it has panicked, is looked up at each request.
    pub info: VmInfo,
    /// Its relay, with the ledger.
    pub relay: Handle,
    /// Its control: stop, pause, kick.
    pub control: VmControl,
    /// Its memory.
    pub ram: Arc<GuestRam>,
    /// Its virtio devices.
    pub devices: Vec<Arc<Registers>>,
    /// Gives its vCPUs machine checks that a user asked for.
    pub injector: Injector,
    /// Its power button.
    pub button: PowerButton,
}

impl Running {
    /// What runs now, with its present state.
    #[must_use]
    pub fn info(&self) -> VmInfo {
        let (pause_reason, panic) = (self.control.paused(), self.control.panicked());
        let (paused, relay_alive) = (pause_reason.is_some(), self.relay.is_alive());
        // Ordinary memory may have taken the place of huge pages.
        let memory = self.ram.pieces().iter().map(Into::into).collect();
        let devices = self.devices.iter().map(|device| device.info()).collect();
        VmInfo { paused, pause_reason, panic, relay_alive, memory, devices, ..self.info.clone() }
    }
}

/// Shared between the VM's owner and the API's threads.
#[derive(Clone, Default)]
pub struct Current {
    name: Option<Arc<str>>,
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    /// `None` between two boots.
    running: Option<Running>,
    /// The relay (and its ledger) of this boot, or of the last one between two boots; and what ran.
    last: Option<(Handle, VmInfo)>,
}

impl Current {
    /// For a VM with this name.
    #[must_use]
    pub fn new(name: Option<&str>) -> Self {
        Self { name: name.map(Into::into), held: Arc::default() }
    }

    /// What the VM is called.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        self.name.as_deref().map(str::to_owned)
    }

    /// Sets what runs now; `None` between two boots.
    pub fn set(&self, running: Option<Running>) {
        let mut held = self.lock();
        if let Some(running) = &running {
            held.last = Some((running.relay.clone(), running.info.clone()));
        }
        held.running = running;
    }

    /// What runs now.
    #[must_use]
    pub fn get(&self) -> Option<Running> {
        self.lock().running.clone()
    }

    /// What runs now or ran last, with its ledger.
    #[must_use]
    pub fn last(&self) -> Option<(Handle, VmInfo)> {
        match self.get() {
            Some(running) => Some((running.relay.clone(), running.info())),
            None => self.lock().last.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Only plain assignments happen under the lock, so a panic leaves nothing half done.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
