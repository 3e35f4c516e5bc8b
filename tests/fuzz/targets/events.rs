//! Any line as an event, as the tools read it from a VM: what is understood says the same when it is written
//! and read again, and everything can be shown to people, in a terminal and on a page.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mce_relay::Event;
use mce_relay_cli::commands::report::builder::Builder;
use mce_relay_cli::commands::report::html;
use mce_relay_cli::commands::report::raw::Raw;
use mce_relay_cli::commands::watch::Timeline;
use mce_relay_vmm::api::types::vm::Status;
use mce_relay_vmm::api::types::vm_event::VmEvent;
use serde_json::{Value, json};

fn again<T: serde::Serialize + serde::de::DeserializeOwned>(event: &T) {
    let written = serde_json::to_value(event).unwrap();
    let read: T = serde_json::from_value(written.clone()).unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), written);
}

fuzz_target!(|text: &str| {
    for colour in [false, true] {
        let mut timeline = Timeline::new(colour);
        for line in text.lines().take(20) {
            timeline.line(line);
        }
    }
    let (mut builder, mut raw) = (Builder::default(), Raw::default());
    for line in text.lines().take(20) {
        builder.line(line);
        raw.push(line);
    }
    let page = html::page(&builder.finish(Default::default(), None, 0.0), &raw);
    assert_eq!(page.matches("<script").count(), 2, "nothing of the text is an element");
    let Ok(value) = serde_json::from_str::<Value>(text) else { return };
    let typed = json!({ "event": value["event"], "properties": value["properties"] });
    if let Ok(event) = serde_json::from_value::<Event>(typed.clone()) {
        again(&event);
        let _ = event.to_string();
    }
    if let Ok(event) = serde_json::from_value::<VmEvent>(typed) {
        let _ = event.to_string();
    }
    if let Ok(status) = serde_json::from_value::<Status>(value) {
        again(&status);
    }
});
