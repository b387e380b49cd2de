//! One backup, as a state machine: what to do next, and what to do when it fails or the process restarts.
//!
//! [`next`] is total: every pair of phase and event has an answer, and the answer to an impossible one is
//! [`IllegalEvent`]. The shell writes the returned status (the intent), performs the effects, and feeds back the
//! event they end in. After a restart it feeds [`Event::Resumed`] into the last status that was written.
//!
//! ```text
//! Reserved -> Preflight -> StartingBackupMode -> Snapshotting -> StoppingBackupMode -> Recording -> Pruning -> Taken
//!                 |                |                  |  \                |
//!                 |                |                  |   Adopting        |      (after a restart)
//!                 v                v                  v                   v
//!          Waiting | Failed <----------------------- Undoing <------------+ -> Stuck
//! ```
//! Where the pool has no room the preflight leads to `Pruning` and from there to `Waiting`: what retention gives up goes
//! before anything is added.
//!
//! A restore drill ([`crate::verify`]) is an operation of its own, on a backup that is `Taken`.
//!
//! PostgreSQL leaves backup mode when the session ends (`backup.sgml`), so a process that dies, or drops the
//! session, never leaves it on.

mod record;

use jiff::{SignedDuration, Timestamp};
use thiserror::Error;

use crate::annotations::{Consistency, WantedConsistency};
use crate::retention::{IMAGE_SNAPSHOTS_MAX, SNAPSHOTS_PER_IMAGE_MAX};

pub use record::{
    BackupStatus, Condition, Failure, FailureKind, ImageRecord, Order, PartRecord, Phase, SnapshotRecord,
    StepOutcome, StepRecord, Trigger,
};

/// Most attempts at one backup; with the delays below they spread over half an hour.
pub const ATTEMPTS_MAX: u32 = 6;
/// Attempts without an answer from PostgreSQL before a crash-consistent snapshot stands in, where it may.
pub const ATTEMPTS_BEFORE_DOWNGRADE: u32 = 2;
/// Time from the slot within which a backup may begin another attempt.
pub const DEADLINE: SignedDuration = SignedDuration::from_mins(30);
/// Delay before the second attempt; it doubles with each one, up to [`RETRY_DELAY_MAX`].
pub const RETRY_DELAY: SignedDuration = SignedDuration::from_secs(10);
/// Longest delay between attempts.
pub const RETRY_DELAY_MAX: SignedDuration = SignedDuration::from_mins(5);
/// Tries to remove a snapshot before the operation is stuck: about 40 minutes, longer than a Ceph upgrade's hiccups.
pub const UNDO_RETRIES_MAX: u32 = 12;
/// Tries to write the catalogue entry; the record in the API server is whole without it.
pub const RECORD_RETRIES_MAX: u32 = 3;

/// Condition: whether the backup is of the class `online`.
pub const CONDITION_ONLINE: &str = "Online";
/// Condition: whether it is known by now which volumes hold the database. Only set where it is not.
pub const CONDITION_LAYOUT: &str = "Layout";
/// Condition: whether the image was at rest, with nothing left to write.
pub const CONDITION_AT_REST: &str = "AtRest";
/// Condition: whether the catalogue entry stands in the metadata of the image.
pub const CONDITION_CATALOGUED: &str = "Catalogued";
/// Condition: whether pruning after this backup went through.
pub const CONDITION_PRUNED: &str = "Pruned";

/// What the preflight found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The image that holds the data directory.
    pub image: ImageRecord,
    /// The further images that hold parts of the database, without their snapshots.
    pub parts: Vec<PartRecord>,
    /// The pod's volumes that hold nothing of it.
    pub beside: Vec<String>,
    /// That is not PostgreSQL's word of now, but an earlier backup's.
    pub by_record: bool,
    /// Snapshots of ours that the fullest image carries now.
    pub snapshots: usize,
    /// Snapshots of everybody that the fullest image carries, those in the trash included.
    pub snapshots_in_all: usize,
    /// The pool is full or nearly so: nothing may be added to it, but what retention gives up may go.
    pub no_room: Option<Problem>,
    /// Whether an image has a snapshot of the name this backup would use already.
    pub name_taken: bool,
    /// The database.
    pub database: Database,
}

/// Whether somebody writes to the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Database {
    /// No pod and no watcher: nobody writes to the image.
    Stopped {
        /// Why it cannot be said that no client left writes behind; `None` when it can.
        doubt: Option<Problem>,
    },
    /// A pod runs, and the image's watcher is its node.
    Running {
        /// The pod.
        pod: String,
        /// Its node.
        node: Option<String>,
        /// The session with PostgreSQL.
        session: Session,
    },
}

/// The session that backup mode would be held in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Session {
    /// It is open and PostgreSQL is fit for an online backup.
    Open {
        /// `server_version`.
        version: String,
        /// The system identifier, as text.
        system_identifier: String,
    },
    /// Not asked for: the class wanted needs none.
    NotWanted,
    /// It could not be opened.
    Absent(Problem),
}

/// Why an effect failed; the phase is added by the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Whether trying again can help.
    pub kind: FailureKind,
    /// What happened.
    pub reason: String,
    /// What to do about it.
    pub cure: String,
}

impl Problem {
    /// A problem, put together.
    #[must_use]
    pub fn new(kind: FailureKind, reason: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { kind, reason: reason.into(), cure: cure.into() }
    }
}

/// The snapshots of one backup. They are one state of the database: of several images that is proven by whoever took them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshots {
    /// Of the image with the data directory.
    pub data: SnapshotRecord,
    /// Of each further image, in the order of [`BackupStatus::parts`].
    pub parts: Vec<SnapshotRecord>,
    /// Up to where the WAL had reached the disk before the data directory's was taken, and the WAL's: recovery has to come
    /// that far.
    pub flushed: Option<String>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process took the operation up, for the first time or after a restart; no session of before exists.
    Resumed,
    /// The database can be backed up.
    PreflightPassed(Box<Facts>),
    /// PostgreSQL is in backup mode.
    BackupModeStarted {
        /// The start LSN.
        lsn: String,
        /// The timeline.
        timeline: Option<u32>,
    },
    /// The snapshot of each image exists.
    SnapshotTaken(Snapshots),
    /// The snapshot does not exist.
    SnapshotMissing,
    /// PostgreSQL left backup mode in good order.
    BackupModeStopped {
        /// The stop LSN.
        lsn: String,
        /// The backup label.
        label: String,
        /// The tablespace map.
        spcmap: String,
    },
    /// The catalogue entry is written.
    Recorded,
    /// Pruning went through.
    Pruned,
    /// No session is open and no snapshot of this backup exists.
    Undone,
    /// The delay is over.
    RetryDue,
    /// The effect of the phase failed.
    Failed(Problem),
}

/// What to do. All but [`Effect::AbandonBackupMode`] and [`Effect::Announce`] end in an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Find the image and the database; open the session if the class needs one.
    Preflight,
    /// `pg_backup_start(label, fast => true)` in the open session.
    StartBackupMode {
        /// The label.
        label: String,
    },
    /// Take the snapshot of each image. One of the name that exists is of an earlier attempt whose request arrived late: it
    /// will do where the class promises no more than one instant. Of several images they have to be one state: the WAL's is taken last, and no checkpoint ended since before the first, so
    /// that recovery begins before them all and finds whatever it needs.
    TakeSnapshot {
        /// The name.
        name: String,
    },
    /// Look whether the snapshot of the one image exists.
    FindSnapshot {
        /// The name.
        name: String,
    },
    /// `pg_backup_stop` in the same session.
    StopBackupMode,
    /// Close the session, which ends backup mode; no event.
    AbandonBackupMode,
    /// Write the catalogue entry to the metadata of each image.
    Record,
    /// Delete what the retention policy no longer keeps.
    Prune,
    /// Remove the snapshot from each image that has it.
    RemoveSnapshot {
        /// The name.
        name: String,
    },
    /// Wait, then [`Event::RetryDue`]. In [`Phase::Waiting`] nothing is under way, and whoever runs it may as well leave, and
    /// come back with [`Event::Resumed`].
    Wait {
        /// Until when.
        until: Timestamp,
    },
    /// Tell the user how the operation ended; no event.
    Announce,
}

/// An event that cannot happen in a phase: a bug of the shell, never a reason to go on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("take {event} in phase {}", phase.as_str())]
pub struct IllegalEvent {
    /// The phase.
    pub phase: Phase,
    /// The event.
    pub event: String,
}

/// The next status and what to do, after `event` at `now`.
///
/// # Errors
/// Returns [`IllegalEvent`] when `event` cannot follow an effect of the current phase.
pub fn next(
    order: &Order,
    status: &BackupStatus,
    event: Event,
    now: Timestamp,
) -> Result<(BackupStatus, Vec<Effect>), IllegalEvent> {
    let mut run = Run { order, status: status.clone(), now };
    let effects = match (status.phase, event) {
        (Phase::Reserved | Phase::Preflight | Phase::StartingBackupMode, Event::Resumed) => run.attempt(),
        (Phase::Preflight, Event::PreflightPassed(facts)) => {
            let mut effects = run.judge(*facts);
            // The preflight may have opened a session that the class chosen, or a refusal, does not need.
            if run.status.phase != Phase::StartingBackupMode {
                effects.insert(0, Effect::AbandonBackupMode);
            }
            effects
        }
        (Phase::Preflight, Event::Failed(problem)) => run.give_up_attempt(problem),

        (Phase::StartingBackupMode, Event::BackupModeStarted { lsn, timeline }) => {
            run.status.start_lsn = Some(lsn);
            run.status.timeline = timeline;
            run.snapshot()
        }
        // No snapshot was tried yet, so closing the session undoes everything.
        (Phase::StartingBackupMode, Event::Failed(problem)) => {
            let mut effects = vec![Effect::AbandonBackupMode];
            if run.may_go_without_session(&problem) {
                run.give_up_session(&problem);
                effects.extend(run.snapshot_after(StepOutcome::Failed, Some(sentence(&problem))));
            } else {
                effects.extend(run.give_up_attempt(problem));
            }
            effects
        }

        (Phase::Snapshotting, Event::SnapshotTaken(taken)) if taken.parts.len() == status.parts.len() => {
            run.keep(taken);
            if run.status.consistency == Some(Consistency::Online) {
                run.enter(Phase::StoppingBackupMode, StepOutcome::Done, None);
                vec![Effect::StopBackupMode]
            } else {
                run.record()
            }
        }
        (Phase::Snapshotting | Phase::Adopting, Event::Failed(problem)) => run.undo(problem),
        // That no checkpoint came between several snapshots was known to the process that took them.
        (Phase::Snapshotting, Event::Resumed) if !status.parts.is_empty() => run.undo(Problem::new(
            FailureKind::Transient,
            "the scheduler was restarted while it took the snapshots of several volumes",
            "nothing to do: they are removed, and the backup is tried again",
        )),
        (Phase::Snapshotting | Phase::Adopting, Event::Resumed) => {
            run.enter(Phase::Adopting, StepOutcome::Interrupted, None);
            vec![Effect::FindSnapshot { name: order.snapshot_name() }]
        }
        (Phase::Adopting, Event::SnapshotTaken(taken))
            if taken.parts.is_empty() && status.parts.is_empty() =>
        {
            run.keep(taken);
            if run.status.consistency == Some(Consistency::Online) {
                run.lose_session(session_lost_by_restart())
            } else {
                run.record()
            }
        }
        (Phase::Adopting, Event::SnapshotMissing) => run.attempt(),

        (Phase::StoppingBackupMode, Event::BackupModeStopped { lsn, label, spcmap }) => {
            run.status.stop_lsn = Some(lsn);
            run.status.label = Some(label);
            run.status.spcmap = Some(spcmap);
            run.condition(
                CONDITION_ONLINE,
                "True",
                "BackupModeHeld",
                "backup mode was held around the snapshot",
            );
            run.record()
        }
        (Phase::StoppingBackupMode, Event::Failed(problem)) => run.lose_session(problem),
        (Phase::StoppingBackupMode, Event::Resumed) => run.lose_session(session_lost_by_restart()),

        (Phase::Recording, Event::Recorded) => {
            run.condition(CONDITION_CATALOGUED, "True", "Written", "the image carries the catalogue entry");
            run.prune()
        }
        (Phase::Recording, Event::Failed(problem)) => run.record_failed(problem),
        (Phase::Recording, Event::RetryDue) => vec![Effect::Record],
        (Phase::Recording, Event::Resumed) => {
            run.enter(Phase::Recording, StepOutcome::Interrupted, None);
            vec![Effect::Record]
        }

        // Pruned to make room: the attempt itself was given up before.
        (Phase::Pruning, Event::Pruned | Event::Failed(_)) if run.status.snapshot.is_none() => {
            run.retry_or_fail(StepOutcome::Done, None)
        }
        (Phase::Pruning, Event::Pruned) => {
            run.condition(CONDITION_PRUNED, "True", "Pruned", "the retention policy was applied");
            run.finish(Phase::Taken, StepOutcome::Done, None)
        }
        // The backup is good whatever becomes of the old ones; the next backup prunes again.
        (Phase::Pruning, Event::Failed(problem)) => {
            let message = sentence(&problem);
            run.condition(CONDITION_PRUNED, "False", "Failed", &message);
            run.finish(Phase::Taken, StepOutcome::Failed, Some(message))
        }
        (Phase::Pruning, Event::Resumed) => {
            run.enter(Phase::Pruning, StepOutcome::Interrupted, None);
            vec![Effect::Prune]
        }

        (Phase::Undoing, Event::Undone) => {
            run.forget_snapshot();
            run.retry_or_fail(StepOutcome::Done, None)
        }
        (Phase::Undoing, Event::Failed(problem)) => run.undo_failed(problem),
        (Phase::Undoing, Event::RetryDue) => run.undo_effects(),
        (Phase::Undoing, Event::Resumed) => {
            run.enter(Phase::Undoing, StepOutcome::Interrupted, None);
            run.undo_effects()
        }

        (Phase::Waiting, Event::RetryDue) => run.attempt(),
        (Phase::Waiting, Event::Resumed) => vec![Effect::Wait { until: run.status.retry_at.unwrap_or(now) }],

        (phase, Event::Resumed) if phase.is_terminal() => Vec::new(),

        (phase, event) => return Err(IllegalEvent { phase, event: format!("{event:?}") }),
    };
    Ok((run.status, effects))
}

fn several_need_a_session() -> Problem {
    Problem::new(
        FailureKind::Permanent,
        "the database lies on several volumes, and howdah.dev/consistency is crash",
        "annotate online: without a session it is not known whether a checkpoint came between the snapshots of the volumes, \
         which then would be no backup",
    )
}

fn session_lost_by_restart() -> Problem {
    Problem::new(
        FailureKind::Transient,
        "the scheduler was restarted inside backup mode, which ended with its session",
        "nothing to do; if it happens often, look why the scheduler restarts",
    )
}

fn sentence(problem: &Problem) -> String {
    format!("{}; {}", problem.reason, problem.cure)
}

/// One call of [`next`].
struct Run<'a> {
    order: &'a Order,
    status: BackupStatus,
    now: Timestamp,
}

impl Run<'_> {
    /// Begins an attempt, or ends the operation when its deadline is over.
    fn attempt(&mut self) -> Vec<Effect> {
        let interrupted = !matches!(self.status.phase, Phase::Reserved | Phase::Waiting);
        let outcome = if interrupted { StepOutcome::Interrupted } else { StepOutcome::Done };
        self.status.slot = Some(self.order.slot);
        self.status.deadline = Some(self.order.deadline);
        self.status.started_at.get_or_insert(self.now);
        self.forget_snapshot();
        if self.now > self.order.deadline || self.status.attempt >= ATTEMPTS_MAX {
            if self.status.failure.is_none() {
                self.fail(Problem::new(
                    FailureKind::Permanent,
                    "the backup could not begin before its deadline, or was interrupted in each attempt",
                    "see why the scheduler did not run, or create a new PostgresBackup",
                ));
            }
            return self.finish(Phase::Failed, outcome, None);
        }
        self.status.attempt += 1;
        self.status.retry_at = None;
        self.enter(Phase::Preflight, outcome, None);
        vec![Effect::Preflight]
    }

    /// Chooses the class from what the preflight found, and goes on or refuses.
    fn judge(&mut self, facts: Facts) -> Vec<Effect> {
        self.status.image = Some(facts.image.clone());
        self.status.parts = facts.parts;
        self.status.beside = facts.beside;
        if facts.by_record {
            let message = format!(
                "PostgreSQL could not be asked; that nothing of the database lies on {} is known from an earlier backup. A \
                 tablespace that was made there since is missing: a restore drill (howdah.dev/verify) would tell",
                self.status.beside.join(", ")
            );
            self.condition(CONDITION_LAYOUT, "Unknown", "ByRecord", &message);
        } else {
            self.status.conditions.retain(|condition| condition.kind != CONDITION_LAYOUT);
        }
        // A request that Ceph was no longer waited for can still arrive: a librbd client that holds the lock takes
        // the snapshot when it wakes up. The first preflight saw the name free, so this one is our own.
        if facts.name_taken && self.status.steps.iter().any(|step| step.phase == Phase::Snapshotting) {
            return self.undo(Problem::new(
                FailureKind::Transient,
                "the snapshot of an earlier attempt arrived late",
                "nothing to do: it is removed, and the backup is tried again",
            ));
        }
        if facts.name_taken {
            return self.give_up_attempt(Problem::new(
                FailureKind::Permanent,
                format!("image {} has a snapshot {} already", facts.image.spec(), self.order.snapshot_name()),
                "it was left untouched: it is a backup whose record was deleted (kubectl howdah catalog rebuild brings \
                 the record back), or another StatefulSet with a schedule uses the same volume (give one of them the \
                 schedule)",
            ));
        }
        if let Some(problem) = facts.no_room {
            return self.make_room(problem);
        }
        if facts.snapshots >= SNAPSHOTS_PER_IMAGE_MAX {
            return self.give_up_attempt(Problem::new(
                FailureKind::Permanent,
                format!("image {} carries {} backups already", facts.image.spec(), facts.snapshots),
                "annotate the StatefulSet with howdah.dev/retention, or release holds, so that old ones are pruned",
            ));
        }
        if facts.snapshots_in_all >= IMAGE_SNAPSHOTS_MAX {
            return self.give_up_attempt(Problem::new(
                FailureKind::Permanent,
                format!("image {} carries {} snapshots already", facts.image.spec(), facts.snapshots_in_all),
                "remove snapshots that are not howdah's (rbd snap ls --all): near 450 ceph-csi refuses to work on the \
                 image, and near 510 the kernel refuses to map it",
            ));
        }
        let wanted = self.order.wanted;
        match facts.database {
            // At rest beats every other class, so it also serves an explicit `online`.
            Database::Stopped { doubt: None } => {
                self.condition(CONDITION_AT_REST, "True", "Unmapped", AT_REST_CLAIM);
                self.status.consistency = Some(Consistency::Offline);
                self.snapshot()
            }
            // Of one image, which is a single instant whoever writes to it.
            Database::Stopped { doubt: Some(problem) }
                if self.status.parts.is_empty()
                    && (wanted.class() == Consistency::Crash || wanted.may_downgrade()) =>
            {
                self.condition(CONDITION_AT_REST, "False", "NotProven", &sentence(&problem));
                self.status.consistency = Some(Consistency::Crash);
                self.snapshot()
            }
            Database::Stopped { doubt: Some(problem) } => self.give_up_attempt(problem),
            Database::Running { .. } if wanted == WantedConsistency::Explicit(Consistency::Offline) => self
                .give_up_attempt(Problem::new(
                    FailureKind::Permanent,
                    "the database runs, and howdah.dev/consistency is offline",
                    "scale the StatefulSet to 0 before the backup, or annotate online",
                )),
            Database::Running { pod, node, session } => {
                self.status.pod = Some(pod);
                self.status.node = node;
                match session {
                    Session::Open { version, system_identifier } if wanted.class() == Consistency::Online => {
                        self.status.postgres_version = Some(version);
                        self.status.system_identifier = Some(system_identifier);
                        self.status.consistency = Some(Consistency::Online);
                        self.enter(Phase::StartingBackupMode, StepOutcome::Done, None);
                        vec![Effect::StartBackupMode { label: self.order.snapshot_name() }]
                    }
                    Session::Open { .. } | Session::NotWanted if !self.status.parts.is_empty() => {
                        self.give_up_attempt(several_need_a_session())
                    }
                    Session::Open { .. } | Session::NotWanted => {
                        self.status.consistency = Some(Consistency::Crash);
                        self.snapshot()
                    }
                    Session::Absent(problem) if self.may_go_without_session(&problem) => {
                        self.give_up_session(&problem);
                        self.snapshot()
                    }
                    Session::Absent(problem) => self.give_up_attempt(problem),
                }
            }
        }
    }

    /// Whether a crash-consistent snapshot may stand in for an online one.
    fn may_go_without_session(&self, problem: &Problem) -> bool {
        let hopeless = match problem.kind {
            FailureKind::Credentials => true,
            // A restart of the database passes; a network policy does not.
            FailureKind::Connection => self.status.attempt >= ATTEMPTS_BEFORE_DOWNGRADE,
            FailureKind::Transient | FailureKind::Permanent => false,
        };
        // Without one it is not known whether a checkpoint came between the snapshots of several images.
        hopeless && self.order.wanted.may_downgrade() && self.status.parts.is_empty()
    }

    /// Settles for a crash-consistent snapshot, and says what is missing for an online one.
    fn give_up_session(&mut self, problem: &Problem) {
        let reason = match problem.kind {
            FailureKind::Credentials => "CredentialsMissing",
            _ => "NoAnswer",
        };
        self.condition(CONDITION_ONLINE, "False", reason, &sentence(problem));
        self.status.consistency = Some(Consistency::Crash);
    }

    fn snapshot(&mut self) -> Vec<Effect> {
        self.snapshot_after(StepOutcome::Done, None)
    }

    fn snapshot_after(&mut self, outcome: StepOutcome, message: Option<String>) -> Vec<Effect> {
        self.enter(Phase::Snapshotting, outcome, message);
        vec![Effect::TakeSnapshot { name: self.order.snapshot_name() }]
    }

    fn record(&mut self) -> Vec<Effect> {
        self.enter(Phase::Recording, StepOutcome::Done, None);
        vec![Effect::Record]
    }

    fn prune(&mut self) -> Vec<Effect> {
        self.status.failure = None;
        self.enter(Phase::Pruning, StepOutcome::Done, None);
        vec![Effect::Prune]
    }

    /// Refuses to add to a pool that has no room, and deletes first what the retention policy gives up anyway: without
    /// that no backup could ever free the room the next one waits for.
    fn make_room(&mut self, problem: Problem) -> Vec<Effect> {
        let message = sentence(&problem);
        self.fail(problem);
        self.forget_snapshot();
        self.enter(Phase::Pruning, StepOutcome::Failed, Some(message));
        vec![Effect::Prune]
    }

    /// The session ended after the snapshot: what was taken is one state of the database, and so still a crash-consistent
    /// backup.
    fn lose_session(&mut self, problem: Problem) -> Vec<Effect> {
        if !self.order.wanted.may_downgrade() {
            return self.undo(problem);
        }
        let message = sentence(&problem);
        self.condition(CONDITION_ONLINE, "False", "SessionLost", &message);
        self.status.consistency = Some(Consistency::Crash);
        self.enter(Phase::Recording, StepOutcome::Failed, Some(message));
        vec![Effect::AbandonBackupMode, Effect::Record]
    }

    fn record_failed(&mut self, problem: Problem) -> Vec<Effect> {
        if self.status.phase_retries < RECORD_RETRIES_MAX {
            return self.retry_phase(&problem);
        }
        let message = sentence(&problem);
        self.condition(CONDITION_CATALOGUED, "False", "Failed", &message);
        self.status.failure = None;
        self.enter(Phase::Pruning, StepOutcome::Failed, Some(message));
        vec![Effect::Prune]
    }

    fn undo(&mut self, problem: Problem) -> Vec<Effect> {
        let message = sentence(&problem);
        self.fail(problem);
        self.enter(Phase::Undoing, StepOutcome::Failed, Some(message));
        self.undo_effects()
    }

    fn undo_effects(&self) -> Vec<Effect> {
        vec![Effect::AbandonBackupMode, Effect::RemoveSnapshot { name: self.order.snapshot_name() }]
    }

    fn undo_failed(&mut self, problem: Problem) -> Vec<Effect> {
        if self.status.phase_retries < UNDO_RETRIES_MAX {
            return self.retry_phase(&problem);
        }
        let parts = self.status.parts.iter().map(|part| &part.image);
        let name = self.order.snapshot_name();
        let commands: Vec<String> = self
            .status
            .image
            .iter()
            .chain(parts)
            .map(|image| format!("rbd snap rm {}@{name}", image.spec()))
            .collect();
        let cure = format!("look at the image and run: {}", commands.join("; "));
        let message = problem.reason.clone();
        self.fail(Problem::new(FailureKind::Permanent, problem.reason, cure));
        self.finish(Phase::Stuck, StepOutcome::Failed, Some(message))
    }

    /// Tries the effect of the current phase again after a delay.
    fn retry_phase(&mut self, problem: &Problem) -> Vec<Effect> {
        self.status.phase_retries += 1;
        let until = self.now.saturating_add(delay(self.status.phase_retries)).unwrap_or(self.now);
        self.status.retry_at = Some(until);
        if let Some(step) = self.status.steps.last_mut() {
            step.message = Some(sentence(problem));
        }
        vec![Effect::Wait { until }]
    }

    /// Nothing was made in this attempt: wait for the next one, or end.
    fn give_up_attempt(&mut self, problem: Problem) -> Vec<Effect> {
        let message = sentence(&problem);
        self.fail(problem);
        self.forget_snapshot();
        self.retry_or_fail(StepOutcome::Failed, Some(message))
    }

    fn retry_or_fail(&mut self, outcome: StepOutcome, message: Option<String>) -> Vec<Effect> {
        let permanent = self.status.failure.as_ref().is_some_and(|f| f.kind == FailureKind::Permanent);
        let until = self.now.saturating_add(delay(self.status.attempt)).unwrap_or(self.now);
        if permanent || self.status.attempt >= ATTEMPTS_MAX || until > self.order.deadline {
            return self.finish(Phase::Failed, outcome, message);
        }
        self.status.retry_at = Some(until);
        self.enter(Phase::Waiting, outcome, message);
        vec![Effect::Wait { until }]
    }

    fn finish(&mut self, phase: Phase, outcome: StepOutcome, message: Option<String>) -> Vec<Effect> {
        self.close_step(outcome, message);
        self.status.phase = phase;
        self.status.phase_retries = 0;
        self.status.retry_at = None;
        self.status.finished_at = Some(self.now);
        if phase == Phase::Failed {
            self.status.consistency = None;
        }
        vec![Effect::Announce]
    }

    fn enter(&mut self, phase: Phase, outcome: StepOutcome, message: Option<String>) {
        self.close_step(outcome, message);
        if self.status.phase != phase {
            self.status.phase_retries = 0;
        }
        self.status.phase = phase;
        self.status.steps.push(StepRecord {
            phase,
            attempt: self.status.attempt,
            started_at: self.now,
            took_ms: None,
            outcome: None,
            message: None,
        });
        // A process that is restarted again and again must not grow the object without limit.
        let excess = self.status.steps.len().saturating_sub(STEPS_MAX);
        self.status.steps.drain(..excess);
    }

    fn close_step(&mut self, outcome: StepOutcome, message: Option<String>) {
        let Some(step) = self.status.steps.last_mut().filter(|step| step.outcome.is_none()) else { return };
        let took = self.now.duration_since(step.started_at).as_millis();
        // A clock that was set back gives a negative time.
        step.took_ms = Some(u64::try_from(took).unwrap_or(0));
        step.outcome = Some(outcome);
        if message.is_some() {
            step.message = message;
        }
    }

    fn fail(&mut self, problem: Problem) {
        let Problem { kind, reason, cure } = problem;
        self.status.failure = Some(Failure { step: self.status.phase, kind, reason, cure });
    }

    fn keep(&mut self, taken: Snapshots) {
        self.status.snapshot = Some(taken.data);
        self.status.flushed_lsn = taken.flushed;
        for (part, snapshot) in self.status.parts.iter_mut().zip(taken.parts) {
            part.snapshot = Some(snapshot);
        }
    }

    fn forget_snapshot(&mut self) {
        self.status.snapshot = None;
        for part in &mut self.status.parts {
            part.snapshot = None;
        }
        self.status.consistency = None;
        self.status.start_lsn = None;
        self.status.stop_lsn = None;
        self.status.flushed_lsn = None;
        self.status.timeline = None;
        self.status.label = None;
        self.status.spcmap = None;
    }

    fn condition(&mut self, kind: &str, status: &str, reason: &str, message: &str) {
        let [kind, status, reason, message] = [kind, status, reason, message].map(str::to_owned);
        let condition = Condition { kind, status, reason, message, last_transition_time: self.now };
        condition.put(&mut self.status.conditions);
    }
}

/// What an offline backup claims. Whether PostgreSQL itself had ended cleanly stands in `pg_control`, which cannot be read
/// without mapping the image; it shows when a clone is started.
const AT_REST_CLAIM: &str = "there was no pod, no client had the image open, and none had left its exclusive lock behind, \
                             as one does that dies while it writes: every write is in the snapshot. Whether PostgreSQL \
                             had shut down cleanly is not claimed; if it was killed, it recovers when it starts";

/// Most steps a record keeps: six attempts of eight steps, and room for restarts.
const STEPS_MAX: usize = 64;

/// Whether the next attempt of a backup that waits for `retry_at` begins now. A time further away than any delay is of a clock
/// that was set back since.
#[must_use]
pub fn retry_is_due(retry_at: Timestamp, now: Timestamp) -> bool {
    let left = retry_at.duration_since(now);
    !left.is_positive() || left > RETRY_DELAY_MAX
}

/// The delay after the `n`th try, doubling from [`RETRY_DELAY`] to [`RETRY_DELAY_MAX`].
fn delay(n: u32) -> SignedDuration {
    // Beyond ten doublings the maximum holds anyway; the bound keeps the product small.
    let doubled = RETRY_DELAY.as_secs() << n.saturating_sub(1).min(10);
    SignedDuration::from_secs(doubled).min(RETRY_DELAY_MAX)
}

#[cfg(test)]
mod crash_tests;
