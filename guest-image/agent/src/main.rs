//! The guest side of mce-relay's tests.
//!
//! Runs as root in the guest, owns pages whose guest-physical addresses it tells, touches them
//! when asked to, survives the SIGBUS of those that are poisoned, and reports every signal and
//! every line of the kernel's log. `agent PORT [log=off]`: PORT is a serial port, `vsock:NUMBER`, or `-` for
//! stdin and stdout. See `proto` for the language.

mod claim;
mod disk;
mod failing;
mod failures;
mod kexec;
mod kmsg;
mod pages;
mod port;
mod process;
mod proto;
mod touch;
mod vsock;
mod words;

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use failures::Failures;
use kmsg::Log;
use pages::Pages;
use port::{Lines, Port};
use proto::{Account, Body, Event, Reply, Request};

const CHECK_INTERVAL: &str = "/sys/devices/system/machinecheck/machinecheck0/check_interval";
/// Most lines that `dmesg` answers with; the port is slow.
const MAX_DMESG: usize = 100;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (path, log) = match words[..] {
        [path] => (path, true),
        [path, "log=off"] => (path, false),
        _ => {
            eprintln!(
                "agent: got {words:?}, expected PORT [log=off], PORT a serial port, vsock:NUMBER or -"
            );
            return ExitCode::from(2);
        }
    };
    let done = match path.strip_prefix("vsock:") {
        Some(number) => vsock::serve(number, log),
        None => port::open(path).and_then(|(lines, port)| run(lines, Arc::new(port), log)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut lines: Lines, port: Arc<Port>, log: bool) -> Result<(), String> {
    let wake = touch::install(port.fd()).map_err(|e| format!("SIGBUS handler: {e}"))?;
    let early_kill = early(true).is_ok();
    let lost = |e: io::Error| format!("port: {e}");
    // Before anybody can ask for the log, so that `log on` means from then on.
    let log_on = Arc::new(AtomicBool::new(log));
    let opened = Log::open(&log_on).map_err(|e| format!("/dev/kmsg: {e}"));
    port.send(&hello(early_kill)).map_err(lost)?;
    let (log, lines_of_log) = match opened {
        Ok((log, lines)) => (Ok(Arc::new(Mutex::new(log))), Some(lines)),
        Err(error) => {
            port.send(&Event::Error { error: error.clone() }).map_err(lost)?;
            (Err(error), None)
        }
    };
    let mut agent = Agent { port, pages: Pages::default(), log, log_on };
    if let Some(lines) = lines_of_log {
        agent.start_log(lines)?;
    }
    loop {
        wait(lines.fd(), wake).map_err(|e| format!("poll: {e}"))?;
        agent.report_signals().map_err(lost)?;
        if !readable(lines.fd()) {
            continue;
        }
        match lines.read().map_err(lost)? {
            Some(requests) => {
                for line in requests {
                    agent.answer(&line).map_err(lost)?;
                }
            }
            None if agent.port.is_endless() => thread::sleep(Duration::from_millis(100)),
            None => return Ok(()),
        }
    }
}

fn hello(early_kill: bool) -> Event {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let vendor = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("vendor_id")?.split_once(": "))
        .map_or("unknown", |(_, vendor)| vendor);
    // SAFETY: sysconf takes no pointers.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    Event::Hello {
        version: env!("CARGO_PKG_VERSION"),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        cpus: u32::try_from(cpus).unwrap_or(0),
        vendor: vendor.to_owned(),
        early_kill,
    }
}

/// Waits for a request or a signal.
fn wait(port: i32, wake: i32) -> io::Result<()> {
    let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [entry(port), entry(wake)];
    // SAFETY: two valid entries; the eventfd is emptied into 8 bytes of our own.
    unsafe {
        if libc::poll(fds.as_mut_ptr(), 2, -1) < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            };
        }
        if fds[1].revents != 0 {
            let mut count = 0u64;
            libc::read(wake, (&raw mut count).cast(), 8);
        }
    }
    Ok(())
}

fn readable(fd: i32) -> bool {
    let mut entry = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut entry, 1, 0) > 0 }
}

/// Sets when this thread is told of poison: at once, or when it runs into it.
fn early(on: bool) -> Result<bool, String> {
    let policy = match on {
        true => libc::PR_MCE_KILL_EARLY,
        false => libc::PR_MCE_KILL_LATE,
    };
    // SAFETY: prctl takes numbers here.
    let now = unsafe {
        if libc::prctl(libc::PR_MCE_KILL, libc::PR_MCE_KILL_SET, policy, 0, 0) < 0 {
            return Err(format!("PR_MCE_KILL: {}", io::Error::last_os_error()));
        }
        libc::prctl(libc::PR_MCE_KILL_GET, 0, 0, 0, 0)
    };
    Ok(now == libc::PR_MCE_KILL_EARLY)
}

/// An end of the guest, after which nothing is answered.
#[derive(Debug)]
enum End {
    /// By reboot(2).
    Reboot(i32),
    /// By a panic of its kernel.
    Panic,
}

impl End {
    /// Has it come; returns only if it does not.
    fn come(&self) -> io::Result<()> {
        match self {
            // SAFETY: reboot takes no pointers.
            Self::Reboot(command) => match unsafe { libc::reboot(*command) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            },
            Self::Panic => fs::write("/proc/sysrq-trigger", "c"),
        }
    }
}

struct Agent {
    port: Arc<Port>,
    pages: Pages,
    /// The kernel's log, or why there is none.
    log: Result<Arc<Mutex<Log>>, String>,
    log_on: Arc<AtomicBool>,
}

impl Agent {
    /// Starts a thread that keeps the log read, and one that sends its lines: reading must not wait
    /// for a slow port, or the kernel overwrites what was not read.
    fn start_log(&self, lines: Receiver<Event>) -> Result<(), String> {
        let Ok(log) = self.log.clone() else { return Ok(()) };
        let (port, on) = (Arc::clone(&self.port), Arc::clone(&self.log_on));
        self.start("log", move || {
            kmsg::follow(&log).map_err(|e| format!("/dev/kmsg: {e}; the log ends here"))
        })?;
        self.start("log lines", move || {
            kmsg::send(&lines, &port, &on).map_err(|e| format!("port: {e}; the log ends here"))
        })
    }

    fn start(
        &self,
        name: &str,
        work: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<(), String> {
        let port = Arc::clone(&self.port);
        let body = move || {
            // The policy is inherited, and the kernel tells the first early thread it finds.
            if let Err(error) = early(false).and_then(|_| work()) {
                let _ = port.send(&Event::Error { error });
            }
        };
        thread::Builder::new()
            .name(name.into())
            .spawn(body)
            .map(drop)
            .map_err(|e| format!("{name} thread: {e}"))
    }

    /// The log, with all that the kernel has written by now.
    fn log(&self) -> Result<MutexGuard<'_, Log>, String> {
        let mut log = self.log.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        log.catch_up().map_err(|e| format!("/dev/kmsg: {e}"))?;
        Ok(log)
    }

    fn failures(&self, what: Account) -> Result<Body, String> {
        let mut log = self.log()?;
        let account = log.failures.account(what == Account::Full);
        if what == Account::Reset {
            log.failures = Failures::default();
        }
        Ok(account)
    }

    fn check(&mut self, except: &[RangeInclusive<u32>]) -> Body {
        // A log that cannot be read names no pages.
        if let Ok(log) = self.log.clone() {
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = log.catch_up();
            self.pages.learn(&log.failures);
        }
        self.pages.check(except)
    }

    fn report_signals(&mut self) -> io::Result<()> {
        while let Some(fault) = touch::next_ao() {
            let page = self.pages.hit(fault.addr);
            let sigbus = fault.into();
            self.port.send(&Event::Sigbus { sigbus, page })?;
        }
        match touch::lost_aos() {
            0 => Ok(()),
            count => self.port.send(&Event::SigbusLost { count }),
        }
    }

    fn answer(&mut self, line: &str) -> io::Result<()> {
        // First, so that `check` leaves alone what is known to be lost.
        self.report_signals()?;
        let request = proto::parse(line);
        let end = match request {
            _ if !self.port.is_machine() => None,
            Ok(Request::Reboot) => Some(End::Reboot(libc::LINUX_REBOOT_CMD_RESTART)),
            Ok(Request::Poweroff) => Some(End::Reboot(libc::LINUX_REBOOT_CMD_POWER_OFF)),
            Ok(Request::Panic) => Some(End::Panic),
            _ => None,
        };
        let result = match end {
            Some(_) => Ok(Body::None {}),
            None => request.and_then(|request| self.perform(request)),
        };
        // What a request set off is told before its reply, so that a test that has the reply
        // need not wait for more.
        self.report_signals()?;
        self.port.send(&Reply::new(proto::verb(line), result))?;
        if let Some(end) = end {
            self.log_on.store(false, Ordering::Relaxed);
            self.port.drain();
            let error = match end.come() {
                Ok(()) => "the kernel goes on".to_owned(),
                Err(error) => format!("{end:?}: {error}"),
            };
            self.port.send(&Event::Error { error })?;
        }
        Ok(())
    }

    fn perform(&mut self, request: Request) -> Result<Body, String> {
        match request {
            Request::Ping => Ok(Body::Ping { pid: std::process::id() }),
            Request::Alloc { kind, count, runs } => self.pages.alloc(kind, count, runs),
            Request::Gpa { page, offset } => self.pages.gpa(page, offset),
            Request::Touch { page, how, offset } => self.pages.touch(page, how, offset),
            Request::Check { except } => Ok(self.check(&except)),
            Request::Free { page } => self.pages.free(page),
            Request::Interval { seconds } => interval(seconds),
            Request::Log { on } => {
                self.log_on.store(on, Ordering::Relaxed);
                Ok(Body::Switch { on })
            }
            Request::Failures { what } => self.failures(what),
            Request::Sigbus { quiet } => {
                if let Some(quiet) = quiet {
                    touch::set_quiet(quiet);
                }
                let (quiet, ao) = touch::aos();
                Ok(Body::Sigbus { quiet, ao })
            }
            Request::Dmesg { pattern } => dmesg(&pattern),
            Request::Early { on } => early(on).map(|on| Body::Switch { on }),
            Request::Cpu { cpu } => pin(cpu),
            Request::Online { cpu, on } if self.port.is_machine() => online(cpu, on),
            Request::Process { which, max } => {
                process::pages(&which, max, &|va| self.pages.owns(va))
            }
            Request::Claim { frames } if self.port.is_machine() => {
                claim::claim(&frames, usize::MAX)
            }
            Request::Kexec if self.port.is_machine() => kexec::load().map(|()| Body::None {}),
            Request::Meminfo => {
                Ok(Body::Meminfo { hardware_corrupted_kb: pages::meminfo("HardwareCorrupted")? })
            }
            Request::Clock => {
                let micros = kmsg::clock().map_err(|e| format!("/dev/kmsg: {e}"))?;
                Ok(Body::Clock { time: micros as f64 / 1e6 })
            }
            Request::Failing { count } if self.port.is_machine() => failing::pages(count),
            Request::Disk(request) => self.disk(&request),
            Request::Echo { port } if self.port.is_machine() => {
                vsock::echo(port).map(|bytes| Body::Echo { bytes })
            }
            Request::Claim { .. }
            | Request::Echo { .. }
            | Request::Failing { .. }
            | Request::Kexec
            | Request::Online { .. }
            | Request::Reboot
            | Request::Poweroff
            | Request::Panic => {
                Err("refused: only over a serial port or vsock, because - may be your own machine"
                    .into())
            }
        }
    }
}

impl Agent {
    fn disk(&self, request: &disk::words::Request) -> Result<Body, String> {
        let announce = |write, read| {
            // A port that is gone shows by the reply.
            let _ = self.port.send(&Event::DiskLoad { write, read });
        };
        disk::perform(request, self.port.is_machine(), announce).map(Body::Disk)
    }
}

/// Has the kernel take a processor offline, or bring it back.
fn online(cpu: usize, on: bool) -> Result<Body, String> {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
    fs::write(&path, if on { "1" } else { "0" }).map_err(|error| format!("{path}: {error}"))?;
    Ok(Body::Switch { on })
}

fn interval(seconds: u32) -> Result<Body, String> {
    let named = |e| format!("{CHECK_INTERVAL}: {e}");
    fs::write(CHECK_INTERVAL, seconds.to_string()).map_err(named)?;
    let interval = fs::read_to_string(CHECK_INTERVAL).map_err(named)?;
    let interval = interval.trim().to_owned();
    Ok(Body::Interval { interval })
}

fn dmesg(pattern: &str) -> Result<Body, String> {
    let mut lines = kmsg::grep(pattern).map_err(|e| format!("/dev/kmsg: {e}"))?;
    let count = lines.len();
    lines.drain(..count.saturating_sub(MAX_DMESG));
    Ok(Body::Dmesg { count, lines })
}

/// Pins this thread, which does all touches, to a CPU.
fn pin(cpu: usize) -> Result<Body, String> {
    // SAFETY: all-zero is an empty cpu_set_t, and `cpu` is below its 1024.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
    };
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(format!("cpu {cpu}: {error}; expected a CPU that is online"));
    }
    // SAFETY: no arguments.
    let cpu = unsafe { libc::sched_getcpu() };
    Ok(Body::Cpu { cpu })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    #[test]
    fn an_ao_is_an_event_that_names_the_page_and_comes_before_the_reply() {
        touch::install(2).unwrap();
        let (mut from, to) = io::pipe().unwrap();
        let mut agent = Agent {
            port: Arc::new(Port::new(File::from(OwnedFd::from(to)), port::Kind::Stdio)),
            pages: Pages::default(),
            log: Err("no log".into()),
            log_on: Arc::default(),
        };
        let Body::Alloc { pages } = agent.pages.alloc(proto::Kind::Anon, 2, false).unwrap() else {
            panic!("no alloc")
        };
        touch::tests::forge(touch::BUS_MCEERR_AO, pages[1].va.0, 12);
        touch::tests::forge(touch::BUS_MCEERR_AO, 0x1000, 21);
        agent.answer("check").unwrap();
        agent.answer("reboot").unwrap();
        agent.answer("meminfo now").unwrap();
        agent.answer("sigbus count").unwrap();
        touch::tests::forge(touch::BUS_MCEERR_AO, 0x2000, 12);
        agent.answer("sigbus events").unwrap();
        touch::tests::forge(touch::BUS_MCEERR_AO, 0x3000, 12);
        agent.answer("failures").unwrap();
        drop(agent);
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let va = pages[1].va.0;
        assert_eq!(lines.len(), 9, "{text}");
        assert_eq!(
            lines[0],
            format!(r#"{{"event":"sigbus","code":"AO","addr":"{va:#x}","lsb":12,"page":1}}"#)
        );
        assert_eq!(lines[1], r#"{"event":"sigbus","code":"AO","addr":"0x1000","lsb":21}"#);
        assert_eq!(
            lines[2],
            r#"{"reply":"check","ok":true,"intact":1,"bad":[],"skipped":[[1,1]]}"#
        );
        assert!(lines[3].starts_with(r#"{"reply":"reboot","ok":false,"#));
        assert!(lines[4].starts_with(r#"{"reply":"meminfo","ok":false,"#));
        assert_eq!(lines[5], r#"{"reply":"sigbus","ok":true,"quiet":true,"ao":2}"#);
        assert_eq!(lines[6], r#"{"reply":"sigbus","ok":true,"quiet":false,"ao":3}"#);
        assert!(lines[7].contains(r#""addr":"0x3000""#), "{}", lines[7]);
        assert_eq!(lines[8], r#"{"reply":"failures","ok":false,"error":"no log"}"#);
    }
}
