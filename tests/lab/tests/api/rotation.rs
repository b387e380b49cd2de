//! Rotation under load: authority and leaf change, replicas go and come, and no review fails.
//!
//! The client does what API servers, endpoints and kube-proxy do together: it trusts the `caBundle` of the moment and opens
//! new connections at once when that changes, sends new connections only to replicas that are ready, keeps the others
//! as long as their server does, and tries nothing twice.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use howdah_lab::netns;
use howdah_lab::reviews::{Connection, request, trust};
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::certs::protected;
use crate::webhook::{Webhook, plain_get};

/// Connections that are kept, each with a client of its own.
const CLIENTS: usize = 20;
/// Time from one review of a client to its next: together they aim at 1,000 a second.
const INTERVAL: Duration = Duration::from_millis(20);
/// Every so many reviews goes over a new connection that is not kept.
const FRESH_EVERY: usize = 10;
/// Most reviews; at the full rate they last for minutes, longer than everything that has to happen.
const REVIEWS_MAX: usize = 300_000;
/// How often the replicas are asked whether they are ready.
const PROBE_EVERY: Duration = Duration::from_millis(100);
/// Memory of a replica under this load: 39 to 41 MiB were seen of a debug build, and 49 to 52 without the deployment's
/// `MIMALLOC_ARENA_EAGER_COMMIT`.
const MEMORY_KIB: u64 = 46 * 1024;
/// Failures that are kept to be shown.
const SHOWN_MAX: usize = 20;

/// What the clients share.
struct Load {
    trusted: RwLock<Arc<ClientConfig>>,
    ready: RwLock<Vec<SocketAddr>>,
    requests: [Vec<u8>; 2],
    stop: AtomicBool,
    reviews: AtomicUsize,
    connections: AtomicUsize,
    failures: Mutex<Vec<String>>,
    started: Instant,
}

impl Load {
    /// One client: reviews at its share of the rate, over one connection that it keeps and some that it does not.
    fn client(&self, index: usize) {
        let mut trusted = Arc::clone(&self.trusted.read().unwrap());
        let mut kept: Option<Connection> = None;
        for turn in 0.. {
            if self.stop.load(Ordering::Relaxed) || self.reviews.load(Ordering::Relaxed) >= REVIEWS_MAX {
                return;
            }
            let now = Arc::clone(&self.trusted.read().unwrap());
            if !Arc::ptr_eq(&trusted, &now) {
                // The API server keeps its connections by what it trusts.
                (trusted, kept) = (now, None);
            }
            let fresh = turn % FRESH_EVERY == index % FRESH_EVERY;
            let connection = if fresh { None } else { kept.take() };
            match self.review(connection, &trusted, turn + index) {
                Ok(connection) if !fresh => kept = connection,
                Ok(_) => {}
                Err(error) => {
                    let mut failures = self.failures.lock().unwrap();
                    if failures.len() < SHOWN_MAX {
                        failures.push(format!("after {:?}: {error:#}", self.started.elapsed()));
                    }
                }
            }
            let due = INTERVAL * u32::try_from(turn).unwrap();
            std::thread::sleep(due.saturating_sub(self.started.elapsed()));
        }
    }

    /// One review; the connection when it may be used again.
    fn review(
        &self,
        connection: Option<Connection>,
        trusted: &Arc<ClientConfig>,
        choice: usize,
    ) -> anyhow::Result<Option<Connection>> {
        let mut connection = match connection {
            Some(connection) => connection,
            None => {
                let ready = self.ready.read().unwrap().clone();
                anyhow::ensure!(!ready.is_empty(), "no replica is ready");
                self.connections.fetch_add(1, Ordering::Relaxed);
                Connection::open(ready[choice % ready.len()], Arc::clone(trusted))?
            }
        };
        self.reviews.fetch_add(1, Ordering::Relaxed);
        let answer = connection.send(&self.requests[choice % 2])?;
        let body: Value = serde_json::from_slice(&answer.body)?;
        let response = &body["response"];
        anyhow::ensure!(
            answer.status == 200 && response["uid"] == "rotation" && response["allowed"] == true,
            "answered {}: {body}",
            answer.status
        );
        Ok((!answer.closes).then_some(connection))
    }

    /// Which replicas get new connections: those that say that they are ready.
    fn follow_readiness(&self, replicas: [(SocketAddr, SocketAddr); 2]) {
        while !self.stop.load(Ordering::Relaxed) {
            let is_ready = |diagnostics| {
                plain_get(diagnostics, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
            };
            let now = replicas.iter().filter(|(_, diagnostics)| is_ready(*diagnostics));
            *self.ready.write().unwrap() = now.map(|(reviews, _)| *reviews).collect();
            std::thread::sleep(PROBE_EVERY);
        }
    }
}

/// What the API server trusts: the bundle of the configuration, as soon as a watch tells of it; counts the bundles.
async fn follow_bundles(client: Client, configuration: String, load: Arc<Load>, seen: Arc<AtomicUsize>) {
    let api = Api::<ValidatingWebhookConfiguration>::all(client);
    let only = watcher::Config::default().fields(&format!("metadata.name={configuration}"));
    let mut changes = watcher(api, only).default_backoff().applied_objects().boxed();
    let mut last = Vec::new();
    while let Some(configuration) = changes.next().await {
        // A watch that is interrupted opens again by itself.
        let Ok(configuration) = configuration else { continue };
        let hook = configuration.webhooks.unwrap_or_default().swap_remove(0);
        let Some(bundle) = hook.client_config.ca_bundle.filter(|bundle| bundle.0 != last) else { continue };
        last = bundle.0;
        *load.trusted.write().unwrap() = trust(&String::from_utf8_lossy(&last), None).unwrap();
        seen.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_review_fails_while_certificates_rotate_and_replicas_roll() {
    // A third of its life before its end each is renewed: leaves every 8 s, the authority after 16 s. A client hears of a
    // new bundle or of a replica that ends within a fraction of the time it is given, on a busy machine, too.
    let flags = [
        ["--ca-lifetime-seconds", "24"],
        ["--certificate-lifetime-seconds", "12"],
        ["--settle-seconds", "4"],
        ["--propagation-seconds", "4"],
        ["--log", "warn,howdah_certs=info"],
    ]
    .concat();
    let mut webhook = Webhook::absent().await;
    webhook.install(&flags, 2);
    let bundle = webhook.bundles().await.remove(0);
    let replicas = [0, 1].map(|index| (webhook.replica(index).reviews, webhook.replica(index).diagnostics));
    let review = json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "rotation",
            "resource": {"group": "apps", "version": "v1", "resource": "statefulsets"},
            "operation": "UPDATE",
            "namespace": "rotation",
            "name": "pg",
            "userInfo": {"username": "somebody"},
            "object": protected("pg"),
            "oldObject": protected("pg"),
        },
    })
    .to_string();
    let load = Arc::new(Load {
        trusted: RwLock::new(trust(&bundle, None).unwrap()),
        ready: RwLock::new(replicas.map(|(reviews, _)| reviews).to_vec()),
        requests: ["/mutate", "/validate"].map(|path| request(path, review.as_bytes())),
        stop: AtomicBool::new(false),
        reviews: AtomicUsize::new(0),
        connections: AtomicUsize::new(0),
        failures: Mutex::default(),
        started: Instant::now(),
    });
    let bundles = Arc::new(AtomicUsize::new(0));
    let name = webhook.namespace.name().to_owned();
    tokio::spawn(follow_bundles(webhook.client.clone(), name, Arc::clone(&load), Arc::clone(&bundles)));
    let clients = std::thread::spawn({
        let (load, lab) = (Arc::clone(&load), webhook.lab.clone());
        move || {
            netns::within(&lab, || {
                // Threads are in the network namespace of the one that starts them.
                std::thread::scope(|scope| {
                    scope.spawn(|| load.follow_readiness(replicas));
                    for index in 0..CLIENTS {
                        let load = &load;
                        scope.spawn(move || load.client(index));
                    }
                });
            })
            .unwrap();
        }
    });

    // Each replica once, while two authorities and some leaves follow each other.
    tokio::time::sleep(Duration::from_secs(4)).await;
    for index in [0, 1] {
        tokio::task::block_in_place(|| webhook.roll(index));
        // As a Deployment does, which takes no replica away before the new one is known to be ready.
        tokio::time::sleep(Duration::from_secs(2)).await;
        webhook
            .eventually("both replicas are ready", || async { load.ready.read().unwrap().len() == 2 })
            .await;
    }
    webhook.eventually("three bundles are seen", || async { bundles.load(Ordering::Relaxed) >= 3 }).await;
    // Until the leaves of the newest authority serve, too.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let memory_kib = [0, 1].map(|index| webhook.status_kib(index, "VmRSS:"));
    load.stop.store(true, Ordering::Relaxed);
    let seconds = load.started.elapsed().as_secs_f64();
    clients.join().unwrap();

    let reviews = load.reviews.load(Ordering::Relaxed);
    let failures = load.failures.lock().unwrap();
    eprintln!(
        "{reviews} reviews in {seconds:.1} s ({:.0} a second), {} connections, {} bundles",
        reviews as f64 / seconds,
        load.connections.load(Ordering::Relaxed),
        bundles.load(Ordering::Relaxed),
    );
    assert!(failures.is_empty(), "failed:\n{}", failures.join("\n"));
    assert!((1000..REVIEWS_MAX).contains(&reviews), "{reviews} reviews");
    assert!(memory_kib.iter().all(|kib| *kib < MEMORY_KIB), "{memory_kib:?} KiB of memory");
    let leaves: usize =
        [0, 1].map(|i| webhook.output(i).matches("serving a new certificate").count()).iter().sum();
    assert!(leaves >= 4, "{leaves} leaves");
}
