//! The lab as seen from inside, and what tests ask of the host they run on.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mce_relay_vmm::host::pagemap::{self, Entry};

/// Whether this runs in the lab (or on a host that was given over to it by MCE_RELAY_NATIVE=1).
pub fn may_poison() -> Result<(), String> {
    let set = |name| std::env::var(name).is_ok_and(|value| value == "1");
    if set("MCE_RELAY_LAB") || set("MCE_RELAY_NATIVE") {
        Ok(())
    } else {
        Err("poisons real memory: runs in the lab only (make test, or make lab CMD=…)".to_owned())
    }
}

/// Whether /dev/kvm is usable here.
pub fn has_kvm() -> Result<(), String> {
    kvm_ioctls::Kvm::new().map(drop).map_err(|error| format!("needs /dev/kvm: {error}"))
}

/// Whether KVM has guest memory of its own that can be mapped.
pub fn has_guest_memfd() -> Result<(), String> {
    /// KVM_CAP_GUEST_MEMFD_FLAGS (include/uapi/linux/kvm.h), and its flags MMAP and INIT_SHARED.
    const FLAGS: (std::ffi::c_ulong, i32) = (244, 0b11);
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| format!("needs /dev/kvm: {error}"))?;
    match kvm.check_extension_raw(FLAGS.0) {
        // Not of an error, which is negative.
        found if found > 0 && found & FLAGS.1 == FLAGS.1 => Ok(()),
        _ => Err("KVM has no guest_memfd that can be mapped, as Linux 6.18 has".to_owned()),
    }
}

/// Whether the host keeps a list of the bad frames of a huge page, and its file gives the others.
pub fn has_lists_of_bad_frames() -> Result<(), String> {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = host.split('.').map_while(|number| number.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= (6, 6) => Ok(()),
        _ => Err(format!(
            "Linux {} as the host gives nothing of a huge page with a bad frame",
            host.trim()
        )),
    }
}

/// Whether the lab's emulated hardware can be asked for machine checks.
pub fn has_hardware() -> Result<(), String> {
    match std::env::var_os("MCE_RELAY_LAB_MONITOR") {
        Some(_) => Ok(()),
        None => Err("needs the lab's emulated hardware (MCE_RELAY_LAB_MONITOR)".to_owned()),
    }
}

/// Puts an error into a bank of the emulated host's own CPU 0. All values as the hardware has them.
pub fn hardware_error(bank: u8, status: u64, mcg_status: u64, addr: u64, misc: u64) {
    let path = std::env::var_os("MCE_RELAY_LAB_MONITOR").expect("the lab's monitor");
    let mut monitor = OpenOptions::new().write(true).open(path).unwrap();
    writeln!(monitor, "mce 0 {bank} {status:#x} {mcg_status:#x} {addr:#x} {misc:#x}").unwrap();
}

/// Where the lab's emulated processors stand, `times` times: what QEMU's monitor says of their registers, of a processor
/// in a guest those of the guest. Nothing outside the lab.
pub fn processors(times: usize) -> String {
    const SETTLES: Duration = Duration::from_millis(300);
    let Some(path) = std::env::var_os("MCE_RELAY_LAB_MONITOR") else { return String::new() };
    let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    let mut monitor = match open {
        Ok(monitor) => monitor,
        Err(error) => return format!("the lab's monitor: {error}"),
    };
    let mut said = Vec::new();
    // What earlier commands have left to read comes first; an end by EAGAIN keeps what was read.
    let _ = monitor.read_to_end(&mut said);
    said.clear();
    for _ in 0..times {
        if let Err(error) = writeln!(monitor, "info registers -a") {
            return format!("the lab's monitor: {error}");
        }
        std::thread::sleep(SETTLES);
        let _ = monitor.read_to_end(&mut said);
    }
    let said = String::from_utf8_lossy(&said);
    let wanted = |line: &&str| ["CPU#", "RIP=", "CR3="].iter().any(|what| line.contains(what));
    said.lines().filter(wanted).flat_map(|line| [line.trim_end(), "\n"]).collect()
}

/// Makes this host's kernel poll its machine-check banks every `seconds`.
pub fn poll_banks(seconds: u32) {
    let path = "/sys/devices/system/machinecheck/machinecheck0/check_interval";
    std::fs::write(path, seconds.to_string()).unwrap();
}

/// Gives this host's pool of huge pages of `size` (`2048kB`, say) exactly `free` free ones.
pub fn set_pool(size: &str, free: u64) {
    let pool = Path::new("/sys/kernel/mm/hugepages").join(format!("hugepages-{size}"));
    let number = |file: &str| -> u64 {
        std::fs::read_to_string(pool.join(file)).unwrap().trim().parse().unwrap()
    };
    let used = number("nr_hugepages") - number("free_hugepages");
    std::fs::write(pool.join("nr_hugepages"), (used + free).to_string()).unwrap();
    assert_eq!(number("free_hugepages"), free, "the pool of {size} pages of this host");
}

/// A line of this host's /proc/meminfo, in kB.
pub fn meminfo(name: &str) -> u64 {
    sum_of("/proc/meminfo", name)
}

/// The sum of such lines in the smaps of process `pid`, in kB.
pub fn smaps(pid: u32, name: &str) -> u64 {
    sum_of(&format!("/proc/{pid}/smaps"), name)
}

/// How many descriptors process `pid` has open.
pub fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Resident memory of process `pid` in kB, but for mappings of at least `large` bytes.
pub fn outside(pid: u32, large: u64) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut sum, mut is_large) = (0, false);
    for line in text.lines() {
        let number = || line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
        if line.starts_with("Size:") {
            is_large = number() * 1024 >= large;
        } else if line.starts_with("Rss:") && !is_large {
            sum += number();
        }
    }
    sum
}

fn sum_of(path: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    lines.map(|rest| rest.split_whitespace().next().unwrap().parse::<u64>().unwrap()).sum()
}

/// The page tables of a process, as the kernel shows them.
#[derive(Debug)]
pub struct Pagemap(pagemap::Pagemap);

impl Pagemap {
    /// Those of `pid`.
    pub fn of(pid: u32) -> Self {
        Self(pagemap::Pagemap::open(pid).unwrap())
    }

    /// The host-physical address behind `hva`.
    pub fn physical(&self, hva: u64) -> u64 {
        self.0.pfn(hva).unwrap_or_else(|error| panic!("{error}")) << 12
    }
}

/// Whether process `pid` has a page mapped at `hva`.
pub fn is_resident(pid: u32, hva: u64) -> bool {
    matches!(Pagemap::of(pid).0.entry(hva).unwrap(), Entry::Present { .. })
}

fn memory_of(pid: u32) -> File {
    OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap()
}

/// The memory of a process, to be read page by page.
#[derive(Debug)]
pub struct Memory(File);

impl Memory {
    /// That of `pid`.
    pub fn of(pid: u32) -> Self {
        Self(memory_of(pid))
    }

    /// The page of 4 KiB at `hva`.
    pub fn page(&self, hva: u64) -> [u8; 4096] {
        let mut page = [0; 4096];
        self.0.read_exact_at(&mut page, hva).unwrap_or_else(|error| panic!("{hva:#x}: {error}"));
        page
    }
}

/// Writes a byte into the memory of process `pid`.
pub fn write_memory(pid: u32, hva: u64, byte: u8) {
    memory_of(pid).write_all_at(&[byte], hva).unwrap();
}

/// Reads a byte of the memory of process `pid`; fails where that is poisoned.
pub fn read_memory(pid: u32, hva: u64) -> std::io::Result<u8> {
    let mut byte = [0];
    memory_of(pid).read_exact_at(&mut byte, hva).map(|()| byte[0])
}

/// A page of this process's own that may go bad: nothing else lies in it.
#[derive(Debug)]
pub struct OwnPage(*mut u64);

impl OwnPage {
    const WORD: u64 = 0x5a5a_0ff1_ce00_5a5a;

    /// A new one, with a word in it.
    #[expect(clippy::new_without_default, reason = "it maps memory")]
    pub fn new() -> Self {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice. That it is no part of a huge page is
        // advice, which a kernel without those does not need.
        let page = unsafe {
            let page = libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0);
            assert_ne!(page, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            libc::madvise(page, 4096, libc::MADV_NOHUGEPAGE);
            page.cast::<u64>()
        };
        // SAFETY: the mapping is ours alone, and a page long.
        unsafe { page.write_volatile(Self::WORD) };
        Self(page)
    }

    /// The host's page frame behind it.
    pub fn pfn(&self) -> u64 {
        host_physical(std::process::id(), self.0.addr() as u64) >> 12
    }

    /// Whether it holds what it should; a page that is bad ends this process.
    pub fn is_whole(&self) -> bool {
        // SAFETY: as for the write.
        unsafe { self.0.read_volatile() == Self::WORD }
    }
}

impl Drop for OwnPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

/// Has process `pid`, a child of this one, stand still, and waits until it does, or has ended.
pub fn stop(pid: u32) {
    let child = pid.cast_signed();
    // SAFETY: all-zero is a valid siginfo_t, which waitid fills in; with WNOWAIT the child can be waited
    // for once more.
    let stopped = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let what = libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT;
        libc::kill(child, libc::SIGSTOP) == 0
            && libc::waitid(libc::P_PID, pid, &raw mut info, what) == 0
    };
    assert!(stopped, "process {pid}: {}", std::io::Error::last_os_error());
}

/// Whether there is no data at `offset` of `file`, which is within it.
pub fn is_hole(file: &File, offset: u64) -> bool {
    let at = libc::off_t::try_from(offset).unwrap();
    // SAFETY: takes integers only; the descriptor is open.
    let data = unsafe { libc::lseek(file.as_raw_fd(), at, libc::SEEK_DATA) };
    let error = std::io::Error::last_os_error();
    // ENXIO: there is none up to the end.
    assert!(data >= 0 || error.raw_os_error() == Some(libc::ENXIO), "{error}");
    data != at
}

/// A thread of another process that stands still until this is dropped; signals for it wait.
#[derive(Debug)]
pub struct Held {
    thread: libc::pid_t,
    /// The kernel takes only the thread that holds it for its tracer.
    here: PhantomData<*const ()>,
}

/// Has the thread of process `pid` that is called `name` stand still.
pub fn hold_thread(pid: u32, name: &str) -> Held {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let called = |path: &Path| std::fs::read_to_string(path.join("comm")).unwrap_or_default();
    let found = threads.map(|entry| entry.unwrap().path()).find(|path| called(path).trim() == name);
    let path = found.unwrap_or_else(|| panic!("process {pid} has no thread {name:?}"));
    let thread: libc::pid_t = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
    // SAFETY: neither request takes a pointer; it only stops a thread of another process.
    let stopped = unsafe {
        libc::ptrace(libc::PTRACE_SEIZE, thread, 0, 0) == 0
            && libc::ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0) == 0
            && libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL) == thread
    };
    assert!(stopped, "ptrace {path:?}: {}", std::io::Error::last_os_error());
    Held { thread, here: PhantomData }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: as above; a thread that is gone is no matter.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.thread, 0, 0) };
    }
}

/// The host-physical address behind `hva` of process `pid`.
pub fn host_physical(pid: u32, hva: u64) -> u64 {
    Pagemap::of(pid).physical(hva)
}

/// As much of a thread's stack in the kernel as says what it waits for.
const STACK: usize = 8;

/// What each thread of process `pid` is about: its state, its CPU time so far in clock ticks, and
/// where it waits (for root: where in the kernel). For people who look into a VM that stands still.
pub fn threads(pid: u32) -> String {
    let mut all = String::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |file: &str| {
            std::fs::read_to_string(entry.path().join(file)).unwrap_or_default().trim().to_owned()
        };
        // proc_pid_stat(5): the state is the first field behind the name, the times 12 and 13 on.
        let stat = read("stat");
        let fields: Vec<&str> =
            stat.rsplit_once(')').map_or("", |it| it.1).split_whitespace().collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or("?");
        all += &format!(
            "{:16} {} user {:>5} kernel {:>6} wchan {} syscall {}\n",
            read("comm"),
            field(0),
            field(11),
            field(12),
            read("wchan"),
            read("syscall")
        );
        for line in read("stack").lines().take(STACK) {
            all += &format!("                 {line}\n");
        }
    }
    all
}

/// Has `command` start in `cgroup`.
pub fn start_in(command: &mut Command, cgroup: &Path) {
    let procs = CString::new(cgroup.join("cgroup.procs").into_os_string().into_vec()).unwrap();
    let enter = move || {
        // SAFETY: the path outlives the call; 0 stands for the process that writes.
        unsafe {
            let file = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if file < 0 || libc::write(file, c"0".as_ptr().cast(), 1) != 1 {
                return Err(std::io::Error::last_os_error());
            }
            libc::close(file);
        }
        Ok(())
    };
    // SAFETY: what runs between fork and exec makes system calls and nothing else.
    unsafe { command.pre_exec(enter) };
}

/// Has the host's KSM join pages of `command`'s that have the same in them, where KSM runs.
pub fn start_merging(command: &mut Command) {
    // include/uapi/linux/prctl.h (Linux 6.4); it outlives exec.
    const PR_SET_MEMORY_MERGE: libc::c_int = 67;
    let merge = || {
        // SAFETY: takes numbers only.
        match unsafe { libc::prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: what runs between fork and exec makes a system call and nothing else.
    unsafe { command.pre_exec(merge) };
}

/// A memory cgroup below the root, on a file system that is mounted for it where none is.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes it.
    pub fn new(name: &str) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mounted = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let at = words.next()?;
            (words.next() == Some("cgroup2")).then(|| PathBuf::from(at))
        });
        let root = mounted.unwrap_or_else(|| {
            let at = std::env::temp_dir().join("cgroup");
            std::fs::create_dir_all(&at).unwrap();
            let mount = Command::new("mount").args(["-t", "cgroup2", "none"]).arg(&at).status();
            assert!(mount.unwrap().success(), "mount -t cgroup2 none {at:?}");
            at
        });
        std::fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Not while a process is left in it; it goes with the lab.
        let _ = std::fs::remove_dir(&self.0);
    }
}
