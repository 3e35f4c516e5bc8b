//! Requests and their answers, without sockets.

use std::time::Duration;

use mce_relay::{AccessError, Handle};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::current::{Current, Running};
use super::metrics;
use super::types::limits::{MAX_PAGES, MAX_READ};
use super::types::pages::{Gpa, Poison, Retire, Retiring};
use super::types::vm::{Extent, Ping, Problem, Status, VmInfo};
use crate::api::types::manual_mce::Request as Inject;
use crate::events::hub::Hub;
use crate::machine::devices::power_button::PressError;
use crate::machine::lifecycle::VmControl;
use crate::machine::lifecycle::reasons::{ExitReason, Parked, StopCause};
use crate::machine::memory::block::PAGE_SIZE;
use crate::relaying::manual_mce::injector::Refusal;
use crate::relaying::self_poison::{self, InsideError};
use crate::words;

/// How long an answer waits for the vCPUs to leave the guest: longer than a machine check that other processors have to
/// take part in may hold back a vCPU (five seconds).
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// The API's OpenAPI document, by a link to docs/, so that it is packed with the crate. It has a name for the linker
/// (cli/dist.ld): few VMs are ever asked for it.
static OPENAPI: [u8; include_bytes!("../../openapi.json").len()] =
    *include_bytes!("../../openapi.json");

pub(super) const JSON: &str = "application/json";
const BYTES: &str = "application/octet-stream";
/// <https://prometheus.io/docs/instrumenting/exposition_formats/>
const PROMETHEUS: &str = "text/plain; version=0.0.4";

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Ping,
    Info,
    Status,
    Events,
    Memory,
    Extents,
    Registers,
    Retire,
    Poison,
    Inject,
    Pause,
    Resume,
    PowerButton,
    Reset,
    Shutdown,
    OpenApi,
    Metrics,
}

/// Path, method and route of each.
pub(super) const ROUTES: [(&str, &str, Route); 17] = [
    ("/api/v1/vmm.ping", "GET", Route::Ping),
    ("/api/v1/vm.info", "GET", Route::Info),
    ("/api/v1/relay.status", "GET", Route::Status),
    ("/api/v1/relay.events", "GET", Route::Events),
    ("/api/v1/vm.memory", "GET", Route::Memory),
    ("/api/v1/vm.extents", "GET", Route::Extents),
    ("/api/v1/vm.registers", "GET", Route::Registers),
    ("/api/v1/vm.retire", "PUT", Route::Retire),
    ("/api/v1/vm.poison", "PUT", Route::Poison),
    ("/api/v1/vm.inject", "PUT", Route::Inject),
    ("/api/v1/vm.pause", "PUT", Route::Pause),
    ("/api/v1/vm.resume", "PUT", Route::Resume),
    ("/api/v1/vm.power-button", "PUT", Route::PowerButton),
    ("/api/v1/vm.reset", "PUT", Route::Reset),
    ("/api/v1/vm.shutdown", "PUT", Route::Shutdown),
    ("/api/v1/openapi.json", "GET", Route::OpenApi),
    ("/metrics", "GET", Route::Metrics),
];

impl Route {
    /// The route of a request, or what is wrong with it.
    pub(super) fn find(method: &str, path: &str) -> Result<Self, Answer> {
        let Some((_, allowed, route)) = ROUTES.iter().find(|(known, _, _)| *known == path) else {
            return Err(Answer::problem(404, format!("there is nothing at {path}")));
        };
        if *allowed != method {
            let words = format!("{path} does not take the method {method}, but {allowed}");
            return Err(Answer { allow: Some(allowed), ..Answer::problem(405, words) });
        }
        Ok(*route)
    }

    /// Whether it is answered at once: its handler takes no lock that is held for long, and waits for no vCPU.
    pub(super) fn is_quick(self) -> bool {
        matches!(
            self,
            Self::Ping | Self::OpenApi | Self::Info | Self::Shutdown | Self::Reset | Self::Resume
        )
    }

    /// An example of its body, where it has one.
    fn example(self) -> Option<&'static str> {
        match self {
            Self::Retire => Some(r#"{"gpas":["0x1000","0x2000"]}"#),
            Self::Poison => Some(r#"{"gpas":["0x1000"],"via":"signal","kind":"AO"}"#),
            Self::Inject => Some(
                r#"{"vcpu":0,"bank":9,"status":"0xbd000000000000c0","mcg_status":"0x5","addr":"0x1000","misc":"0x8c"}"#,
            ),
            _ => None,
        }
    }
}

/// A request.
pub(super) struct Asked<'a> {
    pub(super) route: Route,
    pub(super) query: Option<&'a str>,
    pub(super) body: &'a [u8],
}

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// The content type, if there is a body.
    pub(super) kind: Option<&'static str>,
    pub(super) body: Vec<u8>,
    /// The method that the path takes, for status 405.
    pub(super) allow: Option<&'static str>,
}

impl Answer {
    fn of(status: u16, kind: &'static str, body: Vec<u8>) -> Self {
        Self { status, kind: Some(kind), body, allow: None }
    }

    fn json(status: u16, body: &impl Serialize) -> Self {
        // Plain structs of strings and numbers: their serialisation cannot fail.
        Self::of(status, JSON, serde_json::to_vec(body).unwrap_or_default())
    }

    pub(super) fn problem(status: u16, error: String) -> Self {
        Self::json(status, &Problem { error })
    }

    /// An answer without a body: it is done.
    fn done() -> Self {
        Self { status: 204, kind: None, body: Vec::new(), allow: None }
    }
}

/// Answers a request that needs no stream of its own.
pub(super) fn answer(asked: &Asked<'_>, current: &Current, hub: &Hub) -> Answer {
    match checked(asked, current, hub) {
        Ok(answer) | Err(answer) => answer,
    }
}

fn checked(asked: &Asked<'_>, current: &Current, hub: &Hub) -> Result<Answer, Answer> {
    let Asked { route, query, body } = *asked;
    let takes_query = matches!(route, Route::Memory | Route::Extents);
    if let Some(query) = query.filter(|query| !query.is_empty() && !takes_query) {
        return Err(Answer::problem(400, format!("nothing is asked for by {query:?} here")));
    }
    let example = route.example();
    let running = || {
        let none = "the guest is between two boots; ask again".to_owned();
        current.get().ok_or_else(|| Answer::problem(503, none))
    };
    let example = example.unwrap_or_default();
    Ok(match route {
        Route::Ping => Answer::json(
            200,
            &Ping {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                name: current.name(),
            },
        ),
        Route::OpenApi => Answer::of(200, JSON, OPENAPI.to_vec()),
        Route::Metrics => {
            let text = metrics::text(current.get().as_ref(), hub);
            Answer::of(200, PROMETHEUS, text.into_bytes())
        }
        Route::Info => Answer::json(200, &running()?.info()),
        Route::Status => {
            let running = running()?;
            let relay = &running.relay;
            let (pages, predicted, past) = (relay.pages(), relay.predicted(), relay.past());
            let rescued = relay.inspect(|ledger| ledger.rescued().to_vec());
            Answer::json(200, &Status { pages, predicted, past, rescued, vm: running.info() })
        }
        Route::Memory => {
            let running = running()?;
            read_memory(&running.relay, query.unwrap_or_default(), &running.info)
        }
        Route::Extents => {
            let in_use = flag(query, "in_use").map_err(|error| Answer::problem(400, error))?;
            extents(&running()?, in_use)
        }
        Route::Registers => match running()?.control.registers() {
            Some(registers) => Answer::json(200, &registers),
            None => Answer::problem(
                409,
                "the vCPUs run, and their registers are known of a paused VM only; pause it first"
                    .to_owned(),
            ),
        },
        Route::Retire => {
            let Retire { gpas } = parse_body(body, example)?;
            check_count(&gpas)?;
            let running = running()?;
            ensure_running(&running.control, "a guest is told of pages while it runs")?;
            Answer::json(200, &retire(&running.relay, &gpas))
        }
        Route::Poison => {
            let poison: Poison = parse_body(body, example)?;
            check_count(&poison.gpas)?;
            match self_poison::poison(&running()?, &poison) {
                Ok(pages) => Answer::json(200, &pages),
                Err(error) => Answer::problem(status_of(&error), words::with_causes(&error)),
            }
        }
        Route::Inject => {
            let request: Inject = parse_body(body, example)?;
            let running = running()?;
            match running.injector.inject(&request, &running.control) {
                Ok(outcome) => Answer::json(200, &outcome),
                Err(error @ Refusal::Late { .. }) => Answer::problem(503, error.to_string()),
                Err(error) => Answer::problem(409, error.to_string()),
            }
        }
        Route::PowerButton => {
            let running = running()?;
            ensure_running(&running.control, "a guest powers itself off while it runs")?;
            match running.button.press(&running.control) {
                Ok(()) => Answer::done(),
                Err(error @ PressError::NoGuest) => Answer::problem(503, error.to_string()),
                Err(error) => Answer::problem(409, words::with_causes(&error)),
            }
        }
        Route::Reset => {
            running()?.control.stop(ExitReason::ResetBy(api_request()));
            Answer::done()
        }
        Route::Shutdown => {
            running()?.control.stop(ExitReason::Stopped(api_request()));
            Answer::done()
        }
        Route::Pause => pause(&running()?.control, PAUSE_PATIENCE),
        Route::Resume => {
            running()?.control.resume();
            Answer::done()
        }
        // They are streamed: see `server`.
        Route::Events => Answer::problem(500, "events are not answered here".to_owned()),
    })
}

fn api_request() -> StopCause {
    StopCause::Request("the API".to_owned())
}

/// A request's body, as JSON of the form that `example` shows.
fn parse_body<T: DeserializeOwned>(body: &[u8], example: &str) -> Result<T, Answer> {
    let wrong = |error: &dyn std::fmt::Display| {
        let words = format!("the body is not understood: {error}; expected e.g. {example}");
        Answer::problem(400, words)
    };
    // serde accepts a list for a struct, and an object for a word; the OpenAPI document does not.
    let body: Value = serde_json::from_slice(body).map_err(|error| wrong(&error))?;
    match &body {
        Value::Object(fields) if fields.values().any(Value::is_object) => {
            return Err(wrong(&"there is an object in an object"));
        }
        Value::Object(_) => {}
        _ => return Err(wrong(&"it is no object")),
    }
    serde_json::from_value(body).map_err(|error| wrong(&error))
}

/// Refuses the request if the VM is paused, as it takes a guest that runs (`why`). A pause that ends by itself in a
/// moment is waited for.
fn ensure_running(control: &VmControl, why: &str) -> Result<(), Answer> {
    match control.paused_for_long(PAUSE_PATIENCE) {
        None => Ok(()),
        Some(_) => {
            Err(Answer::problem(409, format!("the VM is paused, and {why}; resume it first")))
        }
    }
}

/// Limits the number of addresses, as the answer has an entry for each.
fn check_count(gpas: &[Gpa]) -> Result<(), Answer> {
    match gpas.len() {
        0..=MAX_PAGES => Ok(()),
        len => {
            let words =
                format!("gpas has {len} addresses; expected {MAX_PAGES} at most, so ask in parts");
            Err(Answer::problem(400, words))
        }
    }
}

/// Whether the query has `follow=true`.
pub(super) fn follows(query: Option<&str>) -> Result<bool, String> {
    flag(query, "follow")
}

/// Whether the query is `name=true`; an error if it has anything else.
fn flag(query: Option<&str>, name: &str) -> Result<bool, String> {
    let said = query.unwrap_or_default();
    match said.strip_prefix(name) {
        None if said.is_empty() => Ok(false),
        Some("=false") => Ok(false),
        Some("=true") => Ok(true),
        _ => Err(format!("{said:?} is not understood; expected ?{name}=true or nothing")),
    }
}

/// `gpa` and `len` of the query `gpa=0x1000&len=64`.
fn stretch(query: &str) -> Result<(u64, u64), String> {
    const EXPECTED: &str = "expected ?gpa=0x1000&len=64";
    let (mut gpa, mut len) = (None, None);
    for part in query.split('&') {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let place = match key {
            "gpa" => &mut gpa,
            "len" => &mut len,
            _ => return Err(format!("{key:?} is not understood; {EXPECTED}")),
        };
        let number = number(value).filter(|_| key == "gpa" || !value.starts_with("0x"));
        let number = number.ok_or_else(|| match key {
            "gpa" => {
                format!("gpa is {value:?}; expected 0x and 1 to 16 digits, or 1 to 19 decimal ones")
            }
            _ => format!("len is {value:?}; expected 1 to {MAX_READ}"),
        })?;
        if place.replace(number).is_some() {
            return Err(format!("{key} is given twice; {EXPECTED}"));
        }
    }
    match (gpa, len) {
        (Some(gpa), Some(len @ 1..=MAX_READ)) => Ok((gpa, len)),
        (Some(_), Some(len)) => Err(format!("len is {len} bytes; expected 1 to {MAX_READ} bytes")),
        _ => Err(format!("gpa or len is missing; {EXPECTED}")),
    }
}

/// A number in exactly the forms that the OpenAPI document allows.
fn number(text: &str) -> Option<u64> {
    let fits = match text.strip_prefix("0x") {
        Some(digits) => digits.len() <= 16,
        None => text.len() <= 19,
    };
    crate::number::plain(text).filter(|_| fits)
}

/// The HTTP status by what is wrong: the request itself, what it names, the VM's state, or the moment.
fn status_of(error: &InsideError) -> u16 {
    match error {
        InsideError::Outside(_) => 400,
        InsideError::NotRam { .. } | InsideError::NoVcpu { .. } => 404,
        InsideError::Uffd(_) => 409,
        InsideError::NotParked | InsideError::Ended => 503,
    }
}

fn read_memory(relay: &Handle, query: &str, vm: &VmInfo) -> Answer {
    let (gpa, len) = match stretch(query) {
        Ok(stretch) => stretch,
        Err(error) => return Answer::problem(400, error),
    };
    // At most MAX_READ.
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    match relay.read(gpa, &mut bytes) {
        Ok(read) => {
            bytes.truncate(read);
            Answer::of(200, BYTES, bytes)
        }
        Err(error @ AccessError::Poisoned { .. }) => Answer::problem(410, error.to_string()),
        Err(error @ AccessError::NotRam { .. }) => {
            Answer::problem(404, format!("{error}; this guest has {}", vm.ram_in_words()))
        }
        Err(error @ AccessError::NoMemory { .. }) => {
            Answer::problem(409, words::with_causes(&error))
        }
    }
}

/// The stretches that have memory, and the bad pages: where the kernel shows a bad page as no page at all, the ledger
/// has it.
fn extents(running: &Running, in_use: bool) -> Answer {
    let found = if in_use { running.ram.in_use() } else { running.ram.extents() };
    let mut extents = match found {
        Ok(extents) => extents,
        Err(error) => {
            return Answer::problem(500, format!("cannot look at the memory: {error}"));
        }
    };
    running
        .relay
        .inspect(|ledger| extents.extend(ledger.pages().map(|page| (page.gpa, PAGE_SIZE))));
    extents.extend(running.ram.removed());
    extents.sort_unstable();
    let mut all: Vec<Extent> = Vec::new();
    for (gpa, len) in extents {
        match all.last_mut() {
            Some(last) if last.gpa + last.len >= gpa => {
                last.len = last.len.max(gpa + len - last.gpa);
            }
            _ => all.push(Extent { gpa, len }),
        }
    }
    Answer::json(200, &all)
}

fn retire(relay: &Handle, gpas: &[Gpa]) -> Vec<Retiring> {
    let ask = |gpa: &Gpa| {
        let error = relay.retire(gpa.0).err().map(|error| error.to_string());
        Retiring { gpa: *gpa, error }
    };
    gpas.iter().map(ask).collect()
}

fn pause(control: &VmControl, patience: Duration) -> Answer {
    match control.pause_within(patience) {
        Parked::All => Answer::done(),
        Parked::Not(left) => Answer::problem(
            503,
            format!(
                "the pause is on its way, but {left} of the vCPUs and devices have not stopped yet; ask again"
            ),
        ),
        Parked::Unpaused => Answer::problem(
            503,
            "the VM ended or was resumed before it had paused; ask again".to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(route: Route, query: Option<&str>, body: &[u8]) -> (u16, String) {
        let asked = Asked { route, query, body };
        let Answer { status, body, .. } = answer(&asked, &Current::default(), &Hub::default());
        (status, String::from_utf8(body).unwrap())
    }

    #[test]
    fn between_two_boots_nothing_is_known_of_the_guest() {
        for (_, _, route) in ROUTES {
            // A good body: a bad one is refused whether there is a guest or not.
            let body = route.example().unwrap_or_default();
            let (status, words) = asked(route, None, body.as_bytes());
            match route {
                Route::Ping | Route::OpenApi | Route::Metrics => assert_eq!(status, 200, "{words}"),
                Route::Events => assert_eq!(status, 500),
                _ => assert!(status == 503 && words.contains("between two boots"), "{words}"),
            }
        }
    }

    #[test]
    fn the_document_has_every_path_and_no_other() {
        let document: Value = serde_json::from_slice(&OPENAPI).unwrap();
        assert_eq!(document["paths"].as_object().unwrap().len(), ROUTES.len());
        for (path, method, _) in ROUTES {
            assert!(document["paths"][path][method.to_lowercase()].is_object(), "{path}");
        }
    }

    #[test]
    fn a_path_takes_one_method() {
        for (path, method, route) in ROUTES {
            assert_eq!(Route::find(method, path).unwrap(), route);
            let answer = Route::find("DELETE", path).unwrap_err();
            assert_eq!((answer.status, answer.allow), (405, Some(method)));
        }
        assert_eq!(Route::find("GET", "/").unwrap_err().status, 404);
    }

    #[test]
    fn a_body_is_understood_or_refused_with_a_reason() {
        let body = |text: &str| {
            parse_body::<Retire>(text.as_bytes(), Route::Retire.example().unwrap())
                .map(|retire| retire.gpas)
                .map_err(|answer| String::from_utf8(answer.body).unwrap())
        };
        assert_eq!(body(r#"{"gpas":["0x1000","0x2000"]}"#), Ok(vec![Gpa(0x1000), Gpa(0x2000)]));
        for (bad, named) in [
            ("", "EOF"),
            ("{", "EOF"),
            ("[]", "no object"),
            (r#"[["0x1000"]]"#, "no object"),
            (r#"{"gpas":{"0":"0x1000"}}"#, "in an object"),
            (r#"{"gpas":["0x+1"]}"#, "0x+1"),
            (r#"{"gpas":["4096"]}"#, "4096"),
            (r#"{"gpas":[4096]}"#, "4096"),
            (r#"{"gpas":["0x1ffffffffffffffff"]}"#, "0x1ffffffffffffffff"),
            (r#"{"gpas":[],"more":1}"#, "more"),
        ] {
            let error = body(bad).unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
        for (_, _, route) in ROUTES {
            let Some(example) = route.example() else { continue };
            let good = match route {
                Route::Retire => parse_body::<Retire>(example.as_bytes(), "").is_ok(),
                Route::Poison => parse_body::<Poison>(example.as_bytes(), "").is_ok(),
                Route::Inject => parse_body::<Inject>(example.as_bytes(), "").is_ok(),
                _ => false,
            };
            assert!(good, "{route:?}: its example is no good one");
        }
    }

    #[test]
    fn a_query_is_understood_or_refused_with_a_reason() {
        assert_eq!(stretch("gpa=0x1000&len=64"), Ok((0x1000, 64)));
        assert_eq!(stretch("len=4194304&gpa=0"), Ok((0, MAX_READ)));
        for (bad, named) in [
            ("", "\"\" is not understood"),
            ("gpa=0x1000", "missing"),
            ("gpa=0x1000&&len=1", "\"\""),
            ("gpa=0x1000&len=0x1", "len is \"0x1\""),
            ("gpa=0x1000&len=0", "len is 0"),
            ("gpa=0x1000&len=4194305", "4194305"),
            ("gpa=x&len=1", "\"x\""),
            ("gpa=0x1000&len=1&raw=1", "\"raw\""),
            ("gpa=0x1000&len=1&len=2", "len is given twice"),
            ("gpa=-1&len=1", "\"-1\""),
            ("gpa=+1&len=1", "\"+1\""),
            ("gpa=1K&len=1", "\"1K\""),
            ("gpa=0x&len=1", "\"0x\""),
            ("gpa=99999999999999999999&len=1", "19 decimal"),
        ] {
            let error = stretch(bad).unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
        assert_eq!(follows(None), Ok(false));
        assert_eq!(follows(Some("follow=true")), Ok(true));
        assert!(follows(Some("follow=1")).unwrap_err().contains("follow=1"));
        assert_eq!(asked(Route::Info, Some("x=1"), b"").0, 400);
    }

    #[test]
    fn a_pause_that_does_not_come_about_is_no_success() {
        crate::machine::vcpu::install_kick_handler();
        let control = VmControl::new(1).unwrap();
        // A vCPU that does not stop.
        control.enrol(0);
        assert_eq!(pause(&control, Duration::from_millis(5)).status, 503);
        assert!(control.paused().is_some(), "it is asked for all the same");
        control.leave(0);
        assert_eq!(pause(&control, Duration::from_millis(5)).status, 204);
        control.stop(ExitReason::PowerOff);
        assert_eq!(pause(&control, Duration::from_millis(5)).status, 503);
    }
}
