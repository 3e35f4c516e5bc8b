//! A VMM that does not answer, because something has stopped it: every command says so soon, says how the
//! process stands and what to do, and does not wait for ever.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use mce_relay_tests::guest::binary;
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::tiny::elf;
use serde_json::Value;
use tempfile::TempDir;

/// A slow machine may take so long for what is there at once elsewhere.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a start may take that is refused; on a quiet machine it is two seconds at most.
const START: Duration = Duration::from_secs(10);

/// VMs with names, below a directory of their own. Dropping it kills them.
struct Named {
    vmms: Vec<Child>,
    dir: TempDir,
}

impl Named {
    fn start(names: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kernel"), elf(&SPIN)).unwrap();
        let mut vms = Self { vmms: Vec::new(), dir };
        for name in names {
            let serial = vms.path(&format!("{name}.agent")).display().to_string();
            let mut run = vms.tool(&["run", "--name", name, "--serial", "off", "--memory", "32M"]);
            run.arg("--serial2").arg(format!("socket={serial}"));
            run.arg("--kernel").arg(vms.path("kernel")).stdout(Stdio::null()).stderr(Stdio::null());
            vms.vmms.push(run.spawn().unwrap());
        }
        for name in names {
            let start = Instant::now();
            while !vms.tool(&["status", "--vm", name]).output().unwrap().status.success() {
                assert!(start.elapsed() < PATIENCE, "{name} does not run");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        vms
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tool(&self, args: &[&str]) -> Command {
        let mut tool = Command::new(binary());
        tool.args(args).env("XDG_RUNTIME_DIR", self.dir.path()).stdin(Stdio::null());
        tool
    }

    /// The command line of another VM that wants what the first one has.
    fn second<'a>(&self, option: &'a str, value: &'a str) -> Vec<&'a str> {
        let kernel: &'static str = self.path("kernel").display().to_string().leak();
        vec!["run", "--serial", "off", "--memory", "32M", "--kernel", kernel, option, value]
    }

    fn signal(&self, vmm: usize, signal: i32) {
        let pid = self.vmms[vmm].id();
        // SAFETY: sends a signal to a child that has not been waited for.
        unsafe { libc::kill(pid.cast_signed(), signal) };
        let expected = if signal == libc::SIGSTOP { 'T' } else { 'S' };
        let start = Instant::now();
        while state(pid) != expected {
            assert!(start.elapsed() < PATIENCE, "{pid} is {:?}", state(pid));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        for vmm in &mut self.vmms {
            let _ = vmm.kill();
            let _ = vmm.wait();
        }
    }
}

/// Of a process: proc_pid_stat(5).
fn state(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

fn listed(vms: &Named) -> (Duration, Vec<Value>) {
    let start = Instant::now();
    let out = vms.tool(&["list", "--json"]).output().unwrap();
    let took = start.elapsed();
    assert!(out.status.success(), "{out:?}");
    (took, serde_json::from_slice(&out.stdout).unwrap())
}

/// Three of four are stopped: `list` shows all of them within the two seconds that it has for one.
pub fn a_list_says_who_is_stopped() {
    let vms = Named::start(&["a", "b", "c", "d"]);
    let (_, before) = listed(&vms);
    assert!(
        before.iter().all(|vm| vm["state"] == "running" && vm["advice"].is_null()),
        "{before:?}"
    );
    for vmm in [0, 1, 3] {
        vms.signal(vmm, libc::SIGSTOP);
    }
    let (took, during) = listed(&vms);
    println!("    {:.1} s for three that are stopped: {}", took.as_secs_f64(), during[0]);
    // One after the other it would be six, and as it was 240.
    assert!(took < Duration::from_secs(5), "{took:?}");
    for (vmm, vm) in during.iter().enumerate() {
        let pid = vms.vmms[vmm].id();
        assert_eq!(vm["pid"], pid, "{vm}");
        if vmm == 2 {
            assert_eq!((&vm["state"], &vm["paused"]), (&"running".into(), &false.into()), "{vm}");
            continue;
        }
        assert_eq!((&vm["state"], &vm["memory"]), (&"stopped".into(), &Value::Null), "{vm}");
        let advice = vm["advice"].as_str().unwrap();
        assert!(advice.contains(&format!("kill -CONT {pid}")), "{advice}");
    }
    let out = vms.tool(&["list"]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("stopped") && !text.contains("boots"), "{text}");

    for vmm in [0, 1, 3] {
        vms.signal(vmm, libc::SIGCONT);
    }
    let start = Instant::now();
    while listed(&vms).1.iter().any(|vm| vm["state"] != "running") {
        assert!(start.elapsed() < PATIENCE, "{:?}", listed(&vms));
    }
}

/// More have come to a stopped VM, and gone again, than the kernel lets wait for it: a name is found all the same,
/// and nobody is held. Its process is named, though nobody can connect; also to whoever wants its name or its path.
pub fn a_list_of_one_that_many_have_asked() {
    let vms = Named::start(&["asked"]);
    vms.signal(0, libc::SIGSTOP);
    let socket = vms.path("mce-relay/asked.sock");
    let mut waiting = 0;
    while mce_relay_vmm::outlets::peer::connect(&socket, Duration::from_millis(200)).is_ok() {
        waiting += 1;
        assert!(waiting < 100_000, "there is no end to them");
    }
    let (took, during) = listed(&vms);
    println!("    {waiting} have come and gone; {:.1} s", took.as_secs_f64());
    assert!(took < Duration::from_secs(5) && during.len() == 1, "{took:?}: {during:?}");
    let (state, pid) = (&during[0]["state"], &during[0]["pid"]);
    assert_eq!((state.as_str(), pid), (Some("stopped"), &vms.vmms[0].id().into()), "{during:?}");

    let status = || ends_with_words("status", &vms, &["status", "--vm", "asked"]);
    let by_name = || ends_with_words("run --name", &vms, &vms.second("--name", "asked"));
    let path = format!("path={}", socket.display());
    let by_path = || ends_with_words("run --api-socket", &vms, &vms.second("--api-socket", &path));
    let took = std::thread::scope(|scope| {
        let status = scope.spawn(status);
        let starts = [scope.spawn(by_name), scope.spawn(by_path)];
        let took = starts.map(|start| start.join().unwrap());
        status.join().unwrap();
        took
    });
    assert!(took.iter().all(|took| *took < START), "{took:?}");
    vms.signal(0, libc::SIGCONT);
}

/// Runs a command about the first VM, which is stopped, and sees that it ends with words on that; how long it took.
fn ends_with_words(what: &str, vms: &Named, args: &[&str]) -> Duration {
    let start = Instant::now();
    let out = vms.tool(args).output().unwrap();
    let took = start.elapsed();
    words_of_the_stopped(what, &out, took, vms.vmms[0].id());
    took
}

fn words_of_the_stopped(what: &str, out: &Output, took: Duration, pid: u32) {
    let stderr = String::from_utf8_lossy(&out.stderr);
    println!("    {what}: {:.1} s: {}", took.as_secs_f64(), stderr.trim_end().replace('\n', " / "));
    assert_eq!(out.status.code(), Some(1), "{what}: {stderr}");
    assert!(out.stdout.is_empty(), "{what}");
    assert!(stderr.contains(&format!("kill -CONT {pid}")), "{what}: {stderr}");
    assert!(stderr.contains("not answer"), "{what}: {stderr}");
    assert!(took < PATIENCE, "{what}: {took:?}");
}

/// Commands that need an answer, all at the same time.
pub fn commands_do_not_wait_for_ever() {
    let vms = Named::start(&["a"]);
    vms.signal(0, libc::SIGSTOP);
    let dump = vms.path("dump").display().to_string();
    let agent = format!("path={}", vms.path("a.agent").display());
    let commands: [&[&str]; 9] = [
        &["status"],
        &["events", "--follow"],
        &["poison", "--via", "signal", "--gpa", "0x5000"],
        &["poison", "--via", "signal", "--pid", "sh", "--agent", &agent],
        &["retire", "--gpa", "0x5000"],
        &["inject", "--status", "deferred"],
        &["pause"],
        &["memory", "dump", &dump],
        &["shutdown"],
    ];
    std::thread::scope(|scope| {
        for args in commands {
            let vms = &vms;
            scope.spawn(move || {
                let what = args.join(" ");
                let at = if args[0] == "memory" { 2 } else { 1 };
                let args = [&args[..at], &["--vm", "a"], &args[at..]].concat();
                ends_with_words(&what, vms, &args);
            });
        }
    });
    assert!(!Path::new(&dump).exists(), "nothing is left behind");
    // Nothing of what was said to have failed is done later.
    vms.signal(0, libc::SIGCONT);
    let status = vms.tool(&["status", "--vm", "a", "--json"]).output().unwrap();
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((&status["vm"]["paused"], &status["pages"]), (&false.into(), &Value::Array(vec![])));
    let out = vms.tool(&["events", "--vm", "a", "--json"]).output().unwrap();
    let events = String::from_utf8(out.stdout).unwrap();
    for word in ["paused", "caught", "predicted", "ended"] {
        assert!(!events.contains(word), "{word}: {events}");
    }
}

/// One word after some seconds; and when the VM goes on, so does the command.
pub fn a_command_goes_on_when_the_vm_does() {
    let vms = Named::start(&["a"]);
    vms.signal(0, libc::SIGSTOP);
    let mut status = vms
        .tool(&["status", "--vm", "a"])
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut word = String::new();
    let start = Instant::now();
    BufReader::new(status.stderr.as_mut().unwrap()).read_line(&mut word).unwrap();
    println!("    after {:.1} s: {}", start.elapsed().as_secs_f64(), word.trim_end());
    assert!(word.contains("is stopped") && word.contains("waiting"), "{word}");
    assert!(start.elapsed() >= Duration::from_secs(4), "no word about what is only slow");
    vms.signal(0, libc::SIGCONT);
    let out = status.wait_with_output().unwrap();
    assert!(out.status.success(), "{out:?}");
    assert!(String::from_utf8_lossy(&out.stdout).contains("no bad pages"), "{out:?}");
}
