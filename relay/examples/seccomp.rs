//! The system calls of the relay's threads as JSON, in the form of the filters that Firecracker and other users
//! of seccompiler have in files: `cargo run -p mce-relay --example seccomp`. Merge each list into the `filter`
//! of your thread. That a pid has to be the process's own cannot be said there.

use mce_relay::syscalls::{Call, Is, LISTS};
use serde_json::{Value, json};

fn rule(call: &Call) -> Value {
    let given = (0..).zip(call.args).filter_map(|(index, is): (u8, _)| match is {
        Is::Value(val) => Some(json!({ "index": index, "type": "dword", "op": "eq", "val": val })),
        Is::Any | Is::OwnPid => None,
    });
    let mut rule = json!({ "syscall": call.name, "comment": call.why });
    let args: Vec<Value> = given.collect();
    if !args.is_empty() {
        rule["args"] = args.into();
    }
    rule
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let all: serde_json::Map<String, Value> = LISTS
        .into_iter()
        .map(|(name, list)| (name.to_owned(), list.iter().map(rule).collect()))
        .collect();
    println!("{}", serde_json::to_string_pretty(&all)?);
    Ok(())
}
