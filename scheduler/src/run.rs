//! Runs one backup: asks `core` what to do, writes the intent to the record, does it, and feeds back what happened.

use std::time::Duration;

use anyhow::{Context as _, bail};
use howdah_adapters::kubernetes::{KubernetesError, call};
use howdah_adapters::records::PostgresBackup;
use howdah_core::annotations::{self, Settings, WantedConsistency};
use howdah_core::backup::{self, BackupStatus, Event, Order, Trigger};
use jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, ResourceExt as _};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::context::Context;
use crate::effects::Effects;

/// Tries to write the record before the run is given up, which ends its session and so backup mode.
const WRITE_TRIES: u32 = 4;
/// Pause between these tries.
const WRITE_PAUSE: Duration = Duration::from_secs(2);

/// Runs the backup `namespace/name` from wherever it stands until its end, or until `stop`.
///
/// # Errors
/// If the record cannot be read or written any more. Nothing is lost: the next run resumes from the record.
pub async fn run(cx: &Context, namespace: &str, name: &str, stop: &CancellationToken) -> anyhow::Result<()> {
    let _permit = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        permit = cx.permits.acquire() => permit.context("wait for a free place")?,
    };
    // The cache may lag behind what a former leader wrote.
    let Some(mut journal) = Journal::open(cx, namespace, name).await? else { return Ok(()) };
    let settings = settings_of(cx, namespace, &journal.backup);
    let order = order_of(&journal.backup, settings.as_ref().ok());
    let mut effects = Effects::new(cx, &journal.backup, order.clone(), settings);
    let mut event = Event::Resumed;
    loop {
        info!(
            namespace,
            backup = name,
            phase = journal.status().phase.as_str(),
            event = label(&event),
            "backup event"
        );
        let (status, todo) = backup::next(&order, &journal.status(), event, Timestamp::now())
            .context("decide what to do next")?;
        tokio::select! {
            // Whoever leads now writes the record; a write of ours would only collide with it.
            () = stop.cancelled() => return Ok(()),
            written = journal.write(status) => written?,
        }
        let current = journal.status();
        let mut answer = None;
        for effect in &todo {
            tokio::select! {
                // Dropping the effects closes the session, which ends backup mode.
                () = stop.cancelled() => return Ok(()),
                event = effects.perform(effect, &current) => answer = event,
            }
        }
        match answer {
            Some(next) => event = next,
            None => return Ok(()),
        }
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

/// The record of one backup, written before each effect.
struct Journal {
    api: Api<PostgresBackup>,
    namespace: String,
    backup: PostgresBackup,
}

impl Journal {
    /// Reads the record; `None` when it is gone or over.
    async fn open(cx: &Context, namespace: &str, name: &str) -> anyhow::Result<Option<Self>> {
        let api = Api::<PostgresBackup>::namespaced(cx.kubernetes.client().clone(), namespace);
        let found = call(format!("get the backup {namespace}/{name}"), api.get_opt(name)).await?;
        let Some(backup) = found else { return Ok(None) };
        let journal = Self { api, namespace: namespace.to_owned(), backup };
        let over = journal.status().phase.is_terminal();
        Ok((!over).then_some(journal))
    }

    fn status(&self) -> BackupStatus {
        self.backup.status.clone().unwrap_or_default()
    }

    /// Writes the status. A conflict is resolved when only others' fields changed (a hold was put on it), and ends
    /// the run when the status did: then another leader runs this backup.
    async fn write(&mut self, status: BackupStatus) -> anyhow::Result<()> {
        let name = self.backup.name_any();
        let attempt = format!("write the status of the backup {}/{name}", self.namespace);
        for left in (0..WRITE_TRIES).rev() {
            let next = PostgresBackup { status: Some(status.clone()), ..self.backup.clone() };
            let parameters = PostParams::default();
            match call(attempt.as_str(), self.api.replace_status(&name, &parameters, &next)).await {
                Ok(written) => {
                    self.backup = written;
                    return Ok(());
                }
                Err(KubernetesError::Conflict { .. }) => {
                    let current = call(attempt.as_str(), self.api.get(&name)).await?;
                    // A lost answer to our own write looks like this, too.
                    if current.status.as_ref() == Some(&status) {
                        self.backup = current;
                        return Ok(());
                    }
                    if current.status != self.backup.status {
                        bail!("{attempt}: somebody else runs this backup");
                    }
                    self.backup = current;
                }
                Err(error @ (KubernetesError::NotFound { .. } | KubernetesError::Forbidden { .. })) => {
                    return Err(error.into());
                }
                Err(error) if left > 0 => {
                    warn!(error = %error, "write the record: trying again");
                    tokio::time::sleep(WRITE_PAUSE).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        bail!("{attempt}: it is changed too often")
    }
}
