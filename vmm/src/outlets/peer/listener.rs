//! Finds the process that listens at a socket, when no connection can be made that would name it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The list of unix sockets, /proc/net/unix in proc_pid_net(5).
const SOCKETS: &str = "/proc/net/unix";
/// Flag of a socket that listens: SO_ACCEPTCON in include/uapi/linux/net.h.
const ACCEPTS: u32 = 1 << 16;

/// The process that listens at `socket`; `None` where this user may not see its open files, or if it is in another PID
/// or network namespace.
pub(super) fn pid(socket: &Path) -> Option<u32> {
    let found = fs::metadata(socket).ok()?;
    let id = (found.dev(), found.ino());
    let named = named(&fs::read_to_string(SOCKETS).ok()?, socket.file_name()?);
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| has_open(*pid, &named, id))
}

/// The listening sockets whose path ends in `name`: the target of a link to each in /proc/PID/fd, and its path as it
/// was bound.
fn named(sockets: &str, name: &OsStr) -> Vec<(String, PathBuf)> {
    let listening = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        let inode = fields.nth(2)?;
        // The path itself may have blanks.
        let (_, path) = line.split_once(&format!(" {inode} "))?;
        let path = PathBuf::from(path);
        (flags & ACCEPTS != 0 && path.file_name() == Some(name))
            .then(|| (format!("socket:[{inode}]"), path))
    };
    sockets.lines().filter_map(listening).collect()
}

/// Whether the process has one of the sockets `named` open, and it is the one with this device and inode.
fn has_open(pid: u32, named: &[(String, PathBuf)], id: (u64, u64)) -> bool {
    let process = Path::new("/proc").join(pid.to_string());
    let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let links = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    let paths = links.filter_map(|link| {
        let link = link.to_str()?;
        named.iter().find_map(|(socket, path)| (socket == link).then_some(path))
    });
    // A relative path is relative to the process's working directory.
    let at = |path: &PathBuf| fs::metadata(process.join("cwd").join(path));
    paths.filter_map(|path| at(path).ok()).any(|found| (found.dev(), found.ino()) == id)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn who_listens_is_found_without_a_connection() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a b.sock"), dir.path().join("other"));
        assert_eq!(pid(&path), None);
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(pid(&path), Some(std::process::id()));
        // One of the same name elsewhere is another.
        fs::create_dir(&other).unwrap();
        let _other = UnixListener::bind(other.join("a b.sock")).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        drop(listener);
        assert_eq!(pid(&path), None);
    }

    #[test]
    fn only_those_that_listen_count() {
        let text = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                    0000000000000000: 00000002 00000000 00010000 0001 01    17 /run/a b.sock\n\
                    0000000000000000: 00000003 00000000 00000000 0001 03    18 /run/a b.sock\n\
                    0000000000000000: 00000002 00000000 00010000 0001 01 12345 a b.sock\n\
                    0000000000000000: 00000003 00000000 00000000 0001 03 12346\n";
        let expected = [("socket:[17]", "/run/a b.sock"), ("socket:[12345]", "a b.sock")];
        let expected = expected.map(|(link, path)| (link.to_owned(), PathBuf::from(path)));
        assert_eq!(named(text, OsStr::new("a b.sock")), expected);
    }
}
