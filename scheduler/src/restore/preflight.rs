//! The preflight of a restore: from the StatefulSet to its image, and from the wish to the snapshot or safety copy that
//! is to take its place. Only reads.

use howdah_adapters::ceph::{Ceph, ImageInfo};
use howdah_adapters::kubernetes::{call, find};
use howdah_adapters::records::{PostgresBackup, PostgresRestore};
use howdah_core::backup::{ImageRecord, Phase as BackupPhase, Problem, SnapshotRecord};
use howdah_core::restore::{
    CHAIN_MAX, Candidate, Facts, Goal, JournalRecord, Method, Newcomer, Phase, RestoreStatus, Source,
    VolumeRecord, choose, fits,
};
use howdah_core::volume::RbdVolume;
use howdah_core::{lineage, names, preflight};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};

use super::{Restore, known, permanent, transient};
use crate::effects::of_ceph;
use crate::effects::preflight::{
    claim_of_template, database_container, first_ordinal, host_ips, ip_of, of_kubernetes, of_resolve, places,
    strange,
};

/// What a pod gets where its template says nothing.
const DEFAULT_GRACE_S: i64 = 30;

/// What takes the place, and how.
struct Chosen {
    source: Source,
    method: Method,
    incoming: Option<ImageRecord>,
    /// What `spec.replicas` is to be in the end, if not what it was.
    replicas_after: Option<i32>,
}

/// What gets the data.
struct InPlace<'a> {
    name: &'a str,
    replicas: i32,
    claim: &'a str,
    image: &'a ImageRecord,
    info: &'a ImageInfo,
}

impl Restore<'_> {
    /// Finds out whether, what and how can be restored now.
    pub(super) async fn preflight(&mut self) -> Result<Facts, Problem> {
        self.ceph = None;
        let namespace = self.namespace();
        let database = self.database().await?;
        let name = database.name_any();
        self.gate_fits(&database)?;
        let spec = database.spec.clone().unwrap_or_default();
        let replicas = spec.replicas.unwrap_or(1);
        if replicas > 1 {
            return Err(permanent(
                format!("the StatefulSet {name} has {replicas} replicas"),
                "scale it to 1: howdah restores a database of one pod",
            ));
        }
        let backups = self.backups().await?;
        no_backup_runs(&backups, &name)?;

        let template = spec.template.spec.as_ref().ok_or_else(|| strange("the template has no pod spec"))?;
        let claim_name = |volume: &str| claim_of_template(&database, template, volume);
        let (container, mounts) = database_container(template, &claim_name)?;
        let claim = preflight::claims(&mounts, &places(container, None))?.data;
        let volume = self.cx.kubernetes.rbd_volume(&namespace, &claim).await;
        let volume = volume.map_err(|error| of_resolve(&error))?;
        preflight::volume_fit(&volume, false)?;

        let ceph = self.ceph().await?;
        let info = ceph.info(&volume.image_spec()).await.map_err(of_ceph)?;
        let image = ImageRecord {
            pool: volume.pool.clone(),
            rados_namespace: volume.rados_namespace.clone(),
            name: volume.image.clone(),
            id: info.id.clone(),
        };
        let pod = self.only_the_pod_writes(&ceph, &database, &image).await?;
        let journal = journal_of(&ceph, &volume).await?;
        let in_place = InPlace { name: &name, replicas, claim: &claim, image: &image, info: &info };
        let chosen = match self.order.goal.clone() {
            Goal::Undo(restore) => self.safety_copy(&ceph, &restore, &image).await?,
            goal if self.record.spec.into.is_some() => {
                self.backup_of_another(&ceph, &goal, &backups, &in_place, pod.as_ref()).await?
            }
            goal => self.backup(&ceph, &goal, &backups, &image).await?,
        };
        let grace = template.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE_S);
        Ok(Facts {
            source: chosen.source,
            method: chosen.method,
            volume: VolumeRecord { claim, volume: volume.volume, journal },
            image,
            size: info.size,
            replicas,
            replicas_after: chosen.replicas_after,
            grace: SignedDuration::from_secs(grace),
            incoming: chosen.incoming,
        })
    }

    /// The StatefulSet as it is now, if it is the one that is meant and howdah protects it.
    pub(super) async fn database(&self) -> Result<StatefulSet, Problem> {
        let (namespace, name) = (self.namespace(), self.record.spec.target());
        let api = Api::<StatefulSet>::namespaced(self.cx.kubernetes.client().clone(), &namespace);
        let attempt = format!("get the StatefulSet {namespace}/{name}");
        let found = find(attempt, &api, name).await.map_err(|error| of_kubernetes(&error))?;
        let found = found.ok_or_else(|| {
            permanent(
                format!("there is no StatefulSet {namespace}/{name}"),
                "name one with --namespace and NAME",
            )
        })?;
        if found.labels().get(names::PROTECT_LABEL).map(String::as_str) != Some(names::PROTECT_VALUE) {
            return Err(permanent(
                format!("the StatefulSet {namespace}/{name} is not under howdah's care"),
                format!("run: kubectl label statefulset {name} -n {namespace} {}=true", names::PROTECT_LABEL),
            ));
        }
        let wanted = &self.record.spec.stateful_set_uid;
        if wanted.is_some() && *wanted != found.uid() {
            return Err(permanent(
                format!("the StatefulSet {namespace}/{name} was replaced by another of the same name"),
                "create the restore anew if that one is meant",
            ));
        }
        Ok(found)
    }

    /// Whether no other operation holds the database.
    pub(super) fn gate_fits(&self, database: &StatefulSet) -> Result<(), Problem> {
        match database.annotations().get(names::GATE) {
            Some(gate) if *gate != self.order.gate() => Err(transient(
                format!("the operation {gate} holds the database"),
                "wait for it, or see why it does not end: kubectl get pgr",
            )),
            _ => Ok(()),
        }
    }

    /// Every backup of the namespace, from the API server itself: a cache may not show the newest.
    pub(super) async fn backups(&self) -> Result<Vec<PostgresBackup>, Problem> {
        let namespace = self.namespace();
        let api = Api::<PostgresBackup>::namespaced(self.cx.kubernetes.client().clone(), &namespace);
        let attempt = format!("list the backups of {namespace}");
        let list = call(attempt, api.list(&ListParams::default())).await;
        Ok(list.map_err(|error| of_kubernetes(&error))?.items)
    }

    /// The pod, if there is one and the image is open on its node alone; without one it must be open on none.
    async fn only_the_pod_writes(
        &self,
        ceph: &Ceph,
        database: &StatefulSet,
        image: &ImageRecord,
    ) -> Result<Option<Pod>, Problem> {
        let (namespace, name) = (self.namespace(), pod_name(database));
        let pods = Api::<Pod>::namespaced(self.cx.kubernetes.client().clone(), &namespace);
        let pod = find(format!("get the pod {namespace}/{name}"), &pods, &name).await;
        let pod = pod.map_err(|error| of_kubernetes(&error))?;
        let watchers = ceph.watchers(&image.spec()).await.map_err(of_ceph)?;
        let addresses: Vec<String> = watchers.iter().map(|watcher| ip_of(&watcher.address)).collect();
        match &pod {
            Some(pod) => preflight::watchers_fit(&name, &host_ips(pod), &addresses)?,
            // A lock that is left matters where the image is written to; that is judged with the proofs.
            None => preflight::at_rest(&image.spec(), &addresses, &[])?,
        }
        Ok(pod)
    }

    /// The backup that is meant, if it lies in this image or in one that it took the place of.
    async fn backup(
        &self,
        ceph: &Ceph,
        goal: &Goal,
        backups: &[PostgresBackup],
        image: &ImageRecord,
    ) -> Result<Chosen, Problem> {
        let chosen = self.choose(goal, backups)?;
        let (name, recorded) = (&chosen.name, known(&chosen.image, "image")?);
        let source = if recorded.id == image.id {
            image.clone()
        } else {
            let metadata = ceph.metadata(&image.spec()).await.map_err(of_ceph)?;
            if !lineage::ids(&metadata).contains(&recorded.id) || recorded.pool != image.pool {
                return Err(permanent(
                    format!(
                        "the backup {name} is of another volume: it lies in the image with the id {}, and the claim's \
                         image {} has the id {}",
                        recorded.id, image.name, image.id
                    ),
                    "choose a backup that was taken since the volume was made",
                ));
            }
            image_of(ceph, name, recorded).await?
        };
        let snapshot = snapshot_of(ceph, &chosen, &source).await?;
        match self.order.method {
            Method::Swap => can_be_cloned(ceph, &source).await?,
            Method::Rollback if source.id != image.id => {
                return Err(permanent(
                    format!("the backup {name} lies in an image that an earlier restore set aside"),
                    "an image is rolled back to its own snapshots only: use the method swap",
                ));
            }
            Method::Rollback => {}
        }
        let source = source_of(chosen, source, snapshot);
        Ok(Chosen { source, method: self.order.method, incoming: None, replicas_after: None })
    }

    /// The backup of another database that is meant, if what gets it never ran.
    async fn backup_of_another(
        &self,
        ceph: &Ceph,
        goal: &Goal,
        backups: &[PostgresBackup],
        in_place: &InPlace<'_>,
        pod: Option<&Pod>,
    ) -> Result<Chosen, Problem> {
        let InPlace { name, replicas, claim, image, info } = *in_place;
        let of = &self.record.spec.stateful_set;
        if of == name {
            return Err(permanent(
                format!("spec.into names {name}, as spec.statefulSet does"),
                "name another StatefulSet; to restore in place, leave into out",
            ));
        }
        if self.order.method != Method::Swap {
            return Err(permanent(
                "spec.method is rollback, and spec.into names another StatefulSet",
                "use the method swap: the image of the other one has no snapshot to be rolled back to",
            ));
        }
        let chosen = self.choose(goal, backups)?;
        let source = image_of(ceph, &chosen.name, known(&chosen.image, "image")?).await?;
        let snapshot = snapshot_of(ceph, &chosen, &source).await?;
        can_be_cloned(ceph, &source).await?;
        let pod = pod.map(Pod::name_any);
        let newcomer = Newcomer {
            name,
            replicas,
            pod: pod.as_deref(),
            claim,
            image,
            size: info.size,
            used: ceph.used_bytes(&image.spec()).await.map_err(of_ceph)?,
            snapshots: ceph.snapshots(&image.spec()).await.map_err(of_ceph)?.len(),
            is_clone: info.parent.is_some(),
        };
        fits(&newcomer, &chosen.name, &source, snapshot.size)?;
        let source = source_of(chosen, source, snapshot);
        Ok(Chosen { source, method: Method::Swap, incoming: None, replicas_after: Some(1) })
    }

    fn choose(&self, goal: &Goal, backups: &[PostgresBackup]) -> Result<Candidate, Problem> {
        let candidates: Vec<Candidate> = backups.iter().map(PostgresBackup::candidate).collect();
        choose(goal, &self.record.spec.stateful_set, &candidates, Timestamp::now()).cloned()
    }

    /// What the restore that is to be undone kept, if that still fits what is in place.
    async fn safety_copy(&self, ceph: &Ceph, name: &str, image: &ImageRecord) -> Result<Chosen, Problem> {
        let attempt = format!("get the restore {}/{name}", self.namespace());
        let found = find(attempt, &self.records(), name).await.map_err(|error| of_kubernetes(&error))?;
        let undone: PostgresRestore =
            found.ok_or_else(|| permanent(format!("there is no restore {name}"), "see kubectl get pgr"))?;
        if undone.spec.target() != self.record.spec.target() {
            return Err(permanent(
                format!("the restore {name} is of the StatefulSet {}", undone.spec.target()),
                "undo it there",
            ));
        }
        let beside = undone.spec.into.is_some();
        let status = undone.status.unwrap_or_default();
        if status.phase != Phase::Completed {
            return Err(permanent(
                format!(
                    "the restore {name} is {}: only a completed one is undone by another",
                    status.phase.as_str()
                ),
                format!("ask it to go back by itself: kubectl howdah restore undo {name}"),
            ));
        }
        let method = status.method.unwrap_or_default();
        let before = known(&status.image, "image")?;
        let in_place = match method {
            Method::Swap => known(&status.incoming, "new image")?,
            Method::Rollback => before,
        };
        if in_place.id != image.id {
            return Err(permanent(
                format!(
                    "since the restore {name} another image took the place: it left the id {}, and now it is {}",
                    in_place.id, image.id
                ),
                "undo the later restore first (kubectl get pgr)",
            ));
        }
        let taken_at = status.started_at;
        // A copy goes back to where it never ran; a database in place stays as it is, up or down.
        let replicas_after = status.replicas.filter(|_| beside);
        let source = |image: ImageRecord, snapshot| Source {
            name: name.to_owned(),
            taken_at,
            consistency: None,
            image,
            snapshot,
        };
        match method {
            Method::Swap => {
                let found =
                    ceph.image_by_id(before).await.map_err(|error| safety_gone(error, name, &status))?;
                let kept = ImageRecord { name: found.name, ..before.clone() };
                let source = source(kept.clone(), None);
                Ok(Chosen { source, method, incoming: Some(kept), replicas_after })
            }
            Method::Rollback => {
                let snapshot = known(&status.safety_snapshot, "safety snapshot")?;
                let snapshots = ceph.snapshots(&image.spec()).await.map_err(of_ceph)?;
                if !snapshots.iter().any(|found| found.by_user && found.id == snapshot.id) {
                    return Err(gone(name, &status));
                }
                let source = source(image.clone(), Some(snapshot.clone()));
                Ok(Chosen { source, method, incoming: None, replicas_after })
            }
        }
    }
}

fn safety_gone(error: howdah_adapters::ceph::CephError, name: &str, status: &RestoreStatus) -> Problem {
    if error.is_not_found() { gone(name, status) } else { of_ceph(error) }
}

fn gone(name: &str, status: &RestoreStatus) -> Problem {
    let until = status.safety_until.map_or(String::new(), |until| format!(" (it was kept until {until})"));
    permanent(
        format!("the safety copy of the restore {name} is gone{until}"),
        "restore a backup instead; an image may still be in the trash (rbd trash ls)",
    )
}

/// A backup that has begun is waited for: it may have the database in backup mode.
pub(super) fn no_backup_runs(backups: &[PostgresBackup], database: &str) -> Result<(), Problem> {
    let running = backups.iter().find(|backup| {
        let phase = backup.status.as_ref().map(|status| status.phase).unwrap_or_default();
        backup.spec.stateful_set == database && !phase.is_terminal() && phase != BackupPhase::Reserved
    });
    match running {
        Some(backup) => Err(transient(
            format!("the backup {} is under way", backup.name_any()),
            "nothing to do: the restore begins when it has ended",
        )),
        None => Ok(()),
    }
}

/// The image that a backup lies in, by the name it has now.
async fn image_of(ceph: &Ceph, backup: &str, recorded: &ImageRecord) -> Result<ImageRecord, Problem> {
    let found = ceph.image_by_id(recorded).await.map_err(|error| match error.is_not_found() {
        true => permanent(
            format!("the image with the id {} that the backup {backup} lies in is gone", recorded.id),
            "see whether it is in the trash (rbd trash ls), or choose another backup",
        ),
        false => of_ceph(error),
    })?;
    Ok(ImageRecord { name: found.name, ..recorded.clone() })
}

/// The snapshot of a backup, if it is there.
async fn snapshot_of(
    ceph: &Ceph,
    backup: &Candidate,
    image: &ImageRecord,
) -> Result<SnapshotRecord, Problem> {
    let snapshot = known(&backup.snapshot, "snapshot")?;
    let snapshots = ceph.snapshots(&image.spec()).await.map_err(of_ceph)?;
    let there =
        snapshots.iter().any(|found| found.by_user && found.id == snapshot.id && found.name == snapshot.name);
    if there {
        return Ok(snapshot.clone());
    }
    Err(permanent(
        format!("the snapshot {}@{} of the backup {} is gone", image.spec(), snapshot.name, backup.name),
        "choose another backup",
    ))
}

fn source_of(backup: Candidate, image: ImageRecord, snapshot: SnapshotRecord) -> Source {
    let Candidate { name, taken_at, consistency, .. } = backup;
    Source { name, taken_at, consistency, image, snapshot: Some(snapshot) }
}

pub(super) fn pod_name(database: &StatefulSet) -> String {
    format!("{}-{}", database.name_any(), first_ordinal(database))
}

/// Where ceph-csi keeps its books of the volume, if it noted the image's id there: then it deletes by that id.
async fn journal_of(ceph: &Ceph, volume: &RbdVolume) -> Result<Option<JournalRecord>, Problem> {
    let Some(journal) = &volume.journal else { return Ok(None) };
    let key = howdah_adapters::ceph::IMAGE_ID_KEY;
    let noted = ceph
        .journal_value(&journal.pool, &volume.rados_namespace, &journal.object, key)
        .await
        .map_err(of_ceph)?;
    Ok(noted.map(|_| JournalRecord {
        pool: journal.pool.clone(),
        rados_namespace: volume.rados_namespace.clone(),
        object: journal.object.clone(),
    }))
}

/// Whether a node can map a clone of the image's snapshot.
async fn can_be_cloned(ceph: &Ceph, image: &ImageRecord) -> Result<(), Problem> {
    let mut info: ImageInfo = ceph.info(&image.spec()).await.map_err(of_ceph)?;
    if !info.features.iter().any(|feature| feature == "layering") {
        return Err(permanent(
            format!("image {} lacks the feature layering, so its snapshots cannot be cloned", image.spec()),
            "use the method rollback",
        ));
    }
    let mut depth = 1;
    while let Some(parent) = &info.parent {
        depth += 1;
        if depth > CHAIN_MAX {
            return Err(permanent(
                format!("image {} is the end of a chain of {depth} clones already", image.spec()),
                format!("stop the database and run: rbd flatten {}", image.spec()),
            ));
        }
        match ceph.info(&parent.spec()).await {
            Ok(next) => info = next,
            // A parent in the trash opens by no name; the chain is at least as long as it was counted.
            Err(error) if error.is_not_found() => break,
            Err(error) => return Err(of_ceph(error)),
        }
    }
    Ok(())
}
