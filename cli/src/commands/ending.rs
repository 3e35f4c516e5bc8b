//! `mce-relay shutdown` and `reset`: end a running guest, and wait for it.

use std::fmt;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use mce_relay_vmm::api::types::vm::VmInfo;
use serde::Serialize;

use crate::client::error::ClientError;
use crate::client::requests;

/// How often the VM is asked for its state.
const LOOK: Duration = Duration::from_millis(50);
/// How long a VM may take to end, or to start its guest over, when its guest is not asked.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why the guest was not ended or reset.
#[derive(Debug, thiserror::Error)]
pub enum EndingError {
    /// The VM does not answer, or refuses.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The guest did not power off in time.
    #[error(
        "the guest was asked to power off and has not done so within {} s; it may do so yet. Perhaps nothing \
         in it listens to the power button (in Linux: the module button, and systemd-logind or acpid). \
         `mce-relay shutdown --now` ends the VM without asking the guest", .0.as_secs()
    )]
    GoesOn(Duration),
    /// The guest started over instead.
    #[error(
        "the guest was asked to power off, and has started over instead (boot {0}); \
         `mce-relay shutdown --now` ends the VM"
    )]
    StartedOver(u32),
    /// The VM did not start its guest over.
    #[error(
        "the VM has ended instead of starting its guest over, as it does with `run --no-reboot`; \
         what `run` said last says more"
    )]
    NoReboot,
    /// No change was seen.
    #[error("the VM was told to, and nothing has come of it within {} s; `mce-relay status` shows it", PATIENCE.as_secs())]
    Late,
}

/// How a VM was ended.
#[derive(Debug, Serialize)]
pub struct Ended {
    /// The guest was asked to power off.
    pub asked: bool,
    /// The VM has ended. False where that was not waited for.
    pub ended: bool,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.asked, self.ended) {
            (true, true) => "the guest was asked to power off, and the VM has ended",
            (true, false) => "the guest was asked to power off",
            (false, _) => "the VM has ended",
        })
    }
}

/// A guest that was started over.
#[derive(Debug, Serialize)]
pub struct StartedOver {
    /// The number of the boot that has begun.
    pub boot: u32,
}

impl fmt::Display for StartedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest has started over: boot {}", self.boot)
    }
}

/// Asks the guest behind `socket` to power off, and waits for the VM's end, at most for `patience`. Says on stderr that
/// it waits.
///
/// # Errors
/// See [`EndingError`].
pub fn power_off(socket: &Path, patience: Duration) -> Result<Ended, EndingError> {
    let before: VmInfo = requests::get(socket, "vm.info")?;
    requests::put(socket, "vm.power-button")?;
    if patience.is_zero() {
        return Ok(Ended { asked: true, ended: false });
    }
    eprintln!(
        "mce-relay: the guest was asked to power off; waiting for that, at most {} s",
        patience.as_secs()
    );
    match watch(socket, &before, patience)? {
        Seen::Ended => Ok(Ended { asked: true, ended: true }),
        Seen::Boot(boot) => Err(EndingError::StartedOver(boot)),
        Seen::Nothing => Err(EndingError::GoesOn(patience)),
    }
}

/// Ends the VM behind `socket` without asking its guest.
///
/// # Errors
/// See [`EndingError`].
pub fn end(socket: &Path) -> Result<Ended, EndingError> {
    let before: VmInfo = requests::get(socket, "vm.info")?;
    requests::put(socket, "vm.shutdown")?;
    match watch(socket, &before, PATIENCE)? {
        Seen::Ended => Ok(Ended { asked: false, ended: true }),
        Seen::Boot(_) | Seen::Nothing => Err(EndingError::Late),
    }
}

/// Resets the guest behind `socket`.
///
/// # Errors
/// See [`EndingError`].
pub fn reset(socket: &Path) -> Result<StartedOver, EndingError> {
    let before: VmInfo = requests::get(socket, "vm.info")?;
    requests::put(socket, "vm.reset")?;
    match watch(socket, &before, PATIENCE)? {
        Seen::Boot(boot) => Ok(StartedOver { boot }),
        Seen::Ended => Err(EndingError::NoReboot),
        Seen::Nothing => Err(EndingError::Late),
    }
}

/// What happened to a VM.
enum Seen {
    /// It is gone.
    Ended,
    /// Its guest has begun this boot.
    Boot(u32),
    /// It is as it was.
    Nothing,
}

/// Watches the VM that was `before` until something happens to it, or `patience` is over.
fn watch(socket: &Path, before: &VmInfo, patience: Duration) -> Result<Seen, ClientError> {
    let start = Instant::now();
    loop {
        match requests::get::<VmInfo>(socket, "vm.info") {
            // Another VM may have its name already.
            Ok(now) if now.pid != before.pid => return Ok(Seen::Ended),
            Ok(now) if now.boot != before.boot => return Ok(Seen::Boot(now.boot)),
            Err(ClientError::Connect { source, .. }) if nobody_listens(&source) => {
                return Ok(Seen::Ended);
            }
            Err(ClientError::Ended { .. }) => return Ok(Seen::Ended),
            // It ends: its socket was closed with this connection waiting there.
            Err(ClientError::Connect { source, .. })
                if source.kind() == ErrorKind::ConnectionReset => {}
            // It runs on, is between two boots, or ends while it is asked.
            Ok(_) | Err(ClientError::Refused { .. } | ClientError::Talk { .. }) => {}
            Err(error) => return Err(error),
        }
        if start.elapsed() >= patience {
            return Ok(Seen::Nothing);
        }
        sleep(LOOK);
    }
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
}
