//! Logs, metrics and health: one tracing set-up, one metrics registry, one plain-HTTP server for all binaries.
//!
//! The server answers `/healthz` (the process serves requests), `/readyz` (every [`Gate`] is open) and `/metrics`
//! (OpenMetrics text). It carries no secret and needs no TLS.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// How long open scrapes may take to finish once the process shuts down. A scrape takes milliseconds.
const DRAIN: Duration = Duration::from_secs(2);

/// The shape of log lines. Parses from `text` and `json`, so that it can be a command-line flag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people at a terminal.
    #[default]
    Text,
    /// One JSON object per line, for log collectors.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("log format {other:?} is not known: use text or json")),
        }
    }
}

/// Sends logs to standard error. `filter` is an env-filter directive such as `info` or `info,howdah_scheduler=debug`.
///
/// # Errors
/// If the filter does not parse, or a subscriber was installed before.
pub fn init_tracing(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)
        .with_context(|| format!("parse the log filter {filter:?}: use e.g. info"))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Colour codes in a container's log are noise.
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|cause| anyhow::anyhow!("install the log subscriber: {cause}"))
}

/// A registry whose metrics all begin with `howdah_`, with `howdah_build_info{component, version}` in it.
#[must_use]
pub fn registry(component: &'static str, version: &'static str) -> Registry {
    let mut registry = Registry::with_prefix("howdah");
    let info = Info::new([("component", component), ("version", version)]);
    registry.register("build", "The component and version of this process", info);
    registry
}

/// Whether the process may be sent work: the conjunction of named gates. Clones share the state.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    gates: Arc<Mutex<BTreeMap<&'static str, bool>>>,
}

impl Readiness {
    /// No gates: ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition, closed at first. Its name is what `/readyz` shows while it is closed.
    #[must_use]
    pub fn gate(&self, name: &'static str) -> Gate {
        self.set(name, false);
        Gate { readiness: self.clone(), name }
    }

    /// The names of the gates that are closed; empty means ready.
    #[must_use]
    pub fn closed(&self) -> Vec<&'static str> {
        let gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.iter().filter(|(_, open)| !**open).map(|(name, _)| *name).collect()
    }

    fn set(&self, name: &'static str, open: bool) {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner).insert(name, open);
    }
}

/// One condition of [`Readiness`].
#[derive(Clone, Debug)]
pub struct Gate {
    readiness: Readiness,
    name: &'static str,
}

impl Gate {
    /// The condition holds.
    pub fn open(&self) {
        self.readiness.set(self.name, true);
    }

    /// The condition no longer holds; at shutdown this comes first, so that no new work arrives.
    pub fn close(&self) {
        self.readiness.set(self.name, false);
    }
}

/// The bound but not yet serving diagnostics server.
#[derive(Debug)]
pub struct Diagnostics {
    listener: TcpListener,
    router: Router,
}

#[derive(Clone)]
struct Shared {
    registry: Arc<Registry>,
    readiness: Readiness,
}

impl Diagnostics {
    /// Binds the address, so that a port in use fails the start and not a later scrape.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn bind(address: SocketAddr, registry: Registry, readiness: Readiness) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("bind the diagnostics server to {address}"))?;
        let router = Router::new()
            .route("/healthz", get(async || "ok"))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(Shared { registry: Arc::new(registry), readiness });
        Ok(Self { listener, router })
    }

    /// The bound address; tells the port where port 0 was asked for.
    ///
    /// # Errors
    /// If the system does not know it.
    pub fn local_address(&self) -> anyhow::Result<SocketAddr> {
        self.listener.local_addr().context("read the diagnostics server's address")
    }

    /// Serves until `shutdown` is cancelled, then finishes the open requests within two seconds.
    ///
    /// # Errors
    /// If accepting fails for good.
    pub async fn serve(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let stop = shutdown.clone();
        let serving = axum::serve(self.listener, self.router)
            .with_graceful_shutdown(async move { stop.cancelled().await })
            .into_future();
        tokio::select! {
            ended = serving => ended.context("serve diagnostics"),
            () = async { shutdown.cancelled().await; tokio::time::sleep(DRAIN).await } => Ok(()),
        }
    }
}

async fn readyz(State(shared): State<Shared>) -> Response {
    let closed = shared.readiness.closed();
    if closed.is_empty() {
        return "ok".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", closed.join(", "))).into_response()
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &shared.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(cause) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("encode metrics: {cause}\n")).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn readiness_follows_its_gates_and_names_the_closed_one() {
        let readiness = Readiness::new();
        let certificates = readiness.gate("certificates");
        let leader = readiness.gate("leader");
        leader.open();
        let registry = registry("test", "1.2.3");
        let server = Diagnostics::bind(([127, 0, 0, 1], 0).into(), registry, readiness).await.unwrap();
        let address = server.local_address().unwrap();
        let token = CancellationToken::new();
        let serving = tokio::spawn(server.serve(token.clone()));

        let waiting = get(address, "/readyz").await;
        assert!(waiting.starts_with("HTTP/1.1 503"), "{waiting}");
        assert!(waiting.ends_with("waiting for: certificates\n"), "{waiting}");
        certificates.open();
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        certificates.close();
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let metrics = get(address, "/metrics").await;
        assert!(metrics.contains(r#"howdah_build_info{component="test",version="1.2.3"} 1"#), "{metrics}");

        token.cancel();
        serving.await.unwrap().unwrap();
    }

    #[test]
    fn an_unknown_log_format_names_the_known_ones() {
        assert_eq!("json".parse::<LogFormat>(), Ok(LogFormat::Json));
        assert!("xml".parse::<LogFormat>().unwrap_err().contains("text or json"));
    }
}
