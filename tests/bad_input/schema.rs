//! What the VM says is what docs/openapi.json says that it does.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use mce_relay::delivery::{Cannot, Wait};
use mce_relay::event::{Injection, Reach, Thread};
use mce_relay::firmware::Why;
use mce_relay::ledger::{Place, State, Times};
use mce_relay::mca::{Form, Kind, Vendor};
use mce_relay::{Event, FoundBy, Page};
use mce_relay_tests::schema::{Schema, document};
use mce_relay_tests::spinning::Spinning;
use mce_relay_vmm::control::{PauseReason, Undeliverable};
use mce_relay_vmm::events::{Entry, Next, VmEvent, What, line_of};
use serde_json::Value;

const GPA: u64 = 0x1_2345_6000;

fn waits() -> Vec<Wait> {
    let vcpu = 3;
    let mut all = vec![
        Wait::NotStarted { vcpu },
        Wait::Cr4MceClear { vcpu },
        Wait::Mcip { vcpu },
        Wait::McgCtlOff { vcpu },
        Wait::BankCtlOff { vcpu, bank: 9 },
        Wait::BankValid { vcpu, bank: 9 },
        Wait::NoBank { vcpu },
        Wait::InHandler { vcpu },
        Wait::EventInFlight { vcpu },
        Wait::JustOpened { vcpu },
        Wait::Restarted { vcpu },
        Wait::Paused { vcpu },
        Wait::Pace,
        Wait::NoSourceYet,
        Wait::InBlock,
    ];
    all.extend(whys().map(|why| Wait::NotByFirmware { why }));
    all
}

fn whys() -> [Why; 6] {
    [
        Why::NoSource,
        Why::NotTaken,
        Why::Silent,
        Why::Overwritten,
        Why::Unreachable,
        Why::NotNotified,
    ]
}

fn cannots() -> Vec<Cannot> {
    let mut all =
        vec![Cannot::NoForm, Cannot::Refused, Cannot::Loop { rounds: 64 }, Cannot::WentBad];
    all.extend(waits().into_iter().map(|by| Cannot::Blocked { by }));
    all.extend(whys().map(|why| Cannot::NoTaker { why }));
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
    for kind in [Kind::ActionOptional, Kind::ActionRequired] {
        for thread in [Thread::Relay, Thread::Vcpu(2), Thread::Other, Thread::Caller] {
            for forged in [false, true] {
                all.push(Event::Caught { kind, hva, lsb, thread, forged });
            }
        }
        all.push(Event::Outside { kind, hva, lsb });
        for found_by in [FoundBy::Signal, FoundBy::Scan, FoundBy::Access, FoundBy::Forged] {
            all.push(Event::Seen { gpa, hva, kind, found_by, extent: 4096, pages: 1 });
        }
        all.push(Event::Again { gpa, kind });
        all.extend(waits().into_iter().map(|wait| Event::Waiting { gpa, kind, wait }));
        for why in cannots() {
            for rip in [None, Some(0)] {
                all.push(Event::Undeliverable { gpa, kind, vcpu: 0, why, rip });
            }
        }
    }
    for form in [Form::Srao, Form::Srar, Form::Deferred, Form::AmdAr] {
        for reach in [Reach::Local, Reach::Lmce, Reach::Rendezvous, Reach::Logged] {
            let (status, mcg_status) = (u64::MAX, 0);
            let by = Injection::Mce { vcpu: 0, bank: 9, form, reach, status, mcg_status };
            all.push(Event::Injected { gpa, by });
        }
    }
    all.push(Event::Injected { gpa, by: Injection::Ghes { record: 1, pages: 15 } });
    all.extend(places().into_iter().map(|place| Event::Acknowledged { gpa, place }));
    all.push(Event::Healed { gpa });
    all.push(Event::Removed { gpa, len: 2 << 20 });
    all.extend(states().into_iter().map(|state| Event::Predicted { gpa, state }));
    all.push(Event::Overrun { signals: 3 });
    all.push(Event::Scanned { pages: 3, micros: 1500 });
    all
}

fn vm_events() -> Vec<VmEvent> {
    let mut all = vec![VmEvent::Resumed {}, VmEvent::Ended { how: "x".into(), status: 143 }];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let mcg_cap = "0x900010a".into();
        all.push(VmEvent::Booting { boot: 1, unix_time: 1.7e9, mcg_cap, vendor });
    }
    for by_policy in [false, true] {
        all.push(VmEvent::Reset { reason: "x".into(), by_policy });
    }
    let untold = Undeliverable { vcpu: 1, gpa: GPA, why: "x".into(), rip: u64::MAX };
    for reason in [PauseReason::Request, PauseReason::Undeliverable(untold)] {
        all.push(VmEvent::Paused { reason, way_on: "x".into() });
    }
    all
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
    let mut changed = 0;
    for next in &all {
        let event: Value = serde_json::from_str(&line_of(next).unwrap()).unwrap();
        schema.check(&event);
        // Whatever is left out, or called otherwise, or of another type, is noticed.
        let properties = event["properties"].as_object().unwrap();
        for (name, value) in properties {
            let with = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
                let mut other = event.clone();
                change(other["properties"].as_object_mut().unwrap());
                assert!(!schema.accepts(&other), "{name} is not looked at: {other:#}");
            };
            with(&|it| drop(it.remove(name)));
            with(&|it| drop(it.insert("more".into(), value.clone())));
            with(&|it| drop(it.insert(name.clone(), serde_json::json!([[value]]))));
            changed += 3;
        }
        for field in ["timestamp", "source", "event"] {
            let mut other = event.clone();
            other.as_object_mut().unwrap().remove(field);
            assert!(!schema.accepts(&other), "{field} is not looked at");
        }
    }
    println!("    {} events accepted, {changed} changed ones refused", all.len());
}

/// Every state of a page, as the ledger has it.
pub fn pages() {
    let schema = Schema::of("Page");
    let now = SystemTime::now();
    let all = states();
    for state in &all {
        let times = Times { injected: Some(now), healed: Some(now), ..Times::new(now) };
        let page = Page {
            gpa: GPA,
            hva: GPA,
            lsb: 12,
            kind: Kind::ActionOptional,
            found_by: FoundBy::Scan,
            signals: 0,
            state: *state,
            times,
        };
        let json = serde_json::to_value(&page).unwrap();
        schema.check(&json);
        let mut other = json.clone();
        other["state"] = "lost".into();
        assert!(!schema.accepts(&other));
        let mut other = json;
        other["gpa"] = 4096.into();
        assert!(!schema.accepts(&other));
    }
    println!("    {} states", all.len());
}

/// Status, kind of content and body of the answer to a request.
fn ask(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String, Vec<u8>) {
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
    let kind = head.lines().find_map(|line| line.strip_prefix("content-type: "));
    (status, kind.unwrap_or_default().to_owned(), answer.split_off(end + 4))
}

/// Each path of the document, asked for in a good way: the answer is one of the document's.
pub fn the_api() {
    let vm = Spinning::start(&["--cpus", "2", "--on-undeliverable", "pause"]);
    let socket = vm.socket();
    assert!(vm.command("poison", &["--via", "signal", "--gpa", "0x5000"]).status.success());
    let inject = r#"{"vcpu":1,"bank":2,"status":"0x9c00180000000000","mcg_status":"0x0","addr":"0x5000","misc":"0x8c"}"#;
    let paths = document()["paths"].as_object().unwrap();
    let mut asked = 0;
    for (path, item) in paths {
        let (method, operation) = item.as_object().unwrap().iter().next().unwrap();
        let method = method.to_uppercase();
        let (query, body) = match path.rsplit('.').next().unwrap() {
            "memory" => ("?gpa=0x5000&len=16", ""),
            "retire" => ("", r#"{"gpas":["0x6000"]}"#),
            "poison" => ("", r#"{"gpas":["0x7000"],"via":"signal"}"#),
            "inject" => ("", inject),
            // At the end.
            "shutdown" => continue,
            _ => ("", ""),
        };
        let (status, kind, answer) = ask(&socket, &method, &format!("{path}{query}"), body);
        assert!(
            status == 200 || status == 204,
            "{path}: {status} {}",
            String::from_utf8_lossy(&answer)
        );
        let response = &operation["responses"][status.to_string()];
        assert!(response.is_object(), "{path}: {status} is not in the document");
        if status == 200 {
            let content = &response["content"][&kind];
            assert!(content.is_object(), "{path}: {kind:?} is not in the document");
            if kind == "application/json" {
                Schema::at(&content["schema"]).check(&serde_json::from_slice(&answer).unwrap());
            }
        }
        if path.ends_with("relay.events") {
            let schema = Schema::of("Event");
            for line in
                String::from_utf8(answer).unwrap().lines().filter(|line| line.starts_with('{'))
            {
                schema.check(&serde_json::from_str(line).unwrap());
            }
        }
        let (status, kind, answer) = ask(&socket, "PATCH", path, "");
        assert_eq!((status, kind.as_str()), (405, "application/json"));
        Schema::of("Problem").check(&serde_json::from_slice(&answer).unwrap());
        asked += 1;
    }
    let (_, _, served) = ask(&socket, "GET", "/api/v1/openapi.json", "");
    assert_eq!(&serde_json::from_slice::<Value>(&served).unwrap(), document());
    println!("    {asked} of {} paths", paths.len());
    assert_eq!(vm.shut_down().code(), Some(0));
}
