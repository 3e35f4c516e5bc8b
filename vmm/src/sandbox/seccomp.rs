//! Which system calls each thread of a running VM may make; any other ends the process.
//!
//! A guest that breaks out of KVM or of a device can do what the thread may that it broke into, and no more. The filter
//! of [`Role::Main`] applies to the whole process; every other thread has one of its own beside it. Main's filter says
//! which calls exist at all (it builds the VM again at every reset, so these are many); the others restrict arguments,
//! too. What the relay needs is in [`mce_relay::syscalls`]; the lists here are this VMM's own.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use kvm_bindings::{
    KVMIO, kvm_irq_level, kvm_irqchip, kvm_mp_state, kvm_msrs, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_x86_mce,
};
use libc::{_IO, _IOR, _IOW, _IOWR, Ioctl};
use mce_relay::syscalls;
use mce_relay::syscalls::{Call, GUARD, HAND_ON, HANDLE, Is, RELAY, RESCUE, THREAD, VCPU, VIEWS};
use seccompiler::{BackendError, BpfProgram, SeccompAction, apply_filter};

use crate::sandbox::refused;
use crate::sandbox::role::Role;
use crate::sandbox::terminal::deadly::taken as deadly_signals;

/// What is done about a system call that is on no list (`--seccomp`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// The process ends, with the call's number on stderr and exit status [`STATUS`](super::refused::STATUS).
    #[default]
    On,
    /// The call is made, and the host's kernel logs it (audit).
    Log,
    /// There are no filters.
    Off,
}

/// What a thread in this role may call.
fn calls(role: Role) -> Vec<Call> {
    let lists: &[&[Call]] = match role {
        Role::Main => return everything(),
        Role::Vcpu => &[THREAD, END, KICK, VCPU, VCPU_OWN],
        Role::Relay => &[THREAD, END, KICK, RELAY, RESCUE, VIEWS, RELAY_OWN],
        Role::Api => &[THREAD, END, KICK, HANDLE, VIEWS, API_OWN],
        Role::Serial => &[THREAD, END, KICK, HAND_ON, SERIAL_OWN],
        Role::Events => &[THREAD, END, HAND_ON, EVENTS_OWN],
        Role::VirtioBlk => &[THREAD, END, HAND_ON, GUARD, VIRTIO, BLK_OWN],
        Role::VirtioVhostNet => &[THREAD, END, HAND_ON, GUARD, VIRTIO, VHOST],
        Role::VirtioRng | Role::VirtioConsole | Role::VirtioNet => {
            &[THREAD, END, HAND_ON, GUARD, VIRTIO]
        }
        Role::VirtioVsock => &[THREAD, END, HAND_ON, GUARD, VIRTIO, VSOCK_OWN],
    };
    lists.concat()
}

/// Every call of any thread, and those that build a VM, with any arguments.
fn everything() -> Vec<Call> {
    let others = Role::ALL.iter().filter(|thread| **thread != Role::Main);
    let mut all: Vec<Call> = others.flat_map(|role| calls(*role)).collect();
    all.extend_from_slice(MAIN_OWN);
    for call in &mut all {
        call.args = [Is::Any; 6];
    }
    all
}

/// Why the filters could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// They cannot be made.
    #[error("cannot make the filters of system calls; --seccomp false runs the VM without them")]
    Make(#[from] BackendError),
    /// They cannot be put in force.
    #[error(
        "cannot put the filter of system calls in force (seccomp); --seccomp false runs the VM without them"
    )]
    Apply(#[source] seccompiler::Error),
    /// The signals that end the VM, which are for the main thread only, could not be blocked.
    #[error("cannot block the signals that end the VM on a thread that they are not for")]
    Signals(#[source] io::Error),
    /// The handler that reports a refused call could not be installed.
    #[error("cannot install a handler for SIGSYS")]
    Handler(#[source] io::Error),
}

impl From<SeccompError> for io::Error {
    fn from(error: SeccompError) -> Self {
        Self::other(error)
    }
}

/// The filters of all roles; none with `--seccomp false`.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    /// In the order of [`Role::ALL`]; empty when there are none.
    programs: Arc<[BpfProgram]>,
}

impl Filters {
    /// Makes the filters for this process.
    ///
    /// # Errors
    /// See [`SeccompError`].
    pub fn new(mode: Mode) -> Result<Self, SeccompError> {
        let otherwise = match mode {
            Mode::Off => return Ok(Self::default()),
            Mode::On => SeccompAction::Trap,
            Mode::Log => SeccompAction::Log,
        };
        refused::install().map_err(SeccompError::Handler)?;
        let program = |thread: &Role| syscalls::filter(&calls(*thread), otherwise.clone());
        let programs: Result<Vec<_>, _> = Role::ALL.iter().map(program).collect();
        Ok(Self { programs: programs?.into() })
    }

    /// Applies the filter of role `thread` to the calling thread and to those that it starts. It cannot be taken back.
    ///
    /// # Errors
    /// The kernel has no seccomp filters.
    pub fn apply(&self, thread: Role) -> Result<(), SeccompError> {
        let index = Role::ALL.iter().position(|one| *one == thread);
        let program = index.and_then(|index| self.programs.get(index));
        refused::name(thread);
        if thread != Role::Main {
            leave_the_end_to_main().map_err(SeccompError::Signals)?;
        }
        program.map_or(Ok(()), |program| apply_filter(program)).map_err(SeccompError::Apply)
    }

    /// Starts a thread whose filter is in force before anything else runs on it.
    ///
    /// # Errors
    /// The thread cannot be started, or its filter not applied.
    pub fn spawn(
        &self,
        thread: Role,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let (tell, told) = sync_channel(1);
        let filters = self.clone();
        let started = std::thread::Builder::new().name(name).spawn(move || {
            let applied = filters.apply(thread);
            let ready = applied.is_ok();
            // The caller waits for exactly this message.
            let _ = tell.send(applied);
            if ready {
                body();
            }
        })?;
        told.recv().map_err(|_| io::Error::other("the thread ended before it was ready"))??;
        Ok(started)
    }
}

/// Blocks the signals that end the VM on the calling thread. The kernel may deliver one to any thread that does not
/// block it (when a terminal hangs up and sends two at once, say), and only the main thread's filter has the calls of
/// their handler.
fn leave_the_end_to_main() -> io::Result<()> {
    // SAFETY: the set is initialised by sigemptyset before it is read; all pointers are to a live local.
    let error = unsafe {
        let mut ends = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut ends);
        for signal in
            [libc::SIGTERM, libc::SIGINT, libc::SIGHUP].into_iter().chain(deadly_signals())
        {
            libc::sigaddset(&raw mut ends, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const ends, std::ptr::null_mut())
    };
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

const fn ioctl(request: Ioctl, why: &'static str) -> Call {
    // The kernel takes an unsigned int.
    #[allow(clippy::cast_possible_wrap, reason = "its bits count")]
    Call::new(libc::SYS_ioctl, "ioctl", why).given(1, request as i64)
}

/// An ioctl of the terminal that is this process's standard input.
const fn terminal(request: Ioctl, why: &'static str) -> Call {
    ioctl(request, why).given(0, libc::STDIN_FILENO as i64)
}

/// The process may end on any thread, which then restores the terminal: see
/// [`sigbus_fallback`](crate::sandbox::sigbus_fallback). Which of these requests tcsetattr uses depends on the C
/// library and its version (glibc uses the second form from 2.42 on), and on when the change takes effect.
const END: &[Call] = &[
    terminal(libc::TCSETS, "TCSETS: the terminal as it was"),
    terminal(libc::TCSETSW, "TCSETSW: the same, once all is written"),
    terminal(libc::TCSETSF, "TCSETSF: the same, and what was typed is dropped"),
    terminal(libc::TCSETS2, "TCSETS2: the same, of a newer C library"),
    terminal(libc::TCSETSW2, "TCSETSW2: the same"),
    terminal(libc::TCSETSF2, "TCSETSF2: the same"),
    terminal(libc::TCGETS, "TCGETS: a C library may look at what it has set"),
    terminal(libc::TCGETS2, "TCGETS2: the same"),
    terminal(libc::TIOCGPGRP, "TIOCGPGRP: whether it is ours to restore"),
    // Any process may send a signal that normally reports a program's fault, to any thread, and it cannot be blocked.
    Call::new(libc::SYS_getpid, "getpid", "the signal that ends the process, once more"),
    Call::new(libc::SYS_gettid, "gettid", "the same"),
    Call::new(libc::SYS_tgkill, "tgkill", "the same").with(0, Is::OwnPid),
    Call::new(libc::SYS_exit_group, "exit_group", "the end of the process"),
];

/// Makes a vCPU leave the guest.
const KICK: &[Call] = &[
    Call::new(libc::SYS_getpid, "getpid", "the kick of a vCPU"),
    Call::new(libc::SYS_tgkill, "tgkill", "the kick of a vCPU").with(0, Is::OwnPid),
];

// include/uapi/linux/kvm.h
const VCPU_OWN: &[Call] = &[
    ioctl(_IO(KVMIO, 0x80), "KVM_RUN"),
    ioctl(_IOW::<kvm_irq_level>(KVMIO, 0x61), "KVM_IRQ_LINE: a serial port's interrupt"),
    ioctl(_IOR::<kvm_regs>(KVMIO, 0x81), "KVM_GET_REGS"),
    ioctl(_IOW::<kvm_regs>(KVMIO, 0x82), "KVM_SET_REGS: a load of bad memory is undone"),
    ioctl(_IOR::<kvm_sregs>(KVMIO, 0x83), "KVM_GET_SREGS"),
    ioctl(_IOR::<kvm_mp_state>(KVMIO, 0x98), "KVM_GET_MP_STATE"),
    ioctl(_IOR::<kvm_vcpu_events>(KVMIO, 0x9f), "KVM_GET_VCPU_EVENTS"),
    ioctl(_IOWR::<kvm_msrs>(KVMIO, 0x88), "KVM_GET_MSRS"),
    ioctl(_IOW::<kvm_msrs>(KVMIO, 0x89), "KVM_SET_MSRS"),
    ioctl(_IOW::<kvm_x86_mce>(KVMIO, 0x9e), "KVM_X86_SET_MCE"),
    Call::new(libc::SYS_gettid, "gettid", "whom to kick"),
    Call::new(libc::SYS_rt_sigprocmask, "rt_sigprocmask", "the kick is let through")
        .given(0, libc::SIG_UNBLOCK as i64),
    Call::new(libc::SYS_close, "close", "the end of a vCPU"),
];

const RELAY_OWN: &[Call] =
    &[ioctl(_IOWR::<kvm_irqchip>(KVMIO, 0x62), "KVM_GET_IRQCHIP: whether the guest listens")];

// include/uapi/linux/userfaultfd.h
const UFFDIO: u32 = 0xaa;

/// Types with the sizes of uffdio_range (2), uffdio_api (3), uffdio_register and uffdio_poison (4).
type Words<const N: usize> = [u64; N];

const API_OWN: &[Call] = &[
    Call::new(libc::SYS_accept4, "accept4", "a client comes"),
    Call::new(libc::SYS_recvfrom, "recvfrom", "a client speaks"),
    Call::new(libc::SYS_sendto, "sendto", "a client is answered"),
    Call::new(libc::SYS_writev, "writev", "a client is answered"),
    Call::new(libc::SYS_close, "close", "a client goes"),
    Call::new(libc::SYS_read, "read", "an eventfd"),
    Call::new(libc::SYS_epoll_ctl, "epoll_ctl", "tokio"),
    Call::new(libc::SYS_epoll_wait, "epoll_wait", "tokio"),
    Call::new(libc::SYS_epoll_pwait, "epoll_pwait", "tokio"),
    Call::new(libc::SYS_sched_yield, "sched_yield", "tokio"),
    // New threads.
    Call::new(libc::SYS_clone3, "clone3", "a thread that works for it"),
    Call::new(libc::SYS_clone, "clone", "the same, before glibc 2.34"),
    Call::new(libc::SYS_set_robust_list, "set_robust_list", "a new thread"),
    Call::new(libc::SYS_rseq, "rseq", "a new thread"),
    Call::new(libc::SYS_sched_getaffinity, "sched_getaffinity", "a new thread"),
    Call::new(libc::SYS_prctl, "prctl", "a new thread").given(0, libc::PR_SET_NAME as i64),
    Call::new(libc::SYS_mmap, "mmap", "a new thread's stack")
        .given(2, libc::PROT_NONE as i64)
        .given(3, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK) as i64),
    Call::new(libc::SYS_mmap, "mmap", "a new thread's stack for signals")
        .given(2, (libc::PROT_READ | libc::PROT_WRITE) as i64)
        .given(3, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK) as i64),
    Call::new(libc::SYS_mprotect, "mprotect", "a new thread's stack")
        .given(2, libc::PROT_NONE as i64),
    Call::new(libc::SYS_rt_sigprocmask, "rt_sigprocmask", "a new thread")
        .given(0, libc::SIG_SETMASK as i64),
    Call::new(libc::SYS_futex, "futex", "the end of a thread that worked for it")
        .given(1, (libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME) as i64),
    // For `vm.extents`: which memory holds something, by descriptors that were opened before.
    Call::new(libc::SYS_lseek, "lseek", "which memory has something in it"),
    Call::new(libc::SYS_pread64, "pread64", "which memory has something in it"),
    // The guest's power button.
    ioctl(_IOWR::<kvm_irqchip>(KVMIO, 0x62), "KVM_GET_IRQCHIP: whether the guest listens"),
    ioctl(_IOW::<kvm_irq_level>(KVMIO, 0x61), "KVM_IRQ_LINE: the button's interrupt"),
    // For `vm.poison`.
    Call::new(libc::SYS_madvise, "madvise", "poison --via madvise")
        .given(2, libc::MADV_HWPOISON as i64),
    Call::new(libc::SYS_madvise, "madvise", "poison --via soft-offline")
        .given(2, libc::MADV_SOFT_OFFLINE as i64),
    Call::new(libc::SYS_madvise, "madvise", "poison: the page is the VMM's own, not the zero page")
        .given(2, libc::MADV_POPULATE_WRITE as i64),
    Call::new(libc::SYS_userfaultfd, "userfaultfd", "poison --via uffd"),
    ioctl(_IOWR::<Words<3>>(UFFDIO, 0x3f), "UFFDIO_API: poison --via uffd"),
    ioctl(_IOWR::<Words<4>>(UFFDIO, 0x00), "UFFDIO_REGISTER: poison --via uffd"),
    ioctl(_IOR::<Words<2>>(UFFDIO, 0x01), "UFFDIO_UNREGISTER: poison --via uffd"),
    ioctl(_IOWR::<Words<4>>(UFFDIO, 0x08), "UFFDIO_POISON: poison --via uffd"),
];

const SERIAL_OWN: &[Call] = &[
    ioctl(0x5401, "TCGETS: the terminal before it is raw").given(0, libc::STDIN_FILENO as i64),
    // Of glibc 2.42.
    ioctl(_IOR::<[u32; 11]>(0x54, 0x2a), "TCGETS2: the same").given(0, libc::STDIN_FILENO as i64),
    Call::new(libc::SYS_poll, "poll", "something to move"),
    Call::new(libc::SYS_read, "read", "input"),
    Call::new(libc::SYS_recvfrom, "recvfrom", "input from a socket"),
    Call::new(libc::SYS_sendto, "sendto", "output to a socket"),
    Call::new(libc::SYS_accept4, "accept4", "a client of a socket"),
    ioctl(0x5421, "FIONBIO: a client of a socket"),
    ioctl(_IOW::<kvm_irq_level>(KVMIO, 0x61), "KVM_IRQ_LINE: the port's interrupt"),
    Call::new(libc::SYS_close, "close", "a client goes; a file that goes on in another one"),
];

const EVENTS_OWN: &[Call] = &[
    Call::new(libc::SYS_close, "close", "the end of a file"),
    Call::new(libc::SYS_ftruncate, "ftruncate", "a named VM's last ledger is written anew"),
    Call::new(libc::SYS_pwrite64, "pwrite64", "a named VM's last ledger"),
];

/// Any virtio device; its interrupts are eventfds that are written to, as is what a vCPU waits for.
const VIRTIO: &[Call] = &[
    Call::new(libc::SYS_poll, "poll", "kicks, orders, and what the device waits for"),
    Call::new(libc::SYS_read, "read", "an eventfd; random bytes; a frame"),
    Call::new(libc::SYS_close, "close", "the end of the device"),
];

// include/uapi/linux/vhost.h
const VHOST_VIRTIO: u32 = 0xaf;

/// A device that vhost runs, which it has opened before. Types with the sizes of vhost_memory, vhost_vring_state and
/// vhost_vring_file (1 word), and of vhost_vring_addr (5).
const VHOST: &[Call] = &[
    ioctl(_IOW::<u64>(VHOST_VIRTIO, 0x00), "VHOST_SET_FEATURES: a driver begins"),
    ioctl(_IOW::<Words<1>>(VHOST_VIRTIO, 0x03), "VHOST_SET_MEM_TABLE: a driver begins"),
    ioctl(_IOW::<Words<1>>(VHOST_VIRTIO, 0x10), "VHOST_SET_VRING_NUM: a driver begins"),
    ioctl(_IOW::<Words<5>>(VHOST_VIRTIO, 0x11), "VHOST_SET_VRING_ADDR: a driver begins"),
    ioctl(_IOW::<Words<1>>(VHOST_VIRTIO, 0x12), "VHOST_SET_VRING_BASE: the VM goes on"),
    ioctl(_IOWR::<Words<1>>(VHOST_VIRTIO, 0x12), "VHOST_GET_VRING_BASE: the VM is paused"),
    ioctl(_IOW::<Words<1>>(VHOST_VIRTIO, 0x20), "VHOST_SET_VRING_KICK: a driver begins"),
    ioctl(_IOW::<Words<1>>(VHOST_VIRTIO, 0x21), "VHOST_SET_VRING_CALL: a driver begins"),
    ioctl(_IOW::<Words<1>>(VHOST_VIRTIO, 0x22), "VHOST_SET_VRING_ERR: a driver begins"),
    ioctl(_IOW::<Words<1>>(VHOST_VIRTIO, 0x30), "VHOST_NET_SET_BACKEND: begin and end"),
];

const BLK_OWN: &[Call] = &[
    Call::new(libc::SYS_preadv, "preadv", "what the guest reads, into its memory"),
    Call::new(libc::SYS_pread64, "pread64", "the same, of other images"),
    Call::new(libc::SYS_pwrite64, "pwrite64", "what the guest writes"),
    Call::new(libc::SYS_pwritev, "pwritev", "the same, of other images"),
    Call::new(libc::SYS_fdatasync, "fdatasync", "a flush"),
    Call::new(libc::SYS_fsync, "fsync", "the same, of other images"),
    Call::new(libc::SYS_fallocate, "fallocate", "discard, write zeroes"),
    Call::new(libc::SYS_madvise, "madvise", "which page of a read was bad")
        .given(2, libc::MADV_POPULATE_READ as i64),
    Call::new(libc::SYS_lseek, "lseek", "an image that grows, or was cut short"),
    Call::new(libc::SYS_ftruncate, "ftruncate", "an image that grows"),
    Call::new(
        libc::SYS_clock_gettime,
        "clock_gettime",
        "how long a turn has taken, without a vDSO",
    )
    .given(0, libc::CLOCK_MONOTONIC as i64),
    Call::new(libc::SYS_futex, "futex", "the end of the second thread")
        .given(1, (libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME) as i64),
];

/// Only unix sockets are made, so connect reaches nothing but these.
const VSOCK_OWN: &[Call] = &[
    Call::new(libc::SYS_accept4, "accept4", "a program of the host's comes"),
    ioctl(0x5421, "FIONBIO: the same"),
    Call::new(libc::SYS_socket, "socket", "a program of the guest's wants one of the host's")
        .given(0, libc::AF_UNIX as i64)
        .given(1, (libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) as i64),
    Call::new(libc::SYS_connect, "connect", "the same"),
    Call::new(libc::SYS_recvfrom, "recvfrom", "data for the guest"),
    Call::new(libc::SYS_sendto, "sendto", "data of the guest"),
    Call::new(libc::SYS_shutdown, "shutdown", "one direction ends"),
    Call::new(libc::SYS_timerfd_settime, "timerfd_settime", "what is due next"),
];

/// Calls with any arguments, by their `SYS_…`.
macro_rules! any {
    ($($number:ident),* $(,)?) => {
        [$(Call::new(libc::$number, stringify!($number).split_at(4).1, "building and ending a VM")),*]
    };
}

/// The calls that build a VM, replace its bad memory, and end it.
const MAIN_OWN: &[Call] = &any![
    SYS_openat,
    SYS_readv,
    SYS_statx,
    SYS_newfstatat,
    SYS_fstat,
    SYS_lseek,
    SYS_statfs,
    SYS_fstatfs,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_fdatasync,
    SYS_memfd_create,
    SYS_getdents64,
    SYS_readlink,
    SYS_getcwd,
    SYS_faccessat2,
    SYS_unlink,
    SYS_unlinkat,
    SYS_flock,
    SYS_rename,
    SYS_mkdir,
    SYS_rmdir,
    SYS_umask,
    SYS_fcntl,
    SYS_poll,
    SYS_ppoll,
    SYS_eventfd2,
    SYS_epoll_create1,
    SYS_socket,
    SYS_socketpair,
    SYS_timerfd_create,
    SYS_bind,
    SYS_listen,
    SYS_getsockname,
    // Whether a connection to the process that has the VM's name was made, and which process it is.
    SYS_getsockopt,
    SYS_connect,
    SYS_getpgrp,
    SYS_getuid,
    SYS_geteuid,
    SYS_prctl,
    SYS_seccomp,
    SYS_prlimit64,
    SYS_clock_nanosleep,
    SYS_exit_group,
    SYS_sysinfo,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_has_a_filter_that_the_kernel_takes() {
        let filters = Filters::new(Mode::On).unwrap();
        for (thread, program) in Role::ALL.iter().zip(filters.programs.iter()) {
            println!("{thread:?}: {} instructions", program.len());
            // BPF_MAXINSNS, include/uapi/linux/bpf_common.h
            assert!(!program.is_empty() && program.len() <= 4096, "{thread:?}: {}", program.len());
        }
        assert!(Filters::new(Mode::Off).unwrap().programs.is_empty());
    }

    /// The process may end on any thread.
    #[test]
    fn no_filter_keeps_the_terminal_from_being_restored() {
        let filters = Filters::new(Mode::On).unwrap();
        let requests = [
            libc::TCSETS,
            libc::TCSETSW,
            libc::TCSETSF,
            libc::TCSETS2,
            libc::TCSETSW2,
            libc::TCSETSF2,
            libc::TCGETS2,
        ];
        for thread in Role::ALL {
            let (tell, told) = sync_channel(requests.len());
            let body = move || {
                for request in requests {
                    // There are no settings to apply, so the request fails and changes nothing.
                    let nothing = std::ptr::null_mut::<libc::termios>();
                    // SAFETY: the kernel answers EFAULT, or ENOTTY where it is no terminal.
                    let done = unsafe { libc::ioctl(libc::STDIN_FILENO, request, nothing) };
                    tell.send((request, done)).unwrap();
                }
            };
            // A call that is refused ends this process with exit status 8.
            filters.spawn(thread, "test".into(), body).unwrap().join().unwrap();
            assert_eq!(told.try_iter().collect::<Vec<_>>(), requests.map(|one| (one, -1)));
        }
    }

    #[test]
    fn signals_that_end_the_vm_are_the_main_threads() {
        let blocked = |thread| {
            let body = move || {
                Filters::default().apply(thread).unwrap();
                // SAFETY: a null new mask only reads the one in force into the live local.
                unsafe {
                    let mut mask = std::mem::zeroed::<libc::sigset_t>();
                    libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask);
                    libc::sigismember(&raw const mask, libc::SIGHUP) == 1
                }
            };
            std::thread::spawn(body).join().unwrap()
        };
        for thread in Role::ALL {
            assert_eq!(blocked(thread), thread != Role::Main, "{thread:?}");
        }
    }

    #[test]
    fn no_thread_may_start_a_program_or_trace_another() {
        let forbidden =
            [libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace, libc::SYS_bpf, libc::SYS_fork];
        for thread in Role::ALL {
            for call in calls(thread) {
                assert!(!forbidden.contains(&call.number), "{thread:?}: {}", call.name);
            }
        }
    }

    #[test]
    fn what_any_thread_may_call_the_process_may() {
        let all = everything();
        for thread in Role::ALL {
            for call in calls(thread) {
                assert!(all.iter().any(|one| one.number == call.number), "{}", call.name);
            }
        }
    }
}
