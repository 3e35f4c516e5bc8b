//! What both forms of the device offer, and the configuration space (virtio 1.2, 5.1.4).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::tap::Tap;
use crate::config::NetConfig;
use crate::machine::devices::virtio::config_space::ConfigSpace;
use crate::machine::devices::virtio::interrupt::Interrupt;

/// Where in struct virtio_net_config the state of the link is.
const STATUS: usize = 6;

/// The device as the driver reads of it.
#[derive(Debug)]
pub(super) struct Offer {
    features: u64,
    space: Arc<ConfigSpace>,
    is_link_up: AtomicBool,
}

impl Offer {
    pub(super) fn new(tap: &Tap, config: &NetConfig) -> Self {
        let mtu = config.mtu.or(tap.mtu());
        let mut bytes = config.mac.to_vec();
        #[allow(clippy::cast_possible_truncation, reason = "it is 1")]
        bytes.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        // max_virtqueue_pairs belongs to a feature that is not offered.
        bytes.extend(0_u16.to_le_bytes());
        bytes.extend(mtu.unwrap_or(0).to_le_bytes());
        let mut features = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS;
        if mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let space = Arc::new(ConfigSpace::new(bytes, 0..0));
        Self { features, space, is_link_up: AtomicBool::new(true) }
    }

    pub(super) fn features(&self) -> u64 {
        self.features
    }

    pub(super) fn space(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.space)
    }

    pub(super) fn is_link_up(&self) -> bool {
        self.is_link_up.load(Ordering::Relaxed)
    }

    /// The tap is gone for good; the driver is told once.
    pub(super) fn link_is_down(&self, interrupt: &Interrupt) {
        if self.is_link_up.swap(false, Ordering::Relaxed) {
            self.space.set(STATUS, &0_u16.to_le_bytes());
            interrupt.config_changed();
        }
    }
}
