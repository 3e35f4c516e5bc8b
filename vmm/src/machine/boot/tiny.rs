//! Kernels of a few instructions, for unit tests; the tests' own crate includes this file by its path.

/// Where they are loaded, and begin in 32-bit mode: 1 MiB.
pub const ENTRY: u32 = 0x10_0000;

/// A kernel of a few instructions: an ELF file with a PVH note and one segment at [`ENTRY`].
pub fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    let mut note = Vec::new();
    // Lengths of name and value, and XEN_ELFNOTE_PHYS32_ENTRY.
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Type EXEC, machine x86-64, version, entry, program headers, no sections, flags, sizes.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [u64::from(ENTRY), 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let mut header = |kind: u32, offset: u64, address: u64, len: u64| {
        file.extend(kind.to_le_bytes());
        file.extend([5, 0, 0, 0]);
        for word in [offset, address, address, len, len, 4] {
            file.extend(word.to_le_bytes());
        }
    };
    header(4, HEADERS, 0, note.len() as u64);
    header(1, HEADERS + note.len() as u64, u64::from(ENTRY), code.len() as u64);
    file.extend(note);
    file.extend(code);
    file
}
