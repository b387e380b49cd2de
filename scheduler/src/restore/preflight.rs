//! The preflight of a restore: from the StatefulSet to its images, one for each that the backup or safety copy holds
//! ([`super::source`]). Only reads.

use futures::future::try_join_all;
use howdah_adapters::ceph::{Ceph, ImageInfo};
use howdah_adapters::kubernetes::find;
use howdah_adapters::records::PostgresBackup;
use howdah_core::backup::{ImageRecord, Phase as BackupPhase, Problem};
use howdah_core::preflight::PartClaim;
use howdah_core::restore::{Facts, JournalRecord, Method, RestoredPart, Source, VolumeRecord};
use howdah_core::volume::RbdVolume;
use howdah_core::{names, preflight};
use jiff::SignedDuration;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use kube::{Api, ResourceExt as _};

use super::source::Wanted;
use super::{Restore, permanent, transient};
use crate::effects::of_ceph;
use crate::effects::preflight::{
    backups, claim_of_template, database_container, first_ordinal, host_ips, ip_of, of_kubernetes,
    of_resolve, places, strange,
};

/// What a pod gets where its template says nothing.
const DEFAULT_GRACE_S: i64 = 30;

/// A volume that gets data.
pub(super) struct InPlace {
    pub(super) claim: String,
    pub(super) volume: String,
    pub(super) journal: Option<JournalRecord>,
    pub(super) image: ImageRecord,
    pub(super) info: ImageInfo,
}

/// The StatefulSet that gets the data.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) name: &'a str,
    pub(super) replicas: i32,
    pub(super) pod: Option<&'a Pod>,
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
        let backups = backups(self.cx, &self.namespace()).await?;
        no_backup_runs(&backups, &name)?;

        let template = spec.template.spec.as_ref().ok_or_else(|| strange("the template has no pod spec"))?;
        let claim_name = |volume: &str| claim_of_template(&database, template, volume);
        let (container, mounts) = database_container(template, &claim_name)?;
        let preflight::Claims { data: of_data, parts } =
            preflight::claims(&mounts, &places(container, None))?;

        let wanted = self.wanted(&name, &backups).await?;
        holds_all(&wanted, &parts)?;
        let ceph = self.ceph().await?;
        let pod = self.pod(&database).await?;
        let claims = wanted.kept.iter().map(|kept| match &kept.volume {
            None => Ok(of_data.clone()),
            Some(volume) => claim_of_part(&database, template, container, &wanted.noun(), volume),
        });
        let claims: Vec<String> = claims.collect::<Result<_, Problem>>()?;
        // Each look is a process of its own that has to connect first: together they take as long as one.
        let looks = claims.into_iter().map(|claim| async {
            let found = self.in_place(&ceph, claim).await?;
            only_the_pod_writes(&ceph, &pod_name(&database), pod.as_ref(), &found.image).await?;
            Ok::<_, Problem>(found)
        });
        let in_place = try_join_all(looks).await?;
        all_differ(&in_place)?;

        let target = Target { name: &name, replicas, pod: pod.as_ref() };
        let looks = wanted.kept.iter().zip(&in_place);
        let looks = looks.map(|(kept, in_place)| self.source_of(&ceph, &wanted, kept, in_place, target));
        let sources = try_join_all(looks).await?;
        let mut parts = Vec::new();
        for ((kept, in_place), source) in wanted.kept.iter().zip(in_place).zip(sources) {
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

/// Whether what is restored holds every volume that the database is mounted on: old data does not go with newer WAL.
fn holds_all(wanted: &Wanted, parts: &[PartClaim]) -> Result<(), Problem> {
    let held = |part: &PartClaim| wanted.kept.iter().any(|kept| kept.volume.as_ref() == Some(&part.volume));
    match parts.iter().find(|part| !held(part)) {
        Some(part) => Err(permanent(
            format!(
                "a part of the database lies on the volume {} (claim {}), and {} does not hold it",
                part.volume,
                part.claim,
                wanted.noun()
            ),
            "choose a backup that was taken since the database lies there, or restore with --into a StatefulSet without \
             that mount",
        )),
        None => Ok(()),
    }
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

/// A backup that has begun is waited for: it may have the database in backup mode. One that waits for its next attempt has
/// undone everything, and makes none while the gate is closed: a database that is broken is restored, and not backed up first.
pub(super) fn no_backup_runs(backups: &[PostgresBackup], database: &str) -> Result<(), Problem> {
    let running = backups.iter().find(|backup| {
        let phase = backup.status.as_ref().map(|status| status.phase).unwrap_or_default();
        let idle = phase.is_terminal() || matches!(phase, BackupPhase::Reserved | BackupPhase::Waiting);
        backup.spec.stateful_set == database && !idle
    });
    match running {
        Some(backup) => Err(transient(
            format!("the backup {} is under way", backup.name_any()),
            "nothing to do: the restore begins when it has ended",
        )),
        None => Ok(()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use howdah_core::backup::FailureKind;
    use serde_json::json;

    fn database() -> StatefulSet {
        serde_json::from_value(json!({
            "metadata": {"name": "db", "namespace": "shop"},
            "spec": {
                "serviceName": "db", "selector": {},
                "template": {"spec": {
                    "containers": [{"name": "postgres", "volumeMounts": [
                        {"name": "data", "mountPath": "/data"}, {"name": "wal", "mountPath": "/wal"},
                        {"name": "fast", "mountPath": "/fast"}, {"name": "tmp", "mountPath": "/tmp"}]}],
                    "volumes": [{"name": "fast", "persistentVolumeClaim": {"claimName": "mine"}},
                        {"name": "tmp", "emptyDir": {}}]
                }},
                "volumeClaimTemplates": [
                    {"metadata": {"name": "data"}}, {"metadata": {"name": "wal"}}, {"metadata": {"name": "unused"}}]
            }
        }))
        .unwrap()
    }

    fn claim(volume: &str) -> Result<String, Problem> {
        let database = database();
        let template = database.spec.as_ref().unwrap().template.spec.as_ref().unwrap();
        claim_of_part(&database, template, &template.containers[0], "the backup db-1", volume)
    }

    #[test]
    fn a_further_volume_is_found_by_its_name_in_the_pod() {
        assert_eq!(claim("wal").unwrap(), "wal-db-0");
        assert_eq!(claim("fast").unwrap(), "mine");
    }

    #[test]
    fn a_volume_that_the_database_has_no_claim_for_is_refused_by_name() {
        // Not there, there and not mounted, and of another kind.
        for volume in ["old", "unused", "tmp"] {
            let problem = claim(volume).unwrap_err();
            assert_eq!(problem.kind, FailureKind::Permanent);
            let words = format!("the backup db-1 holds the volume {volume}, ");
            assert!(problem.reason.contains(&words), "{}", problem.reason);
            assert!(problem.cure.contains("mount it as it was"), "{}", problem.cure);
        }
    }

    fn in_place(claim: &str, image: &str) -> InPlace {
        let image = ImageRecord {
            pool: "p".to_owned(),
            rados_namespace: String::new(),
            name: image.to_owned(),
            id: image.to_owned(),
        };
        let info = serde_json::from_value(json!({"id": image.id, "size": 1})).unwrap();
        InPlace { claim: claim.to_owned(), volume: String::new(), journal: None, image, info }
    }

    #[test]
    fn two_volumes_in_one_image_are_refused() {
        assert_eq!(all_differ(&[in_place("data-db-0", "a"), in_place("wal-db-0", "b")]), Ok(()));
        let volumes = [in_place("data-db-0", "a"), in_place("wal-db-0", "b"), in_place("mine", "a")];
        let problem = all_differ(&volumes).unwrap_err();
        assert!(
            problem.reason.contains("the claims data-db-0 and mine lie in the same image p/a"),
            "{problem:?}"
        );
    }
}
