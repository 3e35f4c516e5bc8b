//! Dumps of the VM of [`crate::commands::dump::testing`].

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use mce_relay_vmm::api::types::vm::Extent;
use mce_relay_vmm::machine::memory::block::PAGE_SIZE;
use serde_json::json;
use tempfile::TempDir;

use super::account::{Dumped, size};
use super::error::DumpError;
use super::file::PAGE;
use super::form::{Form, Target};
use super::job::dump;
use super::stretch::{Stretch, read};
use super::testing::{self, Said, answer, info, refused, serve};
use crate::commands::dump::prstatus::tests::at;

/// A raw image.
fn raw(
    socket: &Path,
    file: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Dumped, DumpError> {
    dump(socket, Form::Raw, Target::File(file), progress)
}

/// An ELF core, in a file.
fn elf(socket: &Path, file: &Path) -> Result<Dumped, DumpError> {
    dump(socket, Form::Elf, Target::File(file), &mut |_, _| {})
}

/// What goes to a stream.
fn streamed(socket: &Path, form: Form) -> (Vec<u8>, Dumped) {
    let mut out = Vec::new();
    let dumped = dump(socket, form, Target::Stream(&mut out), &mut |_, _| {}).unwrap();
    (out, dumped)
}

/// What is in a directory besides the socket.
fn files(dir: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(dir.path()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name != "api").collect();
    names.sort();
    names
}

#[test]
fn an_image_is_exact_and_its_holes_are_listed() {
    let (dir, socket) = serve(usize::MAX, |_, what| answer(what));
    let file = dir.path().join("image.raw");
    let mut steps = Vec::new();
    let dumped = raw(&socket, &file, &mut |done, all| steps.push((done, all))).unwrap();

    let mut expected = vec![0; 0xb000];
    for (number, byte) in [(0, 0xaa), (2, 0xbb), (9, 0xcc)] {
        expected[number * PAGE..(number + 1) * PAGE].fill(byte);
    }
    assert!(fs::read(&file).unwrap() == expected);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let all = 0x6000;
    assert_eq!(steps, [0x1000, 0x2000, 0x3000, 0x5000, 0x6000].map(|done| (done, all)));

    assert_eq!(files(&dir), ["image.raw", "image.raw.json"]);
    let list = fs::read(dir.path().join("image.raw.json")).unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list).unwrap();
    let expected = json!({
        "version": "0.1.0", "pid": 4711, "boot": 1, "paused": true,
        "memory": [{"gpa": "0x0", "len": 0x4000}, {"gpa": "0x8000", "len": 0x3000}],
        "poisoned": [{"gpa": "0x1000", "len": 0x1000}],
        "unreadable": [{"gpa": "0xa000", "len": 0x1000}],
        "late": [],
        "bytes": 0x3000,
        "form": "raw",
        "kernel": null,
        "registers": 0,
        "file": "image.raw",
    });
    assert_eq!(list, expected);
    assert_eq!(serde_json::to_value(&dumped).unwrap(), expected, "and printed");
    let file = file.display();
    let words = format!(
        "dumped: 28 KiB of guest RAM into {file}, 12 KiB of it data; 1 poisoned page is a hole, \
         listed in {file}.json; 1 other page could not be read and is a hole"
    );
    assert_eq!(dumped.to_string(), words);
}

/// The stretches of `file` that are no holes.
fn data_of(file: &File) -> Vec<(u64, u64)> {
    use std::os::fd::AsRawFd;
    // SAFETY: takes integers only; the descriptor is open.
    let seek = |to, whence| unsafe { libc::lseek(file.as_raw_fd(), to, whence) };
    let (mut data, mut at) = (Vec::new(), 0);
    loop {
        let start = seek(at, libc::SEEK_DATA);
        let Ok(from) = u64::try_from(start) else { return data };
        at = seek(start, libc::SEEK_HOLE);
        data.push((from, u64::try_from(at).unwrap() - from));
    }
}

#[test]
fn holes_are_holes() {
    let (dir, socket) = serve(usize::MAX, |_, what| answer(what));
    let trial = File::create_new(dir.path().join("trial")).unwrap();
    trial.write_all_at(&[1; PAGE], 0x2000).unwrap();
    trial.set_len(0x8000).unwrap();
    trial.sync_all().unwrap();
    if data_of(&trial) != [(0x2000, 0x1000)] {
        return println!("SKIPPED: needs a file system that keeps holes page by page (TMPDIR)");
    }
    let file = dir.path().join("image.raw");
    raw(&socket, &file, &mut |_, _| {}).unwrap();
    let pages = [0, 2, 9].map(|page| (page * PAGE_SIZE, PAGE_SIZE));
    assert_eq!(data_of(&File::open(&file).unwrap()), pages, "the rest takes no room");
}

#[test]
fn what_exists_is_refused_and_left_alone() {
    for name in ["image", "image.json"] {
        let (dir, socket) = serve(usize::MAX, |_, what| answer(what));
        let path = dir.path().join(name);
        fs::write(&path, "mine").unwrap();
        let error = raw(&socket, &dir.path().join("image"), &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().starts_with(&format!("{} exists", path.display())), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        assert_eq!(files(&dir), [name]);
    }
}

#[test]
fn half_an_image_is_removed() {
    let run = |requests, answer: fn(usize, &str) -> Said| {
        let (dir, socket) = serve(requests, answer);
        let error = raw(&socket, &dir.path().join("image"), &mut |_, _| {}).unwrap_err();
        assert_eq!(files(&dir), [""; 0], "{error}");
        error
    };
    let gone = run(4, |_, what| answer(what));
    assert!(matches!(gone, DumpError::Client(_)), "{gone}");
    let between = run(usize::MAX, |number, what| match number {
        4 => refused(503, "the guest is between two boots; ask again"),
        _ => answer(what),
    });
    assert!(matches!(between, DumpError::StartedOver), "{between}");
    let again = run(usize::MAX, |number, what| match what {
        "vm.info" if number > 0 => info(2, true),
        _ => answer(what),
    });
    assert!(matches!(again, DumpError::StartedOver), "{again}");
    let odd = run(usize::MAX, |_, what| match what.starts_with("vm.memory") {
        true => (200, Vec::new()),
        false => answer(what),
    });
    assert!(odd.to_string().contains("0 bytes where 12288 bytes"), "{odd}");
}

#[test]
fn an_image_of_a_running_guest_says_so() {
    let (dir, socket) = serve(usize::MAX, |number, what| match what {
        "vm.info" if number > 0 => info(1, false),
        _ => answer(what),
    });
    let dumped = raw(&socket, &dir.path().join("image"), &mut |_, _| {}).unwrap();
    assert!(!dumped.paused && dumped.to_string().contains("not paused"), "{dumped}");
}

#[test]
fn a_stretch_is_read_as_a_whole_or_not_at_all() {
    let (_dir, socket) = serve(usize::MAX, |_, what| answer(what));
    let read = |gpa, len| read(&socket, gpa, len).map(|stretch| stretch.bytes);
    assert!(read(0, 0x1000).unwrap() == [0xaa; 0x1000]);
    assert_eq!(read(0x2fff, 2).unwrap(), [0xbb, 0]);
    for (gpa, len, words) in [
        (0, 0x1001, "GPA 0x1000; the 4096 bytes before it can be read with --len 4096"),
        (0xfff, 0x1000, "GPA 0x1000; the byte before it can be read with --len 1"),
        (0x1800, 8, "poisoned at GPA 0x1800"),
        (0x9ff0, 17, "no memory behind GPA 0xa000: test; the 16 bytes before it can be read"),
        (0x3fff, 2, "GPA 0x4000 is not guest RAM; this guest has 0x0 to 0x3fff, 0x8000 to"),
        (0x3000, u64::MAX, "GPA 0x4000 is not guest RAM"),
        (u64::MAX, 1, "GPA 0xffffffffffffffff is not guest RAM"),
        (0, 0, "--len is 0"),
    ] {
        let error = read(gpa, len).unwrap_err().to_string();
        assert!(error.contains(words), "{gpa:#x}, {len}: {error}");
    }
}

#[test]
fn a_stretch_is_shown_as_hexdump_does() {
    let mut bytes = b"The quick brown fox\n\0\x7f\xff".to_vec();
    bytes.resize(32, 0);
    bytes.resize(96, b'~');
    bytes.push(b'!');
    let stretch = Stretch { gpa: 0x1000, bytes };
    let lines = [
        "00001000  54 68 65 20 71 75 69 63  6b 20 62 72 6f 77 6e 20  |The quick brown |",
        "00001010  66 6f 78 0a 00 7f ff 00  00 00 00 00 00 00 00 00  |fox.............|",
        "00001020  7e 7e 7e 7e 7e 7e 7e 7e  7e 7e 7e 7e 7e 7e 7e 7e  |~~~~~~~~~~~~~~~~|",
        "*",
        "00001060  21                                                |!|",
        "00001061",
    ];
    assert_eq!(stretch.to_string().lines().collect::<Vec<_>>(), lines);
    let high = Stretch { gpa: 0xf_ffff_fff0, bytes: vec![0; 17] };
    let words = high.to_string();
    let starts: Vec<&str> = words.lines().map(|line| &line[..10]).collect();
    assert_eq!(starts, ["0ffffffff0", "1000000000", "1000000001"]);

    let stretch = Stretch { gpa: 0x1000, bytes: vec![0, 0x7f, 0xff] };
    let expected = json!({"gpa": "0x1000", "len": 3, "bytes": "007fff"});
    assert_eq!(serde_json::to_value(&stretch).unwrap(), expected);
}

#[test]
fn sizes_for_people() {
    let words = [0x3000, 512 << 20, (20 << 20) + (512 << 10), (1 << 20) + 4096].map(size);
    assert_eq!(words, ["12 KiB", "512 MiB", "20.5 MiB", "1 MiB"]);
}

/// The pages of `core` that are memory, each with what is in it.
fn pages_of(core: &testing::Core, bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut pages = Vec::new();
    for &(gpa, offset, len) in &core.loads {
        let offset = usize::try_from(offset).unwrap();
        let data = bytes[offset..].chunks_exact(PAGE);
        pages.extend((gpa..gpa + len).step_by(PAGE).zip(data.map(<[u8]>::to_vec)));
    }
    pages
}

/// The pages of the guest that can be read.
fn whole_pages() -> Vec<(u64, Vec<u8>)> {
    let bytes = [(0, 0xaa), (2, 0xbb), (3, 0), (8, 0), (9, 0xcc)];
    bytes.map(|(page, byte)| (page * PAGE_SIZE, vec![byte; PAGE])).into()
}

#[test]
fn a_core_is_exact_and_what_is_bad_is_absent() {
    let (dir, socket) = serve(usize::MAX, |_, what| match what {
        "vm.registers" => {
            let vcpus = [at(0, 0x1234), at(1, 0x5678)];
            (200, serde_json::to_vec(&vcpus).unwrap())
        }
        _ => answer(what),
    });
    let file = dir.path().join("core");
    let dumped = elf(&socket, &file).unwrap();
    assert_eq!(files(&dir), ["core"], "its account is in it");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    let bytes = fs::read(&file).unwrap();
    let core = testing::core(&bytes);
    assert!(pages_of(&core, &bytes) == whole_pages(), "{:x?}", core.loads);
    assert_eq!(core.lost(), [[0x1000, 0x1000, 1], [0xa000, 0x1000, 2]]);
    assert_eq!(core.late, [[0; 3]; 0]);
    let names: Vec<(&str, u32)> =
        core.notes.iter().map(|(name, kind, _)| (&**name, *kind)).collect();
    assert_eq!(names, [("CORE", 1), ("CORE", 1), ("MCE_RELAY", 0x4d43_4501)]);
    let rip = 112 + std::mem::offset_of!(libc::user_regs_struct, rip);
    for ((_, _, prstatus), (pid, expected)) in core.notes.iter().zip([(1, 0x1234), (2, 0x5678)]) {
        assert_eq!(prstatus[32], pid);
        assert_eq!(prstatus[rip..rip + 8], u64::to_le_bytes(expected));
    }

    let file = file.display();
    let words = format!(
        "dumped: 28 KiB of guest RAM into {file}, 12 KiB of it data; 1 poisoned page is absent, listed in its \
         MCE_RELAY note; 1 other page could not be read and is absent"
    );
    assert_eq!(dumped.to_string(), words);
    let [note] = dumped.notes()[..] else { panic!("{:?}", dumped.notes()) };
    assert!(note.contains("no kernel's vmcoreinfo"), "{note}");
}

#[test]
fn a_stream_is_the_same_dump() {
    let (dir, socket) = serve(usize::MAX, |_, what| answer(what));
    let (bytes, dumped) = streamed(&socket, Form::Elf);
    let core = testing::core(&bytes);
    assert!(pages_of(&core, &bytes) == whole_pages(), "{:x?}", core.loads);
    assert_eq!(core.lost(), [[0x1000, 0x1000, 1], [0xa000, 0x1000, 2]]);
    assert_eq!(core.late, [[0; 3]; 0]);
    assert!(dumped.to_string().contains("to stdout, 12 KiB of it data"), "{dumped}");
    assert_eq!(dumped.notes().len(), 2, "neither a kernel nor registers: {:?}", dumped.notes());

    let (bytes, dumped) = streamed(&socket, Form::Raw);
    let file = dir.path().join("image");
    raw(&socket, &file, &mut |_, _| {}).unwrap();
    assert!(bytes == fs::read(&file).unwrap(), "the holes are zeros");
    assert!(dumped.to_string().contains("listed by --json"), "{dumped}");
}

/// Page 2 is whole when it is read first, and bad when it is read again.
#[test]
fn a_page_that_goes_bad_while_a_stream_is_written_is_marked() {
    let (_dir, socket) =
        serve(usize::MAX, |number, what| match what.strip_prefix("vm.memory?gpa=") {
            Some(stretch) if number > 8 && stretch.starts_with("0x2000") => {
                refused(410, "poisoned at GPA 0x2000")
            }
            _ => answer(what),
        });
    let (bytes, dumped) = streamed(&socket, Form::Elf);
    let core = testing::core(&bytes);
    let mut expected = whole_pages();
    expected[1].1.fill(0);
    assert!(pages_of(&core, &bytes) == expected, "{:x?}", core.loads);
    assert_eq!(core.lost(), [[0x1000, 0x1000, 1], [0xa000, 0x1000, 2]]);
    assert_eq!(core.late, [[0x2000, 0x1000, 3]]);
    assert_eq!(dumped.late, [Extent { gpa: 0x2000, len: 0x1000 }]);
    let words = "1 page went bad meanwhile and is zeros, listed at the end";
    assert!(dumped.to_string().contains(words), "{dumped}");
}

#[test]
fn a_core_has_what_the_kernel_says_of_itself() {
    const TEXT: &str = "OSRELEASE=6.1.0\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff80000100\n\
        OFFSET(uts_namespace.name)=4\nNUMBER(phys_base)=0\n";
    for (running, taken) in [("6.1.0", true), ("6.1.1", false)] {
        let (dir, socket) = serve(usize::MAX, move |_, what| match what {
            "vm.registers" => refused(409, "the vCPUs run"),
            "vm.memory?gpa=0x8000&len=12288" => {
                let mut bytes = TEXT.as_bytes().to_vec();
                bytes.resize(0x2000, 0);
                (200, bytes)
            }
            "vm.memory?gpa=0x186&len=65" => {
                let mut name = running.as_bytes().to_vec();
                name.resize(65, 0);
                (200, name)
            }
            _ => answer(what),
        });
        let file = dir.path().join("core");
        let dumped = elf(&socket, &file).unwrap();
        let core = testing::core(&fs::read(&file).unwrap());
        let note = core.notes.iter().find(|(name, _, _)| name == "VMCOREINFO");
        match note {
            Some((_, kind, text)) => assert!(taken && *kind == 0 && text == TEXT.as_bytes()),
            None => assert!(!taken, "a former kernel's"),
        }
        let said = dumped.to_string().contains("its kernel: Linux 6.1.0, vmcoreinfo at GPA 0x8000");
        assert_eq!(said, taken, "{dumped}");
    }
}

/// Takes so many bytes, and no more.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.0);
        self.0 -= len;
        if len == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(len) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn half_a_stream_is_said() {
    let (_dir, socket) = serve(usize::MAX, |_, what| answer(what));
    let error = dump(&socket, Form::Elf, Target::Stream(&mut Full(0)), &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, DumpError::WriteStream(_)), "nothing was written: {error}");
    let error =
        dump(&socket, Form::Raw, Target::Stream(&mut Full(0x2100)), &mut |_, _| {}).unwrap_err();
    let words = mce_relay_vmm::words::with_causes(&error);
    assert!(
        words.contains("not a complete dump: cannot write to stdout") && words.contains("bytes"),
        "{words}"
    );
    assert_eq!(error.signal(), None);
}

#[test]
fn half_a_core_is_removed() {
    for requests in 3..9 {
        let (dir, socket) = serve(requests, |_, what| answer(what));
        elf(&socket, &dir.path().join("core")).unwrap_err();
        assert_eq!(files(&dir), [""; 0], "after {requests} requests");
    }
}
