//! The device in the host's kernel (`vhost=on`): vhost-net moves the frames, and this process sets it up and stops it.
//!
//! The kernel reads and writes guest memory by the guest's own mapping, and an access to a bad page fails there. A frame of
//! the guest's in it is dropped. Of a frame for the guest the kernel does not look whether it could be written (tun_put_user):
//! the guest has a buffer that is said to be full, and meets the bad page itself. A ring in it, or the header before a
//! frame for the guest, is an error of the queue, which the kernel tells by an eventfd; the device asks for a reset then.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ::vhost::net::VhostNet as _;
use ::vhost::vhost_kern::net::Net as Backend;
use ::vhost::vhost_kern::vhost_binding::VHOST_NET_F_VIRTIO_NET_HDR;
use ::vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::Offer;
use super::layout::QUEUE_SIZES;
use super::tap::Tap;
use crate::config::NetConfig;
use crate::machine::devices::virtio::config_space::ConfigSpace;
use crate::machine::devices::virtio::device::{Active, Device, DeviceError, Turn, Wait};
use crate::machine::devices::virtio::queue::ActiveQueue;
use crate::machine::memory::DeviceMemory;
use crate::sandbox::role::Role;

/// What a driver may use of the kernel's features. Several buffers for one frame are the kernel's to fill.
const FEATURES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// The same, of the rings.
const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Why there is no device in the host's kernel.
#[derive(Debug, Error)]
pub enum VhostError {
    /// It has none.
    #[error(
        "cannot open /dev/vhost-net (`modprobe vhost_net`, and see who may use it); vhost=off does without it"
    )]
    Open(#[source] ::vhost::Error),
    /// It does not do what is asked of it.
    #[error("vhost-net: cannot {what}; vhost=off does without it")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: ::vhost::Error,
    },
    /// It is another one than expected.
    #[error(
        "vhost-net has features {found:#x}, which {wanted:#x} is not among; vhost=off does without it"
    )]
    Features {
        /// What it has, as bits.
        found: u64,
        /// What it lacks.
        wanted: u64,
    },
    /// Guest memory is in more pieces than it takes.
    #[error(
        "vhost-net takes guest memory in {most} pieces at most (parameter max_mem_regions of the kernel's module vhost), \
         and this guest's has {asked}: each --memory-zone is one, and one at 3 GiB is two; vhost=off does without it"
    )]
    Pieces {
        /// How many there are.
        asked: usize,
        /// How many it takes.
        most: usize,
    },
    /// The tap does not do what is asked of it.
    #[error("cannot set the send buffer of {tap} (TUNSETSNDBUF)")]
    Tap {
        /// Its name.
        tap: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// There are no more descriptors.
    #[error("out of file descriptors")]
    Eventfd(#[source] io::Error),
}

/// A queue that the kernel serves, or served when the VM was paused.
#[derive(Debug)]
struct Running {
    index: usize,
    queue: ActiveQueue,
    /// The index of the next request, while the kernel does not know it.
    next: Option<u16>,
}

/// What was tried, and the cause.
type Failure = (&'static str, ::vhost::Error);

/// The device.
pub struct VhostNet {
    backend: Backend<Arc<DeviceMemory>>,
    tap: Tap,
    offer: Offer,
    /// What the kernel's side can do.
    features: u64,
    /// The kernel has used buffers.
    used: EventFd,
    /// The kernel cannot go on with a queue.
    failed: EventFd,
    /// The queues that the kernel serves.
    running: Vec<Running>,
}

impl VhostNet {
    /// One on `tap`, for a guest with this memory.
    ///
    /// # Errors
    /// See [`VhostError`].
    pub fn open(tap: Tap, config: &NetConfig, memory: &DeviceMemory) -> Result<Self, VhostError> {
        let refused = |what| move |source| VhostError::Refused { what, source };
        let name = || tap.to_string();
        tap.one_at_a_time().map_err(|source| VhostError::Tap { tap: name(), source })?;
        let backend = Backend::new(Arc::new(memory.clone())).map_err(VhostError::Open)?;
        check_pieces(memory.num_regions(), most_pieces())?;
        backend.set_owner().map_err(refused("begin to use it"))?;
        let found = backend.get_features().map_err(refused("ask for its features"))?;
        let header = if tap.has_header() { 0 } else { 1 << VHOST_NET_F_VIRTIO_NET_HDR };
        let wanted = (1 << VIRTIO_F_VERSION_1 | header) & !found;
        if wanted != 0 {
            return Err(VhostError::Features { found, wanted });
        }
        let eventfd = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(VhostError::Eventfd);
        Ok(Self {
            backend,
            offer: Offer::new(&tap, config),
            tap,
            features: found,
            used: eventfd()?,
            failed: eventfd()?,
            running: Vec::new(),
        })
    }

    fn set_up(&mut self, active: &mut Active) -> Result<(), Failure> {
        let backend = &self.backend;
        // What of the last driver's is left.
        let _ = (self.used.read(), self.failed.read());
        let by_tap = if self.tap.has_header() { 0 } else { 1 << VHOST_NET_F_VIRTIO_NET_HDR };
        let of_driver = FEATURES | RING_FEATURES | 1 << VIRTIO_F_VERSION_1;
        let features = active.features & of_driver | by_tap;
        backend.set_features(features).map_err(at("set its features"))?;
        let regions = memory_table(&active.memory).map_err(at("say where guest memory is"))?;
        backend.set_mem_table(&regions).map_err(at("say where guest memory is"))?;
        for (index, queue) in active.queues.iter_mut().enumerate() {
            // The kernel takes its kicks.
            let Some(queue) = queue.take() else { continue };
            let addresses =
                addresses(&active.memory, queue.queue()).map_err(at("set up a queue"))?;
            backend
                .set_vring_num(index, queue.entries())
                .and_then(|()| backend.set_vring_addr(index, &addresses))
                .and_then(|()| backend.set_vring_call(index, &self.used))
                .and_then(|()| backend.set_vring_err(index, &self.failed))
                .and_then(|()| backend.set_vring_kick(index, queue.kick()))
                .map_err(at("set up a queue"))?;
            let next = Some(queue.queue().next_avail());
            self.running.push(Running { index, queue, next });
        }
        self.start()
    }

    /// Has the kernel serve the queues, each from where it is.
    fn start(&mut self) -> Result<(), Failure> {
        for Running { index, queue, next } in &mut self.running {
            if let Some(next) = next.take() {
                self.backend.set_vring_base(*index, next).map_err(at("set up a queue"))?;
            }
            let tap = Some(self.tap.file());
            self.backend.set_backend(*index, tap).map_err(at("serve a queue"))?;
            // For what was added before it looked. It fails only when the counter is full, and then it has looked.
            let _ = queue.kick().write(1);
        }
        Ok(())
    }

    /// Has the kernel serve no queue any more. When this returns it does not touch guest memory.
    fn halt(&mut self) -> Result<(), Failure> {
        let mut halted = Ok(());
        for Running { index, next, .. } in &mut self.running {
            let stopped = self.backend.set_backend(*index, None).map_err(at("stop a queue"));
            let base = stopped
                .and_then(|()| self.backend.get_vring_base(*index).map_err(at("ask where it is")));
            // One that cannot be stopped keeps none of the others going.
            match base {
                Ok(base) => *next = u16::try_from(base).ok(),
                Err(failure) => halted = Err(failure),
            }
        }
        halted
    }
}

/// In how many pieces the kernel takes guest memory; asked once it has loaded the module.
fn most_pieces() -> usize {
    /// drivers/vhost/vhost.c, where the module is part of a kernel that does not say it.
    const DEFAULT: usize = 64;
    let told = std::fs::read_to_string("/sys/module/vhost/parameters/max_mem_regions");
    told.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(DEFAULT)
}

/// Said here, as it would otherwise be the guest's driver that fails when it starts the device.
fn check_pieces(asked: usize, most: usize) -> Result<(), VhostError> {
    if asked > most { Err(VhostError::Pieces { asked, most }) } else { Ok(()) }
}

/// Where guest memory is, by the guest's own mapping.
fn memory_table(memory: &DeviceMemory) -> ::vhost::Result<Vec<VhostUserMemoryRegionInfo>> {
    let one = |region: &<DeviceMemory as GuestMemoryBackend>::R| {
        let hva = region.get_host_address(MemoryRegionAddress(0));
        let hva = hva.map_err(|_| ::vhost::Error::InvalidGuestMemoryRegion)?;
        Ok(VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: hva.expose_provenance() as u64,
            // There is no file to hand over.
            mmap_offset: 0,
            mmap_handle: -1,
        })
    };
    memory.iter().map(one).collect()
}

/// Where its rings are. The kernel is told one host address for each, and goes on from there: each has to be in one mapping.
fn addresses(memory: &DeviceMemory, queue: &Queue) -> ::vhost::Result<VringConfigData> {
    // virtio 1.2, 2.7: with the field for event indices.
    let size = u64::from(queue.size());
    let rings = [
        (queue.desc_table(), 16 * size),
        (queue.avail_ring(), 6 + 2 * size),
        (queue.used_ring(), 6 + 8 * size),
    ];
    for (start, len) in rings {
        let within = memory
            .find_region(GuestAddress(start))
            .is_some_and(|region| len <= region.len() - (start - region.start_addr().0));
        if !within {
            return Err(::vhost::Error::DescriptorTableAddress);
        }
    }
    Ok(VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: queue.desc_table(),
        used_ring_addr: queue.used_ring(),
        avail_ring_addr: queue.avail_ring(),
        log_addr: None,
    })
}

fn at(what: &'static str) -> impl FnOnce(::vhost::Error) -> Failure {
    move |source| (what, source)
}

fn device_error((what, source): Failure) -> DeviceError {
    DeviceError::Host { what, source: io::Error::other(source) }
}

impl Device for VhostNet {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn role(&self) -> Role {
        Role::VirtioVhostNet
    }

    fn features(&self) -> u64 {
        self.offer.features() | self.features & FEATURES
    }

    fn ring_features(&self) -> u64 {
        self.features & RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.offer.space()
    }

    fn activate(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        self.set_up(active).map_err(device_error)
    }

    fn kicked(&mut self, _: usize, _: &mut Active) -> Result<Turn, DeviceError> {
        Ok(Turn::Done)
    }

    fn waits_for(&self, waits: &mut Vec<Wait>) {
        let wait = |of: &EventFd| Wait { fd: of.as_raw_fd(), events: libc::POLLIN };
        waits.extend([wait(&self.used), wait(&self.failed)]);
    }

    fn ready(&mut self, wait: Wait, active: &mut Active) -> Result<Turn, DeviceError> {
        if wait.fd == self.failed.as_raw_fd() && self.failed.read().is_ok() {
            let source = io::Error::other("vhost-net found a ring that it cannot use");
            return Err(DeviceError::Host { what: "go on in the host's kernel", source });
        }
        if self.used.read().is_ok() {
            active.interrupt.used();
        }
        Ok(Turn::Done)
    }

    fn pause(&mut self, _: &mut Active) -> Result<(), DeviceError> {
        self.halt().map_err(device_error)
    }

    fn resume(&mut self, _: &mut Active) -> Result<(), DeviceError> {
        self.start().map_err(device_error)
    }

    fn stop(&mut self) {
        if let Err((what, source)) = self.halt() {
            log::error!("virtio-net: vhost-net: cannot {what}: {source}");
        }
        self.running.clear();
    }
}

impl fmt::Debug for VhostNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostNet").field("tap", &self.tap).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod hostile;
