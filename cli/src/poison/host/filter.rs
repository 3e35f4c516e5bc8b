//! hwpoison-inject's filters: which page frames it really poisons.
//!
//! The filters belong to the host: the previous settings are restored in any case. While ours are in force, no other
//! user's are.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use mce_relay_vmm::host::flags::{FlagsFilter, names};
use mce_relay_vmm::number;

/// Where they are (`mm/hwpoison-inject.c`). Each file holds one decimal number; 0x… is taken, too.
const DIR: &str = "/sys/kernel/debug/hwpoison";
const ENABLE: &str = "corrupt-filter-enable";
const MEMCG: &str = "corrupt-filter-memcg";
const DEV_MAJOR: &str = "corrupt-filter-dev-major";
const DEV_MINOR: &str = "corrupt-filter-dev-minor";
const FLAGS_MASK: &str = "corrupt-filter-flags-mask";
const FLAGS_VALUE: &str = "corrupt-filter-flags-value";
/// No device in particular (`hwpoison_filter_dev`).
const ANY_DEV: u64 = u32::MAX as u64;

/// Why the filters cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A file of the filters could not be used.
    #[error("cannot {what} {path}; {mend}", path = .path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What to do about it.
        mend: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Another process uses them now.
    #[error(
        "another mce-relay uses hwpoison-inject's filters at this moment; try again when it is done"
    )]
    Busy,
}

fn failed(
    what: &'static str,
    path: &Path,
    mend: &'static str,
) -> impl FnOnce(io::Error) -> FilterError {
    let path = path.to_owned();
    move |source| FilterError::File { what, path, mend, source }
}

/// Which page frames may be hit. `None` lets every frame pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Frames charged to the memory cgroup whose directory has this inode number.
    pub memcg: Option<u64>,
    /// Frames of files on this device, by its major and minor number.
    pub dev: Option<(u32, u32)>,
    /// Frames with these flags.
    pub flags: Option<FlagsFilter>,
}

impl std::fmt::Display for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let memcg = self.memcg.map(|inode| format!("of the memory cgroup with inode {inode}"));
        let dev = self.dev.map(|(major, minor)| format!("of files on device {major}:{minor}"));
        // As --filter-flags takes it.
        let flags = self.flags.map(|FlagsFilter { mask, value }| match value {
            0 => format!("with flags {}=0", names(mask).join("+")),
            _ => format!("with flags {}={}", names(mask).join("+"), names(value).join("+")),
        });
        let words: Vec<String> = [memcg, dev, flags].into_iter().flatten().collect();
        f.write_str(&words.join(", and "))
    }
}

impl Filter {
    /// The files and their values, including filters that let everything pass.
    fn settings(&self) -> Vec<(&'static str, u64)> {
        let (major, minor) =
            self.dev.map_or((ANY_DEV, ANY_DEV), |(major, minor)| (major.into(), minor.into()));
        let flags = self.flags.unwrap_or(FlagsFilter { mask: 0, value: 0 });
        vec![
            (DEV_MAJOR, major),
            (DEV_MINOR, minor),
            (FLAGS_MASK, flags.mask),
            (FLAGS_VALUE, flags.value),
            (MEMCG, self.memcg.unwrap_or(0)),
        ]
    }

    /// Puts the filter in force until the guard is dropped.
    ///
    /// # Errors
    /// See [`FilterError`]; everything is as it was then.
    pub fn apply(&self) -> Result<FilterInForce, FilterError> {
        self.apply_in(Path::new(DIR))
    }

    fn apply_in(&self, dir: &Path) -> Result<FilterInForce, FilterError> {
        let path = dir.join(ENABLE);
        let mend = "as root: modprobe hwpoison-inject, and mount debugfs at /sys/kernel/debug";
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let lock = file.map_err(failed("open", &path, mend))?;
        // SAFETY: takes no pointer; the descriptor is open.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            return Err(FilterError::Busy);
        }
        let mut guard =
            FilterInForce { dir: dir.to_owned(), before: Vec::new(), _lock: Some(lock) };
        // Switched off first, so that a filter is never in force in part.
        guard.set(ENABLE, 0)?;
        for (name, value) in self.settings() {
            if name == MEMCG && self.memcg.is_none() && !dir.join(MEMCG).exists() {
                continue;
            }
            guard.set(name, value)?;
        }
        write(&dir.join(ENABLE), 1)?;
        Ok(guard)
    }
}

/// A filter in force. Dropping it restores the previous settings.
#[derive(Debug)]
pub struct FilterInForce {
    dir: PathBuf,
    /// The files that were changed, in that order, with their previous values.
    before: Vec<(&'static str, u64)>,
    _lock: Option<File>,
}

impl FilterInForce {
    fn set(&mut self, name: &'static str, value: u64) -> Result<(), FilterError> {
        let path = self.dir.join(name);
        let before = read(&path)?;
        // Noted before the change, so that a failed change is undone, too.
        self.before.push((name, before));
        write(&path, value)
    }

    /// Restores the previous settings.
    ///
    /// # Errors
    /// The first file that could not be written; all others were.
    pub fn restore(mut self) -> Result<(), FilterError> {
        self.put_back()
    }

    fn put_back(&mut self) -> Result<(), FilterError> {
        if self.before.is_empty() {
            return Ok(());
        }
        let mut result = write(&self.dir.join(ENABLE), 0);
        // The switch was changed first, and is restored last.
        for (name, value) in self.before.drain(..).rev() {
            result = result.and(write(&self.dir.join(name), value));
        }
        result
    }
}

impl Drop for FilterInForce {
    fn drop(&mut self) {
        if let Err(error) = self.put_back() {
            log::error!("hwpoison-inject's filters are not as they were: {error}");
        }
    }
}

fn read(path: &Path) -> Result<u64, FilterError> {
    let mend = match path.ends_with(MEMCG) {
        true => {
            "the kernel has that file with CONFIG_MEMCG only; give --filter-memcg none to use no such filter"
        }
        false => "run it as root on a kernel with CONFIG_HWPOISON_INJECT",
    };
    let text = std::fs::read_to_string(path).map_err(failed("read", path, mend))?;
    number::plain(text.trim()).ok_or_else(|| {
        let found = io::Error::other(format!("it holds {:?}", text.trim()));
        failed("understand", path, "it should hold a number")(found)
    })
}

fn write(path: &Path, value: u64) -> Result<(), FilterError> {
    let mend = "run it as root";
    std::fs::write(path, value.to_string()).map_err(failed("write to", path, mend))
}

/// Whether pages can be filtered by memory cgroup here.
#[must_use]
pub fn has_memcg() -> bool {
    Path::new(DIR).join(MEMCG).exists()
}

/// The filter that is in force now and was set by another program, in words.
///
/// # Errors
/// The files cannot be read.
pub fn left_over() -> Result<Option<String>, FilterError> {
    left_over_in(Path::new(DIR))
}

fn left_over_in(dir: &Path) -> Result<Option<String>, FilterError> {
    if read(&dir.join(ENABLE))? == 0 {
        return Ok(None);
    }
    let neutral = Filter::default().settings();
    let mut words = Vec::new();
    for (name, value) in neutral {
        if name == MEMCG && !dir.join(MEMCG).exists() {
            continue;
        }
        let now = read(&dir.join(name))?;
        if now != value {
            words.push(format!("{name} = {now:#x}"));
        }
    }
    Ok((!words.is_empty()).then(|| words.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(enable: u64) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in Filter::default().settings() {
            std::fs::write(dir.path().join(name), format!("{value}\n")).unwrap();
        }
        std::fs::write(dir.path().join(ENABLE), format!("{enable}\n")).unwrap();
        dir
    }

    fn content(dir: &tempfile::TempDir) -> Vec<(String, u64)> {
        let entries = std::fs::read_dir(dir.path()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut content: Vec<_> = paths.map(|path| (name(&path), read(&path).unwrap())).collect();
        content.sort();
        content
    }

    fn value(dir: &tempfile::TempDir, name: &str) -> u64 {
        read(&dir.path().join(name)).unwrap()
    }

    #[test]
    fn what_it_lets_through_in_words() {
        let with =
            |flags: &str| Filter { flags: Some(flags.parse().unwrap()), ..Filter::default() };
        for (filter, words) in [
            (Filter::default(), ""),
            (Filter { memcg: Some(42), ..Filter::default() }, "of the memory cgroup with inode 42"),
            (with("huge=0"), "with flags huge=0"),
            (
                Filter { dev: Some((8, 1)), ..with("anon+huge=anon") },
                "of files on device 8:1, and with flags anon+huge=anon",
            ),
        ] {
            assert_eq!(filter.to_string(), words);
        }
    }

    #[test]
    fn what_was_there_is_there_again() {
        let dir = files(0);
        std::fs::write(dir.path().join(FLAGS_MASK), "0x1000").unwrap();
        let before = content(&dir);
        let flags = Some("huge=0".parse().unwrap());
        let filter = Filter { memcg: Some(77), dev: Some((8, 1)), flags };
        let guard = filter.apply_in(dir.path()).unwrap();
        let now = [ENABLE, MEMCG, DEV_MAJOR, DEV_MINOR, FLAGS_MASK, FLAGS_VALUE];
        assert_eq!(now.map(|name| value(&dir, name)), [1, 77, 8, 1, 1 << 17, 0]);
        assert!(matches!(filter.apply_in(dir.path()), Err(FilterError::Busy)));
        drop(guard);
        assert_eq!(content(&dir), before);
        filter.apply_in(dir.path()).unwrap().restore().unwrap();
        assert_eq!(content(&dir), before);
    }

    #[test]
    fn what_is_not_asked_for_lets_everything_through() {
        let dir = files(1);
        std::fs::write(dir.path().join(MEMCG), "5").unwrap();
        assert_eq!(left_over_in(dir.path()).unwrap().unwrap(), "corrupt-filter-memcg = 0x5");
        let filter = Filter { dev: Some((8, 1)), ..Filter::default() };
        let guard = filter.apply_in(dir.path()).unwrap();
        assert_eq!(value(&dir, MEMCG), 0);
        drop(guard);
        assert_eq!((value(&dir, MEMCG), value(&dir, ENABLE)), (5, 1));
    }

    #[test]
    fn what_fails_half_way_is_put_back() {
        let dir = files(1);
        std::fs::write(dir.path().join(FLAGS_VALUE), "none").unwrap();
        let error = Filter::default().apply_in(dir.path()).unwrap_err().to_string();
        assert!(error.contains(FLAGS_VALUE), "{error}");
        assert_eq!(value(&dir, ENABLE), 1);

        // A kernel without CONFIG_MEMCG.
        let dir = files(0);
        std::fs::remove_file(dir.path().join(MEMCG)).unwrap();
        drop(Filter::default().apply_in(dir.path()).unwrap());
        let filter = Filter { memcg: Some(1), ..Filter::default() };
        let error = filter.apply_in(dir.path()).unwrap_err().to_string();
        assert!(error.contains("CONFIG_MEMCG"), "{error}");
        assert_eq!(left_over_in(dir.path()).unwrap(), None);
    }
}
