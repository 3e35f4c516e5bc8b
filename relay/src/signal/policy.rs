//! Which threads are signalled, and when: the per-thread policy (`PR_MCE_KILL`) and the sysctl behind it.
//!
//! The kernel sends an AO to one thread of a process: the first one whose policy is early kill. A new thread inherits
//! the policy. So [`RelayBuilder::start`](crate::RelayBuilder::start) sets late kill on the thread that calls it, and
//! early kill on the relay's thread alone.

use std::io;

/// When the kernel tells a thread of a bad page (`prctl(2)`, `PR_MCE_KILL`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum KillPolicy {
    /// As soon as the page is known to be bad (AO).
    Early,
    /// Only when it touches the page (AR).
    Late,
    /// As the sysctl `vm.memory_failure_early_kill` says.
    Default,
}

impl KillPolicy {
    fn as_raw(self) -> libc::c_int {
        match self {
            Self::Early => libc::PR_MCE_KILL_EARLY,
            Self::Late => libc::PR_MCE_KILL_LATE,
            Self::Default => libc::PR_MCE_KILL_DEFAULT,
        }
    }

    /// Sets the calling thread's policy, and reads it back to see that the kernel took it.
    ///
    /// # Errors
    /// The kernel (or a seccomp filter) refuses the call, or holds something else afterwards.
    pub fn set(self) -> io::Result<()> {
        // SAFETY: PR_MCE_KILL takes integers only and changes nothing but the thread's own policy.
        let set =
            unsafe { libc::prctl(libc::PR_MCE_KILL, libc::PR_MCE_KILL_SET, self.as_raw(), 0, 0) };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        match Self::get()? {
            now if now == self => Ok(()),
            now => Err(io::Error::other(format!(
                "asked for the {self:?} memory-failure policy, the kernel holds {now:?}"
            ))),
        }
    }

    /// The calling thread's policy.
    ///
    /// # Errors
    /// The kernel (or a seccomp filter) refuses the call.
    pub fn get() -> io::Result<Self> {
        // SAFETY: PR_MCE_KILL_GET takes no pointer and changes nothing.
        match unsafe { libc::prctl(libc::PR_MCE_KILL_GET, 0, 0, 0, 0) } {
            libc::PR_MCE_KILL_EARLY => Ok(Self::Early),
            libc::PR_MCE_KILL_LATE => Ok(Self::Late),
            libc::PR_MCE_KILL_DEFAULT => Ok(Self::Default),
            -1 => Err(io::Error::last_os_error()),
            other => Err(io::Error::other(format!("unknown memory-failure policy {other}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_is_per_thread_and_inherited() {
        std::thread::spawn(|| {
            KillPolicy::Late.set().unwrap();
            std::thread::spawn(|| {
                assert_eq!(KillPolicy::get().unwrap(), KillPolicy::Late, "inherited");
                KillPolicy::Early.set().unwrap();
            })
            .join()
            .unwrap();
            assert_eq!(KillPolicy::get().unwrap(), KillPolicy::Late, "not its child's");
            KillPolicy::Default.set().unwrap();
            assert_eq!(KillPolicy::get().unwrap(), KillPolicy::Default);
        })
        .join()
        .unwrap();
    }
}
