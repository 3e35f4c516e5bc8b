//! Talks to the agent inside a guest, over the guest's second serial port.

use std::collections::{BTreeSet, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long an emulated guest may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(90);

const PAGE_SIZE: u64 = 4096;

/// How the agent's first words begin.
const HELLO: &str = r#"{"event":"hello""#;

/// A page that the agent owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// The agent's number for it.
    pub number: u64,
    /// Guest-physical address.
    pub gpa: u64,
}

/// The agent. Replies and events come on one stream; events wait here until they are asked for.
#[derive(Debug)]
pub struct Agent {
    lines: BufReader<UnixStream>,
    out: UnixStream,
    events: VecDeque<Value>,
    /// The beginning of a line whose end has not come yet.
    begun: Vec<u8>,
    /// Print every line of the guest's kernel log as it comes.
    pub echo: bool,
}

impl Agent {
    /// Connects to the socket of the second serial port and waits for the agent's first words; with
    /// `log`, has it send the guest's kernel log from then on.
    pub fn connect(socket: &Path, log: bool, echo: bool) -> Result<Self, String> {
        let mut agent = Self::at(socket, echo)?;
        agent.up(log)?;
        Ok(agent)
    }

    /// Waits on the same connection for the first words of the agent of the next boot. What comes of the one
    /// before until then, whole lines or not, is nobody's any more.
    pub fn next_boot(&mut self, log: bool) -> Result<(), String> {
        self.events.clear();
        self.up(log)
    }

    fn up(&mut self, log: bool) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        // It may come behind half a line of a guest that is gone.
        while !self.text(deadline)?.contains(HELLO) {}
        // From here on; the lines of the boot are not worth their time on an emulated port.
        if log {
            self.ask("log on");
        }
        Ok(())
    }

    /// Connects to an agent that said its first words to somebody else.
    pub fn again(socket: &Path, echo: bool) -> Result<Self, String> {
        let mut agent = Self::at(socket, echo)?;
        agent.ask("ping");
        Ok(agent)
    }

    /// Has the VMM's vsock socket connect to an agent at the guest's `port`, as soon as there is one.
    pub fn over_vsock(socket: &Path, port: u32) -> Result<Self, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut agent = Self::at(socket, false)?;
            agent.tell(&format!("CONNECT {port}"));
            match agent.text(deadline) {
                Ok(line) if line.starts_with("OK ") => {
                    agent.up(false)?;
                    return Ok(agent);
                }
                Ok(line) => return Err(format!("{line:?} in place of OK")),
                // Nobody listens there yet.
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until the other side has closed the connection.
    pub fn is_hung_up(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while self.text(deadline).is_ok() {}
        Instant::now() < deadline
    }

    fn at(socket: &Path, echo: bool) -> Result<Self, String> {
        let start = Instant::now();
        let out = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > PATIENCE => return Err(error.to_string()),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        let lines = BufReader::new(out.try_clone().map_err(|error| error.to_string())?);
        Ok(Self { lines, out, events: VecDeque::new(), begun: Vec::new(), echo })
    }

    /// The next line, or why there is none before `deadline`.
    fn text(&mut self, deadline: Instant) -> Result<String, String> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("the guest's agent was silent for too long".to_owned());
            }
            self.out.set_read_timeout(Some(left)).map_err(|error| error.to_string())?;
            match self.lines.read_until(b'\n', &mut self.begun) {
                Ok(0) => return Err("the VMM closed the agent's serial port".to_owned()),
                Ok(_) if self.begun.ends_with(b"\n") => break,
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(String::from_utf8_lossy(&std::mem::take(&mut self.begun)).into_owned())
    }

    /// The same as what it stands for.
    fn line(&mut self, deadline: Instant) -> Result<Value, String> {
        let line = self.text(deadline)?;
        let value: Value =
            serde_json::from_str(&line).map_err(|error| format!("{error}: {line:?}"))?;
        if self.echo && value["event"] == "kmsg" {
            println!("  guest | {}", value["line"].as_str().unwrap_or_default());
        }
        Ok(value)
    }

    /// Leaves the port to somebody else.
    pub fn hang_up(&self) {
        self.out.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// Sends a request that nobody may live to answer.
    pub fn tell(&mut self, request: &str) {
        writeln!(self.out, "{request}").unwrap();
    }

    /// Sends one request and waits for its reply; events that come first are kept.
    pub fn ask(&mut self, request: &str) -> Value {
        self.tell(request);
        let reply = self.reply(request, Instant::now() + PATIENCE);
        reply.unwrap_or_else(|error| panic!("{request}: {error}"))
    }

    /// Waits for the reply to `request`, which was sent before, until `deadline`.
    pub fn reply(&mut self, request: &str, deadline: Instant) -> Result<Value, String> {
        let value = self.any_reply(deadline)?;
        assert_eq!(value["ok"], true, "{request}: {value}");
        Ok(value)
    }

    /// Asks for what the agent may refuse; its reply.
    pub fn try_to_ask(&mut self, request: &str) -> Value {
        self.tell(request);
        let reply = self.any_reply(Instant::now() + PATIENCE);
        reply.unwrap_or_else(|error| panic!("{request}: {error}"))
    }

    fn any_reply(&mut self, deadline: Instant) -> Result<Value, String> {
        loop {
            let value = self.line(deadline)?;
            if value.get("reply").is_some() {
                return Ok(value);
            }
            self.events.push_back(value);
        }
    }

    /// Waits for an event that `wanted` accepts. Events are used up by being found.
    pub fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value, String> {
        if let Some(at) = self.events.iter().position(&wanted) {
            return Ok(self.events.remove(at).unwrap_or_default());
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.line(deadline)?;
            if wanted(&value) {
                return Ok(value);
            }
            self.events.push_back(value);
        }
    }

    /// Allocates `count` pages of `kind`.
    pub fn alloc(&mut self, kind: &str, count: usize) -> Vec<Page> {
        let reply = self.ask(&format!("alloc {kind} {count}"));
        let pages: Vec<Page> = reply["pages"]
            .as_array()
            .expect("a list of pages")
            .iter()
            .map(|page| Page { number: page["page"].as_u64().unwrap(), gpa: hex(&page["gpa"]) })
            .collect();
        assert_eq!(pages.len(), count);
        pages
    }

    /// Allocates `count` pages of 4 KiB; for many, as the reply is short.
    pub fn alloc_many(&mut self, kind: &str, count: usize) -> Vec<Page> {
        let reply = self.ask(&format!("alloc {kind} {count} runs"));
        assert_eq!(reply["bytes"], PAGE_SIZE, "{reply}");
        let gpas = runs(&reply["runs"], PAGE_SIZE);
        let first = reply["first"].as_u64().unwrap();
        let pages: Vec<Page> =
            (first..).zip(gpas).map(|(number, gpa)| Page { number, gpa }).collect();
        assert_eq!(pages.len(), count);
        pages
    }

    /// Has the agent take memory until it comes by the pages at `gpas` or little is left, and write and read
    /// those; how many it came by.
    pub fn claim(&mut self, gpas: &BTreeSet<u64>) -> usize {
        let frames = spans(gpas.iter().map(|gpa| gpa / PAGE_SIZE)).join(" ");
        let reply = self.ask(&format!("claim {frames}"));
        assert_eq!(reply["wanted"], gpas.len(), "{reply}");
        assert_eq!(reply["intact"], reply["held"], "they hold what was written: {reply}");
        reply["held"].as_u64().and_then(|held| usize::try_from(held).ok()).unwrap()
    }

    /// What the guest's kernel has logged of failed memory since its boot, in numbers.
    pub fn failures_count(&mut self) -> Value {
        self.ask("failures count")
    }

    /// The same, and the page frames it named.
    pub fn failures(&mut self) -> (BTreeSet<u64>, Value) {
        let mut reply = self.ask("failures");
        let pfns: BTreeSet<u64> = runs(&reply["runs"].take(), 1).into_iter().collect();
        assert_eq!(reply["pfns"], pfns.len(), "{reply}");
        (pfns, reply)
    }

    /// Sets this host's clock beside that of the guest's log.
    pub fn clock(&mut self) -> Clock {
        // Of a few tries the one that was answered fastest tells most.
        let tries = (0..5).map(|_| {
            let asked = Instant::now();
            let reply = self.ask("clock");
            (asked.elapsed(), asked, reply["time"].as_f64().unwrap())
        });
        let (took, asked, guest) = tries.min_by_key(|(took, ..)| *took).unwrap();
        Clock { host: asked + took / 2, guest, error: took / 2 }
    }

    /// Touches a page; `how` is read, write, kernel-copy or spin.
    pub fn touch(&mut self, page: Page, how: &str) -> Value {
        self.ask(&format!("touch {} {how}", page.number))
    }

    /// Waits for the line of the guest's own kernel log that names `page` as failed memory.
    pub fn memory_failure(&mut self, page: Page) -> String {
        let start = format!("Memory failure: {:#x}: ", page.gpa >> 12);
        let found = self.event(|event| {
            event["event"] == "kmsg"
                && event["line"].as_str().is_some_and(|line| line.contains(&start))
        });
        let event = found.unwrap_or_else(|error| panic!("no line {start:?}: {error}"));
        event["line"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits until the guest's kernel has told the agent, by SIGBUS AO, that `page` is gone.
    pub fn sigbus_ao(&mut self, page: Page) -> Value {
        let found = self.event(|event| event["event"] == "sigbus" && event["page"] == page.number);
        let event = found.unwrap_or_else(|error| panic!("no SIGBUS for {page:?}: {error}"));
        assert_eq!(event["code"], "AO", "{event}");
        event
    }

    /// Reads all pages but `gone`, and sees that each holds what it should.
    pub fn others_intact(&mut self, all: &[Page], gone: &[Page]) {
        let except = spans(gone.iter().map(|page| page.number)).join(" ");
        let reply = match gone {
            [] => self.ask("check"),
            _ => self.ask(&format!("check except {except}")),
        };
        let intact = reply["intact"].as_u64().unwrap();
        assert_eq!(intact, (all.len() - gone.len()) as u64, "{reply}");
        assert!(reply["bad"].as_array().is_none_or(Vec::is_empty), "{reply}");
    }
}

/// One moment on this host's clock and on that of a guest's log.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    host: Instant,
    guest: f64,
    /// How far the two may be apart.
    pub error: Duration,
}

impl Clock {
    /// Seconds from `since` to the guest's `time`.
    pub fn seconds(&self, since: Instant, time: f64) -> f64 {
        let to = |later: Instant, sooner: Instant| (later - sooner).as_secs_f64();
        let since = if since > self.host { to(since, self.host) } else { -to(self.host, since) };
        time - self.guest - since
    }
}

/// The numbers of `[["0x…", count], …]`, each run's in steps of `step`.
fn runs(value: &Value, step: u64) -> Vec<u64> {
    let run = |run: &Value| {
        let (first, count) = (hex(&run[0]), run[1].as_u64().unwrap());
        (0..count).map(move |index| first + index * step)
    };
    value.as_array().expect("a list of runs").iter().flat_map(run).collect()
}

/// Numbers as `check except` takes them: `3`, `17-4112`.
fn spans(numbers: impl Iterator<Item = u64>) -> Vec<String> {
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match spans.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => spans.push((number, number)),
        }
    }
    spans.iter().map(|(first, last)| format!("{first}-{last}")).collect()
}

/// The number behind `"0x…"`.
pub fn hex(value: &Value) -> u64 {
    let digits = value.as_str().and_then(|text| text.strip_prefix("0x"));
    let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
    number.unwrap_or_else(|| panic!("{value} is not an address"))
}
