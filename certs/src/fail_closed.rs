//! Turns the webhooks that are meant to fail closed from `failurePolicy: Ignore` to `Fail`, once they serve.
//!
//! The manifests ship every webhook with `Ignore`, so that an installation whose pods never start locks nobody out. The
//! annotation `howdah.dev/fail-closed` of a configuration names those that are meant to be `Fail`. Turning one is
//! earned: this replica is ready, and a question sent through the API server (a dry run that the webhook
//! `probe.howdah.dev` has to answer) came back with the webhook's own answer, over the same Service and `caBundle`.
//! Nothing here ever turns `Fail` back: a webhook that fails open when it fails would protect nothing.
//!
//! Who applies the manifests again owns `Ignore` again, and the next steps turn it again. To stand in nobody's way then,
//! the field is given up after it was set: a field without an owner has the default of the API, which is `Fail`, and
//! `kubectl apply --server-side` finds nobody to be in conflict with. All replicas do the same, in any order.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::stream::{BoxStream, StreamExt as _, select_all};
use howdah_adapters::kubernetes::{KubernetesError, call};
use howdah_adapters::protected_sets::{ProtectedSets, ProtectedSetsSpec};
use howdah_adapters::telemetry::Readiness;
use howdah_core::names;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::keeper::watch;

/// The webhook that answers the probe. It never guards anything.
pub const PROBE_WEBHOOK: &str = "probe.howdah.dev";
/// The name of the object that the probe asks about; its webhook is called for this name alone.
pub const PROBE_NAME: &str = "probe";
/// What the webhook says to a probe. Only a denial proves that it was asked: the probe fails open.
pub const PROBE_ANSWER: &str = "howdah answers";

/// Owner of `failurePolicy` for as long as it takes to set it.
const FIELD_MANAGER: &str = "howdah-webhook-fail-closed";
/// First pause after a probe without an answer; it doubles each time. Endpoints follow readiness within seconds.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
/// Last pause: an API server that cannot reach the webhook is asked this often.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// Longest sleep when nothing is to be done; the watches usually come first.
const LOOK_EVERY: Duration = Duration::from_secs(300);
/// Writes to one configuration in a row: set, give up. More means that somebody else writes all the time.
const WRITES_MAX: usize = 4;

/// How many webhooks let pass what they are meant to hold.
#[derive(Debug, Clone, Default)]
pub struct FailOpen {
    webhooks: Gauge<i64, AtomicI64>,
}

impl FailOpen {
    /// Makes the metric and adds it to the registry.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "webhooks_failing_open",
            "Webhooks that are meant to be failurePolicy Fail and are not",
            metrics.webhooks.clone(),
        );
        metrics
    }
}

/// Turns the webhooks of one installation.
pub struct FailClosed {
    client: Client,
    /// Namespace of the probe.
    namespace: String,
    /// Name of both configurations.
    configuration: String,
    readiness: Readiness,
    metrics: FailOpen,
}

/// One write to a configuration.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Sets `Fail` for these webhooks.
    Close(Vec<String>),
    /// Gives the field up again, with its value.
    LetGo,
}

impl FailClosed {
    /// Nothing is read or written before [`FailClosed::run`], nor while a gate of `readiness` is closed.
    #[must_use]
    pub fn new(
        client: Client,
        namespace: String,
        configuration: String,
        readiness: Readiness,
        metrics: FailOpen,
    ) -> Self {
        Self { client, namespace, configuration, readiness, metrics }
    }

    /// Keeps turning until the shutdown.
    ///
    /// # Errors
    /// Only if a watch ends, which it never does by itself: failed steps are logged and tried again.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut changes = self.changes();
        let mut retry_after = RETRY_AFTER_MIN;
        loop {
            let pause = match self.look().await {
                Ok(true) => {
                    retry_after = RETRY_AFTER_MIN;
                    LOOK_EVERY
                }
                // Not ready yet; there is no event for becoming it.
                Ok(false) => RETRY_AFTER_MIN,
                Err(error) => {
                    if retry_after == RETRY_AFTER_MIN {
                        warn!(error = format!("{error:#}"), "webhooks still fail open, trying on");
                    }
                    let pause = retry_after;
                    retry_after = (retry_after * 2).min(RETRY_AFTER_MAX);
                    pause
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
                change = changes.next() => if change.is_none() {
                    bail!("watch the webhook configurations: all watches ended");
                },
            }
        }
    }

    /// One item for every change to one of the two configurations.
    fn changes(&self) -> BoxStream<'static, ()> {
        let mutating = Api::<MutatingWebhookConfiguration>::all(self.client.clone());
        let validating = Api::<ValidatingWebhookConfiguration>::all(self.client.clone());
        select_all([watch(mutating, &self.configuration), watch(validating, &self.configuration)]).boxed()
    }

    /// Looks at both configurations and does what is to be done; `false` while this replica is not ready.
    async fn look(&self) -> anyhow::Result<bool> {
        let mutating = Api::<MutatingWebhookConfiguration>::all(self.client.clone());
        let validating = Api::<ValidatingWebhookConfiguration>::all(self.client.clone());
        let name = &self.configuration;
        let (first, second) = (read(&mutating, name).await?, read(&validating, name).await?);
        let open = failing_open(&first).len() + failing_open(&second).len();
        self.metrics.webhooks.set(i64::try_from(open).unwrap_or(i64::MAX));
        if !self.readiness.closed().is_empty() {
            return Ok(false);
        }
        let mut proven = None;
        if open > 0 {
            proven = bundle_of(&second, PROBE_WEBHOOK).map(str::to_owned);
            self.probe().await?;
        }
        let left = turn(&mutating, name, proven.as_deref()).await?
            + turn(&validating, name, proven.as_deref()).await?;
        self.metrics.webhooks.set(i64::try_from(left).unwrap_or(i64::MAX));
        Ok(true)
    }

    /// Asks the API server something that only the webhook answers.
    async fn probe(&self) -> anyhow::Result<()> {
        let probes = Api::<ProtectedSets>::namespaced(self.client.clone(), &self.namespace);
        let question = ProtectedSets::new(PROBE_NAME, ProtectedSetsSpec { sets: Vec::new() });
        let params = PostParams { dry_run: true, ..PostParams::default() };
        match call("ask the webhook through the API server", probes.create(&params, &question)).await {
            Err(KubernetesError::Forbidden { message, .. }) if message.contains(PROBE_ANSWER) => Ok(()),
            Ok(_) => bail!(
                "ask the webhook through the API server: it was not asked, or did not answer; check that the API server \
                 reaches the Service of the webhook (network policies, firewalls of the control plane)"
            ),
            Err(error) => Err(error.into()),
        }
    }
}

async fn read<K>(api: &Api<K>, name: &str) -> anyhow::Result<Value>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    let kind = K::kind(&());
    let configuration = call(format!("get the {kind} {name}"), api.get(name)).await?;
    serde_json::to_value(configuration).with_context(|| format!("read the {kind} {name}"))
}

/// Does the steps that are left in one configuration; how many of its webhooks fail open after them.
async fn turn<K>(api: &Api<K>, name: &str, proven: Option<&str>) -> anyhow::Result<usize>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    let kind = K::kind(&());
    for _ in 0..WRITES_MAX {
        let configuration = read(api, name).await?;
        let Some(step) = next_step(&configuration, proven) else {
            return Ok(failing_open(&configuration).len());
        };
        let mut apply = json!({"apiVersion": K::api_version(&()), "kind": kind, "metadata": {"name": name}});
        if let Step::Close(webhooks) = &step {
            apply["webhooks"] =
                webhooks.iter().map(|webhook| json!({"name": webhook, "failurePolicy": "Fail"})).collect();
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let attempt = format!("write the failurePolicy of the {kind} {name}");
        call(attempt, api.patch(name, &params, &Patch::Apply(apply))).await?;
        if let Step::Close(webhooks) = step {
            info!(configuration.kind = %kind, configuration.name = name, webhooks = webhooks.join(","),
                "the API server reaches the webhook: from now on it fails closed");
        }
    }
    bail!("write the failurePolicy of the {kind} {name}: it was changed {WRITES_MAX} times meanwhile");
}

/// What to write next so that every webhook that is meant to fail closed does; `None` when nothing is left.
/// `proven` is the `caBundle` with which the API server reached the webhook.
fn next_step(configuration: &Value, proven: Option<&str>) -> Option<Step> {
    if is_ours(configuration) {
        return Some(Step::LetGo);
    }
    // One with another bundle is not proven; the certificates' keeper repairs it, and then it is its turn.
    let reached: Vec<String> = failing_open(configuration)
        .into_iter()
        .filter(|webhook| proven.is_some() && bundle_of(configuration, webhook) == proven)
        .collect();
    (!reached.is_empty()).then_some(Step::Close(reached))
}

/// The webhooks that are meant to fail closed and do not.
fn failing_open(configuration: &Value) -> Vec<String> {
    let annotations = &configuration["metadata"]["annotations"];
    let meant = annotations[names::FAIL_CLOSED].as_str().unwrap_or_default();
    let policies: BTreeMap<&str, &Value> = webhooks(configuration)
        .filter_map(|hook| Some((hook["name"].as_str()?, &hook["failurePolicy"])))
        .collect();
    meant
        .split(',')
        .map(str::trim)
        .filter(|name| policies.get(name).is_some_and(|policy| **policy != "Fail"))
        .map(str::to_owned)
        .collect()
}

fn bundle_of<'a>(configuration: &'a Value, webhook: &str) -> Option<&'a str> {
    let webhook = webhooks(configuration).find(|candidate| candidate["name"] == webhook)?;
    webhook["clientConfig"]["caBundle"].as_str().filter(|bundle| !bundle.is_empty())
}

fn webhooks(configuration: &Value) -> impl Iterator<Item = &Value> {
    configuration["webhooks"].as_array().into_iter().flatten()
}

/// Whether fields of the webhooks are owned by [`FIELD_MANAGER`].
fn is_ours(configuration: &Value) -> bool {
    let managers = configuration["metadata"]["managedFields"].as_array();
    managers
        .into_iter()
        .flatten()
        .any(|manager| manager["manager"] == FIELD_MANAGER && !manager["fieldsV1"]["f:webhooks"].is_null())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration that means `a` and `b` to fail closed, with these policies and bundles.
    fn configuration(a: (&str, &str), b: (&str, &str)) -> Value {
        let webhook = |name: &str, (policy, bundle): (&str, &str)| json!({"name": name, "failurePolicy": policy, "clientConfig": {"caBundle": bundle}});
        json!({
            "metadata": {"annotations": {names::FAIL_CLOSED: "a, b,gone"}},
            "webhooks": [webhook("a", a), webhook("b", b), webhook("c", ("Ignore", "new"))],
        })
    }

    fn close(names: &[&str]) -> Option<Step> {
        Some(Step::Close(names.iter().map(|name| (*name).to_owned()).collect()))
    }

    #[test]
    fn only_what_is_meant_and_proven_is_turned() {
        let fresh = configuration(("Ignore", "new"), ("Ignore", "new"));
        assert_eq!(failing_open(&fresh), ["a", "b"]);
        assert_eq!(next_step(&fresh, None), None, "nothing is proven");
        assert_eq!(next_step(&fresh, Some("new")), close(&["a", "b"]));
        let behind = configuration(("Ignore", "new"), ("Ignore", "old"));
        assert_eq!(next_step(&behind, Some("new")), close(&["a"]), "another bundle is not proven");
        let done = configuration(("Fail", "new"), ("Fail", "new"));
        assert!(failing_open(&done).is_empty());
        assert_eq!(next_step(&done, Some("new")), None);
    }

    #[test]
    fn without_the_annotation_nothing_is_turned() {
        let mut silent = configuration(("Ignore", "new"), ("Ignore", "new"));
        silent["metadata"]["annotations"] = json!({});
        assert!(failing_open(&silent).is_empty());
        assert_eq!(next_step(&silent, Some("new")), None);
        assert_eq!(next_step(&json!({"metadata": {}, "webhooks": null}), Some("new")), None);
    }

    #[test]
    fn what_was_set_is_given_up_whatever_else_is_to_do() {
        let mut set = configuration(("Fail", "new"), ("Ignore", "new"));
        let own =
            |fields: Value| json!([{"manager": "kubectl"}, {"manager": FIELD_MANAGER, "fieldsV1": fields}]);
        set["metadata"]["managedFields"] = own(json!({"f:webhooks": {"k:{\"name\":\"a\"}": {}}}));
        assert_eq!(next_step(&set, None), Some(Step::LetGo));
        assert_eq!(next_step(&set, Some("new")), Some(Step::LetGo));
        set["metadata"]["managedFields"] = own(json!({}));
        assert_eq!(next_step(&set, Some("new")), close(&["b"]));
    }

    #[test]
    fn an_empty_bundle_proves_nothing() {
        let configuration = configuration(("Ignore", ""), ("Ignore", "new"));
        assert_eq!(bundle_of(&configuration, "a"), None);
        assert_eq!(next_step(&configuration, bundle_of(&configuration, "a")), None);
    }
}
