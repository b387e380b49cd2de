//! Keeps the `ProtectedSets` of every namespace in step with the cache of protected StatefulSets.
//!
//! The API server refuses by these lists, through a ValidatingAdmissionPolicy, what would harm a protected StatefulSet
//! while no webhook serves. `howdah_core::policy::floor` decides what stands in them; they are written only when that
//! differs from what is there. One replica writes for all ([`crate::background`]): of two, the one whose watch has fallen
//! behind would take away what the other has just written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use howdah_adapters::kubernetes::{KubernetesError, call};
use howdah_adapters::protected_sets::{ProtectedSets, ProtectedSetsSpec};
use howdah_core::names;
use howdah_core::policy::floor::{self, Change, ProtectedSet};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::facts::{drain, raw};

/// Owner of the lists in the managed fields.
const FIELD_MANAGER: &str = "howdah-webhook-lists";
/// How long changes are gathered before they are written: a rollout changes many sets at once. It also bounds the writes,
/// should somebody else write the lists as well.
const GATHER: Duration = Duration::from_secs(1);
/// Longest sleep between two looks: exemptions end by the clock alone.
const LOOK_EVERY: Duration = Duration::from_secs(300);
/// Pause after a write that failed.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Keeps the lists.
pub struct Lists {
    client: Client,
    protected: Store<StatefulSet>,
    changed: Arc<Notify>,
}

impl Lists {
    /// Nothing is read or written before [`Lists::run`].
    #[must_use]
    pub fn new(client: Client, (protected, changed): (Store<StatefulSet>, Arc<Notify>)) -> Self {
        Self { client, protected, changed }
    }

    /// Keeps the lists until the leadership is lost.
    ///
    /// # Errors
    /// Only if a watch ends, which it never does by itself: failed writes are logged and tried again.
    pub async fn run(&self, lost: &CancellationToken) -> anyhow::Result<()> {
        let (lists, writer) = reflector::store::<ProtectedSets>();
        let name = format!("metadata.name={}", names::PROTECTED_SETS);
        let only = watcher::Config::default().fields(&name);
        let watch = watcher(Api::<ProtectedSets>::all(self.client.clone()), only).default_backoff();
        let watch = reflector::reflector(writer, watch.modify(|list| list.managed_fields_mut().clear()));
        tokio::select! {
            () = lost.cancelled() => Ok(()),
            ended = drain(watch, |_| self.changed.notify_one()) => Err(ended.context("watch the lists of protected StatefulSets")),
            () = self.keep(&lists) => Ok(()),
        }
    }

    async fn keep(&self, lists: &Store<ProtectedSets>) {
        // An empty cache would empty every list.
        let ready = tokio::join!(self.protected.wait_until_ready(), lists.wait_until_ready());
        if ready.0.is_err() || ready.1.is_err() {
            return std::future::pending().await;
        }
        let mut failing = false;
        loop {
            let pause = match self.step(lists).await {
                Ok(()) => {
                    failing = false;
                    LOOK_EVERY
                }
                Err(error) => {
                    // Once per outage: a missing right would otherwise fill the log.
                    if !failing {
                        warn!(%error, "lists of protected StatefulSets are not in step, trying on");
                    }
                    failing = true;
                    RETRY_AFTER
                }
            };
            let _ = tokio::time::timeout(pause, self.changed.notified()).await;
            tokio::time::sleep(GATHER).await;
        }
    }

    /// Writes every list that is not as it has to be; the last error when some could not be written.
    async fn step(&self, lists: &Store<ProtectedSets>) -> Result<(), KubernetesError> {
        let sets: Vec<_> = self.protected.state().iter().map(|set| raw(set.as_ref())).collect();
        let wanted = floor::protected_sets(&sets, Timestamp::now());
        let found: BTreeMap<String, Vec<ProtectedSet>> = lists
            .state()
            .iter()
            .map(|list| (list.namespace().unwrap_or_default(), list.spec.sets.clone()))
            .collect();
        let mut outcome = Ok(());
        for change in floor::changes(wanted, &found) {
            let written = self.write(&change).await;
            let Change { namespace, sets } = change;
            match written {
                Ok(()) if sets.is_empty() => info!(namespace, "removed the list of protected StatefulSets"),
                Ok(()) => info!(namespace, sets = sets.len(), "wrote the list of protected StatefulSets"),
                Err(error) if is_leaving(&error) => debug!(namespace, %error, "left a list alone"),
                Err(error) => outcome = Err(error),
            }
        }
        outcome
    }

    async fn write(&self, Change { namespace, sets }: &Change) -> Result<(), KubernetesError> {
        let api = Api::<ProtectedSets>::namespaced(self.client.clone(), namespace);
        let name = names::PROTECTED_SETS;
        if sets.is_empty() {
            let attempt = format!("delete the ProtectedSets {namespace}/{name}");
            return call(attempt, api.delete(name, &DeleteParams::default())).await.map(drop);
        }
        let list = ProtectedSets::new(name, ProtectedSetsSpec { sets: sets.clone() });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let attempt = format!("write the ProtectedSets {namespace}/{name}");
        call(attempt, api.patch(name, &params, &Patch::Apply(list))).await.map(|_| ())
    }
}

/// Whether the namespace is going or gone: its lists go with it.
fn is_leaving(error: &KubernetesError) -> bool {
    match error {
        KubernetesError::NotFound { .. } => true,
        KubernetesError::Forbidden { message, .. } => message.contains("is being terminated"),
        _ => false,
    }
}
