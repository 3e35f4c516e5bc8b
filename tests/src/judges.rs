//! Tools of others that read a dump of a guest's memory, as its users will: each says in its own words what it
//! found. tests/judges/setup.sh gets them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The checkout.
const TOP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A tool, if it is here; else it is said.
fn judge(name: &str, at: Option<PathBuf>) -> Option<Command> {
    if at.is_none() {
        println!("SKIPPED as a judge of the dump: {name} is not here (tests/judges/setup.sh)");
    }
    at.map(Command::new)
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// What the tool prints, on either stream.
fn words(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let words = [out.stdout, out.stderr].concat();
    let words = String::from_utf8_lossy(&words).into_owned();
    assert!(out.status.success(), "{command:?}: {}: {words}", out.status);
    words
}

/// The kernel's log, by drgn, which translates addresses by the kernel's own page tables.
pub fn drgn(core: &Path) -> Option<String> {
    let python = Path::new(TOP).join("target/venv-drgn/bin/python");
    // A link to this machine's own; the package is what may be missing.
    let mut command = judge("drgn", Some(python).filter(|python| python.exists()))?;
    Some(words(command.arg("-B").arg(Path::new(TOP).join("tests/judges/dmesg.py")).arg(core)))
}

/// The kernel's log, by makedumpfile; `log` is a file for it.
pub fn makedumpfile(core: &Path, log: &Path) -> Option<String> {
    let mut command = judge("makedumpfile", on_path("makedumpfile"))?;
    words(command.arg("--dump-dmesg").arg(core).arg(log));
    Some(String::from_utf8_lossy(&std::fs::read(log).unwrap()).into_owned())
}

/// The kernel's release, by crash.
pub fn crash(core: &Path) -> Option<String> {
    let mut command = judge("crash", on_path("crash"))?;
    Some(words(command.arg("--osrelease").arg(core)).trim().to_owned())
}
