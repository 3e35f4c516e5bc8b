//! Makes the devices of a configuration.

use thiserror::Error;

use super::console::Console;
use super::device::Device;
use super::rng::{Rng, RngError};
use super::vsock::Vsock;
use crate::config::DeviceConfig;
use crate::machine::devices::serial::SerialLines;
use crate::machine::lifecycle::VmControl;

/// Why a device cannot be made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The source of random bytes.
    #[error("virtio-rng")]
    Rng(#[from] RngError),
    /// The console.
    #[error("virtio-console: out of file descriptors")]
    Console(#[source] std::io::Error),
    /// The sockets' device.
    #[error("virtio-vsock: out of file descriptors")]
    Vsock(#[source] std::io::Error),
    /// The same.
    #[error("virtio-vsock: its socket was not opened")]
    NoVsockLine,
}

/// Makes the devices, for one boot of the VM of `control`; the console and vsock are on their lines of `lines`.
///
/// # Errors
/// See [`BuildError`].
pub fn build(
    devices: &[DeviceConfig],
    lines: &SerialLines,
    control: &VmControl,
) -> Result<Vec<Box<dyn Device>>, BuildError> {
    let mut built: Vec<Box<dyn Device>> = Vec::new();
    for device in devices {
        built.push(match device {
            DeviceConfig::Rng { src } => Box::new(Rng::open(src)?),
            // Without a line it is the null console.
            DeviceConfig::Console(_) => {
                let line = lines.console.as_ref();
                Box::new(Console::new(line, control).map_err(BuildError::Console)?)
            }
            DeviceConfig::Vsock { cid, .. } => {
                let line = lines.vsock.clone().ok_or(BuildError::NoVsockLine)?;
                Box::new(Vsock::new(*cid, line).map_err(BuildError::Vsock)?)
            }
        });
    }
    Ok(built)
}
