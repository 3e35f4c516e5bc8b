//! What is on the page, whoever wrote the events.

use std::io::Write;
use std::process::{Command, Stdio};

use super::*;
use crate::commands::report::builder::Builder;
use crate::commands::report::model::Origin;

const FIXTURE: &str = include_str!("../../../../../tests/report/events.jsonl");
const HOSTILE: &str =
    "</script><!--<script>alert(1)</script>\"' onload=x <img src=x onerror=y>\u{202e}&amp;";

fn page_of(text: &str, of: Origin) -> String {
    let (mut builder, mut raw) = (Builder::default(), Raw::default());
    for line in text.lines() {
        builder.line(line);
        raw.push(line);
    }
    page(&builder.finish(of, None, 1e9), &raw)
}

/// By the program of coreutils, as the policy is only as good as its hashes.
fn hash(text: &str) -> String {
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let bits: String =
        out[..64].chars().map(|digit| format!("{:04b}", digit.to_digit(16).unwrap())).collect();
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    // 256 bits are 43 letters, the last with two bits of 0.
    let base64: String = (0..43)
        .map(|at| {
            let six: String = format!("{bits}00").chars().skip(at * 6).take(6).collect();
            char::from(letters[usize::from_str_radix(&six, 2).unwrap()])
        })
        .collect();
    format!("sha256-{base64}=")
}

#[test]
fn the_policy_admits_our_script_and_our_style() {
    assert_eq!(STYLE_HASH, hash(STYLE), "write it into html/mod.rs");
    assert_eq!(SCRIPT_HASH, hash(SCRIPT), "write it into html/mod.rs");
    let page = page_of(FIXTURE, Origin::default());
    let policy = page.find("Content-Security-Policy").unwrap();
    assert!(policy < page.find("<style>").unwrap() && policy < page.find("<title>").unwrap());
    assert!(page.contains(&format!("<style>{STYLE}</style>")));
    assert!(page.contains(&format!("<script>{SCRIPT}</script>")));
}

#[test]
fn nothing_is_fetched_and_nothing_is_styled_or_scripted_inline() {
    let page = page_of(FIXTURE, Origin::default());
    for word in
        ["http://", "https://", "url(", "@import", " style=", "<link", "<img", "<iframe", " href="]
    {
        assert!(!page.contains(word), "{word}");
    }
    assert_eq!(page.matches("<script").count(), 2);
    assert_eq!(page.matches("</script").count(), 2);
}

#[test]
fn hostile_words_are_words() {
    let quoted = serde_json::Value::from(HOSTILE).to_string();
    let event = |source: &str, event: &str, properties: &str| {
        format!(
            r#"{{"timestamp":{{"secs":1,"nanos":0}},"source":{source},"event":{event},"properties":{properties}}}"#
        )
    };
    let vm = |name: &str, properties: &str| event("\"vm\"", &format!("\"{name}\""), properties);
    let lines = [
        event(&quoted, &quoted, &format!("{{{quoted}:{quoted}}}")),
        vm(
            "booting",
            &format!(r#"{{"boot":1,"unix_time":1e9,"mcg_cap":{quoted},"vendor":"amd"}}"#),
        ),
        vm("reset", &format!(r#"{{"reason":{quoted},"by_policy":true}}"#)),
        vm("ended", &format!(r#"{{"how":{quoted},"status":0}}"#)),
        HOSTILE.to_owned(),
        format!("{{{quoted}"),
    ];
    let of = Origin {
        vm: Some(HOSTILE.to_owned()),
        events: HOSTILE.to_owned(),
        stands: Some(HOSTILE.to_owned()),
    };
    let page = page_of(&lines.join("\n"), of);
    assert!(page.matches("alert(1)").count() > 10, "they are there");
    assert_eq!((page.matches("<script").count(), page.matches("</script").count()), (2, 2));
    assert!(!page.contains("<!--") && !page.contains("<img") && !page.contains("\" onload"));
    // What is JSON is taken as it is: the page has it twice, and once as data.
    let data = page.split("id=\"events\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: Vec<serde_json::Value> = serde_json::from_str(data).unwrap();
    assert_eq!((data.len(), &data[0]["event"], &data[4]), (6, &HOSTILE.into(), &HOSTILE.into()));
    let outside = page.replace(data_of(&page), "");
    assert!(!outside.contains('\u{202e}'), "text does not turn round");
}

fn data_of(page: &str) -> &str {
    page.split("id=\"events\">").nth(1).unwrap().split("</script>").next().unwrap()
}

#[test]
fn nothing_to_report() {
    let page = page_of("", Origin::default());
    assert!(page.contains("There are no events"), "{page}");
    assert!(page.contains("No bad page is known"));
    assert!(!page.contains("id=\"filter\" role"));
}

#[test]
fn the_page_says_what_was_left_out() {
    let page = page_of(FIXTURE, Origin::default());
    assert!(page.contains("1 line could not be read as events"), "the broken one");
    assert!(page.contains("does not know: memory: cooled"));
    assert!(!page.contains("Only the last"));
    let many = FIXTURE.repeat(100);
    assert!(page_of(&many, Origin::default()).contains("Only the last"));
}

/// Elements end in the order in which they began, and identifiers are there once.
#[test]
fn the_page_is_well_formed() {
    let page = page_of(FIXTURE, Origin { vm: Some("vm1".to_owned()), ..Origin::default() });
    let body = page.replace(SCRIPT, "").replace(STYLE, "");
    let (mut open, mut ids) = (Vec::new(), std::collections::HashSet::new());
    for tag in body.split('<').skip(2) {
        let tag = tag.split('>').next().unwrap();
        let name = tag.split([' ', '\n']).next().unwrap();
        if let Some(id) = tag.split(" id=\"").nth(1).and_then(|rest| rest.split('"').next()) {
            assert!(ids.insert(id.to_owned()), "{id} is there twice");
        }
        match name.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "{tag}"),
            None if tag.ends_with('/') || ["meta", "input"].contains(&name) => {}
            None => open.push(name),
        }
    }
    assert!(open.is_empty(), "{open:?}");
    for id in page.split("aria-labelledby=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(ids.contains(id), "{id} is not there");
    }
}
