//! For programs without a guest: memory of one's own that may go bad, and a callback to drop or replace
//! what was in it.
//!
//! The kernel's document on hwpoison has such programs in mind: one that can do without an object need not
//! die of its page. The program says which ranges it can do without. The relay's thread takes the AOs, looks
//! for pages whose signals were swallowed, and a thread of its own calls back, outside any signal handler
//! and any lock of the relay's. Whoever reads such memory does it by [`Watch::read`], which returns an error
//! where a load would end the process.
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

/// Memory that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    /// Address of the first byte of the range that it was in, as it was registered.
    pub range: u64,
    /// Address of the first byte that is gone.
    pub address: u64,
    /// How many bytes are: 4096, or a huge page's 2 MiB or 1 GiB.
    pub extent: u64,
    /// AO, or AR where somebody ran into it.
    pub kind: FailureKind,
    /// How it became known; [`FoundBy::Access`] by a guarded read.
    pub found_by: FoundBy,
}

/// Ranges of this process's memory that may go bad. Dropping it ends its threads.
pub struct Watch {
    relay: Option<Relay>,
    handle: Handle,
    /// To the thread that calls back; `None` is its end.
    end: Sender<Option<Lost>>,
    calls: Option<JoinHandle<()>>,
    /// First byte and length of each range.
    ranges: Arc<Mutex<Vec<RamRegion>>>,
}

impl Watch {
    /// Starts watching, with no range yet. `lost` is called on a thread of its own, once for each page that
    /// goes bad (once for a huge page), one after the other; it may block, and may use this watch. While it blocks
    /// the pages that go bad wait, each once: a page is news again only after [`Self::replaced`].
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
            // Without a receiver the watch is being dropped.
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
        // In the terms of a guest: its memory begins where ours does.
        let range = RamRegion::unwritten(address, address, len).in_pages_of(page_shift);
        // Before the relay knows it: what goes bad at once finds its range.
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

    /// There is good memory at `address` again (a new mapping was put in its place): if the page goes bad
    /// once more, that is news.
    pub fn replaced(&self, address: u64, len: u64) {
        self.handle.replaced(address & !(PAGE_SIZE - 1), len);
    }

    /// Copies what lies at `address`, in a range that is watched, into `to`, up to the first byte that cannot
    /// be reached; how many bytes. It never raises SIGBUS; a page that turns out to be bad is called back
    /// for like any other.
    ///
    /// # Errors
    /// Not even the first byte could be read: see [`AccessError`], whose guest-physical addresses are those
    /// of this process here.
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
        // What the relay's thread finds until it ends is called back for.
        drop(self.relay.take());
        let _ = self.end.send(None);
        // A callback may hold what holds the watch, and be the last to.
        if let Some(calls) = self.calls.take()
            && calls.thread().id() != std::thread::current().id()
            && calls.join().is_err()
        {
            log::warn!("the callback for lost memory has panicked");
        }
    }
}
