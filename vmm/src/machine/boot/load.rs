//! Puts a Linux kernel, its initramfs and its boot information into guest RAM.
//!
//! Two ways in: PVH (32-bit protected mode, [`super::pvh`]) for a vmlinux that has the note, and the
//! 64-bit Linux boot protocol ([`super::zero_page`]) for a bzImage or a vmlinux without it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use crate::machine::boot::error::BootError;
use crate::machine::boot::place::Entry;
use crate::machine::boot::place::{Initramfs, write};
use crate::machine::boot::{layout, pvh, regs, reset_vector, zero_page};
use crate::machine::memory::block::PAGE_SIZE;
use crate::machine::memory::guest_ram::GuestRam;

/// The most that x86 Linux keeps of a command line, without the terminating zero.
pub const MAX_CMDLINE: usize = 2047;
/// Offset of the 64-bit entry in a loaded bzImage (boot protocol, XLF_KERNEL_64).
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// xloadflags: the kernel has the 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// Where the magic of a bzImage is.
const BZIMAGE_MAGIC_AT: usize = 0x202;
/// ELF e_machine of x86-64.
const EM_X86_64: u16 = 62;
/// Memory kept free above the kernel for its own early allocations.
const KERNEL_SLACK: u64 = 4 << 20;

/// A guest that is ready to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// How vCPU 0 enters the kernel.
    pub entry: Entry,
    /// Guest-physical addresses of the kernel: its text and data, and memory that it frees after its start.
    pub kernel: Range<u64>,
}

/// What a kernel file turned out to be.
struct Loaded {
    entry: Entry,
    /// First address of the kernel that runs; of a bzImage, where it unpacks itself to, if it does not move
    /// itself elsewhere (KASLR).
    start: u64,
    /// First address after everything that the kernel needs to start.
    end: u64,
    /// First address that an initramfs may not touch.
    initramfs_limit: u64,
    max_cmdline: usize,
    setup_header: Option<setup_header>,
}

/// Loads everything and returns how to start it.
///
/// `rsdp` is the guest-physical address of the ACPI root pointer.
///
/// # Errors
/// See [`BootError`].
pub fn load(
    ram: &GuestRam,
    kernel: &Path,
    initramfs: Option<&Path>,
    cmdline: &str,
    rsdp: u64,
) -> Result<Boot, BootError> {
    let loaded = load_kernel(ram, kernel)?;
    check_cmdline(cmdline, loaded.max_cmdline)?;
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(ram, &bytes, layout::CMDLINE, "command line")?;

    let initramfs = initramfs.map(|path| load_initramfs(ram, path, &loaded)).transpose()?;
    let map = layout::memory_map(ram.blocks(), &ram.removed());
    match loaded.entry {
        Entry::Pvh { .. } => pvh::write(ram, &map, initramfs, rsdp)?,
        Entry::Linux64 { .. } => {
            zero_page::write(ram, &map, initramfs, loaded.setup_header, cmdline.len(), rsdp)?
        }
    }
    regs::write_tables(ram, loaded.entry)?;
    reset_vector::write(ram)?;
    Ok(Boot { entry: loaded.entry, kernel: loaded.start..loaded.end })
}

/// Checks a command line of at most `max` bytes.
///
/// # Errors
/// Too long, or with control characters.
pub fn check_cmdline(cmdline: &str, max: usize) -> Result<(), BootError> {
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong { bytes: cmdline.len(), max });
    }
    match cmdline.char_indices().find(|(_, c)| c.is_control() && *c != '\t') {
        Some((at, found)) => Err(BootError::CmdlineControl { found, at }),
        None => Ok(()),
    }
}

fn open(path: &Path, what: &'static str) -> Result<(File, u64), BootError> {
    let error = |source| BootError::Read { what, path: path.into(), source };
    // Looked at before it is opened: opening a FIFO would wait for a writer.
    let meta = std::fs::metadata(path).map_err(error)?;
    if !meta.is_file() {
        return Err(BootError::NotAFile { what, path: path.into() });
    }
    Ok((File::open(path).map_err(error)?, meta.len()))
}

fn load_kernel(ram: &GuestRam, path: &Path) -> Result<Loaded, BootError> {
    let (mut file, _) = open(path, "kernel")?;
    let head = read_head(&mut file).map_err(|source| BootError::Read {
        what: "kernel",
        path: path.into(),
        source,
    })?;
    if let Some(gpa) = hole(ram, 0, layout::HIGH_RAM) {
        return Err(BootError::Hole { gpa });
    }
    // If memory was removed, a file that could be loaded before may fail because of the hole.
    let load_error = |error: linux_loader::loader::Error| match hole(ram, 0, ram.low_end()) {
        Some(gpa) => BootError::Hole { gpa },
        // The text of each of the library's errors has the cause after the same heading.
        None => {
            let cause = error.to_string().replace("Kernel Loader: ", "");
            BootError::Load { path: path.into(), ram: ram.low_end(), cause }
        }
    };

    let loaded = match identify(&head) {
        Ok(Image::Vmlinux) => {
            let image = Elf::load(ram.memory(), None, &mut file, None).map_err(load_error)?;
            let entry = match image.pvh_boot_cap {
                PvhBootCapability::PvhEntryPresent(rip) => Entry::Pvh { rip: rip.0 },
                _ => Entry::Linux64 { rip: image.kernel_load.0 },
            };
            let (Entry::Pvh { rip } | Entry::Linux64 { rip }) = entry;
            // The entry of Linux is at its beginning; that of PVH is somewhere behind it.
            let start = rip.min(image.kernel_load.0) / PAGE_SIZE * PAGE_SIZE;
            Loaded {
                entry,
                start,
                end: image.kernel_end,
                initramfs_limit: ram.low_end(),
                max_cmdline: MAX_CMDLINE,
                setup_header: None,
            }
        }
        Ok(Image::BzImage) => {
            let image = BzImage::load(
                ram.memory(),
                Some(GuestAddress(layout::HIGH_RAM)),
                &mut file,
                Some(GuestAddress(layout::HIGH_RAM)),
            )
            .map_err(load_error)?;
            let header = image.setup_header.unwrap_or_default();
            if header.xloadflags & XLF_KERNEL_64 == 0 {
                return Err(BootError::NotAKernel {
                    path: path.into(),
                    found: "a bzImage without a 64-bit entry".into(),
                });
            }
            // It unpacks itself to its preferred address and needs init_size bytes from there.
            let unpacked = header.pref_address.saturating_add(u64::from(header.init_size));
            Loaded {
                entry: Entry::Linux64 { rip: image.kernel_load.0 + BZIMAGE_ENTRY_64 },
                start: header.pref_address,
                end: image.kernel_end.max(unpacked),
                initramfs_limit: ram.low_end().min(u64::from(header.initrd_addr_max) + 1),
                max_cmdline: MAX_CMDLINE
                    .min(usize::try_from(header.cmdline_size).unwrap_or(MAX_CMDLINE)),
                setup_header: Some(header),
            }
        }
        Err(found) => return Err(BootError::NotAKernel { path: path.into(), found }),
    };
    if let Some(gpa) = hole(ram, 0, loaded.end) {
        return Err(BootError::Hole { gpa });
    }
    let end = loaded.end.saturating_add(KERNEL_SLACK);
    if end > ram.low_end() {
        return Err(BootError::KernelTooLarge { path: path.into(), end, ram: ram.low_end() });
    }
    Ok(loaded)
}

fn load_initramfs(ram: &GuestRam, path: &Path, kernel: &Loaded) -> Result<Initramfs, BootError> {
    let (mut file, size) = open(path, "initramfs")?;
    if size == 0 {
        return Err(BootError::EmptyInitramfs { path: path.into() });
    }
    let addr = place_initramfs(size, kernel.end, kernel.initramfs_limit, &ram.removed());
    let addr = addr.ok_or_else(|| BootError::InitramfsTooLarge {
        path: path.into(),
        bytes: size,
        from: kernel.end,
        to: kernel.initramfs_limit,
    })?;
    let write_error = |source| BootError::CopyInitramfs { path: path.into(), gpa: addr, source };
    let count = usize::try_from(size).unwrap_or(usize::MAX);
    ram.memory()
        .read_exact_volatile_from(GuestAddress(addr), &mut file, count)
        .map_err(write_error)?;
    Ok(Initramfs { addr, size })
}

/// The highest place that fits, page-aligned, without the stretches `removed`.
fn place_initramfs(size: u64, from: u64, mut to: u64, removed: &[(u64, u64)]) -> Option<u64> {
    loop {
        let addr = to.checked_sub(size)? / PAGE_SIZE * PAGE_SIZE;
        if addr < from {
            return None;
        }
        match removed.iter().find(|(start, len)| *start < addr + size && start + len > addr) {
            // Below it, then.
            Some((start, _)) => to = *start,
            None => return Some(addr),
        }
    }
}

/// The first address in `from..to` at which the guest has no memory any more.
fn hole(ram: &GuestRam, from: u64, to: u64) -> Option<u64> {
    let inside =
        |(start, len): (u64, u64)| (start < to && start + len > from).then_some(start.max(from));
    ram.removed().into_iter().find_map(inside)
}

#[derive(Debug, PartialEq, Eq)]
enum Image {
    Vmlinux,
    BzImage,
}

fn read_head(file: &mut File) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    file.by_ref().take(1024).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(head)
}

/// Identifies a kernel by its first kilobyte; the error says what else the file looks like.
fn identify(head: &[u8]) -> Result<Image, String> {
    if head.starts_with(b"\x7fELF") {
        let class = head.get(4).copied();
        let machine = head.get(18..20).map(|m| u16::from_le_bytes([m[0], m[1]]));
        return match (class, machine) {
            (Some(2), Some(EM_X86_64)) => Ok(Image::Vmlinux),
            (Some(2), Some(machine)) => Err(format!("a 64-bit ELF file for machine {machine}")),
            (Some(1), _) => Err("a 32-bit ELF file".into()),
            _ => Err("a damaged ELF file".into()),
        };
    }
    if head.get(BZIMAGE_MAGIC_AT..BZIMAGE_MAGIC_AT + 4) == Some(b"HdrS") {
        return Ok(Image::BzImage);
    }
    let known: [(&[u8], &str); 6] = [
        (b"", "an empty file"),
        (b"\x1f\x8b", "a gzip file; unpack it"),
        (b"\xfd7zXZ", "an xz file; unpack it"),
        (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it"),
        (b"070701", "a cpio archive; is it the initramfs?"),
        (b"#!", "a script"),
    ];
    let is =
        |magic: &[u8]| if magic.is_empty() { head.is_empty() } else { head.starts_with(magic) };
    let found = known.iter().find(|(magic, _)| is(magic)).map_or_else(
        || format!("a file that begins with {:02x?}", &head[..head.len().min(8)]),
        |(_, name)| (*name).to_owned(),
    );
    Err(found)
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;
    use crate::config::MemoryZone;
    use crate::machine::boot::place::Entry;
    use crate::machine::boot::{layout, tiny};
    use crate::relaying::uffd::Uffd;

    #[test]
    fn cmdline_limits() {
        assert!(check_cmdline("console=ttyS0\tquiet", 2047).is_ok());
        assert!(check_cmdline(&"a".repeat(2047), 2047).is_ok());
        let long = check_cmdline(&"a".repeat(2048), 2047).unwrap_err().to_string();
        assert!(long.contains("2048") && long.contains("2047"), "{long}");
        let control = check_cmdline("a\nb", 2047).unwrap_err().to_string();
        assert!(control.contains("'\\n'") && control.contains("byte 1"), "{control}");
        assert!(check_cmdline("a\0b", 2047).is_err());
    }

    #[test]
    fn kernels_are_told_from_other_files() {
        let mut elf = vec![0; 64];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        elf[18] = 62;
        assert_eq!(identify(&elf), Ok(Image::Vmlinux));
        elf[18] = 183;
        assert!(identify(&elf).unwrap_err().contains("machine 183"));
        elf[4] = 1;
        assert!(identify(&elf).unwrap_err().contains("32-bit"));
        assert!(identify(b"\x7fELF").unwrap_err().contains("damaged"));
        let mut bz = vec![0; 1024];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(identify(&bz), Ok(Image::BzImage));
        assert!(identify(b"").unwrap_err().contains("empty"));
        assert!(identify(b"\x1f\x8b\x08").unwrap_err().contains("gzip"));
        assert!(identify(b"hello").unwrap_err().contains("begins with"));
    }

    #[test]
    fn initramfs_goes_high_and_page_aligned() {
        assert_eq!(place_initramfs(5000, 0x10_0000, 0x20_0000, &[]), Some(0x1f_e000));
        assert_eq!(place_initramfs(0x10_0000, 0x10_0000, 0x20_0000, &[]), Some(0x10_0000));
        assert_eq!(place_initramfs(0x10_0001, 0x10_0000, 0x20_0000, &[]), None);
        assert_eq!(place_initramfs(u64::MAX, 0, 0x20_0000, &[]), None);
    }

    #[test]
    fn bad_paths_and_bad_files_are_named() {
        let ram = GuestRam::new(&[MemoryZone::new(32 << 20)]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let load = |path: &Path| load(&ram, path, None, "", 0xe_0000).unwrap_err();
        assert!(load(&dir.path().join("absent")).source().is_some());
        assert!(load(dir.path()).to_string().contains("not a regular file"));

        let text = dir.path().join("text");
        std::fs::write(&text, "not a kernel at all").unwrap();
        let error = load(&text).to_string();
        assert!(error.contains("bzImage") && error.contains("text"), "{error}");

        // Headers that promise more than the file has.
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 3;
        let cut = dir.path().join("cut");
        std::fs::write(&cut, &elf).unwrap();
        assert!(matches!(load(&cut), BootError::Load { .. }));
    }

    /// The file is read straight into guest memory: a bad page there is an error of that read, not a signal.
    #[test]
    fn bad_memory_in_the_loaders_way_is_an_error_and_can_be_replaced() {
        let uffd = match Uffd::open() {
            Ok(uffd) => uffd,
            Err(error) => return println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}"),
        };
        let ram = GuestRam::new(&[MemoryZone::new(32 << 20)]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("kernel"), tiny::elf(&[0xf4; 3 * 4096])).unwrap();
        std::fs::write(at("initramfs"), [1; 4096]).unwrap();
        let load = || load(&ram, &at("kernel"), Some(&at("initramfs")), "", 0xe_0000);
        let entry = u64::from(tiny::ENTRY);
        // The loader's own write, and those of the rest.
        let (kernel, initramfs) = (entry + 4096, ram.low_end() - 4096);
        for bad in [entry, kernel, initramfs, layout::CMDLINE] {
            uffd.poison(ram.blocks()[0].hva + bad, PAGE_SIZE).unwrap();
            let error = load().unwrap_err();
            let expected = match &error {
                BootError::Load { .. } => bad == entry || bad == kernel,
                BootError::CopyInitramfs { .. } => bad == initramfs,
                BootError::Write { .. } => bad == layout::CMDLINE,
                _ => false,
            };
            assert!(expected, "{bad:#x}: {error}");
            assert_eq!(ram.find_poison(), [bad], "the rest is whole");
            assert_eq!(ram.heal(&[bad]).healed, [bad]);
            let boot = load().unwrap();
            assert_eq!(boot.entry, Entry::Pvh { rip: entry });
            assert!(boot.kernel.contains(&entry) && boot.kernel.contains(&kernel), "{boot:x?}");
            assert!(!boot.kernel.contains(&initramfs), "{boot:x?}");
        }
    }

    /// Damage anywhere in a header must end in an error or in a kernel, never in a panic.
    #[test]
    fn damaged_headers_are_refused_or_loaded() {
        let ram = GuestRam::new(&[MemoryZone::new(32 << 20)]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        let mut elf = vec![0; 64 + 2 * 56 + 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 2;
        elf[64] = 4;
        elf[64 + 32] = 20;
        elf[64 + 56] = 1;
        elf[64 + 56 + 32] = 64;
        let mut bz = vec![0; 2048];
        bz[0x1f1] = 1;
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        bz[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
        bz[0x211] = 1;
        bz[0x236] = 1;
        let headers = [(elf, 0..176), (bz, 0x1f1..0x26c)];
        for (image, header) in headers {
            for at in header {
                for width in [1, 4, 8] {
                    for value in [0x00, 0x7f, 0x80, 0xff] {
                        let mut damaged = image.clone();
                        damaged[at..at + width].fill(value);
                        std::fs::write(&path, damaged).unwrap();
                        let _ = load(&ram, &path, None, "", 0xe_0000);
                    }
                }
            }
        }
    }

    #[test]
    fn any_short_head_is_identified_or_refused() {
        for len in 0..0x210 {
            for magic in [&b"\x7fELF\x02"[..], b"\x1f", b""] {
                let mut head = magic.to_vec();
                head.resize(len, 0xff);
                let _ = identify(&head);
            }
        }
    }
}
