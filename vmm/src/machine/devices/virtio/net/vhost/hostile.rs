//! A guest in several zones (`--memory-zone`), which are several mappings at neighbouring guest-physical addresses.

use std::fs::File;
use std::os::fd::RawFd;

use ::vhost::vhost_kern::VhostKernBackend;
use vm_memory::GuestAddress;

use super::*;
use crate::machine::devices::virtio::testing::memory;

/// What stands for /dev/vhost-net: every ioctl(2) that gets there fails.
struct NoKernel(File, Arc<DeviceMemory>);

impl AsRawFd for NoKernel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl VhostKernBackend for NoKernel {
    type AS = Arc<DeviceMemory>;

    fn mem(&self) -> &Self::AS {
        &self.1
    }
}

/// The kernel is told one host address for each ring, and goes on from there: where a ring begins in one zone and ends in
/// the next, it reads descriptors from, and writes used entries to, whatever this process has mapped behind the first.
#[test]
fn no_ring_leads_the_kernel_out_of_a_zone() {
    const ZONE: u64 = 0x10_0000;
    let memory = memory(&[(0, ZONE), (ZONE, ZONE)]);
    let backend = NoKernel(File::open("/dev/null").unwrap(), Arc::new(memory.clone()));
    let mut let_through = Vec::new();
    for (what, [descriptors, avail, used]) in [
        ("descriptor table", [ZONE - 2048, 0x2000, 0x3000]),
        ("available ring", [0x1000, ZONE - 256, 0x3000]),
        ("used ring", [0x1000, 0x2000, ZONE - 1024]),
    ] {
        let mut queue = Queue::new(256).unwrap();
        queue.try_set_desc_table_address(GuestAddress(descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&memory), "as the transport takes it");
        // What `set_up` does with a queue before the kernel serves it.
        let set_up =
            addresses(&memory, &queue).and_then(|addresses| backend.set_vring_addr(0, &addresses));
        match set_up {
            Err(::vhost::Error::IoctlError(_)) => let_through.push(what),
            Err(_) => {}
            Ok(()) => unreachable!("/dev/null has no such request"),
        }
    }
    assert!(let_through.is_empty(), "the kernel is given a ring over two zones: {let_through:?}");
}

#[test]
fn more_zones_than_the_kernel_takes_are_refused_at_the_start() {
    assert!(most_pieces() > 0);
    check_pieces(64, 64).unwrap();
    let error = check_pieces(65, 64).unwrap_err().to_string();
    for part in ["64 pieces at most", "has 65", "max_mem_regions", "vhost=off"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}
