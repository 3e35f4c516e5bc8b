//! Over vsock: one client after the other, each with an agent of its own.
//!
//! Its agent is a process, this program again with the connection as stdin and stdout. So a client
//! begins with nothing, its pages go with it, and if a bad page ends its agent the next client finds another.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::port;

#[allow(clippy::cast_possible_truncation)] // it is 40
const FAMILY: libc::sa_family_t = libc::AF_VSOCK as libc::sa_family_t;
#[allow(clippy::cast_possible_truncation)] // they are 16
const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
/// How long to wait after a connection could not be taken, for want of memory for instance.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens on the port `number` and never returns but with an error.
///
/// # Errors
/// It is no port, or the kernel has no vsock.
pub fn serve(number: &str, log: bool) -> Result<(), String> {
    let port = number
        .parse()
        .map_err(|_| format!("got vsock:{number:?}, expected a number from 0 to 4294967294"))?;
    let listener = listen(port).map_err(|e| format!("vsock:{number}: {e}"))?;
    loop {
        match accept(&listener).and_then(|client| talk(client, log)) {
            Ok(()) => {}
            Err(e) => {
                eprintln!("agent: vsock:{number}: {e}");
                sleep(PAUSE);
            }
        }
    }
}

/// Connects to `port` of the host and sends back what comes from there until it ends; how many bytes that were.
///
/// # Errors
/// Nobody is there, or what the kernel said.
pub fn echo(port: u32) -> Result<u64, String> {
    let named = |e: io::Error| format!("port {port} of the host: {e}");
    let mut host = dial(port).map_err(named)?;
    let mut buffer = vec![0; 64 << 10];
    let mut bytes = 0;
    loop {
        match host.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(count) => {
                host.write_all(&buffer[..count]).map_err(named)?;
                bytes += count as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(named(e)),
        }
    }
}

fn dial(port: u32) -> io::Result<File> {
    let (socket, address) = (socket()?, address(libc::VMADDR_CID_HOST, port));
    // SAFETY: the address is a local of that size, and the descriptor is open.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

fn socket() -> io::Result<File> {
    // SAFETY: no pointers; the descriptor is fresh and given to nobody else.
    unsafe {
        match libc::socket(FAMILY.into(), libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) {
            fd if fd < 0 => Err(io::Error::last_os_error()),
            fd => Ok(File::from_raw_fd(fd)),
        }
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all-zero is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = FAMILY;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn listen(port: u32) -> io::Result<File> {
    let (listener, address) = (socket()?, address(libc::VMADDR_CID_ANY, port));
    // SAFETY: the address is a local of that size, and the descriptor is open.
    let failed = unsafe {
        libc::bind(listener.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) < 0
            || libc::listen(listener.as_raw_fd(), 8) < 0
    };
    match failed {
        true => Err(io::Error::last_os_error()),
        false => Ok(listener),
    }
}

fn accept(listener: &File) -> io::Result<File> {
    let (none, flags) = (std::ptr::null_mut(), libc::SOCK_CLOEXEC);
    // SAFETY: without an address none is written; the descriptor is fresh and given to nobody else.
    unsafe {
        match libc::accept4(listener.as_raw_fd(), none, std::ptr::null_mut(), flags) {
            fd if fd < 0 => Err(io::Error::last_os_error()),
            fd => Ok(File::from_raw_fd(fd)),
        }
    }
}

fn talk(client: File, log: bool) -> io::Result<()> {
    let mut agent = Command::new("/proc/self/exe");
    agent.arg(port::SOCKET).args((!log).then_some("log=off"));
    agent.stdin(Stdio::from(client.try_clone()?)).stdout(Stdio::from(client));
    let mut agent = agent.spawn()?;
    // How it ended, by a signal perhaps, is its client's.
    agent.wait().map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_port_is_refused() {
        for number in ["", "x", "-1", "4294967296"] {
            let error = serve(number, false).unwrap_err();
            assert!(error.contains("expected a number"), "{error}");
        }
    }
}
