//! The API: JSON over HTTP/1.1 on a unix socket that only its owner can open.
//!
//! | request | answer |
//! |---|---|
//! | `GET /api/v1/vmm.ping` | version and pid |
//! | `GET /api/v1/vm.info` | [`VmInfo`] |
//! | `GET /api/v1/relay.status` | [`Status`] |
//! | `GET /api/v1/vm.memory?gpa=0x1000&len=64` | guest RAM as bytes, 1 to `len` (at most 4 MiB): up to the first page that cannot be read, or the end of a block. 410 when the first byte is of a bad page, 409 when there is no memory behind it any more |
//! | `GET /api/v1/vm.extents` | an [`Extent`] for each stretch of guest RAM that has memory behind it |
//! | `PUT /api/v1/vm.retire` | body [`Retire`], at most 1 MiB; a [`Retiring`] for each page |
//! | `PUT /api/v1/vm.pause` | 204 when no vCPU is in the guest any more; also if that is so already |
//! | `PUT /api/v1/vm.resume` | 204; the vCPUs go on, whatever they were paused for |
//! | `PUT /api/v1/vm.shutdown` | 204; the VM ends, paused or not |
//!
//! A VM that was paused because a vCPU touched a bad page and cannot be told (`--on-undeliverable
//! pause`) can be resumed like any other. The vCPU touches the page again, and if the guest still
//! cannot be told, the VM is paused again.
//!
//! Errors are `{"error": "…"}` with a status of 4xx or 5xx. It runs on threads of its own and can
//! hold up no vCPU: all it shares with them is the ledger, for as long as it takes to copy it.

use std::io::{self, Read};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use log::debug;
use mce_relay::mca::Vendor;
use mce_relay::{AccessError, AoChannel, Handle, KillPolicy, Pace, Page, Predicted};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tiny_http::{Header, Method, Request, Response, Server};

use crate::cli::parse_number;
use crate::config::OnUndeliverable;
use crate::control::{ExitReason, Parked, PauseReason, StopCause, VmControl};
use crate::ghes::Notify;
use crate::memory::{GuestRam, PAGE_SIZE, RamBlock};
use crate::show;

/// How long an answer waits for the vCPUs to leave the guest. More than a vCPU may be held back by a
/// machine check that other processors have to take part in (five seconds).
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// What its body looks like.
const RETIRE_EXAMPLE: &str = r#"{"gpas":["0x1000","0x2000"]}"#;
/// The one request that has a body.
const RETIRE: &str = "/api/v1/vm.retire";
/// The longest body that a request may have, in bytes.
const MAX_BODY: u64 = 1 << 20;

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Something is at the path already.
    #[error(
        "the API socket's path {path} exists; if no VM uses it any more, remove it, or choose another path",
        path = .0.display()
    )]
    Exists(PathBuf),
    /// The socket could not be made.
    #[error("cannot make the API socket {path}", path = .path.display())]
    Bind {
        /// The path asked for.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The most that one `vm.memory` answers with, in bytes.
pub const MAX_READ: u64 = 4 << 20;
/// The path of `vm.memory`, which takes its time.
const MEMORY: &str = "/api/v1/vm.memory";
const EXTENTS: &str = "/api/v1/vm.extents";

/// A stretch of guest RAM that has memory behind it; the rest reads as zeros. In bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest-physical address of its first byte.
    #[serde(with = "mce_relay::event::hex")]
    pub gpa: u64,
    /// Length.
    pub len: u64,
}

/// One stretch of guest RAM. Addresses and lengths in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBlock {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Length.
    pub len: u64,
    /// Where the VMM has mapped it.
    pub hva: u64,
    /// The descriptor of the file behind it, in the VMM's process; null for anonymous memory.
    pub fd: Option<i32>,
    /// Offset of its first byte in that file.
    pub fd_offset: u64,
    /// Whether a process that maps the file has the same memory.
    pub shared: bool,
    /// The pages that the host keeps it in, and loses as a whole.
    pub page_size: u64,
}

impl From<&RamBlock> for MemoryBlock {
    fn from(block: &RamBlock) -> Self {
        let RamBlock { gpa, len, hva, fd_offset, fd, shared, page_size } = *block;
        Self { gpa, len, hva, fd, fd_offset, shared, page_size }
    }
}

/// What runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmInfo {
    /// The VMM's version.
    pub version: String,
    /// The VMM's process.
    pub pid: u32,
    /// 1 for the first boot of this process, one more after each reset of the guest.
    pub boot: u32,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Whose machine-check architecture the guest sees.
    pub vendor: Vendor,
    /// IA32_MCG_CAP as the guest sees it, `0x…`.
    pub mcg_cap: String,
    /// When the kernel tells the VMM of a bad page.
    pub mce_kill: KillPolicy,
    /// Which way AOs go.
    pub ao_channel: AoChannel,
    /// How the guest is notified of firmware-first records; null when it was given no error source.
    pub ghes: Option<Notify>,
    /// How fast the guest is told of AOs.
    pub ao_pace: Pace,
    /// What is done about an AR that the guest cannot be told of.
    pub on_undeliverable: OnUndeliverable,
    /// Whether the vCPUs are held, or are about to be.
    pub paused: bool,
    /// Why, if they are.
    pub pause_reason: Option<PauseReason>,
    /// Guest RAM, by guest-physical address.
    pub memory: Vec<MemoryBlock>,
}

impl VmInfo {
    /// The block of guest RAM that holds `gpa`.
    pub fn block(&self, gpa: u64) -> Option<&MemoryBlock> {
        self.memory.iter().find(|block| gpa >= block.gpa && gpa - block.gpa < block.len)
    }

    /// Where there is guest RAM, for people.
    #[must_use]
    pub fn ram_in_words(&self) -> String {
        let mut stretches: Vec<(u64, u64)> = Vec::new();
        for block in &self.memory {
            match stretches.last_mut() {
                Some((_, end)) if *end == block.gpa => *end += block.len,
                _ => stretches.push((block.gpa, block.gpa + block.len)),
            }
        }
        let words = stretches.iter().map(|(start, end)| format!("{start:#x} to {:#x}", end - 1));
        words.collect::<Vec<_>>().join(", ")
    }
}

/// What runs, and what became of every bad page of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// What runs.
    pub vm: VmInfo,
    /// The ledger, by guest-physical address.
    pub pages: Vec<Page>,
    /// Pages that are whole and predicted to fail, by guest-physical address.
    pub predicted: Vec<Predicted>,
    /// Pages that were bad in an earlier boot and are so no longer, in the order of their healing.
    pub past: Vec<Page>,
}

/// Which pages the guest is to stop using.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retire {
    /// Guest-physical addresses, each `"0x…"`.
    pub gpas: Vec<Gpa>,
}

/// A guest-physical address, `"0x…"` in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Gpa(#[serde(with = "mce_relay::event::hex")] pub u64);

/// Whether the guest is being asked to stop using a page.
#[derive(Debug, Serialize, Deserialize)]
pub struct Retiring {
    /// Guest-physical address of the page.
    pub gpa: Gpa,
    /// Why it is not, or null.
    pub error: Option<String>,
}

#[derive(Serialize)]
struct Ping {
    version: &'static str,
    pid: u32,
}

#[derive(Serialize)]
struct Problem {
    error: String,
}

/// The virtual machine as the API sees it; it changes with every boot.
#[derive(Clone)]
pub struct Running {
    /// What runs; whether it is paused is looked up when somebody asks.
    pub info: VmInfo,
    /// Its relay, with the ledger.
    pub relay: Handle,
    /// Its reins.
    pub control: VmControl,
    /// Its memory.
    pub ram: Arc<GuestRam>,
}

impl Running {
    fn info(&self) -> VmInfo {
        let pause_reason = self.control.paused();
        VmInfo { paused: pause_reason.is_some(), pause_reason, ..self.info.clone() }
    }
}

/// Shared between the VM's owner and the API's threads; `None` between two boots.
#[derive(Clone, Default)]
pub struct Current(Arc<Mutex<Option<Running>>>);

impl Current {
    /// Says what runs now.
    pub fn set(&self, running: Option<Running>) {
        *self.lock() = running;
    }

    fn get(&self) -> Option<Running> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        // A plain assignment is all that ever happens under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The API's server. Dropping it ends its thread and removes the socket.
pub struct Api {
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl Api {
    /// Makes the socket at `path`, with mode 0600, and serves it.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn start(path: &Path, current: Current) -> Result<Self, ApiError> {
        if path.symlink_metadata().is_ok() {
            return Err(ApiError::Exists(path.to_owned()));
        }
        let bind_error = |source| ApiError::Bind { path: path.to_owned(), source };
        let listener = {
            // SAFETY: umask takes no pointer. It is the process's, so this is done before the VM
            // makes any other file.
            let before = unsafe { libc::umask(0o177) };
            let listener = UnixListener::bind(path);
            // SAFETY: as above.
            unsafe { libc::umask(before) };
            listener.map_err(bind_error)?
        };
        let server = Server::from_listener(listener, None)
            .map_err(|error| bind_error(io::Error::other(error.to_string())))?;
        let server = Arc::new(server);
        let serving = Arc::clone(&server);
        let thread = std::thread::Builder::new()
            .name("api".into())
            .spawn(move || {
                for request in serving.incoming_requests() {
                    if ![RETIRE, MEMORY, EXTENTS].contains(&path_of(&request)) {
                        answer(request, &current);
                        continue;
                    }
                    // It has a body, or takes its time. Whoever is slow holds up nobody else.
                    let current = current.clone();
                    let slow = move || answer(request, &current);
                    if let Err(error) = std::thread::Builder::new().spawn(slow) {
                        debug!("cannot start a thread for an API request: {error}");
                    }
                }
            })
            .map_err(bind_error)?;
        Ok(Self { server, thread: Some(thread), path: path.to_owned() })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.server.unblock();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn path_of(request: &Request) -> &str {
    request.url().split('?').next().unwrap_or_default()
}

fn answer(mut request: Request, current: &Current) {
    let path = path_of(&request).to_owned();
    let none = || problem(503, "the guest is between two boots; ask again".to_owned());
    let response = match (request.method(), path.as_str()) {
        (Method::Get, "/api/v1/vmm.ping") => {
            json(200, &Ping { version: env!("CARGO_PKG_VERSION"), pid: std::process::id() })
        }
        (Method::Get, "/api/v1/vm.info") => {
            current.get().map_or_else(none, |running| json(200, &running.info()))
        }
        (Method::Get, "/api/v1/relay.status") => current.get().map_or_else(none, |running| {
            let (pages, predicted) = (running.relay.pages(), running.relay.predicted());
            json(200, &Status { pages, predicted, past: running.relay.past(), vm: running.info() })
        }),
        (Method::Get, MEMORY) => current
            .get()
            .map_or_else(none, |running| read_memory(&running.relay, request.url(), &running.info)),
        (Method::Get, EXTENTS) => current.get().map_or_else(none, |running| extents(&running)),
        (Method::Put, RETIRE) => current.get().map_or_else(none, |running| {
            match body::<Retire>(&mut request, RETIRE_EXAMPLE) {
                Ok(Retire { gpas }) => json(200, &retire(&running.relay, &gpas)),
                Err(error) => problem(400, error),
            }
        }),
        (Method::Put, "/api/v1/vm.shutdown") => current.get().map_or_else(none, |running| {
            let cause = StopCause::Request("the API".to_owned());
            running.control.stop(ExitReason::Stopped(cause));
            done()
        }),
        (Method::Put, "/api/v1/vm.pause") => {
            current.get().map_or_else(none, |running| pause(&running.control, PAUSE_PATIENCE))
        }
        (Method::Put, "/api/v1/vm.resume") => current.get().map_or_else(none, |running| {
            running.control.resume();
            done()
        }),
        (
            _,
            "/api/v1/vmm.ping"
            | "/api/v1/vm.info"
            | "/api/v1/relay.status"
            | MEMORY
            | EXTENTS
            | RETIRE
            | "/api/v1/vm.pause"
            | "/api/v1/vm.resume"
            | "/api/v1/vm.shutdown",
        ) => problem(405, format!("{path} does not take the method {}", request.method())),
        _ => problem(404, format!("there is nothing at {path}")),
    };
    if let Err(error) = request.respond(response) {
        debug!("API client went away: {error}");
    }
}

/// The body of a request, as JSON of the form that `example` shows.
fn body<T: DeserializeOwned>(request: &mut Request, example: &str) -> Result<T, String> {
    let mut body = Vec::new();
    let read = request.as_reader().take(MAX_BODY + 1).read_to_end(&mut body);
    read.map_err(|error| format!("the body cannot be read: {error}"))?;
    if body.len() as u64 > MAX_BODY {
        return Err(format!("the body is longer than {MAX_BODY} bytes"));
    }
    serde_json::from_slice(&body)
        .map_err(|error| format!("the body is not understood: {error}; expected {example}"))
}

/// `gpa` and `len` of `…?gpa=0x1000&len=64`.
fn stretch(url: &str) -> Result<(u64, u64), String> {
    const EXPECTED: &str = "expected ?gpa=0x1000&len=64";
    let (mut gpa, mut len) = (None, None);
    let query = url.split_once('?').map_or("", |(_, query)| query);
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let number = parse_number(value).map_err(|error| format!("{key}: {error}"))?;
        let place = match key {
            "gpa" => &mut gpa,
            "len" => &mut len,
            _ => return Err(format!("{key:?} is not understood; {EXPECTED}")),
        };
        *place = Some(number);
    }
    match (gpa, len) {
        (Some(gpa), Some(len @ 1..=MAX_READ)) => Ok((gpa, len)),
        (Some(_), Some(len)) => Err(format!("len is {len}; expected 1 to {MAX_READ}")),
        _ => Err(format!("gpa or len is missing; {EXPECTED}")),
    }
}

fn read_memory(relay: &Handle, url: &str, vm: &VmInfo) -> Response<io::Cursor<Vec<u8>>> {
    let (gpa, len) = match stretch(url) {
        Ok(stretch) => stretch,
        Err(error) => return problem(400, error),
    };
    // At most MAX_READ.
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    match relay.read(gpa, &mut bytes) {
        Ok(read) => {
            bytes.truncate(read);
            let response = Response::from_data(bytes).with_status_code(200);
            match Header::from_bytes("Content-Type", "application/octet-stream") {
                Ok(header) => response.with_header(header),
                Err(()) => response,
            }
        }
        Err(error @ AccessError::Poisoned { .. }) => problem(410, error.to_string()),
        Err(error @ AccessError::NotRam { .. }) => {
            problem(400, format!("{error}; this guest has {}", vm.ram_in_words()))
        }
        Err(error @ AccessError::NoMemory { .. }) => problem(409, show::with_causes(&error)),
    }
}

/// What has memory behind it, and what is bad: where the kernel shows a bad page as no page at all,
/// the ledger knows it.
fn extents(running: &Running) -> Response<io::Cursor<Vec<u8>>> {
    let mut extents = match running.ram.extents() {
        Ok(extents) => extents,
        Err(error) => return problem(500, format!("cannot look at the memory: {error}")),
    };
    extents.extend(running.relay.pages().iter().map(|page| (page.gpa, PAGE_SIZE)));
    extents.extend(running.ram.removed());
    extents.sort_unstable();
    let mut all: Vec<Extent> = Vec::new();
    for (gpa, len) in extents {
        match all.last_mut() {
            Some(last) if last.gpa + last.len >= gpa => {
                last.len = last.len.max(gpa + len - last.gpa);
            }
            _ => all.push(Extent { gpa, len }),
        }
    }
    json(200, &all)
}

fn retire(relay: &Handle, gpas: &[Gpa]) -> Vec<Retiring> {
    let ask = |gpa: &Gpa| {
        let error = relay.retire(gpa.0).err().map(|error| error.to_string());
        Retiring { gpa: *gpa, error }
    };
    gpas.iter().map(ask).collect()
}

fn pause(control: &VmControl, patience: Duration) -> Response<io::Cursor<Vec<u8>>> {
    control.request_pause(PauseReason::Request);
    match control.wait_parked(patience) {
        Parked::All => done(),
        Parked::Not(vcpus) => problem(
            503,
            format!(
                "the pause is on its way, but {vcpus} of the vCPUs have not stopped yet; ask again"
            ),
        ),
        Parked::Unpaused => {
            problem(503, "the VM ended or was resumed before it had paused; ask again".to_owned())
        }
    }
}

/// There is nothing to say but that it is done.
fn done() -> Response<io::Cursor<Vec<u8>>> {
    Response::from_data(Vec::new()).with_status_code(204)
}

fn problem(status: u16, error: String) -> Response<io::Cursor<Vec<u8>>> {
    json(status, &Problem { error })
}

fn json(status: u16, body: &impl Serialize) -> Response<io::Cursor<Vec<u8>>> {
    // Plain structs of strings and numbers: their serialisation cannot fail.
    let body = serde_json::to_vec(body).unwrap_or_default();
    let response = Response::from_data(body).with_status_code(status);
    match Header::from_bytes("Content-Type", "application/json") {
        Ok(header) => response.with_header(header),
        Err(()) => response,
    }
}

/// For tests: a VM without RAM.
#[cfg(test)]
pub(crate) fn an_info() -> VmInfo {
    VmInfo {
        version: String::new(),
        pid: 1,
        boot: 1,
        vcpus: 1,
        vendor: Vendor::Amd,
        mcg_cap: "0x10a".into(),
        mce_kill: KillPolicy::Early,
        ao_channel: AoChannel::Auto,
        ghes: None,
        ao_pace: Pace::default(),
        on_undeliverable: OnUndeliverable::Stop,
        paused: false,
        pause_reason: None,
        memory: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::client;

    #[test]
    fn a_path_that_exists_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        std::fs::write(&path, "mine").unwrap();
        let error = Api::start(&path, Current::default()).err().unwrap();
        assert!(matches!(error, ApiError::Exists(_)), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn the_socket_is_its_owners_and_goes_with_the_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let api = Api::start(&path, Current::default()).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let ping: serde_json::Value = client::get(&path, "vmm.ping").unwrap();
        assert_eq!(ping["pid"], std::process::id());
        let error = client::get::<VmInfo>(&path, "vm.info").unwrap_err().to_string();
        assert!(error.contains("between two boots"), "{error}");
        let error = client::get::<VmInfo>(&path, "nothing").unwrap_err().to_string();
        assert!(error.contains("/api/v1/nothing"), "{error}");
        let error = client::put(&path, "vmm.ping").unwrap_err().to_string();
        assert!(error.contains("PUT"), "{error}");
        for what in ["vm.pause", "vm.resume", "vm.retire", "vm.shutdown"] {
            let error = client::put(&path, what).unwrap_err().to_string();
            assert!(error.contains("between two boots"), "{what}: {error}");
            let error = client::get::<()>(&path, what).unwrap_err().to_string();
            assert!(error.contains("GET"), "{what}: {error}");
        }
        drop(api);
        assert!(!path.exists());
    }

    #[test]
    fn a_body_is_understood_or_refused_with_a_reason() {
        let body = |text: &'static str| {
            let mut request = tiny_http::TestRequest::new().with_body(text).into();
            body::<Retire>(&mut request, RETIRE_EXAMPLE).map(|retire| retire.gpas)
        };
        assert_eq!(body(r#"{"gpas":["0x1000","0x2000"]}"#), Ok(vec![Gpa(0x1000), Gpa(0x2000)]));
        for (bad, named) in [
            ("", "EOF"),
            ("{", "EOF"),
            ("[]", "gpas"),
            (r#"{"gpas":["4096"]}"#, "4096"),
            (r#"{"gpas":[4096]}"#, "4096"),
            (r#"{"gpas":["0x1ffffffffffffffff"]}"#, "0x1ffffffffffffffff"),
            (r#"{"gpas":[],"more":1}"#, "more"),
        ] {
            let error = body(bad).unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
        // Blanks are JSON, too.
        let blanks: &str = Box::leak(" ".repeat((1 << 20) + 2).into_boxed_str());
        let mut long = tiny_http::TestRequest::new().with_body(blanks).into();
        assert!(
            super::body::<Retire>(&mut long, RETIRE_EXAMPLE)
                .unwrap_err()
                .contains("longer than 1048576")
        );
    }

    #[test]
    fn a_stretch_of_memory_is_understood_or_refused_with_a_reason() {
        let at = |query: &str| stretch(&format!("{MEMORY}{query}"));
        assert_eq!(at("?gpa=0x1000&len=64"), Ok((0x1000, 64)));
        assert_eq!(at("?len=4M&gpa=0"), Ok((0, MAX_READ)));
        for (bad, named) in [
            ("", "missing"),
            ("?", "missing"),
            ("?gpa=0x1000", "missing"),
            ("?gpa=0x1000&len=0", "len is 0"),
            ("?gpa=0x1000&len=4194305", "4194305"),
            ("?gpa=x&len=1", "\"x\""),
            ("?gpa=0x1000&len=1&raw=1", "\"raw\""),
            ("?gpa=-1&len=1", "\"-1\""),
        ] {
            let error = at(bad).unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }

    #[test]
    fn a_client_that_does_not_send_its_body_holds_up_nobody() {
        use std::io::Write;
        use std::os::unix::net::UnixStream;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let _api = Api::start(&path, Current::default()).unwrap();
        let mut stuck = UnixStream::connect(&path).unwrap();
        write!(stuck, "PUT {RETIRE} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
            .unwrap();
        for _ in 0..3 {
            client::get::<serde_json::Value>(&path, "vmm.ping").unwrap();
        }
    }

    #[test]
    fn a_pause_that_does_not_come_about_is_no_success() {
        crate::vcpu::install_kick_handler();
        let control = VmControl::new(1).unwrap();
        // A vCPU that does not stop.
        control.enrol(0);
        assert_eq!(pause(&control, Duration::from_millis(5)).status_code(), 503);
        assert!(control.paused().is_some(), "it is asked for all the same");
        control.leave(0);
        assert_eq!(pause(&control, Duration::from_millis(5)).status_code(), 204);
        control.stop(ExitReason::PowerOff);
        assert_eq!(pause(&control, Duration::from_millis(5)).status_code(), 503);
    }
}
