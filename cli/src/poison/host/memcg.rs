//! Finds the memory cgroup that a process's pages are charged to. With it hwpoison-inject can be limited to that
//! process's pages.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use procfs::process::{MountInfos, Process};
use procfs::{ProcError, ProcessCGroups};

/// A file of every memory cgroup but the root, in version 2 (CFTYPE_NOT_ON_ROOT, `mm/memcontrol.c`).
const V2_NOT_ROOT: &str = "memory.current";
/// A file of the root alone, in version 1 (CFTYPE_ONLY_ON_ROOT, `kernel/cgroup/cgroup-v1.c`).
const V1_ROOT: &str = "release_agent";
/// The mount option of version 2 by which hugetlb pages are charged
/// (Documentation/admin-guide/cgroup-v2.rst).
const HUGETLB: &str = "memory_hugetlb_accounting";

/// A memory cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memcg {
    /// Its directory.
    pub path: PathBuf,
    /// The inode number of the directory, by which the kernel's filter identifies it.
    pub inode: u64,
    /// How many processes are in it.
    pub processes: usize,
    /// Whether pages of hugetlb are charged to it, too (Linux 6.6, a mount option).
    pub has_hugetlb: bool,
}

/// Why a process's pages cannot be identified by a memory cgroup.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoMemcg {
    /// The process is in the root cgroup.
    #[error("the VM is in the root cgroup")]
    Root,
    /// No cgroup file system with the memory controller is mounted.
    #[error("no cgroup file system with the memory controller is mounted here")]
    NotMounted,
    /// The process's cgroup is not visible from here.
    #[error(
        "the VM's cgroup {path} is not below any cgroup file system that is mounted here (it is of another \
         cgroup namespace, or of a part that is not mounted)",
        path = .path.display()
    )]
    OutOfSight {
        /// As /proc/PID/cgroup has it.
        path: PathBuf,
    },
    /// The memory controller is off for it.
    #[error(
        "the memory controller is not on for the VM's cgroup {path} nor for any above it",
        path = .path.display()
    )]
    NoController {
        /// Its directory.
        path: PathBuf,
    },
    /// hugetlb pages are charged to no cgroup, and cannot be told apart by their flags either.
    #[error(
        "this host charges huge pages of hugetlb to no memory cgroup, and no one filter lets through all that was \
         asked for (huge pages alone, without --filter-flags, have one)"
    )]
    Mixed,
    /// The kernel has no filter by memory cgroup.
    #[error(
        "this host's kernel has no filter by memory cgroup (CONFIG_MEMCG: no corrupt-filter-memcg)"
    )]
    NoFilter,
}

/// The cgroups of a process cannot be read.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot find out the memory cgroup of process {pid}; run it as root, on the host that runs the VM"
)]
pub struct MemcgError {
    /// The process.
    pub pid: u32,
    /// The cause.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The memory cgroup of process `pid`, or why it has none that could identify its pages.
///
/// # Errors
/// There is no such process, or its cgroup cannot be looked at.
pub fn of(pid: u32) -> Result<Result<Memcg, NoMemcg>, MemcgError> {
    let failed = |source: ProcError| MemcgError { pid, source: source.into() };
    let number = i32::try_from(pid).map_err(|source| MemcgError { pid, source: source.into() })?;
    let groups = Process::new(number).and_then(|process| process.cgroups()).map_err(failed)?;
    let mounts = Process::myself().and_then(|me| me.mountinfo()).map_err(failed)?;
    let place = match place(&groups, &mounts) {
        Ok(place) => place,
        Err(none) => return Ok(Err(none)),
    };
    place.look().map_err(|source| MemcgError { pid, source: source.into() })
}

/// The place of a process's cgroup in the file system.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    dir: PathBuf,
    /// The mount point of the hierarchy that has it.
    mount: PathBuf,
    is_v2: bool,
    has_hugetlb: bool,
}

/// The directory of the cgroup that is charged for the memory of a process in `groups`.
fn place(groups: &ProcessCGroups, mounts: &MountInfos) -> Result<Place, NoMemcg> {
    // cgroups(7). If both versions are mounted, the memory controller is with one of them.
    let v1 = groups.0.iter().find(|group| group.controllers.iter().any(|name| name == "memory"));
    let (group, is_v2) = match v1 {
        Some(group) => (group, false),
        None => {
            let v2 = groups.0.iter().find(|group| group.hierarchy == 0);
            (v2.ok_or(NoMemcg::NotMounted)?, true)
        }
    };
    let path = Path::new(&group.pathname);
    let fits = |mount: &&procfs::process::MountInfo| match is_v2 {
        true => mount.fs_type == "cgroup2",
        false => mount.fs_type == "cgroup" && mount.super_options.contains_key("memory"),
    };
    let mut seen = false;
    for mount in mounts.iter().filter(fits) {
        seen = true;
        // Only a part of the hierarchy may be mounted, or several parts; in another namespace either path may begin
        // with "/..".
        let Ok(below) = path.strip_prefix(&mount.root) else { continue };
        if below.components().any(|part| part.as_os_str() == "..") {
            continue;
        }
        let has_hugetlb = mount.super_options.contains_key(HUGETLB);
        let mount = mount.mount_point.clone();
        return Ok(Place { dir: mount.join(below), mount, is_v2, has_hugetlb });
    }
    Err(if seen { NoMemcg::OutOfSight { path: path.into() } } else { NoMemcg::NotMounted })
}

impl Place {
    fn look(&self) -> io::Result<Result<Memcg, NoMemcg>> {
        if !self.dir.exists() {
            return Ok(Err(NoMemcg::OutOfSight { path: self.dir.clone() }));
        }
        let path = match self.is_v2 {
            false if self.dir.join(V1_ROOT).exists() => return Ok(Err(NoMemcg::Root)),
            false => self.dir.clone(),
            // If the controller is off there, the nearest ancestor with it is charged.
            true => {
                let up = self.dir.ancestors().take_while(|dir| dir.starts_with(&self.mount));
                let on = |dir: &&Path| dir.join(V2_NOT_ROOT).exists();
                match up.clone().find(on) {
                    Some(found) => found.to_owned(),
                    None if self.dir == self.mount => return Ok(Err(NoMemcg::Root)),
                    None => return Ok(Err(NoMemcg::NoController { path: self.dir.clone() })),
                }
            }
        };
        let inode = std::fs::metadata(&path)?.ino();
        let procs = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        let processes = procs.lines().count();
        Ok(Ok(Memcg { path, inode, processes, has_hugetlb: self.has_hugetlb }))
    }
}

#[cfg(test)]
mod tests {
    use procfs::FromBufRead;

    use super::*;

    fn placed(groups: &str, mounts: &str) -> Result<Place, NoMemcg> {
        let groups = ProcessCGroups::from_buf_read(groups.as_bytes()).unwrap();
        place(&groups, &MountInfos::from_buf_read(mounts.as_bytes()).unwrap())
    }

    const SYS: &str = "24 1 0:22 / /sys rw - sysfs sysfs rw\n";
    const V2: &str = "30 24 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n";
    const V1: &str = "31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    const V1_CPU: &str = "32 24 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";

    #[test]
    fn a_cgroup_is_found_by_its_mount() {
        let place = |dir: &str, mount: &str, is_v2| {
            Ok(Place { dir: dir.into(), mount: mount.into(), is_v2, has_hugetlb: false })
        };
        let out_of_sight = |path: &str| Err(NoMemcg::OutOfSight { path: path.into() });
        let v2 = format!("{SYS}{V2}");
        let hybrid =
            format!("{SYS}{V1_CPU}{V1}33 24 0:26 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n");
        // A container without a cgroup namespace, which has its own part mounted; and one that has
        // another's mounted beside.
        let part = "30 24 0:26 /vms /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let parts = format!("29 24 0:26 /other /mnt rw - cgroup2 cgroup2 rw\n{part}");
        // A mount from outside the reader's cgroup namespace.
        let above = "30 24 0:26 /.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        for (groups, mounts, expected) in [
            ("0::/vms/a\n", v2.as_str(), place("/sys/fs/cgroup/vms/a", "/sys/fs/cgroup", true)),
            ("0::/\n", &v2, place("/sys/fs/cgroup/", "/sys/fs/cgroup", true)),
            (
                "5:cpu:/\n4:memory:/vm\n0::/x\n",
                &hybrid,
                place("/sys/fs/cgroup/memory/vm", "/sys/fs/cgroup/memory", false),
            ),
            // The memory controller is with version 2.
            (
                "5:cpu:/vm\n0::/x\n",
                &hybrid,
                place("/sys/fs/cgroup/unified/x", "/sys/fs/cgroup/unified", true),
            ),
            ("0::/vms/a\n", part, place("/sys/fs/cgroup/a", "/sys/fs/cgroup", true)),
            ("0::/vms/a\n", &parts, place("/sys/fs/cgroup/a", "/sys/fs/cgroup", true)),
            ("0::/vmsnot\n", part, out_of_sight("/vmsnot")),
            ("0::/../vm\n", &v2, out_of_sight("/../vm")),
            ("0::/../vm\n", above, place("/sys/fs/cgroup/vm", "/sys/fs/cgroup", true)),
            ("0::/a\n", SYS, Err(NoMemcg::NotMounted)),
            ("4:memory:/vm\n", &v2, Err(NoMemcg::NotMounted)),
            ("", &v2, Err(NoMemcg::NotMounted)),
        ] {
            assert_eq!(placed(groups, mounts), expected, "{groups:?} with {mounts:?}");
        }
        let accounted = V2.replace("cgroup2 rw", "cgroup2 rw,memory_hugetlb_accounting");
        assert!(placed("0::/a\n", &accounted).unwrap().has_hugetlb);
    }

    #[test]
    fn the_one_that_is_charged_is_the_nearest_with_the_controller() {
        let root = tempfile::tempdir().unwrap();
        let (mount, vms) = (root.path().to_owned(), root.path().join("vms"));
        let dir = vms.join("a");
        std::fs::create_dir_all(&dir).unwrap();
        let look = |dir: &Path, is_v2| {
            let (dir, mount) = (dir.to_owned(), mount.clone());
            Place { dir, mount, is_v2, has_hugetlb: false }.look().unwrap()
        };
        assert_eq!(look(&mount, true), Err(NoMemcg::Root));
        assert_eq!(look(&dir, true), Err(NoMemcg::NoController { path: dir.clone() }));
        std::fs::write(vms.join(V2_NOT_ROOT), "0").unwrap();
        std::fs::write(vms.join("cgroup.procs"), "1\n2\n").unwrap();
        let found = look(&dir, true).unwrap();
        assert_eq!((&found.path, found.processes), (&vms, 2));
        assert_eq!(found.inode, vms.metadata().unwrap().ino());
        std::fs::write(dir.join(V2_NOT_ROOT), "0").unwrap();
        assert_eq!(look(&dir, true).unwrap().path, dir);
        // The mount's own directory is a cgroup like any other in a namespace.
        std::fs::write(mount.join(V2_NOT_ROOT), "0").unwrap();
        assert_eq!(look(&mount, true).unwrap().path, mount);

        assert_eq!(look(&dir, false).unwrap().path, dir);
        std::fs::write(mount.join(V1_ROOT), "").unwrap();
        assert_eq!(look(&mount, false), Err(NoMemcg::Root));
        let gone = mount.join("gone");
        assert_eq!(look(&gone, true), Err(NoMemcg::OutOfSight { path: gone }));
    }

    #[test]
    fn of_this_process() {
        // Whatever it is here: an answer.
        of(std::process::id())
            .unwrap()
            .map_or_else(|none| println!("{none}"), |found| println!("{found:?}"));
        assert!(of(u32::MAX).is_err());
    }
}
