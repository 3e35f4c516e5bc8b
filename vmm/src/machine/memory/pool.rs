//! The host's pools of huge pages.

use std::path::{Path, PathBuf};

use super::error::MemoryError;

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// One pool.
struct Pool(PathBuf);

impl Pool {
    fn of(pools: &Path, page: u64) -> Self {
        Self(pools.join(format!("hugepages-{}kB", page >> 10)))
    }

    /// A file of the pool; 0 where it cannot be read.
    fn number(&self, file: &str) -> u64 {
        let text = std::fs::read_to_string(self.0.join(file)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }
}

/// Why `bytes` of memory in huge pages of `page` bytes cannot be had, as far as the pool says; `None`
/// when it says nothing against it.
pub(super) fn why_not(bytes: u64, page: u64) -> Option<MemoryError> {
    why_not_of(Path::new(POOLS), bytes, page)
}

fn why_not_of(pools: &Path, bytes: u64, page: u64) -> Option<MemoryError> {
    let (pool, kib, wanted) = (Pool::of(pools, page), page >> 10, bytes / page);
    if !pool.0.is_dir() {
        return Some(MemoryError::NoPool { kib });
    }
    let free = pool.number("free_hugepages").saturating_sub(pool.number("resv_hugepages"));
    // The kernel makes more than the pool has, up to here.
    let most = pool.number("nr_overcommit_hugepages");
    let surplus = most.saturating_sub(pool.number("surplus_hugepages"));
    if free.saturating_add(surplus) >= wanted {
        return None;
    }
    let total = pool.number("nr_hugepages") + wanted - free;
    Some(MemoryError::EmptyPool { wanted, kib, free, total })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_that_is_too_small_is_told_with_the_command_that_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().join("hugepages-2048kB");
        std::fs::create_dir(&pool).unwrap();
        for (file, number) in [("nr_hugepages", 10), ("free_hugepages", 8), ("resv_hugepages", 3)] {
            std::fs::write(pool.join(file), format!("{number}\n")).unwrap();
        }
        let why = |pages: u64| why_not_of(dir.path(), pages << 21, 2 << 20).map(|e| e.to_string());
        assert_eq!(why(5), None);
        let error = why(6).unwrap();
        assert!(
            error.contains("needs 6 free huge pages of 2048 KiB, the host's pool has 5"),
            "{error}"
        );
        assert!(error.contains("echo 11 > /sys/kernel/mm/hugepages/hugepages-2048kB/"), "{error}");
        std::fs::write(pool.join("nr_overcommit_hugepages"), "1").unwrap();
        assert_eq!(why(6), None);
        let error = why_not_of(dir.path(), 1 << 30, 1 << 30).unwrap().to_string();
        assert!(error.contains("hugepages-1048576kB"), "{error}");
    }
}
