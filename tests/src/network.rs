//! A network of the test's own.

use std::process::Command;

/// Runs `body` on a thread with a network of its own, in which there is nothing but the tap `t0`, with `address` on the
/// host's side. What is started there has that network, too.
pub fn with_a_tap<T: Send + 'static>(
    address: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> T {
    let address = address.to_owned();
    let run = move || {
        // SAFETY: without pointers.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        busybox("tunctl -t t0");
        busybox("ip link set lo up");
        busybox(&format!("ip addr add {address} dev t0"));
        busybox("ip link set t0 up");
        // No frames but those of the test.
        std::fs::write("/proc/sys/net/ipv6/conf/t0/disable_ipv6", "1").unwrap();
        body()
    };
    match std::thread::spawn(run).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn busybox(words: &str) {
    let out = Command::new("busybox").args(words.split(' ')).output().unwrap();
    assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
}
