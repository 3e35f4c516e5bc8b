//! A device other than a UART on a line, for one boot.

use std::sync::Arc;

use crate::machine::devices::serial::SerialLine;
use crate::machine::devices::serial::link::{Guest, Taker};
use crate::machine::lifecycle::VmControl;

/// A device on a line. Only one device is on a line at a time.
#[derive(Debug)]
pub(crate) struct Attached(Arc<SerialLine>);

impl Attached {
    /// Puts a device on `line`, whose input goes to `taker`.
    pub(crate) fn on(line: &Arc<SerialLine>, control: &VmControl, taker: Arc<dyn Taker>) -> Self {
        line.link.set_guest(Some(Guest { taker, control: control.clone() }));
        Self(Arc::clone(line))
    }

    /// Puts out `bytes`, without waiting: the line drops and counts the oldest where it holds too many.
    pub(crate) fn push(&self, bytes: &[u8]) {
        self.0.link.push_guests(bytes);
    }

    /// The taker, which was full, has room again.
    pub(crate) fn has_room(&self) {
        self.0.link.has_room();
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.0.link.set_guest(None);
    }
}
