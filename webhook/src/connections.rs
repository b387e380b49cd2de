//! The connections to the TLS port: how many at a time, how long each may do nothing, and which one goes when there is
//! no room.
//!
//! Whoever reaches the port can open connections. The API server has to get one even while somebody else holds all of
//! them, so a new connection takes the place of the one that matters least: first those that have not had a review
//! answered yet, the oldest first, then those that have and wait for nothing, the longest idle first.

use std::collections::BTreeMap;
use std::future::{Ready, ready};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::http::{Request, Response, StatusCode};
use axum_server::Server;
use axum_server::accept::Accept;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tower::Service;
use tracing::{debug, warn};

/// Longest head of a request; what the API server sends is far below 1 KiB. Also what one connection buffers.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Shortest time between two warnings about refused clients: whoever causes them may cause many.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// What connections may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at a time. An API server keeps 25 idle ones to a webhook; this is room for several of them, below the
    /// 1024 open files that a process may have by default, and at about 100 KiB each it bounds their memory.
    pub connections: usize,
    /// Time for the handshake.
    pub handshake: Duration,
    /// Time for the first whole head of a request, and between two requests. The API server closes a connection that was
    /// idle for 90 s: it must be the first to do so, or a request may cross the close and fail, because it does not send
    /// it again. That goes for one without a request, too: Go's client opens more than it needs at the moment, and keeps
    /// them (net/http, `Transport.dialConnFor`).
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 512, handshake: Duration::from_secs(10), idle: Duration::from_secs(120) }
    }
}

/// A server on the listener, with TLS and these limits.
///
/// # Errors
/// If the listener cannot be used.
pub fn server(
    listener: TcpListener,
    tls: RustlsConfig,
    limits: &Limits,
) -> io::Result<Server<SocketAddr, RustlsAcceptor<Connections>>> {
    let acceptor = RustlsAcceptor::new(tls).handshake_timeout(limits.handshake);
    Ok(limited(listener, limits)?.map(|connections| acceptor.acceptor(connections)))
}

fn limited(listener: TcpListener, limits: &Limits) -> io::Result<Server<SocketAddr, Connections>> {
    let mut server =
        axum_server::from_tcp(listener)?.acceptor(Connections::new(limits.connections)).http1_only();
    // Hyper's header timeout runs from the beginning, and while a connection is idle, too.
    server.http_builder().http1().header_read_timeout(limits.idle).max_buf_size(HEAD_BYTES_MAX);
    Ok(server)
}

/// Says why a connection came to nothing: quietly, because anybody can cause it, unless client certificates are
/// demanded. Then it may be the API server that is refused, and every protected StatefulSet with it.
pub fn report_failures(
    clients_demanded: bool,
) -> impl Fn(Option<&SocketAddr>, &io::Error) + Send + Sync + 'static {
    let warned: Mutex<Option<Instant>> = Mutex::new(None);
    move |peer, error| {
        let peer = peer.map(ToString::to_string);
        let mut warned = warned.lock().unwrap_or_else(PoisonError::into_inner);
        if clients_demanded && warned.is_none_or(|last| last.elapsed() > WARN_EVERY) {
            *warned = Some(Instant::now());
            warn!(peer, %error, "a client failed to connect; --client-ca is set, so the API server needs a client certificate");
        } else {
            debug!(peer, %error, "a client failed to connect");
        }
    }
}

/// The open connections.
#[derive(Debug, Clone)]
pub struct Connections {
    max: usize,
    open: Arc<Mutex<Open>>,
}

#[derive(Debug, Default)]
struct Open {
    next_id: u64,
    by_id: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    worth: Worth,
    /// When it became that.
    since: Instant,
    end: Arc<End>,
}

/// What a connection is worth, the least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Worth {
    /// No review was answered over it: it may be anything.
    Unproven,
    /// It has carried a review and waits for the next.
    Idle,
    /// It carries a review, and not the first. Never taken away.
    Busy,
}

/// Ends a connection from outside.
#[derive(Debug, Default)]
struct End {
    asked: AtomicBool,
    connection: AtomicWaker,
}

impl Connections {
    fn new(max: usize) -> Self {
        Self { max, open: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection, taken from another one if need be.
    fn enter(&self) -> io::Result<Arc<Place>> {
        let mut open = self.lock();
        if open.by_id.len() >= self.max {
            let spare = open.by_id.iter().filter(|(_, entry)| entry.worth < Worth::Busy);
            let Some(id) = spare.min_by_key(|(_, entry)| (entry.worth, entry.since)).map(|(id, _)| *id)
            else {
                return Err(io::Error::other(format!("all {} connections carry reviews", self.max)));
            };
            if let Some(entry) = open.by_id.remove(&id) {
                entry.end.asked.store(true, Ordering::SeqCst);
                entry.end.connection.wake();
            }
        }
        let (id, end) = (open.next_id, Arc::<End>::default());
        open.next_id += 1;
        let entry = Entry { worth: Worth::Unproven, since: Instant::now(), end: Arc::clone(&end) };
        open.by_id.insert(id, entry);
        drop(open);
        Ok(Arc::new(Place { id, connections: self.clone(), end }))
    }
}

/// The place of one connection; it is free again when this is dropped.
#[derive(Debug)]
struct Place {
    id: u64,
    connections: Connections,
    end: Arc<End>,
}

impl Place {
    /// A request begins.
    fn begin(&self) {
        if let Some(entry) = self.connections.lock().by_id.get_mut(&self.id)
            && entry.worth == Worth::Idle
        {
            entry.worth = Worth::Busy;
        }
    }

    /// A request was answered.
    fn answered(&self, status: StatusCode) {
        if let Some(entry) = self.connections.lock().by_id.get_mut(&self.id)
            && (entry.worth == Worth::Busy || status == StatusCode::OK)
        {
            entry.worth = Worth::Idle;
            entry.since = Instant::now();
        }
    }

    /// An error once somebody else has this place; until then the task of `context` is woken when that happens.
    fn check(&self, context: &Context<'_>) -> io::Result<()> {
        self.end.connection.register(context.waker());
        if self.end.asked.load(Ordering::SeqCst) {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "a newer connection took its place",
            ));
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.lock().by_id.remove(&self.id);
    }
}

impl<S> Accept<TcpStream, S> for Connections {
    type Stream = Limited;
    type Service = Proving<S>;
    type Future = Ready<io::Result<(Limited, Proving<S>)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        // An answer of several packets must not wait for the client to acknowledge the first.
        let accepted = stream
            .set_nodelay(true)
            .and_then(|()| self.enter())
            .map(|place| (Limited { stream, place: Arc::clone(&place) }, Proving { inner: service, place }));
        ready(accepted)
    }
}

/// A connection that can be ended from outside.
#[derive(Debug)]
pub struct Limited {
    stream: TcpStream,
    place: Arc<Place>,
}

impl AsyncRead for Limited {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.place.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Limited {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.place.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.place.check(context)?;
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Notes which requests the connection carries.
#[derive(Debug, Clone)]
pub struct Proving<S> {
    inner: S,
    place: Arc<Place>,
}

impl<S, In, Out> Service<Request<In>> for Proving<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<In>) -> Self::Future {
        self.place.begin();
        let (place, answer) = (Arc::clone(&self.place), self.inner.call(request));
        Box::pin(async move {
            let answer = answer.await;
            if let Ok(answer) = &answer {
                place.answered(answer.status());
            }
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    /// Longest wait for something that comes at once on an idle machine.
    const SOON: Duration = Duration::from_secs(30);
    const NEVER: Duration = Duration::from_secs(3600);

    /// A server with these limits, without TLS. `/slow` answers after a second.
    async fn serve(limits: Limits) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let slow = async || tokio::time::sleep(Duration::from_secs(1)).await;
        let router = Router::new().route("/", get(async || "answer")).route("/slow", get(slow));
        tokio::spawn(limited(listener, &limits).unwrap().serve(router.into_make_service()));
        address
    }

    async fn request(stream: &mut TcpStream, path: &str) -> String {
        let head = format!("GET {path} HTTP/1.1\r\nhost: webhook\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 4096];
        let length = timeout(SOON, stream.read(&mut answer)).await.unwrap().unwrap();
        String::from_utf8_lossy(&answer[..length]).into_owned()
    }

    /// Whether the server has closed this connection, which is waited for.
    async fn is_closed(stream: &mut TcpStream) -> bool {
        // Data that nobody read makes it a reset.
        !matches!(timeout(SOON, stream.read(&mut [0])).await, Ok(Ok(1)) | Err(_))
    }

    #[tokio::test]
    async fn a_new_connection_takes_the_place_of_the_oldest_that_proved_nothing() {
        let address = serve(Limits { connections: 3, handshake: NEVER, idle: NEVER }).await;
        let mut proven = TcpStream::connect(address).await.unwrap();
        assert!(request(&mut proven, "/").await.starts_with("HTTP/1.1 200"));
        let mut idle = Vec::new();
        for _ in 0..20 {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        for stream in &mut idle[..18] {
            assert!(is_closed(stream).await);
        }
        let mut new = TcpStream::connect(address).await.unwrap();
        assert!(request(&mut new, "/").await.starts_with("HTTP/1.1 200"));
        assert!(
            request(&mut proven, "/").await.starts_with("HTTP/1.1 200"),
            "it outlives those that prove nothing"
        );
    }

    #[tokio::test]
    async fn among_the_proven_the_longest_idle_goes_and_a_busy_one_stays() {
        let address = serve(Limits { connections: 2, handshake: NEVER, idle: NEVER }).await;
        let mut busy = TcpStream::connect(address).await.unwrap();
        request(&mut busy, "/").await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        request(&mut idle, "/").await;
        // The first has been idle for longer, until now.
        let under_way = tokio::spawn(async move { request(&mut busy, "/slow").await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut new = TcpStream::connect(address).await.unwrap();
        assert!(is_closed(&mut idle).await);
        assert!(request(&mut new, "/").await.starts_with("HTTP/1.1 200"));
        assert!(under_way.await.unwrap().starts_with("HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn a_connection_that_only_gets_refusals_proves_nothing() {
        let address = serve(Limits { connections: 2, handshake: NEVER, idle: NEVER }).await;
        let mut refused = TcpStream::connect(address).await.unwrap();
        assert!(request(&mut refused, "/nowhere").await.starts_with("HTTP/1.1 404"));
        let mut proven = TcpStream::connect(address).await.unwrap();
        request(&mut proven, "/").await;
        let mut new = TcpStream::connect(address).await.unwrap();
        assert!(is_closed(&mut refused).await);
        assert!(request(&mut new, "/").await.starts_with("HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn slow_heads_end_before_the_first_request_and_after_it() {
        let soon = Duration::from_millis(300);
        let address = serve(Limits { connections: 9, handshake: NEVER, idle: soon }).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"POST /validate HTTP/1.1\r\nhost: w").await.unwrap();
        let mut slow_later = TcpStream::connect(address).await.unwrap();
        request(&mut slow_later, "/").await;
        slow_later.write_all(b"POST /validate HTTP/1.1\r\nhost: w").await.unwrap();
        assert!(
            is_closed(&mut silent).await && is_closed(&mut slow).await && is_closed(&mut slow_later).await
        );
    }

    #[test]
    fn the_api_server_is_the_first_to_close_a_connection() {
        // k8s.io/apimachinery, util/net, http.go: IdleConnTimeout of the transport that webhooks are called with.
        const API_SERVER_IDLE: Duration = Duration::from_secs(90);
        assert!(Limits::default().idle > API_SERVER_IDLE + Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_head_has_a_limit() {
        let address = serve(Limits::default()).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET / HTTP/1.1\r\nhost: w\r\nx: {}\r\n\r\n", "x".repeat(2 * HEAD_BYTES_MAX));
        // The server may close before it has read everything.
        let _ = stream.write_all(head.as_bytes()).await;
        let mut answer = vec![0; 4096];
        let length = timeout(SOON, stream.read(&mut answer)).await.unwrap().unwrap();
        answer.truncate(length);
        assert!(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 431"));
    }
}
