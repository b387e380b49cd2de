//! The preflight of a restore: from the StatefulSet to its images, and from the wish to the snapshot or safety copy that
//! is to take the place of each. Only reads.

use howdah_adapters::ceph::{Ceph, ImageInfo};
use howdah_adapters::kubernetes::{call, find};
use howdah_adapters::records::{PostgresBackup, PostgresRestore};
use howdah_core::annotations::Consistency;
use howdah_core::backup::{ImageRecord, Phase as BackupPhase, Problem, SnapshotRecord};
use howdah_core::restore::{
    CHAIN_MAX, Candidate, Facts, Goal, JournalRecord, Method, Newcomer, Phase, RestoredPart, Source,
    VolumeRecord, choose, fits,
};
use howdah_core::volume::RbdVolume;
use howdah_core::{lineage, names, preflight};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};

use super::{Restore, known, permanent, pieces, transient};
use crate::effects::of_ceph;
use crate::effects::preflight::{
    claim_of_template, database_container, first_ordinal, host_ips, ip_of, of_kubernetes, of_resolve, places,
    strange,
};

/// What a pod gets where its template says nothing.
const DEFAULT_GRACE_S: i64 = 30;

/// What is meant by the goal, as it is recorded.
struct Wanted {
    of: Of,
    /// The backup, or the restore that is undone.
    name: String,
    taken_at: Option<Timestamp>,
    consistency: Option<Consistency>,
    method: Method,
    /// What `spec.replicas` is to be in the end, if not what it was.
    replicas_after: Option<i32>,
    /// One for each image; that with the data directory is the first.
    kept: Vec<Kept>,
}

/// Whose data it is.
enum Of {
    /// A backup of the database itself.
    Own,
    /// A backup of another database.
    Another,
    /// What a restore kept, until this instant at least.
    Undone(Option<Timestamp>),
}

/// What one image is to get.
struct Kept {
    /// The name of the pod's volume; `None` for the one with the data directory.
    volume: Option<String>,
    /// The image it lies in.
    image: ImageRecord,
    /// The snapshot; `None` where the whole image is wanted.
    snapshot: Option<SnapshotRecord>,
    /// What the restore that is undone left in place.
    left: Option<ImageRecord>,
}

/// A volume that gets data.
struct InPlace {
    claim: String,
    volume: String,
    journal: Option<JournalRecord>,
    image: ImageRecord,
    info: ImageInfo,
}

/// The StatefulSet that gets the data.
#[derive(Clone, Copy)]
struct Target<'a> {
    name: &'a str,
    replicas: i32,
    pod: Option<&'a Pod>,
}

impl Wanted {
    fn noun(&self) -> String {
        match self.of {
            Of::Own | Of::Another => format!("the backup {}", self.name),
            Of::Undone(_) => format!("the restore {}", self.name),
        }
    }
}

impl Restore<'_> {
    /// Finds out whether, what and how can be restored now.
    pub(super) async fn preflight(&mut self) -> Result<Facts, Problem> {
        self.ceph = None;
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
        let of_data = preflight::one_claim(&mounts, &places(container, None))?;

        let wanted = self.wanted(&name, &backups).await?;
        let ceph = self.ceph().await?;
        let pod = self.pod(&database).await?;
        let mut in_place = Vec::new();
        for kept in &wanted.kept {
            let claim = match &kept.volume {
                None => of_data.clone(),
                Some(volume) => claim_of_part(&database, template, container, &wanted.noun(), volume)?,
            };
            let found = self.in_place(&ceph, claim).await?;
            only_the_pod_writes(&ceph, &pod_name(&database), pod.as_ref(), &found.image).await?;
            in_place.push(found);
        }
        all_differ(&in_place)?;

        let target = Target { name: &name, replicas, pod: pod.as_ref() };
        let mut parts = Vec::new();
        for (kept, in_place) in wanted.kept.iter().zip(in_place) {
            let source = self.source_of(&ceph, &wanted, kept, &in_place, target).await?;
            // What a swap set aside takes its place again as it is.
            let incoming = (kept.left.is_some() && wanted.method == Method::Swap).then(|| source.clone());
            let InPlace { claim, volume, journal, image, info } = in_place;
            parts.push(RestoredPart {
                name: kept.volume.clone().unwrap_or_default(),
                volume: VolumeRecord { claim, volume, journal },
                image,
                size: info.size,
                source_image: source,
                source_snapshot: kept.snapshot.clone(),
                incoming,
                safety_image: None,
                safety_snapshot: None,
            });
        }
        let grace = template.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE_S);
        facts_of(wanted, parts, replicas, SignedDuration::from_secs(grace))
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

    /// The pod of the database, if there is one.
    async fn pod(&self, database: &StatefulSet) -> Result<Option<Pod>, Problem> {
        let (namespace, name) = (self.namespace(), pod_name(database));
        let pods = Api::<Pod>::namespaced(self.cx.kubernetes.client().clone(), &namespace);
        let pod = find(format!("get the pod {namespace}/{name}"), &pods, &name).await;
        pod.map_err(|error| of_kubernetes(&error))
    }

    /// The volume and the image behind a claim.
    async fn in_place(&self, ceph: &Ceph, claim: String) -> Result<InPlace, Problem> {
        let volume = self.cx.kubernetes.rbd_volume(&self.namespace(), &claim).await;
        let volume = volume.map_err(|error| of_resolve(&error))?;
        preflight::volume_fit(&volume, false)?;
        let info = ceph.info(&volume.image_spec()).await.map_err(of_ceph)?;
        let journal = journal_of(ceph, &volume).await?;
        let image = ImageRecord {
            pool: volume.pool,
            rados_namespace: volume.rados_namespace,
            name: volume.image,
            id: info.id.clone(),
        };
        Ok(InPlace { claim, volume: volume.volume, journal, image, info })
    }

    /// The backup or the restore that is meant; whether it fits what is in place is judged for each image
    /// ([`Restore::source_of`]).
    async fn wanted(&self, target: &str, backups: &[PostgresBackup]) -> Result<Wanted, Problem> {
        if let Goal::Undo(restore) = &self.order.goal {
            return self.undone(restore).await;
        }
        let beside = self.record.spec.into.is_some();
        if beside && self.record.spec.stateful_set == target {
            return Err(permanent(
                format!("spec.into names {target}, as spec.statefulSet does"),
                "name another StatefulSet; to restore in place, leave into out",
            ));
        }
        if beside && self.order.method != Method::Swap {
            return Err(permanent(
                "spec.method is rollback, and spec.into names another StatefulSet",
                "use the method swap: the image of the other one has no snapshot to be rolled back to",
            ));
        }
        let Candidate { name, taken_at, consistency, image, snapshot, parts, .. } = self.choose(backups)?;
        let data = Kept { volume: None, image: known(&image, "image")?.clone(), snapshot, left: None };
        let parts = parts.into_iter().map(|part| Kept {
            volume: Some(part.volume),
            image: part.image,
            snapshot: part.snapshot,
            left: None,
        });
        Ok(Wanted {
            of: if beside { Of::Another } else { Of::Own },
            name,
            taken_at,
            consistency,
            method: self.order.method,
            replicas_after: beside.then_some(1),
            kept: std::iter::once(data).chain(parts).collect(),
        })
    }

    fn choose(&self, backups: &[PostgresBackup]) -> Result<Candidate, Problem> {
        let candidates: Vec<Candidate> = backups.iter().map(PostgresBackup::candidate).collect();
        choose(&self.order.goal, &self.record.spec.stateful_set, &candidates, Timestamp::now()).cloned()
    }

    /// What the restore that is to be undone kept.
    async fn undone(&self, name: &str) -> Result<Wanted, Problem> {
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
        let mut kept = Vec::new();
        for piece in pieces(&status)? {
            let (snapshot, left) = match method {
                Method::Swap => (None, *known(&piece.incoming, "new image")?),
                Method::Rollback => (Some(*known(&piece.safety_snapshot, "safety snapshot")?), piece.image),
            };
            kept.push(Kept {
                volume: piece.name.map(str::to_owned),
                image: piece.image.clone(),
                snapshot: snapshot.cloned(),
                left: Some(left.clone()),
            });
        }
        Ok(Wanted {
            of: Of::Undone(status.safety_until),
            name: name.to_owned(),
            taken_at: status.started_at,
            consistency: None,
            method,
            // A copy goes back to where it never ran; a database in place stays as it is, up or down.
            replicas_after: status.replicas.filter(|_| beside),
            kept,
        })
    }

    /// The image that `kept` lies in, by the name it has now, if it may take the place of the one in place.
    async fn source_of(
        &self,
        ceph: &Ceph,
        wanted: &Wanted,
        kept: &Kept,
        in_place: &InPlace,
        target: Target<'_>,
    ) -> Result<ImageRecord, Problem> {
        match wanted.of {
            Of::Own => own_backup(ceph, wanted, kept, in_place).await,
            Of::Another => backup_of_another(ceph, wanted, kept, in_place, target).await,
            Of::Undone(until) => safety_copy(ceph, wanted, kept, in_place, until).await,
        }
    }
}

/// What the preflight answers; the first of `parts` is the image with the data directory.
fn facts_of(
    wanted: Wanted,
    parts: Vec<RestoredPart>,
    replicas: i32,
    grace: SignedDuration,
) -> Result<Facts, Problem> {
    let Wanted { name, taken_at, consistency, method, replicas_after, .. } = wanted;
    let mut parts = parts.into_iter();
    let data = parts.next().ok_or_else(|| permanent("the backup names no image", "report this as a bug"))?;
    let (image, snapshot) = (data.source_image, data.source_snapshot);
    Ok(Facts {
        source: Source { name, taken_at, consistency, image, snapshot },
        method,
        volume: data.volume,
        image: data.image,
        size: data.size,
        replicas,
        replicas_after,
        grace,
        incoming: data.incoming,
        parts: parts.collect(),
    })
}

/// The claim of a further volume. It is found by the name that the pod had for it, which tells one tablespace from another.
fn claim_of_part(
    database: &StatefulSet,
    template: &PodSpec,
    container: &Container,
    noun: &str,
    volume: &str,
) -> Result<String, Problem> {
    let mounted = container.volume_mounts.iter().flatten().any(|mount| mount.name == volume);
    let claim = claim_of_template(database, template, volume).filter(|_| mounted);
    claim.ok_or_else(|| {
        let (set, container) = (database.name_any(), &container.name);
        permanent(
            format!(
                "{noun} holds the volume {volume}, and the container {container} of the StatefulSet {set} mounts no claim \
                 of that name"
            ),
            "mount it as it was, or restore into a StatefulSet that has it",
        )
    })
}

/// Each volume must have an image of its own: what is restored to one would overwrite another.
fn all_differ(volumes: &[InPlace]) -> Result<(), Problem> {
    for (at, volume) in volumes.iter().enumerate() {
        let before = volumes.iter().take(at).find(|before| before.image == volume.image);
        if let Some(before) = before {
            return Err(permanent(
                format!(
                    "the claims {} and {} lie in the same image {}",
                    before.claim,
                    volume.claim,
                    volume.image.spec()
                ),
                "give each volume of the pod a claim of its own, as when the backup was taken",
            ));
        }
    }
    Ok(())
}

/// Whether the image is open on the pod's node alone; without a pod it must be open on none.
async fn only_the_pod_writes(
    ceph: &Ceph,
    name: &str,
    pod: Option<&Pod>,
    image: &ImageRecord,
) -> Result<(), Problem> {
    let spec = image.spec();
    let watchers = ceph.watchers(&spec).await.map_err(of_ceph)?;
    let addresses: Vec<String> = watchers.iter().map(|watcher| ip_of(&watcher.address)).collect();
    match pod {
        Some(pod) => preflight::watchers_fit(name, &host_ips(pod), &addresses)
            .map_err(|problem| Problem { reason: format!("{} ({spec})", problem.reason), ..problem }),
        // A lock that is left matters where the image is written to; that is judged with the proofs.
        None => preflight::at_rest(&spec, &addresses, &[]),
    }
}

/// The image of a backup of the database itself, if it is the one in place or one that this took the place of.
async fn own_backup(
    ceph: &Ceph,
    wanted: &Wanted,
    kept: &Kept,
    in_place: &InPlace,
) -> Result<ImageRecord, Problem> {
    let (name, recorded) = (&wanted.name, &kept.image);
    let InPlace { claim, image, .. } = in_place;
    let source = if recorded.id == image.id {
        image.clone()
    } else {
        let metadata = ceph.metadata(&image.spec()).await.map_err(of_ceph)?;
        if !lineage::ids(&metadata).contains(&recorded.id) || recorded.pool != image.pool {
            return Err(permanent(
                format!(
                    "the backup {name} is of another volume: it lies in the image with the id {}, and the image {} of the \
                     claim {claim} has the id {}",
                    recorded.id, image.name, image.id
                ),
                "choose a backup that was taken since the volume was made",
            ));
        }
        image_of(ceph, name, recorded).await?
    };
    is_there(ceph, name, known(&kept.snapshot, "snapshot")?, &source).await?;
    match wanted.method {
        Method::Swap => can_be_cloned(ceph, &source).await?,
        Method::Rollback if source.id != image.id => {
            return Err(permanent(
                format!(
                    "the backup {name} lies in an image that an earlier restore set aside: {}, while the claim {claim} is {}",
                    source.spec(),
                    image.spec()
                ),
                "an image is rolled back to its own snapshots only: use the method swap",
            ));
        }
        Method::Rollback => {}
    }
    Ok(source)
}

/// The image of a backup of another database, if what gets the data never ran.
async fn backup_of_another(
    ceph: &Ceph,
    wanted: &Wanted,
    kept: &Kept,
    in_place: &InPlace,
    target: Target<'_>,
) -> Result<ImageRecord, Problem> {
    let InPlace { claim, image, info, .. } = in_place;
    let source = image_of(ceph, &wanted.name, &kept.image).await?;
    let snapshot = known(&kept.snapshot, "snapshot")?;
    is_there(ceph, &wanted.name, snapshot, &source).await?;
    can_be_cloned(ceph, &source).await?;
    let pod = target.pod.map(Pod::name_any);
    let newcomer = Newcomer {
        name: target.name,
        replicas: target.replicas,
        pod: pod.as_deref(),
        claim,
        image,
        size: info.size,
        used: ceph.used_bytes(&image.spec()).await.map_err(of_ceph)?,
        snapshots: ceph.snapshots(&image.spec()).await.map_err(of_ceph)?.len(),
        is_clone: info.parent.is_some(),
    };
    fits(&newcomer, &wanted.name, &source, snapshot.size)?;
    Ok(source)
}

/// The safety copy of a restore, if it is there and what that restore left is still in place.
async fn safety_copy(
    ceph: &Ceph,
    wanted: &Wanted,
    kept: &Kept,
    in_place: &InPlace,
    until: Option<Timestamp>,
) -> Result<ImageRecord, Problem> {
    let name = &wanted.name;
    let InPlace { claim, image, .. } = in_place;
    let left = known(&kept.left, "new image")?;
    if left.id != image.id {
        return Err(permanent(
            format!(
                "since the restore {name} another image took the place: it left the id {} for the claim {claim}, and now \
                 it is {}",
                left.id, image.id
            ),
            "undo the later restore first (kubectl get pgr)",
        ));
    }
    let gone = |what: &str| {
        let until = until.map_or(String::new(), |until| format!(" (it was kept until {until})"));
        permanent(
            format!("the safety copy of the restore {name} is gone{until}: {what}"),
            "restore a backup instead; an image may still be in the trash (rbd trash ls)",
        )
    };
    let Some(snapshot) = &kept.snapshot else {
        let found = ceph.image_by_id(&kept.image).await.map_err(|error| match error.is_not_found() {
            true => gone(&format!("no image has the id {}", kept.image.id)),
            false => of_ceph(error),
        })?;
        return Ok(ImageRecord { name: found.name, ..kept.image.clone() });
    };
    let snapshots = ceph.snapshots(&image.spec()).await.map_err(of_ceph)?;
    if !snapshots.iter().any(|found| found.by_user && found.id == snapshot.id) {
        return Err(gone(&format!("there is no {}@{}", image.spec(), snapshot.name)));
    }
    Ok(image.clone())
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

/// Whether the snapshot of a backup is there.
async fn is_there(
    ceph: &Ceph,
    backup: &str,
    snapshot: &SnapshotRecord,
    image: &ImageRecord,
) -> Result<(), Problem> {
    let snapshots = ceph.snapshots(&image.spec()).await.map_err(of_ceph)?;
    let there =
        snapshots.iter().any(|found| found.by_user && found.id == snapshot.id && found.name == snapshot.name);
    if there {
        return Ok(());
    }
    Err(permanent(
        format!("the snapshot {}@{} of the backup {backup} is gone", image.spec(), snapshot.name),
        "choose another backup",
    ))
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
