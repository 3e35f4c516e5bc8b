//! This process's privileges on the host.

// include/uapi/linux/capability.h
/// The capability that bypasses the mode bits of files (capabilities(7)).
pub const CAP_DAC_OVERRIDE: u32 = 1;

/// What /proc/self/status says of this process's privileges.
#[derive(Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Effective capabilities.
    pub caps: u64,
}

impl Credentials {
    /// Those of this process; `None` where the kernel does not say.
    #[must_use]
    pub fn of_this_process() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/self/status").ok()?)
    }

    /// Those that the text of a /proc/PID/status has.
    #[must_use]
    pub fn parse(status: &str) -> Option<Self> {
        let groups = field(status, "Groups:")?.split_whitespace();
        Some(Self {
            uid: effective(field(status, "Uid:")?)?,
            gid: effective(field(status, "Gid:")?)?,
            groups: groups.filter_map(|group| group.parse().ok()).collect(),
            caps: u64::from_str_radix(field(status, "CapEff:")?.trim(), 16).ok()?,
        })
    }

    /// Whether it has this effective capability.
    #[must_use]
    pub fn has(&self, cap: u32) -> bool {
        self.caps & (1 << cap) != 0
    }

    /// The reason why it may read and write a file of `owner` and `group` with these mode bits; `None` if it may not.
    #[must_use]
    pub fn way_in(&self, mode: u32, owner: u32, group: u32) -> Option<&'static str> {
        const READ_AND_WRITE: u32 = 0o6;
        // The first class that fits decides, even when a later one would allow more.
        let (bits, way) = if self.uid == owner {
            (mode >> 6, "as its owner")
        } else if self.gid == group || self.groups.contains(&group) {
            (mode >> 3, "as a member of its group")
        } else {
            (mode, "as everybody")
        };
        if bits & READ_AND_WRITE == READ_AND_WRITE {
            Some(way)
        } else {
            self.has(CAP_DAC_OVERRIDE).then_some("by CAP_DAC_OVERRIDE")
        }
    }
}

/// The rest of the line of `text` that starts with `name`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name))
}

/// The effective one of the four IDs in a line of /proc/self/status.
fn effective(ids: &str) -> Option<u32> {
    ids.split_whitespace().nth(1)?.parse().ok()
}
