//! A vCPU's thread joins the relay.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::error::AttachError;
use super::handle::Handle;
use super::vcpu_port::VcpuPort;
use crate::core::inner::Attached;
use crate::signal::{self, ExitByte, ThreadSlot};

impl Handle {
    /// Attaches the calling thread as the one that runs `vcpu`, whose `kvm_run.immediate_exit` is `exit`, and
    /// unblocks SIGBUS on it, without which KVM_RUN would try a bad page again for ever.
    ///
    /// `kick` makes that vCPU leave KVM_RUN. It is called on the relay's thread, and on a vCPU's thread that is in
    /// [`VcpuPort::before_run`]; without a lock of the relay's, by one at a time, and not any more once the port has
    /// been dropped. So a lock that `kick` takes must not be held where [`VcpuPort::before_run`] is called or a port
    /// is dropped. A signal whose handler calls [`signal::request_exit`] does it without a race.
    ///
    /// A vCPU whose port is dropped is unplugged as far as the relay is concerned, after 200 ms, if others are
    /// attached: what it was to be told, and what lies untaken in its banks, is told on another one. One that is
    /// attached again is a new one as well: nobody knows what is left in its banks, so what lay there is told once more.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(
        &self,
        vcpu: usize,
        exit: ExitByte,
        kick: impl Fn() + Send + 'static,
    ) -> Result<VcpuPort, AttachError> {
        let mut inner = self.0.lock();
        match inner.vcpus.get(vcpu) {
            None => return Err(AttachError::NoVcpu { vcpu, vcpus: inner.vcpus.len() }),
            Some(Some(_)) => return Err(AttachError::Attached { vcpu }),
            Some(None) => {}
        }
        let slot = ThreadSlot::attach(exit).map_err(|source| AttachError::Slot { vcpu, source })?;
        signal::unblock().map_err(|source| AttachError::Blocked { vcpu, source })?;
        // It was unplugged, and is plugged in again before that was seen to.
        self.0.unplug(&mut inner, &[vcpu]);
        inner.gone.retain(|(gone, _)| *gone != vcpu);
        inner.delivery.attached(vcpu);
        // Errors may have arrived before the thread did.
        slot.shared().ask_attention();
        let kick = Arc::new(Mutex::new(Some(Box::new(kick) as Box<dyn Fn() + Send>)));
        let attached = Attached {
            slot: slot.shared(),
            kick,
            parked: false,
            late: false,
            called: Instant::now(),
        };
        inner.vcpus[vcpu] = Some(attached);
        drop(inner);
        Ok(VcpuPort::new(vcpu, slot, Arc::clone(&self.0)))
    }
}
