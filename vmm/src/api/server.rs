//! The API's server: connections, their limits, and the streams of events.
//!
//! One thread takes everything in; what may take its time is done by a few others. Each limit is
//! there so that no client can make the VMM's memory or descriptors grow: of headers 16 KiB, of a
//! body 1 MiB, of connections 64, of followers of events 16. A client that does not get on with it
//! is cut off.

use std::convert::Infallible;
use std::fmt::Display;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread::JoinHandle;
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use log::{debug, warn};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::routes::{self, Answer, Asked, JSON, Route};
use super::status::StatusPieces;
use super::stream::Shared;
use super::types::Current;
use crate::events::{Follower, Hub, Next, line_of};
use crate::seccomp::{Filters, Thread};
use crate::sockets::{self, BindError, BoundPath};

/// Connections at a time; more wait until one of these ends.
const MAX_CONNECTIONS: usize = 64;
/// Streams of events at a time.
const MAX_FOLLOWERS: usize = 16;
/// The longest body that a request may have, in bytes.
const MAX_BODY: usize = 1 << 20;
/// All header lines of a request together, in bytes; what is written is buffered no further either.
const MAX_BUFFER: usize = 16 << 10;
/// How long a client may take to say what it wants, also on a connection that it keeps.
const HEADER_PATIENCE: Duration = Duration::from_secs(5);
/// How long a request's body may take.
const BODY_PATIENCE: Duration = Duration::from_secs(10);
/// How long a request may take as a whole, the reading of its answer included. A stream of events may
/// last.
const REQUEST_PATIENCE: Duration = Duration::from_secs(120);
/// Threads for what may take its time.
const WORKERS: usize = 4;
/// How long clients may take for the rest of their answers when the VMM ends.
const END_PATIENCE: Duration = Duration::from_secs(1);
/// About how much of a stream of events is sent in one piece, in bytes.
const PIECE: usize = 32 << 10;

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The socket could not be made.
    #[error("cannot make the API socket {path}", path = .path.display())]
    Bind {
        /// The path asked for.
        path: PathBuf,
        /// The cause.
        #[source]
        source: BindError,
    },
}

/// The API's server. Dropping it ends its threads and removes the socket.
pub struct Api {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// The last to go, when nobody serves it any more.
    _path: BoundPath,
}

impl Api {
    /// Makes the socket at `path`, with mode 0600, and serves it on threads under `filters`.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn start(
        path: &Path,
        current: Current,
        hub: Hub,
        filters: &Filters,
    ) -> Result<Self, ApiError> {
        let bind_error = |source| ApiError::Bind { path: path.to_owned(), source };
        let (listener, bound) = sockets::bind(path).map_err(bind_error)?;
        let (stop, stopped) = oneshot::channel();
        let thread = start_serving(listener, Server::new(current, hub), stopped, filters)
            .map_err(|error| bind_error(error.into()))?;
        Ok(Self { stop: Some(stop), thread: Some(thread), _path: bound })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        // Without a receiver the thread has ended already.
        self.stop.take().map(|stop| stop.send(()));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn start_serving(
    listener: UnixListener,
    server: Server,
    stopped: oneshot::Receiver<()>,
    filters: &Filters,
) -> io::Result<JoinHandle<()>> {
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(WORKERS)
        .thread_name("api-worker")
        .build()?;
    let listener = {
        // It registers with the runtime that it is made in.
        let _inside = runtime.enter();
        tokio::net::UnixListener::from_std(listener)?
    };
    filters.spawn(Thread::Api, "api".into(), move || {
        runtime.block_on(serve(listener, Arc::new(server), stopped));
        runtime.shutdown_timeout(END_PATIENCE);
    })
}

async fn serve(
    listener: tokio::net::UnixListener,
    server: Arc<Server>,
    stopped: oneshot::Receiver<()>,
) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepting = async {
        loop {
            // The semaphore is never closed.
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(connection(stream, Arc::clone(&server), place));
                }
                Err(error) => {
                    // Out of descriptors, say, which comes and goes.
                    warn!("the API cannot take a connection: {error}");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    tokio::select! {
        () = accepting => {}
        _ = stopped => {}
    }
    // Events have come to their end; this is for what is still on its way to its reader.
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    let _ = timeout(END_PATIENCE, room.acquire_many(all)).await;
}

async fn connection(
    stream: tokio::net::UnixStream,
    server: Arc<Server>,
    place: OwnedSemaphorePermit,
) {
    let place = Arc::new(place);
    let limit = Arc::new(Limit::new());
    let for_requests = Arc::clone(&limit);
    let stream = Shared::new(stream);
    let client = stream.clone();
    let service = service_fn(move |request| {
        let (server, limit) = (Arc::clone(&server), Arc::clone(&for_requests));
        let (place, client) = (Arc::clone(&place), client.clone());
        async move { Ok::<_, Infallible>(server.answer(request, &limit, &place, client).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_PATIENCE)
        .max_buf_size(MAX_BUFFER)
        // A client that has said everything is still there for the answer.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        done = serving => {
            if let Err(error) = done {
                debug!("API client: {error}");
            }
        }
        () = limit.passed() => debug!("API client: cut off, as it takes too long"),
    }
}

/// Until when a connection's request has to be done.
struct Limit(Mutex<Option<Instant>>);

impl Limit {
    fn new() -> Self {
        Self(Mutex::new(Some(Instant::now() + REQUEST_PATIENCE)))
    }

    fn set(&self, at: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    async fn passed(&self) {
        loop {
            let at = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match at {
                Some(at) if at <= Instant::now() => return,
                Some(at) => sleep_until(at).await,
                None => sleep(REQUEST_PATIENCE).await,
            }
        }
    }
}

type Reply = Response<UnsyncBoxBody<Bytes, Infallible>>;

struct Server {
    current: Current,
    hub: Hub,
    followers: Arc<Semaphore>,
}

impl Server {
    fn new(current: Current, hub: Hub) -> Self {
        Self { current, hub, followers: Arc::new(Semaphore::new(MAX_FOLLOWERS)) }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        limit: &Limit,
        place: &Arc<OwnedSemaphorePermit>,
        client: Shared,
    ) -> Reply {
        limit.set(Some(Instant::now() + REQUEST_PATIENCE));
        let (head, body) = request.into_parts();
        let too_long =
            || whole(Answer::problem(413, format!("the body is longer than {MAX_BODY} bytes")));
        if body.size_hint().lower() > MAX_BODY as u64 {
            return too_long();
        }
        let body = match timeout(BODY_PATIENCE, Limited::new(body, MAX_BODY).collect()).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
                return too_long();
            }
            Ok(Err(error)) => {
                return whole(Answer::problem(400, format!("the body cannot be read: {error}")));
            }
            Err(_) => {
                let words = format!("the body did not come within {} s", BODY_PATIENCE.as_secs());
                return whole(Answer::problem(408, words));
            }
        };
        let route = match Route::find(head.method.as_str(), head.uri.path()) {
            Ok(route) => route,
            Err(answer) => return whole(answer),
        };
        if route == Route::Events {
            return match routes::follows(head.uri.query()) {
                Ok(follow) => self.events(follow, limit, client),
                Err(error) => whole(Answer::problem(400, error)),
            };
        }
        if route == Route::Status
            && head.uri.query().is_none_or(str::is_empty)
            && let Some(running) =
                self.current.get().filter(|running| StatusPieces::are_many(&running.relay))
        {
            let info = running.info();
            return pieces(StatusPieces::new(running.relay, &info), JSON);
        }
        let (current, hub) = (self.current.clone(), self.hub.clone());
        if route.is_quick() {
            // Not behind those who wait for a vCPU.
            let asked = Asked { route, query: head.uri.query(), body: &body };
            return whole(routes::answer(&asked, &current, &hub));
        }
        // The place is kept until the work is done, also of a client that has gone away.
        let place = Arc::clone(place);
        let work = tokio::task::spawn_blocking(move || {
            let _place = place;
            routes::answer(&Asked { route, query: head.uri.query(), body: &body }, &current, &hub)
        });
        match work.await {
            Ok(answer) => whole(answer),
            Err(error) => whole(failed(&error)),
        }
    }

    fn events(&self, follow: bool, limit: &Limit, client: Shared) -> Reply {
        let Ok(place) = Arc::clone(&self.followers).try_acquire_owned() else {
            let words = format!("{MAX_FOLLOWERS} clients read events already; end one of them");
            return whole(Answer::problem(503, words));
        };
        if follow {
            limit.set(None);
        }
        let (follower, gone) = (self.hub.follow(), Box::pin(client.gone()));
        let events = Events { follower, follow, gone, ended: false, _place: place };
        pieces(events, "application/x-ndjson")
    }
}

fn failed(error: &dyn Display) -> Answer {
    warn!("an API request failed: {error}");
    Answer::problem(500, "this request failed inside the VMM; its log says more".to_owned())
}

fn kind(kind: &'static str) -> hyper::header::HeaderValue {
    hyper::header::HeaderValue::from_static(kind)
}

/// An answer that is made while it is sent.
fn pieces(
    body: impl Body<Data = Bytes, Error = Infallible> + Send + 'static,
    of: &'static str,
) -> Reply {
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, kind(of));
    response
}

fn whole(answer: Answer) -> Reply {
    let Answer { status, kind: content, body, allow } = answer;
    let mut response = Response::new(Full::new(Bytes::from(body)).boxed_unsync());
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if let Some(content) = content {
        response.headers_mut().insert(CONTENT_TYPE, kind(content));
    }
    if let Some(allow) = allow {
        response.headers_mut().insert(ALLOW, kind(allow));
    }
    response
}

/// A stream of events. It is asked for more only when what it gave has gone out, so a client that does
/// not read holds back nothing but itself. It ends when the client goes, also where nothing happens that
/// could be written to it.
struct Events {
    follower: Follower,
    follow: bool,
    /// The client has closed its end.
    gone: Pin<Box<dyn Future<Output = ()> + Send>>,
    ended: bool,
    _place: OwnedSemaphorePermit,
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let mut piece = String::new();
        while !self.ended && piece.len() < PIECE {
            let next = match self.follower.take() {
                Some(next) => next,
                None if !self.follow => Next::End,
                None if !piece.is_empty() => break,
                None if self.gone.as_mut().poll(context).is_ready() => Next::End,
                None => ready!(self.follower.poll(context)),
            };
            match line_of(&next) {
                Some(line) => piece.push_str(&line),
                None => self.ended = true,
            }
        }
        let frame = (!piece.is_empty()).then(|| Ok(Frame::data(Bytes::from(piece))));
        Poll::Ready(frame)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use serde_json::Value;
    use tempfile::TempDir;

    use super::*;
    use crate::api::VmInfo;
    use crate::client;
    use crate::events::hub::KEPT;
    use crate::events::{VmEvent, What};

    const FOLLOW: &str = "GET /api/v1/relay.events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n";

    fn served() -> (TempDir, PathBuf, Hub, Api) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let hub = Hub::default();
        let api = Api::start(&path, Current::default(), hub.clone(), &Filters::default()).unwrap();
        (dir, path, hub, api)
    }

    fn ask(path: &Path, request: &str) -> UnixStream {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    fn status_of(stream: UnixStream) -> String {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    }

    #[test]
    fn a_path_that_exists_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        std::fs::write(&path, "mine").unwrap();
        let error = Api::start(&path, Current::default(), Hub::default(), &Filters::default())
            .err()
            .unwrap();
        assert!(matches!(error, ApiError::Bind { source: BindError::Exists, .. }), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn the_socket_is_its_owners_and_goes_with_the_server() {
        let (_dir, path, _hub, api) = served();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let ping: Value = client::get(&path, "vmm.ping").unwrap();
        assert_eq!(ping["pid"], std::process::id());
        let error = client::get::<VmInfo>(&path, "vm.info").unwrap_err().to_string();
        assert!(error.contains("between two boots"), "{error}");
        let error = client::get::<VmInfo>(&path, "nothing").unwrap_err().to_string();
        assert!(error.contains("/api/v1/nothing"), "{error}");
        let error = client::put(&path, "vmm.ping").unwrap_err().to_string();
        assert!(error.contains("PUT"), "{error}");
        drop(api);
        assert!(!path.exists());
    }

    #[test]
    fn whoever_is_slow_holds_up_nobody() {
        let (_dir, path, _hub, _api) = served();
        let _silent = UnixStream::connect(&path).unwrap();
        let _half = ask(&path, "PUT /api/v1/vm.retire HTTP/1.1\r\nHos");
        let length = "PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{";
        let _body: Vec<UnixStream> = (0..8).map(|_| ask(&path, length)).collect();
        for _ in 0..3 {
            client::get::<Value>(&path, "vmm.ping").unwrap();
        }
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let (_dir, path, _hub, _api) = served();
        let announced =
            "PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n";
        let status = status_of(ask(&path, announced));
        assert!(status.contains("413"), "{status}");

        let mut chunks = ask(
            &path,
            "PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        );
        let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
        // It is cut off somewhere on the way.
        let sent = (0..1000).take_while(|_| chunks.write_all(chunk.as_bytes()).is_ok()).count();
        assert!(sent < 1000, "{sent} chunks of 64 KiB were taken");

        let mut header = ask(&path, "GET /api/v1/vmm.ping HTTP/1.1\r\nX: ");
        let sent = (0..10_000).take_while(|_| header.write_all(&[b'x'; 1024]).is_ok()).count();
        assert!(sent < 1000, "{sent} KiB of a header were taken");
        client::get::<Value>(&path, "vmm.ping").unwrap();
    }

    #[test]
    fn events_are_streamed_and_come_to_an_end() {
        let (_dir, path, hub, api) = served();
        let emit = |count| (0..count).for_each(|_| hub.emit(What::Vm(VmEvent::Resumed {})));
        emit(3);
        let kept = client::get_bytes(&path, "relay.events").unwrap();
        assert_eq!(kept.split(|byte| *byte == b'\n').count(), 3 + 1);

        let mut stream =
            ask(&path, "GET /api/v1/relay.events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n");
        let mut got = vec![0; 64];
        stream.read_exact(&mut got).unwrap();
        emit(5);
        hub.end();
        drop(api);
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        got.extend(rest);
        let text = String::from_utf8(got).unwrap();
        assert_eq!(text.matches("resumed").count(), 8, "{text}");
        assert!(text.ends_with("0\r\n\r\n"), "the stream is complete: {text}");
    }

    #[test]
    fn a_client_that_has_said_everything_gets_its_answer() {
        let (_dir, path, hub, _api) = served();
        let mut stream =
            ask(&path, "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("\"pid\""), "{answer}");

        // One that follows events goes on getting them.
        let mut follower = ask(&path, FOLLOW);
        follower.shutdown(std::net::Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        hub.emit(What::Vm(VmEvent::Resumed {}));
        hub.end();
        let mut events = String::new();
        follower.read_to_string(&mut events).unwrap();
        assert_eq!(events.matches("resumed").count(), 1, "{events}");
    }

    /// Nothing happens, so nothing is written to those who have gone.
    #[test]
    fn a_follower_that_goes_gives_its_place_back_at_once() {
        let (_dir, path, hub, _api) = served();
        hub.emit(What::Vm(VmEvent::Resumed {}));
        let follow = || {
            let mut head = BufReader::new(ask(&path, FOLLOW));
            let mut line = String::new();
            head.read_line(&mut line).unwrap();
            (line, head)
        };
        for round in 0..4 {
            let start = Instant::now();
            let mut followers = Vec::new();
            while followers.len() < MAX_FOLLOWERS {
                let (status, follower) = follow();
                match status.contains("200") {
                    true => followers.push(follower),
                    false => {
                        assert!(start.elapsed() < Duration::from_secs(20), "{round}: {status}")
                    }
                }
            }
            let (status, _) = follow();
            assert!(status.contains("503"), "{round}: {status}");
            for follower in &followers {
                // Some say first that they have nothing more to say.
                if round % 2 == 1 {
                    follower.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
                }
            }
        }
        assert!(hub.waiting() <= MAX_FOLLOWERS, "{} are kept to be woken", hub.waiting());
    }

    #[test]
    fn a_follower_that_does_not_read_is_told_what_it_missed() {
        let (_dir, path, hub, _api) = served();
        let stuck = ask(&path, "GET /api/v1/relay.events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n");
        let mut stuck = BufReader::new(stuck);
        let mut line = String::new();
        hub.emit(What::Vm(VmEvent::Resumed {}));
        while !line.contains("resumed") {
            line.clear();
            stuck.read_line(&mut line).unwrap();
        }
        let count = 2 * KEPT as u64;
        (0..count).for_each(|_| hub.emit(What::Vm(VmEvent::Resumed {})));
        let (mut got, mut missed) = (0, 0);
        while got + missed < count {
            line.clear();
            stuck.read_line(&mut line).unwrap();
            match serde_json::from_str::<Value>(&line) {
                Ok(event) if event["event"] == "missed" => {
                    assert_eq!(event["source"], "monitor");
                    missed += event["properties"]["events"].as_u64().unwrap();
                }
                Ok(event) if event["event"] == "resumed" => got += 1,
                // The sizes of chunks.
                _ => {}
            }
        }
        assert_eq!(got + missed, count);
        assert!(missed > 0);
    }
}
