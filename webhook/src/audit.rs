//! The background audit: looks at every protected StatefulSet as it stands, because the webhook sees only requests.
//!
//! `howdah_core::audit` judges and decides what to say; this keeps the caches it judges from, writes the one report of
//! each namespace when it has to change, and publishes the Events that are due. One replica does it for all
//! ([`crate::background`]), and only that one holds the caches. A round makes no request unless something changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use howdah_adapters::kubernetes::{Kubernetes, KubernetesError, call};
use howdah_adapters::reports::{self, HowdahReport, HowdahReportSpec};
use howdah_core::audit::{self, Audited, Change, EVENTS_PER_ROUND_MAX, Notice, Plan, Report};
use howdah_core::names;
use howdah_core::policy::{Claim, ClusterFacts, Config, StorageClass, Volume};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::storage::v1;
use kube::api::{DeleteParams, ObjectMeta, PostParams, Preconditions};
use kube::runtime::events::{Event, EventType};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::facts::raw;
use crate::metrics::AuditMetrics;

/// Holds a copy of the whole object, which the policy does not read.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Reason of the Events.
const REASON: &str = "PolicyViolation";
/// What the policy reads of the spec of an autoscaler,
const AUTOSCALER_FIELDS: [&str; 3] = ["scaleTargetRef", "minReplicas", "maxReplicas"];
/// and of that of a disruption budget.
const BUDGET_FIELDS: [&str; 3] = ["selector", "minAvailable", "maxUnavailable"];
/// Pause between two looks at caches that are not filled yet.
const FILLING: Duration = Duration::from_millis(200);

/// Looks at protected StatefulSets, round by round.
pub struct Auditor {
    client: Client,
    kubernetes: Kubernetes,
    config: Config,
    metrics: AuditMetrics,
    every: Duration,
}

/// What the policy needs to know, kept by watches.
#[derive(Default)]
struct Caches {
    sets: Kept<Value>,
    classes: Kept<StorageClass>,
    claims: Kept<Claim>,
    volumes: Kept<Volume>,
    autoscalers: Kept<Value>,
    budgets: Kept<Value>,
    reports: Kept<HowdahReport>,
}

impl Auditor {
    /// An audit with a round `every` so long. Nothing is read before [`Auditor::run`].
    #[must_use]
    pub fn new(client: Client, config: Config, metrics: AuditMetrics, every: Duration) -> Self {
        let kubernetes = Kubernetes::new(client.clone(), crate::NAME);
        Self { client, kubernetes, config, metrics, every }
    }

    /// Audits until the leadership is lost.
    ///
    /// # Errors
    /// Only if a watch ends, which it never does by itself: what fails is logged, and done again in the next round.
    pub async fn run(&self, lost: &CancellationToken) -> anyhow::Result<()> {
        let caches = Caches::default();
        let labelled =
            watcher::Config::default().labels(&format!("{}={}", names::PROTECT_LABEL, names::PROTECT_VALUE));
        let ours = watcher::Config::default().fields(&format!("metadata.name={}", reports::NAME));
        let all = watcher::Config::default;
        let rounds = async {
            loop {
                if caches.are_filled() {
                    self.round(&caches).await;
                    tokio::time::sleep(self.every).await;
                } else {
                    tokio::time::sleep(FILLING).await;
                }
            }
        };
        let ended = tokio::select! {
            () = lost.cancelled() => Ok(()),
            () = rounds => Ok(()),
            ended = caches.sets.feed::<StatefulSet>(&self.client, labelled, set_of) => Err(ended),
            ended = caches.classes.feed::<v1::StorageClass>(&self.client, all(), |class| StorageClass::from_json(&raw(&class))) => Err(ended),
            ended = caches.claims.feed::<PersistentVolumeClaim>(&self.client, all(), |claim| Claim::from_json(&raw(&claim))) => Err(ended),
            ended = caches.volumes.feed::<PersistentVolume>(&self.client, all(), |volume| Volume::from_json(&raw(&volume))) => Err(ended),
            ended = caches.autoscalers.feed::<HorizontalPodAutoscaler>(&self.client, all(), |autoscaler| dependent_of(autoscaler, &AUTOSCALER_FIELDS)) => Err(ended),
            ended = caches.budgets.feed::<PodDisruptionBudget>(&self.client, all(), |budget| dependent_of(budget, &BUDGET_FIELDS)) => Err(ended),
            ended = caches.reports.feed::<HowdahReport>(&self.client, ours, |report| report) => Err(ended),
        };
        // Who does not audit knows nothing, and must not repeat what was true once.
        self.metrics.clear();
        ended
    }

    /// Looks at everything once.
    async fn round(&self, caches: &Caches) {
        let now = Timestamp::now();
        let sets = caches.audited(&self.config, now);
        let reports: BTreeMap<String, HowdahReport> =
            caches.reports.all().into_iter().map(|((namespace, _), report)| (namespace, report)).collect();
        let namespaces: BTreeSet<&String> = sets.keys().chain(reports.keys()).collect();
        let mut events_left = EVENTS_PER_ROUND_MAX;
        for namespace in namespaces {
            let sets = sets.get(namespace).map_or(&[][..], Vec::as_slice);
            let before = reports.get(namespace);
            let Plan { change, notices } =
                audit::plan(sets, before.map(|report| &report.spec.report), now, &mut events_left);
            match self.write(namespace, before, change).await {
                // The report comes first: what it says was told is not told again, whoever leads next.
                Ok(()) => self.tell(namespace, notices).await,
                Err(error) if is_leaving(&error) => debug!(namespace, %error, "left a report alone"),
                Err(error) => {
                    warn!(namespace, %error, "keep the report of the audit: trying again in the next round")
                }
            }
        }
        let ending = sets.values().flatten().map(|set| set.ending).sum();
        self.metrics.round(&audit::tally(sets.values().flatten()), ending, now);
    }

    async fn write(
        &self,
        namespace: &str,
        before: Option<&HowdahReport>,
        change: Change,
    ) -> Result<(), KubernetesError> {
        let api = Api::<HowdahReport>::namespaced(self.client.clone(), namespace);
        let name = reports::NAME;
        match change {
            Change::Keep => return Ok(()),
            Change::Delete => {
                let seen = before.map(|report| &report.metadata);
                // Only the one that was seen: somebody may have written another meanwhile.
                let preconditions = Preconditions {
                    uid: seen.and_then(|metadata| metadata.uid.clone()),
                    resource_version: seen.and_then(|metadata| metadata.resource_version.clone()),
                };
                let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
                call(format!("delete the report {namespace}/{name}"), api.delete(name, &params))
                    .await
                    .map(drop)?;
            }
            Change::Write(report) => {
                let attempt = format!("write the report {namespace}/{name}");
                let params = PostParams::default();
                let report = report_of(before, report);
                match before {
                    Some(_) => call(attempt, api.replace(name, &params, &report)).await.map(drop)?,
                    None => call(attempt, api.create(&params, &report)).await.map(drop)?,
                }
            }
        }
        self.metrics.wrote();
        info!(namespace, "the report of the audit changed");
        Ok(())
    }

    async fn tell(&self, namespace: &str, notices: Vec<Notice>) {
        for Notice { stateful_set, uid, rule, note } in notices {
            let metadata = ObjectMeta {
                namespace: Some(namespace.to_owned()),
                name: Some(stateful_set),
                uid: Some(uid),
                ..ObjectMeta::default()
            };
            let set = StatefulSet { metadata, ..StatefulSet::default() };
            // The action tells the rules apart: Events of one reason and action are one series.
            let event = Event {
                type_: EventType::Warning,
                reason: REASON.to_owned(),
                note: Some(note),
                action: rule,
                secondary: None,
            };
            if let Err(error) = self.kubernetes.publish(event, &set).await {
                warn!(namespace, %error, "publish a finding of the audit");
            }
        }
    }
}

impl Caches {
    fn are_filled(&self) -> bool {
        self.sets.is_filled()
            && self.classes.is_filled()
            && self.claims.is_filled()
            && self.volumes.is_filled()
            && self.autoscalers.is_filled()
            && self.budgets.is_filled()
            && self.reports.is_filled()
    }

    /// Every protected StatefulSet, judged as it stands, by namespace.
    fn audited(&self, config: &Config, now: Timestamp) -> BTreeMap<String, Vec<Audited>> {
        let by_name = |((_, name), value)| (name, value);
        let mut facts = ClusterFacts {
            storage_classes: self.classes.all().into_iter().map(by_name).collect(),
            volumes: self.volumes.all().into_iter().map(|((_, name), volume)| (name, volume)).collect(),
            config: config.clone(),
            ..ClusterFacts::default()
        };
        let claims = self.claims.all();
        let mut dependents: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for ((namespace, _), object) in self.autoscalers.all().into_iter().chain(self.budgets.all()) {
            dependents.entry(namespace).or_default().push(object);
        }
        let mut sets: BTreeMap<String, Vec<Audited>> = BTreeMap::new();
        let mut claims_of = None;
        for ((namespace, _), set) in self.sets.all() {
            if claims_of.as_ref() != Some(&namespace) {
                let own = claims.iter().filter(|((space, _), _)| *space == namespace);
                facts.claims = own.map(|((_, name), claim)| (name.clone(), claim.clone())).collect();
                claims_of = Some(namespace.clone());
            }
            let dependents = dependents.get(&namespace).map_or(&[][..], Vec::as_slice);
            let audited = audit::look(&set, dependents, &facts, now);
            sets.entry(namespace).or_default().push(audited);
        }
        sets
    }
}

/// A protected StatefulSet without what the policy does not read.
fn set_of(mut set: StatefulSet) -> Value {
    set.managed_fields_mut().clear();
    set.annotations_mut().remove(LAST_APPLIED);
    set.status = None;
    raw(&set)
}

/// The little that the policy reads of an autoscaler or a disruption budget: a cluster may have thousands that have nothing
/// to do with a database.
fn dependent_of<K>(object: K, fields: &[&str]) -> Value
where
    K: Resource<DynamicType = ()> + Serialize,
{
    let mut spec = raw(&object)["spec"].take();
    if let Some(spec) = spec.as_object_mut() {
        spec.retain(|field, _| fields.contains(&field.as_str()));
    }
    json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": object.name_any(), "deletionTimestamp": object.meta().deletion_timestamp},
        "spec": spec,
    })
}

fn report_of(before: Option<&HowdahReport>, report: Report) -> HowdahReport {
    let mut object = HowdahReport::new(reports::NAME, HowdahReportSpec { report });
    // The version that was seen: of two that write, one fails and looks again.
    object.metadata.resource_version = before.and_then(|report| report.metadata.resource_version.clone());
    object
}

/// Whether the namespace is going or gone: its report goes with it.
fn is_leaving(error: &KubernetesError) -> bool {
    match error {
        KubernetesError::NotFound { .. } => true,
        KubernetesError::Forbidden { message, .. } => message.contains("is being terminated"),
        _ => false,
    }
}

/// The little that is needed of each object of a kind, by namespace and name: whole volumes and claims would be hundreds
/// of times as much.
struct Kept<V> {
    state: Mutex<State<V>>,
}

type Objects<V> = BTreeMap<(String, String), V>;

struct State<V> {
    objects: Objects<V>,
    /// A list under way, which replaces the objects when it is whole.
    listed: Objects<V>,
    filled: bool,
}

impl<V> Default for Kept<V> {
    fn default() -> Self {
        let state = State { objects: BTreeMap::new(), listed: BTreeMap::new(), filled: false };
        Self { state: Mutex::new(state) }
    }
}

impl<V: Clone> Kept<V> {
    fn is_filled(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).filled
    }

    fn all(&self) -> Objects<V> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).objects.clone()
    }

    /// Watches until the stream ends, which it never does by itself.
    async fn feed<K>(&self, client: &Client, config: watcher::Config, keep: impl Fn(K) -> V) -> anyhow::Error
    where
        K: Resource<DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned
            + Serialize
            + Send
            + 'static,
    {
        let stream = watcher(Api::<K>::all(client.clone()), config).default_backoff();
        let mut stream = std::pin::pin!(stream);
        let mut failing = false;
        while let Some(event) = stream.next().await {
            match event {
                Ok(event) => {
                    failing = false;
                    self.take(event, &keep);
                }
                Err(error) => {
                    // Once per outage; the watch opens again by itself.
                    if !failing {
                        warn!(kind = %K::kind(&()), %error, "a watch of the audit is interrupted");
                    }
                    failing = true;
                }
            }
        }
        anyhow::anyhow!("watch each {} for the audit: the watch ended", K::kind(&()))
    }

    fn take<K: Resource>(&self, event: watcher::Event<K>, keep: impl Fn(K) -> V) {
        let key = |object: &K| (object.namespace().unwrap_or_default(), object.name_any());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            watcher::Event::Init => state.listed.clear(),
            watcher::Event::InitApply(object) => {
                state.listed.insert(key(&object), keep(object));
            }
            watcher::Event::InitDone => {
                state.objects = std::mem::take(&mut state.listed);
                state.filled = true;
            }
            watcher::Event::Apply(object) => {
                state.objects.insert(key(&object), keep(object));
            }
            watcher::Event::Delete(object) => {
                state.objects.remove(&key(&object));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str) -> StatefulSet {
        let metadata = ObjectMeta {
            namespace: Some("shop".to_owned()),
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        };
        StatefulSet { metadata, ..StatefulSet::default() }
    }

    #[test]
    fn of_what_belongs_to_a_set_only_what_is_judged_is_kept() {
        let budget: PodDisruptionBudget = serde_json::from_value(json!({
            "metadata": {"namespace": "shop", "name": "keep", "annotations": {"long": "text"}},
            "spec": {"maxUnavailable": 0, "selector": {"matchLabels": {"app": "a"}}, "unhealthyPodEvictionPolicy": "AlwaysAllow"},
            "status": {"currentHealthy": 1},
        }))
        .unwrap();
        let kept = json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
            "metadata": {"name": "keep", "deletionTimestamp": null},
            "spec": {"maxUnavailable": 0, "selector": {"matchLabels": {"app": "a"}}},
        });
        assert_eq!(dependent_of(budget, &BUDGET_FIELDS), kept);
    }

    #[test]
    fn a_list_replaces_what_was_there_only_when_it_is_whole() {
        let kept = Kept::<String>::default();
        let names = || kept.all().into_values().collect::<Vec<_>>();
        let take = |event| kept.take(event, |set: StatefulSet| set.name_any());
        take(watcher::Event::Init);
        take(watcher::Event::InitApply(set("a")));
        assert!(!kept.is_filled() && names().is_empty());
        take(watcher::Event::InitDone);
        take(watcher::Event::Apply(set("b")));
        assert!(kept.is_filled());
        assert_eq!(names(), ["a", "b"]);
        // The watch breaks: it is listed anew, and what is gone is gone.
        take(watcher::Event::Init);
        take(watcher::Event::InitApply(set("b")));
        assert_eq!(names(), ["a", "b"]);
        take(watcher::Event::InitDone);
        assert_eq!(names(), ["b"]);
        take(watcher::Event::Delete(set("b")));
        assert!(names().is_empty());
    }
}
