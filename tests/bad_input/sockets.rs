//! Clients of the API that do what no client should: the VM runs on, and nothing of them is left.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use mce_relay_tests::lab;
use mce_relay_tests::spinning::Spinning;
use mce_relay_vmm::api::types::limits::MAX_PAGES;

/// Sends `request` and reads the answer's status; 0 where there was none.
fn status(socket: &Path, request: &[u8]) -> u16 {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // One that is refused half-way is cut off.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut piece) {
        answer.extend(&piece[..read]);
        if answer.len() > 16 {
            break;
        }
    }
    let text = String::from_utf8_lossy(&answer);
    text.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
}

fn put(what: &str, body: &str) -> Vec<u8> {
    let len = body.len();
    format!("PUT /api/v1/{what} HTTP/1.1\r\nHost: x\r\nContent-Length: {len}\r\n\r\n{body}").into()
}

fn get(what: &str) -> Vec<u8> {
    format!("GET {what} HTTP/1.1\r\nHost: x\r\n\r\n").into()
}

/// Resident memory outside guest RAM, in kB.
fn memory(vm: &Spinning) -> u64 {
    lab::outside(vm.pid(), 32 << 20)
}

pub fn requests() {
    let vm = Spinning::start(&["--cpus", "2"]);
    let socket = vm.socket();
    let inject = |more: &str| {
        put(
            "vm.inject",
            &format!(
                r#"{{"vcpu":0,"bank":9,"status":"0xbd000000000000c0","mcg_status":"0x5","addr":"0x1000","misc":"0x8c"{more}}}"#
            ),
        )
    };
    let deep = "[".repeat(100_000);
    let many = format!(r#"{{"gpas":[{}]}}"#, vec!["\"0x0\""; 40_000].join(","));
    let as_many_as_allowed = format!(r#"{{"gpas":[{}]}}"#, vec!["\"0x0\""; MAX_PAGES].join(","));
    let requests: Vec<(Vec<u8>, &[u16])> = vec![
        (b"hello\r\n\r\n".to_vec(), &[400]),
        (vec![0; 64], &[400]),
        (vec![0xff; 4096], &[400, 431]),
        (b"GET\r\n\r\n".to_vec(), &[400]),
        (b"GET / HTTP/9.9\r\n\r\n".to_vec(), &[400]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), &[400]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), &[400, 0]),
        (get("/"), &[404]),
        (get("/api/v1/"), &[404]),
        (get("/api/v1/vm.info/"), &[404]),
        (get("/api/v2/vm.info"), &[404]),
        (get("/../../etc/passwd"), &[404]),
        (get("/api/v1/%76m.info"), &[404]),
        (get("http://x/api/v1/vm.nothing"), &[404]),
        (get("/api/v1/vm.info?x=1"), &[400]),
        (get("/metrics?x"), &[400]),
        (get("/api/v1/relay.events?follow=1"), &[400]),
        (get("/api/v1/vm.memory"), &[400]),
        (get("/api/v1/vm.memory?gpa=0&len=0"), &[400]),
        (get("/api/v1/vm.memory?gpa=0&len=5M"), &[400]),
        (get("/api/v1/vm.memory?gpa=0x2000000&len=1"), &[404]),
        (get("/api/v1/vm.memory?gpa=0xffffffffffffffff&len=2"), &[404]),
        (get("/api/v1/vm.memory?gpa=0x10000000000000000&len=2"), &[400]),
        (get("/api/v1/vm.memory?gpa=0&gpa=1&len=2"), &[400]),
        (get("/api/v1/vm.retire"), &[405]),
        (b"POST /api/v1/vm.pause HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), &[405]),
        (b"DELETE /metrics HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), &[405]),
        (b"BREW /api/v1/vm.info HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), &[405]),
        (put("vm.retire", ""), &[400]),
        (put("vm.retire", "null"), &[400]),
        (put("vm.retire", "{"), &[400]),
        (put("vm.retire", "\u{0}"), &[400]),
        (put("vm.retire", &deep), &[400]),
        (put("vm.retire", r#"{"gpas":["0x1g"]}"#), &[400]),
        (put("vm.retire", r#"{"gpas":[1.5e300]}"#), &[400]),
        (put("vm.retire", &many), &[400]),
        (put("vm.retire", &as_many_as_allowed), &[200]),
        (put("vm.poison", r#"{"gpas":["0x1000"]}"#), &[400]),
        (put("vm.poison", r#"{"gpas":["0x1000"],"via":"hammer"}"#), &[400]),
        (put("vm.poison", r#"{"gpas":["0x1000"],"via":"hwpoison-inject"}"#), &[400]),
        (put("vm.poison", r#"{"gpas":["0x1000"],"via":"mce-inject"}"#), &[400]),
        (put("vm.poison", r#"{"gpas":["0x2000000"],"via":"signal"}"#), &[404]),
        (put("vm.poison", r#"{"gpas":["0x1000"],"via":"signal","kind":"UE"}"#), &[400]),
        (put("vm.poison", r#"{"gpas":["0x1000"],"via":"signal","kind":"AR","vcpu":2}"#), &[404]),
        (put("vm.poison", r#"{"gpas":["0x1000"],"via":"signal","vcpu":-1}"#), &[400]),
        (put("vm.inject", "{}"), &[400]),
        (inject(r#","bank":9"#), &[409]),
        (inject(r#","colour":"red""#), &[400]),
        (inject(r#","force":"yes""#), &[400]),
        (inject(""), &[409]),
        (put("vm.inject", r#"{"vcpu":255,"bank":9,"status":"0x0","mcg_status":"0x0","addr":"0x0","misc":"0x0"}"#), &[409]),
        (put("vm.inject", r#"{"vcpu":0,"bank":99,"status":"0x8000000000000000","mcg_status":"0x0","addr":"0x0","misc":"0x0"}"#), &[409]),
        (b"PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n".to_vec(), &[400]),
        (b"PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_vec(), &[400]),
        (b"PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n".to_vec(), &[400]),
        (b"PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n".to_vec(), &[413]),
        (b"PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_vec(), &[400]),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000)).into(), &[414, 431, 400]),
        (format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(500)).into(), &[431, 400]),
        (format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(1 << 20)).into(), &[431, 400, 0]),
    ];
    let files = lab::open_files(vm.pid());
    let mut before = 0;
    // What each of the API's threads sets up at its first use is no leak, so the later rounds count.
    for round in 0..12 {
        for (request, expected) in &requests {
            let start = Instant::now();
            let got = status(&socket, request);
            let took = start.elapsed();
            let shown = String::from_utf8_lossy(&request[..request.len().min(120)]);
            assert!(expected.contains(&got), "status {got}, expected {expected:?} of {shown:?}");
            assert!(took < Duration::from_secs(2), "{took:?} for {shown:?}");
        }
        if round == 5 {
            before = memory(&vm);
        }
    }
    std::thread::sleep(Duration::from_millis(300));
    let (now, open) = (memory(&vm), lab::open_files(vm.pid()));
    println!(
        "    {} requests, {before} kB before and {now} kB after, {open} files",
        requests.len()
    );
    assert!(now < before + 2048, "{before} kB before, {now} kB after");
    assert!(open <= files, "{files} files before, {open} after");
    assert!(vm.status().pages.is_empty(), "{:?}", vm.status().pages);
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// Clients that say nothing, or half of it, as many as the socket takes and more; one that sends a body
/// without end, and one that does not read what it asked for. Others are served meanwhile or as soon as the
/// silent ones are cut off, and afterwards everything is as before.
pub fn clients_that_hang() {
    let vm = Spinning::start(&[]);
    let socket = vm.socket();
    assert_eq!(status(&socket, &get("/api/v1/vm.info")), 200);
    let (files, before) = (lab::open_files(vm.pid()), memory(&vm));

    let mut endless = UnixStream::connect(&socket).unwrap();
    endless
        .write_all(
            b"PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
        .unwrap();
    let chunk = [b"10000\r\n".to_vec(), vec![b' '; 0x10000], b"\r\n".to_vec()].concat();
    let sent = (0..16_384).take_while(|_| endless.write_all(&chunk).is_ok()).count();
    println!("    a body of 1 GiB was cut off after {} MiB", sent / 16);
    assert!(sent < 1000, "{sent} chunks of 64 KiB were taken");

    let mut deaf = UnixStream::connect(&socket).unwrap();
    for _ in 0..200 {
        deaf.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        if deaf.write_all(&get("/api/v1/vm.memory?gpa=0&len=4194304")).is_err() {
            break;
        }
    }

    // One place is left: the deaf one has another.
    let mut silent: Vec<UnixStream> =
        (0..62).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    for half in silent.iter_mut().step_by(2) {
        half.write_all(b"GET /api/v1/vm.info HT").unwrap();
    }
    assert_eq!(status(&socket, &get("/api/v1/vm.info")), 200, "while they hang");
    silent.extend((0..64).map(|_| UnixStream::connect(&socket).unwrap()));
    let start = Instant::now();
    let served = status_patiently(&socket);
    println!("    served {:.1} s after all places were taken", start.elapsed().as_secs_f64());
    assert_eq!(served, 200);
    let during = memory(&vm);
    drop((silent, deaf, endless));
    let start = Instant::now();
    while lab::open_files(vm.pid()) > files && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let open = lab::open_files(vm.pid());
    println!("    {before} kB before, {during} kB with them, {files} and {open} files");
    assert!(open <= files, "{files} files before, {open} after");
    assert!(during < before + 16 * 1024, "{before} kB before, {during} kB with them");
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// The silent are cut off after five seconds, sixty-four at a time.
fn status_patiently(socket: &Path) -> u16 {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(&get("/api/v1/vm.info")).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).map_or(0, |()| {
        String::from_utf8_lossy(&answer).split(' ').nth(1).unwrap().parse().unwrap()
    })
}
