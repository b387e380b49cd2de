//! What a `PostgresRestore` records: the journal of one restore, and what undoing it needs.
//!
//! The status is the journal: it is written before each effect, so whoever reads it next knows what may have
//! happened. These types are the fields of the custom resource.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::annotations::Consistency;
use crate::backup::{Condition, FailureKind, ImageRecord, SnapshotRecord, StepOutcome};
use crate::names;

/// Where a restore stands. A phase is entered before the effect it names is performed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// The object exists; nothing was done yet.
    #[default]
    Reserved,
    /// Finding the backup and judging whether it can be restored now. Only reads.
    Preflight,
    /// Not yet: the next preflight is at `retryAt`. The database is untouched.
    Waiting,
    /// The gate is being closed: nobody but howdah scales or changes the StatefulSet, and no backup begins.
    Gating,
    /// The database is being scaled to zero.
    Stopping,
    /// Waiting for the proofs that nobody writes: no pod, no attachment, no watcher.
    Proving,
    /// Swap: the image that is to take the place is being made, under a name of its own.
    Preparing,
    /// Swap: the image in place is being renamed; it is the safety copy.
    SettingAside,
    /// Swap: the new image is being given the name that the volume goes by.
    Placing,
    /// Swap: ceph-csi's journal is being told the id of the new image.
    Bookkeeping,
    /// Rollback: the safety snapshot is being taken.
    Safeguarding,
    /// Rollback: the image is being rolled back. Until this is over it holds a mixture.
    RollingBack,
    /// The restore is being given up: everything is put back as it was.
    PuttingBack,
    /// The database is being scaled to what it was.
    Starting,
    /// Waiting until PostgreSQL answers.
    Answering,
    /// The gate is being opened.
    Opening,
    /// The database runs on the restored data (or stands stopped on it, if it was stopped before).
    Completed,
    /// Nothing was restored, and everything is as it was before.
    Failed,
    /// It can neither go on nor back by itself: a human has to look. The gate is still closed.
    Stuck,
}

impl Phase {
    /// Whether nothing more happens by itself.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Stuck)
    }

    /// The word shown to users.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reserved => "Reserved",
            Self::Preflight => "Preflight",
            Self::Waiting => "Waiting",
            Self::Gating => "Gating",
            Self::Stopping => "Stopping",
            Self::Proving => "Proving",
            Self::Preparing => "Preparing",
            Self::SettingAside => "SettingAside",
            Self::Placing => "Placing",
            Self::Bookkeeping => "Bookkeeping",
            Self::Safeguarding => "Safeguarding",
            Self::RollingBack => "RollingBack",
            Self::PuttingBack => "PuttingBack",
            Self::Starting => "Starting",
            Self::Answering => "Answering",
            Self::Opening => "Opening",
            Self::Completed => "Completed",
            Self::Failed => "Failed",
            Self::Stuck => "Stuck",
        }
    }
}

/// How the data comes to its place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// The image is set aside and a clone of the backup takes its name: constant time, whatever the size, and the old
    /// image is the safety copy.
    #[default]
    Swap,
    /// The image is overwritten with the snapshot, after a safety snapshot: takes time by the size of the image, and
    /// leaves no clone behind.
    Rollback,
}

/// What is to be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Goal {
    /// The newest good backup.
    Newest,
    /// The backup of this name.
    Backup(String),
    /// The newest good backup whose snapshot was taken before this instant.
    Before(Timestamp),
    /// What was there before the restore of this name.
    Undo(String),
}

/// The journal and result of one restore: the status of a `PostgresRestore`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RestoreStatus {
    /// Where the restore stands.
    pub phase: Phase,
    /// Whether it was given up and everything is being put back.
    #[serde(skip_serializing_if = "is_false")]
    pub going_back: bool,
    /// Number of the current preflight, from 1.
    pub attempt: u32,
    /// When the first preflight began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When the operation ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// When the effect of the phase is tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
    /// How often the current phase failed.
    #[serde(skip_serializing_if = "is_zero")]
    pub phase_retries: u32,
    /// Since when the current phase is tried; a restart of the scheduler does not begin it anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase_since: Option<Timestamp>,
    /// What was done, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepRecord>,
    /// What is restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// How.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// The volume that is restored: the one with the data directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeRecord>,
    /// The image that was in place before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageRecord>,
    /// Its size in bytes; the restored image is grown to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// `spec.replicas` before; the database is scaled back to it, unless `replicasAfter` says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// `spec.replicas` after, where that is not as before: a restore into another StatefulSet starts it, and an undo of
    /// that stops it again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas_after: Option<i32>,
    /// The grace period of the pod: the proofs are waited for that much longer.
    #[serde(skip_serializing_if = "is_zero")]
    pub grace_seconds: u32,
    /// Swap: the image that takes the place, under the name it has while it is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incoming: Option<ImageRecord>,
    /// Swap: the safety copy, under the name it is set aside with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub safety_image: Option<ImageRecord>,
    /// Rollback: the safety copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub safety_snapshot: Option<SnapshotRecord>,
    /// The further volumes of the database that are restored with it; empty where it lies on one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<RestoredPart>,
    /// Until when the safety copy is kept in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub safety_until: Option<Timestamp>,
    /// The proofs that nobody wrote to the volume, as they were seen last.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub proofs: Vec<Proof>,
    /// Whether the database was started on the restored data.
    #[serde(skip_serializing_if = "is_false")]
    pub started: bool,
    /// The last request (annotation `howdah.dev/resume`) that was acted on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed: Option<String>,
    /// Things worth knowing about the restore.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// What failed; absent once the step succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// One entry of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StepRecord {
    /// The phase that was entered.
    pub phase: Phase,
    /// When it was entered.
    pub started_at: Timestamp,
    /// How long it took, in milliseconds; absent while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub took_ms: Option<u64>,
    /// How it ended; absent while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<StepOutcome>,
    /// What went wrong, or what is waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What is restored: a backup, or the safety copy of another restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Name of the `PostgresBackup`, or of the `PostgresRestore` that is undone.
    pub name: String,
    /// The instant of the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_at: Option<Timestamp>,
    /// The class of the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
    /// The image it lies in, by the name it had in the preflight.
    pub image: ImageRecord,
    /// The snapshot; absent where the whole image is the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotRecord>,
}

/// A volume that is restored beside the one with the data directory: the same fields that the status has for that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoredPart {
    /// The name of the pod's volume that it is mounted by.
    pub name: String,
    /// The volume.
    pub volume: VolumeRecord,
    /// The image that was in place before.
    pub image: ImageRecord,
    /// Its size in bytes; the restored image is grown to it.
    pub size: u64,
    /// The image that is restored, by the name it had in the preflight.
    pub source_image: ImageRecord,
    /// Its snapshot; absent where the whole image is the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_snapshot: Option<SnapshotRecord>,
    /// Swap: the image that takes the place, under the name it has while it is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incoming: Option<ImageRecord>,
    /// Swap: the safety copy, under the name it is set aside with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safety_image: Option<ImageRecord>,
    /// Rollback: the safety copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safety_snapshot: Option<SnapshotRecord>,
}

/// The volume that is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeRecord {
    /// The PersistentVolumeClaim.
    pub claim: String,
    /// The PersistentVolume.
    pub volume: String,
    /// Where ceph-csi keeps its books of it; absent for a volume that was made by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<JournalRecord>,
}

/// An omap object of ceph-csi.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JournalRecord {
    /// The pool.
    pub pool: String,
    /// The rados namespace; empty for the default one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rados_namespace: String,
    /// The object, `csi.volume.UUID`.
    pub object: String,
}

/// One proof that nobody writes to the volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Proof {
    /// What has to be so, as a statement.
    pub what: String,
    /// Whether it is so.
    pub holds: bool,
    /// What was seen.
    pub seen: String,
}

/// What failed, why, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The phase that failed.
    pub step: Phase,
    /// Whether trying again can help.
    pub kind: FailureKind,
    /// What happened.
    pub reason: String,
    /// What to do about it.
    pub cure: String,
}

/// What is to be done: the immutable part of a `PostgresRestore`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The name of the record.
    pub name: String,
    /// Its uid, which everything it makes is named after.
    pub uid: String,
    /// When it was created.
    pub created: Timestamp,
    /// What is to be restored.
    pub goal: Goal,
    /// How; an undo goes the way of the restore that it undoes.
    pub method: Method,
}

/// Characters of the uid that names carry: enough to tell the restores of one volume apart.
const TAG_CHARS: usize = 8;

impl Order {
    fn tag(&self) -> &str {
        self.uid.get(..TAG_CHARS).unwrap_or(&self.uid)
    }

    /// The value of the gate annotation.
    #[must_use]
    pub fn gate(&self) -> String {
        names::gate_of_restore(&self.name)
    }

    /// The name under which the image in place is set aside.
    #[must_use]
    pub fn aside_name(&self, image: &str) -> String {
        format!("{image}.howdah-{}", self.tag())
    }

    /// The name of the clone while it is made.
    #[must_use]
    pub fn incoming_name(&self, image: &str) -> String {
        format!("{image}.howdah-new-{}", self.tag())
    }

    /// The name of the safety snapshot of a rollback. It is no slot, so retention takes it for foreign.
    #[must_use]
    pub fn safety_snapshot_name(&self) -> String {
        format!("{}{}", names::SAFETY_SNAPSHOT_PREFIX, self.tag())
    }
}
