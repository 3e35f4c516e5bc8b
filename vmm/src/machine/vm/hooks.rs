//! The hooks of a VM while it is built, by which a relay plugs in.

use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};

use crate::config::VmConfig;
use crate::machine::acpi::Table;
use crate::machine::cpu::cpuid::Vendor;
use crate::machine::devices::serial::{self, HostSides};
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
    /// Its RAM. A hook that keeps addresses of it keeps this, too.
    pub ram: &'a Arc<GuestRam>,
    /// The vendor of the processor that the guest sees.
    pub vendor: Vendor,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Its control.
    pub control: &'a VmControl,
}

/// Hooks around the building of a VM. Each is called once (`vcpu` once per vCPU), in the order given here.
pub trait VmHooks {
    /// Which system calls the threads of the devices may make.
    fn filters(&self) -> Filters {
        Filters::default()
    }

    /// Called when the VM has RAM and interrupt controllers, and no vCPU yet.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn vm_created(&mut self, _vm: &VmView<'_>) -> Result<(), HookError> {
        Ok(())
    }

    /// ACPI tables to add.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn acpi_tables(&mut self) -> Result<Vec<Table>, HookError> {
        Ok(Vec::new())
    }

    /// The lines of the serial ports and of the console. Called when everything else of the VM has been checked. The previous boot's lines
    /// may be returned again; by default new ones are opened.
    ///
    /// # Errors
    /// They cannot be opened.
    fn serial_lines(&mut self, config: &VmConfig) -> Result<HostSides, HookError> {
        Ok(serial::open_lines(config, &self.filters())?)
    }

    /// The hook of vCPU `index`.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn vcpu(&mut self, index: u8) -> Result<Box<dyn VcpuSetup>, HookError>;
}

/// Hooks that do nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl VmHooks for NoHooks {
    fn vcpu(&mut self, _: u8) -> Result<Box<dyn VcpuSetup>, HookError> {
        Ok(Box::new(Ready(NoHook)))
    }
}
