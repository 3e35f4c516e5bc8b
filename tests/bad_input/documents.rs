//! Every command of the documents and of the help, typed at a shell on a terminal with colours, with a guest that
//! only takes machine checks. Those that take a page frame of the host out of use, or need Linux in the guest,
//! are typed in the lab: `first_hour` of the scenarios.

use mce_relay_tests::documents::{Reader, Typed, documents, of_document, of_help};
use mce_relay_tests::tiny::{elf, takes_machine_checks};

pub use mce_relay_tests::documents::nothing_is_left_out_for_nothing;

/// Documents whose commands are typed in the lab.
pub const OF_THE_LAB: [&str; 2] = ["docs/first-hour.md", "docs/poisoning.md"];

/// This host may lack what makes errors.
const STATUSES: &[(&str, &[u8])] = &[("mce-relay check", &[0, 1])];

pub fn every_command_that_takes_no_page_frame() {
    let mut reader = Reader::start(STATUSES, |_| ());
    let kernel = elf(takes_machine_checks());
    std::fs::write(reader.shell().dir().join("vmlinux"), kernel).unwrap();
    std::fs::write(reader.shell().dir().join("initramfs.cpio"), [0; 512]).unwrap();
    reader.shell().run("export XDG_RUNTIME_DIR=$PWD");
    reader.instead("/run/mce-relay/", "$XDG_RUNTIME_DIR/mce-relay/");
    reader.instead("/tmp/", "./");
    // This guest has no power button.
    reader.instead("shutdown --vm", "shutdown --now --vm");
    let has_curl = reader.shell().run("command -v curl").0 == 0;
    let here = documents().into_iter().filter(|name| !OF_THE_LAB.contains(&&**name));
    let all: Vec<Typed> =
        of_help().into_iter().chain(here.flat_map(|name| of_document(&name))).collect();
    assert!(all.len() > 15, "{all:#?}");
    for typed in &all {
        let lacks = match &typed.text {
            _ if typed.is_for_the_lab() => Some("it is typed in the lab".to_owned()),
            text if text.contains("--via uffd") => crate::uffd_that_poisons().err(),
            text if text.starts_with("curl") && !has_curl => Some("needs curl".to_owned()),
            _ => None,
        };
        match lacks {
            Some(why) => println!("    LEFT OUT {}: {}: {why}", typed.place, typed.text),
            None => drop(reader.types(typed)),
        }
    }
}
