//! relay/examples/embed.rs: another VMM, and what it takes to have the relay in it.

use std::process::Command;

use mce_relay_tests::guest::binary;

/// More lines than this are no afternoon's work.
const MOST: usize = 40;

pub fn the_example_runs_and_is_short() {
    let source = include_str!("../../relay/examples/embed.rs");
    let (mut within, mut adoption) = (false, 0);
    for line in source.lines().map(str::trim) {
        match line {
            "// relay:" => within = true,
            "// :relay" => within = false,
            "" => {}
            _ => adoption += usize::from(within),
        }
    }
    println!("    {adoption} of {} lines are the adoption", source.lines().count());
    assert!((20..=MOST).contains(&adoption), "{adoption}");

    let out = Command::new(binary().with_file_name("examples").join("embed")).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    println!("    {}", text.trim_end().replace('\n', "\n    "));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    for page in ["0xd000", "0x9000"] {
        assert!(text.contains(&format!("guest: machine check for {page}")), "{text}");
    }
    assert!(text.contains("the guest lives"), "{text}");
}
