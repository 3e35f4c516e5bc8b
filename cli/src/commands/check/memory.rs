//! The memory that guests can be made of: huge pages of both kinds.

use std::fmt;
use std::fs::{self, DirEntry};

use super::gap::{Found, Gap, read, there};
use super::section::{Section, Standing};

const POOLS: &str = "/sys/kernel/mm/hugepages";
const THP: &str = "/sys/kernel/mm/transparent_hugepage";
const NOT_KNOWN: &str = "not known";

pub(super) fn look(section: &mut Section<'_>) {
    use Standing::Missing;

    section.add(
        "hugetlb pools",
        pools().and_then(|pools| in_words(&pools)),
        Missing,
        match there(POOLS) {
            Ok(_) => "for hugepages=on, as root: sysctl vm.nr_hugepages=256 (512 MiB; more than are in use)",
            Err(_) => "for hugepages=on: boot a kernel with CONFIG_HUGETLBFS",
        },
    );
    section.add(
        "transparent huge pages",
        transparent(),
        Missing,
        match there(THP) {
            Ok(_) => "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
            Err(_) => "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        },
    );
}

/// A pool of huge pages.
#[derive(Debug)]
struct Pool {
    /// Of each page.
    kib: u64,
    /// Pages in it.
    pages: u64,
    /// How many of them are unused.
    free: u64,
    /// How many more the kernel adds on demand.
    more: u64,
}

impl Pool {
    /// The pool whose directory this is.
    fn read(dir: &DirEntry) -> Option<Self> {
        let kib = kib_of(dir.file_name().to_str()?)?;
        let number = |file: &str| -> u64 {
            let text = fs::read_to_string(dir.path().join(file)).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        Some(Self {
            kib,
            pages: number("nr_hugepages"),
            free: number("free_hugepages"),
            more: number("nr_overcommit_hugepages"),
        })
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kib, pages, free, more } = self;
        match kib.trailing_zeros() {
            20.. => write!(f, "{} GiB", kib >> 20)?,
            10.. => write!(f, "{} MiB", kib >> 10)?,
            _ => write!(f, "{kib} KiB")?,
        }
        write!(f, ": {pages} ({free} free")?;
        if *more > 0 {
            write!(f, ", up to {more} more on demand")?;
        }
        f.write_str(")")
    }
}

/// The size of the pages in the pool whose directory is called `name`.
fn kib_of(name: &str) -> Option<u64> {
    name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
}

/// The pools, the one with the smallest pages first.
fn pools() -> Result<Vec<Pool>, Gap> {
    let dir = fs::read_dir(POOLS).map_err(|error| Gap::io(POOLS, &error))?;
    let mut pools: Vec<Pool> = dir.filter_map(|entry| Pool::read(&entry.ok()?)).collect();
    pools.sort_by_key(|pool| pool.kib);
    Ok(pools)
}

fn in_words(pools: &[Pool]) -> Found {
    let words: Vec<String> = pools.iter().map(ToString::to_string).collect();
    if pools.iter().any(|pool| pool.free > 0 || pool.more > 0) {
        Ok(words.join(", "))
    } else if pools.is_empty() {
        Err(Gap::Missing("no pool".to_owned()))
    } else {
        Err(Gap::Missing(words.join(", ")))
    }
}

fn transparent() -> Found {
    let enabled = read(&format!("{THP}/enabled"))?;
    let shared = read(&format!("{THP}/shmem_enabled")).unwrap_or_default();
    let (enabled, shared) = (selected(&enabled), selected(&shared));
    let words = format!("{enabled}; shared memory: {shared}");
    match enabled {
        "never" => Err(Gap::Missing(words)),
        NOT_KNOWN => Err(Gap::Unknown { found: words, mend: "see what is in that directory" }),
        _ => Ok(words),
    }
}

/// The word in brackets among several.
fn selected(text: &str) -> &str {
    let word = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    word.map_or(NOT_KNOWN, |(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(kib: u64, pages: u64, more: u64) -> Pool {
        Pool { kib, pages, free: pages / 2, more }
    }

    #[test]
    fn a_pool_is_named_after_its_pages() {
        assert_eq!(kib_of("hugepages-2048kB"), Some(2048));
        assert_eq!(kib_of("hugepages-1048576kB"), Some(1 << 20));
        for name in ["hugepages-kB", "hugepages-2048", "2048kB", ""] {
            assert_eq!(kib_of(name), None, "{name}");
        }
    }

    #[test]
    fn one_pool_with_pages_will_do() {
        let found = in_words(&[pool(2048, 64, 0), pool(1 << 20, 0, 2)]).unwrap();
        assert_eq!(found, "2 MiB: 64 (32 free), 1 GiB: 0 (0 free, up to 2 more on demand)");
        let empty = in_words(&[pool(64, 0, 0), pool(2048, 0, 0)]);
        let words = "64 KiB: 0 (0 free), 2 MiB: 0 (0 free)";
        assert_eq!(empty, Err(Gap::Missing(words.to_owned())));
        assert!(in_words(&[]).is_err());
        let used = Pool { free: 0, ..pool(2048, 64, 0) };
        assert!(in_words(&[used]).is_err(), "none of its pages is left for a guest");
    }

    #[test]
    fn the_word_in_brackets_counts() {
        assert_eq!(selected("always [madvise] never"), "madvise");
        for text in ["", "always", "[", "]["] {
            assert_eq!(selected(text), "not known", "{text}");
        }
    }
}
