//! What the VM says is what docs/openapi.json says that it does.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use mce_relay::mca::Vendor;
use mce_relay::{
    AoChannel, Event, FailureKind, FallbackReason, Form, FoundBy, Injection, KillPolicy, Page,
    Place, Predicted, Reach, RescueRefusal, RescueStep, Rescued, SignalledThread, State, Times,
    UndeliverableReason, WaitReason,
};
use mce_relay_tests::schema::{Schema, document, resolved};
use mce_relay_tests::spinning::Spinning;
use mce_relay_vmm::api::types::device::{DeviceInfo, DriverState, QueueInfo};
use mce_relay_vmm::api::types::pause::{Panic, PauseReason, Undeliverable};
use mce_relay_vmm::api::types::policy::{Notify, OnUndeliverable};
use mce_relay_vmm::api::types::vm::{MemoryBlock, Status, VmInfo};
use mce_relay_vmm::api::types::vm_event::VmEvent;
use mce_relay_vmm::events::entry::{Entry, Next, What};
use mce_relay_vmm::events::lines::line_of;
use serde::Deserialize;
use serde_json::{Map, Value, json};

const GPA: u64 = 0x1_2345_6000;

fn waits() -> Vec<WaitReason> {
    let vcpu = 3;
    let mut all = vec![
        WaitReason::NotStarted { vcpu },
        WaitReason::Cr4MceClear { vcpu },
        WaitReason::Mcip { vcpu },
        WaitReason::McgCtlOff { vcpu },
        WaitReason::BankCtlOff { vcpu, bank: 9 },
        WaitReason::BankValid { vcpu, bank: 9 },
        WaitReason::NoBank { vcpu },
        WaitReason::InHandler { vcpu },
        WaitReason::EventInFlight { vcpu },
        WaitReason::JustOpened { vcpu },
        WaitReason::Restarted { vcpu },
        WaitReason::Paused { vcpu },
        WaitReason::NotComing { vcpu },
        WaitReason::Offline { vcpu },
        WaitReason::Unplugged { vcpu },
        WaitReason::Pace,
        WaitReason::NoSourceYet,
        WaitReason::InBlock,
    ];
    all.extend(whys().map(|why| WaitReason::NotByFirmware { why }));
    all
}

fn whys() -> [FallbackReason; 6] {
    [
        FallbackReason::NoSource,
        FallbackReason::NotTaken,
        FallbackReason::Silent,
        FallbackReason::Overwritten,
        FallbackReason::Unreachable,
        FallbackReason::NotNotified,
    ]
}

fn cannots() -> Vec<UndeliverableReason> {
    let mut all = vec![
        UndeliverableReason::NoForm,
        UndeliverableReason::Refused,
        UndeliverableReason::NoState,
        UndeliverableReason::WentBad,
    ];
    all.push(UndeliverableReason::Loop { rounds: 64 });
    all.extend(waits().into_iter().map(|by| UndeliverableReason::Blocked { by }));
    all.extend(whys().map(|why| UndeliverableReason::NoTaker { why }));
    all
}

fn places() -> Vec<Place> {
    let forms = [Form::Srao, Form::Srar, Form::Deferred, Form::AmdAr];
    let mut all: Vec<Place> =
        forms.into_iter().map(|form| Place::Mce { vcpu: 1, bank: 8, form }).collect();
    all.push(Place::Ghes { record: 1 });
    all
}

fn states() -> Vec<State> {
    let mut all = vec![State::Seen, State::Healed, State::Removed];
    all.extend(waits().into_iter().map(|wait| State::Waiting { wait }));
    all.extend(places().into_iter().map(|place| State::Injected { place }));
    all.extend(places().into_iter().map(|place| State::Acknowledged { place }));
    all.extend(cannots().into_iter().map(|why| State::Undeliverable { why }));
    all
}

fn memory_events() -> Vec<Event> {
    let (gpa, hva, lsb) = (GPA, 0x7f00_0000_0000, 12);
    let mut all = Vec::new();
    for kind in [FailureKind::ActionOptional, FailureKind::ActionRequired] {
        for thread in [
            SignalledThread::Relay,
            SignalledThread::Vcpu(2),
            SignalledThread::Other,
            SignalledThread::Caller,
        ] {
            for forged in [false, true] {
                all.push(Event::Caught { kind, hva, lsb, thread, forged });
            }
        }
        all.push(Event::Outside { kind, hva, lsb });
        for found_by in [FoundBy::Signal, FoundBy::Scan, FoundBy::Access, FoundBy::Forged] {
            all.push(Event::Seen { gpa, hva, kind, found_by, extent: 4096, pages: 1 });
        }
        for forged in [false, true] {
            all.push(Event::Again { gpa, kind, forged });
            let waiting = |wait| Event::Waiting { gpa, kind, wait, forged };
            all.extend(waits().into_iter().map(waiting));
        }
        for why in cannots() {
            for rip in [None, Some(0)] {
                all.push(Event::Undeliverable {
                    gpa,
                    kind,
                    vcpu: 0,
                    why,
                    rip,
                    forged: rip.is_none(),
                });
            }
        }
    }
    for form in [Form::Srao, Form::Srar, Form::Deferred, Form::AmdAr] {
        for reach in [Reach::Local, Reach::Lmce, Reach::Rendezvous, Reach::Logged] {
            let (status, mcg_status) = (u64::MAX, 0);
            let by = Injection::Mce { vcpu: 0, bank: 9, form, reach, status, mcg_status };
            all.push(Event::Injected { gpa, by, after_micros: Some(20_000), forged: true });
        }
    }
    let by = Injection::Ghes { record: 1, pages: 15 };
    all.push(Event::Injected { gpa, by, after_micros: None, forged: false });
    for after_micros in [None, Some(u64::MAX)] {
        let taken = |place| Event::Acknowledged { gpa, place, after_micros, forged: false };
        all.extend(places().into_iter().map(taken));
    }
    all.extend([false, true].map(|forged| Event::Healed { gpa, forged }));
    all.push(Event::Removed { gpa, len: 2 << 20 });
    all.extend(states().into_iter().map(|state| Event::Predicted { gpa, state }));
    all.push(Event::Overrun { signals: 3 });
    all.push(Event::Scanned { pages: 3, micros: 1500 });
    all.extend([None, Some(900)].map(|held| Event::Rescued(rescued(held))));
    let whys = [
        RescueRefusal::NoFile,
        RescueRefusal::Private,
        RescueRefusal::Shared,
        RescueRefusal::Forbidden,
        RescueRefusal::NoMemory { needed: 2 << 20, free: 1 << 20 },
        RescueRefusal::Mapped,
        RescueRefusal::NothingLeft,
        RescueRefusal::NoneBad,
        RescueRefusal::NoMarker { errno: libc::EPERM },
    ];
    let steps = [RescueStep::Allocate, RescueStep::Read, RescueStep::Mark, RescueStep::Move];
    let steps = steps.map(|step| RescueRefusal::System { step, errno: libc::ENOMEM });
    let refused = |why| Event::NotRescued { gpa, hva: 1 << 40, extent: 2 << 20, why };
    all.extend(whys.into_iter().chain(steps).map(refused));
    all
}

fn rescued(held_micros: Option<u64>) -> Rescued {
    let (hva, extent, kept, gone, micros) = (1 << 40, 2 << 20, 511, 1, 1000);
    Rescued { gpa: GPA, hva, extent, kept, gone, micros, held_micros }
}

fn pause_reasons() -> Vec<PauseReason> {
    let untold =
        |rip| PauseReason::Undeliverable(Undeliverable { vcpu: 1, gpa: GPA, why: "x".into(), rip });
    vec![PauseReason::Request, PauseReason::Marking, untold(None), untold(Some(u64::MAX))]
}

fn vm_events() -> Vec<VmEvent> {
    let mut all = vec![VmEvent::Resumed {}, VmEvent::Ended { how: "x".into(), status: 143 }];
    all.extend([VmEvent::Panicked { way_on: "x".into() }, VmEvent::CrashLoaded {}]);
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mcg_cap = "0x900010a".into();
        all.push(VmEvent::Booting { boot: 1, unix_time: 1.7e9, mcg_cap, vendor });
    }
    for by_policy in [false, true] {
        all.push(VmEvent::Reset { reason: "x".into(), by_policy });
    }
    for reason in pause_reasons() {
        all.push(VmEvent::Paused { reason, way_on: "x".into() });
    }
    all
}

/// The document's own example of a VM, as the types have it, and others that differ from it.
fn infos() -> Vec<VmInfo> {
    let example = &document()["components"]["schemas"]["VmInfo"]["examples"][0];
    let info = VmInfo::deserialize(example).unwrap();
    assert_eq!(&serde_json::to_value(&info).unwrap(), example);
    let mut all = vec![info.clone()];
    let block = info.memory[0];
    let of_a_file = MemoryBlock { gpa: 1 << 32, fd: Some(5), shared: true, ..block };
    let info = VmInfo { vcpus: 254, memory: vec![block, of_a_file], ..info };
    all.extend([info.clone(), VmInfo { name: Some("x".into()), ..info.clone() }]);
    all.push(VmInfo { relay_alive: false, ..info.clone() });
    for ghes in [Notify::Interrupt, Notify::Poll { millis: 1000 }] {
        all.push(VmInfo { ghes: Some(ghes), ..info.clone() });
    }
    for reason in pause_reasons() {
        all.push(VmInfo { paused: true, pause_reason: Some(reason), ..info.clone() });
    }
    for driver in [
        DriverState::Absent,
        DriverState::Working,
        DriverState::NeedsReset,
        DriverState::Failed,
        DriverState::Resetting,
    ] {
        let (descriptors, avail, used) = (0x10_0000, 0x10_1000, 0x10_2000);
        let queue = QueueInfo { index: 0, size: 256, descriptors, avail, used };
        let device = |queues: Vec<QueueInfo>| {
            let (name, gpa) = ("virtio-blk".into(), 0xd000_0000);
            DeviceInfo { name, gpa, driver, interrupt_pending: queues.is_empty(), queues }
        };
        all.push(VmInfo { devices: vec![device(vec![queue]), device(vec![])], ..info.clone() });
    }
    for panic in [Panic::Panicked, Panic::CrashLoaded] {
        all.push(VmInfo { panic: Some(panic), ..info.clone() });
    }
    for mce_kill in [KillPolicy::Late, KillPolicy::Default] {
        all.push(VmInfo { mce_kill, ..info.clone() });
    }
    for ao_channel in [AoChannel::Mce, AoChannel::Ghes] {
        all.push(VmInfo { ao_channel, ..info.clone() });
    }
    for on_undeliverable in [OnUndeliverable::Pause, OnUndeliverable::Reset] {
        all.push(VmInfo { on_undeliverable, ..info.clone() });
    }
    all.push(VmInfo { vendor: Vendor::Intel, ..info });
    all
}

/// Where in `value` there are objects, as JSON pointers.
fn objects(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            found.push(at.to_owned());
            for (name, value) in fields {
                objects(value, &format!("{at}/{name}"), found);
            }
        }
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                objects(value, &format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
}

/// Sees that `schema` takes `value`, and does not if anything in it, however deep, is left out, is called
/// otherwise or is of another type, or if there is more. How many changes were refused.
fn exactly(schema: &Schema, value: &Value) -> usize {
    schema.check(value);
    let mut found = Vec::new();
    objects(value, "", &mut found);
    let mut changes = 0;
    for at in &found {
        let mut refused = |what: &str, change: &dyn Fn(&mut Map<String, Value>)| {
            let mut other = value.clone();
            change(other.pointer_mut(at).unwrap().as_object_mut().unwrap());
            assert!(!schema.accepts(&other), "{at}: {what} is not noticed: {other:#}");
            changes += 1;
        };
        refused("one more", &|fields| drop(fields.insert("more".into(), Value::Null)));
        for (name, field) in value.pointer(at).unwrap().as_object().unwrap() {
            // An address as a number among them.
            let another = match field {
                Value::Null => json!(true),
                Value::String(_) | Value::Bool(_) => json!(7),
                _ => json!("7"),
            };
            refused(name, &|fields| drop(fields.remove(name)));
            refused(name, &|fields| drop(fields.insert(name.clone(), another.clone())));
            refused(name, &|fields| drop(fields.insert(name.clone(), json!([field]))));
            refused(name, &|fields| {
                let field = fields.remove(name).unwrap();
                fields.insert(format!("{name}s"), field);
            });
        }
    }
    changes
}

/// Every event there is, as it is written; and that the schema is one that refuses.
pub fn events() {
    let schema = Schema::of("Event");
    let time = Duration::new(3, 999_999_999);
    let entries = memory_events()
        .into_iter()
        .map(What::Memory)
        .chain(vm_events().into_iter().map(What::Vm))
        .map(|what| Next::Event(Entry { time, what }.into()));
    let all: Vec<Next> = entries.chain([Next::Missed { events: 7, time }]).collect();
    let mut changes = 0;
    for next in &all {
        let event = serde_json::from_str(&line_of(next).unwrap()).unwrap();
        changes += exactly(&schema, &event);
    }
    println!("    {} events accepted, {changes} changed ones refused", all.len());
}

/// Every state of a page, as the ledger has it, and everything that relay.status says of a VM.
pub fn pages() {
    let now = SystemTime::now();
    let times = Times { injected: Some(now), healed: Some(now), ..Times::new(now) };
    let page = |state| Page {
        gpa: GPA,
        hva: GPA,
        lsb: 12,
        kind: FailureKind::ActionOptional,
        found_by: FoundBy::Scan,
        signals: 0,
        state,
        times,
    };
    let predicted = |state| Predicted { gpa: GPA, state, times };
    let (of_page, of_predicted) = (Schema::of("Page"), Schema::of("Predicted"));
    let (states, infos) = (states(), infos());
    let mut changes = 0;
    for state in &states {
        let value = serde_json::to_value(page(*state)).unwrap();
        changes += exactly(&of_page, &value);
        let mut unknown = value;
        unknown["state"] = "lost".into();
        assert!(!of_page.accepts(&unknown), "{unknown:#}");
        let value = serde_json::to_value(predicted(*state)).unwrap();
        changes += exactly(&of_predicted, &value);
    }
    let of_status = Schema::of("Status");
    let vms = infos.len();
    for vm in infos {
        let status = Status {
            vm,
            pages: vec![page(State::Seen)],
            predicted: vec![predicted(State::Seen)],
            past: vec![page(State::Healed)],
            rescued: vec![rescued(None), rescued(Some(900))],
        };
        changes += exactly(&of_status, &serde_json::to_value(status).unwrap());
    }
    println!("    {} states and {vms} VMs accepted, {changes} changed ones refused", states.len());
}

/// The answer to a request.
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    /// A header's value, or nothing.
    fn header(&self, name: &str) -> &str {
        let mut fields = self.head.lines().filter_map(|line| line.split_once(": "));
        fields.find(|(other, _)| *other == name).map_or("", |(_, value)| value)
    }

    /// Sees that it is one that the document has for `operation`.
    fn check(&self, request: &str, operation: &Value) {
        let Self { status, body, .. } = self;
        let words = String::from_utf8_lossy(&body[..body.len().min(500)]);
        let response = resolved(&operation["responses"][status.to_string()]);
        assert!(response.is_object(), "{request}: {status} is not in the document: {words}");
        if let Some(headers) = response["headers"].as_object() {
            for (name, header) in headers {
                let value = self.header(&name.to_lowercase());
                Schema::at(&header["schema"]).check(&value.into());
            }
        }
        let kind = self.header("content-type");
        let Some(kinds) = response.get("content") else {
            assert!(body.is_empty() && kind.is_empty(), "{request}: {kind:?}, {words}");
            return;
        };
        assert!(kinds[kind].is_object(), "{request}: {kind:?} is not in the document");
        if kind == "application/json" {
            Schema::at(&kinds[kind]["schema"]).check(&serde_json::from_slice(body).unwrap());
        }
    }
}

fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Answer {
    let mut stream = UnixStream::connect(socket).unwrap();
    let len = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n"
    );
    stream.write_all((head + body).as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body: answer.split_off(end + 4) }
}

/// Each path of the document, asked for in a good way, by the wrong methods and in bad ways: the answer is
/// one of the document's.
pub fn the_api() {
    let vm = Spinning::start(&["--cpus", "2", "--on-undeliverable", "pause"]);
    let socket = vm.socket();
    assert!(vm.command("poison", &["--via", "signal", "--gpa", "0x5000"]).status.success());
    let paths = document()["paths"].as_object().unwrap();
    let mut asked = 0;
    for (path, item) in paths {
        let (method, operation) = item.as_object().unwrap().iter().next().unwrap();
        let method = method.to_uppercase();
        for wrong in ["PATCH", if method == "GET" { "PUT" } else { "GET" }] {
            let answer = ask(&socket, wrong, path, "");
            assert_eq!((answer.status, answer.header("allow")), (405, method.as_str()), "{path}");
            answer.check(path, operation);
        }
        // At the end.
        if ["shutdown", "reset", "power-button"].iter().any(|end| path.ends_with(end)) {
            continue;
        }
        let query = if path.ends_with("memory") { "?gpa=0x5000&len=16" } else { "" };
        let body = match operation.get("requestBody") {
            Some(body) => {
                let content = &body["content"]["application/json"];
                Schema::at(&content["schema"]).check(&content["example"]);
                content["example"].to_string()
            }
            None => String::new(),
        };
        let answer = ask(&socket, &method, &format!("{path}{query}"), &body);
        let words = String::from_utf8_lossy(&answer.body);
        assert!(answer.status == 200 || answer.status == 204, "{path}: {} {words}", answer.status);
        answer.check(path, operation);
        if path.ends_with("relay.events") {
            let schema = Schema::of("Event");
            // Between the sizes of chunks.
            let lines: Vec<&str> = words.lines().filter(|line| line.starts_with('{')).collect();
            assert!(!lines.is_empty(), "{words}");
            for line in lines {
                schema.check(&serde_json::from_str(line).unwrap());
            }
        }
        asked += 1;
    }
    for (method, path, query, body, status) in [
        ("get", "/api/v1/vm.info", "?x=1", "", 400),
        ("get", "/metrics", "?x", "", 400),
        ("get", "/api/v1/relay.events", "?follow=1", "", 400),
        ("get", "/api/v1/vm.memory", "?gpa=0x5000", "", 400),
        ("get", "/api/v1/vm.memory", "?gpa=0x5000&len=4194305", "", 400),
        ("get", "/api/v1/vm.memory", "?gpa=0x2000000&len=1", "", 404),
        ("put", "/api/v1/vm.retire", "", "{}", 400),
        // Nobody listens to it in that guest.
        ("put", "/api/v1/vm.power-button", "", "", 409),
        ("put", "/api/v1/vm.poison", "", r#"{"gpas":["0x2000000"],"via":"signal"}"#, 404),
        ("put", "/api/v1/vm.poison", "", r#"{"gpas":["0x1000"],"via":"mce-inject"}"#, 400),
        (
            "put",
            "/api/v1/vm.inject",
            "",
            r#"{"vcpu":2,"bank":2,"status":"0x8000000000000000","mcg_status":"0x0","addr":"0x0","misc":"0x0"}"#,
            409,
        ),
    ] {
        let request = format!("{path}{query}");
        let answer = ask(&socket, &method.to_uppercase(), &request, body);
        assert_eq!(answer.status, status, "{request} {body}");
        answer.check(&request, &paths[path][method]);
    }
    let served = ask(&socket, "GET", "/api/v1/openapi.json", "").body;
    assert_eq!(&serde_json::from_slice::<Value>(&served).unwrap(), document());
    let path = "/api/v1/vm.reset";
    let answer = ask(&socket, "PUT", path, "");
    assert_eq!(answer.status, 204);
    answer.check(path, &paths[path]["put"]);
    println!("    {asked} of {} paths", paths.len());
    let start = Instant::now();
    while vm.running().is_none_or(|info| info.boot == 1) {
        assert!(start.elapsed() < Duration::from_secs(60), "the guest does not start over");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(vm.shut_down().code(), Some(0));
}
