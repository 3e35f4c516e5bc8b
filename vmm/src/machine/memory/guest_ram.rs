//! Guest RAM: zones of memory of several kinds, shown to the guest on both sides of the 32-bit hole.
//!
//! It outlives a boot. When the guest starts over its RAM is made good again in place ([`GuestRam::heal`]), so
//! that addresses and file descriptors stay what they were.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
#[cfg(not(mce_relay_unguarded))]
use mce_relay::guard::GuardedRegion;
use mce_relay::internals::access as read;
use mce_relay::internals::scan::Scanner;
use mce_relay::{AccessError, RamMap, RamRegion};
use procfs::Current;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::config::MemoryZone;
use crate::host::page_frames::PageFlags;
use crate::machine::memory::DeviceMemory;
use crate::machine::memory::backing::{self, Backing};
use crate::machine::memory::block::{
    self, HOLE_END, HOLE_START, MIN_RAM, Piece, RamBlock, region, split,
};
use crate::machine::memory::error::MemoryError;
use crate::machine::memory::guest_memfd;

/// All RAM of one guest.
#[derive(Debug)]
pub struct GuestRam {
    /// Host addresses of the guest's own mapping.
    pub(super) memory: GuestMemoryMmap,
    pub(super) devices: DeviceMemory,
    pub(super) blocks: Vec<RamBlock>,
    pub(super) map: RamMap,
    /// What each block is made of, in the same order.
    pub(super) backings: Vec<Backing>,
    /// Stretches of it (address and length) that are no longer the guest's, ascending.
    pub(super) removed: Mutex<Vec<(u64, u64)>>,
    /// Host addresses where ordinary memory has taken the place of a huge page.
    pub(super) stand_ins: Mutex<BTreeSet<u64>>,
    /// What the host says of its page frames; `None` for those who may not see it.
    pub(super) flags: Option<PageFlags>,
    /// /proc/self/pagemap. Opened here, since the threads that look into it may open nothing; who does not
    /// look need not have it.
    pub(super) pagemap: io::Result<File>,
    /// There was a VM that had all of it.
    has_begun: AtomicBool,
}

impl GuestRam {
    /// Maps RAM in these zones, the first from guest-physical address 0 on.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn new(zones: &[MemoryZone]) -> Result<Self, MemoryError> {
        let host = procfs::Meminfo::current().map_err(MemoryError::HostSize)?.mem_total;
        let opened: Vec<_> = zones.iter().map(backing::open).collect::<Result<_, _>>()?;
        backing::check_distinct(zones, &opened)?;
        let sizes: Vec<(u64, u64)> =
            zones.iter().zip(&opened).map(|(zone, opened)| (zone.size, opened.page_size)).collect();
        check_size(&sizes, host)?;
        opened.iter().zip(zones).try_for_each(|(opened, zone)| opened.size(zone))?;

        let (mut regions, mut guarded) = (Vec::new(), Vec::new());
        let mut blocks = Vec::new();
        let mut backings = Vec::new();
        for Piece { zone, offset, gpa, len } in split(&sizes) {
            let (zone, opened) = (&zones[zone], &opened[zone]);
            let backing = Backing::map(opened, zone, offset, len)?;
            let block = RamBlock {
                gpa,
                len,
                hva: backing.hva(),
                fd_offset: offset,
                fd: backing.fd(),
                shared: backing.is_shared(),
                page_size: opened.page_size,
            };
            let region = || {
                let region = GuestRegionMmap::new(backing.region()?, GuestAddress(gpa));
                region.ok_or(MemoryError::Layout { gpa })
            };
            regions.push(region()?);
            #[cfg(not(mce_relay_unguarded))]
            let map_error =
                |source| MemoryError::Map { bytes: len, page: opened.page_size, source };
            #[cfg(not(mce_relay_unguarded))]
            guarded.push(
                match zone.viewed && !zone.guest_memfd {
                    true => GuardedRegion::over(region()?),
                    false => GuardedRegion::without_view(region()?),
                }
                .map_err(map_error)?,
            );
            #[cfg(mce_relay_unguarded)]
            guarded.push(region()?);
            blocks.push(block);
            backings.push(backing);
        }
        let layout = |_| MemoryError::Layout { gpa: HOLE_END };
        let memory = GuestMemoryMmap::from_regions(regions).map_err(layout)?;
        let devices = DeviceMemory::from_regions(guarded).map_err(layout)?;
        let map = RamMap::new(&blocks.iter().map(region).collect::<Vec<_>>())?;
        let (removed, pagemap) = (Mutex::default(), File::open(block::PAGEMAP));
        let flags = PageFlags::open().ok();
        let stand_ins = Mutex::default();
        let has_begun = AtomicBool::new(false);
        let ram = Self {
            memory,
            devices,
            blocks,
            map,
            backings,
            removed,
            stand_ins,
            flags,
            pagemap,
            has_begun,
        };
        ram.prefault()?;
        Ok(ram)
    }

    pub(crate) fn prefault(&self) -> Result<(), MemoryError> {
        let removed = self.removed();
        for (block, backing) in self.blocks.iter().zip(&self.backings) {
            // Between what is no longer there, which is ascending.
            let (mut at, end) = (block.gpa, block.gpa + block.len);
            let gaps = removed.iter().copied().filter(|(gpa, _)| block.contains_gpa(*gpa));
            for (gpa, len) in gaps.chain([(end, 0)]) {
                if gpa > at {
                    let error = |source| MemoryError::Prefault { gpa: at, bytes: gpa - at, source };
                    backing.prefault(at - block.gpa, gpa - at).map_err(error)?;
                }
                at = gpa + len;
            }
        }
        Ok(())
    }

    /// The memory as vm-memory sees it. For whole files that the kernel copies there by itself
    /// (read(2) answers EFAULT where a page is bad); everything else is written by [`Self::write`].
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The memory as devices use it.
    #[must_use]
    pub fn devices(&self) -> &DeviceMemory {
        &self.devices
    }

    /// The pieces, by guest-physical address.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// The pieces as the relay takes them, in the pages that they are in now.
    #[must_use]
    pub fn regions(&self) -> Vec<RamRegion> {
        self.pieces().iter().map(region).collect()
    }

    /// The end of the RAM that begins at address 0, as a guest-physical address.
    #[must_use]
    pub fn low_end(&self) -> u64 {
        let mut end = 0;
        for block in &self.blocks {
            if block.gpa == end {
                end = block.gpa + block.len;
            }
        }
        end.min(HOLE_START)
    }

    /// Writes all of `bytes` to guest-physical `gpa`, without dying of a bad page.
    ///
    /// # Errors
    /// A page is bad, or is not there.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), AccessError> {
        let mut done = 0;
        while done < bytes.len() {
            done += read::write_ram(&self.map, gpa + done as u64, &bytes[done..])?;
        }
        Ok(())
    }

    /// The stretches (address and length in bytes) of the RAM that are not the guest's any more, ascending.
    #[must_use]
    pub fn removed(&self) -> Vec<(u64, u64)> {
        self.lock_removed().clone()
    }

    pub(crate) fn lock_removed(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        // Only whole elements are added.
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Guest-physical addresses of pages that the host says are bad, those it can say it of.
    #[must_use]
    pub fn find_poison(&self) -> Vec<u64> {
        let found = Scanner::new().and_then(|mut s| s.scan(self.map.hvas(), |_| false));
        match found {
            Ok(hvas) => hvas.into_iter().flat_map(|hva| self.map.gpas(hva)).collect(),
            Err(error) => {
                log::debug!("cannot look for bad pages: {error}");
                Vec::new()
            }
        }
    }

    /// Gives the VM its memory slots, one per piece.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (slot, (block, backing)) in (0..).zip(self.blocks.iter().zip(&self.backings)) {
            if backing.is_guest_memfd() {
                let file = guest_memfd::create(vm, block.len)?;
                let (bytes, page) = (block.len, block.page_size);
                let error = |source| MemoryError::Map { bytes, page, source };
                backing.become_guest_memfd(&file).map_err(error)?;
                guest_memfd::register(vm, slot, block, &file)?;
                let gpa = block.gpa;
                let error = |source| MemoryError::Prefault { gpa, bytes, source };
                match backing.map_all().map_err(error) {
                    // As other memory, which the guest of a later boot gets as it uses it.
                    Err(error) if self.has_begun.load(Ordering::Relaxed) => {
                        log::warn!(
                            "{error}; the guest gets it as it uses it, and the host says nothing of errors in \
                             what this process has not mapped"
                        );
                    }
                    done => done?,
                }
                continue;
            }
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: block.gpa,
                memory_size: block.len,
                userspace_addr: block.hva,
            };
            // SAFETY: the block is a live mapping of that length, which this struct owns; whoever
            // owns the VM drops the vCPUs before it (see `vm::Vm`), and slots do not overlap.
            unsafe { vm.set_user_memory_region(region) }.map_err(|source| MemoryError::Slot {
                gpa: block.gpa,
                bytes: block.len,
                source,
            })?;
        }
        self.has_begun.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// Checks the size of guest RAM, and of each zone (size and page size), against the host's memory, all
/// in bytes.
///
/// # Errors
/// See [`MemoryError`]: too small, not whole pages, larger than the host.
pub fn check_size(zones: &[(u64, u64)], host: u64) -> Result<(), MemoryError> {
    if let Some(&(bytes, page)) =
        zones.iter().find(|(bytes, page)| *bytes == 0 || !bytes.is_multiple_of(*page))
        && bytes != 0
    {
        return Err(MemoryError::Unaligned { bytes, page });
    }
    let bytes = zones.iter().try_fold(0_u64, |sum, (bytes, _)| sum.checked_add(*bytes));
    let bytes = bytes.unwrap_or(u64::MAX);
    if bytes < MIN_RAM || zones.iter().any(|(bytes, _)| *bytes == 0) {
        return Err(MemoryError::TooSmall { bytes });
    }
    if bytes > host {
        return Err(MemoryError::LargerThanHost { bytes, host });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::machine::memory::block::{MIN_RAM, PAGE_SIZE};

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    fn pieces(zones: &[(u64, u64)]) -> Vec<(usize, u64, u64, u64)> {
        split(zones).into_iter().map(|p| (p.zone, p.offset, p.gpa, p.len)).collect()
    }

    #[test]
    fn ram_is_split_around_the_hole() {
        let one = |bytes| pieces(&[(bytes, PAGE_SIZE)]);
        assert_eq!(one(512 << 20), [(0, 0, 0, 512 << 20)]);
        assert_eq!(one(3 * GIB), [(0, 0, 0, 3 * GIB)]);
        let more = [(0, 0, 0, 3 * GIB), (0, 3 * GIB, 4 * GIB, PAGE_SIZE)];
        assert_eq!(one(3 * GIB + PAGE_SIZE), more);
        assert_eq!(one(8 * GIB), [(0, 0, 0, 3 * GIB), (0, 3 * GIB, 4 * GIB, 5 * GIB)]);
    }

    #[test]
    fn zones_follow_each_other_and_keep_their_pages_whole() {
        let zones = [(256 * MIB, PAGE_SIZE), (4 * GIB, GIB), (2 * MIB, 2 * MIB)];
        let expected = [
            (0, 0, 0, 256 * MIB),
            (1, 0, 256 * MIB, 2 * GIB),
            (1, 2 * GIB, 4 * GIB, 2 * GIB),
            (2, 0, 6 * GIB, 2 * MIB),
        ];
        assert_eq!(pieces(&zones), expected);
        let full = [(3 * GIB, PAGE_SIZE), (2 * MIB, 2 * MIB)];
        assert_eq!(pieces(&full), [(0, 0, 0, 3 * GIB), (1, 0, 4 * GIB, 2 * MIB)]);
    }

    #[test]
    fn sizes_are_checked_and_named() {
        let check = |bytes| check_size(&[(bytes, PAGE_SIZE)], GIB).map_err(|e| e.to_string());
        assert!(check(0).unwrap_err().contains("0 bytes"));
        assert!(check(MIN_RAM - PAGE_SIZE).unwrap_err().contains("too few"));
        assert!(check(MIN_RAM + 1).unwrap_err().contains("33554433"));
        let error = check(2 * GIB).unwrap_err();
        assert!(error.contains("2048 MiB") && error.contains("1024 MiB"), "{error}");
        assert_eq!(check(MIN_RAM), Ok(()));
        assert_eq!(check(GIB), Ok(()));
        assert!(check_size(&[(33 << 20, 2 << 20)], GIB).is_err());
        let huge = check_size(&[(!4095, PAGE_SIZE), (GIB, PAGE_SIZE)], GIB);
        assert!(matches!(huge, Err(MemoryError::LargerThanHost { .. })), "{huge:?}");
        assert!(check_size(&[(16 << 20, PAGE_SIZE), (16 << 20, 2 << 20)], GIB).is_ok());
        assert!(check_size(&[(64 << 20, PAGE_SIZE), (0, PAGE_SIZE)], GIB).is_err());
    }

    #[test]
    fn all_names_of_a_byte_agree() {
        // 3 GiB and a bit are only reserved, not touched: this is cheap.
        let bytes = HOLE_START + (2 << 20);
        for shared in [false, true] {
            let zone = MemoryZone { shared, ..MemoryZone::new(bytes) };
            let ram = match GuestRam::new(&[zone]) {
                Err(MemoryError::LargerThanHost { .. }) => {
                    println!("skipped: this host has less than {bytes} bytes");
                    return;
                }
                other => other.unwrap(),
            };
            assert_eq!(ram.blocks().len(), 2);
            let high = ram.blocks()[1];
            assert_eq!((high.gpa, high.fd_offset), (HOLE_END, HOLE_START));
            assert_eq!(high.fd.is_some(), shared);
            ram.write(HOLE_END + 64, b"here").unwrap();
            let mut back = [0; 4];
            ram.memory().read_slice(&mut back, GuestAddress(HOLE_END + 64)).unwrap();
            assert_eq!(&back, b"here");
            // SAFETY: the address is 64 bytes into a live mapping of 2 MiB.
            let seen = unsafe { std::ptr::read_volatile((high.hva + 64) as *const [u8; 4]) };
            assert_eq!(&seen, b"here");
            assert!(high.contains_gpa(HOLE_END) && !high.contains_gpa(HOLE_END + high.len));
            assert_eq!(ram.low_end(), HOLE_START);
            let missing = ram.write(HOLE_START, b"here").unwrap_err();
            assert!(matches!(missing, AccessError::NotRam { gpa: HOLE_START }), "{missing}");
        }
    }

    #[test]
    fn zones_of_several_kinds_make_one_ram() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        std::fs::write(&path, vec![7_u8; 16 << 20]).unwrap();
        let zones = [
            MemoryZone { thp: false, ..MemoryZone::new(16 << 20) },
            MemoryZone { shared: true, prefault: true, ..MemoryZone::new(16 << 20) },
            MemoryZone {
                file: Some(path.clone()),
                shared: true,
                lossy: true,
                ..MemoryZone::new(8 << 20)
            },
            MemoryZone { file: Some(path.clone()), ..MemoryZone::new(8 << 20) },
        ];
        let ram = GuestRam::new(&zones).unwrap();
        assert_eq!(ram.low_end(), 48 << 20);
        // Across the border of two zones.
        ram.write((16 << 20) - 2, b"abcd").unwrap();
        let mut back = [0; 4];
        ram.memory().read_slice(&mut back, GuestAddress((16 << 20) - 2)).unwrap();
        assert_eq!(&back, b"abcd");
        // The shared file is written, the private one is not.
        ram.write(32 << 20, b"!").unwrap();
        ram.write((40 << 20) + 1, b"!").unwrap();
        let file = std::fs::read(&path).unwrap();
        assert_eq!(file[..2], [b'!', 7]);
    }

    #[test]
    fn zones_that_are_the_same_memory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        File::create(at("ram")).unwrap().set_len(32 << 20).unwrap();
        std::fs::hard_link(at("ram"), at("again")).unwrap();
        std::os::unix::fs::symlink(at("ram"), at("link")).unwrap();
        let zone = |name: &str, shared| MemoryZone {
            file: Some(at(name)),
            shared,
            lossy: true,
            ..MemoryZone::new(16 << 20)
        };
        for name in ["ram", "again", "link"] {
            let zones = [MemoryZone::new(16 << 20), zone("ram", true), zone(name, true)];
            let error = GuestRam::new(&zones).unwrap_err().to_string();
            let (first, second) = (at("ram"), at(name));
            let named = format!("zones 2 ({}) and 3 ({})", first.display(), second.display());
            assert!(error.contains(&named) && error.contains("a file of its own"), "{error}");
        }
        // A private zone is a copy, and two memfds are two files.
        GuestRam::new(&[zone("ram", true), zone("ram", false), zone("ram", false)]).unwrap();
        let memfd = MemoryZone { shared: true, ..MemoryZone::new(16 << 20) };
        GuestRam::new(&[memfd.clone(), memfd]).unwrap();
    }

    #[test]
    fn files_that_will_not_do_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("short"), [0]).unwrap();
        for (name, named) in [("none", "none"), ("short", "truncate -s 33554432"), ("", "regular")]
        {
            let zone = MemoryZone { file: Some(at(name)), ..MemoryZone::new(MIN_RAM) };
            let error = GuestRam::new(&[zone]).unwrap_err().to_string();
            assert!(error.contains(named), "{name:?}: {error}");
        }
    }
}
