//! The same with virtio-net, and with frames from the host.
#![no_main]

#[path = "../virtio.rs"]
mod virtio;

use std::os::unix::net::UnixDatagram;

use libfuzzer_sys::fuzz_target;
use mce_relay_vmm::config::{NetConfig, TapSource};
use mce_relay_vmm::machine::devices::virtio::net::{Net, Tap};
use virtio::{Machine, Step};

fuzz_target!(|steps: Vec<Step>| {
    let (tap, host) = UnixDatagram::pair().unwrap();
    for end in [&tap, &host] {
        end.set_nonblocking(true).unwrap();
    }
    let config = NetConfig { tap: TapSource::Fd(-1), mac: [2; 6], mtu: None, vhost: false };
    let net = Net::new(Tap::of_socket(tap.into(), Some(1500)), &config);
    Machine::new(net).run(steps, |_, bytes| {
        let _ = host.send(bytes);
        // What the guest has sent makes room.
        while host.recv(&mut [0; 64]).is_ok() {}
    });
});
