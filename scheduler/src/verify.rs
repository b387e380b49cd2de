//! A restore drill as the driver in [`crate::run`] sees it, and the hands that do what `core::verify` says.

mod parts;

use std::time::Duration;

use howdah_adapters::ceph::Ceph;
use howdah_adapters::kubernetes::{KubernetesError, call};
use howdah_adapters::leader::Mandate;
use howdah_adapters::records::PostgresBackup;
use howdah_core::annotations::VerifyQuery;
use howdah_core::backup::{
    BackupStatus, FailureKind, ImageRecord, Phase as BackupPhase, Problem, SnapshotRecord,
};
use howdah_core::catalogue::Entry;
use howdah_core::names;
use howdah_core::verify::{self, Effect, Event, Phase, VerifyStatus};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::events::{Event as ClusterEvent, EventType};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::{info, warn};

use self::parts::{Disk, Original, Parts, disk_name, is_of, name_of};
use crate::context::Context;
use crate::effects::preflight::{
    claim_of_template, database_container, of_kubernetes, of_resolve, places, protected,
};
use crate::effects::{connect_ceph, of_ceph};
use crate::run::{self, Operation};

/// How long an effect may take, beyond the limits of the single calls inside: a clone is made in seconds, and removing one
/// takes as long as Ceph needs to delete what recovery has written.
const EFFECT_LIMIT: Duration = Duration::from_secs(900);
/// What is swept up at a time; more than a few were never left.
const SWEEP_MAX: u32 = 20;
/// Looks whether something that was deleted is gone, before the step is tried again later.
const GONE_TRIES: u32 = 20;
/// Pause between these looks: a pod ends and a node unmaps its volume in some seconds.
const GONE_PAUSE: Duration = Duration::from_millis(1500);

/// Runs the drill of the backup `namespace/name`.
///
/// # Errors
/// If the record cannot be read or written any more; the next run resumes from it.
pub async fn run(cx: &Context, namespace: &str, name: &str, mandate: &Mandate) -> anyhow::Result<()> {
    run::run(cx, namespace, name, mandate, |record: &PostgresBackup| Drill {
        cx,
        record: record.clone(),
        ceph: None,
    })
    .await
}

/// What asks for a drill of this record by hand, unless it was acted on.
pub fn request(record: &PostgresBackup) -> Option<&str> {
    let asked = record.annotations().get(names::VERIFY_NOW)?;
    let acted_on = record.status.as_ref().and_then(|status| status.verification.as_ref()?.asked.as_ref());
    (acted_on != Some(asked)).then_some(asked.as_str())
}

/// The hands of one drill.
struct Drill<'a> {
    cx: &'a Context,
    record: PostgresBackup,
    ceph: Option<Ceph>,
}

impl Drill<'_> {
    fn uid(&self) -> String {
        self.record.uid().unwrap_or_default()
    }

    fn namespace(&self) -> String {
        self.record.namespace().unwrap_or_default()
    }

    async fn ceph(&mut self) -> Result<Ceph, Problem> {
        match &self.ceph {
            Some(ceph) => Ok(ceph.clone()),
            None => Ok(self.ceph.insert(connect_ceph(self.cx).await?).clone()),
        }
    }

    /// The backup's images and snapshots, the one with the data directory first, by their ids: a restore may have renamed an
    /// image.
    async fn sources(
        &mut self,
        status: &BackupStatus,
    ) -> Result<Vec<(ImageRecord, SnapshotRecord)>, Problem> {
        let data = (status.image.as_ref(), status.snapshot.as_ref());
        let parts = status.parts.iter().map(|part| (Some(&part.image), part.snapshot.as_ref()));
        let mut sources = Vec::new();
        for (image, snapshot) in std::iter::once(data).chain(parts) {
            let (Some(image), Some(snapshot)) = (image, snapshot) else {
                return Err(permanent(
                    "the record names no snapshot",
                    "only a backup that was taken can be tried",
                ));
            };
            let ceph = self.ceph().await?;
            let found = ceph.image_by_id(image).await.map_err(of_ceph)?;
            let image = ImageRecord { name: found.name, ..image.clone() };
            let all = ceph.snapshots(&image.spec()).await.map_err(of_ceph)?;
            if !all.iter().any(|found| found.id == snapshot.id && found.name == snapshot.name) {
                return Err(permanent(
                    format!("the snapshot {}@{} is gone", image.spec(), snapshot.name),
                    "it was pruned or removed by hand; another backup is tried next",
                ));
            }
            sources.push((image, snapshot.clone()));
        }
        Ok(sources)
    }

    /// The clone of the `n`th source; it lies beside the image.
    fn clone_of(&self, image: &ImageRecord, n: usize) -> ImageRecord {
        ImageRecord { name: disk_name(&self.uid(), n), ..image.clone() }
    }

    /// What the database runs on.
    async fn original(&self, status: &BackupStatus) -> Result<Original, Problem> {
        let (namespace, name) = (self.namespace(), self.record.spec.stateful_set.clone());
        let set = protected(self.cx, &namespace, &name).await?.ok_or_else(|| {
            permanent(
                format!("there is no protected StatefulSet {namespace}/{name}"),
                "a drill takes the image of PostgreSQL and the access to the volume from it: bring it back, at 0 replicas",
            )
        })?;
        let query = howdah_core::annotations::parse(set.annotations()).map(|settings| settings.verify_query);
        let query: VerifyQuery = query.unwrap_or_default();
        let pod = set.spec.as_ref().and_then(|spec| spec.template.spec.clone());
        let pod = pod.ok_or_else(|| permanent("the StatefulSet has no pod template", "correct it"))?;
        let claim_name = |volume: &str| claim_of_template(&set, &pod, volume);
        let (container, mounts) = database_container(&pod, &claim_name)?;
        let container = container.clone();
        let claim = howdah_core::preflight::claims(&mounts, &places(&container, None))?.data;
        let mounted_as = |claim: &str| -> Vec<String> {
            let mounts = container.volume_mounts.iter().flatten().map(|mount| mount.name.clone());
            mounts.filter(|volume| claim_name(volume).as_deref() == Some(claim)).collect()
        };
        // Each claim, and the pod's volumes that mount it.
        let mut wanted = vec![(claim.clone(), mounted_as(&claim))];
        for part in &status.parts {
            let mounted = container.volume_mounts.iter().flatten().any(|mount| mount.name == part.volume);
            let Some(claim) = claim_name(&part.volume).filter(|_| mounted) else {
                return Err(permanent(
                    format!(
                        "the backup holds the volume {}, and the StatefulSet {name} mounts none of that name",
                        part.volume
                    ),
                    "a drill mounts each volume where it was: bring the mount back",
                ));
            };
            let mounted_as = mounted_as(&claim);
            wanted.push((claim, mounted_as));
        }
        let mut disks = Vec::new();
        for (claim, mounted_as) in wanted {
            disks.push(self.disk(&namespace, &claim, mounted_as).await?);
        }
        // A snapshot that was taken after backup mode had begun holds the WAL up to there.
        let reaches = status.flushed_lsn.clone().or_else(|| status.start_lsn.clone());
        Ok(Original { disks, pod, container, query, reaches })
    }

    /// A volume of the database.
    async fn disk(&self, namespace: &str, claim: &str, mounted_as: Vec<String>) -> Result<Disk, Problem> {
        let volume =
            self.cx.kubernetes.rbd_volume(namespace, claim).await.map_err(|error| of_resolve(&error))?;
        if volume.encrypted {
            return Err(permanent(
                format!("the volume {} is encrypted by ceph-csi", volume.volume),
                "a raw clone of it has no key and cannot be tried; annotate howdah.dev/verify: never",
            ));
        }
        let volumes = Api::<PersistentVolume>::all(self.cx.kubernetes.client().clone());
        let found = call(format!("get the volume {}", volume.volume), volumes.get(&volume.volume)).await;
        let csi = found.map_err(|error| of_kubernetes(&error))?.spec.and_then(|spec| spec.csi);
        let (fs_type, stage_secret) =
            csi.map_or((None, None), |csi| (csi.fs_type, csi.node_stage_secret_ref));
        Ok(Disk { volume, fs_type, stage_secret, mounted_as })
    }

    /// Whether it can begin. Nothing is made.
    async fn preflight(&mut self, status: &BackupStatus) -> Result<Event, Problem> {
        let sources = self.sources(status).await?;
        self.original(status).await?;
        if let Some((image, _)) = sources.first() {
            // All lie in one pool.
            self.sweep(image).await;
        }
        Ok(Event::PreflightPassed)
    }

    /// Takes away what other drills left: one whose record was deleted under it, or that could not be taken away then. There
    /// is one drill at a time, so whatever is another's is nobody's.
    async fn sweep(&mut self, image: &ImageRecord) {
        let client = self.cx.kubernetes.client().clone();
        let own = self.uid();
        let listed = ListParams::default().labels(names::DRILL_LABEL).limit(SWEEP_MAX);
        let volumes = Api::<PersistentVolume>::all(client.clone());
        let left = match call("list the volumes of restore drills", volumes.list(&listed)).await {
            Ok(volumes) => volumes.items,
            Err(error) => return warn!(error = %error, "sweep up after restore drills"),
        };
        for name in left.iter().map(ResourceExt::name_any).filter(|name| !is_of(&own, name)) {
            match take_objects(client.clone(), &name).await {
                Ok(()) => info!(name, "took away what a restore drill had left"),
                Err(problem) => warn!(name, reason = problem.reason, "sweep up after restore drills"),
            }
        }
        if let Err(problem) = self.sweep_clones(image, &own).await {
            warn!(reason = problem.reason, "sweep up after restore drills");
        }
    }

    async fn sweep_clones(&mut self, image: &ImageRecord, own: &str) -> Result<(), Problem> {
        let ceph = self.ceph().await?;
        let pool = match image.rados_namespace.as_str() {
            "" => image.pool.clone(),
            namespace => format!("{}/{namespace}", image.pool),
        };
        let images = ceph.images(&pool).await.map_err(of_ceph)?;
        let left =
            images.into_iter().filter(|name| name.starts_with(names::DRILL_PREFIX) && !is_of(own, name));
        for name in left.take(SWEEP_MAX as usize) {
            let clone = ImageRecord { name, ..image.clone() }.spec();
            if ceph.watchers(&clone).await.map_err(of_ceph)?.is_empty() {
                ceph.remove_unused(&clone).await.map_err(of_ceph)?;
                info!(clone, "removed a clone that a restore drill had left");
            }
        }
        Ok(())
    }

    /// Clones the snapshots from nothing: what an earlier try left may have been written to.
    async fn make_clones(&mut self, status: &BackupStatus) -> Result<Event, Problem> {
        let sources = self.sources(status).await?;
        let ceph = self.ceph().await?;
        for (n, (image, snapshot)) in sources.iter().enumerate() {
            let clone = self.clone_of(image, n).spec();
            let like = ceph.info(&image.spec()).await.map_err(of_ceph)?;
            ceph.remove_unused(&clone).await.map_err(of_ceph)?;
            ceph.clone_snapshot(&image.spec(), &snapshot.name, &clone, &like).await.map_err(of_ceph)?;
        }
        Ok(Event::Cloned)
    }

    /// Makes volumes, claims and pod; what is there already is of an earlier try.
    async fn start(&mut self, status: &BackupStatus) -> Result<Event, Problem> {
        let sources = self.sources(status).await?;
        let ceph = self.ceph().await?;
        let mut sizes = Vec::new();
        for (n, (image, _)) in sources.iter().enumerate() {
            sizes.push(ceph.info(&self.clone_of(image, n).spec()).await.map_err(of_ceph)?.size);
        }
        let original = self.original(status).await?;
        let parts = Parts::new(&self.uid(), &original, &sizes)
            .map_err(|error| permanent(format!("make the drill's pod: {error}"), "report this as a bug"))?;
        let client = self.cx.kubernetes.client().clone();
        for made in &parts.volumes {
            create(&Api::all(client.clone()), &made.volume).await?;
            create(&Api::namespaced(client.clone(), names::VERIFY_NAMESPACE), &made.claim).await?;
        }
        create(&Api::namespaced(client, names::VERIFY_NAMESPACE), &parts.pod).await?;
        Ok(Event::Started)
    }

    async fn look(&self, status: &BackupStatus) -> Result<Event, Problem> {
        let name = name_of(&self.uid());
        let pods = Api::<Pod>::namespaced(self.cx.kubernetes.client().clone(), names::VERIFY_NAMESPACE);
        let found = call(format!("get the pod {}/{name}", names::VERIFY_NAMESPACE), pods.get(&name)).await;
        let pod = found.map_err(|error| of_kubernetes(&error))?;
        let pod_status = pod.status.unwrap_or_default();
        let container = pod_status.container_statuses.iter().flatten().next();
        let state = container.and_then(|container| container.state.as_ref());
        if let Some(ended) = state.and_then(|state| state.terminated.as_ref()) {
            let expect = match self.original(status).await {
                Ok(original) => original.query.query.and(original.query.expect),
                Err(problem) => return Err(problem),
            };
            return Ok(Event::Ended(verify::read(
                ended.exit_code,
                ended.reason.as_deref().unwrap_or_default(),
                ended.message.as_deref().unwrap_or_default(),
                status.system_identifier.as_deref(),
                expect.as_deref(),
            )));
        }
        if pod_status.phase.as_deref() == Some("Failed") {
            let why =
                pod_status.message.or(pod_status.reason).unwrap_or_else(|| "no reason given".to_owned());
            return Ok(Event::Ended(verify::Ended::Silent {
                seen: format!("the drill's pod failed: {why}"),
            }));
        }
        if state.is_some_and(|state| state.running.is_some()) {
            return Ok(Event::Runs { pending: None });
        }
        let waits = state.and_then(|state| state.waiting.as_ref());
        let unscheduled =
            pod_status.conditions.iter().flatten().find(|condition| condition.status == "False");
        let pending = waits
            .map(|waits| {
                [waits.reason.clone(), waits.message.clone()].map(Option::unwrap_or_default).join(": ")
            })
            .or_else(|| unscheduled.and_then(|condition| condition.message.clone()));
        Ok(Event::Runs { pending: Some(pending.unwrap_or_else(|| "it is not scheduled yet".to_owned())) })
    }

    /// Takes everything away, pod first; waits a while for each to be gone.
    async fn remove(&mut self, status: &BackupStatus) -> Result<Event, Problem> {
        let client = self.cx.kubernetes.client().clone();
        let images: Vec<&ImageRecord> =
            status.image.iter().chain(status.parts.iter().map(|part| &part.image)).collect();
        for n in 0..=status.parts.len() {
            take_objects(client.clone(), &disk_name(&self.uid(), n)).await?;
        }
        for (n, image) in images.into_iter().enumerate() {
            self.remove_clone(&self.clone_of(image, n)).await?;
        }
        Ok(Event::Removed)
    }

    async fn remove_clone(&mut self, clone: &ImageRecord) -> Result<(), Problem> {
        let clone = clone.spec();
        let ceph = self.ceph().await?;
        for left in (0..GONE_TRIES).rev() {
            let watchers = match ceph.watchers(&clone).await {
                Ok(watchers) => watchers,
                Err(error) if error.is_not_found() => return Ok(()),
                Err(error) => return Err(of_ceph(error)),
            };
            match watchers.first() {
                None => break,
                Some(watcher) if left == 0 => {
                    return Err(transient(
                        format!("{clone} is still open on {}", watcher.address),
                        "see the node: it unmaps the volume when the drill's pod is gone",
                    ));
                }
                Some(_) => tokio::time::sleep(GONE_PAUSE).await,
            }
        }
        ceph.remove_unused(&clone).await.map_err(of_ceph)
    }

    /// Writes the result beside the backup's entry in the catalogue.
    async fn write_down(&mut self, status: &BackupStatus) -> Result<Event, Problem> {
        let sources = self.sources(status).await?;
        let name = self.record.name_any();
        let ceph = self.ceph().await?;
        let spec = &self.record.spec;
        let taken = status.finished_at.unwrap_or_else(Timestamp::now);
        let entry = Entry::of(&self.namespace(), &spec.stateful_set, &name, spec.trigger, status, taken);
        let entry = entry
            .ok_or_else(|| permanent("the record lacks its snapshot or image", "report this as a bug"))?;
        let value = entry
            .to_value()
            .map_err(|error| permanent(error, "the record in the API server is whole; nothing to do"))?;
        let key = names::image_meta_key(&entry.snapshot);
        for (image, _) in &sources {
            ceph.set_metadata(&image.spec(), &key, &value).await.map_err(of_ceph)?;
        }
        Ok(Event::Recorded)
    }

    async fn perform_unbounded(
        &mut self,
        effect: &Effect,
        status: &BackupStatus,
    ) -> Result<Option<Event>, Problem> {
        Ok(Some(match effect {
            Effect::Preflight => self.preflight(status).await?,
            Effect::Clone => self.make_clones(status).await?,
            Effect::Start => self.start(status).await?,
            Effect::Look => self.look(status).await?,
            Effect::Remove => self.remove(status).await?,
            Effect::Record => self.write_down(status).await?,
            Effect::Wait { until } => {
                let left = until.duration_since(Timestamp::now());
                tokio::time::sleep(Duration::try_from(left).unwrap_or_default()).await;
                Event::RetryDue
            }
            Effect::Announce => {
                self.announce(status).await;
                return Ok(None);
            }
        }))
    }

    /// Says how the drill ended: in the metrics, the log, and as an Event of the StatefulSet.
    async fn announce(&self, status: &BackupStatus) {
        let drill = status.verification.clone().unwrap_or_default();
        self.cx.metrics.drill_ended(&drill);
        let backup = self.record.name_any();
        info!(backup, phase = drill.phase.as_str(), attempt = drill.attempt, "restore drill ended");
        let why = drill.failure.as_ref().map_or(String::new(), |f| format!("{}; {}", f.reason, f.cure));
        let (kind, reason, note) = match drill.phase {
            Phase::Verified => {
                let report = drill.report.unwrap_or_default();
                let (recovery_ms, rows) =
                    (report.recovery_ms.unwrap_or_default(), report.rows.unwrap_or_default());
                let note = format!(
                    "backup {backup} was restored and read: recovery took {recovery_ms} ms, {rows} rows"
                );
                (EventType::Normal, "BackupVerified", note)
            }
            Phase::Damaged => {
                (EventType::Warning, "BackupDamaged", format!("backup {backup} is damaged: {why}"))
            }
            _ => (EventType::Warning, "DrillFailed", format!("backup {backup} could not be tried: {why}")),
        };
        let event = ClusterEvent {
            type_: kind,
            reason: reason.to_owned(),
            note: Some(note),
            action: "Verify".to_owned(),
            secondary: None,
        };
        let database = self.cx.caches.database(&self.namespace(), &self.record.spec.stateful_set);
        let published = match database.as_deref() {
            Some(database) => self.cx.kubernetes.publish(event, database).await,
            None => self.cx.kubernetes.publish(event, &self.record).await,
        };
        if let Err(error) = published {
            warn!(error = %error, "publish an event");
        }
    }
}

impl Operation for Drill<'_> {
    type Record = PostgresBackup;
    type Event = Event;
    type Effect = Effect;
    const NOUN: &'static str = "restore drill";

    fn first_event(record: &PostgresBackup) -> Option<Event> {
        // Whoever runs it has decided that it is due; a backup that is not there, or not over, is not tried.
        let status = record.status.as_ref()?;
        let tried = matches!(status.phase, BackupPhase::Taken | BackupPhase::Verified | BackupPhase::Damaged);
        let over = status.verification.as_ref().is_some_and(|drill| drill.phase.is_terminal());
        (tried && (!over || request(record).is_some())).then_some(Event::Resumed)
    }

    fn phase(status: &BackupStatus) -> &'static str {
        status.verification.as_ref().map_or("Requested", |drill| drill.phase.as_str())
    }

    fn label(event: &Event) -> &'static str {
        match event {
            Event::Resumed => "resumed",
            Event::PreflightPassed => "preflight passed",
            Event::Cloned => "cloned",
            Event::Started => "started",
            Event::Runs { .. } => "runs",
            Event::Ended(_) => "ended",
            Event::Removed => "removed",
            Event::Recorded => "recorded",
            Event::RetryDue => "retry due",
            Event::Failed(_) => "failed",
        }
    }

    fn next(
        &self,
        status: &BackupStatus,
        event: Event,
        now: Timestamp,
    ) -> anyhow::Result<(BackupStatus, Vec<Effect>)> {
        let mut drill = status.verification.clone().unwrap_or_default();
        if drill.phase.is_terminal() || drill.phase == Phase::Requested {
            // Begun anew, on request.
            let asked = self.record.annotations().get(names::VERIFY_NOW).cloned();
            drill = VerifyStatus { asked, ..VerifyStatus::default() };
        }
        let (drill, effects) = verify::next(&drill, event, now)?;
        let phase = match drill.phase {
            Phase::Verified => BackupPhase::Verified,
            Phase::Damaged => BackupPhase::Damaged,
            _ => status.phase,
        };
        Ok((BackupStatus { phase, verification: Some(drill), ..status.clone() }, effects))
    }

    async fn perform(&mut self, effect: &Effect, status: &BackupStatus) -> Option<Event> {
        let problem = match tokio::time::timeout(EFFECT_LIMIT, self.perform_unbounded(effect, status)).await {
            Ok(Ok(event)) => return event,
            Ok(Err(problem)) => problem,
            Err(_) => transient(
                format!("{} took longer than {} s", Self::phase(status), EFFECT_LIMIT.as_secs()),
                "look at the load of the API server and of Ceph",
            ),
        };
        warn!(
            backup = self.record.name_any(),
            phase = Self::phase(status),
            reason = problem.reason,
            cure = problem.cure,
            "step of a restore drill failed"
        );
        Some(Event::Failed(problem))
    }
}

/// Creates an object, unless an earlier try did.
async fn create<K>(api: &Api<K>, object: &K) -> Result<(), Problem>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + Serialize + DeserializeOwned,
{
    let attempt = format!("create the {} {} of a restore drill", K::kind(&()), object.name_any());
    match call(attempt, api.create(&PostParams::default(), object)).await {
        Ok(_) | Err(KubernetesError::AlreadyExists { .. }) => Ok(()),
        Err(error @ KubernetesError::Forbidden { .. }) => Err(permanent(
            error.to_string(),
            "apply deploy/base/verify.yaml, which makes the namespace howdah-verify and the rights in it; its quota may \
             stand against the pod, too",
        )),
        Err(error) => Err(of_kubernetes(&error)),
    }
}

/// Deletes pod, claim and volume of a drill, and waits until they are gone.
async fn take_objects(client: Client, name: &str) -> Result<(), Problem> {
    delete(&Api::<Pod>::namespaced(client.clone(), names::VERIFY_NAMESPACE), name).await?;
    delete(&Api::<PersistentVolumeClaim>::namespaced(client.clone(), names::VERIFY_NAMESPACE), name).await?;
    delete(&Api::<PersistentVolume>::all(client), name).await
}

/// Deletes an object and waits until it is gone.
async fn delete<K>(api: &Api<K>, name: &str) -> Result<(), Problem>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let kind = K::kind(&());
    for left in (0..GONE_TRIES).rev() {
        let attempt = format!("delete the {kind} {name}");
        match call(attempt, api.delete(name, &DeleteParams::default())).await {
            Err(KubernetesError::NotFound { .. }) => return Ok(()),
            Ok(_) if left == 0 => {
                return Err(transient(
                    format!("the {kind} {name} is still there"),
                    "see what holds it: kubectl get -o yaml shows its finalizers",
                ));
            }
            Ok(_) => tokio::time::sleep(GONE_PAUSE).await,
            Err(error) => return Err(of_kubernetes(&error)),
        }
    }
    Ok(())
}

fn permanent(reason: impl Into<String>, cure: impl Into<String>) -> Problem {
    Problem::new(FailureKind::Permanent, reason, cure)
}

fn transient(reason: impl Into<String>, cure: impl Into<String>) -> Problem {
    Problem::new(FailureKind::Transient, reason, cure)
}
