//! One restore drill: a real PostgreSQL is started on a clone of a backup, asked, and taken away again.
//!
//! [`next`] is total, like that of a backup. Its journal stands in the record of the backup it tries.
//!
//! ```text
//! Requested -> Preflight -> Cloning -> Starting -> Running -> Removing -> Recording -> Verified | Damaged
//!              |  Waiting <-------------------------------------/ |
//!              \--------------------------------------------------+--> Inconclusive
//! ```
//! Only PostgreSQL itself condemns a backup: its data did not recover, or did not pass a check. Whatever else is in the
//! way (no room, no node, an image that cannot be pulled) says nothing of the backup, which stays `Taken`. Everything
//! that is made bears names of the record's uid, so a repeated effect finds what the first one made.

#[cfg(test)]
mod crash_tests;
mod due;
mod report;

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::backup::{FailureKind, Problem};

pub use due::{Known, due};
pub use report::{Ended, REPORT_MAX, Report, read};

/// Most attempts of one drill: with the delays below they spread over some ten minutes, in which a busy cluster recovers.
pub const ATTEMPTS_MAX: u32 = 4;
/// Tries to take the drill's parts away before it ends without; what is left is looked for again by later drills.
pub const PHASE_RETRIES_MAX: u32 = 6;
/// Delay before the second try; it doubles with each one, up to [`RETRY_DELAY_MAX`].
pub const RETRY_DELAY: SignedDuration = SignedDuration::from_secs(15);
/// Longest delay between tries.
pub const RETRY_DELAY_MAX: SignedDuration = SignedDuration::from_mins(5);
/// Pause between two looks at the pod: each is one API call.
pub const LOOK_PAUSE: SignedDuration = SignedDuration::from_secs(3);
/// How long a drill's pod may take, from its creation: an image that is pulled, WAL of `max_wal_size` that is replayed, and a
/// look at every page of a large database.
pub const RUN_LIMIT: SignedDuration = SignedDuration::from_hours(2);
/// How long the pod may wait for a node, a volume and an image before it is given up.
pub const PENDING_LIMIT: SignedDuration = SignedDuration::from_mins(10);

/// Where a drill stands. A phase is entered before the effect it names is performed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// It is due or asked for; nothing was done yet.
    #[default]
    Requested,
    /// Finding the snapshot, and what the database runs on.
    Preflight,
    /// The snapshot is being cloned.
    Cloning,
    /// Volume, claim and pod are being made.
    Starting,
    /// PostgreSQL recovers and is asked.
    Running,
    /// Pod, claim, volume and clone are being taken away.
    Removing,
    /// The result is being written to the catalogue.
    Recording,
    /// Everything is taken away; the next attempt begins at `retryAt`.
    Waiting,
    /// A PostgreSQL started on the backup, and every check passed.
    Verified,
    /// PostgreSQL could not recover the backup, or a check of its data failed.
    Damaged,
    /// The drill could not be made; nothing is known of the backup.
    Inconclusive,
}

impl Phase {
    /// Whether the drill is over.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Verified | Self::Damaged | Self::Inconclusive)
    }

    /// The word shown to users.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "Requested",
            Self::Preflight => "Preflight",
            Self::Cloning => "Cloning",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Removing => "Removing",
            Self::Recording => "Recording",
            Self::Waiting => "Waiting",
            Self::Verified => "Verified",
            Self::Damaged => "Damaged",
            Self::Inconclusive => "Inconclusive",
        }
    }
}

/// The journal and result of one drill, in the status of a `PostgresBackup`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VerifyStatus {
    /// Where the drill stands.
    pub phase: Phase,
    /// Number of the current attempt, from 1.
    pub attempt: u32,
    /// The request that was acted on, for a drill that was asked for by hand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asked: Option<String>,
    /// When the first attempt began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When the drill ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// When the next attempt, or the next try of the phase, begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
    /// When the current phase was entered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase_since: Option<Timestamp>,
    /// How often the current phase was tried again.
    #[serde(skip_serializing_if = "is_zero")]
    pub phase_retries: u32,
    /// What PostgreSQL said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Report>,
    /// What failed; absent when the drill succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// What could not be taken away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_behind: Option<String>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// What failed, why, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The phase that failed.
    pub step: Phase,
    /// What happened.
    pub reason: String,
    /// What to do about it.
    pub cure: String,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process took the drill up, for the first time or after a restart.
    Resumed,
    /// It can begin.
    PreflightPassed,
    /// The clone exists.
    Cloned,
    /// The pod exists.
    Started,
    /// The pod has not ended.
    Runs {
        /// What it waits for, while it has not begun.
        pending: Option<String>,
    },
    /// The pod has ended.
    Ended(Ended),
    /// Nothing of the drill is left.
    Removed,
    /// The catalogue knows the result.
    Recorded,
    /// The delay is over.
    RetryDue,
    /// The effect of the phase failed.
    Failed(Problem),
}

/// What to do. All but [`Effect::Announce`] end in an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Find the snapshot, and what the database runs on.
    Preflight,
    /// Clone the snapshot, from nothing.
    Clone,
    /// Make volume, claim and pod.
    Start,
    /// Look at the pod.
    Look,
    /// Take everything away.
    Remove,
    /// Write the result to the catalogue.
    Record,
    /// Wait, then [`Event::RetryDue`].
    Wait {
        /// Until when.
        until: Timestamp,
    },
    /// Tell the user how it ended; no event.
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
    status: &VerifyStatus,
    event: Event,
    now: Timestamp,
) -> Result<(VerifyStatus, Vec<Effect>), IllegalEvent> {
    let mut run = Run { status: status.clone(), now };
    let effects = match (status.phase, event) {
        (Phase::Requested | Phase::Preflight, Event::Resumed) | (Phase::Waiting, Event::RetryDue) => {
            run.attempt()
        }
        (Phase::Waiting, Event::Resumed) => vec![Effect::Wait { until: run.status.retry_at.unwrap_or(now) }],
        (Phase::Preflight, Event::PreflightPassed) => run.enter(Phase::Cloning),
        // Nothing was made in this attempt, and what an earlier one made is gone.
        (Phase::Preflight, Event::Failed(problem)) => {
            run.fail(&problem);
            run.retry_or_end(problem.kind)
        }

        (Phase::Cloning, Event::Cloned) => run.enter(Phase::Starting),
        (Phase::Starting, Event::Started) => run.enter(Phase::Running),
        (Phase::Running, Event::Runs { pending }) => run.runs(pending),
        (Phase::Running, Event::Ended(ended)) => run.ended(ended),
        (Phase::Running, Event::RetryDue | Event::Resumed) => vec![Effect::Look],
        (Phase::Cloning | Phase::Starting | Phase::Running, Event::Failed(problem)) => {
            run.fail(&problem);
            run.remove()
        }
        // Both may be done twice; what was half made is made from nothing.
        (Phase::Cloning, Event::Resumed) => vec![Effect::Clone],
        (Phase::Starting, Event::Resumed) => vec![Effect::Start],

        (Phase::Removing, Event::Removed) => run.removed(),
        (Phase::Removing, Event::Failed(problem)) => run.removal_failed(&problem),
        (Phase::Removing, Event::RetryDue | Event::Resumed) => vec![Effect::Remove],

        (Phase::Recording, Event::Recorded) => run.end(),
        // The record in the cluster says it; the next drill of the image writes its own entry.
        (Phase::Recording, Event::Failed(problem)) => {
            if run.status.phase_retries < PHASE_RETRIES_MAX {
                run.again()
            } else {
                run.status.left_behind = Some(format!("the catalogue lacks the result: {}", problem.reason));
                run.end()
            }
        }
        (Phase::Recording, Event::RetryDue | Event::Resumed) => vec![Effect::Record],

        (Phase::Verified | Phase::Damaged | Phase::Inconclusive, Event::Resumed) => Vec::new(),
        (phase, event) => return Err(IllegalEvent { phase, event: format!("{event:?}") }),
    };
    Ok((run.status, effects))
}

/// One call of [`next`].
struct Run {
    status: VerifyStatus,
    now: Timestamp,
}

impl Run {
    fn attempt(&mut self) -> Vec<Effect> {
        self.status.started_at.get_or_insert(self.now);
        if self.status.attempt >= ATTEMPTS_MAX {
            if self.status.failure.is_none() {
                self.fail(&Problem::new(
                    FailureKind::Permanent,
                    "the drill was interrupted in each attempt",
                    "see why the scheduler restarts, and ask again: kubectl howdah verify BACKUP",
                ));
            }
            return self.end_as(Phase::Inconclusive);
        }
        self.status.attempt += 1;
        self.enter(Phase::Preflight)
    }

    fn enter(&mut self, phase: Phase) -> Vec<Effect> {
        self.status.phase = phase;
        self.status.phase_since = Some(self.now);
        self.status.phase_retries = 0;
        self.status.retry_at = None;
        vec![match phase {
            Phase::Cloning => Effect::Clone,
            Phase::Starting => Effect::Start,
            Phase::Running => Effect::Look,
            Phase::Removing => Effect::Remove,
            Phase::Recording => Effect::Record,
            _ => Effect::Preflight,
        }]
    }

    fn fail(&mut self, problem: &Problem) {
        self.status.failure = Some(Failure {
            step: self.status.phase,
            reason: problem.reason.clone(),
            cure: problem.cure.clone(),
        });
    }

    fn runs(&mut self, pending: Option<String>) -> Vec<Effect> {
        let since = self.status.phase_since.unwrap_or(self.now);
        let limit = if pending.is_some() { PENDING_LIMIT } else { RUN_LIMIT };
        if self.now.duration_since(since) > limit {
            let what = pending.map_or_else(
                || "PostgreSQL did not come to an end on the clone".to_owned(),
                |what| format!("the drill's pod did not begin: {what}"),
            );
            self.fail(&Problem::new(
                FailureKind::Transient,
                format!("{what} within {} min", limit.as_mins()),
                "see the events of the namespace howdah-verify; a node needs room for the pod and must reach Ceph",
            ));
            return self.remove();
        }
        let until = self.now.saturating_add(LOOK_PAUSE).unwrap_or(self.now);
        vec![Effect::Wait { until }]
    }

    fn ended(&mut self, ended: Ended) -> Vec<Effect> {
        match ended {
            Ended::Reported(report) => {
                self.status.failure = None;
                if let Some(damage) = &report.damage {
                    self.fail(&Problem::new(
                        FailureKind::Permanent,
                        damage.clone(),
                        "do not restore this backup; see docs/runbooks/verification-failed.md",
                    ));
                }
                self.status.report = Some(report);
            }
            Ended::Silent { seen } => self.fail(&Problem::new(
                FailureKind::Transient,
                seen,
                "see the events of the namespace howdah-verify, and whether the limits of its pods are enough",
            )),
        }
        self.remove()
    }

    fn remove(&mut self) -> Vec<Effect> {
        self.enter(Phase::Removing)
    }

    fn removed(&mut self) -> Vec<Effect> {
        if self.status.report.is_some() {
            return self.enter(Phase::Recording);
        }
        self.retry_or_end(FailureKind::Transient)
    }

    fn removal_failed(&mut self, problem: &Problem) -> Vec<Effect> {
        if self.status.phase_retries < PHASE_RETRIES_MAX {
            return self.again();
        }
        self.status.left_behind = Some(format!("{}; {}", problem.reason, problem.cure));
        if self.status.report.is_some() {
            return self.enter(Phase::Recording);
        }
        self.end_as(Phase::Inconclusive)
    }

    /// Waits before the phase is tried once more.
    fn again(&mut self) -> Vec<Effect> {
        let until = self.now.saturating_add(delay(self.status.phase_retries)).unwrap_or(self.now);
        self.status.phase_retries += 1;
        self.status.retry_at = Some(until);
        vec![Effect::Wait { until }]
    }

    fn retry_or_end(&mut self, kind: FailureKind) -> Vec<Effect> {
        if kind == FailureKind::Permanent || self.status.attempt >= ATTEMPTS_MAX {
            return self.end_as(Phase::Inconclusive);
        }
        let until = self.now.saturating_add(delay(self.status.attempt)).unwrap_or(self.now);
        self.status.phase = Phase::Waiting;
        self.status.phase_since = Some(self.now);
        self.status.retry_at = Some(until);
        vec![Effect::Wait { until }]
    }

    fn end(&mut self) -> Vec<Effect> {
        let damaged = self.status.report.as_ref().is_none_or(|report| report.damage.is_some());
        self.end_as(if damaged { Phase::Damaged } else { Phase::Verified })
    }

    fn end_as(&mut self, phase: Phase) -> Vec<Effect> {
        self.status.phase = phase;
        self.status.phase_since = None;
        self.status.retry_at = None;
        self.status.finished_at = Some(self.now);
        vec![Effect::Announce]
    }
}

fn delay(tries: u32) -> SignedDuration {
    let factor = 2_i32.checked_pow(tries.min(10)).unwrap_or(i32::MAX);
    RETRY_DELAY.saturating_mul(factor).min(RETRY_DELAY_MAX)
}
