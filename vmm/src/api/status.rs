//! The state of every bad page, as one JSON document that is made while it is sent: a million pages are some 400 MB of
//! it, which must neither hold the relay's lock for long nor fill the VMM's memory.

use std::convert::Infallible;
use std::mem;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame};
use mce_relay::{Handle, Ledger};
use serde::Serialize;

use super::types::vm::VmInfo;

/// Pages in a piece: some 50 KB, for which the relay's lock is held for some tens of microseconds.
const PAGES: usize = 128;

/// A [`Status`](crate::api::types::vm::Status) as JSON, piece by piece. Each piece shows the ledger as it is when the
/// piece is made, so a page may be in a later state than one of an earlier piece.
pub struct StatusPieces {
    relay: Handle,
    part: Part,
    /// Text that comes next in the document.
    text: Vec<u8>,
    /// The current list has an element already.
    comma: bool,
    /// How many more elements the current list may have, and how many each list may have.
    left: usize,
    most: usize,
}

/// The part of the document that comes next.
enum Part {
    /// Bad pages from this address on.
    Pages(u64),
    /// Predicted pages from this address on.
    Predicted(u64),
    /// Pages that are no longer bad, from this index on.
    Past(usize),
    /// The huge pages that were rescued.
    Rescued,
    /// Nothing.
    End,
}

impl StatusPieces {
    /// The status of the VM that `info` describes and that `relay` belongs to.
    #[must_use]
    pub fn new(relay: Handle, info: &VmInfo) -> Self {
        Self::at_most(relay, info, usize::MAX)
    }

    /// The same with only the first `most` elements of each list.
    #[must_use]
    pub fn at_most(relay: Handle, info: &VmInfo, most: usize) -> Self {
        let mut text = b"{\"vm\":".to_vec();
        write(&mut text, info);
        text.extend_from_slice(b",\"pages\":[");
        Self { relay, part: Part::Pages(0), text, comma: false, left: most, most }
    }

    /// Whether the status of `relay` is so long that it is sent in pieces.
    pub(super) fn are_many(relay: &Handle) -> bool {
        let len = |ledger: &Ledger| ledger.len() + ledger.predicted_len() + ledger.past().len();
        relay.inspect(len) > PAGES
    }

    /// Whether the current list may have more elements, after a piece of `len`.
    fn goes_on(&mut self, len: usize) -> bool {
        self.left -= len;
        len == PAGES && self.left > 0
    }

    fn list(&mut self, elements: &[impl Serialize]) {
        for element in elements {
            if mem::replace(&mut self.comma, true) {
                self.text.push(b',');
            }
            write(&mut self.text, element);
        }
    }
}

impl Iterator for StatusPieces {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let from = |gpa: u64| -> Range<u64> { gpa..u64::MAX };
        let most = PAGES.min(self.left);
        let end = match self.part {
            Part::End => return None,
            Part::Pages(next) => {
                let pages: Vec<_> =
                    self.relay.inspect(|ledger| ledger.within(from(next)).take(most).collect());
                self.list(&pages);
                let last = self.goes_on(pages.len()).then(|| pages.last()).flatten();
                self.part = last.map_or(Part::Predicted(0), |page| Part::Pages(page.gpa + 1));
                last.is_none().then_some("],\"predicted\":[")
            }
            Part::Predicted(next) => {
                let pages: Vec<_> = self
                    .relay
                    .inspect(|ledger| ledger.predicted_within(from(next)).take(most).collect());
                self.list(&pages);
                let last = self.goes_on(pages.len()).then(|| pages.last()).flatten();
                self.part = last.map_or(Part::Past(0), |page| Part::Predicted(page.gpa + 1));
                last.is_none().then_some("],\"past\":[")
            }
            Part::Past(next) => {
                let pages: Vec<_> =
                    self.relay.inspect(|ledger| ledger.past_behind(next).take(most).collect());
                self.list(&pages);
                let goes_on = self.goes_on(pages.len());
                self.part = if goes_on { Part::Past(next + PAGES) } else { Part::Rescued };
                (!goes_on).then_some("],\"rescued\":[")
            }
            Part::Rescued => {
                // Fewer than the guest has huge pages.
                let rescued = self.relay.inspect(|ledger| ledger.rescued().to_vec());
                self.list(&rescued);
                self.part = Part::End;
                Some("]}")
            }
        };
        if let Some(end) = end {
            self.text.extend_from_slice(end.as_bytes());
            self.comma = false;
            self.left = self.most;
        }
        Some(mem::take(&mut self.text))
    }
}

fn write(text: &mut Vec<u8>, what: &impl Serialize) {
    // Plain structs of strings and numbers, into memory: it cannot fail.
    let _ = serde_json::to_writer(text, what);
}

impl Body for StatusPieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.next().map(|piece| Ok(Frame::data(Bytes::from(piece)))))
    }
}

#[cfg(test)]
mod tests {
    use mce_relay::mca::{Caps, Vendor};
    use mce_relay::{RamMap, RamRegion, Relay};
    use serde::Deserialize;

    use super::*;
    use crate::api::types::vm::Status;

    /// The VM that is the example in the API's document.
    fn an_info() -> VmInfo {
        let document = include_str!("../../../docs/openapi.json");
        let document: serde_json::Value = serde_json::from_str(document).unwrap();
        let vm = &document["components"]["schemas"]["VmInfo"]["examples"][0];
        VmInfo::deserialize(vm).unwrap()
    }

    /// A page of 1 GiB is lost: 262,144 pages by one signal.
    #[test]
    fn every_page_is_in_one_of_the_pieces() {
        const GIB: u64 = 1 << 30;
        // SAFETY: nothing is mapped there, and nothing writes there.
        let huge = unsafe { RamRegion::new(0x7e00_0000_0000, 4 * GIB, 2 * GIB) }.in_pages_of(30);
        let caps = Caps { vendor: Vendor::Intel, mcg_cap: 10, succor: false };
        let map = RamMap::new(&[huge]).unwrap();
        let relay = Relay::builder(map).vcpus(1).machine_checks(caps).start().unwrap();
        let handle = relay.handle();
        assert!(!StatusPieces::are_many(&handle));
        let empty = StatusPieces::new(handle.clone(), &an_info()).flatten().collect::<Vec<u8>>();
        let empty: Status = serde_json::from_slice(&empty).unwrap();
        assert!(empty.pages.is_empty() && empty.predicted.is_empty() && empty.past.is_empty());

        handle.forge(5 * GIB + 0x1000, None).unwrap();
        while handle.inspect(Ledger::len) == 0 {
            std::thread::yield_now();
        }
        assert!(StatusPieces::are_many(&handle));
        for (most, expected) in [(1, 1), (PAGES, PAGES), (PAGES + 1, PAGES + 1), (0, 0)] {
            let pieces = StatusPieces::at_most(handle.clone(), &an_info(), most);
            let status: Status =
                serde_json::from_slice(&pieces.flatten().collect::<Vec<u8>>()).unwrap();
            assert_eq!(status.pages.len(), expected);
        }
        let (mut largest, mut all) = (0, Vec::new());
        for piece in StatusPieces::new(handle, &an_info()) {
            largest = largest.max(piece.len());
            all.extend(piece);
        }
        assert!(largest < 100_000, "{largest} bytes in a piece");
        let status: Status = serde_json::from_slice(&all).unwrap();
        let gpas = (5 * GIB..6 * GIB).step_by(4096);
        assert!(status.pages.iter().map(|page| page.gpa).eq(gpas), "{}", status.pages.len());
    }
}
