//! Whether a VM that does not answer any more is ending.

use std::thread::sleep;
use std::time::{Duration, Instant};

use mce_relay_vmm::api::types::vm::VmInfo;

use crate::client::error::ClientError;
use crate::client::life::{BROKEN_OFF, LOOK, Life};
use crate::client::requests;

/// How long a VM that does not answer any more may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

impl Life {
    /// Whether the VM ends. Waits while the VM has no guest and does not say why.
    #[must_use]
    pub fn ends(&self) -> bool {
        let start = Instant::now();
        loop {
            if self.is_over() {
                return true;
            }
            match requests::get_soon::<VmInfo>(&self.socket, "vm.info", BROKEN_OFF) {
                // Another VM may have taken its place already.
                Ok((pid, _)) => return pid != self.pid,
                // It does not answer at all.
                Err(ClientError::Silent { .. }) => return false,
                // It is between two boots, or near its end.
                Err(_) if start.elapsed() < PATIENCE => sleep(LOOK),
                Err(_) => return false,
            }
        }
    }

    /// What `error` means for a VM that answered before.
    #[must_use]
    pub fn explain(&self, error: ClientError) -> ClientError {
        let is_mute = matches!(error, ClientError::Connect { .. } | ClientError::Talk { .. });
        if is_mute && self.ends() { self.ended() } else { error }
    }
}
