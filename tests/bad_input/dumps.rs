//! Dumps that cannot be written, or not to the end, and what is left of them.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mce_relay_cli::client::{error, requests};
use mce_relay_tests::guest::binary;
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::spinning::Spinning;
use mce_relay_tests::tiny::ENTRY;
use mce_relay_vmm::api::types::registers::Registers;

use crate::refused;
use crate::terminal::Terminal;

/// `mce-relay memory dump` of the VM behind `socket`.
fn tool(socket: &Path, args: &[&str]) -> Command {
    let mut tool = Command::new(binary());
    tool.args(["memory", "dump", "--api-socket", &format!("path={}", socket.display())]);
    tool.args(args).stdin(Stdio::null());
    tool
}

pub fn places_that_are_none() {
    let vm = Spinning::start(&[]);
    let at = |name: &str| vm.path(name).display().to_string();
    std::fs::write(at("mine"), "mine").unwrap();
    std::fs::write(at("image.json"), "mine").unwrap();
    for (args, named) in [
        (&["/nowhere/core"][..], &["/nowhere/core", "the directory /nowhere is not there"][..]),
        (&[&at("")], &["is a directory"]),
        (&[&at("mine")], &["mine exists", "left as it is"]),
        (&["--raw", &at("image")], &["image.json exists", "left as it is"]),
        (&["/proc/core"], &["/proc/core"]),
        (&["/dev/null"], &["/dev/null is no file"]),
    ] {
        refused(&vm.command("memory dump", args), 1, named);
    }
    assert_eq!(std::fs::read_to_string(at("mine")).unwrap(), "mine");
    assert!(!vm.path("image").exists());

    // Without room, with nobody who reads, and where nobody can.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let out = tool(&vm.socket(), &["-"]).stdout(full).output().unwrap();
    refused(&out, 1, &["cannot write to stdout", "No space left"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let out = tool(&vm.socket(), &["-", "--raw"]).stdout(writer).output().unwrap();
    refused(&out, 1, &["cannot write to stdout", "Broken pipe"]);
    for args in [&["-"][..], &["-", "--raw", "--json"]] {
        let slave = Terminal::new();
        let mut tool = tool(&vm.socket(), args);
        tool.stdout(slave.stdio()).stderr(Stdio::piped());
        refused(&tool.output().unwrap(), 1, &["stdout is a terminal", "> FILE"]);
    }
    assert_eq!(vm.shut_down().code(), Some(0), "it runs on");
}

/// A file for which there is no room goes again. In a mount namespace of its own.
pub fn no_room() {
    const SCRIPT: &str = "set -e; dir=$1; shift; mkdir $dir; mount -t tmpfs -o size=16k none $dir
        status=0; \"$@\" || status=$?; ls $dir; exit $status";
    let vm = Spinning::start(&[]);
    let (dir, api) = (vm.path("full"), format!("path={}", vm.socket().display()));
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh"]).arg(&dir);
    command.arg(binary()).args(["memory", "dump", "--api-socket", &api]).arg(dir.join("core"));
    let out = command.stdin(Stdio::null()).output().unwrap();
    refused(&out, 1, &["core, so it is removed again", "No space left"]);
}

/// A VM's API on the way to it: `before` is called before each request for memory is passed on.
fn proxy(vm: &Spinning, before: impl Fn(usize) + Send + 'static) -> PathBuf {
    let (path, to) = (vm.path("proxy"), vm.socket());
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let mut asked = 0;
        for client in listener.incoming() {
            let mut client = BufReader::new(client.unwrap());
            let mut request = String::new();
            while !request.ends_with("\r\n\r\n") {
                client.read_line(&mut request).unwrap();
            }
            if request.contains("/vm.memory?") {
                before(asked);
                asked += 1;
            }
            let mut server = UnixStream::connect(&to).unwrap();
            server.write_all(request.as_bytes()).unwrap();
            let mut answer = Vec::new();
            server.read_to_end(&mut answer).unwrap();
            let _ = client.get_mut().write_all(&answer);
        }
    });
    path
}

fn interrupt(tool: &Child) {
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(tool.id().cast_signed(), libc::SIGTERM) };
}

/// A signal while the memory is read: nothing is left, and it is said. Not Ctrl-C's, which is ignored where the
/// tests run in the background of a shell without job control.
pub fn ended_by_a_signal() {
    let vm = Spinning::start(&[]);
    let (there, is_there) = std::sync::mpsc::channel();
    let (go, may_go) = std::sync::mpsc::channel::<()>();
    let socket = proxy(&vm, move |asked| {
        if asked == 0 {
            there.send(()).unwrap();
            may_go.recv().unwrap();
        }
    });
    let core = vm.path("core");
    for args in [&[core.to_str().unwrap()][..], &["-"]] {
        let _ = std::fs::remove_file(&core);
        let tool = tool(&socket, args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let tool = tool.unwrap();
        if args != ["-"] {
            is_there.recv().unwrap();
            assert!(core.exists(), "it has begun");
            interrupt(&tool);
            go.send(()).unwrap();
            refused(&tool.wait_with_output().unwrap(), 143, &["SIGTERM", "core is removed again"]);
            assert!(!core.exists());
            continue;
        }
        // Nobody reads it yet, so it stands in the middle.
        let mut tool = tool;
        let mut out = tool.stdout.take().unwrap();
        let mut first = [0];
        out.read_exact(&mut first).unwrap();
        assert_eq!(first, [0x7f]);
        interrupt(&tool);
        let rest = std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        refused(&tool.wait_with_output().unwrap(), 143, &["not a complete dump", "SIGTERM"]);
        assert!(rest.join().unwrap().unwrap() < 32 << 20);
    }
    assert_eq!(vm.shut_down().code(), Some(0), "it runs on");
}

/// The registers are those of the guest, and known only while it stands still.
pub fn registers_of_a_paused_vm() {
    let vm = Spinning::start(&["--cpus", "2", "--on-undeliverable", "pause"]);
    let ask = || requests::get::<Vec<Registers>>(&vm.socket(), "vm.registers");
    match ask() {
        Err(error::ClientError::Refused { status: 409, error }) => {
            assert!(error.contains("pause it first"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert!(vm.command("pause", &[]).status.success());
    let vcpus = ask().unwrap();
    assert_eq!(vcpus.iter().map(|vcpu| vcpu.vcpu).collect::<Vec<_>>(), [0, 1]);
    let rip = vcpus[0].values["rip"].0;
    let code = u64::from(ENTRY)..u64::from(ENTRY) + SPIN.len() as u64;
    assert!(code.contains(&rip), "where the guest is: {rip:#x} of {code:#x?}");

    let core = vm.path("core");
    let out = vm.command("memory dump", &[core.to_str().unwrap()]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("no kernel's vmcoreinfo") && !said.contains("registers"), "{said}");
    let bytes = std::fs::read(&core).unwrap();
    assert!(bytes.starts_with(b"\x7fELF"));
    let notes = memchr::memmem::find_iter(&bytes[..0x1000], b"CORE\0").count();
    assert_eq!(notes, 2);
    let out = vm.command("memory dump", &["-"]);
    assert!(out.status.success() && out.stdout.starts_with(b"\x7fELF"));
    assert!(String::from_utf8_lossy(&out.stderr).contains("dumped: 32 MiB of guest RAM to stdout"));
    assert!(vm.command("resume", &[]).status.success());
    assert!(ask().is_err(), "it runs on");
    assert_eq!(vm.shut_down().code(), Some(0));
}
