//! The API server: a client whose every call is bounded in time, and the few reads and writes that several
//! binaries share. Which object matters and what its content means is decided elsewhere.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use howdah_core::volume::{self, PersistentVolumeFacts, RbdVolume, VolumeError};
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, PersistentVolume, PersistentVolumeClaim, Pod, Secret,
};
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::api::{AttachParams, ListParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::events::{Event, Recorder, Reporter};
use kube::{Api, Client, Config, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

/// How long one API call may take. The API server itself gives up on a request after 60 s; a healthy one answers in
/// milliseconds, and a caller holding a backup open cannot wait a minute.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// The field manager of server-side apply.
pub const FIELD_MANAGER: &str = "howdah";

/// Event notes longer than this are refused by the API server (`events.k8s.io/v1`: 1024 bytes).
const EVENT_NOTE_BYTES_MAX: usize = 1024;

/// The image's superuser where its environment names none (`docker.io/library/postgres`).
const DEFAULT_POSTGRES_USER: &str = "postgres";

/// Connects with a kubeconfig file if one is given, else as kubectl does (`KUBECONFIG`, `~/.kube/config`), else with
/// the pod's service account.
///
/// # Errors
/// If no configuration is found, or the one found does not parse.
pub async fn connect(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let config = match kubeconfig {
        Some(path) => {
            let read = Kubeconfig::read_from(path)
                .with_context(|| format!("read the kubeconfig {}", path.display()))?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("use the kubeconfig {}", path.display()))?
        }
        None => Config::infer().await.context("find a kubeconfig or a service account")?,
    };
    // kube's own read timeout stays off: it would cut watches. `call` bounds each request instead.
    Client::try_from(config).context("make the Kubernetes client")
}

/// Why a call to the API server failed. The text begins with what was attempted.
#[derive(Debug, Error)]
pub enum KubernetesError {
    /// 404 for one object, or for its namespace.
    #[error("{attempt}: not found")]
    NotFound {
        /// What was attempted, as a verb phrase.
        attempt: String,
    },
    /// 409 on create.
    #[error("{attempt}: it exists already")]
    AlreadyExists {
        /// What was attempted.
        attempt: String,
    },
    /// 409 on update: somebody else wrote first.
    #[error("{attempt}: it was changed by somebody else at the same time")]
    Conflict {
        /// What was attempted.
        attempt: String,
    },
    /// 403: a right is missing, or an admission policy refused.
    #[error("{attempt}: {message}")]
    Forbidden {
        /// What was attempted.
        attempt: String,
        /// The API server's words; they name the missing right.
        message: String,
    },
    /// No answer in time.
    #[error("{attempt}: no answer from the API server in {seconds} s")]
    TimedOut {
        /// What was attempted.
        attempt: String,
        /// The limit that passed.
        seconds: u64,
    },
    /// The object lacks a field that it must have.
    #[error("{attempt}: {problem}")]
    Incomplete {
        /// What was attempted.
        attempt: String,
        /// Which field, and the fix.
        problem: String,
    },
    /// The command in the pod could not be run, or its connection broke.
    #[error("{attempt}: {problem}")]
    Exec {
        /// What was attempted.
        attempt: String,
        /// What went wrong.
        problem: String,
    },
    /// Anything else.
    #[error("{attempt}: {cause}")]
    Other {
        /// What was attempted.
        attempt: String,
        /// The client's error.
        #[source]
        cause: Box<kube::Error>,
    },
}

impl KubernetesError {
    /// Sorts a client error by what a caller would do about it.
    #[must_use]
    pub fn new(attempt: impl Into<String>, cause: kube::Error) -> Self {
        let attempt = attempt.into();
        match cause {
            kube::Error::Api(status) if status.code == 404 && !kind_is_not_served(&status.message) => {
                Self::NotFound { attempt }
            }
            kube::Error::Api(status) if status.reason == "AlreadyExists" => Self::AlreadyExists { attempt },
            kube::Error::Api(status) if status.code == 409 => Self::Conflict { attempt },
            kube::Error::Api(status) if status.code == 403 => {
                Self::Forbidden { attempt, message: status.message }
            }
            cause => Self::Other { attempt, cause: Box::new(cause) },
        }
    }

    /// Whether the thing asked for is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

/// Whether a 404 says that its kind is not served, as while a custom resource definition is put in place, which says nothing
/// of the object. The first is how the API server words it, the second how its router does.
fn kind_is_not_served(message: &str) -> bool {
    ["could not find the requested resource", "404 page not found"]
        .iter()
        .any(|words| message.contains(words))
}

/// Makes one API call: gives it [`CALL_TIMEOUT`] and sorts its error. `attempt` is a verb phrase, e.g. `get the claim db/data`.
///
/// # Errors
/// Those of the call, and [`KubernetesError::TimedOut`].
pub async fn call<T>(
    attempt: impl Into<String>,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T, KubernetesError> {
    call_within(CALL_TIMEOUT, attempt, request).await
}

/// Like [`call`] with a limit of the caller's own.
///
/// # Errors
/// Those of the call, and [`KubernetesError::TimedOut`].
pub async fn call_within<T>(
    limit: Duration,
    attempt: impl Into<String>,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T, KubernetesError> {
    match tokio::time::timeout(limit, request).await {
        Ok(answer) => answer.map_err(|cause| KubernetesError::new(attempt, cause)),
        Err(_) => Err(KubernetesError::TimedOut { attempt: attempt.into(), seconds: limit.as_secs() }),
    }
}

/// Gets one object by its name; none when there is none.
///
/// kube's `get_opt` takes every 404 for that, also that of a kind that is not served at the moment.
///
/// # Errors
/// Those of the call, and [`KubernetesError::TimedOut`].
pub async fn find<K>(
    attempt: impl Into<String>,
    api: &Api<K>,
    name: &str,
) -> Result<Option<K>, KubernetesError>
where
    K: Clone + DeserializeOwned + Debug,
{
    find_within(CALL_TIMEOUT, attempt, api, name).await
}

/// Like [`find`] with a limit of the caller's own.
///
/// # Errors
/// Those of the call, and [`KubernetesError::TimedOut`].
pub async fn find_within<K>(
    limit: Duration,
    attempt: impl Into<String>,
    api: &Api<K>,
    name: &str,
) -> Result<Option<K>, KubernetesError>
where
    K: Clone + DeserializeOwned + Debug,
{
    match call_within(limit, attempt, api.get(name)).await {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Why a claim's image could not be found.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// An object on the way could not be read.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
    /// The claim has no volume yet.
    #[error("resolve the claim {namespace}/{claim}: it is not bound to a volume yet")]
    NotBound {
        /// The claim's namespace.
        namespace: String,
        /// The claim's name.
        claim: String,
    },
    /// The volume is not one that howdah can use.
    #[error("resolve the claim {namespace}/{claim}: {cause}")]
    Volume {
        /// The claim's namespace.
        namespace: String,
        /// The claim's name.
        claim: String,
        /// Why.
        #[source]
        cause: VolumeError,
    },
}

/// A user name and a password. Its `Debug` shows no password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The database role.
    pub username: String,
    /// Its password; never to be logged.
    pub password: String,
}

impl Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// A claim that a pod uses, and where its containers mount it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimUse {
    /// The PersistentVolumeClaim's name.
    pub claim: String,
    /// Container, mount path and sub-path, per mount.
    pub mounts: Vec<ClaimMount>,
}

/// One mount of a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimMount {
    /// The container's name.
    pub container: String,
    /// Where the volume appears in the container.
    pub path: String,
    /// The folder of the volume that is mounted; empty for its root.
    pub sub_path: String,
}

/// The claims of a pod with their mounts, in the order of the pod's volumes. Labels are not consulted: they drift.
#[must_use]
pub fn claims_of(pod: &Pod) -> Vec<ClaimUse> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let claims = spec.volumes.iter().flatten().filter_map(|volume| {
        let claim = volume.persistent_volume_claim.as_ref()?;
        let mounts = spec
            .containers
            .iter()
            .flat_map(|container| {
                container.volume_mounts.iter().flatten().map(move |mount| (container, mount))
            })
            .filter(|(_, mount)| mount.name == volume.name)
            .map(|(container, mount)| ClaimMount {
                container: container.name.clone(),
                path: mount.mount_path.clone(),
                sub_path: mount.sub_path.clone().unwrap_or_default(),
            })
            .collect();
        Some(ClaimUse { claim: claim.claim_name.clone(), mounts })
    });
    claims.collect()
}

/// A command to run in a pod.
#[derive(Clone, Copy, Debug)]
pub struct PodCommand<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The pod's name.
    pub pod: &'a str,
    /// The container; none for the pod's default one.
    pub container: Option<&'a str>,
    /// Program and arguments; no shell is added.
    pub argv: &'a [String],
    /// What the command reads. Its end is not signalled, so the command must know where to stop.
    pub stdin: &'a [u8],
    /// How much of each output stream is kept.
    pub output_bytes_max: usize,
    /// How long the whole exchange may take.
    pub limit: Duration,
}

/// The answer of a command that ran in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// The command's exit code.
    pub exit_code: i32,
    /// Its standard output, cut at the limit.
    pub stdout: Vec<u8>,
    /// Its standard error, cut at the limit.
    pub stderr: Vec<u8>,
}

/// The API server, as a component of howdah sees it.
#[derive(Clone)]
pub struct Kubernetes {
    client: Client,
    recorder: Recorder,
}

impl Debug for Kubernetes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kubernetes").finish_non_exhaustive()
    }
}

impl Kubernetes {
    /// `component` (e.g. `howdah-scheduler`) signs the events.
    #[must_use]
    pub fn new(client: Client, component: &str) -> Self {
        let instance = std::env::var("HOSTNAME").ok().filter(|name| !name.is_empty());
        let recorder = Recorder::new(client.clone(), Reporter { controller: component.to_owned(), instance });
        Self { client, recorder }
    }

    /// The client, for calls that only one component makes; wrap them in [`call`].
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The image behind a claim: claim -> PersistentVolume (-> StorageClass) -> [`RbdVolume`].
    ///
    /// # Errors
    /// If the claim is unbound, a part cannot be read, or the volume is not a usable RBD volume.
    pub async fn rbd_volume(&self, namespace: &str, claim: &str) -> Result<RbdVolume, ResolveError> {
        let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), namespace);
        let found = call(format!("get the claim {namespace}/{claim}"), claims.get(claim)).await?;
        let volume_name = found.spec.and_then(|spec| spec.volume_name).filter(|name| !name.is_empty());
        let Some(volume_name) = volume_name else {
            return Err(ResolveError::NotBound { namespace: namespace.to_owned(), claim: claim.to_owned() });
        };
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        let found = call(format!("get the volume {volume_name}"), volumes.get(&volume_name)).await?;
        let spec = found.spec.unwrap_or_default();
        let class_parameters = match spec.storage_class_name.as_deref().filter(|name| !name.is_empty()) {
            Some(class) => self.class_parameters(class).await?,
            None => BTreeMap::new(),
        };
        let facts = PersistentVolumeFacts {
            name: volume_name,
            in_tree_rbd: spec.rbd.is_some(),
            driver: spec.csi.as_ref().map(|csi| csi.driver.clone()),
            volume_handle: spec.csi.as_ref().map(|csi| csi.volume_handle.clone()).unwrap_or_default(),
            attributes: spec.csi.and_then(|csi| csi.volume_attributes).unwrap_or_default(),
            class_parameters,
        };
        volume::resolve(&facts).map_err(|cause| ResolveError::Volume {
            namespace: namespace.to_owned(),
            claim: claim.to_owned(),
            cause,
        })
    }

    /// A class may be gone or be only a name on static volumes; that is no error, it just tells nothing.
    async fn class_parameters(&self, class: &str) -> Result<BTreeMap<String, String>, KubernetesError> {
        let classes = Api::<StorageClass>::all(self.client.clone());
        let found = find(format!("get the storage class {class}"), &classes, class).await?;
        Ok(found.and_then(|class| class.parameters).unwrap_or_default())
    }

    /// One value of a Secret.
    ///
    /// # Errors
    /// If the Secret cannot be read, has no such key, or the value is not UTF-8.
    pub async fn secret_value(
        &self,
        namespace: &str,
        name: &str,
        key: &str,
    ) -> Result<String, KubernetesError> {
        let attempt = format!("read the key {key} of the secret {namespace}/{name}");
        let secret =
            call(attempt.as_str(), Api::<Secret>::namespaced(self.client.clone(), namespace).get(name))
                .await?;
        value_of_secret(&attempt, &secret, key)
    }

    /// One value of a ConfigMap.
    ///
    /// # Errors
    /// If the ConfigMap cannot be read or has no such key.
    pub async fn config_value(
        &self,
        namespace: &str,
        name: &str,
        key: &str,
    ) -> Result<String, KubernetesError> {
        let attempt = format!("read the key {key} of the config map {namespace}/{name}");
        let map =
            call(attempt.as_str(), Api::<ConfigMap>::namespaced(self.client.clone(), namespace).get(name))
                .await?;
        map.data.unwrap_or_default().remove(key).ok_or_else(|| KubernetesError::Incomplete {
            attempt,
            problem: "there is no such key".to_owned(),
        })
    }

    /// The keys `username` and `password` of a Secret (type `kubernetes.io/basic-auth` has them).
    ///
    /// # Errors
    /// If the Secret cannot be read or lacks one of the keys.
    pub async fn credentials(&self, namespace: &str, secret: &str) -> Result<Credentials, KubernetesError> {
        let attempt = format!("read the credentials secret {namespace}/{secret}");
        let found =
            call(attempt.as_str(), Api::<Secret>::namespaced(self.client.clone(), namespace).get(secret))
                .await?;
        Ok(Credentials {
            username: value_of_secret(&attempt, &found, "username")?,
            password: value_of_secret(&attempt, &found, "password")?,
        })
    }

    /// The credentials that a container of the official image was started with: `POSTGRES_USER` (default `postgres`)
    /// and `POSTGRES_PASSWORD`, wherever they come from. None if no container of the pod names a password.
    ///
    /// # Errors
    /// If a Secret or ConfigMap that the environment names cannot be read.
    pub async fn credentials_of_pod(&self, pod: &Pod) -> Result<Option<Credentials>, KubernetesError> {
        let namespace = pod.namespace().unwrap_or_default();
        for container in pod.spec.iter().flat_map(|spec| &spec.containers) {
            let Some(password) = self.environment(&namespace, container, "POSTGRES_PASSWORD").await? else {
                continue;
            };
            let username = self.environment(&namespace, container, "POSTGRES_USER").await?;
            let username = username.unwrap_or_else(|| DEFAULT_POSTGRES_USER.to_owned());
            return Ok(Some(Credentials { username, password }));
        }
        Ok(None)
    }

    /// The value of a container's environment variable as the kubelet would set it: `env` goes before `envFrom`, the
    /// last of each wins. `$(VAR)` is not expanded.
    ///
    /// # Errors
    /// If a Secret or ConfigMap that is named and not optional cannot be read.
    pub async fn environment(
        &self,
        namespace: &str,
        container: &Container,
        name: &str,
    ) -> Result<Option<String>, KubernetesError> {
        if let Some(variable) = container.env.iter().flatten().rfind(|variable| variable.name == name) {
            if let Some(source) = &variable.value_from {
                if let Some(secret) = &source.secret_key_ref {
                    let value = self.secret_value(namespace, &secret.name, &secret.key).await;
                    return optional(value, secret.optional);
                }
                if let Some(map) = &source.config_map_key_ref {
                    let value = self.config_value(namespace, &map.name, &map.key).await;
                    return optional(value, map.optional);
                }
                return Ok(None);
            }
            return Ok(variable.value.clone());
        }
        for source in container.env_from.iter().flatten().rev() {
            let Some(key) = name.strip_prefix(source.prefix.as_deref().unwrap_or_default()) else { continue };
            let value = if let Some(secret) = &source.secret_ref {
                optional(self.secret_value(namespace, &secret.name, key).await, Some(true))?
            } else if let Some(map) = &source.config_map_ref {
                optional(self.config_value(namespace, &map.name, key).await, Some(true))?
            } else {
                None
            };
            if value.is_some() {
                return Ok(value);
            }
        }
        Ok(None)
    }

    /// Writes an object by server-side apply as [`FIELD_MANAGER`], taking over fields that others own: what howdah
    /// applies is howdah's.
    ///
    /// # Errors
    /// If the API server refuses.
    pub async fn apply<K>(&self, api: &Api<K>, name: &str, object: &K) -> Result<K, KubernetesError>
    where
        K: Resource + Clone + DeserializeOwned + Serialize + Debug,
    {
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        call(format!("apply {name}"), api.patch(name, &parameters, &Patch::Apply(object))).await
    }

    /// Publishes an Event on an object. A note that is too long is cut.
    ///
    /// # Errors
    /// If the API server refuses; an event is never a reason to fail, so log it and go on.
    pub async fn publish<K>(&self, mut event: Event, regarding: &K) -> Result<(), KubernetesError>
    where
        K: Resource<DynamicType = ()>,
    {
        event.note = event.note.map(|note| cut(note, EVENT_NOTE_BYTES_MAX));
        let reference = regarding.object_ref(&());
        call(format!("publish the event {}", event.reason), self.recorder.publish(&event, &reference)).await
    }

    /// The first running, ready pod with these labels.
    ///
    /// # Errors
    /// If pods cannot be listed, or none is ready.
    pub async fn ready_pod(&self, namespace: &str, labels: &str) -> Result<Pod, KubernetesError> {
        /// Deployments of tools have one pod, and at most a few that are going.
        const PODS_MAX: u32 = 20;
        let attempt = format!("find a ready pod with the labels {labels} in {namespace}");
        let pods = Api::<Pod>::namespaced(self.client.clone(), namespace);
        let list =
            call(attempt.as_str(), pods.list(&ListParams::default().labels(labels).limit(PODS_MAX))).await?;
        list.items.into_iter().find(is_ready).ok_or(KubernetesError::NotFound { attempt })
    }

    /// Runs a command in a pod's container and reads its answer.
    ///
    /// The end of the connection does not end the command: a command that may hang must bring its own `timeout`.
    ///
    /// # Errors
    /// If the command cannot be started, the connection breaks, or it takes longer than its limit.
    pub async fn exec(&self, command: &PodCommand<'_>) -> Result<ExecOutput, KubernetesError> {
        let PodCommand { namespace, pod, argv, limit, .. } = command;
        let attempt = format!("run {} in the pod {namespace}/{pod}", argv.first().map_or("", String::as_str));
        match tokio::time::timeout(*limit, self.exec_unbounded(&attempt, command)).await {
            Ok(answer) => answer,
            Err(_) => Err(KubernetesError::TimedOut { attempt, seconds: limit.as_secs() }),
        }
    }

    async fn exec_unbounded(
        &self,
        attempt: &str,
        command: &PodCommand<'_>,
    ) -> Result<ExecOutput, KubernetesError> {
        let PodCommand { namespace, pod, container, argv, stdin, output_bytes_max, limit: _ } = *command;
        let mut parameters = AttachParams::default().stdin(true).stdout(true).stderr(true);
        if let Some(container) = container {
            parameters = parameters.container(container);
        }
        let pods = Api::<Pod>::namespaced(self.client.clone(), namespace);
        let mut process = pods
            .exec(pod, argv.iter().map(String::as_str), &parameters)
            .await
            .map_err(|cause| KubernetesError::new(attempt, cause))?;
        let problem = |problem: &str| KubernetesError::Exec {
            attempt: attempt.to_owned(),
            problem: problem.to_owned(),
        };
        let (Some(mut input), Some(output), Some(errors), Some(status)) =
            (process.stdin(), process.stdout(), process.stderr(), process.take_status())
        else {
            return Err(problem("the connection has no streams"));
        };
        let feed = async {
            input.write_all(stdin).await?;
            input.flush().await
        };
        let (fed, stdout, stderr, status) = tokio::join!(
            feed,
            read_bounded(output, output_bytes_max),
            read_bounded(errors, output_bytes_max),
            status
        );
        let exit_code = status.as_ref().and_then(exit_code).ok_or_else(|| {
            let detail =
                status.and_then(|status| status.message).unwrap_or_else(|| "the connection broke".to_owned());
            problem(&detail)
        })?;
        // A command that ends without reading its input is judged by its exit code.
        if exit_code == 0 {
            fed.map_err(|cause| problem(&format!("write its input: {cause}")))?;
        }
        let read = |bytes: std::io::Result<Vec<u8>>| {
            bytes.map_err(|cause| problem(&format!("read its output: {cause}")))
        };
        Ok(ExecOutput { exit_code, stdout: read(stdout)?, stderr: read(stderr)? })
    }
}

/// Reads to the end, keeps the first `limit` bytes: the rest must still be taken off the connection.
pub(crate) async fn read_bounded(mut from: impl AsyncRead + Unpin, limit: usize) -> std::io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    let mut chunk = [0_u8; 8192];
    loop {
        let count = from.read(&mut chunk).await?;
        if count == 0 {
            return Ok(kept);
        }
        let room = limit.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(&chunk[..room]);
    }
}

/// The exit code in an exec's final status; none if the command never ran.
fn exit_code(status: &Status) -> Option<i32> {
    if status.status.as_deref() == Some("Success") {
        return Some(0);
    }
    let causes = status.details.as_ref()?.causes.as_ref()?;
    let cause = causes.iter().find(|cause| cause.reason.as_deref() == Some("ExitCode"))?;
    cause.message.as_ref()?.parse().ok()
}

/// Whether a pod runs and is ready.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready =
        conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

fn value_of_secret(attempt: &str, secret: &Secret, key: &str) -> Result<String, KubernetesError> {
    let incomplete = |problem: String| KubernetesError::Incomplete { attempt: attempt.to_owned(), problem };
    let value = secret.data.as_ref().and_then(|data| data.get(key));
    let bytes = value.ok_or_else(|| incomplete(format!("it has no key {key:?}: add it")))?;
    String::from_utf8(bytes.0.clone()).map_err(|_| incomplete(format!("its key {key:?} is not UTF-8 text")))
}

/// Turns "not there" into none where the pod says that the source is optional.
fn optional(
    value: Result<String, KubernetesError>,
    is_optional: Option<bool>,
) -> Result<Option<String>, KubernetesError> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(KubernetesError::NotFound { .. } | KubernetesError::Incomplete { .. })
            if is_optional == Some(true) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The text, at most `limit` bytes of it, ending at a character.
fn cut(mut text: String, limit: usize) -> String {
    if text.len() > limit {
        let end = (0..=limit).rev().find(|index| text.is_char_boundary(*index)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse<T: DeserializeOwned>(value: serde_json::Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn claims_carry_their_mounts() {
        let pod: Pod = parse(json!({
            "spec": {
                "volumes": [
                    {"name": "data", "persistentVolumeClaim": {"claimName": "data-db-0"}},
                    {"name": "tmp", "emptyDir": {}},
                    {"name": "idle", "persistentVolumeClaim": {"claimName": "idle-db-0"}}
                ],
                "containers": [
                    {"name": "postgres", "volumeMounts": [
                        {"name": "data", "mountPath": "/var/lib/postgresql/data", "subPath": "pg"},
                        {"name": "tmp", "mountPath": "/tmp"}
                    ]}
                ]
            }
        }));
        let claims = claims_of(&pod);
        assert_eq!(claims.len(), 2);
        assert_eq!(claims[0].claim, "data-db-0");
        assert_eq!(claims[0].mounts[0].path, "/var/lib/postgresql/data");
        assert_eq!(claims[0].mounts[0].sub_path, "pg");
        assert_eq!((claims[1].claim.as_str(), claims[1].mounts.len()), ("idle-db-0", 0));
    }

    #[test]
    fn exit_codes_are_found_in_the_status() {
        let ok: Status = parse(json!({"status": "Success"}));
        assert_eq!(exit_code(&ok), Some(0));
        let failed: Status = parse(json!({"status": "Failure", "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": "30"}]}}));
        assert_eq!(exit_code(&failed), Some(30));
        let broken: Status = parse(json!({"status": "Failure", "message": "container not found"}));
        assert_eq!(exit_code(&broken), None);
    }

    #[test]
    fn errors_are_sorted_by_what_a_caller_does() {
        let status = |code: u16, reason: &str| {
            kube::Error::Api(Box::new(kube::core::Status {
                code,
                reason: reason.to_owned(),
                message: "words".to_owned(),
                ..kube::core::Status::default()
            }))
        };
        assert!(KubernetesError::new("get it", status(404, "NotFound")).is_not_found());
        for words in ["the server could not find the requested resource", "404 page not found\n"] {
            let mut unserved = status(404, "NotFound");
            if let kube::Error::Api(status) = &mut unserved {
                status.message = words.to_owned();
            }
            assert!(!KubernetesError::new("get it", unserved).is_not_found(), "{words}");
        }
        let exists = KubernetesError::new("create it", status(409, "AlreadyExists"));
        assert!(matches!(exists, KubernetesError::AlreadyExists { .. }));
        let conflict = KubernetesError::new("replace it", status(409, "Conflict"));
        assert!(matches!(conflict, KubernetesError::Conflict { .. }));
        let forbidden = KubernetesError::new("read it", status(403, "Forbidden"));
        assert_eq!(forbidden.to_string(), "read it: words");
    }

    #[tokio::test]
    async fn a_call_without_answer_ends() {
        let never = std::future::pending::<kube::Result<()>>();
        let error = call_within(Duration::from_millis(5), "get it", never).await.unwrap_err();
        assert_eq!(error.to_string(), "get it: no answer from the API server in 0 s");
    }

    #[tokio::test]
    async fn output_is_cut_and_drained() {
        let long = vec![b'x'; 100_000];
        assert_eq!(read_bounded(&long[..], 10).await.unwrap().len(), 10);
        assert_eq!(read_bounded(&long[..], 200_000).await.unwrap().len(), 100_000);
    }

    #[test]
    fn long_notes_end_at_a_character() {
        assert_eq!(cut("aé".to_owned(), 2), "a");
        assert_eq!(cut("aé".to_owned(), 3), "aé");
    }

    #[test]
    fn a_password_is_not_printed() {
        let credentials = Credentials { username: "u".to_owned(), password: "hidden".to_owned() };
        assert!(!format!("{credentials:?}").contains("hidden"));
    }
}
