//! Every denial is also an Event on the StatefulSet it is about: whoever asks why a rollout stands still looks there, and
//! not into the terminal of the one who was refused.
//!
//! An answer never waits for it: a denial goes into a short queue, and what the queue or the rate does not take is only
//! counted. The Events of one StatefulSet and the same rules are one series, so a controller that asks again and again
//! raises a count.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use howdah_adapters::kubernetes::Kubernetes;
use howdah_core::bucket::TokenBucket;
use howdah_core::policy::{ClusterFacts, Effect, Request, Target, Verdict, json as raw};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::ObjectMeta;
use kube::runtime::events::{Event, EventType};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::metrics::Metrics;

/// Denials that are Events at once, after a quiet time: a rollout that touches many databases.
const BURST: u32 = 20;
/// After a burst, one Event passes every so often: twenty in a minute, for the whole cluster.
const EVERY: Duration = Duration::from_secs(3);
/// Denials that wait for their Event. The rate empties it faster than it fills.
const QUEUE: usize = 64;
/// Reason of the Events.
const REASON: &str = "RequestDenied";
/// Longest action of an Event (`events.k8s.io/v1`).
const ACTION_CHARS_MAX: usize = 128;

/// Where denials are handed in; clones share the rate.
#[derive(Clone)]
pub struct Denials {
    queue: mpsc::Sender<Denial>,
    rate: Arc<Mutex<TokenBucket>>,
    since: Instant,
    metrics: Metrics,
}

/// A denial on its way to becoming an Event.
struct Denial {
    parent: ObjectMeta,
    action: String,
    note: String,
}

/// What makes Events of them.
pub struct Publisher {
    queue: mpsc::Receiver<Denial>,
}

impl Denials {
    /// Nothing is published before [`Publisher::run`].
    #[must_use]
    pub fn new(metrics: Metrics) -> (Self, Publisher) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let rate = Arc::new(Mutex::new(TokenBucket::full(BURST, EVERY)));
        (Self { queue: sender, rate, since: Instant::now(), metrics }, Publisher { queue: receiver })
    }

    /// Hands in a denial, at once. One of a creation is left out: there is nothing yet that could bear the Event.
    pub fn tell(&self, request: &Request<'_>, facts: &ClusterFacts, user: &str, verdict: &Verdict) {
        let Some(parent) = parent(request, facts).filter(|_| !verdict.allowed) else { return };
        let mut rules: Vec<&str> = Vec::new();
        let mut findings = Vec::new();
        for outcome in verdict.outcomes.iter().filter(|outcome| outcome.effect == Effect::Deny) {
            if !rules.contains(&outcome.rule.id) {
                rules.push(outcome.rule.id);
            }
            findings.push(format!("[{}] {}", outcome.rule.id, outcome.sentence()));
        }
        let denial = Denial {
            parent,
            action: rules.join(",").chars().take(ACTION_CHARS_MAX).collect(),
            note: format!("refused {user}: {}", findings.join("; ")),
        };
        let passes = self.rate.lock().unwrap_or_else(PoisonError::into_inner).take(self.since.elapsed());
        if !passes || self.queue.try_send(denial).is_err() {
            self.metrics.untold();
        }
    }
}

/// The StatefulSet that a request is about, as far as an Event has to know it; `None` when it is not there (yet).
fn parent(request: &Request<'_>, facts: &ClusterFacts) -> Option<ObjectMeta> {
    let object: &Value = match request.target {
        Target::StatefulSet => request.old_object?,
        _ => facts.parent.as_ref()?,
    };
    let text = |field: &str| raw::string(object, &["metadata", field]).map(str::to_owned);
    Some(ObjectMeta {
        namespace: Some(request.namespace.to_owned()),
        name: Some(text("name")?),
        uid: Some(text("uid")?),
        ..ObjectMeta::default()
    })
}

impl Publisher {
    /// Publishes until the shutdown.
    ///
    /// # Errors
    /// None; what fails is logged and gone.
    pub async fn run(mut self, kubernetes: Kubernetes, shutdown: CancellationToken) -> anyhow::Result<()> {
        loop {
            let denial = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                denial = self.queue.recv() => denial,
            };
            let Some(Denial { parent, action, note }) = denial else {
                // Nobody hands in any more: the reviews have ended, or never began.
                shutdown.cancelled().await;
                return Ok(());
            };
            let set = StatefulSet { metadata: parent, ..StatefulSet::default() };
            let event = Event {
                type_: EventType::Warning,
                reason: REASON.to_owned(),
                note: Some(note),
                action,
                secondary: None,
            };
            if let Err(error) = kubernetes.publish(event, &set).await {
                warn!(%error, "publish a denial");
            }
        }
    }
}
