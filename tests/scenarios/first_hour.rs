//! docs/first-hour.md and docs/poisoning.md typed at a shell on a terminal with colours, from the first command to the
//! last, and on the way what else of the documents wants the lab: a guest boots, loses
//! pages, starts over and ends.

use mce_relay_tests::documents::{Reader, Typed, documents, of_document, of_help};

const WALK: &str = "docs/first-hour.md";
const ON_THE_WAY: &str = "docs/poisoning.md";
/// What ends the guest's first boot; until then it is up.
const REBOOT: &str = "ask reboot";
/// The page that the walk is about, and the page frame that it gives back.
const PAGE: &str = "0x28f9000";
const FRAME: &str = "0x10a234";

const STATUSES: &[(&str, &[u8])] = &[
    ("mce-relay memory read --vm try --gpa 0x28f9000", &[1]),
    ("mce-relay inject --vm try --status srar", &[1]),
    // A page at random may be one that cannot move.
    ("mce-relay poison --vm try --random 1 --seed 9 --via soft-offline", &[0, 1]),
];

pub fn every_command() {
    let mut reader = Reader::start(STATUSES, |_| ());
    let top = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    reader.shell().run(&format!("cd {top}"));
    let walk = of_document(WALK);
    assert!(walk.len() > 25, "{walk:#?}");
    let others = documents().into_iter().filter(|name| name != WALK && name != ON_THE_WAY);
    let others = others.flat_map(|name| of_document(&name)).chain(of_help());
    let mut on_the_way: Vec<Typed> =
        of_document(ON_THE_WAY).into_iter().chain(others.filter(Typed::is_for_the_lab)).collect();
    for typed in &walk {
        if typed.text.starts_with(REBOOT) {
            on_the_way.drain(..).for_each(|typed| drop(reader.types(&typed)));
        }
        let printed = reader.types(typed);
        if typed.text.contains("wait $VM") {
            assert!(printed.lines().any(|line| line.trim() == "0"), "the status of run: {printed}");
        }
        if typed.text.starts_with("ask 'alloc anon 4'") {
            with_pages(&mut reader, &gpas(&printed));
        }
        if typed.text.contains(PAGE) && typed.is_for_the_lab() {
            let frame = printed.split("host pfn ").nth(1).unwrap().split(',').next().unwrap();
            reader.instead(FRAME, frame);
        }
    }
    assert!(on_the_way.is_empty(), "{REBOOT:?} is not in {WALK}");
}

/// The addresses of the pages that the agent has allocated.
fn gpas(reply: &str) -> Vec<String> {
    let parts = reply.split("\"gpa\":\"").skip(1);
    parts.map(|part| part.split('"').next().unwrap().to_owned()).collect()
}

/// Pages of the agent's instead of such as only one guest has, and instead of pages at random, which may be the
/// guest kernel's own.
fn with_pages(reader: &mut Reader, gpas: &[String]) {
    assert_eq!(gpas.len(), 4, "{gpas:?}");
    reader.instead(PAGE, &*gpas[1]);
    reader.instead(
        "--random 1 --seed 3 --via hwpoison-inject",
        format!("--gpa {} --via hwpoison-inject", gpas[0]),
    );
    // README.md's and the help's.
    reader.instead("--vm vm1 --gpa 0x14000000", "--vm try --gpa 0x8000000");
    reader.instead(
        "--vm vm1 --gpa 0x12345000,0x13000000..0x13040000",
        format!("--vm try --gpa {}", gpas[2]),
    );
    reader.instead(
        "--random 1 --via hwpoison-inject",
        format!("--gpa {} --via hwpoison-inject", gpas[3]),
    );
}
