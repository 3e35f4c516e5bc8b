//! Reads a running guest's memory from outside, bad pages and all.
//!
//! The VM does the reading, so a bad page costs that page and nothing else: neither the VM nor who
//! asks is harmed. The guest may run meanwhile. What is read in one go is at most [`MAX_READ`] bytes,
//! and different parts are of different moments then; pause the VM first where that matters.
//!
//! An image ([`dump`]) is a file in which the offset is the guest-physical address. Its account, in
//! JSON, is written beside it when all else is done: an image without one is not complete, because
//! the command was ended half way (Ctrl-C, a crash of the host).

use std::fmt;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use log::warn;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use crate::api::{Extent, Gpa, MAX_READ, VmInfo};
use crate::client::{self, ClientError};
use crate::memory::PAGE_SIZE;

/// The bytes in which an image has holes.
const PAGE: usize = 4096;
/// The bytes on one line of a hexdump.
const LINE: usize = 16;

/// Why memory was not read.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What was read is of two guests.
    #[error(
        "the guest started over while its memory was being read, so the parts do not fit together; \
         try again"
    )]
    StartedOver,
    /// An address is not guest RAM.
    #[error("GPA {gpa:#x} is not guest RAM; this guest has {ram}")]
    OutsideRam {
        /// The first such address.
        gpa: u64,
        /// Where there is RAM.
        ram: String,
    },
    /// A page is bad.
    #[error("poisoned at GPA {gpa:#x}{rest}", rest = readable(.before))]
    Poisoned {
        /// Guest-physical address of the first byte that could not be read.
        gpa: u64,
        /// How many bytes before it could be.
        before: u64,
    },
    /// There is no memory behind an address any more, and poison is not the reason.
    #[error("{error}{rest}", rest = readable(.before))]
    NoMemory {
        /// The VM's words.
        error: String,
        /// How many bytes before it could be read.
        before: u64,
    },
    /// No byte was asked for.
    #[error("--len is 0; expected 1 or more bytes")]
    Nothing,
    /// Nobody can read bytes there.
    #[error(
        "--raw writes the bytes as they are, and stdout is a terminal; \
         send them to a file or a program (> FILE), or leave --raw out"
    )]
    Terminal,
    /// There is something at the path already.
    #[error(
        "{path} exists, and is left as it is; remove it, or choose another FILE",
        path = .0.display()
    )]
    Exists(PathBuf),
    /// A file could not be made.
    #[error("cannot make the file {path}", path = .path.display())]
    Create {
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file could not be written; it has been removed.
    #[error("cannot write the file {path}, so it is removed again", path = .path.display())]
    Write {
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What can be had all the same.
fn readable(before: &u64) -> String {
    match before {
        0 => String::new(),
        1 => "; the byte before it can be read with --len 1".to_owned(),
        before => format!("; the {before} bytes before it can be read with --len {before}"),
    }
}

/// A VM whose memory is read.
struct Vm<'a> {
    socket: &'a Path,
    /// What ran when the reading began.
    info: VmInfo,
}

/// What one request for memory brings.
enum Piece {
    /// At least one byte, and no more than asked for.
    Bytes(Vec<u8>),
    /// The first byte is of a bad page.
    Poisoned,
    /// There is no memory behind the first byte any more; why.
    NoMemory(String),
}

impl<'a> Vm<'a> {
    fn open(socket: &'a Path) -> Result<Self, DumpError> {
        Ok(Self { socket, info: client::get(socket, "vm.info")? })
    }

    /// Reads at `gpa`: `len` bytes, 1 to [`MAX_READ`], or fewer.
    fn piece(&self, gpa: u64, len: u64) -> Result<Piece, DumpError> {
        match client::get_bytes(self.socket, &format!("vm.memory?gpa={gpa:#x}&len={len}")) {
            Ok(bytes) if (1..=len).contains(&(bytes.len() as u64)) => Ok(Piece::Bytes(bytes)),
            Ok(bytes) => Err(DumpError::Client(ClientError::Stranger {
                path: self.socket.to_owned(),
                what: format!("it answers with {} bytes for {len}", bytes.len()),
            })),
            Err(ClientError::Refused { status: 410, .. }) => Ok(Piece::Poisoned),
            Err(ClientError::Refused { status: 409, error }) => Ok(Piece::NoMemory(error)),
            Err(error) => Err(later(error)),
        }
    }

    /// What runs now, which is still the same guest.
    fn again(&self) -> Result<VmInfo, DumpError> {
        let now: VmInfo = client::get(self.socket, "vm.info").map_err(later)?;
        // Another VM may have been given the same path.
        if (now.pid, now.boot) == (self.info.pid, self.info.boot) {
            Ok(now)
        } else {
            Err(DumpError::StartedOver)
        }
    }

    /// Checks that all of it, at least a byte, is guest RAM.
    fn check_ram(&self, gpa: u64, len: u64) -> Result<(), DumpError> {
        // RAM does not reach up to there, so what is cut off is outside all the same.
        let last = gpa.saturating_add(len - 1);
        let mut at = gpa;
        while at <= last {
            at = match self.info.block(at) {
                Some(block) => block.gpa + block.len,
                None => {
                    return Err(DumpError::OutsideRam { gpa: at, ram: self.info.ram_in_words() });
                }
            };
        }
        Ok(())
    }
}

/// What an error means once the VM has said which guest it runs.
fn later(error: ClientError) -> DumpError {
    match error {
        // Between two boots there is no guest.
        ClientError::Refused { status: 503, .. } => DumpError::StartedOver,
        error => DumpError::Client(error),
    }
}

/// Some of a guest's memory. Its text is that of `hexdump -C`, with guest-physical addresses; in JSON
/// the bytes are hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// What is there.
    pub bytes: Vec<u8>,
}

impl fmt::Display for Stretch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.gpa + self.bytes.len() as u64;
        let width = format!("{end:x}").len().max(8);
        let (mut gpa, mut previous, mut starred) = (self.gpa, None, false);
        for line in self.bytes.chunks(LINE) {
            if previous == Some(line) {
                if !starred {
                    writeln!(f, "*")?;
                }
                starred = true;
            } else {
                write_line(f, gpa, width, line)?;
                starred = false;
            }
            previous = Some(line);
            gpa += line.len() as u64;
        }
        write!(f, "{end:0width$x}")
    }
}

fn write_line(f: &mut fmt::Formatter<'_>, gpa: u64, width: usize, line: &[u8]) -> fmt::Result {
    write!(f, "{gpa:0width$x} ")?;
    for column in 0..LINE {
        if column % 8 == 0 {
            write!(f, " ")?;
        }
        match line.get(column) {
            Some(byte) => write!(f, "{byte:02x} ")?,
            None => write!(f, "   ")?,
        }
    }
    write!(f, " |")?;
    for &byte in line {
        let printable = byte == b' ' || byte.is_ascii_graphic();
        write!(f, "{}", if printable { char::from(byte) } else { '.' })?;
    }
    writeln!(f, "|")
}

impl Serialize for Stretch {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut object = to.serialize_struct("Stretch", 3)?;
        object.serialize_field("gpa", &Gpa(self.gpa))?;
        object.serialize_field("len", &self.bytes.len())?;
        object.serialize_field("bytes", &Digits(&self.bytes))?;
        object.end()
    }
}

/// Bytes as hexadecimal digits, two each.
struct Digits<'a>(&'a [u8]);

impl fmt::Display for Digits<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for Digits<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// Checks that bytes may go to stdout as they are.
///
/// # Errors
/// [`DumpError::Terminal`].
pub fn check_raw() -> Result<(), DumpError> {
    if io::stdout().is_terminal() { Err(DumpError::Terminal) } else { Ok(()) }
}

/// Reads `len` bytes, at least 1, at the guest-physical address `gpa` of the VM behind `socket`. All
/// of them are held in memory; [`dump`] is for whole guests.
///
/// # Errors
/// See [`DumpError`]; one byte that cannot be read is enough.
pub fn read(socket: &Path, gpa: u64, len: u64) -> Result<Stretch, DumpError> {
    if len == 0 {
        return Err(DumpError::Nothing);
    }
    let vm = Vm::open(socket)?;
    vm.check_ram(gpa, len)?;
    let mut bytes = Vec::new();
    let mut before = 0;
    while before < len {
        match vm.piece(gpa + before, (len - before).min(MAX_READ))? {
            Piece::Bytes(more) => bytes.extend(more),
            Piece::Poisoned => return Err(DumpError::Poisoned { gpa: gpa + before, before }),
            Piece::NoMemory(error) => return Err(DumpError::NoMemory { error, before }),
        }
        before = bytes.len() as u64;
    }
    vm.again()?;
    Ok(Stretch { gpa, bytes })
}

/// An image of a guest's memory; in JSON, what is written beside it.
#[derive(Debug, Serialize)]
pub struct Dumped {
    /// The VMM's version.
    pub version: String,
    /// The VMM's process.
    pub pid: u32,
    /// Which boot of the guest it is; 1 for the first.
    pub boot: u32,
    /// Whether the VM was paused both before the first byte was read and after the last. If not,
    /// parts of the image may be of different moments.
    pub paused: bool,
    /// Where there is guest RAM.
    pub memory: Vec<Extent>,
    /// Bad pages, which are holes in the image. Those in a row are one entry.
    pub poisoned: Vec<Extent>,
    /// Pages that could not be read for another reason, which are holes, too.
    pub unreadable: Vec<Extent>,
    /// The bytes of pages that are not all zeros. The others are holes.
    pub bytes: u64,
    /// The name of the image, which is in the same directory.
    pub file: String,
    /// The path of the image, as it was given.
    #[serde(skip)]
    pub path: PathBuf,
}

impl fmt::Display for Dumped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ram, data) = (size(len_of(&self.memory)), size(self.bytes));
        write!(f, "dumped: {ram} of guest RAM into {}, {data} of it data", self.path.display())?;
        let list = list_of(&self.path);
        match len_of(&self.poisoned).div_ceil(PAGE_SIZE) {
            0 => write!(f, "; no page is poisoned")?,
            1 => write!(f, "; 1 poisoned page is a hole, listed in {}", list.display())?,
            pages => {
                write!(f, "; {pages} poisoned pages are holes, listed in {}", list.display())?;
            }
        }
        match len_of(&self.unreadable).div_ceil(PAGE_SIZE) {
            0 => {}
            1 => write!(f, "; 1 other page could not be read and is a hole")?,
            pages => write!(f, "; {pages} other pages could not be read and are holes")?,
        }
        if !self.paused {
            write!(
                f,
                "\nthe guest was not paused: parts of the image may be of different moments; \
                 `mce-relay pause` before holds it still"
            )?;
        }
        Ok(())
    }
}

/// A number of bytes, for people; what does not fit is cut off.
fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes < MIB {
        return format!("{} KiB", bytes >> 10);
    }
    match (bytes / MIB, bytes % MIB * 10 / MIB) {
        (whole, 0) => format!("{whole} MiB"),
        (whole, tenths) => format!("{whole}.{tenths} MiB"),
    }
}

/// How many bytes there are in all of them.
fn len_of(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len).sum()
}

/// Adds the stretch to the list, or to its last entry where that ends there.
fn add(list: &mut Vec<Extent>, gpa: u64, len: u64) {
    match list.last_mut() {
        Some(last) if last.gpa + last.len == gpa => last.len += len,
        _ => list.push(Extent { gpa, len }),
    }
}

/// Where the account of an image is.
fn list_of(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".json");
    path.into()
}

/// Files that were made here, and that go again unless all is done.
#[derive(Default)]
struct Unfinished(Vec<PathBuf>);

impl Unfinished {
    /// Makes a file that is its owner's alone, as what is in a guest's memory is nobody else's.
    fn create(&mut self, path: &Path) -> Result<File, DumpError> {
        let made = File::options().write(true).create_new(true).mode(0o600).open(path);
        let file = made.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => DumpError::Exists(path.to_owned()),
            _ => DumpError::Create { path: path.to_owned(), source },
        })?;
        self.0.push(path.to_owned());
        Ok(file)
    }

    /// All is done.
    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = fs::remove_file(path) {
                warn!("{} is not complete, and cannot be removed: {error}", path.display());
            }
        }
    }
}

/// Writes the memory of the VM behind `socket` to `file`, in which the offset is the guest-physical
/// address, and what is in it to the file's name with `.json` behind it. Neither may exist. Both get
/// mode 0600.
///
/// The file ends where the highest RAM does. Whatever is no RAM, reads as zeros, is bad or cannot be
/// read is a hole. `progress` is called with the number of bytes that are settled and that of all that
/// have memory behind them.
///
/// The JSON is written when the image is safely on its disk: an image without it is not complete.
///
/// # Errors
/// See [`DumpError`]; what had been written is removed then.
pub fn dump(
    socket: &Path,
    file: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Dumped, DumpError> {
    let list = list_of(file);
    for path in [file, list.as_path()] {
        if path.symlink_metadata().is_ok() {
            return Err(DumpError::Exists(path.to_owned()));
        }
    }
    let vm = Vm::open(socket)?;
    let extents: Vec<Extent> = client::get(socket, "vm.extents").map_err(later)?;
    let memory: Vec<Extent> =
        vm.info.memory.iter().map(|block| Extent { gpa: block.gpa, len: block.len }).collect();

    let mut unfinished = Unfinished::default();
    let image = unfinished.create(file)?;
    let write_error = |source| DumpError::Write { path: file.to_owned(), source };
    let end_of_ram = memory.iter().map(|block| block.gpa + block.len).max().unwrap_or_default();
    image.set_len(end_of_ram).map_err(write_error)?;

    let all = len_of(&extents);
    let (mut poisoned, mut unreadable) = (Vec::new(), Vec::new());
    let (mut bytes, mut done) = (0, 0);
    for extent in extents {
        let end = extent.gpa + extent.len;
        let mut gpa = extent.gpa;
        while gpa < end {
            let page_end = (gpa - gpa % PAGE_SIZE + PAGE_SIZE).min(end);
            gpa = match vm.piece(gpa, (end - gpa).min(MAX_READ))? {
                Piece::Bytes(data) => {
                    bytes += write_data(&image, gpa, &data).map_err(write_error)?;
                    gpa + data.len() as u64
                }
                Piece::Poisoned => {
                    add(&mut poisoned, gpa, page_end - gpa);
                    page_end
                }
                Piece::NoMemory(_) => {
                    add(&mut unreadable, gpa, page_end - gpa);
                    page_end
                }
            };
            progress(done + (gpa - extent.gpa), all);
        }
        done += extent.len;
    }
    let now = vm.again()?;
    image.sync_all().map_err(write_error)?;

    let VmInfo { version, pid, boot, paused, .. } = vm.info;
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let dumped = Dumped {
        version,
        pid,
        boot,
        paused: paused && now.paused,
        memory,
        poisoned,
        unreadable,
        bytes,
        file: name,
        path: file.to_owned(),
    };
    // Plain structs of strings and numbers: their serialisation cannot fail.
    let mut text = serde_json::to_vec_pretty(&dumped).unwrap_or_default();
    text.push(b'\n');
    let mut account = unfinished.create(&list)?;
    account
        .write_all(&text)
        .and_then(|()| account.sync_all())
        .map_err(|source| DumpError::Write { path: list, source })?;
    unfinished.keep();
    Ok(dumped)
}

/// Writes those pages of `data` that are not all zeros, to the offset `gpa` and behind; how many bytes
/// they were.
fn write_data(image: &File, gpa: u64, data: &[u8]) -> io::Result<u64> {
    let (mut at, mut written) = (0, 0);
    while at < data.len() {
        at += leading(&data[at..], true);
        let len = leading(&data[at..], false);
        image.write_all_at(&data[at..at + len], gpa + at as u64)?;
        at += len;
        written += len as u64;
    }
    Ok(written)
}

/// How many bytes of pages of zeros (or, if not `zeros`, of others) `data` begins with.
fn leading(data: &[u8], zeros: bool) -> usize {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    let pages = data.chunks(PAGE);
    pages.take_while(|page| (**page == ZEROS[..page.len()]) == zeros).map(<[u8]>::len).sum()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::api::{MemoryBlock, an_info};
    use crate::cli::parse_number;

    /// What a page of the guest holds.
    enum Content {
        Data(u8),
        Poisoned,
        Gone,
    }

    /// The guest has two blocks of RAM, of 4 and 3 pages; `None` outside of them.
    fn page(number: u64) -> Option<Content> {
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

    fn info(boot: u32, paused: bool) -> (u16, Vec<u8>) {
        let block = |gpa, len| {
            let (hva, fd, fd_offset, shared, page_size) = (0x7000_0000, None, 0, false, 4096);
            MemoryBlock { gpa, len, hva, fd, fd_offset, shared, page_size }
        };
        let memory = vec![block(0, 0x4000), block(0x8000, 0x3000)];
        let info = VmInfo { boot, paused, memory, ..an_info() };
        (200, serde_json::to_vec(&info).unwrap())
    }

    fn refused(status: u16, error: &str) -> (u16, Vec<u8>) {
        (status, serde_json::to_vec(&json!({ "error": error })).unwrap())
    }

    fn memory(gpa: u64, len: u64) -> (u16, Vec<u8>) {
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

    /// The whole guest, paused. Its page 3 has not been touched yet.
    fn answer(what: &str) -> (u16, Vec<u8>) {
        match what.split_once('?') {
            None if what == "vm.info" => info(1, true),
            None if what == "vm.extents" => {
                let extents =
                    json!([{"gpa": "0x0", "len": 0x3000}, {"gpa": "0x8000", "len": 0x3000}]);
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

    /// Serves as many requests, and then goes away.
    fn serve(
        requests: usize,
        answer: impl Fn(usize, &str) -> (u16, Vec<u8>) + Send + 'static,
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
        let dumped = dump(&socket, &file, &mut |done, all| steps.push((done, all))).unwrap();

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
            "version": "", "pid": 1, "boot": 1, "paused": true,
            "memory": [{"gpa": "0x0", "len": 0x4000}, {"gpa": "0x8000", "len": 0x3000}],
            "poisoned": [{"gpa": "0x1000", "len": 0x1000}],
            "unreadable": [{"gpa": "0xa000", "len": 0x1000}],
            "bytes": 0x3000,
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
        dump(&socket, &file, &mut |_, _| {}).unwrap();
        let pages = [0, 2, 9].map(|page| (page * PAGE_SIZE, PAGE_SIZE));
        assert_eq!(data_of(&File::open(&file).unwrap()), pages, "the rest takes no room");
    }

    #[test]
    fn zeros_are_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let image = File::create_new(dir.path().join("image")).unwrap();
        let mut data = vec![0; 4 * PAGE + 100];
        data[2 * PAGE - 1] = 1;
        assert_eq!(write_data(&image, 0x1000, &data).unwrap(), 4096);
        assert_eq!(image.metadata().unwrap().len(), 0x1000 + 0x2000);
        data[4 * PAGE + 99] = 1;
        assert_eq!(write_data(&image, 0x1000, &data).unwrap(), 4096 + 100);
        assert_eq!(write_data(&image, 0, &[]).unwrap(), 0);
        assert!(fs::read(dir.path().join("image")).unwrap()[0x1000..] == data);
    }

    #[test]
    fn bad_pages_in_a_row_are_one_entry() {
        let mut list = Vec::new();
        for gpa in [0x1000, 0x2000, 0x4000] {
            add(&mut list, gpa, 0x1000);
        }
        let expected = [(0x1000, 0x2000), (0x4000, 0x1000)].map(|(gpa, len)| Extent { gpa, len });
        assert_eq!(list, expected);
    }

    #[test]
    fn what_exists_is_refused_and_left_alone() {
        for name in ["image", "image.json"] {
            let (dir, socket) = serve(usize::MAX, |_, what| answer(what));
            let path = dir.path().join(name);
            fs::write(&path, "mine").unwrap();
            let error = dump(&socket, &dir.path().join("image"), &mut |_, _| {}).unwrap_err();
            assert!(
                error.to_string().starts_with(&format!("{} exists", path.display())),
                "{error}"
            );
            assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
            assert_eq!(files(&dir), [name]);
        }
    }

    #[test]
    fn half_an_image_is_removed() {
        let run = |requests, answer: fn(usize, &str) -> (u16, Vec<u8>)| {
            let (dir, socket) = serve(requests, answer);
            let error = dump(&socket, &dir.path().join("image"), &mut |_, _| {}).unwrap_err();
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
        assert!(odd.to_string().contains("0 bytes for 12288"), "{odd}");
    }

    #[test]
    fn an_image_of_a_running_guest_says_so() {
        let (dir, socket) = serve(usize::MAX, |number, what| match what {
            "vm.info" if number > 0 => info(1, false),
            _ => answer(what),
        });
        let dumped = dump(&socket, &dir.path().join("image"), &mut |_, _| {}).unwrap();
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
}
