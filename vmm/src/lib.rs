//! A minimal virtual machine monitor for KVM that relays memory errors to its guest.
//!
//! Boot side: [`memory`] holds the guest's RAM, [`boot`] puts a Linux kernel into it, [`acpi`]
//! describes the machine, [`cpuid`] and [`msr`] shape the processors, [`devices`] answers port
//! I/O, [`vcpu`] runs the processors and [`vm`] puts all of it together. Whoever relays errors
//! plugs in by the traits [`vm::VmHooks`], [`vcpu::VcpuSetup`] and [`vcpu::VcpuHook`].
//!
//! Relay side: [`mce_inject`] is the back end that the relay asks for, [`ghes`] the ACPI error source
//! that it uses beside, and [`run`] is where the VM and the relay meet; [`last_resort`] is for what
//! neither can take care of, [`allocator`] keeps the process small and [`seccomp`] to the system calls it needs. [`api`], [`client`], [`events`], [`show`] and [`cli`] are how people and
//! programs see it ([`screen`]: what their terminals can show, [`sheet`]: tables); [`retire`] asks the guest to stop using a page, [`ending`] to power off ([`button`]), [`dump`] reads its memory, [`registers`] are its vCPUs'; [`host`],
//! [`poison`] and [`check`] are about the host.

pub mod acpi;
pub mod agent;
pub mod allocator;
pub mod api;
pub mod boot;
pub mod button;
pub mod by_hand;
pub mod check;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod cpuid;
pub mod devices;
pub mod dump;
pub mod ending;
pub mod events;
pub mod files;
pub mod follow;
pub mod ghes;
pub mod hangup;
pub mod host;
pub mod inject;
pub mod last_resort;
pub mod life;
pub mod manual;
pub mod map;
pub mod mce_inject;
pub mod memory;
pub mod msr;
pub mod names;
pub mod number;
pub mod pages;
pub mod peer;
pub mod poison;
pub mod records;
pub mod registers;
pub mod retire;
pub mod run;
pub mod screen;
pub mod seccomp;
pub mod serial;
pub mod sheet;
pub mod show;
pub mod sockets;
pub mod terminal;
pub mod vcpu;
pub mod vm;
pub mod words;
