//! The preflight: from the StatefulSet to the image, the snapshots it has, who writes to it, and the open session.
//!
//! Only reads; what they mean is judged by [`howdah_core::preflight`].

use std::time::Duration;

use futures::future::try_join_all;
use howdah_adapters::ceph::Ceph;
use howdah_adapters::kubernetes::{Credentials, KubernetesError, ResolveError, call, find, is_ready};
use howdah_adapters::postgres::{ServerFacts, Session as PostgresSession, Target};
use howdah_adapters::records::PostgresBackup;
use howdah_core::annotations::{Consistency, Settings};
use howdah_core::backup::{
    BackupStatus, Database, Facts, FailureKind, ImageRecord, PartRecord, Problem, Session,
};
use howdah_core::names;
use howdah_core::preflight::{self, Claims, DEFAULT_DATA_DIRECTORY, Mount, PartClaim, Place, Server};
use howdah_core::volume::RbdVolume;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use tokio::time::Instant;
use tracing::warn;

use super::{Effects, Held, connect_ceph, of_ceph, of_postgres};
use crate::context::Context;

/// PostgreSQL's port where the container names none.
const DEFAULT_PORT: u16 = 5432;
/// How long an answer of Ceph's health check serves all databases: `ceph` is a Python program and costs as much as the
/// rest of a preflight.
const HEALTH_FRESH: Duration = Duration::from_secs(10);
/// Database that is connected to; it exists unless somebody dropped it, and backup mode is of the whole cluster.
pub const DATABASE: &str = "postgres";

/// Where a database is, as Kubernetes says it.
pub(super) struct Found {
    settings: Settings,
    pod: Option<Pod>,
    container: Container,
    mounts: Vec<Mount>,
    /// The claim that the data directory lies on.
    claim: String,
    /// And its volume.
    pub(super) volume: RbdVolume,
}

/// One image of the database, as Ceph sees it.
struct Seen {
    image: ImageRecord,
    /// Snapshots of ours.
    snapshots: usize,
    snapshots_in_all: usize,
    /// It has one of the name this backup would use.
    name_taken: bool,
    /// Why it cannot be said that no client left writes behind.
    doubt: Option<Problem>,
}

impl Effects<'_> {
    /// Finds the database and its volume.
    pub(super) async fn find_database(&self) -> Result<Found, Problem> {
        let settings = self.settings.clone().map_err(|problem| {
            Problem::new(
                FailureKind::Permanent,
                problem,
                "correct the StatefulSet and create the backup anew",
            )
        })?;
        let (namespace, name) = (self.namespace(), self.backup.spec.stateful_set.clone());
        let database = protected(self.cx, &namespace, &name).await?.ok_or_else(|| {
            Problem::new(
                FailureKind::Permanent,
                format!("there is no protected StatefulSet {namespace}/{name}"),
                "label it howdah.dev/protect=true and create the backup anew",
            )
        })?;
        // A tick looks too, at what its cache has.
        if let Some(gate) = database.annotations().get(names::GATE) {
            return Err(Problem::new(
                FailureKind::Transient,
                format!("the operation {gate} holds the database"),
                "nothing to do: the backup is tried again when it has ended (kubectl get pgr)",
            ));
        }
        let pod = pod(self.cx, &namespace, &database).await?;

        let template = database.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
        let spec = pod.as_ref().map_or(template, |pod| pod.spec.as_ref());
        let spec = spec.ok_or_else(|| strange("the pod has no spec"))?;
        let claim_name = |volume: &str| match &pod {
            Some(_) => claim_of_pod(spec, volume),
            None => claim_of_template(&database, spec, volume),
        };
        let (container, mounts) = database_container(spec, &claim_name)?;
        let container = container.clone();
        let claim = preflight::claims(&mounts, &places(&container, None))?.data;
        let volume = self.volume(&claim).await?;
        Ok(Found { settings, pod, container, mounts, claim, volume })
    }

    async fn volume(&self, claim: &str) -> Result<RbdVolume, Problem> {
        let found = self.cx.kubernetes.rbd_volume(&self.namespace(), claim).await;
        found.map_err(|error| of_resolve(&error))
    }

    /// Finds out whether, how and where the database can be backed up now.
    pub(super) async fn preflight(&mut self, found: Found) -> Result<Facts, Problem> {
        let Found { settings, pod, container, mounts, claim: of_data, volume } = found;
        self.held = Held::Nothing;
        let namespace = self.namespace();
        let running = pod.as_ref().filter(|pod| is_ready(pod));
        let session = match (&pod, running) {
            (None, _) => Session::NotWanted,
            (Some(_), _) if self.order.wanted.class() != Consistency::Online => Session::NotWanted,
            (Some(_), None) => Session::Absent(Problem::new(
                FailureKind::Connection,
                "the pod is not ready",
                "see why with: kubectl describe pod",
            )),
            (Some(_), Some(pod)) => self.open_session(&namespace, pod, &container, &settings).await?,
        };
        let server = match &self.held {
            Held::Reading { facts, .. } => Some(facts.as_ref()),
            Held::Nothing | Held::Backup { .. } => None,
        };
        if let Some(facts) = server {
            fit(facts)?;
        }
        let claims = preflight::claims(&mounts, &places(&container, server))?;
        let unasked = server.is_none();
        let (claims, beside) = match server {
            Some(_) => {
                let beside = preflight::unexplained(&mounts, &claims);
                (claims, beside.into_iter().map(|claim| claim.volume).collect())
            }
            None => self.explain(claims, &mounts, &session).await?,
        };

        // PostgreSQL may keep its data elsewhere than the pod says.
        let volume = if claims.data == of_data { volume } else { self.volume(&claims.data).await? };
        let ceph = self.ceph.insert(connect_ceph(self.cx).await?).clone();
        let mut volumes = vec![volume];
        for claim in &claims.parts {
            volumes.push(self.volume(&claim.claim).await?);
        }
        // Each look is a process of its own that has to connect first: together they take as long as one. While the cluster is
        // paused the others have no answer, and the health check says why.
        let looks = try_join_all(volumes.iter().map(|volume| self.see(&ceph, volume, pod.as_ref())));
        let (no_room, mut seen) = tokio::try_join!(room(self.cx, &ceph, &volumes[0].pool), looks)?;
        let of_parts = claims.parts.into_iter().zip(&seen[1..]);
        let parts: Vec<PartRecord> = of_parts
            .map(|(PartClaim { volume, wal, .. }, seen)| PartRecord {
                volume,
                wal,
                image: seen.image.clone(),
                snapshot: None,
            })
            .collect();
        preflight::one_pool(&seen[0].image, &parts)?;
        let database = match &pod {
            None => Database::Stopped { doubt: seen.iter().find_map(|seen| seen.doubt.clone()) },
            Some(pod) => {
                let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
                Database::Running { pod: pod.name_any(), node, session }
            }
        };
        let most = |count: fn(&Seen) -> usize| seen.iter().map(count).max().unwrap_or_default();
        Ok(Facts {
            by_record: unasked && !beside.is_empty(),
            parts,
            beside,
            snapshots: most(|seen| seen.snapshots),
            snapshots_in_all: most(|seen| seen.snapshots_in_all),
            no_room,
            name_taken: seen.iter().any(|seen| seen.name_taken),
            database,
            image: seen.swap_remove(0).image,
        })
    }

    /// What earlier backups tell of a database that cannot be asked where it lies.
    async fn explain(
        &self,
        claims: Claims,
        mounts: &[Mount],
        session: &Session,
    ) -> Result<(Claims, Vec<String>), Problem> {
        if preflight::unexplained(mounts, &claims).is_empty() {
            return Ok((claims, Vec::new()));
        }
        let all = backups(self.cx, &self.namespace()).await?;
        let own = all.iter().filter(|backup| backup.spec.stateful_set == self.backup.spec.stateful_set);
        let mut recorded: Vec<&BackupStatus> = own
            .filter_map(|backup| backup.status.as_ref())
            .filter(|status| status.phase.is_success())
            .collect();
        recorded.sort_by_key(|status| std::cmp::Reverse(status.slot));
        preflight::explain(claims, mounts, &recorded).map_err(|unknown| match session {
            // With a session there would be nothing to explain.
            Session::Absent(problem) => Problem::new(
                problem.kind,
                format!("{}; {}", problem.reason, unknown.reason),
                problem.cure.clone(),
            ),
            Session::Open { .. } | Session::NotWanted => unknown,
        })
    }

    /// Looks at one image of the database, and whether nobody writes to it but the pod.
    async fn see(&self, ceph: &Ceph, volume: &RbdVolume, pod: Option<&Pod>) -> Result<Seen, Problem> {
        preflight::volume_fit(volume, pod.is_some())?;
        let image = volume.image_spec();
        let (info, watchers, snapshots) =
            tokio::try_join!(ceph.info(&image), ceph.watchers(&image), ceph.snapshots(&image))
                .map_err(of_ceph)?;
        let addresses: Vec<String> = watchers.iter().map(|watcher| ip_of(&watcher.address)).collect();
        let doubt = match pod {
            None => {
                let owners = ceph.lock_owners(&image).await.map_err(of_ceph)?;
                preflight::at_rest(&image, &addresses, &owners)?;
                preflight::rest_unproven(&image, info.has_exclusive_lock())
            }
            Some(_) if !info.has_exclusive_lock() => {
                return Err(Problem::new(
                    FailureKind::Permanent,
                    format!("image {image} lacks the feature exclusive-lock: a snapshot would not be atomic"),
                    format!("stop the database and run: rbd feature enable {image} exclusive-lock"),
                ));
            }
            Some(pod) => {
                preflight::watchers_fit(&pod.name_any(), &host_ips(pod), &addresses)?;
                None
            }
        };
        let own = self.order.snapshot_name();
        Ok(Seen {
            image: ImageRecord {
                pool: volume.pool.clone(),
                rados_namespace: volume.rados_namespace.clone(),
                name: volume.image.clone(),
                id: info.id,
            },
            snapshots: snapshots.iter().filter(|s| s.name.starts_with(names::SNAPSHOT_PREFIX)).count(),
            snapshots_in_all: snapshots.len(),
            name_taken: snapshots.iter().any(|snapshot| snapshot.name == own),
            doubt,
        })
    }

    /// Opens the session that backup mode will be held in, and reads what the server says of itself.
    async fn open_session(
        &mut self,
        namespace: &str,
        pod: &Pod,
        container: &Container,
        settings: &Settings,
    ) -> Result<Session, Problem> {
        let credentials = match credentials(self.cx, namespace, pod, settings).await {
            Ok(credentials) => credentials,
            Err(problem) => return Ok(Session::Absent(problem)),
        };
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone());
        let host = address.ok_or_else(|| strange("the pod is ready and has no address"))?;
        let port = port(self.cx, namespace, container).await?;
        let target = Target { host, port, database: DATABASE.to_owned(), credentials, ca_pem: None };
        let opened = async {
            let session = PostgresSession::connect(&target).await?;
            let facts = session.facts().await?;
            Ok((session, facts))
        };
        match opened.await {
            Ok((session, facts)) => {
                let open = Session::Open {
                    version: facts.version.clone(),
                    system_identifier: facts.system_identifier.clone(),
                };
                self.held = Held::Reading { session, facts: Box::new(facts) };
                Ok(open)
            }
            Err(error) => Ok(Session::Absent(of_postgres(error))),
        }
    }
}

/// Whether Ceph has room for a backup in `pool`; `Some` when only for deleting old ones.
async fn room(cx: &Context, ceph: &Ceph, pool: &str) -> Result<Option<Problem>, Problem> {
    let mut known = cx.health.lock().await;
    if let Some((_, checks)) = known.as_ref().filter(|(when, _)| when.elapsed() < HEALTH_FRESH) {
        return preflight::cluster_fit(checks, pool);
    }
    match ceph.health().await {
        Ok(checks) => {
            let fit = preflight::cluster_fit(&checks, pool);
            *known = Some((Instant::now(), checks));
            fit
        }
        // It only says sooner what the other commands would run into.
        Err(error) => {
            warn!(error = %error, "look at the health of Ceph: going on without");
            Ok(None)
        }
    }
}

/// Every backup of a namespace, from the API server itself: a cache may not show the newest.
pub async fn backups(cx: &Context, namespace: &str) -> Result<Vec<PostgresBackup>, Problem> {
    let api = Api::<PostgresBackup>::namespaced(cx.kubernetes.client().clone(), namespace);
    let list = call(format!("list the backups of {namespace}"), api.list(&ListParams::default())).await;
    Ok(list.map_err(|error| of_kubernetes(&error))?.items)
}

/// The StatefulSet as it is now, if it is protected.
pub async fn protected(cx: &Context, namespace: &str, name: &str) -> Result<Option<StatefulSet>, Problem> {
    let sets = Api::<StatefulSet>::namespaced(cx.kubernetes.client().clone(), namespace);
    let found = find(format!("get the StatefulSet {namespace}/{name}"), &sets, name).await;
    let is_protected = |set: &StatefulSet| {
        set.labels().get(names::PROTECT_LABEL).is_some_and(|value| value == names::PROTECT_VALUE)
    };
    Ok(found.map_err(|error| of_kubernetes(&error))?.filter(is_protected))
}

/// The pod of the one replica; `None` when the StatefulSet is scaled to zero and the pod is gone.
pub async fn pod(cx: &Context, namespace: &str, database: &StatefulSet) -> Result<Option<Pod>, Problem> {
    let name = format!("{}-{}", database.name_any(), first_ordinal(database));
    let pods = Api::<Pod>::namespaced(cx.kubernetes.client().clone(), namespace);
    let found = find(format!("get the pod {namespace}/{name}"), &pods, &name).await;
    let pod = found.map_err(|error| of_kubernetes(&error))?;
    let replicas = database.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    match pod {
        Some(pod) if pod.metadata.deletion_timestamp.is_some() => Err(Problem::new(
            FailureKind::Transient,
            format!("the pod {name} is being deleted"),
            "wait: the backup is tried again when it is gone or back",
        )),
        None if replicas > 0 => Err(Problem::new(
            FailureKind::Transient,
            format!("the pod {name} does not exist, though the StatefulSet wants it"),
            "see why with: kubectl describe statefulset",
        )),
        other => Ok(other),
    }
}

/// User and password: the annotated Secret, or what the pod itself was started with.
pub async fn credentials(
    cx: &Context,
    namespace: &str,
    pod: &Pod,
    settings: &Settings,
) -> Result<Credentials, Problem> {
    let kubernetes = &cx.kubernetes;
    let found = match &settings.credentials {
        Some(secret) => kubernetes.credentials(namespace, secret).await.map(Some),
        None => kubernetes.credentials_of_pod(pod).await,
    };
    let args = &cx.args;
    match found {
        Ok(Some(credentials)) => Ok(credentials),
        Ok(None) => Err(Problem::new(
            FailureKind::Credentials,
            "no container of the pod has a POSTGRES_PASSWORD",
            "make a Secret with username and password and name it in howdah.dev/credentials",
        )),
        Err(KubernetesError::Forbidden { message, .. }) => Err(Problem::new(
            FailureKind::Credentials,
            format!("the scheduler may not read the credentials: {message}"),
            format!(
                "run: kubectl create rolebinding howdah-credentials -n {namespace} \
                 --clusterrole=howdah-credentials --serviceaccount={}:{}",
                args.namespace, args.service_account
            ),
        )),
        Err(error @ (KubernetesError::NotFound { .. } | KubernetesError::Incomplete { .. })) => {
            Err(Problem::new(
                FailureKind::Credentials,
                error.to_string(),
                "make the Secret with the keys username and password",
            ))
        }
        Err(error) => Err(of_kubernetes(&error)),
    }
}

/// `PGPORT` of the container, or the default; the names of container ports are not trusted.
pub async fn port(cx: &Context, namespace: &str, container: &Container) -> Result<u16, Problem> {
    let found = cx.kubernetes.environment(namespace, container, "PGPORT").await;
    // A port that stands in a Secret we may not read is a rarity: the default is tried then.
    let text = found.ok().flatten();
    Ok(text.and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_PORT))
}

/// The container that runs PostgreSQL, and its mounts: the first one with a claim above its data directory.
pub fn database_container<'a>(
    spec: &'a PodSpec,
    claim_name: &dyn Fn(&str) -> Option<String>,
) -> Result<(&'a Container, Vec<Mount>), Problem> {
    let mounts = |container: &Container| -> Vec<Mount> {
        let mounts = container.volume_mounts.iter().flatten();
        mounts
            .map(|mount| Mount {
                path: mount.mount_path.clone(),
                volume: mount.name.clone(),
                claim: claim_name(&mount.name),
            })
            .collect()
    };
    let all: Vec<(&Container, Vec<Mount>)> =
        spec.containers.iter().map(|container| (container, mounts(container))).collect();
    let fits = all
        .iter()
        .position(|(container, mounts)| preflight::claims(mounts, &[data_directory(container)]).is_ok());
    let chosen = all.into_iter().nth(fits.unwrap_or(0));
    let (container, mounts) = chosen.ok_or_else(|| strange("the pod has no containers"))?;
    // Where no container fits, the judgement of the first one says what is wrong.
    preflight::claims(&mounts, &[data_directory(container)])?;
    Ok((container, mounts))
}

/// A value written directly into the container's environment.
fn plain_env(container: &Container, name: &str) -> Option<String> {
    container.env.iter().flatten().rfind(|variable| variable.name == name)?.value.clone()
}

fn data_directory(container: &Container) -> Place {
    let named = preflight::DATA_VARIABLES.into_iter().find_map(|variable| plain_env(container, variable));
    Place::data(named.unwrap_or_else(|| DEFAULT_DATA_DIRECTORY.to_owned()))
}

/// Every folder the backup must hold: as PostgreSQL says, or as the pod says while it cannot be asked.
pub fn places(container: &Container, server: Option<&ServerFacts>) -> Vec<Place> {
    let mut places = vec![data_directory(container)];
    if let Some(facts) = server {
        places[0].path.clone_from(&facts.data_directory);
        // One that is in place (allow_in_place_tablespaces) has a path inside the data directory.
        let outside = facts.tablespaces.iter().filter(|(_, path)| path.starts_with('/'));
        places.extend(outside.map(|(name, path)| Place::tablespace(name, path.clone())));
    }
    let wal = preflight::WAL_VARIABLES.into_iter().filter_map(|variable| plain_env(container, variable));
    places.extend(wal.map(Place::wal));
    places
}

fn fit(facts: &ServerFacts) -> Result<(), Problem> {
    preflight::server_fit(&Server {
        in_recovery: facts.in_recovery,
        fsync: facts.fsync,
        full_page_writes: facts.full_page_writes,
    })?;
    if facts.exclusive_backup {
        // Its label lies in the data directory, and a copy of that does not start by itself.
        return Err(Problem::new(
            FailureKind::Transient,
            "an exclusive backup of somebody else is on",
            "end it with: SELECT pg_stop_backup();",
        ));
    }
    Ok(())
}

/// The claim behind a volume of a pod.
fn claim_of_pod(spec: &PodSpec, volume: &str) -> Option<String> {
    let found = spec.volumes.iter().flatten().find(|found| found.name == volume)?;
    found.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.clone())
}

/// The claim behind a volume of a pod that does not exist now.
pub fn claim_of_template(database: &StatefulSet, spec: &PodSpec, volume: &str) -> Option<String> {
    let templates = database.spec.as_ref()?.volume_claim_templates.iter().flatten();
    let ordinal = first_ordinal(database);
    let made = templates.into_iter().any(|template| template.name_any() == volume);
    if made {
        return Some(format!("{volume}-{}-{ordinal}", database.name_any()));
    }
    claim_of_pod(spec, volume)
}

/// The number of the one replica: zero, unless `spec.ordinals.start` says otherwise.
pub fn first_ordinal(database: &StatefulSet) -> i32 {
    database.spec.as_ref().and_then(|spec| spec.ordinals.as_ref()?.start).unwrap_or(0)
}

pub fn host_ips(pod: &Pod) -> Vec<String> {
    let Some(status) = &pod.status else { return Vec::new() };
    let all = status.host_ips.iter().flatten().map(|host| host.ip.clone());
    all.chain(status.host_ip.clone()).collect()
}

/// The IP address in `10.77.0.11:0/123` or `[fd00::11]:0/123`.
pub fn ip_of(address: &str) -> String {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']').to_owned()
}

pub fn strange(what: &str) -> Problem {
    Problem::new(FailureKind::Transient, what, "see the object with kubectl get -o yaml")
}

pub fn of_kubernetes(error: &KubernetesError) -> Problem {
    Problem::new(
        FailureKind::Transient,
        error.to_string(),
        "see the API server, and the ClusterRole howdah-scheduler",
    )
}

pub fn of_resolve(error: &ResolveError) -> Problem {
    let (kind, cure) = match error {
        ResolveError::Kubernetes(_) | ResolveError::NotBound { .. } => {
            (FailureKind::Transient, "see the claim with kubectl describe pvc")
        }
        ResolveError::Volume { .. } => (FailureKind::Permanent, "use a volume of ceph-csi's RBD driver"),
    };
    Problem::new(kind, error.to_string(), cure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn addresses_lose_port_and_nonce() {
        assert_eq!(ip_of("10.77.0.11:0/3141"), "10.77.0.11");
        assert_eq!(ip_of("[fd00::11]:0/3141"), "fd00::11");
    }

    fn stopped() -> StatefulSet {
        let set = json!({
            "metadata": {"name": "pg"},
            "spec": {
                "selector": {}, "serviceName": "pg", "ordinals": {"start": 1},
                "template": {"spec": {
                    "containers": [
                        {"name": "sidecar", "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]},
                        {"name": "postgres",
                         "env": [{"name": "PGDATA", "value": "/data/pg"}],
                         "volumeMounts": [{"name": "data", "mountPath": "/data"}]}
                    ],
                    "volumes": [{"name": "tmp", "emptyDir": {}}]
                }},
                "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {}}]
            }
        });
        serde_json::from_value(set).unwrap()
    }

    #[test]
    fn the_claim_of_a_stopped_database_is_found_by_its_name() {
        let database = stopped();
        let spec = database.spec.as_ref().unwrap().template.spec.as_ref().unwrap();
        let claims = |volume: &str| claim_of_template(&database, spec, volume);
        let (container, mounts) = database_container(spec, &claims).unwrap();
        assert_eq!(container.name, "postgres");
        assert_eq!(preflight::claims(&mounts, &places(container, None)).unwrap().data, "data-pg-1");
    }

    #[test]
    fn a_wal_directory_outside_the_claim_is_refused() {
        let mut database = stopped();
        let template = database.spec.as_mut().unwrap().template.spec.as_mut().unwrap();
        let env = json!([{"name": "PGDATA", "value": "/data/pg"}, {"name": "POSTGRES_INITDB_WALDIR", "value": "/tmp/wal"}]);
        template.containers[1].env = serde_json::from_value(env).unwrap();
        let database = database;
        let spec = database.spec.as_ref().unwrap().template.spec.as_ref().unwrap();
        let claims = |volume: &str| claim_of_template(&database, spec, volume);
        let (container, mounts) = database_container(spec, &claims).unwrap();
        let problem = preflight::claims(&mounts, &places(container, None)).unwrap_err();
        assert!(problem.reason.contains("/tmp/wal"), "{}", problem.reason);
    }
}
