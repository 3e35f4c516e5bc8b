//! The API's server: connections, their limits, and the streams of events.
//!
//! One thread accepts connections and requests; a few others do what may take long. The limits keep a client from
//! making the VMM's memory or descriptors grow: headers of 16 KiB, a body of 1 MiB, 64 connections, 16 followers of
//! events. A client that does not make progress is cut off.

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

use super::current::Current;
use super::routes::{self, Answer, Asked, JSON, Route};
use super::status::StatusPieces;
use super::stream::Shared;
use crate::events::entry::Next;
use crate::events::hub::{Follower, Hub};
use crate::events::lines::line_of;
use crate::outlets::sockets::{self, BindError, BoundPath};
use crate::sandbox::role::Role;
use crate::sandbox::seccomp::Filters;

/// Connections at a time; more wait until one of these ends.
const MAX_CONNECTIONS: usize = 64;
/// Streams of events at a time.
pub const MAX_FOLLOWERS: usize = 16;
/// The longest body that a request may have, in bytes.
const MAX_BODY: usize = 1 << 20;
/// All header lines of a request together, in bytes; output is buffered up to the same length.
const MAX_BUFFER: usize = 16 << 10;
/// How long a client may take to send the headers of a request, also of a further one on the same connection.
const HEADER_PATIENCE: Duration = Duration::from_secs(5);
/// How long a request's body may take.
const BODY_PATIENCE: Duration = Duration::from_secs(10);
/// How long a request may take as a whole, reading the answer included. Streams of events have no such limit.
const REQUEST_PATIENCE: Duration = Duration::from_secs(120);
/// Threads for requests that may take long.
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
    /// Dropped last, when nothing serves the socket any more.
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
        // The send fails only if the thread has ended already.
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
        // The listener registers with the runtime that is entered.
        let _inside = runtime.enter();
        tokio::net::UnixListener::from_std(listener)?
    };
    filters.spawn(Role::Api, "api".into(), move || {
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
                    // Out of descriptors, say, which may pass.
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
    // The streams of events have ended; this waits for answers that are still being sent.
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
        // A client that has closed its writing half still waits for the answer.
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

/// The deadline of a connection's request, if it has one.
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
            // Answered here, so that it does not wait behind requests that wait for a vCPU.
            let asked = Asked { route, query: head.uri.query(), body: &body };
            return whole(routes::answer(&asked, &current, &hub));
        }
        // The place counts until the work is done, also if the client has gone.
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

/// An answer whose body is made while it is sent.
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

/// A stream of events. The next piece is made only when the last one was sent, so a client that does not read holds up
/// only itself. The stream ends when the client goes, even while there is no event to write to it.
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
