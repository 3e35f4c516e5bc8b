//! The system calls of the relay's threads, for hosts that restrict each thread to those that it needs (seccomp).
//!
//! A host merges the lists into its own filters, or takes `filter` and `merge` (feature `seccompiler`).
//! [`THREAD`] is what Rust's standard library and the C library (glibc) do on any thread; [`RELAY`] is the
//! relay's own thread once it is set up, [`VCPU`] what the relay adds to a vCPU thread, [`HANDLE`] what it
//! adds to a thread that uses a [`Handle`](crate::Handle), and [`START`] what a thread needs that starts a relay and
//! drops it, [`POLLED`] for event loops, [`RESCUE`] for huge pages, [`GUARD`] and [`VIEWS`] for devices, and [`KICK`] for a kick by pthread_kill(3), on each
//! thread that makes it.
//!
//! Filters are inherited: a thread has the filter of the thread that started it, beside any that it installs later. So
//! a thread under a filter that starts a relay needs [`RELAY`] in it, too, and [`VCPU`] if it starts the vCPUs'
//! threads. Merge last, into the complete rules of a thread: a rule of a list allows a call with certain arguments
//! only, so in a map that does not have the host's own rule for that call yet, the call would be narrowed to these.
//!
//! The host adds the system calls of its own callbacks: the observer, [`Mca`](crate::Mca) and the kick of
//! [`Relay::attach`](crate::Relay::attach) run on these threads, and so does its logger.

//! ```
//! # #[cfg(feature = "seccompiler")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use mce_relay::syscalls::{RELAY, THREAD, VCPU, filter, merge};
//!
//! // Ready-made, for the relay's thread alone, as RelayBuilder::on_thread:
//! let program = filter(THREAD.iter().chain(RELAY), seccompiler::SeccompAction::Trap)?;
//! let on_thread = move || seccompiler::apply_filter(&program).map_err(std::io::Error::other);
//!
//! // Or merged into the rules that you have of your vCPU threads:
//! let mut own = std::collections::BTreeMap::from([(libc::SYS_exit, Vec::new())]);
//! merge(&mut own, VCPU)?;
//! # drop((on_thread, own));
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "seccompiler"))]
//! # fn main() {}
//! ```

use std::ffi::c_long;

/// A system call, and the values that its arguments have to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its number on this architecture (`SYS_…`).
    pub number: c_long,
    /// Its name.
    pub name: &'static str,
    /// The condition for each of the six arguments.
    pub args: [Is; 6],
    /// What it is needed for.
    pub why: &'static str,
}

/// A condition for an argument. It is compared in its low 32 bits, which is all that the kernel uses of the arguments
/// that are restricted here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Is {
    /// Any value.
    Any,
    /// This value.
    Value(u32),
    /// The id of the process, as it is when the filter is made.
    OwnPid,
}

impl Call {
    /// The call `number`, with any arguments.
    #[must_use]
    pub const fn new(number: c_long, name: &'static str, why: &'static str) -> Self {
        Self { number, name, args: [Is::Any; 6], why }
    }

    /// The same with argument `index`, 0 to 5, as given.
    ///
    /// # Panics
    /// There is no such argument.
    #[must_use]
    pub const fn with(mut self, index: usize, is: Is) -> Self {
        self.args[index] = is;
        self
    }

    /// The same with argument `index`, 0 to 5, of this value: a flag or a request, which is no less than 0
    /// and fits 32 bits.
    ///
    /// # Panics
    /// There is no such argument.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "`From` is not const; see above"
    )]
    pub const fn given(self, index: usize, value: i64) -> Self {
        self.with(index, Is::Value(value as u32))
    }
}

const PRIVATE: i64 = libc::FUTEX_PRIVATE_FLAG as i64;
const ANONYMOUS: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;
const READ_WRITE: i64 = (libc::PROT_READ | libc::PROT_WRITE) as i64;

/// What the standard library and glibc do on any thread that takes locks, uses memory, is signalled, logs to
/// a descriptor, and ends.
pub const THREAD: &[Call] = &[
    Call::new(libc::SYS_futex, "futex", "locks").given(1, libc::FUTEX_WAIT as i64 | PRIVATE),
    Call::new(libc::SYS_futex, "futex", "locks and conditions")
        .given(1, libc::FUTEX_WAIT_BITSET as i64 | PRIVATE),
    Call::new(libc::SYS_futex, "futex", "locks and conditions")
        .given(1, libc::FUTEX_WAKE as i64 | PRIVATE),
    Call::new(libc::SYS_clock_gettime, "clock_gettime", "where the vDSO cannot tell the time"),
    Call::new(libc::SYS_brk, "brk", "allocation"),
    Call::new(libc::SYS_mmap, "mmap", "allocation").given(2, READ_WRITE).given(3, ANONYMOUS),
    Call::new(libc::SYS_mmap, "mmap", "allocation: room for an arena")
        .given(2, libc::PROT_NONE as i64)
        .given(3, ANONYMOUS | libc::MAP_NORESERVE as i64),
    Call::new(libc::SYS_mprotect, "mprotect", "allocation: an arena grows").given(2, READ_WRITE),
    Call::new(libc::SYS_mremap, "mremap", "allocation").given(3, libc::MREMAP_MAYMOVE as i64),
    Call::new(libc::SYS_munmap, "munmap", "allocation; the end of a thread"),
    Call::new(libc::SYS_madvise, "madvise", "allocation; the end of a thread")
        .given(2, libc::MADV_DONTNEED as i64),
    Call::new(libc::SYS_getrandom, "getrandom", "the seed of hash maps"),
    Call::new(libc::SYS_write, "write", "a logger's stderr"),
    Call::new(libc::SYS_rt_sigreturn, "rt_sigreturn", "the end of every signal handler"),
    Call::new(
        libc::SYS_restart_syscall,
        "restart_syscall",
        "waits that were stopped (SIGSTOP, a debugger)",
    ),
    Call::new(libc::SYS_rt_sigprocmask, "rt_sigprocmask", "the end of a thread")
        .given(0, libc::SIG_BLOCK as i64),
    Call::new(libc::SYS_sigaltstack, "sigaltstack", "the end of a thread"),
    Call::new(libc::SYS_exit, "exit", "the end of a thread"),
];

const GETPID: Call = Call::new(libc::SYS_getpid, "getpid", "a SIGBUS that is handed on");
const GETTID: Call = Call::new(libc::SYS_gettid, "gettid", "a SIGBUS that is handed on");
const SIGACTION: Call =
    Call::new(libc::SYS_rt_sigaction, "rt_sigaction", "a SIGBUS that is handed on")
        .given(0, libc::SIGBUS as i64);
const SIGQUEUE: Call = Call::new(
    libc::SYS_rt_tgsigqueueinfo,
    "rt_tgsigqueueinfo",
    "a SIGBUS that is handed on; Handle::forge",
)
.with(0, Is::OwnPid)
.given(2, libc::SIGBUS as i64);

/// For a SIGBUS that the relay does not take care of, on any thread of the process: it is reported on stderr (`write`),
/// and handed on to the previous handler or the default action. Part of the lists below.
pub const HAND_ON: &[Call] = &[GETPID, GETTID, SIGACTION, SIGQUEUE];

const COPY: Call = Call::new(
    libc::SYS_process_vm_writev,
    "process_vm_writev",
    "guest memory, read and written without dying of a bad page",
)
.with(0, Is::OwnPid);
const IS_POISONED: Call = Call::new(libc::SYS_madvise, "madvise", "whether a page is poisoned")
    .given(2, libc::MADV_POPULATE_READ as i64);

const IS_MAPPED: Call = Call::new(
    libc::SYS_pread64,
    "pread64",
    "/proc/self/pagemap: what of a huge page is still mapped",
);

const WAKE: Call = Call::new(libc::SYS_write, "write", "an eventfd that wakes the relay's thread");

/// A thread that starts a relay ([`RelayBuilder::start`](crate::RelayBuilder::start)) and drops it, beside [`THREAD`]. The
/// relay's thread inherits its filter.
pub const START: &[Call] = &[
    Call::new(libc::SYS_rt_sigaction, "rt_sigaction", "the SIGBUS handler")
        .given(0, libc::SIGBUS as i64),
    Call::new(libc::SYS_rt_sigprocmask, "rt_sigprocmask", "SIGBUS is unblocked; a new thread")
        .given(0, libc::SIG_UNBLOCK as i64),
    Call::new(libc::SYS_rt_sigprocmask, "rt_sigprocmask", "a new thread")
        .given(0, libc::SIG_SETMASK as i64),
    Call::new(libc::SYS_prctl, "prctl", "early and late kill").given(0, libc::PR_MCE_KILL as i64),
    Call::new(libc::SYS_prctl, "prctl", "whether it is in force")
        .given(0, libc::PR_MCE_KILL_GET as i64),
    Call::new(libc::SYS_eventfd2, "eventfd2", "what wakes the relay's thread"),
    Call::new(
        libc::SYS_openat,
        "openat",
        "/proc/self/pagemap and status, the kernel's counts of failures",
    ),
    Call::new(libc::SYS_newfstatat, "newfstatat", "the kernel's counts of failures"),
    Call::new(libc::SYS_getdents64, "getdents64", "the kernel's counts of failures"),
    Call::new(libc::SYS_pread64, "pread64", "the kernel's counts of failures"),
    Call::new(libc::SYS_close, "close", "files that were looked at; the end of the relay"),
    Call::new(libc::SYS_ioctl, "ioctl", "whether there is PAGEMAP_SCAN (Linux 6.7)")
        .given(1, crate::memory::scan::PAGEMAP_SCAN as i64),
    IS_POISONED,
    COPY,
    WAKE,
    GETPID,
    GETTID,
    Call::new(libc::SYS_mmap, "mmap", "a new thread's stack")
        .given(2, libc::PROT_NONE as i64)
        .given(3, ANONYMOUS | libc::MAP_STACK as i64),
    Call::new(libc::SYS_mmap, "mmap", "a new thread's stack for signal handlers")
        .given(2, READ_WRITE)
        .given(3, ANONYMOUS | libc::MAP_STACK as i64),
    Call::new(libc::SYS_mprotect, "mprotect", "the page below that stack")
        .given(2, libc::PROT_NONE as i64),
    Call::new(libc::SYS_futex, "futex", "a thread's end is waited for")
        .given(1, (libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME) as i64),
    Call::new(libc::SYS_clone3, "clone3", "a new thread"),
    Call::new(libc::SYS_clone, "clone", "a new thread, where there is no clone3"),
    Call::new(libc::SYS_rseq, "rseq", "a new thread"),
    Call::new(libc::SYS_set_robust_list, "set_robust_list", "a new thread"),
    Call::new(libc::SYS_sched_getaffinity, "sched_getaffinity", "a new thread"),
    Call::new(libc::SYS_prctl, "prctl", "a new thread's name").given(0, libc::PR_SET_NAME as i64),
];

/// A kick by pthread_kill(3), on whichever thread makes it: the relay's, or a vCPU's in
/// [`VcpuPort::before_run`](crate::VcpuPort::before_run).
pub const KICK: &[Call] = &[
    Call::new(libc::SYS_rt_sigprocmask, "rt_sigprocmask", "no signal within pthread_kill")
        .given(0, libc::SIG_BLOCK as i64),
    Call::new(libc::SYS_rt_sigprocmask, "rt_sigprocmask", "no signal within pthread_kill")
        .given(0, libc::SIG_SETMASK as i64),
    Call::new(libc::SYS_tgkill, "tgkill", "the signal").with(0, Is::OwnPid),
    Call::new(libc::SYS_getpid, "getpid", "whose thread it is"),
];

/// The relay's own thread, from [`RelayBuilder::on_thread`](crate::RelayBuilder::on_thread) to its end, beside [`THREAD`].
/// It opens no file.
pub const RELAY: &[Call] = &[
    Call::new(libc::SYS_ppoll, "ppoll", "waiting for a signal or an eventfd"),
    Call::new(
        libc::SYS_rt_sigprocmask,
        "rt_sigprocmask",
        "no signal between the look and the wait",
    )
    .given(0, libc::SIG_BLOCK as i64),
    Call::new(
        libc::SYS_rt_sigprocmask,
        "rt_sigprocmask",
        "no signal between the look and the wait",
    )
    .given(0, libc::SIG_UNBLOCK as i64),
    Call::new(libc::SYS_read, "read", "an eventfd that has woken it"),
    WAKE,
    Call::new(libc::SYS_ioctl, "ioctl", "PAGEMAP_SCAN (Linux 6.7)")
        .given(1, crate::memory::scan::PAGEMAP_SCAN as i64),
    Call::new(
        libc::SYS_pread64,
        "pread64",
        "the kernel's count of failures; /proc/self/pagemap and status, where pages are swapped out or \
         PAGEMAP_SCAN is missing",
    ),
    Call::new(libc::SYS_mincore, "mincore", "which candidates have memory behind them"),
    COPY,
    IS_POISONED,
    Call::new(libc::SYS_close, "close", "the end of the relay"),
    GETPID,
    GETTID,
    SIGACTION,
    SIGQUEUE,
];

/// What the relay adds to a vCPU's thread, beside [`THREAD`] and the host's own: from
/// [`Relay::attach`](crate::Relay::attach), if SIGBUS is not blocked there, to the end of the port.
pub const VCPU: &[Call] =
    &[WAKE, COPY, IS_POISONED, IS_MAPPED, GETPID, GETTID, SIGACTION, SIGQUEUE];

/// What a [`Handle`](crate::Handle) adds to a thread that uses it, beside [`THREAD`].
///
/// `Handle::poisoning` needs nothing beyond what `poison` itself calls.
pub const HANDLE: &[Call] =
    &[WAKE, COPY, IS_POISONED, IS_MAPPED, GETPID, GETTID, SIGACTION, SIGQUEUE];

/// What [`RelayBuilder::rescue`](crate::RelayBuilder::rescue) adds to the thread that starts the relay, beside [`START`], and to
/// the one that does its work, beside [`RELAY`].
pub const RESCUE: &[Call] = &[
    Call::new(libc::SYS_userfaultfd, "userfaultfd", "what marks a page as bad; at the start"),
    uffd(crate::memory::uffd::UFFDIO_API, "UFFDIO_API: the same"),
    Call::new(libc::SYS_madvise, "madvise", "memory for what is left of a huge page")
        .given(2, libc::MADV_HUGEPAGE as i64),
    Call::new(libc::SYS_madvise, "madvise", "the same").given(2, libc::MADV_NOHUGEPAGE as i64),
    Call::new(libc::SYS_madvise, "madvise", "the same").given(2, libc::MADV_POPULATE_WRITE as i64),
    Call::new(libc::SYS_pread64, "pread64", "what is left; how much memory may be taken"),
    uffd(crate::memory::uffd::UFFDIO_REGISTER, "UFFDIO_REGISTER: the page that is gone is marked"),
    Call::new(libc::SYS_madvise, "madvise", "the same, of locked memory")
        .given(2, crate::memory::uffd::MADV_DONTNEED_LOCKED as i64),
    uffd(crate::memory::uffd::UFFDIO_POISON, "UFFDIO_POISON: the same"),
    uffd(crate::memory::uffd::UFFDIO_UNREGISTER, "UFFDIO_UNREGISTER: the same"),
    Call::new(libc::SYS_mremap, "mremap", "good memory comes to the place of the huge page")
        .given(3, (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as i64),
    Call::new(libc::SYS_mmap, "mmap", "what a refused mremap has unmapped")
        .given(2, libc::PROT_NONE as i64)
        .given(3, ANONYMOUS | (libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE) as i64),
];

/// What a thread needs that uses views of guest memory ([`guard`](crate::guard)), a device's say, beside [`THREAD`].
pub const GUARD: &[Call] = &[
    Call::new(
        libc::SYS_mmap,
        "mmap",
        "a scratch page takes a bad one's place, within the SIGBUS handler",
    )
    .given(2, READ_WRITE)
    .given(3, ANONYMOUS | (libc::MAP_NORESERVE | libc::MAP_FIXED) as i64),
    WAKE,
];

/// What views of guest memory add to the threads that make them good again: the one that does the relay's work, beside
/// [`RELAY`], and those that use a [`Handle`](crate::Handle), beside [`HANDLE`].
pub const VIEWS: &[Call] = &[
    Call::new(libc::SYS_mremap, "mremap", "devices have good memory again")
        .given(3, (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as i64),
    Call::new(libc::SYS_mmap, "mmap", "the same, of huge pages")
        .given(2, READ_WRITE)
        .given(3, (libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED) as i64),
    Call::new(libc::SYS_mmap, "mmap", "zeros where devices cannot have good memory again")
        .given(2, READ_WRITE)
        .given(3, ANONYMOUS | (libc::MAP_NORESERVE | libc::MAP_FIXED) as i64),
    Call::new(libc::SYS_mmap, "mmap", "memory for what is left of a huge page that devices use")
        .given(2, READ_WRITE)
        .given(3, (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as i64),
];

const fn uffd(request: libc::Ioctl, why: &'static str) -> Call {
    #[allow(clippy::cast_possible_wrap, reason = "its bits count")]
    Call::new(libc::SYS_ioctl, "ioctl", why).given(1, request as i64)
}

/// What [`Polled`](crate::Polled) adds to [`RELAY`] on the thread of the host's event loop, from its start to its end; the
/// host's own wait (epoll_wait(2), say) is the host's to add.
pub const POLLED: &[Call] = &[
    Call::new(libc::SYS_epoll_create1, "epoll_create1", "the descriptor to wait for"),
    Call::new(libc::SYS_epoll_ctl, "epoll_ctl", "the descriptor to wait for"),
    Call::new(libc::SYS_timerfd_create, "timerfd_create", "when the next turn is due"),
    Call::new(libc::SYS_timerfd_settime, "timerfd_settime", "when the next turn is due"),
    Call::new(libc::SYS_signalfd4, "signalfd4", "a pending SIGBUS ends the wait"),
];

/// All lists, each with its name: for tables and files.
pub const LISTS: [(&str, &[Call]); 10] = [
    ("any thread", THREAD),
    ("relay", RELAY),
    ("vcpu", VCPU),
    ("handle", HANDLE),
    ("start", START),
    ("kick", KICK),
    ("polled", POLLED),
    ("rescue", RESCUE),
    ("guard", GUARD),
    ("views", VIEWS),
];

#[cfg(feature = "seccompiler")]
mod filters {
    use std::collections::BTreeMap;
    use std::collections::btree_map::Entry;

    use seccompiler::{
        BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
        SeccompFilter, SeccompRule, TargetArch,
    };

    use super::{Call, Is};

    impl Call {
        fn conditions(&self) -> Result<Vec<SeccompCondition>, BackendError> {
            let given = (0..).zip(self.args).filter_map(|(index, is)| match is {
                Is::Any => None,
                Is::Value(value) => Some((index, value)),
                Is::OwnPid => Some((index, std::process::id())),
            });
            let equal = |(index, value): (u8, u32)| {
                SeccompCondition::new(
                    index,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::Eq,
                    u64::from(value),
                )
            };
            given.map(equal).collect()
        }
    }

    /// `calls` as rules of seccompiler's, for this process, to be merged into the host's own.
    ///
    /// # Errors
    /// seccompiler refuses a condition, which it does for none of this crate's lists.
    pub fn rules<'a>(
        calls: impl IntoIterator<Item = &'a Call>,
    ) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
        // None for a call with any arguments, which needs no rule beside.
        let mut rules: BTreeMap<i64, Option<Vec<SeccompRule>>> = BTreeMap::new();
        for call in calls {
            let known = rules.entry(call.number).or_insert_with(|| Some(Vec::new()));
            let conditions = call.conditions()?;
            match known {
                _ if conditions.is_empty() => *known = None,
                Some(known) => {
                    let rule = SeccompRule::new(conditions)?;
                    if !known.contains(&rule) {
                        known.push(rule);
                    }
                }
                None => {}
            }
        }
        Ok(rules.into_iter().map(|(number, rules)| (number, rules.unwrap_or_default())).collect())
    }

    /// Adds `calls` to `rules`, for this process: a call is allowed if either allows it.
    ///
    /// # Errors
    /// See [`rules()`].
    pub fn merge<'a>(
        rules: &mut BTreeMap<i64, Vec<SeccompRule>>,
        calls: impl IntoIterator<Item = &'a Call>,
    ) -> Result<(), BackendError> {
        for (number, more) in self::rules(calls)? {
            match rules.entry(number) {
                Entry::Vacant(entry) => drop(entry.insert(more)),
                // No rule means any arguments.
                Entry::Occupied(mut entry) if entry.get().is_empty() || more.is_empty() => {
                    entry.get_mut().clear();
                }
                Entry::Occupied(mut entry) => {
                    let more = more.into_iter().filter(|rule| !entry.get().contains(rule));
                    let more: Vec<_> = more.collect();
                    entry.get_mut().extend(more);
                }
            }
        }
        Ok(())
    }

    /// A filter for this process that allows `calls` and takes action `otherwise` for every other; for
    /// [`seccompiler::apply_filter`] on the thread that it is meant for.
    ///
    /// # Errors
    /// seccompiler does not know this architecture, or the program would be longer than the kernel takes.
    pub fn filter<'a>(
        calls: impl IntoIterator<Item = &'a Call>,
        otherwise: SeccompAction,
    ) -> Result<BpfProgram, BackendError> {
        let arch = TargetArch::try_from(std::env::consts::ARCH)?;
        SeccompFilter::new(rules(calls)?, otherwise, SeccompAction::Allow, arch)?.try_into()
    }
}

#[cfg(feature = "seccompiler")]
pub use filters::{filter, merge, rules};

#[cfg(all(test, feature = "seccompiler"))]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_either_allows_is_allowed() {
        let calls = [
            Call::new(1, "any", ""),
            Call::new(2, "given", "").given(0, 5),
            Call::new(3, "given", "").given(0, 5),
        ];
        let given = rules(&[Call::new(1, "given", "").given(0, 7)]).unwrap();
        let mut own = BTreeMap::from([(1, given[&1].clone()), (2, Vec::new())]);
        merge(&mut own, &calls).unwrap();
        assert!(own[&1].is_empty() && own[&2].is_empty(), "{own:?}");
        assert_eq!(own[&3].len(), 1);
        merge(&mut own, &[Call::new(3, "given", "").given(0, 6), calls[2]]).unwrap();
        assert_eq!(own[&3].len(), 2, "once each");
    }
}
