//! Finds other users' VMs, which root may ask.
//!
//! Each user's sockets are in a directory that depends on that user's environment. The kernel lists the path of every
//! socket, and with it those directories.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use mce_relay_vmm::outlets::peer::listens;
use mce_relay_vmm::session::names::{VmName, socket_in};

/// The list of unix sockets, /proc/net/unix in proc_pid_net(5).
const SOCKETS: &str = "/proc/net/unix";

/// The directories of all users' sockets that this user may see.
pub(crate) fn dirs() -> Vec<PathBuf> {
    dirs_in(&fs::read_to_string(SOCKETS).unwrap_or_default())
}

fn dirs_in(sockets: &str) -> Vec<PathBuf> {
    let dirs: BTreeSet<PathBuf> = sockets
        .lines()
        // The fields before the path have no slash; the path itself may have blanks.
        .filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])))
        .filter_map(Path::parent)
        .filter(|dir| is_of_sockets(dir))
        .map(Path::to_owned)
        .collect();
    dirs.into_iter().collect()
}

/// Whether `dir` has a name as [`mce_relay_vmm::session::names::dir`] gives: mce-relay, or mce-relay-UID.
fn is_of_sockets(dir: &Path) -> bool {
    let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name == "mce-relay"
        || name.strip_prefix("mce-relay-").is_some_and(|uid| uid.parse::<u32>().is_ok())
}

/// The sockets of VMs called `name` in `dirs`, without `own`.
pub(super) fn paths(dirs: &[PathBuf], own: &Path, name: &VmName) -> Vec<PathBuf> {
    let other = dirs.iter().filter(|dir| dir.as_path() != own);
    other.map(|dir| socket_in(dir, name)).filter(|path| listens(path)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn directories_are_those_of_the_sockets() {
        let text = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                    0000000000000000: 00000002 00000000 00010000 0001 01 1 /run/user/1000/mce-relay/a.sock\n\
                    0000000000000000: 00000002 00000000 00010000 0001 01 2 /run/user/1000/mce-relay/b.sock\n\
                    0000000000000000: 00000002 00000000 00010000 0001 01 3 /tmp/mce-relay-1001/.new\n\
                    0000000000000000: 00000002 00000000 00010000 0001 01 4 /tmp/a b/mce-relay/c.sock\n\
                    0000000000000000: 00000003 00000000 00000000 0001 03 5\n\
                    0000000000000000: 00000002 00000000 00010000 0001 01 6 @/tmp/mce-relay-x/d.sock\n\
                    0000000000000000: 00000002 00000000 00010000 0001 01 7 /run/dbus/socket\n";
        let expected = ["/run/user/1000/mce-relay", "/tmp/a b/mce-relay", "/tmp/mce-relay-1001"]
            .map(PathBuf::from);
        assert_eq!(dirs_in(text), expected);
    }

    #[test]
    fn what_listens_elsewhere_is_found_by_its_directory() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("mce-relay");
        fs::create_dir(&dir).unwrap();
        let path = dir.join("far.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let (all, name) = (dirs(), "far".parse().unwrap());
        assert!(all.contains(&dir), "{all:?}");
        let own = top.path().join("own");
        assert_eq!(paths(&all, &own, &name), [path]);
        assert!(paths(&all, &dir, &name).is_empty());
        let error = crate::client::names::find_in(&own, &name, &dirs).unwrap_err().to_string();
        assert!(error.contains(&format!("--vm {}", dir.join("far.sock").display())), "{error}");
    }
}
