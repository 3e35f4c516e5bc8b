//! A relay without a thread of its own: an event loop that waits for two descriptors, its standard input and the
//! relay's. It has one page, says where, and says when that has gone bad.
//!
//! A VMM's loop has its devices' descriptors where this one has standard input.

use std::error::Error;
use std::io::{self, stdin};
use std::os::fd::AsRawFd;
use std::ptr;

use mce_relay::{Event, RamMap, RamRegion, Relay};

const LEN: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page = unsafe {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(ptr::null_mut(), LEN, prot, flags | libc::MAP_POPULATE, -1, 0)
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error().into());
    }
    let hva = page.expose_provenance() as u64;
    // SAFETY: the page stays mapped, and nothing but the relay touches it.
    let ram = RamMap::new(&[unsafe { RamRegion::new(hva, 0, LEN as u64) }])?;
    let observer = |event: &Event| println!("{event}");
    let (relay, mut polled) = Relay::builder(ram).observer(observer).start_polled()?;
    println!("ready, the page is at {hva:#x}");
    loop {
        let wanted = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [wanted(polled.as_raw_fd()), wanted(stdin().as_raw_fd())];
        // SAFETY: two live pollfds.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {
            return Err(io::Error::last_os_error().into());
        }
        if fds[0].revents != 0 {
            polled.process();
        }
        if fds[1].revents != 0 {
            // A line, or its end.
            if stdin().lines().next().is_none() {
                break;
            }
            println!("bad pages: {}", relay.pages().len());
        }
    }
    Ok(())
}
