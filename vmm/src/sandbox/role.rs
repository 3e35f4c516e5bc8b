//! The roles of a running VM's threads.

/// The role of a thread of a running VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that builds the VM and waits for its end; its filter applies to every thread.
    Main,
    /// A vCPU.
    Vcpu,
    /// The relay's.
    Relay,
    /// The API's, and its worker threads.
    Api,
    /// A serial port's.
    Serial,
    /// The threads that write events down.
    Events,
    /// The virtio source of random bytes.
    VirtioRng,
    /// A virtio-blk device's.
    VirtioBlk,
    /// The virtio console.
    VirtioConsole,
    /// A virtio network device, in this process.
    VirtioNet,
    /// The same, in the host's kernel.
    VirtioVhostNet,
    /// The virtio stream sockets.
    VirtioVsock,
}

impl Role {
    pub(super) const ALL: [Self; 12] = [
        Self::Main,
        Self::Vcpu,
        Self::Relay,
        Self::Api,
        Self::Serial,
        Self::Events,
        Self::VirtioRng,
        Self::VirtioBlk,
        Self::VirtioConsole,
        Self::VirtioNet,
        Self::VirtioVhostNet,
        Self::VirtioVsock,
    ];
}
