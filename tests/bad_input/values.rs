//! Values that cannot be meant.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mce_relay_tests::guest::{binary, image, mce_relay};
use mce_relay_tests::tiny::elf;

use crate::refused;

fn run(args: &[&str]) -> std::process::Output {
    let mut all = vec!["run", "--serial", "off"];
    all.extend(args);
    mce_relay(&all)
}

fn kernel() -> String {
    image("vmlinux").display().to_string()
}

pub fn memory_of_zero() {
    refused(&run(&["--kernel", &kernel(), "--memory", "size=0"]), 1, &["0 bytes"]);
    // As other programs take it.
    refused(&run(&["--kernel", &kernel(), "--memory", "256"]), 1, &["256 bytes", "256M"]);
}

pub fn more_memory_than_there_is() {
    let out = run(&["--kernel", &kernel(), "--memory", "size=512T"]);
    refused(&out, 1, &["536870912 MiB", "this host has"]);
}

pub fn memory_that_is_not_a_size() {
    refused(&run(&["--kernel", "x", "--memory", "size=lots"]), 2, &["lots", "512M"]);
}

pub fn devices_that_cannot_be() {
    let rng = |text: &str| run(&["--kernel", "x", "--rng", text]);
    refused(&rng("/dev/urandom"), 2, &["/dev/urandom", "src=PATH"]);
    refused(&rng("src=/dev/urandom,speed=9"), 2, &["speed=9", "src=PATH"]);
    let net = |text: &str| run(&["--kernel", "x", "--net", text]);
    refused(&net("tap0"), 2, &["tap0", "tap=NAME or fd=N"]);
    refused(&net("tap=a,mac=01:00:00:00:00:01"), 2, &["01:00:00:00:00:01", "even first byte"]);
    refused(&net("tap=a,vhost=yes"), 2, &["yes", "on or off"]);
    refused(&run(&["--kernel", "x", "--console", "pty"]), 2, &["pty", "null or off"]);
    let vsock = |text: &str| run(&["--kernel", "x", "--vsock", text]);
    refused(&vsock("/v"), 2, &["/v", "cid=N and socket=PATH"]);
    refused(&vsock("cid=3"), 2, &["socket is missing", "socket=PATH"]);
    refused(&vsock("cid=2,socket=/v"), 2, &["cid is \"2\"", "3 to 4294967294"]);
}

/// What is missing is named, and not only what could not be made in it.
pub fn directories_that_are_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, elf(&[0xeb, 0xfe])).unwrap();
    let kernel = kernel.display().to_string();
    let missing = "the directory /nowhere/at/all is not there; make it (mkdir -p)";
    for [option, value] in [
        ["--vsock", "cid=3,socket=/nowhere/at/all/x"],
        ["--serial2", "socket=/nowhere/at/all/x"],
        ["--serial2", "file=/nowhere/at/all/x"],
        ["--console", "socket=/nowhere/at/all/x"],
        ["--api-socket", "/nowhere/at/all/x"],
        ["--event-monitor", "path=/nowhere/at/all/x"],
    ] {
        let out = run(&["--kernel", &kernel, "--memory", "64M", option, value]);
        refused(&out, 1, &["/nowhere/at/all/x", missing]);
    }
    let file = format!("{kernel}/x");
    let out = run(&["--kernel", &kernel, "--memory", "64M", "--api-socket", &file]);
    refused(&out, 1, &[&file, &format!("{kernel} is no directory")]);
}

/// The guest has whole sectors only.
pub fn disks_that_end_within_a_sector() {
    let dir = tempfile::tempdir().unwrap();
    let (kernel, disk) = (dir.path().join("kernel"), dir.path().join("disk"));
    std::fs::write(&kernel, elf(&[0xeb, 0xfe])).unwrap();
    let (kernel, disk) = (kernel.display().to_string(), disk.display().to_string());
    let path = format!("path={disk}");
    // What is refused behind it ends the VM before it runs.
    let second = ["--disk", "path=/nowhere/disk"];
    let with = |bytes: usize| {
        std::fs::write(&disk, vec![1; bytes]).unwrap();
        let args = [&["--kernel", &kernel, "--memory", "64M", "--disk", &path], &second[..]];
        run(&args.concat())
    };
    for bytes in [0, 511] {
        let said = format!("{bytes} bytes; expected 512 at least");
        refused(&with(bytes), 1, &[&disk, &said, "truncate -s SIZE"]);
    }
    let way_out = format!("truncate -s 1024 {disk}");
    refused(&with(1000), 1, &[&disk, "1000 bytes", "the last 488", &way_out, "/nowhere/disk"]);
    let whole = with(1024);
    refused(&whole, 1, &["/nowhere/disk"]);
    assert!(!String::from_utf8_lossy(&whole.stderr).contains("sectors"), "{whole:?}");
}

/// What is behind a comma may be meant as the rest of a path.
pub fn commas_in_paths_and_keys_twice() {
    let twice = "a comma in a value is written twice";
    for [option, value, named] in [
        ["--disk", "path=/a,b", "\"b\" is not understood"],
        ["--vsock", "cid=3,socket=/a,b", "\"b\" is not understood"],
        ["--rng", "src=/a,b", "\"b\" is not understood"],
        ["--memory", "size=1G,file=/a,b", "\"b\" is not understood"],
        ["--serial2", "file=/a,b", "\"b\" is not understood"],
        ["--console", "socket=/a,b", "\"b\" is not understood"],
        ["--event-monitor", "path=/a,b", "\"b\" is not understood"],
        ["--api-socket", "path=/a,b", "\"b\" is not understood"],
        ["--disk", "path=/a,id=x,id=y", "id is given twice"],
        ["--vsock", "cid=3,socket=/a,id=3,id=4", "id is given twice"],
        ["--net", "tap=a,id=x,id=y", "id is given twice"],
        ["--rng", "src=/a,src=/b", "src is given twice"],
        ["--memory-zone", "size=1G,id=x,id=y", "id is given twice"],
        ["--serial2", "file=/a,file=/b", "file is given twice"],
        ["--console", "file=/a,max-size=1,max-size=2", "max-size is given twice"],
        ["--event-monitor", "path=/a,path=/b", "path is given twice"],
        ["--api-socket", "path=/a,path=/b", "path is given twice"],
        ["--ao-pace", "burst=1,burst=2", "burst is given twice"],
    ] {
        refused(&run(&["--kernel", "x", option, value]), 2, &[option, named, twice]);
    }
    for [option, value] in
        [["--serial2", "file=/nowhere/a,,b"], ["--event-monitor", "path=/nowhere/a,,b"]]
    {
        refused(&run(&["--kernel", "x", option, value]), 1, &["/nowhere/a,b"]);
    }
}

pub fn sources_of_random_bytes_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    std::fs::write(&path, elf(&[0xeb, 0xfe])).unwrap();
    let path = path.display().to_string();
    let rng = |src: &str| run(&["--kernel", &path, "--memory", "64M", "--rng", src]);
    refused(&rng("src=/nowhere/random"), 1, &["/nowhere/random", "No such file"]);
    let net = |text: &str| run(&["--kernel", &path, "--memory", "64M", "--net", text]);
    refused(&net("tap=no-such-tap"), 1, &["no-such-tap", "ip tuntap add dev no-such-tap"]);
    refused(&net("fd=1"), 1, &["file descriptor 1 ", "is not a tap"]);
    refused(
        &rng(&format!("src={path}")),
        1,
        &[&path, "the same bytes at each boot", "/dev/urandom"],
    );
}

pub fn two_on_one_terminal() {
    let both = ["run", "--kernel", "x", "--serial", "tty", "--console", "tty"];
    refused(&mce_relay(&both), 1, &["the terminal", "off, file=PATH or socket=PATH"]);
}

pub fn memory_of_kinds_that_do_not_go_together() {
    let memory = |text: &str| mce_relay(&["run", "--kernel", "x", "--memory", text]);
    refused(&memory("size=1G,hugepages=maybe"), 2, &["maybe", "on or off"]);
    refused(&memory("size=1G,hugepage_size=2M"), 2, &["hugepages=on"]);
    refused(&memory("size=1G,hugepages=on,file=/x"), 2, &["exclude each other"]);
    refused(&memory("shared=on"), 2, &["size is missing"]);
    let both = ["run", "--kernel", "x", "--memory", "1G", "--memory-zone", "size=1G"];
    refused(&mce_relay(&both), 2, &["--memory-zone", "leave --memory out"]);
}

pub fn a_memory_file_that_is_not_there() {
    let out = run(&["--kernel", &kernel(), "--memory", "size=64M,file=/nowhere/ram"]);
    refused(&out, 1, &["/nowhere/ram", "No such file"]);
}

/// Of such a file the host drops a bad page and reads the old contents again.
pub fn is_on_disk(path: &Path) -> bool {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: statfs is plain data, which the call fills; the path is a C string.
    let stat = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        assert_eq!(libc::statfs(path.as_ptr(), &raw mut stat), 0);
        stat
    };
    // tmpfs, ramfs (include/uapi/linux/magic.h): no disk.
    ![0x0102_1994, 0x8584_58f6].contains(&stat.f_type)
}

pub fn a_shared_memory_file_on_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ram");
    std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let memory = format!("size=64M,shared=on,file={}", path.display());
    let named = path.display().to_string();
    let out = run(&["--kernel", &kernel(), "--memory", &memory]);
    refused(&out, 1, &[&named, "tmpfs", "reads the page from the disk again", "lossy=on"]);
    // With consent it gets as far as the kernel, which is none.
    let out = run(&["--kernel", "/dev/null", "--memory", &format!("{memory},lossy=on")]);
    assert!(!String::from_utf8_lossy(&out.stderr).contains("lossy"), "{out:?}");
    // And so with one that is not written to.
    let private = format!("size=64M,file={named}");
    let out = run(&["--kernel", "/dev/null", "--memory", &private]);
    refused(&out, 1, &["/dev/null"]);
}

pub fn a_memory_file_that_is_too_short() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ram").display().to_string();
    std::fs::write(&path, "short").unwrap();
    let out = run(&["--kernel", &kernel(), "--memory", &format!("size=64M,file={path}")]);
    refused(&out, 1, &[&path, "5 bytes", "truncate -s 67108864"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "short", "left as it was");
}

pub fn a_pool_of_huge_pages_that_is_too_small() {
    let out = run(&["--kernel", &kernel(), "--memory", "size=256M,hugepages=on"]);
    refused(&out, 1, &["huge pages", "2048"]);
}

pub fn memory_of_a_vm_that_is_not_there() {
    let socket = ["--api-socket", "/nowhere/api"];
    let read = [&["memory", "read", "--gpa", "0x1000"], &socket[..]].concat();
    refused(&mce_relay(&read), 1, &["/nowhere/api"]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dump").display().to_string();
    refused(&mce_relay(&[&["memory", "dump", &file], &socket[..]].concat()), 1, &["/nowhere/api"]);
    assert!(!Path::new(&file).exists(), "nothing is left behind");
    refused(&mce_relay(&[&["memory", "read"], &socket[..]].concat()), 2, &["--gpa"]);
}

pub fn a_kernel_that_is_not_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes.txt");
    std::fs::write(&path, "not a kernel\n".repeat(1000)).unwrap();
    let path = path.display().to_string();
    refused(&run(&["--kernel", &path]), 1, &[&path, "vmlinux", "bzImage"]);
}

/// The cause is given once, and sizes are in MiB.
pub fn a_kernel_that_is_cut_short() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    let whole = elf(&[0xf4; 8192]);
    std::fs::write(&path, &whole[..whole.len() - 100]).unwrap();
    let path = path.display().to_string();
    let out = run(&["--kernel", &path, "--memory", "32M"]);
    refused(&out, 1, &[&path, "into 32 MiB of memory", "complete"]);
    let words = String::from_utf8(out.stderr).unwrap();
    let parts: Vec<&str> = words.split_once(&path).unwrap().1.trim_end().split(": ").collect();
    assert_eq!(parts.len(), 3, "{parts:?}");
    assert!(!parts[1].contains(parts[2]) && !words.contains("Kernel Loader"), "{words}");
}

pub fn a_kernel_that_is_not_there() {
    refused(&run(&["--kernel", "/nowhere/vmlinux"]), 1, &["/nowhere/vmlinux"]);
}

pub fn an_initramfs_that_is_not_there() {
    let out = run(&["--kernel", &kernel(), "--initramfs", "/nowhere/initramfs"]);
    refused(&out, 1, &["/nowhere/initramfs"]);
}

pub fn no_vcpus() {
    refused(&run(&["--kernel", "x", "--cpus", "0"]), 2, &["\"0\"", "1 to 254"]);
}

pub fn a_serial_mode_that_is_none() {
    refused(&mce_relay(&["run", "--kernel", "x", "--serial", "pty"]), 2, &["pty", "socket=PATH"]);
}

pub fn an_ao_channel_that_is_none() {
    let channel = |args: &[&str]| mce_relay(&[&["run", "--kernel", "x"], args].concat());
    refused(&channel(&["--ao-channel", "acpi"]), 2, &["acpi", "auto, mce or ghes"]);
    refused(&channel(&["--ghes-poll", "0"]), 2, &["0", "1..=3600000"]);
    let both = ["--ao-channel", "mce", "--ghes-poll", "100"];
    refused(&channel(&both), 2, &["--ghes-poll", "leave one of the two out"]);
}

pub fn a_vm_to_retire_from_that_is_not_there() {
    let args = ["retire", "--api-socket", "/nowhere/api", "--gpa", "0x1000"];
    refused(&mce_relay(&args), 1, &["/nowhere/api", "--api-socket"]);
}

pub fn an_api_socket_path_that_exists() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    std::fs::write(&path, "somebody's").unwrap();
    let argument = format!("path={}", path.display());
    let out = run(&["--kernel", "x", "--api-socket", &argument]);
    refused(&out, 1, &[&path.display().to_string(), "remove it"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "somebody's", "left as it was");
}

pub fn an_event_monitor_that_cannot_be_written() {
    let out = run(&["--kernel", "x", "--event-monitor", "path=/nowhere/events"]);
    refused(&out, 1, &["/nowhere/events"]);
}

pub fn a_vm_that_is_not_there() {
    let out = mce_relay(&["status", "--api-socket", "/nowhere/api"]);
    refused(&out, 1, &["/nowhere/api", "--api-socket"]);
}

pub fn a_gpa_that_is_not_a_number() {
    let args = ["poison", "--api-socket", "/x", "--via", "madvise", "--gpa", "0xyz"];
    refused(&mce_relay(&args), 2, &["0xyz", "0x1000"]);
}

pub fn a_gpa_list_that_is_not_one() {
    for (list, named) in [
        ("0x8000..0x3000", ["0x8000..0x3000", "ends before it starts"]),
        ("0x1000,0x3000..0x3000", ["0x3000..0x3000", "is empty"]),
        ("0x3000..", ["\"\" is not a number", "0x3000..0x8000"]),
        ("0x1000,,0x2000", ["\"\" is not a number", "0x1000"]),
        ("0x1000 0x2000", ["0x1000 0x2000", "is not a number"]),
        ("", ["\"\" is not a number", "0x1000"]),
    ] {
        let args = ["poison", "--api-socket", "/x", "--via", "madvise", "--gpa", list];
        refused(&mce_relay(&args), 2, &named);
    }
    refused(&mce_relay(&["poison", "--api-socket", "/x", "--via", "madvise"]), 2, &["--gpa"]);
}

pub fn a_pace_that_is_none() {
    for (pace, named) in [
        ("burst=0", ["burst is \"0\"", "from 1 to 4294967295"]),
        ("burst=1,rate=-1", ["rate is \"-1\"", "from 1 to 4294967295"]),
        ("rate=4294967296", ["rate is \"4294967296\"", "from 1 to 4294967295"]),
        ("burst", ["burst is \"\"", "from 1"]),
        ("speed=3", ["speed=3", "burst=N"]),
        ("burst=1,burst=2", ["burst", "twice"]),
        ("burst=1;rate=2", ["burst is \"1;rate=2\"", "from 1"]),
        ("", ["\"\" is not understood", "burst=N,rate=N"]),
    ] {
        refused(&run(&["--kernel", "x", "--ao-pace", pace]), 2, &named);
    }
}

pub fn a_policy_that_is_none() {
    let out = run(&["--kernel", "x", "--on-undeliverable", "panic"]);
    refused(&out, 2, &["panic", "stop, pause, reset"]);
}

pub fn a_pause_of_a_vm_that_is_not_there() {
    for command in ["pause", "resume"] {
        let out = mce_relay(&[command, "--api-socket", "/nowhere/api"]);
        refused(&out, 1, &["/nowhere/api", "--api-socket"]);
        refused(&mce_relay(&[command]), 2, &["--api-socket"]);
    }
}

/// A VM that is only there to be asked.
pub struct Vm {
    pub child: Child,
    pub api: String,
    _dir: tempfile::TempDir,
}

impl Vm {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let api = format!("path={}", path.display());
        let child = Command::new(binary())
            .args(["run", "--serial", "off", "--memory", "size=128M"])
            .args(["--kernel", &kernel(), "--api-socket", &api])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while !mce_relay(&["status", "--api-socket", &api]).status.success() {
            assert!(start.elapsed() < Duration::from_secs(60), "the VM's API does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { child, api, _dir: dir }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn a_gpa_outside_ram() {
    let vm = Vm::start();
    for gpa in ["3G", "0x8000000", "0xffffffffffffffff"] {
        let args = ["poison", "--api-socket", &vm.api, "--via", "hwpoison-inject", "--gpa", gpa];
        refused(&mce_relay(&args), 1, &["is not guest RAM", "0x0 to 0x7ffffff"]);
    }
    // One bad address among good ones, and a range that runs out of RAM or could not be written down
    // page by page.
    for (list, bad) in [
        ("16M,3G,0x1001000", "GPA 0xc0000000 "),
        ("0x7fff000..0x8001000", "GPA 0x8000000 "),
        ("0..0xffffffffffffffff", "GPA 0x8000000 "),
    ] {
        let args = ["poison", "--api-socket", &vm.api, "--via", "madvise", "--gpa", list];
        refused(&mce_relay(&args), 1, &[bad, "is not guest RAM"]);
    }
    let memory =
        |what: &[&str]| mce_relay(&[&["memory"], what, &["--api-socket", &vm.api]].concat());
    refused(&memory(&["read", "--gpa", "3G"]), 1, &["0xc0000000", "0x0 to 0x7ffffff"]);
    refused(&memory(&["read", "--gpa", "0x7ffffff", "--len", "2"]), 1, &["0x8000000"]);
    refused(&memory(&["read", "--gpa", "0", "--len", "0"]), 1, &["--len is 0"]);
    refused(&memory(&["read", "--gpa", "0", "--raw", "--json"]), 2, &["--raw", "--json"]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dump").display().to_string();
    std::fs::write(&file, "mine").unwrap();
    refused(&memory(&["dump", &file]), 1, &[&file, "left as it is"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
    assert!(mce_relay(&["status", "--api-socket", &vm.api]).status.success(), "the VM runs on");
}

pub fn a_pause_too_many() {
    let vm = Vm::start();
    let asked = |command: &str| mce_relay(&[command, "--api-socket", &vm.api]).status.success();
    let is_paused = || {
        let out = mce_relay(&["status", "--api-socket", &vm.api, "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        status["vm"]["paused"].as_bool().unwrap()
    };
    assert!(asked("resume") && !is_paused(), "it was not paused");
    assert!(asked("pause") && asked("pause") && is_paused());
    assert!(asked("resume") && asked("resume") && !is_paused());
    assert!(asked("pause") && is_paused());
    // A paused VM ends like any other.
    let mut vm = vm;
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(vm.child.id().cast_signed(), libc::SIGTERM) };
    let start = Instant::now();
    while vm.child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(30), "it stays paused");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(vm.child.wait().unwrap().code(), Some(128 + libc::SIGTERM));
}
