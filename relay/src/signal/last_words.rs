//! One line on stderr about a SIGBUS that the relay does not take care of, written inside the handler.
//!
//! Async-signal-safe: a buffer on the stack, arithmetic, write(2). Nothing here allocates, locks or
//! can panic.

use libc::{c_int, pid_t, uid_t};

use super::code::{BUS_MCEERR_AO, BUS_MCEERR_AR};

/// Longer than any line below.
const LEN: usize = 320;

/// Where a SIGBUS came from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin {
    /// The kernel: an access at `addr` failed. `lsb` means something for memory failures only. `guest`: that is guest RAM.
    Fault { addr: u64, lsb: u8, guest: bool },
    /// A process sent it.
    Sender { pid: pid_t, uid: uid_t },
}

/// What is done with it next.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Next {
    /// The previous handler gets it.
    Handler,
    /// The default action: the process ends.
    Default,
    /// Nothing: it was ignored before the relay's handler was installed.
    Ignored,
}

/// Text of a limited length; what does not fit is cut off.
struct Line {
    text: [u8; LEN],
    len: usize,
}

impl Line {
    fn new() -> Self {
        Self { text: [0; LEN], len: 0 }
    }

    fn add(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.text.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: u64, base: u64) {
        // 64 bits in base 10 or 16 have at most 20 digits.
        let mut digits = [0_u8; 20];
        let (mut left, mut count) = (number, 0);
        for place in &mut digits {
            // A digit is below 16.
            let [digit, ..] = (left % base).to_le_bytes();
            *place = if digit < 10 { b'0' + digit } else { b'a' + digit - 10 };
            count += 1;
            left /= base;
            if left == 0 {
                break;
            }
        }
        for digit in digits.iter().take(count).rev() {
            let one = [*digit];
            // Always ASCII.
            self.add(str::from_utf8(&one).unwrap_or("?"));
        }
    }

    fn signed(&mut self, number: i64) {
        if number < 0 {
            self.add("-");
        }
        self.number(number.unsigned_abs(), 10);
    }

    fn as_bytes(&self) -> &[u8] {
        self.text.get(..self.len).unwrap_or_default()
    }
}

fn line(code: c_int, from: Origin, thread: pid_t, next: Next) -> Line {
    let mut line = Line::new();
    line.add("mce-relay: SIGBUS on thread ");
    line.signed(thread.into());
    line.add(", ");
    line.add(match code {
        BUS_MCEERR_AR => "action required memory failure (BUS_MCEERR_AR)",
        BUS_MCEERR_AO => "action optional memory failure (BUS_MCEERR_AO)",
        libc::BUS_ADRALN => "misaligned address (BUS_ADRALN)",
        libc::BUS_ADRERR => "no memory behind the address (BUS_ADRERR)",
        libc::BUS_OBJERR => "hardware error (BUS_OBJERR)",
        code if code <= 0 => "sent, si_code ",
        _ => "si_code ",
    });
    if code <= 0 || code > BUS_MCEERR_AO {
        line.signed(code.into());
    }
    match from {
        Origin::Fault { addr, lsb, .. } => {
            line.add(" at 0x");
            line.number(addr, 16);
            if code == BUS_MCEERR_AR || code == BUS_MCEERR_AO {
                line.add(", lsb ");
                line.number(lsb.into(), 10);
            }
        }
        Origin::Sender { pid, uid } => {
            line.add(" by process ");
            line.signed(pid.into());
            line.add(" of user ");
            line.number(uid.into(), 10);
        }
    }
    line.add(match from {
        Origin::Fault { guest: true, .. } => {
            ": guest memory, touched by code of the VMM's that cannot go on without it; "
        }
        _ => ": not an error of guest memory that the guest can be told of; ",
    });
    line.add(match next {
        Next::Handler => "the handler before ours has it\n",
        Next::Default => "the default action follows\n",
        Next::Ignored => "it is ignored, as it was before\n",
    });
    line
}

/// Writes the line to stderr, by one write. Leaves errno as it is. Async-signal-safe.
pub(crate) fn say(code: c_int, from: Origin, next: Next) {
    // SAFETY: gettid takes nothing; __errno_location points to this thread's errno, which is put back,
    // since the code that was interrupted may be about to read it; the buffer is valid for its length.
    unsafe {
        let errno = *libc::__errno_location();
        let line = line(code, from, libc::gettid(), next);
        let text = line.as_bytes();
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        *libc::__errno_location() = errno;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(code: c_int, from: Origin, next: Next) -> String {
        String::from_utf8(line(code, from, 4321, next).as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn lines_name_what_people_look_for() {
        let ar = Origin::Fault { addr: 0x7f12_3456_7890, lsb: 12, guest: false };
        assert_eq!(
            text(BUS_MCEERR_AR, ar, Next::Handler),
            "mce-relay: SIGBUS on thread 4321, action required memory failure (BUS_MCEERR_AR) at \
             0x7f1234567890, lsb 12: not an error of guest memory that the guest can be told of; \
             the handler before ours has it\n"
        );
        let error =
            text(libc::BUS_ADRERR, Origin::Fault { addr: 0, lsb: 9, guest: false }, Next::Default);
        assert!(error.contains("(BUS_ADRERR) at 0x0: "), "{error}");
        let sent = text(libc::SI_TKILL, Origin::Sender { pid: 17, uid: u32::MAX }, Next::Ignored);
        assert!(sent.contains("sent, si_code -6 by process 17 of user 4294967295: "), "{sent}");
        let own =
            text(BUS_MCEERR_AR, Origin::Fault { addr: 0, lsb: 12, guest: true }, Next::Default);
        assert!(own.contains("lsb 12: guest memory, touched by code of the VMM's"), "{own}");
        let odd = text(99, Origin::Fault { addr: u64::MAX, lsb: 255, guest: false }, Next::Default);
        assert!(odd.contains("si_code 99 at 0xffffffffffffffff: "), "{odd}");
        for line in [error, sent, own, odd] {
            assert!(line.len() < LEN && line.ends_with('\n'), "not cut: {line}");
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        let mut line = Line::new();
        (0..LEN).for_each(|_| line.add("ab"));
        assert_eq!(line.as_bytes().len(), LEN);
    }
}
