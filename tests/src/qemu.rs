//! A guest under QEMU, with the same kernel, initramfs and agent as those under `mce-relay run`: what
//! another VMM makes of the same failures. QEMU, or the guest, may die of them; that is a result here,
//! not a failure.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use memchr::memmem;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::{Agent, PATIENCE};
use crate::guest::image;

/// As in `guest.rs`, but nothing at all goes to the console (each byte is an exit), and the log holds
/// the lines of thousands of failures.
const CMDLINE: &str = "console=ttyS0,115200 loglevel=0 log_buf_len=4M panic=-1 noxsave";
/// KVM's paravirtual features whose hypercalls KVM would patch in the text of a guest that takes its
/// host for one of the other vendor; Linux 6.1 dies of that.
const NO_HYPERCALLS: &str = "kvm-pv-unhalt=off,kvm-pv-ipi=off,kvm-pv-sched-yield=off";
/// The guest's RAM, all of it below the PCI hole, so one block.
const RAM_MIB: u64 = 256;
const PAGE_SIZE: usize = 4096;

/// What the guest is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// The host's own processor, as the lab has it: AMD.
    Amd,
    /// An Intel processor with the MCG_CAP that QEMU asks for, as an Intel host would show it.
    Intel,
    /// An Intel processor with what KVM on an AMD host leaves of MCG_CAP: no SER_P, so that each
    /// error is fatal to the guest.
    IntelWithoutSerP,
}

impl Style {
    /// Each with its name on a command line.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("amd", Self::Amd),
        ("intel", Self::Intel),
        ("intel-without-ser-p", Self::IntelWithoutSerP),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, style)| *style == self).map_or("", |(name, _)| name)
    }

    fn vendor(self) -> &'static str {
        match self {
            Self::Amd => "AuthenticAMD",
            Self::Intel | Self::IntelWithoutSerP => "GenuineIntel",
        }
    }

    fn cpu(self) -> String {
        match self {
            Self::Amd => "host".to_owned(),
            // Unless told otherwise, QEMU gives its models the host's vendor.
            Self::Intel | Self::IntelWithoutSerP => format!(
                "Cascadelake-Server-noTSX,vendor={},check=off,{NO_HYPERCALLS}",
                self.vendor()
            ),
        }
    }
}

/// What shows an Intel-style guest its MCG_CAP on an AMD host (tests/peer/ser_p.rs).
fn ser_p() -> Result<PathBuf, String> {
    let me = std::env::current_exe().map_err(|error| error.to_string())?;
    let library = me.with_file_name("examples").join("libser_p.so");
    match library.is_file() {
        true => Ok(library),
        false => Err(format!("{} is missing; run `make peer`", library.display())),
    }
}

/// QEMU's machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// A PC of today.
    Q35,
    /// A PC of yesterday, QEMU's default.
    Pc,
    /// The one for short boots.
    Microvm,
}

impl Machine {
    fn arguments(self) -> &'static [&'static str] {
        const KVM: [&str; 2] = ["-machine", "q35,accel=kvm,memory-backend=ram"];
        match self {
            Self::Q35 => &KVM,
            Self::Pc => &["-machine", "pc,accel=kvm,memory-backend=ram"],
            // With the firmware that QEMU means for it; its second serial port is for the agent. Without ACPI, whose
            // set-up it saves.
            Self::Microvm => &["-machine", "microvm,accel=kvm,memory-backend=ram,rtc=on,acpi=off"],
        }
    }
}

/// A running guest and its QEMU. Dropping it kills both.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    dir: TempDir,
    monitor: Monitor,
    agent: Agent,
    /// Where the guest's RAM begins in QEMU.
    ram: u64,
}

impl Qemu {
    /// Boots a guest with `cpus` vCPUs under `qemu`, a program, and waits for its agent.
    ///
    /// # Errors
    /// What did not come up, and QEMU's own words.
    pub fn boot(qemu: &Path, style: Style, cpus: usize) -> Result<Self, String> {
        Self::boot_on(qemu, Machine::Q35, style, cpus)
    }

    /// The same with its memory in huge pages of the host's pool.
    ///
    /// # Errors
    /// As above.
    pub fn boot_in_huge_pages(qemu: &Path, style: Style, cpus: usize) -> Result<Self, String> {
        Self::boot_with(qemu, Machine::Q35, style, cpus, ",hugetlb=on,hugetlbsize=2M")
    }

    /// The same on another machine.
    ///
    /// # Errors
    /// As above.
    pub fn boot_on(
        qemu: &Path,
        machine: Machine,
        style: Style,
        cpus: usize,
    ) -> Result<Self, String> {
        Self::boot_with(qemu, machine, style, cpus, "")
    }

    fn boot_with(
        qemu: &Path,
        machine: Machine,
        style: Style,
        cpus: usize,
        memory: &str,
    ) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| format!("no place for sockets: {error}"))?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let log = File::create(at("log")).map_err(|error| format!("{}: {error}", at("log")))?;
        let mut command = Command::new(qemu);
        if style == Style::Intel {
            command.env("LD_PRELOAD", ser_p()?);
        }
        let mut child = command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(machine.arguments())
            .args(["-cpu", &style.cpu(), "-smp", &cpus.to_string(), "-m", &format!("{RAM_MIB}M")])
            // The same kind of memory as under mce-relay.
            .args([
                "-object",
                &format!("memory-backend-memfd,id=ram,size={RAM_MIB}M,share=on{memory}"),
            ])
            .args(["-kernel".as_ref(), image("vmlinux").as_os_str()])
            .args(["-initrd".as_ref(), image("initramfs.cpio").as_os_str()])
            .args(["-append", CMDLINE])
            .args(["-serial", &format!("file:{}", at("console"))])
            .args(match machine {
                Machine::Microvm => [
                    "-chardev".to_owned(),
                    format!("socket,id=agent,path={},server=on,wait=off", at("agent")),
                    "-device".to_owned(),
                    "isa-serial,chardev=agent,index=1".to_owned(),
                ],
                _ => [
                    "-serial".to_owned(),
                    format!("unix:{},server=on,wait=off", at("agent")),
                    "-name".to_owned(),
                    "guest".to_owned(),
                ],
            })
            .args(["-qmp", &format!("unix:{},server=on,wait=off", at("monitor"))])
            // A guest that resets or dies is kept as it is, with its log in its memory.
            .args(["-action", "reboot=shutdown,shutdown=pause"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(|error| error.to_string())?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("{}: {error}", qemu.display()))?;
        let up = Monitor::connect(Path::new(&at("monitor")), &mut child).and_then(|mut monitor| {
            let vendor = monitor.vendor()?;
            if vendor != style.vendor() {
                return Err(format!("its vendor is {vendor}, not {}", style.vendor()));
            }
            let agent = Agent::connect(Path::new(&at("agent")), false, false)?;
            let ram = monitor.hva(0)?;
            Ok((monitor, agent, ram))
        });
        match up {
            Ok((monitor, agent, ram)) => Ok(Self { child, dir, monitor, agent, ram }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = std::fs::read_to_string(at("log")).unwrap_or_default();
                let console = std::fs::read(at("console")).unwrap_or_default();
                let console = String::from_utf8_lossy(&console);
                let lines: Vec<&str> = console.lines().collect();
                let last = lines[lines.len().saturating_sub(5)..].join("\n");
                Err(format!(
                    "the guest did not come up: {error}; QEMU's log: {:?}; the guest's console ends so:\n{last}",
                    said.trim()
                ))
            }
        }
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has `work` talk to the agent in the guest.
    ///
    /// # Errors
    /// The guest does not answer, or refuses.
    pub fn agent<T>(&mut self, work: impl FnOnce(&mut Agent) -> T) -> Result<T, String> {
        // An agent that is silent fails a test; here it is something to report.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let result = catch_unwind(AssertUnwindSafe(|| work(&mut self.agent)));
        std::panic::set_hook(hook);
        result.map_err(|why| match why.downcast::<String>() {
            Ok(why) => *why,
            Err(_) => "no answer".to_owned(),
        })
    }

    /// Where QEMU has the page at guest-physical address `gpa`.
    ///
    /// # Errors
    /// It is not in the guest's RAM.
    pub fn hva(&self, gpa: u64) -> Result<u64, String> {
        if gpa < RAM_MIB << 20 {
            Ok(self.ram + gpa)
        } else {
            Err(format!("GPA {gpa:#x} is not in the guest's RAM of {RAM_MIB} MiB"))
        }
    }

    /// How many lines of QEMU's log say that an error was injected.
    pub fn claims(&self) -> usize {
        self.log().lines().filter(|line| Self::is_claim(line)).count()
    }

    /// Whether a line of QEMU's log says that an error was injected (kvm_arch_on_sigbus_vcpu in its
    /// target/i386/kvm/kvm.c).
    pub fn is_claim(line: &str) -> bool {
        line.contains("Guest MCE Memory Error") && line.contains("injected")
    }

    /// Whether QEMU has ended.
    pub fn is_gone(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// All that QEMU has said.
    pub fn log(&self) -> String {
        let said = std::fs::read(self.dir.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&said).into_owned()
    }

    /// How many QMP events of this name there were so far.
    pub fn events(&mut self, name: &str) -> usize {
        self.monitor.catch_up();
        self.monitor.events.iter().filter(|event| event["event"] == name).count()
    }

    /// How QEMU, or the guest, came to its end; `None` while both go on.
    pub fn end(&mut self) -> Option<String> {
        if let Ok(Some(status)) = self.child.try_wait() {
            let log = self.log();
            let last = log.lines().last().unwrap_or("nothing").trim().to_owned();
            return Some(format!("QEMU ended ({status}); its last words: {last}"));
        }
        self.monitor.catch_up();
        let stop = self.monitor.events.iter().find(|event| event["event"] == "SHUTDOWN")?;
        let reason = stop["data"]["reason"].as_str().unwrap_or("unknown").to_owned();
        Some(self.panicked().unwrap_or(format!("the guest was stopped ({reason}) without a panic")))
    }

    /// Whether the log of the guest's kernel says that it panicked, and its reason.
    pub fn panicked(&self) -> Option<String> {
        self.memory().panic.map(|reason| format!("the guest's kernel panicked: {reason}"))
    }

    /// What the log of the guest's kernel says, read from the guest's memory: for guests that can no
    /// longer be asked.
    pub fn memory(&self) -> Memory {
        let mut found = Memory::default();
        let Ok(mem) = File::open(format!("/proc/{}/mem", self.pid())) else { return found };
        let mut page = [0; PAGE_SIZE];
        let mut carried = Vec::new();
        for at in (self.ram..self.ram + (RAM_MIB << 20)).step_by(PAGE_SIZE) {
            // Poisoned pages cannot be read.
            if mem.read_exact_at(&mut page, at).is_err() {
                carried.clear();
                continue;
            }
            // A line may begin on one page and end on the next.
            let mut window = std::mem::take(&mut carried);
            window.extend_from_slice(&page);
            found.take(&window);
            carried.extend_from_slice(&window[window.len() - Memory::OVERLAP..]);
        }
        found
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What was found in the memory of a guest that can no longer be asked.
#[derive(Debug, Default)]
pub struct Memory {
    /// The kernel's reason for its panic.
    pub panic: Option<String>,
    /// The page frames that the kernel's log names as failed.
    pub failed: BTreeSet<u64>,
}

impl Memory {
    /// The longest text looked for that may be cut by the end of a page.
    const OVERLAP: usize = 256;

    fn take(&mut self, bytes: &[u8]) {
        for text in texts(bytes, b"Memory failure: 0x") {
            let digits = text.split(':').next().unwrap_or_default();
            self.failed.extend(u64::from_str_radix(digits, 16));
        }
        for text in texts(bytes, b"Kernel panic - not syncing: ") {
            // The kernel's own format string is there too.
            if self.panic.is_none() && !text.starts_with('%') {
                self.panic = Some(without_rest(&text).to_owned());
            }
        }
    }
}

/// A message in the log's buffer without what lies behind it. printk_sprint (kernel/printk/printk.c)
/// moves the text over the two bytes of its level, so that its last two stay there a second time.
fn without_rest(text: &str) -> &str {
    match text.as_bytes() {
        [.., a, b, c, d] if [a, b] == [c, d] => &text[..text.len() - 2],
        _ => text,
    }
}

/// The printable text behind each `start` in `bytes`.
fn texts<'b>(bytes: &'b [u8], start: &'b [u8]) -> impl Iterator<Item = String> + 'b {
    memmem::find_iter(bytes, start).map(move |at| {
        let text = bytes[at + start.len()..].iter();
        text.take_while(|byte| matches!(byte, b' '..=b'~')).map(|&byte| char::from(byte)).collect()
    })
}

/// QEMU's monitor (QMP). Events that come between replies are kept.
#[derive(Debug)]
struct Monitor {
    lines: BufReader<UnixStream>,
    out: UnixStream,
    /// What has come of a line that is not complete.
    part: Vec<u8>,
    events: Vec<Value>,
}

impl Monitor {
    fn connect(socket: &Path, qemu: &mut Child) -> Result<Self, String> {
        let start = Instant::now();
        let out = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => {
                    if let Ok(Some(status)) = qemu.try_wait() {
                        return Err(format!("QEMU ended ({status})"));
                    }
                    if start.elapsed() > PATIENCE {
                        return Err(format!("QEMU's monitor: {error}"));
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        };
        let lines = BufReader::new(out.try_clone().map_err(|error| error.to_string())?);
        let mut monitor = Self { lines, out, part: Vec::new(), events: Vec::new() };
        monitor.ask("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// The next line, if it comes within `time`.
    fn line(&mut self, time: Duration) -> Option<Value> {
        self.out.set_read_timeout(Some(time)).ok()?;
        self.lines.read_until(b'\n', &mut self.part).ok()?;
        if !self.part.ends_with(b"\n") {
            return None;
        }
        serde_json::from_slice(&std::mem::take(&mut self.part)).ok()
    }

    /// Takes the events that are there.
    fn catch_up(&mut self) {
        while let Some(line) = self.line(Duration::from_millis(1)) {
            self.events.push(line);
        }
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.out, "{request}").map_err(|error| format!("{command}: {error}"))?;
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            match self.line(PATIENCE) {
                Some(line) if line.get("return").is_some() => return Ok(line["return"].clone()),
                Some(line) if line.get("error").is_some() => {
                    return Err(format!("{command}: {}", line["error"]["desc"]));
                }
                Some(line) => self.events.push(line),
                None => break,
            }
        }
        Err(format!("{command}: QEMU's monitor does not answer"))
    }

    /// The vendor of the guest's processors.
    fn vendor(&mut self) -> Result<String, String> {
        let cpus = self.ask("query-cpus-fast", &json!({}))?;
        let vendor = json!({ "path": cpus[0]["qom-path"], "property": "vendor" });
        Ok(self.ask("qom-get", &vendor)?.as_str().unwrap_or_default().to_owned())
    }

    /// Where QEMU has guest-physical address `gpa`.
    fn hva(&mut self, gpa: u64) -> Result<u64, String> {
        let command = json!({ "command-line": format!("gpa2hva {gpa:#x}") });
        let reply = self.ask("human-monitor-command", &command)?;
        // "Host virtual address for 0x0 (ram) is 0x7f0000000000"
        let text = reply.as_str().unwrap_or_default().trim();
        let digits = text.rsplit_once(" is 0x").map(|(_, digits)| digits);
        digits
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| format!("gpa2hva {gpa:#x}: {text:?} is not an address"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_in_memory_is_read() {
        let mut found = Memory::default();
        found.take(b"\x01Kernel panic - not syncing: %s\0Memory failure: %#lx: Sending\0");
        assert!(found.panic.is_none() && found.failed.is_empty(), "{found:?}");
        found.take(b"\xffMemory failure: 0x1e03: recovery action\x02\0Memory failure: 0xa: x");
        found.take(b"Kernel panic - not syncing: Fatal machine checkck\x02");
        assert_eq!(found.failed, BTreeSet::from([0x1e03, 0xa]));
        assert_eq!(found.panic.as_deref(), Some("Fatal machine check"));
    }

    #[test]
    fn only_injections_are_claims() {
        // QEMU 10.0, with its warning's prefix.
        let line = "qemu-system-x86_64: warning: Guest MCE Memory Error at QEMU addr 0x7f12 and GUEST \
                    addr 0x1000 of type BUS_MCEERR_AO injected";
        assert!(Qemu::is_claim(line));
        assert!(!Qemu::is_claim(&line.replace(" injected", "")));
        assert!(!Qemu::is_claim("qemu-system-x86_64: warning: TSC frequency mismatch, injected"));
    }
}
