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
    /// `kick` makes that vCPU leave KVM_RUN. The relay's thread calls it, or the thread of a vCPU that is in
    /// [`VcpuPort::before_run`]; one call at a time, without any lock of the relay's, and never after the port was
    /// dropped. A lock that `kick` takes must not be held while [`VcpuPort::before_run`] is called or a port is
    /// dropped. A kick by a signal whose handler calls [`signal::request_exit`] has no race with the entry into
    /// KVM_RUN.
    ///
    /// When its port is dropped, the vCPU counts as unplugged after 200 ms, if other vCPUs are attached: the errors
    /// that it was to be told of, and those whose records lie untaken in its banks, are told on another one. A vCPU
    /// that is attached again counts as a new one, too: the relay does not know what is left in its banks, so errors
    /// whose records lay there are told once more.
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
        // If its last port was dropped and the unplug was not processed yet, it is now.
        self.0.unplug(&mut inner, &[vcpu]);
        inner.gone.retain(|(gone, _)| *gone != vcpu);
        inner.delivery.attached(vcpu);
        inner.proven.retain(|(proven, ..)| *proven != vcpu);
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
