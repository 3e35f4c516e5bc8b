//! Makes the devices of a configuration.

use thiserror::Error;

use super::blk::Blk;
use super::console::Console;
use super::device::Device;
use super::net::{Net, Tap, TapError, VhostError, VhostNet};
use super::rng::{Rng, RngError};
use super::vsock::Vsock;
use crate::config::DeviceConfig;
use crate::machine::devices::serial::HostSides;
use crate::machine::lifecycle::VmControl;
use crate::machine::memory::DeviceMemory;
use crate::sandbox::seccomp::Filters;

/// Why a device cannot be made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The source of random bytes.
    #[error("virtio-rng")]
    Rng(#[from] RngError),
    /// A disk that was not opened before.
    #[error("virtio-blk: a disk was not opened")]
    NoDisk,
    /// A disk's second thread.
    #[error("virtio-blk: cannot start a thread")]
    Disk(#[source] std::io::Error),
    /// The console.
    #[error("virtio-console: out of file descriptors")]
    Console(#[source] std::io::Error),
    /// A network device's tap.
    #[error("virtio-net")]
    Tap(#[from] TapError),
    /// A network device in the host's kernel.
    #[error("virtio-net")]
    Vhost(#[from] VhostError),
    /// The sockets' device.
    #[error("virtio-vsock: out of file descriptors")]
    Vsock(#[source] std::io::Error),
    /// The same.
    #[error("virtio-vsock: its socket was not opened")]
    NoVsockLine,
}

/// Makes the devices, for one boot of the VM of `control` with this memory; disks, console and vsock have theirs of
/// `host`, and what threads they need beside the one of each have the filters of their roles.
///
/// # Errors
/// See [`BuildError`].
pub fn build(
    devices: &[DeviceConfig],
    host: &HostSides,
    control: &VmControl,
    memory: &DeviceMemory,
    filters: &Filters,
) -> Result<Vec<Box<dyn Device>>, BuildError> {
    let mut built: Vec<Box<dyn Device>> = Vec::new();
    let mut disks = host.disks.iter();
    for device in devices {
        built.push(match device {
            DeviceConfig::Disk(_) => {
                let disk = Blk::new(disks.next().ok_or(BuildError::NoDisk)?);
                Box::new(disk.with_a_second_thread(filters).map_err(BuildError::Disk)?)
            }
            DeviceConfig::Rng { src } => Box::new(Rng::open(src)?),
            DeviceConfig::Net(net) => {
                let tap = Tap::open(&net.tap)?;
                match net.vhost {
                    true => Box::new(VhostNet::open(tap, net, memory)?),
                    false => Box::new(Net::new(tap, net)),
                }
            }
            // Without a line it is the null console.
            DeviceConfig::Console(_) => {
                let line = host.console.as_ref();
                Box::new(Console::new(line, control).map_err(BuildError::Console)?)
            }
            DeviceConfig::Vsock { cid, .. } => {
                let line = host.vsock.clone().ok_or(BuildError::NoVsockLine)?;
                Box::new(Vsock::new(*cid, line).map_err(BuildError::Vsock)?)
            }
        });
    }
    Ok(built)
}
