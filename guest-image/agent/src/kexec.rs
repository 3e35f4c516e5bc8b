//! The kernel that takes over when this one panics.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

const KERNEL: &str = "/crash/vmlinuz";
const INITRAMFS: &str = "/crash/initramfs.cpio";
/// KEXEC_FILE_ON_CRASH in include/uapi/linux/kexec.h.
const ON_CRASH: libc::c_ulong = 2;
/// One processor is what Documentation/admin-guide/kdump/kdump.rst advises; the others are left behind as they
/// are. There is little memory and little time to place the kernel anew.
const MORE: &str = "nr_cpus=1 reset_devices nokaslr";

/// Loads the crash kernel of this image, to be started by a panic with the command line of this one.
///
/// # Errors
/// The image has none (guest-image/build.sh makes one beside the other), or the kernel does not take it.
pub fn load() -> Result<(), String> {
    let open = |path| {
        File::open(path)
            .map_err(|e| format!("{path}: {e}; boot the guest with initramfs-crash.cpio"))
    };
    let (kernel, initramfs) = (open(KERNEL)?, open(INITRAMFS)?);
    let line = fs::read_to_string("/proc/cmdline").map_err(|e| format!("/proc/cmdline: {e}"))?;
    let line = CString::new(cmdline(&line)).map_err(|e| format!("/proc/cmdline: {e}"))?;
    let bytes = line.as_bytes_with_nul();
    // SAFETY: two open files, and the command line with its NUL, as long as is said. Nothing of this process
    // changes.
    let done = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            bytes.len(),
            bytes.as_ptr(),
            ON_CRASH,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(format!(
            "kexec_file_load: {}; the kernel's command line needs crashkernel=192M",
            io::Error::last_os_error()
        )),
    }
}

/// The crash kernel's command line, for a kernel that was started with `line`.
fn cmdline(line: &str) -> String {
    let words = line.split_whitespace().filter(|word| !word.starts_with("crashkernel="));
    words.chain([MORE]).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_kernel_reserves_nothing_for_another_one() {
        let line = cmdline("console=ttyS0 crashkernel=192M  panic=-1\n");
        assert_eq!(line, format!("console=ttyS0 panic=-1 {MORE}"));
    }
}
