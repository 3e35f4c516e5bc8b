//! Who else has a handler for SIGBUS, and what becomes of what is not the relay's: see
//! tests/src/bin/handlers.rs.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use mce_relay_tests::guest::binary;

/// What the process printed, and how it ended.
fn run(how: &str) -> (Vec<String>, std::process::ExitStatus) {
    let program = binary().with_file_name("handlers");
    let out = Command::new(&program).arg(how).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let stderr = String::from_utf8(out.stderr).unwrap();
    println!("    {how}: {} {}", out.status, stderr.trim_end().replace('\n', "\n        "));
    assert!(!stderr.contains("panicked"), "{text}{stderr}");
    (text.lines().map(str::to_owned).collect(), out.status)
}

const OURS: [&str; 3] = ["AO at 0x1000", "AR at 0x5000", "an AR that is not the guest's"];

/// std's own, or one over ours that calls it: the AR has the default action, once everything of the guest's
/// was taken.
pub fn the_default_action_has_what_is_not_ours() {
    for how in ["std", "after"] {
        let (lines, status) = run(how);
        assert_eq!(lines, OURS, "{how}");
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{how}: {status}");
    }
}

/// One that was there before ours, and a host's that shows us what comes, see the rest with its true
/// siginfo, and decide.
pub fn a_foreign_handler_has_what_is_not_ours() {
    for (how, who) in [("before", "foreign handler"), ("host", "host's handler")] {
        let (lines, status) = run(how);
        let (ar, sent) =
            (format!("{who}: si_code 4 at 0x12345000"), format!("{who}: si_code -6 at 0x0"));
        let rest = [ar.as_str(), "kill -BUS", sent.as_str(), "lives"];
        assert_eq!(lines, [&OURS[..], &rest].concat(), "{how}");
        assert!(status.success(), "{how}: {status}");
    }
}

/// A relay that started without a word would never hear of anything.
pub fn a_handler_that_was_replaced_is_said() {
    let (lines, status) = run("replaced");
    let (refused, rest) = lines.split_first().unwrap();
    println!("    {refused}");
    assert!(refused.contains("another handler") && refused.contains("Signals::Host"), "{refused}");
    assert_eq!(rest[..3], OURS, "and with a handler that shows it what comes it does");
    assert!(status.success(), "{status}");
}
