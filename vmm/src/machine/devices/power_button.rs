//! The guest's power button, which asks it to power itself off: a device of ACPI's, whose press is an event
//! by an interrupt (see [`crate::machine::acpi`]).

use std::sync::{Arc, Weak};

use kvm_ioctls::VmFd;

use crate::api::types::pause::Panic;
use crate::machine::devices::interrupts::{self, POWER_BUTTON_GSI};
use crate::machine::lifecycle::VmControl;

/// Why the button was not pressed.
#[derive(Debug, thiserror::Error)]
pub enum PressError {
    /// The guest does not look.
    #[error(
        "the guest does not listen to its power button: it has no ACPI, or is at the beginning of its boot; \
         `mce-relay shutdown --now` ends the VM without asking the guest"
    )]
    NobodyListens,
    /// The guest's kernel is at its end.
    #[error(
        "{0}, so nobody listens to its power button; `mce-relay reset` starts the guest over, \
         `mce-relay shutdown --now` ends the VM"
    )]
    Panicked(Panic),
    /// There is no guest at the moment.
    #[error("the guest is between two boots; ask again")]
    NoGuest,
    /// KVM does not do it.
    #[error("KVM cannot raise the interrupt of the power button")]
    Kvm(#[source] kvm_ioctls::Error),
}

/// The button of one VM. It keeps the VM from nothing: pressed after its end it is no button any more.
#[derive(Clone, Debug)]
pub struct PowerButton(Weak<VmFd>);

impl PowerButton {
    /// That of `vm`.
    #[must_use]
    pub fn new(vm: &Arc<VmFd>) -> Self {
        Self(Arc::downgrade(vm))
    }

    /// Presses it once. What the guest makes of that is the guest's affair.
    ///
    /// # Errors
    /// See [`PressError`]; the guest was not asked then.
    pub fn press(&self, control: &VmControl) -> Result<(), PressError> {
        if let Some(panic @ Panic::Panicked) = control.panicked() {
            return Err(PressError::Panicked(panic));
        }
        let vm = self.0.upgrade().ok_or(PressError::NoGuest)?;
        // An operating system unmasks the interrupt when it looks for ACPI's events. An edge at one that is
        // masked would be lost.
        if interrupts::is_unmasked(&vm, POWER_BUTTON_GSI) == Some(false) {
            return Err(PressError::NobodyListens);
        }
        vm.set_irq_line(POWER_BUTTON_GSI, true)
            .and_then(|()| vm.set_irq_line(POWER_BUTTON_GSI, false))
            .map_err(PressError::Kvm)
    }
}
