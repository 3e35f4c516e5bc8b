//! Where whoever relays errors plugs into a VM that is built.

use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};

use crate::config::VmConfig;
use crate::machine::acpi::Table;
use crate::machine::cpu::cpuid::Vendor;
use crate::machine::devices::serial::{self, SerialLines};
use crate::machine::lifecycle::VmControl;
use crate::machine::memory::guest_ram::GuestRam;
use crate::machine::vcpu::hooks::{HookError, NoHook, Ready, VcpuSetup};
use crate::sandbox::seccomp::Filters;

/// A VM as hooks see it while it is built.
#[derive(Debug)]
pub struct VmView<'a> {
    /// KVM itself.
    pub kvm: &'a Kvm,
    /// The VM.
    pub vm: &'a Arc<VmFd>,
    /// Its RAM, with its memfd. Whoever keeps addresses of it keeps it, too.
    pub ram: &'a Arc<GuestRam>,
    /// Whose processor the guest sees.
    pub vendor: Vendor,
    /// Number of vCPUs.
    pub cpus: u8,
    /// What it is controlled by.
    pub control: &'a VmControl,
}

/// What can be done around the making of a VM. Called once each, in the order given here.
pub trait VmHooks {
    /// Which system calls the threads of the devices may make.
    fn filters(&self) -> Filters {
        Filters::default()
    }

    /// The VM has RAM and interrupt controllers, and no vCPU yet.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn vm_created(&mut self, _vm: &VmView<'_>) -> Result<(), HookError> {
        Ok(())
    }

    /// More ACPI tables.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn acpi_tables(&mut self) -> Result<Vec<Table>, HookError> {
        Ok(Vec::new())
    }

    /// The ways out for the serial ports, when all else that can be wrong with the VM has been looked at. Those
    /// of the VM before may be given again; by default they are this VM's own.
    ///
    /// # Errors
    /// They cannot be opened.
    fn serial_lines(&mut self, config: &VmConfig) -> Result<SerialLines, HookError> {
        Ok(serial::open_lines(&config.serial, &self.filters())?)
    }

    /// The hook of this vCPU; once per vCPU.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn vcpu(&mut self, index: u8) -> Result<Box<dyn VcpuSetup>, HookError>;
}

/// Does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl VmHooks for NoHooks {
    fn vcpu(&mut self, _: u8) -> Result<Box<dyn VcpuSetup>, HookError> {
        Ok(Box::new(Ready(NoHook)))
    }
}
