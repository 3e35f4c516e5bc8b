//! A memory cache that loses one entry when a page goes bad, instead of the process.
//!
//! Each entry has pages of its own, which the cache can do without: it is watched ([`Watch`]), read by a
//! guarded read, and dropped when its memory is gone. Lines on stdin: `get KEY`, `put KEY TEXT`, `where KEY`
//! (its address), `list`, `quit`. What is lost is said on stdout as it happens.
//!
//! `cargo run -p mce-relay --example cache`, and in another terminal, on a host that is meant for it, the
//! page behind an entry's address into /sys/kernel/debug/hwpoison/corrupt-pfn.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mce_relay::watch::{Lost, Watch};
use mce_relay::{AccessError, Signals};

const PAGE: usize = 4096;

/// Memory that nobody else has.
struct Pages {
    address: usize,
    len: usize,
}

impl Pages {
    fn new(len: usize) -> io::Result<Self> {
        let len = len.max(1).next_multiple_of(PAGE);
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let at = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), len, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: at.expose_provenance(), len })
    }

    /// The only writing, before anybody can read.
    fn fill(&mut self, bytes: &[u8]) {
        let len = bytes.len().min(self.len);
        let at = ptr::with_exposed_provenance_mut::<u8>(self.address);
        // SAFETY: our own mapping, at least that long, and nobody else knows of it yet.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at, len) };
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let at = ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: our own mapping, which nothing refers into any more.
        unsafe { libc::munmap(at, self.len) };
    }
}

struct Entry {
    pages: Pages,
    len: usize,
}

#[derive(Default)]
struct Cache {
    entries: Mutex<BTreeMap<String, Entry>>,
    watch: OnceLock<Watch>,
}

impl Cache {
    fn watch(&self) -> io::Result<&Watch> {
        self.watch.get().ok_or_else(|| io::Error::other("not started"))
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, key: &str, value: &[u8]) -> io::Result<()> {
        let mut pages = Pages::new(value.len())?;
        pages.fill(value);
        let (address, len) = (pages.address as u64, pages.len as u64);
        self.watch()?.add(address, len, 12).map_err(io::Error::other)?;
        let old = self.entries().insert(key.to_owned(), Entry { pages, len: value.len() });
        self.forget(old)
    }

    /// `None` for a key that is not there, or no longer.
    fn get(&self, key: &str) -> io::Result<Option<Vec<u8>>> {
        // Held while it is read, so that it is not unmapped meanwhile.
        let entries = self.entries();
        let Some(entry) = entries.get(key) else { return Ok(None) };
        let mut value = vec![0; entry.len];
        match self.watch()?.read(entry.pages.address as u64, &mut value) {
            Ok(read) if read == value.len() => Ok(Some(value)),
            // All or nothing. The callback drops the entry.
            Ok(_) | Err(AccessError::Poisoned { .. }) => Ok(None),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Its memory is no longer watched, and then no longer there.
    fn forget(&self, entry: Option<Entry>) -> io::Result<()> {
        let Some(entry) = entry else { return Ok(()) };
        self.watch()?.remove(entry.pages.address as u64).map_err(io::Error::other)
    }

    /// On the watch's own thread.
    fn lost(&self, lost: Lost) {
        let gone = {
            let mut entries = self.entries();
            let is_it = |entry: &Entry| entry.pages.address as u64 == lost.range;
            let key = entries.iter().find(|(_, entry)| is_it(entry)).map(|(key, _)| key.clone());
            key.and_then(|key| entries.remove_entry(&key))
        };
        let Some((key, entry)) = gone else { return };
        println!("lost {key}: {} bytes at {:#x} ({})", lost.extent, lost.address, lost.kind);
        if let Err(error) = self.forget(Some(entry)) {
            eprintln!("cache: {error}");
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cache = Arc::new(Cache::default());
    let for_watch = Arc::clone(&cache);
    let watch = Watch::start(Signals::Install, move |lost| for_watch.lost(lost))?;
    cache.watch.set(watch).map_err(|_| "started twice")?;
    println!("ready, pid {}", std::process::id());
    for line in io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.splitn(3, ' ');
        match (words.next().unwrap_or_default(), words.next(), words.next()) {
            ("put", Some(key), Some(value)) => {
                cache.put(key, value.as_bytes())?;
                println!("put {key}");
            }
            ("get", Some(key), None) => match cache.get(key)? {
                Some(value) => println!("{key} = {}", String::from_utf8_lossy(&value)),
                None => println!("{key} is not there"),
            },
            ("where", Some(key), None) => match cache.entries().get(key) {
                Some(entry) => println!("{key} at {:#x}", entry.pages.address),
                None => println!("{key} is not there"),
            },
            ("list", None, None) => {
                let keys: Vec<String> = cache.entries().keys().cloned().collect();
                println!("{} entries: {}", keys.len(), keys.join(" "));
            }
            ("quit", None, None) => break,
            _ => println!("expected put KEY TEXT, get KEY, where KEY, list or quit"),
        }
        io::stdout().flush()?;
    }
    Ok(())
}
