//! One restore, as a state machine: what to do next, and what to do when it fails or the process restarts.
//!
//! [`next`] is total: every pair of phase and event has an answer, and the answer to an impossible one is
//! [`IllegalEvent`]. The shell writes the returned status (the intent), performs the effects, and feeds back the
//! event they end in. After a restart it feeds [`Event::Resumed`] into the last status that was written.
//!
//! ```text
//! Reserved -> Preflight -> Gating -> Stopping -> Proving -> Preparing -> SettingAside -> Placing -> Bookkeeping  (swap)
//!             | Waiting                            |  \---> Safeguarding -> RollingBack                      (rollback)
//!             v                                    v                                     \
//!           Failed                               Stuck                                    Starting -> Answering -> Opening
//!                                                                                                               |
//! going back:  (Gating -> Stopping -> Proving ->) PuttingBack -> Starting -> Opening -> Failed                Completed
//! ```
//! Until `Preparing` nothing is changed in the storage, and before `SettingAside` (or `RollingBack`) nothing that the
//! database lies in. Every effect may be performed again after a crash: it looks what is there by immutable ids, and by
//! names that derive from the record's uid. A restore that cannot go on goes back; one that cannot go back either is
//! `Stuck`, with the gate still closed, and is taken up again on request ([`Event::Asked`]).
//!
//! A database may lie in several images, which only fit together as they were backed up. Each effect acts on all of them
//! before the next phase is entered, and what is put back is put back in all: the database is never started on one that is
//! restored beside one that is not.
//!
//! No `backup_label` is written: the snapshots of a backup start by crash recovery, and with a label that no archive covers
//! PostgreSQL refuses to start.

mod choose;
pub mod copy;
mod into;
mod piece;
mod record;

use jiff::{SignedDuration, Timestamp};
use thiserror::Error;

use crate::backup::{Condition, FailureKind, ImageRecord, Problem, SnapshotRecord, StepOutcome};
use crate::names;

pub use choose::{Candidate, choose, taken_at};
pub use into::{Newcomer, fits};
pub use piece::Piece;
pub use record::{
    Failure, Goal, JournalRecord, Method, Order, Phase, Proof, RestoreStatus, RestoredPart, Source,
    StepRecord, VolumeRecord,
};

/// Most preflights; with the delays below they spread over some five minutes, in which a busy Ceph recovers.
pub const ATTEMPTS_MAX: u32 = 6;
/// Tries of one step before the restore goes back or is stuck: some ten minutes, in which the database is down.
pub const PHASE_RETRIES_MAX: u32 = 6;
/// Delay before the second try; it doubles with each one, up to [`RETRY_DELAY_MAX`].
pub const RETRY_DELAY: SignedDuration = SignedDuration::from_secs(5);
/// Longest delay between tries.
pub const RETRY_DELAY_MAX: SignedDuration = SignedDuration::from_mins(5);
/// How long the proofs are waited for beyond the pod's grace period: a volume is unmounted and detached in seconds, the
/// watcher of a node that died goes after 30 s, and Kubernetes detaches from a dead node after 6 min.
pub const PROOF_LIMIT: SignedDuration = SignedDuration::from_mins(10);
/// Pause between two looks at the proofs: each costs three API calls and a Ceph command.
pub const PROOF_PAUSE: SignedDuration = SignedDuration::from_secs(3);
/// How long PostgreSQL may take to answer: it replays the WAL since the last checkpoint of the backup, at most
/// `max_wal_size`, which on a slow disk takes minutes.
pub const ANSWER_LIMIT: SignedDuration = SignedDuration::from_mins(30);
/// Pause between two looks whether it answers.
pub const ANSWER_PAUSE: SignedDuration = SignedDuration::from_secs(3);
/// How long the safety copy is kept in any case, from the creation of the record: time to notice on Monday what was
/// restored on Friday, and to compare.
pub const SAFETY_RETENTION: SignedDuration = SignedDuration::from_hours(7 * 24);
/// Longest chain of clones that a restore may make. The kernel's client ends at 16
/// (`RBD_MAX_PARENT_CHAIN_LEN`), and a volume restored from a CSI snapshot is two deep already.
pub const CHAIN_MAX: usize = 12;

/// Condition: whether PostgreSQL answers on the restored data.
pub const CONDITION_ANSWERS: &str = "Answers";

/// What the preflight found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// What is restored.
    pub source: Source,
    /// How.
    pub method: Method,
    /// The volume with the data directory.
    pub volume: VolumeRecord,
    /// The image in place.
    pub image: ImageRecord,
    /// Its size in bytes.
    pub size: u64,
    /// `spec.replicas`.
    pub replicas: i32,
    /// What they are to be in the end; `None` for the same.
    pub replicas_after: Option<i32>,
    /// The grace period of the pod.
    pub grace: SignedDuration,
    /// Undo of a swap: the image that takes the place exists already.
    pub incoming: Option<ImageRecord>,
    /// The further volumes. No safety copy is known yet; for the undo of a swap, what takes each place is.
    pub parts: Vec<RestoredPart>,
}

/// Who was seen to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// PostgreSQL let us in and answered a query.
    Sql,
    /// The pod is ready; there are no credentials to ask PostgreSQL with.
    Ready,
}

/// What somebody wants of a restore that is under way or stuck.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// To try the step again that failed.
    Retry {
        /// What tells this request from the last one.
        token: String,
    },
    /// To put everything back.
    Undo {
        /// What tells this request from the last one.
        token: String,
    },
}

impl Request {
    /// Reads the annotation [`names::RESUME`]; `None` for one that is neither, or that was acted on already.
    #[must_use]
    pub fn read(annotation: &str, status: &RestoreStatus) -> Option<Self> {
        if status.resumed.as_deref() == Some(annotation) {
            return None;
        }
        let token = annotation.to_owned();
        if annotation.starts_with(names::RESUME_RETRY) {
            return Some(Self::Retry { token });
        }
        annotation.starts_with(names::RESUME_UNDO).then_some(Self::Undo { token })
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process took the operation up, for the first time or after a restart.
    Resumed,
    /// Somebody asked for something.
    Asked(Request),
    /// The restore can begin.
    PreflightPassed(Box<Facts>),
    /// The gate is closed.
    GateClosed,
    /// The StatefulSet is scaled to zero.
    Stopped,
    /// Every proof is there.
    Proven(Vec<Proof>),
    /// A proof is missing.
    Unproven(Vec<Proof>),
    /// All images that take a place exist, under the names given here: one for each of [`RestoreStatus::pieces`].
    Prepared(Vec<ImageRecord>),
    /// Each image that was in place bears its other name.
    SetAside,
    /// Each new image bears the name of its volume.
    Placed,
    /// ceph-csi's journals hold the ids of the new images.
    Booked,
    /// All safety snapshots exist: one for each of [`RestoreStatus::pieces`].
    Safeguarded(Vec<SnapshotRecord>),
    /// Each image is rolled back, to its last object.
    RolledBack,
    /// Everything is put back.
    PutBack,
    /// The StatefulSet is scaled.
    Started,
    /// It answers.
    Answered(Answer),
    /// It does not answer yet.
    Silent {
        /// What was seen.
        seen: String,
    },
    /// The gate is open.
    GateOpened,
    /// The delay is over.
    RetryDue,
    /// The effect of the phase failed.
    Failed(Problem),
}

/// What to do. All but [`Effect::Announce`] end in an event. What is said of one image holds for each that is restored
/// ([`RestoreStatus::pieces`]): the event tells that it was done to all, and after a failure or a crash it is done to all
/// again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Find the backup, the volume and the image, and judge them.
    Preflight,
    /// Annotate the StatefulSet, unless another operation holds it.
    CloseGate,
    /// Scale it to zero.
    Stop,
    /// Look whether anybody can still write.
    Prove,
    /// Make the image that takes the place, from nothing: what an earlier try left may be half of one. For an undo:
    /// make it ready.
    Prepare,
    /// Give the image in place its other name.
    SetAside,
    /// Give the new image the name of the volume.
    Place,
    /// Write the id of the new image into ceph-csi's journal.
    Book,
    /// Take the safety snapshot; if it exists, it is of an earlier try.
    Safeguard,
    /// Roll the image back.
    RollBack,
    /// Put everything back, as far as it was changed.
    PutBack,
    /// Scale the StatefulSet.
    Start {
        /// To what it was.
        replicas: i32,
    },
    /// Look whether PostgreSQL answers.
    Ask,
    /// Take the annotation away.
    OpenGate,
    /// Wait, then [`Event::RetryDue`], or [`Event::Asked`] when something was asked in the meantime.
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
    status: &RestoreStatus,
    event: Event,
    now: Timestamp,
) -> Result<(RestoreStatus, Vec<Effect>), IllegalEvent> {
    let mut run = Run { order, status: status.clone(), now };
    let effects = match (status.phase, event) {
        (Phase::Completed | Phase::Failed, Event::Resumed | Event::Asked(_)) => Vec::new(),
        (Phase::Stuck, Event::Resumed) => Vec::new(),
        (_, Event::Asked(request)) => run.asked(request),

        (Phase::Reserved | Phase::Preflight, Event::Resumed) | (Phase::Waiting, Event::RetryDue) => {
            run.attempt()
        }
        (Phase::Waiting, Event::Resumed) => vec![Effect::Wait { until: run.status.retry_at.unwrap_or(now) }],
        (Phase::Preflight, Event::PreflightPassed(facts)) => run.accept(*facts),
        (Phase::Preflight, Event::Failed(problem)) => run.refuse(problem),

        (Phase::Gating, Event::GateClosed) => run.enter(Phase::Stopping),
        (Phase::Stopping, Event::Stopped) => run.enter(Phase::Proving),
        (Phase::Proving, Event::Proven(proofs)) => {
            run.status.proofs = proofs;
            run.act()
        }
        (Phase::Proving, Event::Unproven(proofs)) => run.unproven(proofs),

        (Phase::Preparing, Event::Prepared(images)) if images.len() == run.pieces() => run.prepared(images),
        (Phase::SettingAside, Event::SetAside) => run.enter(Phase::Placing),
        (Phase::Placing, Event::Placed) => run.enter(Phase::Bookkeeping),
        (Phase::Bookkeeping, Event::Booked) | (Phase::RollingBack, Event::RolledBack) => run.start(),
        (Phase::Safeguarding, Event::Safeguarded(snapshots)) if snapshots.len() == run.pieces() => {
            run.safeguarded(snapshots)
        }
        (Phase::PuttingBack, Event::PutBack) => run.start(),

        (Phase::Starting, Event::Started) if run.status.going_back => run.enter(Phase::Opening),
        (Phase::Starting, Event::Started) => run.enter(Phase::Answering),
        (Phase::Answering, Event::Answered(answer)) => {
            let (reason, message) = match answer {
                Answer::Sql => ("Sql", "PostgreSQL answered on the restored data"),
                Answer::Ready => ("Ready", "the pod is ready; without credentials PostgreSQL was not asked"),
            };
            run.condition(CONDITION_ANSWERS, "True", reason, message);
            run.enter(Phase::Opening)
        }
        (Phase::Answering, Event::Silent { seen }) => run.silent(&seen),
        (Phase::Opening, Event::GateOpened) => {
            let end = if run.status.going_back { Phase::Failed } else { Phase::Completed };
            run.finish(end, StepOutcome::Done, None)
        }

        (phase, Event::Failed(problem)) if is_step(phase) => run.step_failed(problem),
        (phase, Event::RetryDue) if is_step(phase) => run.effects(),
        (phase, Event::Resumed) if is_step(phase) => run.enter_after(phase, StepOutcome::Interrupted, None),
        (phase, event) => return Err(IllegalEvent { phase, event: format!("{event:?}") }),
    };
    Ok((run.status, effects))
}

/// Whether the phase stands for an effect on the world, which is tried again until it succeeds or is given up.
const fn is_step(phase: Phase) -> bool {
    !matches!(phase, Phase::Reserved | Phase::Preflight | Phase::Waiting) && !phase.is_terminal()
}

fn sentence(problem: &Problem) -> String {
    format!("{}; {}", problem.reason, problem.cure)
}

/// One call of [`next`].
struct Run<'a> {
    order: &'a Order,
    status: RestoreStatus,
    now: Timestamp,
}

impl Run<'_> {
    /// Begins a preflight, unless there were enough.
    fn attempt(&mut self) -> Vec<Effect> {
        self.status.started_at.get_or_insert(self.now);
        self.status.safety_until =
            Some(self.order.created.saturating_add(SAFETY_RETENTION).unwrap_or(self.order.created));
        if self.status.attempt >= ATTEMPTS_MAX {
            if self.status.failure.is_none() {
                self.fail(Problem::new(
                    FailureKind::Permanent,
                    "each preflight was interrupted",
                    "see why the scheduler restarts, and create another PostgresRestore",
                ));
            }
            return self.finish(Phase::Failed, StepOutcome::Failed, None);
        }
        self.status.attempt += 1;
        self.status.retry_at = None;
        let outcome = match self.status.phase {
            Phase::Preflight => StepOutcome::Interrupted,
            _ => StepOutcome::Done,
        };
        self.enter_after(Phase::Preflight, outcome, None)
    }

    fn refuse(&mut self, problem: Problem) -> Vec<Effect> {
        let message = Some(sentence(&problem));
        let permanent = problem.kind == FailureKind::Permanent;
        self.fail(problem);
        if permanent || self.status.attempt >= ATTEMPTS_MAX {
            return self.finish(Phase::Failed, StepOutcome::Failed, message);
        }
        let until = self.later(delay(self.status.attempt));
        self.enter_after(Phase::Waiting, StepOutcome::Failed, message);
        self.status.retry_at = Some(until);
        vec![Effect::Wait { until }]
    }

    fn accept(&mut self, facts: Facts) -> Vec<Effect> {
        let Facts { source, method, volume, image, size, replicas, replicas_after, grace, incoming, parts } =
            facts;
        let status = &mut self.status;
        status.source = Some(source);
        status.method = Some(method);
        status.volume = Some(volume);
        status.image = Some(image);
        status.size = Some(size);
        status.replicas = Some(replicas);
        status.replicas_after = replicas_after;
        status.grace_seconds = u32::try_from(grace.as_secs()).unwrap_or(0);
        status.incoming = incoming;
        status.parts = parts;
        status.failure = None;
        self.enter(Phase::Gating)
    }

    /// Nobody writes any more: changes the storage.
    fn act(&mut self) -> Vec<Effect> {
        let phase = match (self.status.going_back, self.status.method.unwrap_or_default()) {
            (true, _) => Phase::PuttingBack,
            (false, Method::Swap) => Phase::Preparing,
            (false, Method::Rollback) => Phase::Safeguarding,
        };
        self.enter(phase)
    }

    /// How many images are restored.
    fn pieces(&self) -> usize {
        1 + self.status.parts.len()
    }

    /// From here on the record names all that take a place and all that are set aside, by their ids.
    fn prepared(&mut self, images: Vec<ImageRecord>) -> Vec<Effect> {
        let order = self.order;
        let aside =
            |image: &ImageRecord| ImageRecord { name: order.aside_name(&image.name), ..image.clone() };
        let mut images = images.into_iter();
        self.status.incoming = images.next();
        self.status.safety_image = self.status.image.as_ref().map(aside);
        for part in &mut self.status.parts {
            part.incoming = images.next();
            part.safety_image = Some(aside(&part.image));
        }
        self.enter(Phase::SettingAside)
    }

    fn safeguarded(&mut self, snapshots: Vec<SnapshotRecord>) -> Vec<Effect> {
        let mut snapshots = snapshots.into_iter();
        self.status.safety_snapshot = snapshots.next();
        for part in &mut self.status.parts {
            part.safety_snapshot = snapshots.next();
        }
        self.enter(Phase::RollingBack)
    }

    fn unproven(&mut self, proofs: Vec<Proof>) -> Vec<Effect> {
        let missing: Vec<String> =
            proofs.iter().filter(|proof| !proof.holds).map(|proof| proof.seen.clone()).collect();
        let missing = missing.join("; ");
        self.status.proofs = proofs;
        let grace = SignedDuration::from_secs(i64::from(self.status.grace_seconds));
        if self.waited() <= PROOF_LIMIT.saturating_add(grace) {
            return self.wait_for(&missing, PROOF_PAUSE);
        }
        self.stuck(Problem::new(
            FailureKind::Transient,
            format!("it is not proven that nobody writes to the volume: {missing}"),
            "end what still uses the volume (a node that is gone has to be fenced first: its writes may still arrive)",
        ))
    }

    fn silent(&mut self, seen: &str) -> Vec<Effect> {
        if self.waited() <= ANSWER_LIMIT {
            return self.wait_for(seen, ANSWER_PAUSE);
        }
        self.condition(CONDITION_ANSWERS, "False", "Silent", seen);
        self.stuck(Problem::new(
            FailureKind::Connection,
            format!("the restored database does not answer: {seen}"),
            "see the log of the pod: PostgreSQL says there what it lacks",
        ))
    }

    /// Scales the database to what it is to be, if that is up.
    fn start(&mut self) -> Vec<Effect> {
        if self.replicas() == 0 {
            if !self.status.going_back {
                let message = match self.status.replicas_after {
                    None => "the database was stopped before the restore, and stays so",
                    Some(_) => "the database is stopped, as it was before the restore that is undone",
                };
                self.condition(CONDITION_ANSWERS, "Unknown", "Stopped", message);
            }
            return self.enter(Phase::Opening);
        }
        if !self.status.going_back {
            self.status.started = true;
        }
        self.enter(Phase::Starting)
    }

    fn step_failed(&mut self, problem: Problem) -> Vec<Effect> {
        if problem.kind != FailureKind::Permanent && self.status.phase_retries < PHASE_RETRIES_MAX {
            self.status.phase_retries += 1;
            return self.wait_for(&sentence(&problem), delay(self.status.phase_retries));
        }
        match self.status.phase {
            _ if self.status.going_back => self.stuck(problem),
            // A mixture of old and new, or a database that should be up: not better for being left in a hurry.
            Phase::RollingBack | Phase::Starting | Phase::Answering | Phase::Opening => self.stuck(problem),
            phase => {
                let message = sentence(&problem);
                self.fail(problem);
                self.go_back(phase, StepOutcome::Failed, Some(message))
            }
        }
    }

    /// Turns round in `phase`.
    fn go_back(&mut self, phase: Phase, outcome: StepOutcome, message: Option<String>) -> Vec<Effect> {
        self.status.going_back = true;
        let next = match phase {
            Phase::Gating => Phase::Opening,
            Phase::Stopping | Phase::Proving if self.replicas() == 0 => Phase::Opening,
            Phase::Stopping | Phase::Proving => Phase::Starting,
            // The database may be up again, and the gate open: from the top.
            Phase::Starting | Phase::Answering | Phase::Opening => Phase::Gating,
            _ => Phase::PuttingBack,
        };
        self.enter_after(next, outcome, message)
    }

    fn asked(&mut self, request: Request) -> Vec<Effect> {
        let (token, undo) = match request {
            Request::Retry { token } => (token, false),
            Request::Undo { token } => (token, true),
        };
        self.status.resumed = Some(token);
        let stuck_in = self.status.failure.as_ref().map(|failure| failure.step);
        let phase = match self.status.phase {
            Phase::Stuck => stuck_in.unwrap_or(Phase::Gating),
            Phase::Reserved | Phase::Preflight | Phase::Waiting if undo => {
                self.fail(given_up());
                return self.finish(Phase::Failed, StepOutcome::Interrupted, None);
            }
            Phase::Reserved | Phase::Preflight | Phase::Waiting => return self.attempt(),
            phase => phase,
        };
        self.status.finished_at = None;
        self.status.phase_retries = 0;
        self.status.phase_since = None;
        if undo && !self.status.going_back {
            self.status.phase = phase;
            self.fail(given_up());
            return self.go_back(phase, StepOutcome::Interrupted, None);
        }
        self.enter_after(phase, StepOutcome::Interrupted, None)
    }

    fn stuck(&mut self, problem: Problem) -> Vec<Effect> {
        let name = &self.order.name;
        let Problem { kind, reason, cure } = problem;
        let message = reason.clone();
        let way = if self.status.going_back {
            format!("then run: kubectl howdah restore retry {name}")
        } else {
            format!(
                "then run: kubectl howdah restore retry {name} (or undo {name}, which puts everything back)"
            )
        };
        self.fail(Problem::new(kind, reason, format!("{cure}; {way}")));
        self.finish(Phase::Stuck, StepOutcome::Failed, Some(message))
    }

    /// Tries the effect of the current phase again after a while.
    fn wait_for(&mut self, message: &str, pause: SignedDuration) -> Vec<Effect> {
        let until = self.later(pause);
        self.status.retry_at = Some(until);
        if let Some(step) = self.status.steps.last_mut() {
            step.message = Some(message.to_owned());
        }
        vec![Effect::Wait { until }]
    }

    fn enter(&mut self, phase: Phase) -> Vec<Effect> {
        self.enter_after(phase, StepOutcome::Done, None)
    }

    /// Enters a phase; `outcome` and `message` are of the one before it.
    fn enter_after(&mut self, phase: Phase, outcome: StepOutcome, message: Option<String>) -> Vec<Effect> {
        self.close_step(outcome, message);
        if self.status.phase != phase {
            self.status.phase_retries = 0;
            self.status.phase_since = Some(self.now);
        }
        self.status.phase_since.get_or_insert(self.now);
        self.status.retry_at = None;
        self.status.phase = phase;
        self.status.steps.push(StepRecord {
            phase,
            started_at: self.now,
            took_ms: None,
            outcome: None,
            message: None,
        });
        // A process that is restarted again and again must not grow the object without limit.
        let excess = self.status.steps.len().saturating_sub(STEPS_MAX);
        self.status.steps.drain(..excess);
        self.effects()
    }

    /// The effect of the current phase.
    fn effects(&self) -> Vec<Effect> {
        vec![match self.status.phase {
            Phase::Preflight => Effect::Preflight,
            Phase::Gating => Effect::CloseGate,
            Phase::Stopping => Effect::Stop,
            Phase::Proving => Effect::Prove,
            Phase::Preparing => Effect::Prepare,
            Phase::SettingAside => Effect::SetAside,
            Phase::Placing => Effect::Place,
            Phase::Bookkeeping => Effect::Book,
            Phase::Safeguarding => Effect::Safeguard,
            Phase::RollingBack => Effect::RollBack,
            Phase::PuttingBack => Effect::PutBack,
            Phase::Starting => Effect::Start { replicas: self.replicas() },
            Phase::Answering => Effect::Ask,
            Phase::Opening => Effect::OpenGate,
            Phase::Waiting => Effect::Wait { until: self.status.retry_at.unwrap_or(self.now) },
            Phase::Reserved | Phase::Completed | Phase::Failed | Phase::Stuck => return Vec::new(),
        }]
    }

    fn finish(&mut self, phase: Phase, outcome: StepOutcome, message: Option<String>) -> Vec<Effect> {
        self.close_step(outcome, message);
        self.status.phase = phase;
        self.status.phase_retries = 0;
        self.status.phase_since = None;
        self.status.retry_at = None;
        self.status.finished_at = Some(self.now);
        if phase == Phase::Completed {
            self.status.failure = None;
        }
        vec![Effect::Announce]
    }

    fn close_step(&mut self, outcome: StepOutcome, message: Option<String>) {
        let Some(step) = self.status.steps.last_mut().filter(|step| step.outcome.is_none()) else { return };
        let took = self.now.duration_since(step.started_at).as_millis();
        // A clock that was set back gives a negative time.
        step.took_ms = Some(u64::try_from(took).unwrap_or(0));
        step.outcome = Some(outcome);
        // What was waited for is of no interest once it is there.
        if message.is_some() || outcome == StepOutcome::Done {
            step.message = message;
        }
    }

    fn fail(&mut self, problem: Problem) {
        let Problem { kind, reason, cure } = problem;
        self.status.failure = Some(Failure { step: self.status.phase, kind, reason, cure });
    }

    fn condition(&mut self, kind: &str, status: &str, reason: &str, message: &str) {
        let [kind, status, reason, message] = [kind, status, reason, message].map(str::to_owned);
        let condition = Condition { kind, status, reason, message, last_transition_time: self.now };
        condition.put(&mut self.status.conditions);
    }

    /// What the way that is gone ends with.
    fn replicas(&self) -> i32 {
        let after = self.status.replicas_after.filter(|_| !self.status.going_back);
        after.or(self.status.replicas).unwrap_or(0)
    }

    fn waited(&self) -> SignedDuration {
        self.now.duration_since(self.status.phase_since.unwrap_or(self.now))
    }

    fn later(&self, pause: SignedDuration) -> Timestamp {
        self.now.saturating_add(pause).unwrap_or(self.now)
    }
}

fn given_up() -> Problem {
    Problem::new(
        FailureKind::Permanent,
        "somebody asked to give the restore up",
        "nothing to do: everything is put back as it was",
    )
}

/// Most steps a record keeps: a whole way there and back is twenty, and room for restarts.
const STEPS_MAX: usize = 64;

/// The delay after the `n`th try, doubling from [`RETRY_DELAY`] to [`RETRY_DELAY_MAX`].
fn delay(n: u32) -> SignedDuration {
    // Beyond ten doublings the maximum holds anyway; the bound keeps the product small.
    let doubled = RETRY_DELAY.as_secs() << n.saturating_sub(1).min(10);
    SignedDuration::from_secs(doubled).min(RETRY_DELAY_MAX)
}

#[cfg(test)]
mod crash_tests;
