//! What a restore is made from: the backup, or the safety copy of another restore, that is meant, and whether each of its
//! images may take the place of the one in place. Only reads.

use howdah_adapters::ceph::{Ceph, ImageInfo};
use howdah_adapters::kubernetes::find;
use howdah_adapters::records::{PostgresBackup, PostgresRestore};
use howdah_core::annotations::Consistency;
use howdah_core::backup::{ImageRecord, Problem, SnapshotRecord};
use howdah_core::lineage;
use howdah_core::restore::{CHAIN_MAX, Candidate, Goal, Method, Newcomer, Phase, choose, fits};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::preflight::{InPlace, Target};
use super::{Restore, known, permanent, pieces};
use crate::effects::of_ceph;
use crate::effects::preflight::of_kubernetes;

/// What is meant by the goal, as it is recorded.
pub(super) struct Wanted {
    pub(super) of: Of,
    /// The backup, or the restore that is undone.
    pub(super) name: String,
    pub(super) taken_at: Option<Timestamp>,
    pub(super) consistency: Option<Consistency>,
    pub(super) method: Method,
    /// What `spec.replicas` is to be in the end, if not what it was.
    pub(super) replicas_after: Option<i32>,
    /// One for each image; that with the data directory is the first.
    pub(super) kept: Vec<Kept>,
}

/// Whose data it is.
pub(super) enum Of {
    /// A backup of the database itself.
    Own,
    /// A backup of another database.
    Another,
    /// What a restore kept, until this instant at least.
    Undone(Option<Timestamp>),
}

/// What one image is to get.
pub(super) struct Kept {
    /// The name of the pod's volume; `None` for the one with the data directory.
    pub(super) volume: Option<String>,
    /// The image it lies in.
    pub(super) image: ImageRecord,
    /// The snapshot; `None` where the whole image is wanted.
    pub(super) snapshot: Option<SnapshotRecord>,
    /// What the restore that is undone left in place.
    pub(super) left: Option<ImageRecord>,
}

impl Wanted {
    /// What it is called in messages.
    pub(super) fn noun(&self) -> String {
        match self.of {
            Of::Own | Of::Another => format!("the backup {}", self.name),
            Of::Undone(_) => format!("the restore {}", self.name),
        }
    }
}

impl Restore<'_> {
    /// The backup or the restore that is meant; whether it fits what is in place is judged for each image
    /// ([`Restore::source_of`]).
    pub(super) async fn wanted(&self, target: &str, backups: &[PostgresBackup]) -> Result<Wanted, Problem> {
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
    pub(super) async fn source_of(
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
