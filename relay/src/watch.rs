//! For programs without a guest: watches memory of the program's own that may go bad, and calls back so that the
//! program drops or replaces what was in it.
//!
//! The kernel's document on hwpoison describes such programs: one that can do without an object need not die when the
//! object's page goes bad. The program registers the ranges that it can do without. The relay's thread takes the AOs
//! and looks for pages whose signals were swallowed; a thread of its own calls back, outside any signal handler and any
//! lock of the relay's. The program reads such memory by [`Watch::read`], which returns an error where a load would end
//! the process.
//!
//! ```
//! use mce_relay::Signals;
//! use mce_relay::watch::Watch;
//!
//! #[repr(align(4096))]
//! struct Page([u8; 4096]);
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let watch = Watch::start(Signals::Install, |lost| {
//!     println!("{} bytes at {:#x} are gone: drop what was there", lost.extent, lost.address);
//! })?;
//! let page = Box::new(Page([7; 4096]));
//! let address = page.0.as_ptr().expose_provenance() as u64;
//! watch.add(address, 4096, 12)?;
//! let mut byte = [0];
//! match watch.read(address + 5, &mut byte) {
//!     Ok(_) => assert_eq!(byte, [7]),
//!     Err(error) => println!("that entry is lost: {error}"),
//! }
//! watch.remove(address)?;
//! # Ok(())
//! # }
//! ```

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::event::Event;
use crate::memory::access::AccessError;
use crate::memory::map::{RamError, RamMap, RamRegion};
use crate::relay::error::StartError;
use crate::relay::handle::Handle;
use crate::relay::start::Relay;
use crate::signal::Signals;
use crate::types::{FailureKind, FoundBy, PAGE_SIZE};

/// Memory that is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    /// Address of the first byte of the registered range that it is in.
    pub range: u64,
    /// Address of the first byte that is lost.
    pub address: u64,
    /// How many bytes are lost: 4096, or a huge page's 2 MiB or 1 GiB.
    pub extent: u64,
    /// AO, or AR where a thread touched the page.
    pub kind: FailureKind,
    /// How it was found; [`FoundBy::Access`] by [`Watch::read`].
    pub found_by: FoundBy,
}

/// Ranges of this process's memory that may go bad. Dropping it ends its threads.
pub struct Watch {
    relay: Option<Relay>,
    handle: Handle,
    /// The queue of the thread that calls back; `None` ends it.
    end: Sender<Option<Lost>>,
    calls: Option<JoinHandle<()>>,
    /// First byte and length of each range.
    ranges: Arc<Mutex<Vec<RamRegion>>>,
}

impl Watch {
    /// Starts watching, with no range yet. `lost` is called on a thread of its own, once for each page that goes bad
    /// (once for a huge page), one call at a time; it may block, and may use this watch. Pages that go bad while it
    /// blocks wait for it. A page is reported again only after [`Self::replaced`].
    ///
    /// Which threads are signalled: see [`RelayBuilder::start`](crate::RelayBuilder::start).
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(
        signals: Signals,
        mut lost: impl FnMut(Lost) + Send + 'static,
    ) -> Result<Self, StartError> {
        let (send, news) = channel::<Option<Lost>>();
        let end = send.clone();
        let ranges = Arc::new(Mutex::new(Vec::<RamRegion>::new()));
        let known = Arc::clone(&ranges);
        let observer = move |event: &Event| {
            let Event::Seen { hva, kind, found_by, extent, .. } = *event else { return };
            let known = known.lock().unwrap_or_else(PoisonError::into_inner);
            let range =
                known.iter().find(|range| hva >= range.hva() && hva - range.hva() < range.len());
            let range = range.map_or(hva, |range| range.hva());
            let address = hva & !(extent - 1);
            // The receiver is gone only while the watch is being dropped.
            let _ = send.send(Some(Lost { range, address, extent, kind, found_by }));
        };
        let ram = RamMap::new(&[]).map_err(|error| StartError::Thread(io::Error::other(error)))?;
        let relay = Relay::builder(ram).signals(signals).observer(observer).start()?;
        let calls = std::thread::Builder::new()
            .name("mce-relay-lost".into())
            .spawn(move || news.iter().map_while(|news| news).for_each(&mut lost))
            .map_err(StartError::Thread)?;
        Ok(Self { handle: relay.handle(), relay: Some(relay), end, calls: Some(calls), ranges })
    }

    /// Watches `len` bytes at `address`, which this process has mapped in pages of `1 << page_shift` bytes:
    /// 12, or 21 or 30 for hugetlb. Address and length are multiples of 4 KiB.
    ///
    /// # Errors
    /// See [`RamError`].
    pub fn add(&self, address: u64, len: u64, page_shift: u8) -> Result<(), RamError> {
        // As if of a guest: guest-physical addresses are this process's own here.
        let range = RamRegion::unwritten(address, address, len).in_pages_of(page_shift);
        // Before the relay knows the range, so that a page that goes bad at once finds it.
        self.lock().push(range);
        let added = self.handle.add_ram(range);
        if added.is_err() {
            self.lock().retain(|known| *known != range);
        }
        added
    }

    /// Watches the range that begins at `address` no longer. Call it before the memory is unmapped.
    ///
    /// # Errors
    /// There is no such range.
    pub fn remove(&self, address: u64) -> Result<(), RamError> {
        let range = self.handle.remove_ram(address)?;
        self.lock().retain(|known| *known != range);
        Ok(())
    }

    /// There is good memory again in the `len` bytes at `address` (a new mapping, say): a page there that goes bad
    /// again is reported again.
    pub fn replaced(&self, address: u64, len: u64) {
        self.handle.replaced(address & !(PAGE_SIZE - 1), len);
    }

    /// Copies the bytes at `address`, in a watched range, into `to`, up to the first byte that cannot be reached, and
    /// returns how many bytes were copied. It never raises SIGBUS; a page that turns out to be bad is reported by
    /// `lost` like any other.
    ///
    /// # Errors
    /// Not even the first byte could be read: see [`AccessError`], whose guest-physical addresses are this process's
    /// own here.
    pub fn read(&self, address: u64, to: &mut [u8]) -> Result<usize, AccessError> {
        self.handle.read(address, to)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<RamRegion>> {
        // Whole entries are put in and taken out.
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("ranges", &*self.lock()).finish_non_exhaustive()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Pages that the relay's thread finds before it ends are still reported.
        drop(self.relay.take());
        let _ = self.end.send(None);
        // The callback's captures may own the last reference to this watch, so this may run on the callback's own
        // thread.
        if let Some(calls) = self.calls.take()
            && calls.thread().id() != std::thread::current().id()
            && calls.join().is_err()
        {
            log::warn!("the callback for lost memory has panicked");
        }
    }
}
