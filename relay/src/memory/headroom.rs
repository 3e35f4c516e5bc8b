//! How much memory this process may take before somebody is killed for it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// How much memory this process may still take.
#[derive(Debug)]
pub(crate) struct Headroom {
    meminfo: Option<File>,
    /// memory.max, memory.current and memory.stat of this process's cgroup and those above it.
    groups: Vec<[File; 3]>,
}

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
        let group = |[max, current, stat]: &[File; 3]| {
            let max: u64 = text(max)?.trim().parse().ok()?;
            let current: u64 = text(current)?.trim().parse().ok()?;
            // What of files is cached there the kernel drops before it kills.
            let stat = text(stat).unwrap_or_default();
            let cached = value(&stat, "inactive_file").unwrap_or(0) / 2;
            Some(max.saturating_sub(current.saturating_sub(cached)))
        };
        self.groups.iter().filter_map(group).fold(host, u64::min)
    }
}

fn groups() -> Vec<[File; 3]> {
    let own = File::open("/proc/self/cgroup").ok().and_then(|file| text(&file)).unwrap_or_default();
    // cgroup v2 alone; in a namespace the paths are those below its root.
    let Some(own) = own.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Vec::new();
    };
    let mut path = PathBuf::from("/sys/fs/cgroup").join(own);
    let mut groups = Vec::new();
    while path.starts_with("/sys/fs/cgroup") {
        let open = |name| File::open(path.join(name)).ok();
        if let (Some(max), Some(current), Some(stat)) =
            (open("memory.max"), open("memory.current"), open("memory.stat"))
        {
            groups.push([max, current, stat]);
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
    use super::*;

    #[test]
    fn there_is_room() {
        let bytes = Headroom::new().bytes();
        assert!(bytes > 1 << 20, "{bytes}");
        assert_eq!(value("a 1\ninactive_file 77\n", "inactive_file"), Some(77));
    }
}
