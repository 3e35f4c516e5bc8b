//! For tests: a VM of two blocks of RAM, with pages of each kind, behind a socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use mce_relay_vmm::api::types::vm::{MemoryBlock, VmInfo};
use mce_relay_vmm::machine::memory::block::PAGE_SIZE;
use object::LittleEndian as LE;
use object::elf::{ET_CORE, FileHeader64, PT_LOAD, PT_NOTE, SHT_NOTE};
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader, SectionHeader};
use serde_json::json;
use tempfile::TempDir;

use crate::args::values::parse_number;
use crate::testing::an_info;

/// An answer: its status and its body.
pub(super) type Said = (u16, Vec<u8>);

/// What a page of the guest holds.
pub(super) enum Content {
    Data(u8),
    Poisoned,
    Gone,
}

/// The guest has two blocks of RAM, of 4 and 3 pages; `None` outside of them.
pub(super) fn page(number: u64) -> Option<Content> {
    Some(match number {
        0 => Content::Data(0xaa),
        1 => Content::Poisoned,
        2 => Content::Data(0xbb),
        3 | 8 => Content::Data(0),
        9 => Content::Data(0xcc),
        10 => Content::Gone,
        _ => return None,
    })
}

pub(super) fn info(boot: u32, paused: bool) -> Said {
    let block = |gpa, len| {
        let (hva, fd, fd_offset, shared, page_size) = (0x7000_0000, None, 0, false, 4096);
        MemoryBlock { gpa, len, hva, fd, fd_offset, shared, page_size }
    };
    let memory = vec![block(0, 0x4000), block(0x8000, 0x3000)];
    let info = VmInfo { boot, paused, memory, ..an_info() };
    (200, serde_json::to_vec(&info).unwrap())
}

pub(super) fn refused(status: u16, error: &str) -> Said {
    (status, serde_json::to_vec(&json!({ "error": error })).unwrap())
}

pub(super) fn memory(gpa: u64, len: u64) -> Said {
    let mut bytes = Vec::new();
    for at in gpa..gpa + len {
        match page(at / PAGE_SIZE) {
            Some(Content::Data(byte)) => bytes.push(byte),
            _ if !bytes.is_empty() => break,
            Some(Content::Poisoned) => {
                return refused(410, &format!("poisoned at GPA {at:#x}"));
            }
            Some(Content::Gone) => {
                return refused(409, &format!("no memory behind GPA {at:#x}: test"));
            }
            None => return refused(400, &format!("GPA {at:#x} is not guest RAM; test")),
        }
    }
    (200, bytes)
}

/// The whole guest, paused. Its page 3 has no memory yet.
pub(super) fn answer(what: &str) -> Said {
    match what.split_once('?') {
        None if what == "vm.info" => info(1, true),
        None if what == "vm.extents" => {
            let extents = json!([{"gpa": "0x0", "len": 0x3000}, {"gpa": "0x8000", "len": 0x3000}]);
            (200, serde_json::to_vec(&extents).unwrap())
        }
        Some(("vm.memory", query)) => {
            let (gpa, len) = query.split_once('&').unwrap();
            let number = |text: &str| parse_number(text.split_once('=').unwrap().1).unwrap();
            memory(number(gpa), number(len))
        }
        _ => refused(404, what),
    }
}

/// Serves this many requests, and then closes the socket.
pub(super) fn serve(
    requests: usize,
    answer: impl Fn(usize, &str) -> Said + Send + 'static,
) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().take(requests).enumerate() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut request = String::new();
            stream.read_line(&mut request).unwrap();
            let mut line = String::new();
            while stream.read_line(&mut line).unwrap() > 2 {
                line.clear();
            }
            let url = request.split(' ').nth(1).unwrap();
            let (status, body) = answer(number, url.strip_prefix("/api/v1/").unwrap());
            let stream = stream.get_mut();
            let len = body.len();
            write!(stream, "HTTP/1.1 {status} Test\r\nContent-Length: {len}\r\n\r\n").unwrap();
            stream.write_all(&body).unwrap();
        }
    });
    (dir, socket)
}

/// What a reader of ELF finds in a core.
#[derive(Debug)]
pub(super) struct Core {
    /// Guest-physical address, offset in the file and length of each stretch of memory.
    pub(super) loads: Vec<(u64, u64, u64)>,
    /// Name, type and description.
    pub(super) notes: Vec<(String, u32, Vec<u8>)>,
    /// The entries of our own note behind the memory.
    pub(super) late: Vec<[u64; 3]>,
}

impl Core {
    /// The entries of our own note among the others.
    pub(super) fn lost(&self) -> Vec<[u64; 3]> {
        let own = self.notes.iter().find(|(name, _, _)| name == "MCE_RELAY");
        entries(&own.unwrap().2)
    }
}

/// The entries that are used.
fn entries(description: &[u8]) -> Vec<[u64; 3]> {
    let (words, []) = description.as_chunks::<8>() else { panic!("{}", description.len()) };
    let (entries, []) = words.as_chunks::<3>() else { panic!("{}", words.len()) };
    let entries = entries.iter().map(|entry| entry.map(u64::from_le_bytes));
    entries.filter(|[_, len, _]| *len != 0).collect()
}

/// Reads a core.
pub(super) fn core(bytes: &[u8]) -> Core {
    let header = FileHeader64::<LE>::parse(bytes).unwrap();
    assert_eq!(header.e_type(LE), ET_CORE);
    let mut core = Core { loads: Vec::new(), notes: Vec::new(), late: Vec::new() };
    for (index, segment) in header.program_headers(LE, bytes).unwrap().iter().enumerate() {
        match segment.p_type(LE) {
            PT_NOTE => {
                assert_eq!(index, 0, "crash takes all others for memory");
                let mut notes = segment.notes(LE, bytes).unwrap().unwrap();
                while let Some(note) = notes.next().unwrap() {
                    let name = String::from_utf8(note.name().to_vec()).unwrap();
                    core.notes.push((name, note.n_type(LE).0, note.desc().to_vec()));
                }
            }
            kind => {
                assert_eq!(kind, PT_LOAD);
                assert_eq!(segment.p_filesz(LE), segment.p_memsz(LE));
                core.loads.push((segment.p_paddr(LE), segment.p_offset(LE), segment.p_filesz(LE)));
            }
        }
    }
    let sections = header.sections(LE, bytes).unwrap();
    let (_, late) = sections.section_by_name(LE, b".note.mce_relay").unwrap();
    assert_eq!(late.sh_type(LE), SHT_NOTE);
    let mut notes: NoteIterator<'_, FileHeader64<LE>> = late.notes(LE, bytes).unwrap().unwrap();
    let note = notes.next().unwrap().unwrap();
    assert_eq!(note.name(), b"MCE_RELAY");
    core.late = entries(note.desc());
    core
}
