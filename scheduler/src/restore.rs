//! A restore as the driver in [`crate::run`] sees it, and the hands that do what `core::restore` says.

mod cluster;
mod preflight;
mod source;
mod storage;

use std::time::Duration;

use howdah_adapters::ceph::{Ceph, ROLLBACK_LIMIT};
use howdah_adapters::kubernetes::call;
use howdah_adapters::leader::Mandate;
use howdah_adapters::records::PostgresRestore;
use howdah_core::backup::{FailureKind, Problem};
use howdah_core::names;
use howdah_core::restore::{self, Effect, Event, Order, Phase, Piece, Request, RestoreStatus};
use jiff::Timestamp;
use kube::runtime::events::{Event as ClusterEvent, EventType};
use kube::{Api, ResourceExt as _};
use tracing::{info, warn};

use crate::context::Context;
use crate::effects::connect_ceph;
use crate::run::{self, Operation};

/// The token of the request that deleting an open record is.
const DELETED: &str = "deleted";

/// How long each effect may take, beyond the limits of the single calls inside; `images` are restored, one after the
/// other.
fn limit_of(effect: &Effect, images: u32) -> Duration {
    match effect {
        // Some fifteen calls for each image, each answered in a second, or slow for one reason. How many images there are is
        // what it finds out.
        Effect::Preflight => Duration::from_secs(600),
        Effect::Prove => Duration::from_secs(180) * images,
        Effect::CloseGate | Effect::Stop | Effect::Start { .. } | Effect::OpenGate => Duration::from_secs(90),
        // Removes what an earlier try left, clones, and writes some metadata.
        Effect::Prepare => Duration::from_secs(900) * images,
        Effect::SetAside | Effect::Place | Effect::Book | Effect::Safeguard => {
            Duration::from_secs(300) * images
        }
        Effect::RollBack => (ROLLBACK_LIMIT + Duration::from_secs(300)) * images,
        Effect::PutBack => (ROLLBACK_LIMIT + Duration::from_secs(900)) * images,
        // A connection is given up after 15 s.
        Effect::Ask => Duration::from_secs(90),
        Effect::Announce => Duration::from_secs(30),
        // As long as `core` says.
        Effect::Wait { .. } => Duration::from_secs(3600),
    }
}

/// Runs the restore `namespace/name`. It waits for no free place among the backups: somebody's database is down.
///
/// # Errors
/// If the record cannot be read or written any more; the next run resumes from it.
pub async fn run(cx: &Context, namespace: &str, name: &str, mandate: &Mandate) -> anyhow::Result<()> {
    run::run(cx, namespace, name, mandate, |record| Restore::new(cx, record)).await
}

/// Whether there is something to do for the record: it is not over, or something is asked of it.
pub fn is_open(record: &PostgresRestore) -> bool {
    first_event(record).is_some()
}

fn first_event(record: &PostgresRestore) -> Option<Event> {
    let status = record.status.clone().unwrap_or_default();
    let asked = request(record, &status).map(Event::Asked);
    match status.phase {
        Phase::Completed | Phase::Failed => None,
        Phase::Stuck => asked,
        _ => Some(asked.unwrap_or(Event::Resumed)),
    }
}

/// What is asked of the restore and was not acted on yet.
fn request(record: &PostgresRestore, status: &RestoreStatus) -> Option<Request> {
    let deleted = record.metadata.deletion_timestamp.is_some() && status.resumed.as_deref() != Some(DELETED);
    if deleted && !status.going_back {
        return Some(Request::Undo { token: DELETED.to_owned() });
    }
    Request::read(record.annotations().get(names::RESUME)?, status)
}

/// What is to be done: from the record alone, so that it is the same after a restart.
fn order_of(record: &PostgresRestore) -> Order {
    Order {
        name: record.name_any(),
        uid: record.uid().unwrap_or_default(),
        created: record.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        goal: record.spec.goal(),
        method: record.spec.method,
    }
}

/// The hands of one restore.
pub struct Restore<'a> {
    cx: &'a Context,
    record: PostgresRestore,
    order: Order,
    ceph: Option<Ceph>,
}

impl<'a> Restore<'a> {
    fn new(cx: &'a Context, record: &PostgresRestore) -> Self {
        Self { cx, record: record.clone(), order: order_of(record), ceph: None }
    }

    fn namespace(&self) -> String {
        self.record.namespace().unwrap_or_default()
    }

    fn records(&self) -> Api<PostgresRestore> {
        Api::namespaced(self.cx.kubernetes.client().clone(), &self.namespace())
    }

    /// The connection of this run, or a new one after a restart.
    async fn ceph(&mut self) -> Result<Ceph, Problem> {
        match &self.ceph {
            Some(ceph) => Ok(ceph.clone()),
            None => Ok(self.ceph.insert(connect_ceph(self.cx).await?).clone()),
        }
    }

    async fn perform_unbounded(
        &mut self,
        effect: &Effect,
        status: &RestoreStatus,
    ) -> Result<Option<Event>, Problem> {
        Ok(Some(match effect {
            Effect::Preflight => Event::PreflightPassed(Box::new(self.preflight().await?)),
            Effect::CloseGate => self.close_gate().await?,
            Effect::Stop => self.stop(status).await?,
            Effect::Prove => self.prove(status).await?,
            Effect::Prepare => self.prepare(status).await?,
            Effect::SetAside => self.set_aside(status).await?,
            Effect::Place => self.place(status).await?,
            Effect::Book => self.book(status).await?,
            Effect::Safeguard => self.safeguard(status).await?,
            Effect::RollBack => self.roll_back(status).await?,
            Effect::PutBack => self.put_back(status).await?,
            Effect::Start { replicas } => self.start(*replicas, status).await?,
            Effect::Ask => self.ask().await?,
            Effect::OpenGate => self.open_gate().await?,
            Effect::Wait { until } => self.wait(*until, status).await,
            Effect::Announce => {
                self.announce(status).await;
                return Ok(None);
            }
        }))
    }

    /// Waits, and looks whether something was asked in the meantime.
    async fn wait(&self, until: Timestamp, status: &RestoreStatus) -> Event {
        let left = until.duration_since(Timestamp::now());
        tokio::time::sleep(Duration::try_from(left).unwrap_or_default()).await;
        let name = self.order.name.as_str();
        match call(format!("get the restore {name}"), self.records().get(name)).await {
            Ok(record) => request(&record, status).map_or(Event::RetryDue, Event::Asked),
            // It is read again at the next wait; the next write of the status tells if it is gone.
            Err(error) => {
                warn!(restore = name, error = %error, "look for requests");
                Event::RetryDue
            }
        }
    }

    /// Says how the restore ended: in the metrics, the log, and as an Event of the StatefulSet.
    async fn announce(&self, status: &RestoreStatus) {
        self.cx.metrics.restore_ended(status);
        let name = &self.order.name;
        info!(restore = name, phase = status.phase.as_str(), "restore ended");
        let source = status.source.as_ref().map_or("nothing", |source| source.name.as_str());
        let why = status
            .failure
            .as_ref()
            .map_or(String::new(), |f| format!(" in {}: {}; {}", f.step.as_str(), f.reason, f.cure));
        let (kind, reason, note) = match status.phase {
            Phase::Completed => {
                (EventType::Normal, "Restored", format!("restore {name}: {source} is in place"))
            }
            Phase::Stuck => (EventType::Warning, "RestoreStuck", format!("restore {name} is stuck{why}")),
            _ => (EventType::Warning, "RestoreFailed", format!("restore {name} failed{why}")),
        };
        let event = ClusterEvent {
            type_: kind,
            reason: reason.to_owned(),
            note: Some(note),
            action: "Restore".to_owned(),
            secondary: None,
        };
        let database = self.cx.caches.database(&self.namespace(), self.record.spec.target());
        let published = match database.as_deref() {
            Some(database) => self.cx.kubernetes.publish(event, database).await,
            None => self.cx.kubernetes.publish(event, &self.record).await,
        };
        if let Err(error) = published {
            warn!(error = %error, "publish an event");
        }
    }
}

impl Operation for Restore<'_> {
    type Record = PostgresRestore;
    type Event = Event;
    type Effect = Effect;
    const NOUN: &'static str = "restore";

    fn first_event(record: &PostgresRestore) -> Option<Event> {
        first_event(record)
    }

    fn phase(status: &RestoreStatus) -> &'static str {
        status.phase.as_str()
    }

    fn loses(record: &PostgresRestore, status: &RestoreStatus) -> bool {
        record.status.as_ref().map_or(0, |written| written.parts.len()) < status.parts.len()
    }

    fn label(event: &Event) -> &'static str {
        match event {
            Event::Resumed => "resumed",
            Event::Asked(Request::Retry { .. }) => "asked to retry",
            Event::Asked(Request::Undo { .. }) => "asked to put back",
            Event::PreflightPassed(_) => "preflight passed",
            Event::GateClosed => "gate closed",
            Event::Stopped => "stopped",
            Event::Proven(_) => "proven",
            Event::Unproven(_) => "a proof is missing",
            Event::Prepared(_) => "prepared",
            Event::SetAside => "set aside",
            Event::Placed => "placed",
            Event::Booked => "booked",
            Event::Safeguarded(_) => "safeguarded",
            Event::RolledBack => "rolled back",
            Event::PutBack => "put back",
            Event::Started => "started",
            Event::Answered(_) => "answered",
            Event::Silent { .. } => "no answer yet",
            Event::GateOpened => "gate opened",
            Event::RetryDue => "retry due",
            Event::Failed(_) => "failed",
        }
    }

    fn next(
        &self,
        status: &RestoreStatus,
        event: Event,
        now: Timestamp,
    ) -> anyhow::Result<(RestoreStatus, Vec<Effect>)> {
        Ok(restore::next(&self.order, status, event, now)?)
    }

    async fn perform(&mut self, effect: &Effect, status: &RestoreStatus) -> Option<Event> {
        let images = u32::try_from(1 + status.parts.len()).unwrap_or(u32::MAX);
        let limit = limit_of(effect, images);
        let problem = match tokio::time::timeout(limit, self.perform_unbounded(effect, status)).await {
            Ok(Ok(event)) => return event,
            Ok(Err(problem)) => problem,
            Err(_) => Problem::new(
                FailureKind::Transient,
                format!("{} took longer than {} s", status.phase.as_str(), limit.as_secs()),
                "look at the load of the API server and of Ceph",
            ),
        };
        warn!(
            restore = self.order.name,
            phase = status.phase.as_str(),
            reason = problem.reason,
            cure = problem.cure,
            "restore step failed"
        );
        Some(Event::Failed(problem))
    }
}

fn permanent(reason: impl Into<String>, cure: impl Into<String>) -> Problem {
    Problem::new(FailureKind::Permanent, reason, cure)
}

fn transient(reason: impl Into<String>, cure: impl Into<String>) -> Problem {
    Problem::new(FailureKind::Transient, reason, cure)
}

/// A part of the status that an earlier phase wrote.
fn known<'s, T>(part: &'s Option<T>, what: &str) -> Result<&'s T, Problem> {
    part.as_ref().ok_or_else(|| permanent(format!("the record names no {what}"), "report this as a bug"))
}

/// What is restored, as the preflight wrote it down: the image with the data directory, and the others after it.
fn pieces(status: &RestoreStatus) -> Result<Vec<Piece<'_>>, Problem> {
    known(&status.pieces(), "volume, image and source").cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn record(metadata: Value, status: Value) -> PostgresRestore {
        serde_json::from_value(json!({
            "apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresRestore", "metadata": metadata,
            "spec": {"statefulSet": "db", "to": "newest"}, "status": status
        }))
        .unwrap()
    }

    #[test]
    fn a_restore_that_is_over_is_left_alone() {
        for phase in ["Completed", "Failed", "Stuck"] {
            assert!(!is_open(&record(json!({"name": "r"}), json!({"phase": phase}))), "{phase}");
        }
        assert!(is_open(&record(json!({"name": "r"}), json!({"phase": "Proving"}))));
        assert!(is_open(&record(json!({"name": "r"}), json!(null))));
    }

    #[test]
    fn what_is_done_to_each_image_has_the_time_for_each() {
        for effect in [Effect::Prove, Effect::Prepare, Effect::SetAside, Effect::RollBack, Effect::PutBack] {
            assert_eq!(limit_of(&effect, 3), limit_of(&effect, 1) * 3, "{effect:?}");
        }
        assert_eq!(limit_of(&Effect::Stop, 3), limit_of(&Effect::Stop, 1));
    }

    #[test]
    fn a_stuck_one_is_taken_up_once_for_each_request() {
        let asked = json!({"name": "r", "annotations": {"howdah.dev/resume": "retry/1"}});
        let event = first_event(&record(asked.clone(), json!({"phase": "Stuck"})));
        assert_eq!(event, Some(Event::Asked(Request::Retry { token: "retry/1".to_owned() })));
        assert!(!is_open(&record(asked, json!({"phase": "Stuck", "resumed": "retry/1"}))));
    }

    #[test]
    fn deleting_an_open_record_asks_to_put_back_once() {
        let deleted = json!({"name": "r", "deletionTimestamp": "2026-11-22T03:00:00Z"});
        let event = first_event(&record(deleted.clone(), json!({"phase": "Proving"})));
        assert_eq!(event, Some(Event::Asked(Request::Undo { token: "deleted".to_owned() })));
        let event = first_event(&record(deleted.clone(), json!({"phase": "Starting", "resumed": "deleted"})));
        assert_eq!(event, Some(Event::Resumed));
        assert!(!is_open(&record(deleted, json!({"phase": "Stuck", "resumed": "deleted"}))));
    }
}
