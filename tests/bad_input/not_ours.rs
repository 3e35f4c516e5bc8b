//! SIGBUS that is no error of guest memory: each has its documented end, with one line that says what it
//! was, the true siginfo, and the terminal as it was.

use std::os::unix::process::{CommandExt, ExitStatusExt};

use mce_relay_tests::guest::binary;
use mce_relay_tests::hooked::{Hooked, SPIN, library, prepare};

use crate::terminal::Terminal;

pub fn available() -> Result<(), String> {
    library("libhook.so").map(drop)
}

/// A VMM that has a terminal in raw mode, and how that was before.
fn start() -> (Hooked, Terminal, [libc::tcflag_t; 4]) {
    let (terminal, dir) = (Terminal::new(), tempfile::tempdir().unwrap());
    let before = terminal.modes();
    let child = terminal.start_with(|command| {
        command.args(["--memory", "32M"]);
        prepare(command, dir.path(), &SPIN);
    });
    terminal.drain();
    terminal.wait_for(|modes| modes != before);
    (Hooked::of(child, dir), terminal, before)
}

/// The line about it, of which there is one.
fn line(stderr: &str) -> &str {
    let lines: Vec<&str> =
        stderr.lines().filter(|line| line.contains("SIGBUS on thread")).collect();
    println!("    {}", stderr.trim_end());
    let [line] = lines[..] else { panic!("one line: {stderr}") };
    line
}

pub fn kill_bus_ends_it_with_the_default_action() {
    let (mut vmm, terminal, before) = start();
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(vmm.pid().cast_signed(), libc::SIGBUS) };
    let (status, stderr) = vmm.ended();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {stderr}");
    let me = format!("sent, si_code 0 by process {} of user ", std::process::id());
    assert!(line(&stderr).contains(&me), "{stderr}");
    assert_eq!(terminal.modes(), before);
}

/// Its memory is a mapped file that somebody cuts short.
pub fn a_bus_adrerr_ends_it_with_the_default_action() {
    let (mut vmm, terminal, before) = start();
    vmm.order("adrerr");
    let (status, stderr) = vmm.ended();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}: {stderr}");
    let named = format!("no memory behind the address (BUS_ADRERR) at {:#x}", vmm.cut());
    assert!(line(&stderr).contains(&named), "{stderr}");
    assert_eq!(terminal.modes(), before);
}

/// Forged here; tests/scenarios/not_ours.rs has the real one.
pub fn an_ar_of_its_own_memory_ends_it_with_a_status_of_its_own() {
    let (mut vmm, terminal, before) = start();
    let page = vmm.page();
    vmm.order("forge-ar");
    let (status, stderr) = vmm.ended();
    assert_eq!(status.code(), Some(7), "{status}: {stderr}");
    assert!(line(&stderr).contains(&format!("(BUS_MCEERR_AR) at {page:#x}, lsb 12")), "{stderr}");
    assert!(stderr.contains("memory of the VMM itself is bad"), "{stderr}");
    assert_eq!(terminal.modes(), before);
}

pub fn an_ao_of_its_own_memory_is_reported_and_it_goes_on() {
    let (mut vmm, terminal, before) = start();
    let page = vmm.page();
    vmm.order("forge-ao");
    let outside = vmm.event("outside");
    assert_eq!((&outside["kind"], &outside["hva"]), (&"AO".into(), &format!("{page:#x}").into()));
    vmm.put("vm.shutdown");
    let (status, stderr) = vmm.ended();
    println!("    {}", stderr.trim_end());
    assert_eq!(status.code(), Some(0), "{stderr}");
    let said: Vec<&str> = stderr.lines().filter(|line| line.contains("outside: AO")).collect();
    let [said] = said[..] else { panic!("one line: {stderr}") };
    assert!(said.contains(&format!("AO at HVA {page:#x}")) && said.contains("WARN"), "{said}");
    assert!(said.contains("memory of the VMM itself went bad"), "{said}");
    assert_eq!(terminal.modes(), before);
}

/// The file behind guest RAM is cut short under a guest that reads all of it, again and again. There is no
/// poison to tell the guest of: KVM cannot go on, and the VMM says where.
pub fn guest_ram_that_is_cut_short_is_an_error_of_kvm() {
    // 1: mov esi, 16 MiB; 2: mov al, [esi]; add esi, 4096; cmp esi, 32 MiB; jb 2b; jmp 1b.
    const READ: [u8; 23] = [
        0xbe, 0, 0, 0, 1, 0x8a, 0x06, 0x81, 0xc6, 0, 0x10, 0, 0, 0x81, 0xfe, 0, 0, 0, 2, 0x72,
        0xf0, 0xeb, 0xe9,
    ];
    let dir = tempfile::tempdir().unwrap();
    let ram = dir.path().join("ram");
    std::fs::File::create(&ram).unwrap().set_len(32 << 20).unwrap();
    let mut command = std::process::Command::new(binary());
    let memory = format!("size=32M,shared=on,lossy=on,file={}", ram.display());
    command.args(["run", "--serial", "off", "--memory", &memory]);
    prepare(&mut command, dir.path(), &READ);
    let mut vmm = Hooked::of(command.spawn().unwrap(), dir);
    std::fs::File::options().write(true).open(&ram).unwrap().set_len(24 << 20).unwrap();
    let (status, stderr) = vmm.ended();
    println!("    {}", stderr.trim_end());
    assert_eq!(status.code(), Some(5), "{status}: {stderr}");
    assert!(stderr.contains("RIP 0x10"), "{stderr}");
}

/// Whoever starts it may have SIGBUS blocked: KVM_RUN would try a bad page again for ever, and a thread that meets one
/// elsewhere would be ended unheard.
pub fn sigbus_that_is_blocked_is_unblocked() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(binary());
    command.args(["run", "--serial", "off", "--memory", "32M"]);
    prepare(&mut command, dir.path(), &SPIN);
    let block = || {
        // SAFETY: the set is initialised before it is used; all of it is async-signal-safe.
        unsafe {
            let mut bus = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&raw mut bus);
            libc::sigaddset(&raw mut bus, libc::SIGBUS);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const bus, std::ptr::null_mut());
        }
        Ok(())
    };
    // SAFETY: the closure takes no lock and allocates nothing.
    unsafe { command.pre_exec(block) };
    let mut vmm = Hooked::of(command.spawn().unwrap(), dir);
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vmm.pid())).unwrap();
    // The hook has a thread of its own, which is there before the program begins.
    let main = vmm.pid().to_string();
    let masks: Vec<(String, u64)> = tasks
        .filter_map(|task| {
            let task = task.unwrap();
            let status = std::fs::read_to_string(task.path().join("status")).unwrap();
            let of = |key: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
                line.trim().to_owned()
            };
            let of_the_hook = of("Name:") == "mce-relay" && task.file_name() != *main;
            let mask = u64::from_str_radix(&of("SigBlk:"), 16).unwrap();
            (!of_the_hook).then(|| (of("Name:"), mask))
        })
        .collect();
    assert!(masks.iter().any(|(name, _)| name.contains("vcpu")), "{masks:x?}");
    // The relay's thread has it blocked between its look and its wait.
    let blocked: Vec<_> = masks
        .iter()
        .filter(|(name, mask)| mask & 1 << (libc::SIGBUS - 1) != 0 && name != "mce-relay-ao")
        .collect();
    assert!(blocked.is_empty(), "{blocked:x?}");
    vmm.put("vm.shutdown");
    assert_eq!(vmm.ended().0.code(), Some(0));
}
