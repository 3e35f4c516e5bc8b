//! Says where everything stands when a test has failed, or takes long: every thread of this process and of all
//! that it has started, and what these have said.
//!
//! Whichever wait it was that has ended in a timeout, it ends in a panic; so the evidence is gathered there,
//! while the processes still live, and no wait has to see to it.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::lab;

/// So many of the last lines that a process has said.
const LINES: usize = 40;
/// A test that takes longer is looked at while it runs, again and again: the lab is ended after a while,
/// and what has hung there says nothing afterwards.
const LONG: Duration = Duration::from_secs(300);

/// Where this process and all its descendants stand.
#[must_use]
pub fn report() -> String {
    let mut text = "--- where everything stands\n".to_owned();
    for pid in family(std::process::id()) {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let _ = write!(text, "process {pid}: {command}\n{}", lab::threads(pid));
        if let Some(said) = said(pid) {
            let lines: Vec<&str> = said.lines().collect();
            let _ = writeln!(text, "its stderr, {} bytes:", said.len());
            for line in &lines[lines.len().saturating_sub(LINES)..] {
                let _ = writeln!(text, "  {line}");
            }
        }
    }
    text
}

/// What a process has written on its stderr, if that is a file of its own.
fn said(pid: u32) -> Option<String> {
    let path = PathBuf::from(format!("/proc/{pid}/fd/2"));
    let target = std::fs::read_link(&path).ok()?;
    let ours = std::fs::read_link("/proc/self/fd/2").ok();
    let kind = std::fs::metadata(&path).ok()?.file_type();
    if ours.is_some_and(|ours| ours == target) || !kind.is_file() {
        return None;
    }
    Some(String::from_utf8_lossy(&std::fs::read(&path).ok()?).into_owned())
}

/// `pid` and all its descendants, the elder first.
fn family(pid: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // proc_pid_stat(5): the parent is the second field behind the name.
        let parent = stat.rsplit_once(')').and_then(|it| it.1.split_whitespace().nth(1));
        if let Some(parent) = parent.and_then(|parent| parent.parse().ok()) {
            children.entry(parent).or_default().push(child);
        }
    }
    let mut all = vec![pid];
    let mut at = 0;
    while let Some(one) = all.get(at) {
        all.extend(children.get(one).cloned().unwrap_or_default());
        at += 1;
    }
    all
}

/// Prints it. Nobody may listen any more, which is no reason to panic in a panic.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Has every panic of this process followed by [`report`].
pub fn report_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        say(&report());
    }));
}

/// Looks at everything while this lives longer than a test should.
#[derive(Debug)]
pub struct Watch {
    /// Its end is this one's.
    _over: Sender<()>,
}

impl Watch {
    /// Looks after `name`.
    #[must_use]
    pub fn over(name: &'static str) -> Self {
        Self::after(name, LONG)
    }

    fn after(name: &'static str, long: Duration) -> Self {
        let (over, is_over) = channel();
        let watch = move || {
            let start = Instant::now();
            while is_over.recv_timeout(long) == Err(RecvTimeoutError::Timeout) {
                let seconds = start.elapsed().as_secs();
                say(&format!("{name} has taken {seconds} s so far\n{}", report()));
            }
        };
        without_signals(|| std::thread::spawn(watch));
        Self { _over: over }
    }
}

/// Starts a thread that no signal is delivered to: those that are sent to the process are the test's.
fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are written before they are read, the calls take valid pointers, and the mask is put
    // back on the thread that it was taken from.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let started = start();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        started
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_that_waits_is_shown_with_its_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "echo out of order >&2; echo ready; read -r never"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file.reopen().unwrap())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let report = report();
        drop(child.stdin.take());
        child.wait().unwrap();
        println!("{report}");
        let (_, about) = report.split_once(&format!("process {}: sh -c", child.id())).unwrap();
        assert!(about.contains(" wchan ") && about.contains(" syscall "), "{about}");
        assert!(about.contains("its stderr, 13 bytes:\n  out of order\n"), "{about}");
    }
}
