//! The guest's power button: an ACPI device that asks the guest to power itself off, by an interrupt (see
//! [`crate::machine::acpi`]).

use std::sync::{Arc, Weak};

use kvm_ioctls::VmFd;

use crate::api::types::pause::Panic;
use crate::machine::devices::interrupts::{self, POWER_BUTTON_GSI};
use crate::machine::lifecycle::VmControl;

/// Why the button was not pressed.
#[derive(Debug, thiserror::Error)]
pub enum PressError {
    /// The guest does not look for it.
    #[error(
        "the guest does not listen to its power button: it has no ACPI, or is at the beginning of its boot; \
         `mce-relay shutdown --now` ends the VM without asking the guest"
    )]
    NobodyListens,
    /// The guest's kernel has panicked.
    #[error(
        "{0}, so nobody listens to its power button; `mce-relay reset` starts the guest over, \
         `mce-relay shutdown --now` ends the VM"
    )]
    Panicked(Panic),
    /// No guest runs at the moment.
    #[error("the guest is between two boots; ask again")]
    NoGuest,
    /// KVM cannot raise the interrupt.
    #[error("KVM cannot raise the interrupt of the power button")]
    Kvm(#[source] kvm_ioctls::Error),
}

/// The button of one VM. It does not keep the VM alive: a press after the VM's end is an error.
#[derive(Clone, Debug)]
pub struct PowerButton(Weak<VmFd>);

impl PowerButton {
    /// The button of `vm`.
    #[must_use]
    pub fn new(vm: &Arc<VmFd>) -> Self {
        Self(Arc::downgrade(vm))
    }

    /// Presses it once. What the guest does then is up to the guest.
    ///
    /// # Errors
    /// See [`PressError`]; the guest was not asked then.
    pub fn press(&self, control: &VmControl) -> Result<(), PressError> {
        if let Some(panic @ Panic::Panicked) = control.panicked() {
            return Err(PressError::Panicked(panic));
        }
        let vm = self.0.upgrade().ok_or(PressError::NoGuest)?;
        // An operating system unmasks the interrupt when it looks for ACPI's events. At a masked line the edge would be
        // lost.
        if interrupts::is_unmasked(&vm, POWER_BUTTON_GSI) == Some(false) {
            return Err(PressError::NobodyListens);
        }
        vm.set_irq_line(POWER_BUTTON_GSI, true)
            .and_then(|()| vm.set_irq_line(POWER_BUTTON_GSI, false))
            .map_err(PressError::Kvm)
    }
}
