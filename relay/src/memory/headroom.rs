//! How much memory this process may take before somebody is killed for it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// How much memory this process may still take.
#[derive(Debug)]
pub(crate) struct Headroom {
    meminfo: Option<File>,
    /// Of this process's memory cgroup and those above it.
    groups: Vec<Group>,
}

/// A memory cgroup: the most that it may have, what it has, and of what kinds that is.
#[derive(Debug)]
struct Group {
    max: File,
    current: File,
    stat: File,
    /// The line of `stat` that says how much is cached of files and was not used lately.
    cached: &'static str,
}

/// A hierarchy of memory cgroups.
struct Hierarchy {
    root: &'static str,
    max: &'static str,
    current: &'static str,
    cached: &'static str,
}

/// Documentation/admin-guide/cgroup-v2.rst
const V2: Hierarchy = Hierarchy {
    root: "/sys/fs/cgroup",
    max: "memory.max",
    current: "memory.current",
    cached: "inactive_file ",
};
/// Documentation/admin-guide/cgroup-v1/memory.rst
const V1: Hierarchy = Hierarchy {
    root: "/sys/fs/cgroup/memory",
    max: "memory.limit_in_bytes",
    current: "memory.usage_in_bytes",
    cached: "total_inactive_file ",
};

/// What is left to the host beside.
const MARGIN: u64 = 64 << 20;
const TEXT_LEN: usize = 8192;

impl Headroom {
    /// Of what there is to be known; opened here, as the relay's thread opens nothing.
    pub(crate) fn new() -> Self {
        Self { meminfo: File::open("/proc/meminfo").ok(), groups: groups() }
    }

    /// How many bytes may be taken, as far as is known.
    pub(crate) fn bytes(&self) -> u64 {
        let host = self
            .meminfo
            .as_ref()
            .and_then(|file| value(&text(file)?, "MemAvailable:"))
            .map_or(u64::MAX, |kib| (kib << 10).saturating_sub(MARGIN));
        self.groups.iter().filter_map(Group::room).fold(host, u64::min)
    }
}

impl Group {
    /// How many bytes it may still take; `None` without a limit.
    fn room(&self) -> Option<u64> {
        let max: u64 = text(&self.max)?.trim().parse().ok()?;
        let current: u64 = text(&self.current)?.trim().parse().ok()?;
        // What of files is cached there the kernel drops before it kills.
        let stat = text(&self.stat).unwrap_or_default();
        let cached = value(&stat, self.cached).unwrap_or(0) / 2;
        Some(max.saturating_sub(current.saturating_sub(cached)))
    }
}

fn groups() -> Vec<Group> {
    let own = File::open("/proc/self/cgroup").ok().and_then(|file| text(&file)).unwrap_or_default();
    own.lines().flat_map(|line| hierarchy(line).map_or_else(Vec::new, open)).collect()
}

/// The hierarchy that a line of /proc/self/cgroup is of, and the path in it, if it has to do with memory. In a namespace
/// the paths are those below its root.
fn hierarchy(line: &str) -> Option<(&'static Hierarchy, &str)> {
    let mut parts = line.splitn(3, ':');
    let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let path = path.strip_prefix('/')?;
    match (id, controllers) {
        ("0", "") => Some((&V2, path)),
        _ => controllers.split(',').any(|one| one == "memory").then_some((&V1, path)),
    }
}

/// Each cgroup from the one at `path` up to the root that has a limit.
fn open((hierarchy, path): (&'static Hierarchy, &str)) -> Vec<Group> {
    let mut path = PathBuf::from(hierarchy.root).join(path);
    let mut groups = Vec::new();
    while path.starts_with(hierarchy.root) {
        let open = |name| File::open(path.join(name)).ok();
        if let (Some(max), Some(current), Some(stat)) =
            (open(hierarchy.max), open(hierarchy.current), open("memory.stat"))
        {
            groups.push(Group { max, current, stat, cached: hierarchy.cached });
        }
        if !path.pop() {
            break;
        }
    }
    groups
}

fn text(file: &File) -> Option<String> {
    let mut bytes = vec![0; TEXT_LEN];
    let len = file.read_at(&mut bytes, 0).ok()?;
    bytes.truncate(len);
    String::from_utf8(bytes).ok()
}

/// The number in the line of `text` that starts with `name`.
fn value(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn there_is_room() {
        let bytes = Headroom::new().bytes();
        assert!(bytes > 1 << 20, "{bytes}");
        assert_eq!(value("a 1\ninactive_file 77\n", "inactive_file"), Some(77));
    }

    #[test]
    fn both_versions_of_cgroups_are_known() {
        let of = |line| hierarchy(line).map(|(hierarchy, path)| (hierarchy.max, path));
        assert_eq!(of("0::/a/b"), Some(("memory.max", "a/b")));
        assert_eq!(of("0::/"), Some(("memory.max", "")));
        assert_eq!(of("9:cpu,memory:/a:b"), Some(("memory.limit_in_bytes", "a:b")));
        assert_eq!(of("9:cpuset:/a"), None);
        assert_eq!(of("1:name=systemd:/a"), None);
        assert_eq!(of(""), None);
    }

    #[test]
    fn a_group_may_take_what_its_limit_leaves() {
        let file = |text: &str| {
            let mut file = tempfile();
            std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
            file
        };
        let group = |max| Group {
            max: file(max),
            current: file("1000\n"),
            stat: file("cache 5\ntotal_inactive_file 200\n"),
            cached: V1.cached,
        };
        assert_eq!(group("3000\n").room(), Some(2100));
        assert_eq!(group("500\n").room(), Some(0));
        assert_eq!(group("9223372036854771712\n").room(), Some(9_223_372_036_854_770_812));
        assert_eq!(group("max\n").room(), None);
    }

    /// A file of this test's own, with no name.
    fn tempfile() -> File {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(format!("mce-relay-headroom-{name:?}"));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }
}
