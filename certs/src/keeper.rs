//! Keeps three things in step: the authority in its Secret, the `caBundle` of the webhook configurations, and the leaf
//! this replica serves.
//!
//! One step ([`Keeper::step`]) reads all of them and repairs what is wrong, in the order that loses no request: first the
//! Secret, then the bundles, then the leaf. Steps run when a watch sees a change and when something is due, so a bundle
//! that somebody overwrites is repaired at once. All replicas do the same; the Secret's resourceVersion decides who wins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use base64::Engine as _;
use futures::stream::{BoxStream, StreamExt as _, select_all};
use howdah_adapters::kubernetes::{KubernetesError, call};
use howdah_adapters::telemetry::Gate;
use jiff::Timestamp;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::authority::{Authority, AuthorityError, Lifetimes};
use crate::serving::ServingCertificate;

/// Owner of `caBundle` in the managed fields, so that whoever applies the configurations does not own it.
const FIELD_MANAGER: &str = "howdah-webhook-certificates";
/// Longest sleep between two steps; the watches usually come first.
const STEP_EVERY_MAX: Duration = Duration::from_secs(300);
/// Shortest, so that a wrong clock or a short life cannot make it spin.
const STEP_EVERY_MIN: Duration = Duration::from_millis(100);
/// Pause after a step that failed.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// Times the Secret is read again because another replica wrote first; two replicas need one.
const SECRET_ATTEMPTS_MAX: usize = 5;

/// What to keep.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Namespace of the Secret.
    pub namespace: String,
    /// Name of the Secret; it is part of the installation, empty.
    pub secret: String,
    /// Name of both webhook configurations.
    pub configuration: String,
    /// DNS names and IP addresses that the API server calls the webhook by.
    pub names: Vec<String>,
    /// How long certificates live.
    pub lifetimes: Lifetimes,
}

/// When certificates end.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    not_after: Family<CertificateLabel, Gauge<i64, AtomicI64>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CertificateLabel {
    certificate: &'static str,
}

impl Metrics {
    /// Makes the metrics and adds them to the registry.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "certificate_not_after_seconds",
            "When a certificate ends, in seconds since 1970",
            metrics.not_after.clone(),
        );
        metrics
    }

    fn set(&self, certificate: &'static str, not_after: Timestamp) {
        self.not_after.get_or_create(&CertificateLabel { certificate }).set(not_after.as_second());
    }
}

/// The leaf that is served: of which authority, and until when.
#[derive(Debug)]
struct Served {
    issuer: String,
    not_after: Timestamp,
}

/// Keeps the certificates of one replica.
pub struct Keeper {
    client: Client,
    settings: Settings,
    metrics: Metrics,
    trusted: Gate,
    serving: Arc<ServingCertificate>,
    /// The last authority seen, to restore the Secret from when somebody empties it.
    authority: Option<Authority>,
    served: Option<Served>,
    /// Since when every configuration trusts this issuer.
    trusted_since: Option<(String, Instant)>,
}

impl Keeper {
    /// Nothing is read or written before [`Keeper::run`]. The gate opens when the API server trusts what is served.
    #[must_use]
    pub fn new(client: Client, settings: Settings, metrics: Metrics, trusted: Gate) -> Self {
        let serving = Arc::default();
        Self {
            client,
            settings,
            metrics,
            trusted,
            serving,
            authority: None,
            served: None,
            trusted_since: None,
        }
    }

    /// The certificate to serve.
    #[must_use]
    pub fn serving(&self) -> Arc<ServingCertificate> {
        Arc::clone(&self.serving)
    }

    /// Keeps everything in step until the shutdown.
    ///
    /// # Errors
    /// Only if a watch ends, which it never does by itself: failed steps are logged and tried again.
    pub async fn run(mut self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut changes = self.changes();
        let mut failing = false;
        loop {
            let pause = match self.step().await {
                Ok(pause) => {
                    failing = false;
                    pause.clamp(STEP_EVERY_MIN, STEP_EVERY_MAX)
                }
                Err(error) => {
                    // Once per outage: a missing right would otherwise fill the log.
                    if !failing {
                        warn!(error = format!("{error:#}"), "certificates are not in step, trying on");
                    }
                    failing = true;
                    RETRY_AFTER
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
                change = changes.next() => if change.is_none() {
                    bail!("watch the certificates: all watches ended");
                },
            }
        }
    }

    /// One item for every change to one of the three objects.
    fn changes(&self) -> BoxStream<'static, ()> {
        let settings = &self.settings;
        let secrets = Api::<Secret>::namespaced(self.client.clone(), &settings.namespace);
        let mutating = Api::<MutatingWebhookConfiguration>::all(self.client.clone());
        let validating = Api::<ValidatingWebhookConfiguration>::all(self.client.clone());
        select_all([
            watch(secrets, &settings.secret),
            watch(mutating, &settings.configuration),
            watch(validating, &settings.configuration),
        ])
        .boxed()
    }

    /// Reads everything, repairs what is wrong, and tells when the next thing is due.
    async fn step(&mut self) -> anyhow::Result<Duration> {
        let now = Timestamp::now();
        let authority = self.authority(now).await?;
        self.metrics.set("authority", authority.not_after());
        self.trust(&authority).await?;
        let settle_left = self.settle_left(&authority);
        self.serve(&authority, settle_left, now)?;
        self.trusted.open();
        let lifetimes = &self.settings.lifetimes;
        let leaf_due = self.served.as_ref().map_or(now, |served| served.not_after - lifetimes.leaf / 3);
        let due = authority.renew_at(lifetimes).min(leaf_due);
        let pause = Duration::try_from(due.duration_since(now)).unwrap_or(Duration::ZERO);
        self.authority = Some(authority);
        Ok(settle_left.map_or(pause, |settle| settle.min(pause)))
    }

    /// The authority in the Secret, made, restored or renewed if need be.
    async fn authority(&self, now: Timestamp) -> anyhow::Result<Authority> {
        let Settings { namespace, secret: name, lifetimes, .. } = &self.settings;
        let secrets = Api::<Secret>::namespaced(self.client.clone(), namespace);
        for _ in 0..SECRET_ATTEMPTS_MAX {
            let mut secret = call(format!("get the Secret {namespace}/{name}"), secrets.get(name))
                .await
                .context("read the authority; the Secret is part of the installation (deploy/base/webhook-ca.yaml)")?;
            let read = Authority::from_secret(secret.data.as_ref().unwrap_or(&BTreeMap::new()), now);
            let (new, why) = match (read, &self.authority) {
                (Ok(authority), _) if authority.renew_at(lifetimes) > now => return Ok(authority),
                (Ok(authority), _) => (authority.renewed(lifetimes, now)?, "a third of its life is left"),
                (Err(AuthorityError::Empty), None) => {
                    (Authority::generate(lifetimes, now)?, "there was none")
                }
                // What is served was signed by it: replicas that still serve it stay trusted.
                (Err(AuthorityError::Empty), Some(known)) => (known.clone(), "somebody emptied the Secret"),
                (Err(error), Some(known)) => {
                    warn!(%error, "restoring the authority");
                    (known.clone(), "the Secret was unreadable")
                }
                (Err(error), None) => {
                    warn!(%error, "replacing the authority");
                    (Authority::generate(lifetimes, now)?, "the Secret was unusable")
                }
            };
            secret.data = Some(new.to_secret());
            let attempt = format!("write the Secret {namespace}/{name}");
            match call(attempt, secrets.replace(name, &PostParams::default(), &secret)).await {
                Ok(_) => {
                    info!(secret.namespace = namespace, secret.name = name, why, not_after = %new.not_after(),
                        "published a certificate authority");
                    return Ok(new);
                }
                // Another replica was faster: use what it wrote.
                Err(KubernetesError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        bail!("write the Secret {namespace}/{name}: others changed it {SECRET_ATTEMPTS_MAX} times meanwhile");
    }

    /// Makes every webhook of both configurations trust the whole bundle, and remembers since when.
    async fn trust(&mut self, authority: &Authority) -> anyhow::Result<()> {
        let name = &self.settings.configuration;
        let bundle = authority.bundle();
        let mutating = Api::<MutatingWebhookConfiguration>::all(self.client.clone());
        let validating = Api::<ValidatingWebhookConfiguration>::all(self.client.clone());
        let changed = inject(&mutating, name, &bundle).await? | inject(&validating, name, &bundle).await?;
        let same = self.trusted_since.as_ref().is_some_and(|(issuer, _)| issuer == authority.issuer());
        if changed || !same {
            self.trusted_since = Some((authority.issuer().to_owned(), Instant::now()));
        }
        Ok(())
    }

    /// How long the leaf has to wait for API servers to notice the bundle; `None` when it need not.
    fn settle_left(&self, authority: &Authority) -> Option<Duration> {
        let served = self.served.as_ref()?;
        if served.issuer == authority.issuer() {
            return None;
        }
        let (_, since) = self.trusted_since.as_ref()?;
        self.settings.lifetimes.settle.checked_sub(since.elapsed()).filter(|left| !left.is_zero())
    }

    /// Serves a leaf of the newest authority, unless the present one is good and the next has to wait.
    fn serve(
        &mut self,
        authority: &Authority,
        settle: Option<Duration>,
        now: Timestamp,
    ) -> anyhow::Result<()> {
        let lifetimes = &self.settings.lifetimes;
        if let Some(served) = &self.served {
            let fresh = served.not_after - lifetimes.leaf / 3 > now && served.issuer == authority.issuer();
            if fresh || settle.is_some() {
                return Ok(());
            }
        }
        let leaf = authority.issue(&self.settings.names, lifetimes, now)?;
        let not_after = leaf.not_after;
        self.serving.set(leaf)?;
        self.metrics.set("serving", not_after);
        self.served = Some(Served { issuer: authority.issuer().to_owned(), not_after });
        info!(%not_after, "serving a new certificate");
        Ok(())
    }
}

/// One item for every change to the object of this name. Watches that fail are opened again, slower each time.
pub(crate) fn watch<K>(api: Api<K>, name: &str) -> BoxStream<'static, ()>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
    // A failed watch is no change; the step that is due anyway reports what is wrong.
    watcher(api, only).default_backoff().filter_map(async |event| event.ok().map(drop)).boxed()
}

/// Puts the bundle into every webhook of a configuration; whether something had to be changed.
async fn inject<K>(api: &Api<K>, name: &str, bundle: &str) -> anyhow::Result<bool>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    let kind = K::kind(&());
    let configuration = call(format!("get the {kind} {name}"), api.get(name)).await?;
    let bundle = base64::engine::general_purpose::STANDARD.encode(bundle);
    let configuration =
        serde_json::to_value(configuration).with_context(|| format!("read the {kind} {name}"))?;
    let Some(change) = bundle_change(&configuration, &bundle) else { return Ok(false) };
    let mut apply = json!({"apiVersion": K::api_version(&()), "kind": kind, "metadata": {"name": name}});
    apply["webhooks"] = change;
    let params = PatchParams::apply(FIELD_MANAGER).force();
    call(format!("write the caBundle of the {kind} {name}"), api.patch(name, &params, &Patch::Apply(apply)))
        .await?;
    info!(configuration.kind = %kind, configuration.name = name, "put the certificate authority into the caBundle");
    Ok(true)
}

/// What to apply so that every webhook has this bundle; `None` when all of them have it.
fn bundle_change(configuration: &Value, bundle: &str) -> Option<Value> {
    let webhooks = configuration["webhooks"].as_array()?;
    let wrong = |webhook: &&Value| webhook["clientConfig"]["caBundle"].as_str() != Some(bundle);
    // Server-side apply takes back what is left out, so all of them are named if one is wrong.
    webhooks.iter().any(|webhook| wrong(&webhook)).then(|| {
        webhooks
            .iter()
            .map(|webhook| json!({"name": webhook["name"], "clientConfig": {"caBundle": bundle}}))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundle_is_applied_to_all_webhooks_if_one_is_wrong() {
        let webhook = |name: &str, bundle: &str| json!({"name": name, "clientConfig": {"caBundle": bundle, "url": "u"}});
        let configuration = |a: &str, b: &str| json!({"webhooks": [webhook("a", a), webhook("b", b)]});
        assert_eq!(bundle_change(&configuration("new", "new"), "new"), None);
        assert_eq!(
            bundle_change(&configuration("new", "old"), "new"),
            Some(json!([
                {"name": "a", "clientConfig": {"caBundle": "new"}},
                {"name": "b", "clientConfig": {"caBundle": "new"}},
            ]))
        );
        assert_eq!(bundle_change(&json!({"webhooks": null}), "new"), None);
    }
}
