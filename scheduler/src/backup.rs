//! A backup as the driver in [`crate::run`] sees it: what is ordered, and how `core::backup` and [`Effects`] fit in.

use howdah_adapters::leader::Mandate;
use howdah_adapters::records::PostgresBackup;
use howdah_core::annotations::{self, Settings, WantedConsistency};
use howdah_core::backup::{self, BackupStatus, Effect, Event, Order, Trigger};
use jiff::Timestamp;
use kube::ResourceExt as _;

use crate::context::Context;
use crate::effects::Effects;
use crate::run::{self, Operation};

/// Runs the backup `namespace/name` as soon as there is a free place for it.
///
/// # Errors
/// If the record cannot be read or written any more; the next run resumes from it.
pub async fn run(cx: &Context, namespace: &str, name: &str, mandate: &Mandate) -> anyhow::Result<()> {
    let place = tokio::select! {
        () = mandate.ended() => return Ok(()),
        place = cx.places.enter() => place,
    };
    let run = run::run(cx, namespace, name, mandate, |record| {
        let settings = settings_of(cx, namespace, record);
        let order = order_of(record, settings.as_ref().ok());
        Effects::new(cx, record, order, settings, place)
    });
    // On the heap from here on: ten thousand may wait for a place, and each would be as large as one that runs.
    Box::pin(run).await
}

impl Operation for Effects<'_> {
    type Record = PostgresBackup;
    type Event = Event;
    type Effect = Effect;
    const NOUN: &'static str = "backup";

    fn first_event(record: &PostgresBackup) -> Option<Event> {
        let over = record.status.as_ref().is_some_and(|status| status.phase.is_terminal());
        (!over).then_some(Event::Resumed)
    }

    fn phase(status: &BackupStatus) -> &'static str {
        status.phase.as_str()
    }

    fn loses(record: &PostgresBackup, status: &BackupStatus) -> bool {
        record.status.as_ref().map_or(0, |written| written.parts.len()) < status.parts.len()
    }

    fn label(event: &Event) -> &'static str {
        match event {
            Event::Resumed => "resumed",
            Event::PreflightPassed(_) => "preflight passed",
            Event::BackupModeStarted { .. } => "backup mode started",
            Event::SnapshotTaken(_) => "snapshot taken",
            Event::SnapshotMissing => "snapshot missing",
            Event::BackupModeStopped { .. } => "backup mode stopped",
            Event::Recorded => "recorded",
            Event::Pruned => "pruned",
            Event::Undone => "undone",
            Event::RetryDue => "retry due",
            Event::Failed(_) => "failed",
        }
    }

    fn next(
        &self,
        status: &BackupStatus,
        event: Event,
        now: Timestamp,
    ) -> anyhow::Result<(BackupStatus, Vec<Effect>)> {
        Ok(backup::next(self.order(), status, event, now)?)
    }

    async fn perform(&mut self, effect: &Effect, status: &BackupStatus) -> Option<Event> {
        self.perform_within_limit(effect, status).await
    }
}

/// The settings of the database a backup belongs to.
fn settings_of(cx: &Context, namespace: &str, backup: &PostgresBackup) -> Result<Settings, String> {
    let name = &backup.spec.stateful_set;
    let database = cx.caches.database(namespace, name).ok_or_else(|| {
        format!("there is no StatefulSet {namespace}/{name} with the label howdah.dev/protect=true")
    })?;
    if backup.spec.stateful_set_uid.is_some() && backup.spec.stateful_set_uid != database.uid() {
        return Err(format!("the StatefulSet {namespace}/{name} was replaced by another of the same name"));
    }
    annotations::parse(database.annotations()).map_err(|errors| {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        lines.join("; ")
    })
}

/// What is to be done: from the record alone, so that it is the same after a restart.
fn order_of(backup: &PostgresBackup, settings: Option<&Settings>) -> Order {
    let created = backup.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let slot = backup.spec.slot.or(created).unwrap_or(Timestamp::UNIX_EPOCH);
    let wanted = match (backup.spec.consistency, settings) {
        (Some(class), _) => WantedConsistency::Explicit(class),
        (None, Some(settings)) => settings.consistency,
        (None, None) => WantedConsistency::Default,
    };
    // A slot that was caught up late has as long as any other, from when it was reserved.
    let begin = match backup.spec.trigger {
        Trigger::Schedule | Trigger::Manual => created.unwrap_or(slot),
    };
    let deadline = begin.saturating_add(backup::DEADLINE).unwrap_or(begin);
    Order { slot, trigger: backup.spec.trigger, wanted, deadline }
}
