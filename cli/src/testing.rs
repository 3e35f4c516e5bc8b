//! For tests: a VM as its API shows it.

use mce_relay_vmm::api::types::vm::VmInfo;
use serde::Deserialize;
use serde_json::Value;

/// The one that is the example in the API's document, without RAM.
pub(crate) fn an_info() -> VmInfo {
    let document: Value = serde_json::from_str(include_str!("../../docs/openapi.json")).unwrap();
    let vm = &document["components"]["schemas"]["VmInfo"]["examples"][0];
    VmInfo { memory: Vec::new(), ..VmInfo::deserialize(vm).unwrap() }
}
