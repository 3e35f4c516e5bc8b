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
    /// The virtio console.
    VirtioConsole,
    /// The virtio stream sockets.
    VirtioVsock,
}

impl Role {
    pub(super) const ALL: [Self; 9] = [
        Self::Main,
        Self::Vcpu,
        Self::Relay,
        Self::Api,
        Self::Serial,
        Self::Events,
        Self::VirtioRng,
        Self::VirtioConsole,
        Self::VirtioVsock,
    ];
}
