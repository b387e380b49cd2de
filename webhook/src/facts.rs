//! What the cluster knows: two small caches, and single look-ups for what is rarely needed.
//!
//! Cached are the metadata of protected StatefulSets, because a scale carries no labels and names only its parent, and
//! the StorageClasses. Claims and volumes are looked up one by one, for the few StatefulSets that name them directly:
//! caching them would hold every volume of the cluster in memory.

use std::time::Duration;

use howdah_adapters::kubernetes::{KubernetesError, call_within};
use howdah_adapters::telemetry::Gate;
use howdah_core::names;
use howdah_core::policy::{Claim, ClusterFacts, Config, Request, StorageClass, Target, Volume, needed};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1;
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::metrics::Lookup;

/// Limit of one look-up: all of them have to fit into the time the API server waits for the webhook.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(1);
/// Volumes read per page while the one that is reserved for a claim is searched.
const VOLUMES_PER_PAGE: u32 = 500;
/// Pages read at most; a cluster with more volumes has to name the volume in the claim template.
const VOLUME_PAGES_MAX: usize = 20;

type Protected = PartialObjectMeta<StatefulSet>;

/// Answers questions about the cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    config: Config,
    protected: Store<Protected>,
    classes: Store<v1::StorageClass>,
}

/// Keeps the caches of a [`Cluster`].
pub struct Caches {
    client: Client,
    synced: Gate,
    cluster: Cluster,
    protected: reflector::store::Writer<Protected>,
    classes: reflector::store::Writer<v1::StorageClass>,
}

/// The facts for one request.
#[derive(Debug)]
pub struct Gathered {
    /// What is known.
    pub facts: ClusterFacts,
    /// Where the parent of a scale was found; `None` for other requests.
    pub lookup: Option<Lookup>,
}

impl Cluster {
    /// The caches are empty until [`Caches::run`] has filled them; then the gate opens.
    #[must_use]
    pub fn new(client: Client, config: Config, synced: Gate) -> (Self, Caches) {
        let (protected, protected_writer) = reflector::store();
        let (classes, classes_writer) = reflector::store();
        let cluster = Self { client: client.clone(), config, protected, classes };
        let caches = Caches {
            client,
            synced,
            cluster: cluster.clone(),
            protected: protected_writer,
            classes: classes_writer,
        };
        (cluster, caches)
    }

    /// What is known without a look-up; enough to fill in defaults.
    #[must_use]
    pub fn configured(&self) -> ClusterFacts {
        ClusterFacts { config: self.config.clone(), ..ClusterFacts::default() }
    }

    /// Looks up what the policy has to know to judge a request.
    ///
    /// # Errors
    /// If a claim or a volume that is needed cannot be looked up. An unknown parent is no error: see [`Self::parent`].
    pub async fn facts(&self, request: &Request<'_>) -> Result<Gathered, KubernetesError> {
        let mut facts = self.configured();
        if request.target == Target::Scale {
            let (parent, lookup) = self.parent(request).await;
            facts.parent = parent;
            return Ok(Gathered { facts, lookup: Some(lookup) });
        }
        for class in self.classes.state() {
            facts.storage_classes.insert(class.name_any(), StorageClass::from_json(&raw(class.as_ref())));
        }
        let mut needed = needed(request);
        let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), request.namespace);
        for name in needed.claims {
            let attempt = format!("look up the claim {}/{name}", request.namespace);
            if let Some(claim) = call_within(LOOKUP_TIMEOUT, attempt, claims.get_opt(&name)).await? {
                let claim = Claim::from_json(&raw(&claim));
                needed.volumes.extend(claim.volume.clone());
                if claim.volume.is_some() {
                    needed.reserved_for.remove(&name);
                }
                facts.claims.insert(name, claim);
            }
        }
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        for name in needed.volumes {
            let attempt = format!("look up the volume {name}");
            if let Some(volume) = call_within(LOOKUP_TIMEOUT, attempt, volumes.get_opt(&name)).await? {
                facts.volumes.insert(name, Volume::from_json(&raw(&volume)));
            }
        }
        if !needed.reserved_for.is_empty() {
            let reserved = |volume: &Volume| {
                let claim = volume.claim.as_ref();
                claim.is_some_and(|(space, name)| {
                    space == request.namespace && needed.reserved_for.contains(name)
                })
            };
            let mut page = ListParams::default().limit(VOLUMES_PER_PAGE);
            for _ in 0..VOLUME_PAGES_MAX {
                let attempt = "search the volume that is reserved for a claim";
                let list = call_within(LOOKUP_TIMEOUT, attempt, volumes.list(&page)).await?;
                let read =
                    list.items.iter().map(|volume| (volume.name_any(), Volume::from_json(&raw(volume))));
                facts.volumes.extend(read.filter(|(_, volume)| reserved(volume)));
                match list.metadata.continue_.filter(|token| !token.is_empty()) {
                    Some(token) => page = page.continue_token(&token),
                    None => break,
                }
            }
        }
        Ok(Gathered { facts, lookup: None })
    }

    /// The StatefulSet behind a scale, by uid: the cache knows every protected one, and the API server is asked about the
    /// others, because one may have become protected a moment ago. If it does not answer, the cache has the last word:
    /// refusing would let the webhook stand in the way of StatefulSets that have nothing to do with howdah.
    async fn parent(&self, request: &Request<'_>) -> (Option<Value>, Lookup) {
        let uid = request.object.and_then(|scale| scale["metadata"]["uid"].as_str());
        let key = ObjectRef::new(request.name).within(request.namespace);
        if let Some(parent) = self.protected.get(&key).filter(|parent| parent.metadata.uid.as_deref() == uid)
        {
            return (Some(raw(parent.as_ref())), Lookup::Cache);
        }
        let sets = Api::<Protected>::namespaced(self.client.clone(), request.namespace);
        let attempt = format!("look up the StatefulSet {}/{}", request.namespace, request.name);
        match call_within(LOOKUP_TIMEOUT, attempt, sets.get_opt(request.name)).await {
            Ok(parent) => (parent.map(|parent| raw(&parent)), Lookup::ApiServer),
            Err(error) => {
                warn!(%error, "letting a scale pass whose StatefulSet is not among the protected ones known");
                (None, Lookup::Failed)
            }
        }
    }
}

impl Caches {
    /// Keeps the caches until the shutdown.
    ///
    /// # Errors
    /// Only if a watch ends, which it never does by itself.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let Self { client, synced, cluster, protected, classes } = self;
        let label = format!("{}={}", names::PROTECT_LABEL, names::PROTECT_VALUE);
        let labelled = watcher::Config::default().labels(&label);
        let sets = watcher(Api::<Protected>::all(client.clone()), labelled).default_backoff();
        let sets = reflector::reflector(protected, sets.modify(|set| set.managed_fields_mut().clear()));
        let all = watcher::Config::default();
        let list = watcher(Api::<v1::StorageClass>::all(client), all).default_backoff();
        let list = reflector::reflector(classes, list.modify(|class| class.managed_fields_mut().clear()));
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            ended = drain(sets) => Err(ended.context("watch the protected StatefulSets")),
            ended = drain(list) => Err(ended.context("watch the StorageClasses")),
            () = async {
                let ready = tokio::join!(cluster.protected.wait_until_ready(), cluster.classes.wait_until_ready());
                if ready.0.is_ok() && ready.1.is_ok() {
                    synced.open();
                }
                std::future::pending().await
            } => Ok(()),
        }
    }
}

/// Reads a watch for its effect on the cache; failures are logged once per outage, and the watch opens again by itself.
async fn drain<K>(stream: impl futures::Stream<Item = watcher::Result<watcher::Event<K>>>) -> anyhow::Error {
    use futures::StreamExt as _;
    let mut stream = std::pin::pin!(stream);
    let mut failing = false;
    while let Some(event) = stream.next().await {
        if let Err(error) = &event
            && !failing
        {
            warn!(%error, "a watch is interrupted");
        }
        failing = event.is_err();
    }
    anyhow::anyhow!("the watch ended")
}

/// The object as the API server writes it.
fn raw(object: &impl Serialize) -> Value {
    // Writing a Kubernetes type as JSON cannot fail: all of its keys are strings.
    serde_json::to_value(object).unwrap_or_default()
}
