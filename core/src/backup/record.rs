//! What a `PostgresBackup` records: the journal of one backup and everything a restore needs.
//!
//! The status is the journal: it is written before each effect, so whoever reads it next knows what may have
//! happened. These types are the fields of the custom resource.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::annotations::{Consistency, WantedConsistency};
use crate::names;
use crate::verify::VerifyStatus;

/// Where a backup stands. A phase is entered before the effect it names is performed.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Phase {
    /// The object exists, which reserves its slot; nothing was done yet.
    #[default]
    Reserved,
    /// Finding the image and judging whether it can be backed up now.
    Preflight,
    /// `pg_backup_start` is being called, in a session that is held until the end.
    StartingBackupMode,
    /// The snapshot is being taken.
    Snapshotting,
    /// The process was restarted while it took the snapshot: looking whether it is there.
    Adopting,
    /// `pg_backup_stop` is being called in the same session.
    StoppingBackupMode,
    /// The catalogue entry is being written to the image.
    Recording,
    /// The backup is good; backups that the retention policy no longer keeps are being deleted.
    Pruning,
    /// Something failed: backup mode is being left and the snapshot removed.
    Undoing,
    /// Everything is undone; the next attempt begins at `retryAt`.
    Waiting,
    /// The snapshot is there and recorded.
    Taken,
    /// A restore drill started a PostgreSQL on it, and every check passed.
    Verified,
    /// A restore drill found that PostgreSQL cannot recover it, or that its data does not pass a check.
    Damaged,
    /// No backup, and nothing left behind.
    Failed,
    /// Undoing failed too: a snapshot may be left behind, and a human has to look.
    Stuck,
}

impl Phase {
    /// Whether the operation is over.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Taken | Self::Verified | Self::Damaged | Self::Failed | Self::Stuck)
    }

    /// Whether the snapshot is there and good.
    #[must_use]
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Taken | Self::Verified)
    }

    /// Whether the database has to stay as it is: it is in backup mode, or its snapshot is being taken.
    #[must_use]
    pub const fn holds_the_database(self) -> bool {
        matches!(
            self,
            Self::StartingBackupMode | Self::Snapshotting | Self::Adopting | Self::StoppingBackupMode
        )
    }

    /// The word shown to users.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reserved => "Reserved",
            Self::Preflight => "Preflight",
            Self::StartingBackupMode => "StartingBackupMode",
            Self::Snapshotting => "Snapshotting",
            Self::Adopting => "Adopting",
            Self::StoppingBackupMode => "StoppingBackupMode",
            Self::Recording => "Recording",
            Self::Pruning => "Pruning",
            Self::Undoing => "Undoing",
            Self::Waiting => "Waiting",
            Self::Taken => "Taken",
            Self::Verified => "Verified",
            Self::Damaged => "Damaged",
            Self::Failed => "Failed",
            Self::Stuck => "Stuck",
        }
    }
}

/// Who asked for a backup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Trigger {
    /// The schedule.
    Schedule,
    /// A human or a program that created the object.
    #[default]
    Manual,
}

/// The journal and result of one backup: the status of a `PostgresBackup`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BackupStatus {
    /// Where the backup stands.
    pub phase: Phase,
    /// Number of the current attempt, from 1.
    pub attempt: u32,
    /// The class of this attempt; after `Taken` the class of the backup.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
    /// The instant all names derive from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Timestamp>,
    /// When the first attempt began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When the operation ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// After this instant no further attempt is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// When the next attempt begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
    /// How often the current phase was tried again.
    #[serde(skip_serializing_if = "is_zero")]
    pub phase_retries: u32,
    /// What was done, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepRecord>,
    /// The RBD image that was snapshotted: the one that holds the data directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageRecord>,
    /// Its snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotRecord>,
    /// The further images that hold parts of the database; empty where it lies on one volume.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartRecord>,
    /// The pod's volumes that are mounted beside the database and hold nothing of it, as PostgreSQL said. While it is
    /// stopped that is known from here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub beside: Vec<String>,
    /// The pod whose volume it is; absent when the database was stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The node the pod ran on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// `server_version` of PostgreSQL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postgres_version: Option<String>,
    /// The system identifier of the cluster (a 64-bit number, as text).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<String>,
    /// The timeline the backup was taken on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeline: Option<u32>,
    /// What `pg_backup_start` returned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_lsn: Option<String>,
    /// Several volumes: up to where the WAL had reached the disk before the snapshots of the data directory and of the WAL
    /// were taken. A recovery that ends before it is of a WAL that was snapshotted too early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flushed_lsn: Option<String>,
    /// What `pg_backup_stop` returned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_lsn: Option<String>,
    /// The backup label, byte for byte. Never write it into a clone unless an archive covers `stopLsn`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The tablespace map, byte for byte.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spcmap: Option<String>,
    /// Things worth knowing about the backup.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// What failed in the last attempt; absent once an attempt succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// The restore drill of the backup, once one began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verification: Option<VerifyStatus>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// One entry of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StepRecord {
    /// The phase that was entered.
    pub phase: Phase,
    /// The attempt it belongs to.
    pub attempt: u32,
    /// When it was entered.
    pub started_at: Timestamp,
    /// How long it took, in milliseconds; absent while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub took_ms: Option<u64>,
    /// How it ended; absent while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<StepOutcome>,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StepOutcome {
    /// As intended.
    Done,
    /// With a failure.
    Failed,
    /// The process ended during the step.
    Interrupted,
}

/// The image a backup lies in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageRecord {
    /// The pool.
    pub pool: String,
    /// The rados namespace; empty for the default one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rados_namespace: String,
    /// The name of the image.
    pub name: String,
    /// The immutable id of the image: a name survives re-creation, an id does not.
    pub id: String,
}

impl ImageRecord {
    /// The image as the `rbd` command takes it.
    #[must_use]
    pub fn spec(&self) -> String {
        if self.rados_namespace.is_empty() {
            return format!("{}/{}", self.pool, self.name);
        }
        format!("{}/{}/{}", self.pool, self.rados_namespace, self.name)
    }
}

/// A snapshot that exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotRecord {
    /// The name of the snapshot.
    pub name: String,
    /// Its id in the image.
    pub id: u64,
    /// The size of the image at that time, in bytes.
    pub size: u64,
}

/// An image that holds a part of the database, beside the one with the data directory: tablespaces, or the WAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PartRecord {
    /// The name of the pod's volume that it is mounted by.
    pub volume: String,
    /// Whether the WAL lies there. Its snapshot is taken after all others: a page is written after the WAL that changes it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub wal: bool,
    /// The image.
    pub image: ImageRecord,
    /// Its snapshot, of the same name as the backup's; absent until all are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotRecord>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// A condition, in the form of `meta/v1`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What the condition is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One word.
    pub reason: String,
    /// For humans, with the cure.
    pub message: String,
    /// When `status` last changed.
    pub last_transition_time: Timestamp,
}

impl Condition {
    /// Puts it among others in the place of the one of its kind; the time stays that one's while the status does.
    pub(crate) fn put(mut self, conditions: &mut Vec<Self>) {
        if let Some(found) = conditions.iter().position(|condition| condition.kind == self.kind) {
            let old = conditions.remove(found);
            if old.status == self.status {
                self.last_transition_time = old.last_transition_time;
            }
        }
        conditions.push(self);
    }
}

/// Whether trying again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FailureKind {
    /// The way in is missing: no Secret, no right to read it, or a wrong password.
    Credentials,
    /// PostgreSQL does not answer.
    Connection,
    /// Something else that may pass.
    Transient,
    /// It will fail the same way until somebody changes something.
    Permanent,
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

/// What is to be done: the immutable part of a `PostgresBackup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The instant all names derive from.
    pub slot: Timestamp,
    /// Who asked.
    pub trigger: Trigger,
    /// The class wanted.
    pub wanted: WantedConsistency,
    /// After this instant no further attempt is made.
    pub deadline: Timestamp,
}

impl Order {
    /// The name of the snapshot.
    #[must_use]
    pub fn snapshot_name(&self) -> String {
        match self.trigger {
            Trigger::Schedule => names::snapshot_name(self.slot),
            Trigger::Manual => names::manual_snapshot_name(self.slot),
        }
    }
}
