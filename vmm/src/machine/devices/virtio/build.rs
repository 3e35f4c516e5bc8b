//! Makes the devices of a configuration.

use thiserror::Error;

use super::device::Device;
use super::rng::{Rng, RngError};
use crate::config::DeviceConfig;

/// Why a device cannot be made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The source of random bytes.
    #[error("virtio-rng")]
    Rng(#[from] RngError),
}

/// Makes the devices, for one boot.
///
/// # Errors
/// See [`BuildError`].
pub fn build(devices: &[DeviceConfig]) -> Result<Vec<Box<dyn Device>>, BuildError> {
    let mut built: Vec<Box<dyn Device>> = Vec::new();
    for device in devices {
        built.push(match device {
            DeviceConfig::Rng { src } => Box::new(Rng::open(src)?),
        });
    }
    Ok(built)
}
