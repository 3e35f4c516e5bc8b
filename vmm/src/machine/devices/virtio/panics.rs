//! What a panic on a device's thread says. With RUST_BACKTRACE set the standard library would open files to say where it was
//! called from, which the thread's filter takes for an attack.

use std::cell::Cell;
use std::sync::Once;

thread_local! {
    static IS_DEVICE: Cell<bool> = const { Cell::new(false) };
}

/// From now on a panic on this thread is one entry in the log. Everything else about it is up to who catches it.
pub(super) fn be_brief() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if IS_DEVICE.get() {
                log::error!("a virtio device: {info}");
            } else {
                previous(info);
            }
        }));
    });
    IS_DEVICE.set(true);
}
