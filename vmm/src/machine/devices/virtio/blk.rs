//! virtio-blk (virtio 1.2, 5.2): a disk of the guest's in a file of the host's.
//!
//! What the guest writes is copied out of its memory first, all of it, and written only when that memory was good to the
//! last byte: of a request with a bad page nothing reaches the disk. What it reads the kernel copies into its memory, to
//! the addresses that the guest's own mapping has, and answers EFAULT where a page is bad.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::disk::{Disk, DiskError};
use self::reader::Reader;
use self::request::{MAX_DISCARD_SECTORS, SEGMENT_MAX, Work};
use super::config_space::ConfigSpace;
use super::device::{Active, Device, DeviceError, Served, Server, Turn};
use super::queue::Request;
use crate::config::DeviceConfig;
use crate::machine::memory::DeviceMemory;
use crate::sandbox::role::Role;
use crate::sandbox::seccomp::Filters;

pub mod buffer;
pub mod disk;
mod lock;
mod places;
pub mod qcow2;
mod reader;
mod request;

/// The size of the one queue.
const QUEUE_SIZE: u16 = 256;
/// The most segments of a request: what the queue takes beside the header and the status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// After this long a turn ends with the requests that are being worked on: a reset, a pause and an end wait for no more.
const TURN: Duration = Duration::from_millis(10);

/// A disk that outlives the boots of a guest.
pub type SharedDisk = Arc<Mutex<Disk>>;

/// Opens the disks among `devices`.
///
/// # Errors
/// See [`DiskError`].
pub fn open_disks(devices: &[DeviceConfig]) -> Result<Vec<SharedDisk>, DiskError> {
    let disks = devices.iter().filter_map(|device| match device {
        DeviceConfig::Disk(disk) => Some(disk),
        _ => None,
    });
    disks.map(|disk| Ok(Arc::new(Mutex::new(Disk::open(disk)?)))).collect()
}

/// The device.
#[derive(Debug)]
pub struct Blk {
    disk: SharedDisk,
    features: u64,
    config: Arc<ConfigSpace>,
    work: Work,
}

impl Blk {
    /// The device of `disk`.
    #[must_use]
    pub fn new(disk: &SharedDisk) -> Self {
        let held = lock(disk);
        let mut bits = vec![
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
        ];
        match held.is_read_only() {
            true => bits.push(VIRTIO_BLK_F_RO),
            false => bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]),
        }
        let features = bits.into_iter().map(|bit| 1 << bit).sum();
        let config = Arc::new(ConfigSpace::new(config(&held), 0..0));
        drop(held);
        Self { disk: Arc::clone(disk), features, config, work: Work::default() }
    }

    /// Long reads are done by two threads, if the disk is one for which that serves.
    ///
    /// # Errors
    /// There are no more threads.
    pub fn with_a_second_thread(mut self, filters: &Filters) -> io::Result<Self> {
        if lock(&self.disk).copied_from().is_some() {
            self.work.set_reader(Reader::of_two(filters)?);
        }
        Ok(self)
    }
}

fn lock(disk: &SharedDisk) -> MutexGuard<'_, Disk> {
    // A panic within a request leaves a disk that has or has not what the request wanted; it has failed.
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4) up to the limits of write zeroes.
fn config(disk: &Disk) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(disk.sectors().to_le_bytes());
    bytes.extend(SEGMENT_MAX.to_le_bytes());
    bytes.extend(SEGMENTS_MAX.to_le_bytes());
    // Geometry, which nobody needs.
    bytes.extend([0; 4]);
    bytes.extend(disk.block_size().to_le_bytes());
    // Topology (8 bytes), writeback, and a byte that is not used.
    bytes.extend([0; 10]);
    // One queue.
    bytes.extend(1_u16.to_le_bytes());
    // Discard: the most sectors, the most segments, their alignment in sectors.
    let alignment = disk.block_size() / 512;
    bytes.extend([MAX_DISCARD_SECTORS, 1, alignment].iter().flat_map(|value| value.to_le_bytes()));
    // Write zeroes: the most sectors, the most segments, and that it may unmap.
    bytes.extend([MAX_DISCARD_SECTORS, 1].iter().flat_map(|value| value.to_le_bytes()));
    bytes.extend([1, 0, 0, 0]);
    bytes
}

impl Device for Blk {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &'static str {
        "blk"
    }

    fn role(&self) -> Role {
        Role::VirtioBlk
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn kicked(&mut self, index: usize, active: &mut Active) -> Result<Turn, DeviceError> {
        // A driver that has not taken it expects each write to be on the disk when it is done.
        let writes_through = !active.has_feature(VIRTIO_BLK_F_FLUSH);
        let mut disk = lock(&self.disk);
        let _rest = self.work.begin_turn();
        let mut requests = Requests {
            disk: &mut disk,
            work: &mut self.work,
            writes_through,
            begun: Instant::now(),
            is_over: false,
            is_cut: false,
        };
        let turn = active.serve_by(index, &mut requests)?;
        Ok(if requests.is_cut { Turn::Again } else { turn })
    }

    fn stop(&mut self) {
        self.work.reset();
        // A guest that ends without a flush has written all the same.
        if let Err(error) = lock(&self.disk).settle() {
            log::warn!("virtio-blk: what was written last may be missing on the disk: {error}");
        }
    }
}

/// The requests of a turn.
struct Requests<'a> {
    disk: &'a mut Disk,
    work: &'a mut Work,
    writes_through: bool,
    begun: Instant,
    /// No more is begun.
    is_over: bool,
    /// There was more.
    is_cut: bool,
}

impl Server for Requests<'_> {
    fn begin(&mut self, memory: &DeviceMemory, request: &Request) -> Result<Served, DeviceError> {
        if self.is_over {
            self.is_cut = true;
            return Ok(Served::Later);
        }
        let served = self.work.begin(self.disk, memory, request, self.writes_through);
        self.look_at_the_clock();
        Ok(served)
    }

    fn is_full(&self) -> bool {
        self.work.is_full()
    }

    fn finish(&mut self, memory: &DeviceMemory) -> Option<(Request, u32)> {
        let finished = self.work.finish(self.disk, memory);
        self.look_at_the_clock();
        finished
    }
}

impl Requests<'_> {
    fn look_at_the_clock(&mut self) {
        self.is_over |= self.begun.elapsed() >= TURN;
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
