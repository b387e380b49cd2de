//! What the cluster knows: three small caches, and single look-ups for what is rarely needed.
//!
//! Cached are the protected StatefulSets, because scales, pods, claims and the like say at most which one they belong to:
//! of each only its metadata, the labels of its pods and the names of its claims; the StorageClasses; and the few backups
//! that hold their database at the moment. Everything else is looked up one by one, for the few requests that need it:
//! caching pods, claims or volumes would hold all of the cluster in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use howdah_adapters::kubernetes::{KubernetesError, call_within, find_within};
use howdah_adapters::telemetry::Gate;
use howdah_core::names;
use howdah_core::policy::parents::{belongs_to, is_pod_of, named_by};
use howdah_core::policy::{
    Claim, ClusterFacts, Config, HoldingBackup, Operation, Request, StorageClass, Target, Volume, is_by_hand,
    is_protected, needed,
};
use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec};
use k8s_openapi::api::core::v1::{
    Namespace, PersistentVolume, PersistentVolumeClaim, Pod, PodSpec, PodTemplateSpec,
};
use k8s_openapi::api::storage::v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::metrics::Lookup;

/// Limit of one look-up: all of them have to fit into the time the API server waits for the webhook.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(1);
/// Volumes read per page while the one that suits a claim is searched.
const VOLUMES_PER_PAGE: u32 = 500;
/// Pages read at most; a cluster with more volumes has to name the volume in the claim template.
const VOLUME_PAGES_MAX: usize = 20;
/// Holds a copy of the whole object, which nothing here reads.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// What is known of the StorageClasses, by name: read once when they change and not for each review.
type StorageClasses = Arc<RwLock<BTreeMap<String, StorageClass>>>;
/// The backups that hold their database, by namespace and name.
type HoldingBackups = Arc<RwLock<BTreeMap<(String, String), HoldingBackup>>>;

/// Answers questions about the cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    config: Config,
    protected: Store<StatefulSet>,
    changed: Arc<Notify>,
    classes: StorageClasses,
    backups: HoldingBackups,
}

/// Keeps the caches of a [`Cluster`].
pub struct Caches {
    client: Client,
    synced: Gate,
    cluster: Cluster,
    protected: reflector::store::Writer<StatefulSet>,
    classes: reflector::store::Writer<v1::StorageClass>,
}

/// The facts for one request.
#[derive(Debug)]
pub struct Gathered {
    /// What is known.
    pub facts: ClusterFacts,
    /// Where the StatefulSet that the request is about was looked up; `None` where no look-up was needed.
    pub lookup: Option<Lookup>,
}

impl Cluster {
    /// The caches are empty until [`Caches::run`] has filled them; then the gate opens.
    #[must_use]
    pub fn new(client: Client, config: Config, synced: Gate) -> (Self, Caches) {
        let (protected, protected_writer) = reflector::store();
        let (_, classes_writer) = reflector::store();
        let cluster = Self {
            client: client.clone(),
            config,
            protected,
            changed: Arc::default(),
            classes: StorageClasses::default(),
            backups: HoldingBackups::default(),
        };
        let caches = Caches {
            client,
            synced,
            cluster: cluster.clone(),
            protected: protected_writer,
            classes: classes_writer,
        };
        (cluster, caches)
    }

    /// The protected StatefulSets that are cached, and a notice of each change to them, for one listener.
    #[must_use]
    pub fn protected(&self) -> (Store<StatefulSet>, Arc<Notify>) {
        (self.protected.clone(), Arc::clone(&self.changed))
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
        let mut lookup = None;
        if request.target == Target::StatefulSet {
            if request.operation != Operation::Delete {
                self.follow_claims(request, &mut facts).await?;
            }
            facts.backups = self.backups_of(request.namespace, request.name);
            return Ok(Gathered { facts, lookup });
        }
        (facts.parent, lookup) = self.parent(request).await;
        if request.target == Target::Eviction && facts.parent.is_some() {
            self.follow_pod(request, &mut facts).await;
        }
        if let Some(name) = facts.parent.as_ref().and_then(|parent| parent["metadata"]["name"].as_str()) {
            facts.backups = self.backups_of(request.namespace, name);
        }
        let is_ours = facts.parent.is_some() || request.old_object.is_some_and(is_protected);
        if is_ours && matches!(request.target, Target::Pod | Target::Eviction | Target::Claim) {
            facts.namespace_terminating = self.is_terminating(request.namespace).await;
        }
        Ok(Gathered { facts, lookup })
    }

    /// Follows the claims of a StatefulSet to what stands behind them.
    async fn follow_claims(
        &self,
        request: &Request<'_>,
        facts: &mut ClusterFacts,
    ) -> Result<(), KubernetesError> {
        facts.storage_classes.clone_from(&self.classes.read().unwrap_or_else(PoisonError::into_inner));
        let mut needed = needed(request, &facts.storage_classes);
        let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), request.namespace);
        for name in needed.claims {
            let attempt = format!("look up the claim {}/{name}", request.namespace);
            if let Some(claim) = find_within(LOOKUP_TIMEOUT, attempt, &claims, &name).await? {
                let claim = Claim::from_json(&raw(&claim));
                match (&claim.volume, &claim.storage_class) {
                    (Some(volume), _) => {
                        needed.by_hand.remove(&name);
                        needed.volumes.insert(volume.clone());
                    }
                    (None, Some(class)) if is_by_hand(class, &facts.storage_classes) => {
                        needed.by_hand.insert(name.clone(), class.clone());
                    }
                    _ => {}
                }
                facts.claims.insert(name, claim);
            }
        }
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        for name in needed.volumes {
            let attempt = format!("look up the volume {name}");
            if let Some(volume) = find_within(LOOKUP_TIMEOUT, attempt, &volumes, &name).await? {
                facts.volumes.insert(name, Volume::from_json(&raw(&volume)));
            }
        }
        if !needed.by_hand.is_empty() {
            let suits = |volume: &Volume| {
                needed.by_hand.iter().any(|(claim, class)| volume.suits(request.namespace, claim, class))
            };
            let mut page = ListParams::default().limit(VOLUMES_PER_PAGE);
            for _ in 0..VOLUME_PAGES_MAX {
                let attempt = "search the volume that a claim is bound to by hand";
                let list = call_within(LOOKUP_TIMEOUT, attempt, volumes.list(&page)).await?;
                let read =
                    list.items.iter().map(|volume| (volume.name_any(), Volume::from_json(&raw(volume))));
                facts.volumes.extend(read.filter(|(_, volume)| suits(volume)));
                match list.metadata.continue_.filter(|token| !token.is_empty()) {
                    Some(token) => page = page.continue_token(&token),
                    None => break,
                }
            }
        }
        Ok(())
    }

    /// The protected StatefulSet that the request is about.
    ///
    /// Where the answer may decide over a second writer or the data (a scale-up, a force delete, a claim) it is read
    /// anew: the cache may be a moment behind, and the gate of a restore is closed in such a moment. If the API server
    /// does not answer, the cache has the last word: to refuse would let the webhook stand in the way of what has nothing
    /// to do with howdah. What is only advised about or asked again is answered from the cache.
    async fn parent(&self, request: &Request<'_>) -> (Option<Value>, Option<Lookup>) {
        let here = self
            .protected
            .state()
            .into_iter()
            .filter(|set| set.metadata.namespace.as_deref() == Some(request.namespace));
        let cached = here.map(|set| raw(set.as_ref())).find(|set| belongs_to(request, set));
        let name =
            cached.as_ref().and_then(|set| set["metadata"]["name"].as_str()).or_else(|| named_by(request));
        let Some(name) =
            name.filter(|_| matches!(request.target, Target::Scale | Target::Pod | Target::Claim))
        else {
            return (cached, None);
        };
        let sets = Api::<StatefulSet>::namespaced(self.client.clone(), request.namespace);
        let attempt = format!("look up the StatefulSet {}/{name}", request.namespace);
        match find_within(LOOKUP_TIMEOUT, attempt, &sets, name).await {
            Ok(set) => {
                let set = set.map(|set| raw(&set)).filter(|set| belongs_to(request, set));
                (set, Some(Lookup::ApiServer))
            }
            Err(error) => {
                let lookup = if cached.is_some() { Lookup::Cache } else { Lookup::Failed };
                warn!(%error, known = cached.is_some(), "answering by what is known of a StatefulSet");
                (cached, Some(lookup))
            }
        }
    }

    /// Reads the pod of an eviction, which only names it. One that cannot be read is taken for the running pod of the
    /// StatefulSet whose name it bears.
    async fn follow_pod(&self, request: &Request<'_>, facts: &mut ClusterFacts) {
        let pods = Api::<Pod>::namespaced(self.client.clone(), request.namespace);
        let attempt = format!("look up the pod {}/{}", request.namespace, request.name);
        match find_within(LOOKUP_TIMEOUT, attempt, &pods, request.name).await {
            Ok(pod) => {
                let pod = pod.map(|pod| raw(&pod));
                facts.parent =
                    facts.parent.take().filter(|set| pod.as_ref().is_some_and(|pod| is_pod_of(pod, set)));
                facts.pod = pod;
            }
            Err(error) => warn!(%error, "judging an eviction by the name of its pod"),
        }
    }

    /// Whether a namespace is being deleted; one that cannot be read is not.
    async fn is_terminating(&self, namespace: &str) -> bool {
        let namespaces = Api::<PartialObjectMeta<Namespace>>::all(self.client.clone());
        let attempt = format!("look up the namespace {namespace}");
        match find_within(LOOKUP_TIMEOUT, attempt, &namespaces, namespace).await {
            Ok(found) => found.is_some_and(|found| found.metadata.deletion_timestamp.is_some()),
            Err(error) => {
                warn!(%error, "taking a namespace for one that stays");
                false
            }
        }
    }

    /// The backups of a StatefulSet that held it when last seen.
    fn backups_of(&self, namespace: &str, stateful_set: &str) -> Vec<HoldingBackup> {
        let backups = self.backups.read().unwrap_or_else(PoisonError::into_inner);
        let of_set = backups
            .iter()
            .filter(|((space, _), backup)| space == namespace && backup.stateful_set == stateful_set);
        of_set.map(|(_, backup)| backup.clone()).collect()
    }
}

impl Caches {
    /// Keeps the caches until the shutdown. The backups are not waited for: without them, and in a cluster that has no
    /// such kind yet, everything but the delay of an eviction works.
    ///
    /// # Errors
    /// Only if a watch ends, which it never does by itself.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let Self { client, synced, cluster, protected, classes } = self;
        let label = format!("{}={}", names::PROTECT_LABEL, names::PROTECT_VALUE);
        let labelled = watcher::Config::default().labels(&label);
        let sets = watcher(Api::<StatefulSet>::all(client.clone()), labelled).default_backoff();
        let sets = reflector::reflector(protected, sets.modify(keep_what_is_read));
        let all = watcher::Config::default();
        let list = watcher(Api::<v1::StorageClass>::all(client.clone()), all.clone()).default_backoff();
        let stored = classes.as_reader();
        let list = reflector::reflector(classes, list.modify(|class| class.managed_fields_mut().clear()));
        let kind = GroupVersionKind::gvk(names::GROUP, names::VERSION, "PostgresBackup");
        let backups = Api::<DynamicObject>::all_with(client, &ApiResource::from_gvk(&kind));
        let backups = watcher(backups, all).default_backoff();
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            ended = drain(sets, |_| cluster.changed.notify_one()) => Err(ended.context("watch the protected StatefulSets")),
            ended = drain(list, keep_classes(stored.clone(), cluster.classes.clone())) => Err(ended.context("watch the StorageClasses")),
            ended = drain(backups, keep_holding(cluster.backups.clone())) => Err(ended.context("watch the PostgresBackups")),
            () = async {
                let ready = tokio::join!(cluster.protected.wait_until_ready(), stored.wait_until_ready());
                if ready.0.is_ok() && ready.1.is_ok() {
                    synced.open();
                }
                std::future::pending().await
            } => Ok(()),
        }
    }
}

/// Drops what nothing here reads, so that ten thousand databases take a few megabytes.
fn keep_what_is_read(set: &mut StatefulSet) {
    set.metadata.managed_fields = None;
    set.annotations_mut().remove(LAST_APPLIED);
    set.status = None;
    let Some(spec) = set.spec.take() else { return };
    let named = |mut claim: PersistentVolumeClaim| {
        claim.spec = None;
        claim.status = None;
        claim
    };
    let volumes = spec.template.spec.map(|pod| PodSpec {
        volumes: pod
            .volumes
            .map(|volumes| volumes.into_iter().filter(|v| v.persistent_volume_claim.is_some()).collect()),
        ..PodSpec::default()
    });
    let labels = spec.template.metadata.and_then(|metadata| metadata.labels);
    set.spec = Some(StatefulSetSpec {
        template: PodTemplateSpec {
            metadata: Some(ObjectMeta { labels, ..ObjectMeta::default() }),
            spec: volumes,
        },
        volume_claim_templates: spec
            .volume_claim_templates
            .map(|claims| claims.into_iter().map(named).collect()),
        ..StatefulSetSpec::default()
    });
}

/// Keeps the backups that hold their database, and forgets the many others at once.
fn keep_holding(backups: HoldingBackups) -> impl FnMut(&watcher::Event<DynamicObject>) {
    let mut listed = BTreeMap::new();
    move |event| {
        let key = |object: &DynamicObject| (object.namespace().unwrap_or_default(), object.name_any());
        let mut known = backups.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            watcher::Event::Init => listed.clear(),
            watcher::Event::InitApply(object) => {
                listed.extend(HoldingBackup::from_json(&raw(object)).map(|backup| (key(object), backup)));
            }
            watcher::Event::InitDone => *known = std::mem::take(&mut listed),
            watcher::Event::Apply(object) => match HoldingBackup::from_json(&raw(object)) {
                Some(backup) => drop(known.insert(key(object), backup)),
                None => drop(known.remove(&key(object))),
            },
            watcher::Event::Delete(object) => drop(known.remove(&key(object))),
        }
    }
}

/// Reads the StorageClasses anew after each change; there are few, and they change rarely.
fn keep_classes(
    stored: Store<v1::StorageClass>,
    known: StorageClasses,
) -> impl FnMut(&watcher::Event<v1::StorageClass>) {
    move |_| {
        let read = |class: &v1::StorageClass| (class.name_any(), StorageClass::from_json(&raw(class)));
        let classes = stored.state().iter().map(|class| read(class)).collect();
        *known.write().unwrap_or_else(PoisonError::into_inner) = classes;
    }
}

/// Reads a watch and hands on what it tells; failures are logged once per outage, and the watch opens again by itself.
pub(crate) async fn drain<K>(
    stream: impl futures::Stream<Item = watcher::Result<watcher::Event<K>>>,
    mut told: impl FnMut(&watcher::Event<K>),
) -> anyhow::Error {
    use futures::StreamExt as _;
    let mut stream = std::pin::pin!(stream);
    let mut failing = false;
    while let Some(event) = stream.next().await {
        match &event {
            Ok(event) => told(event),
            Err(error) if !failing => warn!(%error, "a watch is interrupted"),
            Err(_) => {}
        }
        failing = event.is_err();
    }
    anyhow::anyhow!("the watch ended")
}

/// The object as the API server writes it.
pub(crate) fn raw(object: &impl Serialize) -> Value {
    // Writing a Kubernetes type as JSON cannot fail: all of its keys are strings.
    serde_json::to_value(object).unwrap_or_default()
}
