//! The kinds of thread of a running VM.

/// The kinds of thread of a running VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that builds the VM and waits for its end; its filter is every thread's.
    Main,
    /// A vCPU.
    Vcpu,
    /// The relay's.
    Relay,
    /// The API's, and those that work for it.
    Api,
    /// A serial port's.
    Serial,
    /// Those that write events down.
    Events,
}

impl Role {
    pub(super) const ALL: [Self; 6] =
        [Self::Main, Self::Vcpu, Self::Relay, Self::Api, Self::Serial, Self::Events];
}
