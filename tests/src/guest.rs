//! A guest under `mce-relay run`, started and watched as a user would.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, FormatDriverBuilder, Storage, StorageCreateOptions};
use mce_relay_cli::client::requests;
use mce_relay_cli::poison::host::hwpoison_inject;
use mce_relay_vmm::api::types::vm::VmInfo;
use mce_relay_vmm::host::page_frames;
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, PATIENCE, Page, hex};
use crate::lab;
use crate::spinning::Nobody;

/// The guest kernel's command line. A slow console makes a machine check slow, so it says little.
/// noxsave: the emulated host lets guests change XCR0 without KVM noticing.
const CMDLINE: &str = "loglevel=4 panic=-1 noxsave";
/// Where the guest's kernel logs to.
const SERIAL: &str = "console=ttyS0,115200";
/// The same where a line is to cost the guest little.
const HVC: &str = "console=hvc0";
/// For bursts: each line on the console costs the guest milliseconds, and its log has to hold three
/// lines a page. The last `loglevel` counts.
const QUIET: &str = "loglevel=0 log_buf_len=4M";

/// The middle of the guest's RAM: free memory from the first moment on, as far as can be from the
/// kernel and the initramfs, from where Linux begins to allocate.
pub const MIDDLE: u64 = 128 << 20;

/// Where guest-image/build.sh puts the guest's image, below `target/`.
const IMAGE: &str = "guest-image";

/// The same with the newest kernel; tests/soak.sh has it built.
pub const NEWEST: &str = "guest-image-newest";

/// Where guest-image/debian.sh puts the Debian guest.
pub const DEBIAN: &str = "guest-image/debian";

/// The [`Options::initramfs`] of a guest that has a crash kernel.
pub const WITH_CRASH_KERNEL: &str = "initramfs-crash.cpio";

/// What to boot.
#[derive(Debug, Clone)]
pub struct Options {
    /// `--cpu-vendor`.
    pub vendor: &'static str,
    /// `--cpus`.
    pub cpus: usize,
    /// `--lmce`.
    pub lmce: &'static str,
    /// `--memory`; not given when empty.
    pub memory: &'static str,
    /// `--memory-zone`, once for each.
    pub zones: &'static [&'static str],
    /// `--mce-kill`.
    pub kill: &'static str,
    /// `--on-undeliverable`, if it is to be given.
    pub on_undeliverable: Option<&'static str>,
    /// `--ao-pace`, if it is to be given.
    pub pace: Option<&'static str>,
    /// `--rescue`, if it is to be given.
    pub rescue: Option<&'static str>,
    /// `--ao-channel`.
    pub ao_channel: &'static str,
    /// `--ghes-poll`, if it is to be given.
    pub ghes_poll: Option<&'static str>,
    /// Run the VMM in this cgroup.
    pub cgroup: Option<PathBuf>,
    /// Let the host's KSM join pages of the VMM's.
    pub merge: bool,
    /// Run the VMM as this user.
    pub user: Option<Nobody>,
    /// Give it a virtio console and a source of random bytes, and a shell on its first serial port: sockets `hvc` and
    /// `shell` in the VMM's directory.
    pub virtio: bool,
    /// `--net`; not given when empty.
    pub net: &'static str,
    /// Give it a disk, in the file `disk` in the VMM's directory.
    pub disk: Option<DiskImage>,
    /// Give it virtio sockets, whose host side is the socket `vsock` in the VMM's directory.
    pub vsock: bool,
    /// Start the guest again when it resets itself (without `--no-reboot`).
    pub reboot: bool,
    /// More words for the guest kernel's command line.
    pub cmdline: &'static str,
    /// Nothing on the guest's console, a large log in it, and no line of that on the agent's port:
    /// for bursts.
    pub quiet: bool,
    /// With `quiet`: what the guest's kernel has to say of bad pages it says on the virtio console, and so the VMM knows when
    /// it is done with each.
    pub says_when_done: bool,
    /// The directory of the guest's image below `target/` (`GUEST_IMAGE_DIR` of guest-image/build.sh).
    pub image: &'static str,
    /// Its initramfs there.
    pub initramfs: &'static str,
    /// Pass the guest's kernel log and the relay's account on, for people to watch.
    pub echo: bool,
}

impl Options {
    /// An AMD guest. As its AOs are told by machine check, they wait for its poll.
    pub fn amd(cpus: usize) -> Self {
        Self {
            vendor: "amd",
            cpus,
            lmce: "on",
            memory: "size=256M,shared=on",
            zones: &[],
            kill: "early",
            on_undeliverable: None,
            pace: None,
            rescue: None,
            ao_channel: "mce",
            ghes_poll: None,
            cgroup: None,
            merge: false,
            user: None,
            virtio: false,
            net: "",
            disk: None,
            vsock: false,
            reboot: false,
            cmdline: "",
            quiet: false,
            says_when_done: false,
            image: IMAGE,
            initramfs: "initramfs.cpio",
            echo: false,
        }
    }

    /// An Intel-style guest that has every vCPU called for each error, or, with `lmce`, one.
    pub fn intel(cpus: usize, lmce: bool) -> Self {
        Self { vendor: "intel", lmce: if lmce { "on" } else { "off" }, ..Self::amd(cpus) }
    }

    /// The same, with errors taken only when the guest touches them.
    pub fn late(self) -> Self {
        Self { kill: "late", ..self }
    }

    /// The same, with AOs told by firmware-first records.
    pub fn ghes(self) -> Self {
        Self { ao_channel: "ghes", ..self }
    }

    /// The same, for bursts.
    pub fn quiet(self) -> Self {
        Self { quiet: true, ..self }
    }

    fn file(&self, name: &str) -> PathBuf {
        match self.image {
            DEBIAN => below_target(DEBIAN).join(name),
            other => small(other).join(name),
        }
    }

    fn kernel_words(&self) -> String {
        let quiet = if self.quiet { QUIET } else { "" };
        // The last one counts.
        let (console, says) = match self.says_when_done {
            true => (HVC, "loglevel=4"),
            false => (SERIAL, ""),
        };
        let shell = if self.virtio { "mce_relay.shell" } else { "" };
        format!("{console} {CMDLINE} {quiet} {says} {shell} {}", self.cmdline)
    }
}

/// What is in the file of a guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskImage {
    /// Its bytes.
    Raw,
    /// A qcow2 image.
    Qcow2,
    /// The Debian guest's own, a copy of it.
    Debian,
}

/// Length of such a disk, in bytes.
const DISK_LEN: u64 = 64 << 20;

/// Fills a buffer with what a disk has from an offset on.
pub type DiskReader = Box<dyn Fn(&mut [u8], u64)>;

impl DiskImage {
    fn words(self) -> &'static str {
        match self {
            Self::Raw | Self::Debian => "image_type=raw",
            Self::Qcow2 => "image_type=qcow2",
        }
    }

    fn create(self, path: &Path) {
        match self {
            Self::Raw => std::fs::File::create(path).unwrap().set_len(DISK_LEN).unwrap(),
            Self::Debian => {
                let image = below_target(DEBIAN).join("disk.img");
                // Half of it is holes, and where it goes is memory.
                let copy = Command::new("cp").arg("--sparse=always").arg(image).arg(path).output();
                let copy = copy.unwrap();
                assert!(copy.status.success(), "{}", String::from_utf8_lossy(&copy.stderr));
            }
            Self::Qcow2 => {
                let options = StorageCreateOptions::new().filename(path);
                let file = imago::file::File::create_open(options).unwrap();
                Qcow2::<_>::create_builder(file).size(DISK_LEN).create().unwrap();
            }
        }
    }

    /// Reads such an image that nobody writes to any more.
    pub fn reader(self, file: std::fs::File) -> DiskReader {
        match self {
            Self::Raw | Self::Debian => Box::new(move |to, at| file.read_exact_at(to, at).unwrap()),
            Self::Qcow2 => {
                let file = imago::file::File::try_from(file).unwrap();
                let image = Qcow2::<imago::file::File>::builder(file);
                let image = image.open(imago::DenyImplicitOpenGate::default()).unwrap();
                let image = imago::FormatAccess::new(image);
                Box::new(move |to, at| image.read(to, at).unwrap())
            }
        }
    }
}

/// The `mce-relay` binary, next to the test that runs (or MCE_RELAY_BIN).
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("MCE_RELAY_BIN") {
        return path.into();
    }
    let me = std::env::current_exe().unwrap();
    let near = me.ancestors().skip(1).map(|dir| dir.join("mce-relay"));
    near.take(3).find(|path| path.is_file()).expect("target/release/mce-relay; run `make build`")
}

/// The directory `dir` of what was built.
pub fn below_target(dir: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(dir)
}

/// The directory of a small guest: MCE_RELAY_GUEST_IMAGE has every scenario boot another one than its own, `image`.
fn small(image: &str) -> PathBuf {
    let other = std::env::var("MCE_RELAY_GUEST_IMAGE");
    below_target(other.as_deref().unwrap_or(image))
}

/// Whether the small guest's kernel splits a huge page of its own without a look at all of it. Since Linux 6.12 it looks for
/// pages of zeros there (`try_to_map_unused_to_zeropage`, mm/migrate.c), also when it splits the page because a part
/// of it is bad: where the others are bad as well and it was not told of them yet, that is its end.
pub fn splits_unread() -> Result<(), String> {
    let words = std::fs::read_to_string(small(IMAGE).join("version"));
    let words =
        words.map_err(|error| format!("the guest image does not say its kernel: {error}"))?;
    let mut numbers = words.split('.').map_while(|number| number.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < (6, 12) => Ok(()),
        _ => Err(format!(
            "Linux {} reads all of a huge page of its own when it splits it, and panics where all of it is bad",
            words.trim()
        )),
    }
}

/// A file of the guest image.
pub fn image(name: &str) -> PathBuf {
    below_target(IMAGE).join(name)
}

/// Whether the guest image [`NEWEST`] is there.
pub fn has_newest() -> Result<(), String> {
    match below_target(NEWEST).join("initramfs.cpio").is_file() {
        true => Ok(()),
        false => Err(format!("there is no target/{NEWEST}; make soak builds it")),
    }
}

/// Whether the Debian guest is there.
pub fn has_debian() -> Result<(), String> {
    match below_target(DEBIAN).join("disk.img").is_file() {
        true => Ok(()),
        false => Err(format!("there is no target/{DEBIAN}; make guest-image-debian builds it")),
    }
}

/// Whether the guest image has a crash kernel in it, which the agent's `kexec` loads.
pub fn has_crash_kernel() -> Result<(), String> {
    match Options::amd(1).file(WITH_CRASH_KERNEL).is_file() {
        true => Ok(()),
        false => Err(format!(
            "there is no {WITH_CRASH_KERNEL}: the guest's kernel was given as a vmlinux; give a vmlinuz or a package"
        )),
    }
}

/// Runs `mce-relay` with `args` to its end.
pub fn mce_relay(args: &[&str]) -> Output {
    Command::new(binary()).args(args).stdin(Stdio::null()).output().unwrap()
}

/// What is said of a guest whose agent does not answer.
const DID_NOT: &str = "the guest did not come up";

/// A VMM with its guest. Dropping it kills it, and prints what is known if a test is failing.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    dir: TempDir,
    /// The host's page frames that were poisoned for it.
    poisoned: RefCell<Vec<u64>>,
    options: Options,
}

impl Vmm {
    /// Starts it, and waits only until its API answers: the guest is at the beginning of its boot.
    pub fn start(options: &Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let argument = |form: &str, name: &str| format!("{form}={}", at(name).display());
        let log = std::fs::File::create(at("log")).unwrap();
        let (program, kernel) = (binary(), options.file("vmlinux"));
        let initramfs = options.file(options.initramfs);
        let (mut command, [kernel, initramfs]) = match options.user {
            None => (Command::new(program), [kernel, initramfs]),
            Some(user) => {
                let files = [program.as_path(), &kernel, &initramfs];
                let [program, kernel, initramfs] = user.settle(dir.path(), files);
                (user.command(&program, dir.path()), [kernel, initramfs])
            }
        };
        command
            .arg("-v")
            .arg("run")
            .args(["--kernel".as_ref(), kernel.as_os_str()])
            .args(["--initramfs".as_ref(), initramfs.as_os_str()])
            .args(["--cmdline", &options.kernel_words()])
            .args(["--cpus", &options.cpus.to_string()])
            .args(options.zones.iter().flat_map(|zone| ["--memory-zone", zone]))
            .args(["--cpu-vendor", options.vendor, "--lmce", options.lmce])
            .args(["--mce-kill", options.kill, "--ao-channel", options.ao_channel])
            .args(["--serial2", &argument("socket", "agent")])
            .args(["--api-socket", &argument("path", "api")])
            .args(["--event-monitor", &argument("path", "events")]);
        if options.vsock || !options.net.is_empty() {
            // Where the rings are is for those who want to see them go bad.
            command.env("RUST_LOG", "info,mce_relay_vmm::machine::devices::virtio::worker=debug");
        }
        if options.virtio {
            command.args(["--serial", &argument("socket", "shell")]);
            command.args(["--console", &argument("socket", "hvc"), "--rng", "src=/dev/urandom"]);
        } else {
            command.args(["--serial", &argument("file", "console")]);
        }
        if let Some(disk) = options.disk {
            disk.create(&at("disk"));
            command.args(["--disk", &format!("{},{}", argument("path", "disk"), disk.words())]);
        }
        if !options.reboot {
            command.arg("--no-reboot");
        }
        for (option, value) in [
            ("--memory", Some(options.memory).filter(|memory| !memory.is_empty())),
            ("--net", Some(options.net).filter(|net| !net.is_empty())),
            ("--on-undeliverable", options.on_undeliverable),
            ("--ao-pace", options.pace),
            ("--rescue", options.rescue),
            ("--ghes-poll", options.ghes_poll),
        ] {
            command.args(value.map(|value| [option, value]).into_iter().flatten());
        }
        if let Some(cgroup) = &options.cgroup {
            lab::start_in(&mut command, cgroup);
        }
        if options.vsock {
            command.args(["--vsock", &format!("cid=3,{}", argument("socket", "vsock"))]);
        }
        if options.merge {
            lab::start_merging(&mut command);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(if options.echo { Stdio::piped() } else { log.into() })
            .spawn()
            .unwrap();
        if let Some(stderr) = child.stderr.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    // Without the time and the level that a log line begins with.
                    let words = line.split_once("] ").map_or(&*line, |(_, words)| words);
                    println!("  relay | {words}");
                }
            });
        }
        let mut vmm = Self { child, dir, poisoned: RefCell::default(), options: options.clone() };
        let start = Instant::now();
        while let Err(error) = requests::get::<VmInfo>(&vmm.at("api"), "vm.info") {
            let ended = vmm.child.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "the VMM does not answer: {error}, exit status {ended:?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        vmm
    }

    /// Waits for the guest's agent.
    pub fn up(self) -> Guest {
        match self.agent() {
            Ok(agent) => Guest { vmm: self, agent },
            Err(error) => self.did_not_come_up(DID_NOT, &error),
        }
    }

    /// Says what the VMM's threads do, and the lab's processors.
    fn look(&self) {
        println!("--- threads of the VMM, twice with a second between");
        for _ in 0..2 {
            println!("{}", lab::threads(self.pid()));
            std::thread::sleep(Duration::from_secs(1));
        }
        println!("--- the lab's processors, ten times\n{}", lab::processors(10));
    }

    fn did_not_come_up(&self, what: &str, error: &str) -> ! {
        self.look();
        panic!("{what}: {error}")
    }

    fn agent(&self) -> Result<Agent, String> {
        Agent::connect(&self.at("agent"), !self.options.quiet, self.options.echo)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path in a directory that goes with the VMM.
    pub fn path(&self, name: &str) -> PathBuf {
        self.at(name)
    }

    /// `--ao-channel` as it was given.
    pub fn ao_channel(&self) -> &'static str {
        self.options.ao_channel
    }

    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What runs, as the API says.
    pub fn info(&self) -> VmInfo {
        requests::get(&self.at("api"), "vm.info").unwrap()
    }

    /// The same; `None` between two boots.
    pub fn try_info(&self) -> Option<VmInfo> {
        requests::get(&self.at("api"), "vm.info").ok()
    }

    /// `PUT /api/v1/<what>`.
    pub fn put(&self, what: &str) {
        requests::put(&self.at("api"), what).unwrap();
    }

    /// Runs `mce-relay <command> --api-socket … args`; a command may be of two words.
    pub fn command(&self, command: &str, args: &[&str]) -> Output {
        let socket = format!("path={}", self.at("api").display());
        let mut all: Vec<&str> = command.split(' ').collect();
        all.extend(["--api-socket", &socket]);
        all.extend(args);
        mce_relay(&all)
    }

    /// Starts the same and does not wait for it.
    pub fn spawn(&self, command: &str, args: &[&str]) -> Child {
        let socket = format!("path={}", self.at("api").display());
        let mut tool = Command::new(binary());
        tool.args([command, "--api-socket", &socket]).args(args);
        tool.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        tool.spawn().unwrap()
    }

    /// Poisons the host's page behind `gpa`; the command's account of it.
    ///
    /// The kernel says EBUSY where somebody has the page at that moment (a system call of a device's, a queue of the
    /// kernel's for its lists of pages), after it has marked it, taken it out of the page tables and told who has it mapped.
    /// It is bad all the same.
    pub fn poison(&self, gpa: u64, via: &str) -> Value {
        let out = self.command("poison", &["--gpa", &format!("{gpa:#x}"), "--via", via, "--json"]);
        let words = String::from_utf8_lossy(&out.stderr);
        let is_marked =
            words.contains("is marked as poisoned") && words.contains("Device or resource busy");
        assert!(out.status.success() || is_marked, "{words}");
        if is_marked {
            println!("    {gpa:#x} was in use when it was poisoned");
        }
        let done: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        if !done["pfn"].is_null() {
            self.poisoned.borrow_mut().push(hex(&done["pfn"]));
        }
        done
    }

    /// Poisons the host's pages behind `gpas` as fast as the kernel takes them, and sees that it is
    /// done; how long the kernel took, on the host's clock.
    pub fn poison_many(&self, gpas: &[u64]) -> Duration {
        let vm = self.info();
        let pages = lab::Pagemap::of(vm.pid);
        let pfns: Vec<u64> = gpas.iter().map(|gpa| pages.physical(hva(&vm, *gpa)) >> 12).collect();
        let words: Vec<String> = pfns.iter().map(|pfn| format!("{pfn:#x}")).collect();
        self.poisoned.borrow_mut().extend(&pfns);
        let mut corrupt =
            OpenOptions::new().write(true).open(hwpoison_inject::CORRUPT_PFN).unwrap();
        let start = Instant::now();
        for word in &words {
            // Each write is a command of its own, wherever in the file it goes.
            if let Err(error) = corrupt.write_all(word.as_bytes()) {
                // As with `poison`: whether it is marked is seen below.
                assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{word}: {error}");
            }
        }
        let took = start.elapsed();
        for pfn in pfns {
            assert!(
                page_frames::is_poisoned(pfn).unwrap(),
                "host pfn {pfn:#x} is not marked as poisoned"
            );
        }
        took
    }

    /// Guest RAM as the VMM has it: what is written there the guest finds, and the other way round.
    pub fn memory(&self, gpa: u64) -> GuestMemory {
        let vm = self.info();
        let block = vm.block(gpa).unwrap_or_else(|| panic!("{gpa:#x} is not guest RAM"));
        let path = format!("/proc/{}/mem", vm.pid);
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        GuestMemory { file, offset: block.hva + (gpa - block.gpa) }
    }

    /// A page that the guest never wrote, with memory: it is clean for the host, whose kernel takes it away
    /// without a signal to anybody.
    pub fn clean_page(&self) -> Page {
        let vm = self.info();
        let untouched = |gpa: &u64| !lab::is_resident(vm.pid, hva(&vm, *gpa));
        let gpa = (MIDDLE..MIDDLE + (64 << 20)).step_by(4096).find(untouched);
        let page =
            Page { number: u64::MAX, gpa: gpa.expect("a page that the guest never touched") };
        // A read gives it memory, and leaves it clean.
        lab::read_memory(vm.pid, hva(&vm, page.gpa)).unwrap();
        page
    }

    /// What `mce-relay status --json` says.
    pub fn status(&self) -> Value {
        let out = self.command("status", &["--json"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// The ledger's pages.
    pub fn pages(&self) -> Vec<Value> {
        match self.status()["pages"].take() {
            Value::Array(pages) => pages,
            other => panic!("{other} is not a list of pages"),
        }
    }

    /// Waits until the ledger has `count` pages; the ledger.
    pub fn known(&self, count: usize) -> Vec<Value> {
        let start = Instant::now();
        loop {
            let pages = self.pages();
            if pages.len() >= count || start.elapsed() > PATIENCE {
                return pages;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The ledger's entry for `page`.
    pub fn ledger(&self, page: Page) -> Option<Value> {
        self.pages().into_iter().find(|entry| hex(&entry["gpa"]) == page.gpa)
    }

    /// The VMM's events so far.
    pub fn events(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.at("events")).unwrap();
        // The last line may be half written.
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for the event `name` about `page`; its properties.
    pub fn event(&self, name: &str, page: Page) -> Value {
        self.event_where(name, &format!("{:#x}", page.gpa), |properties| {
            properties.get("gpa").is_some_and(|gpa| hex(gpa) == page.gpa)
        })
    }

    /// Waits for an event `name` that `wanted` accepts (`what` says what that is); its properties.
    pub fn event_where(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let found = self
                .events()
                .into_iter()
                .find(|event| event["event"] == name && wanted(&event["properties"]));
            match found {
                Some(event) => return event["properties"].clone(),
                None if start.elapsed() > PATIENCE => {
                    panic!("no event {name:?} for {what}: {:#?}", self.events())
                }
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Where queue `index` of the virtio device `name` was when its driver began last: its descriptors, the driver's ring
    /// and the device's. Known where there is a `net` or `vsock`.
    pub fn rings(&self, name: &str, index: usize) -> [u64; 3] {
        let log = std::fs::read_to_string(self.at("log")).unwrap();
        let begin = format!("virtio-{name}: queue {index} has ");
        let line = log.lines().rev().find(|line| line.contains(&begin));
        let line = line.unwrap_or_else(|| panic!("{begin:?} is not in {log}"));
        let words = line.split(|one: char| one.is_whitespace() || one == ',');
        let numbers = words.filter_map(|word| word.strip_prefix("0x"));
        let at: Vec<u64> = numbers.map(|hex| u64::from_str_radix(hex, 16).unwrap()).collect();
        at.try_into().unwrap_or_else(|at| panic!("{at:x?} in {line}"))
    }

    /// What the VMM and the relay have said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.at("log")).unwrap()
    }

    /// Waits for the VMM's end; its exit status.
    pub fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status,
                None if start.elapsed() > PATIENCE => panic!("the VMM does not end"),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// A place in guest RAM.
#[derive(Debug)]
pub struct GuestMemory {
    file: std::fs::File,
    offset: u64,
}

impl GuestMemory {
    /// What lies there.
    pub fn read(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, self.offset).unwrap();
        bytes
    }

    /// Puts `bytes` there.
    pub fn write(&self, bytes: &[u8]) {
        self.file.write_all_at(bytes, self.offset).unwrap();
    }
}

/// Where the VMM has `gpa` mapped.
pub fn hva(vm: &VmInfo, gpa: u64) -> u64 {
    let block = vm.block(gpa).unwrap_or_else(|| panic!("{gpa:#x} is not guest RAM: {vm:?}"));
    block.hva + (gpa - block.gpa)
}

/// A running guest whose agent answers.
#[derive(Debug)]
pub struct Guest {
    vmm: Vmm,
    /// The agent in it.
    pub agent: Agent,
}

impl Deref for Guest {
    type Target = Vmm;

    fn deref(&self) -> &Vmm {
        &self.vmm
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Vmm {
        &mut self.vmm
    }
}

impl Guest {
    /// Boots a guest and waits for its agent.
    ///
    /// Once in some hundred boots a guest in the lab stands still before it has a console, long
    /// before there is any poison. It is looked at, booted once more, and counted: the summary of
    /// `make test` says how often.
    pub fn boot(options: &Options) -> Self {
        Self::try_boot(options).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same; why there is no guest, after all that is known of it has been printed.
    ///
    /// # Errors
    /// Its agent did not answer.
    pub fn try_boot(options: &Options) -> Result<Self, String> {
        let vmm = Vmm::start(options);
        match vmm.agent() {
            Ok(agent) => return Ok(Self { vmm, agent }),
            Err(error) if lab::may_poison().is_err() => vmm.did_not_come_up(DID_NOT, &error),
            Err(error) => {
                vmm.look();
                tell(&vmm.dir);
                println!("BOOTED AGAIN: {DID_NOT}: {error}");
            }
        }
        drop(vmm);
        let vmm = Vmm::start(options);
        match vmm.agent() {
            Ok(agent) => Ok(Self { vmm, agent }),
            Err(error) => {
                vmm.look();
                tell(&vmm.dir);
                Err(format!("{DID_NOT}: {error}"))
            }
        }
    }

    /// Waits for the agent of the next boot, on the connection to that of this one.
    ///
    /// As [`boot`](Self::boot) it has the guest boot once more, and counts it, where that stands still.
    pub fn up_again(&mut self) {
        const DID_NOT: &str = "the guest did not come up again";
        let log = !self.vmm.options.quiet;
        let Err(error) = self.agent.next_boot(log) else { return };
        if lab::may_poison().is_err() {
            self.vmm.did_not_come_up(DID_NOT, &error);
        }
        self.vmm.look();
        tell(&self.vmm.dir);
        println!("BOOTED AGAIN: {DID_NOT}: {error}");
        self.vmm.command("reset", &[]);
        if let Err(error) = self.agent.next_boot(log) {
            self.vmm.did_not_come_up(DID_NOT, &error);
        }
    }

    /// Connects to the agent once more, after it was left.
    pub fn reconnect(&mut self) {
        self.agent = Agent::again(&self.at("agent"), self.options.echo).unwrap();
    }

    /// Asks the guest to power off, and sees that the VMM ends well.
    pub fn power_off(mut self) {
        self.agent.ask("poweroff");
        assert_eq!(self.ended().code(), Some(0), "the VMM's exit status after power-off");
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::env::var("MCE_RELAY_NATIVE").is_ok_and(|value| value == "1") {
            for pfn in self.poisoned.borrow().iter() {
                give_back(&format!("{pfn:#x}"));
            }
        }
        if std::thread::panicking() {
            tell(&self.dir);
        }
    }
}

/// Has this host take a page frame back into use, now that nobody has it mapped any more.
fn give_back(pfn: &str) {
    let out = mce_relay(&["unpoison", "--pfn", pfn]);
    if out.status.success() {
        println!("== Host pfn {pfn} is back in use.");
    } else {
        let why = String::from_utf8_lossy(&out.stderr);
        println!("== Host pfn {pfn} stays out of use: {}", why.trim_end());
    }
}

/// Prints the end of everything a guest and its VMM have left.
fn tell(dir: &TempDir) {
    for name in ["log", "console", "events"] {
        let text = std::fs::read(dir.path().join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        println!("--- {name} (last lines)");
        for line in &lines[lines.len().saturating_sub(40)..] {
            println!("{line}");
        }
    }
}
