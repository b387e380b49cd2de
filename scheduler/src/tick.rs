//! The wake-up: every few seconds each schedule is looked at, and each open backup gets somebody to run it.
//!
//! tokio-cron-scheduler is the alarm clock and nothing else: its zones and its rules for missed ticks are wrong
//! (it keeps the offset of the day it was started), and a clock that jumps ahead silences it. So it only wakes us, in
//! UTC; what is due is decided by [`schedule::decide`], and a wake-up that comes twice, late or not at all does no
//! harm. When it falls silent, a timer wakes us and the alarm clock is wound again.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use howdah_adapters::kubernetes::{KubernetesError, call};
use howdah_adapters::leader::Mandate;
use howdah_adapters::records::{PostgresBackup, PostgresBackupSpec, PostgresRestore};
use howdah_core::annotations::{self, Settings};
use howdah_core::backup::{Phase, Trigger};
use howdah_core::names;
use howdah_core::schedule::{self, Decision, Known, Waiting};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, ResourceExt as _};
use tokio::sync::Notify;
use tokio::task::{Id, JoinSet};
use tokio_cron_scheduler::{Job, JobScheduler};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::context::Context;
use crate::{backup, restore};

/// Wake-ups in a row that may stay out before the alarm clock is wound again.
const SILENT_WAKES_MAX: u32 = 4;
/// How long running backups may go on after the signal to end: longer than the limits of the steps inside backup
/// mode together, shorter than the pod's grace period.
const DRAIN: Duration = Duration::from_secs(75);

/// The alarm clock.
struct Alarm {
    clock: JobScheduler,
    rings: Arc<Notify>,
}

impl Alarm {
    async fn wind(every_seconds: u32) -> anyhow::Result<Self> {
        let rings = Arc::new(Notify::new());
        let ring = rings.clone();
        let clock = JobScheduler::new().await.context("make the alarm clock")?;
        let job = Job::new(format!("*/{every_seconds} * * * * *"), move |_, _| ring.notify_one())
            .context("set the alarm")?;
        clock.add(job).await.context("add the alarm")?;
        clock.start().await.context("start the alarm clock")?;
        Ok(Self { clock, rings })
    }

    async fn stop(mut self) {
        if let Err(error) = self.clock.shutdown().await {
            warn!(error = %error, "stop the alarm clock");
        }
    }
}

/// Runs one term of leadership: ticks until it ends, then lets the running backups end.
///
/// `mandate` ends when leadership is lost (then nothing may go on); at the shutdown what runs may end.
///
/// # Errors
/// If the alarm clock cannot be wound.
pub async fn lead(cx: &Arc<Context>, mandate: &Mandate, shutdown: &CancellationToken) -> anyhow::Result<()> {
    let wake = Duration::from_secs(u64::from(cx.args.wake_seconds));
    let mut term = Term::new(cx.clone(), mandate.clone());
    let mut alarm = Alarm::wind(cx.args.wake_seconds).await?;
    loop {
        tokio::select! {
            () = mandate.ended() => break,
            () = shutdown.cancelled() => break,
            () = alarm.rings.notified() => {}
            () = tokio::time::sleep(wake * SILENT_WAKES_MAX) => {
                warn!(silent_ms = (wake * SILENT_WAKES_MAX).as_millis(), "the alarm clock is silent: winding it again");
                alarm.stop().await;
                alarm = Alarm::wind(cx.args.wake_seconds).await?;
            }
            () = term.one_run_ended() => continue,
        }
        term.tick(Timestamp::now()).await;
    }
    alarm.stop().await;
    term.drain().await;
    Ok(())
}

/// What this replica remembers while it leads.
struct Term {
    cx: Arc<Context>,
    mandate: Mandate,
    runs: JoinSet<()>,
    /// The databases of the running tasks.
    running: HashMap<Id, DatabaseKey>,
    /// Per StatefulSet uid: the schedule as it was last seen, and since when.
    seen: HashMap<String, (String, Timestamp)>,
    /// Slots reserved in this term, which the cache may not show yet.
    reserved: HashMap<String, BTreeSet<Timestamp>>,
    /// Slots already reported as missed.
    missed: HashSet<(String, Timestamp)>,
    /// The last look at both clocks: the one that cannot jump, and the wall's.
    clocks: Option<(Instant, Timestamp)>,
}

/// Namespace and name of a StatefulSet.
type DatabaseKey = (String, String);

impl Term {
    fn new(cx: Arc<Context>, mandate: Mandate) -> Self {
        Self {
            cx,
            mandate,
            runs: JoinSet::new(),
            running: HashMap::new(),
            seen: HashMap::new(),
            reserved: HashMap::new(),
            missed: HashSet::new(),
            clocks: None,
        }
    }

    /// Waits for a run to end; for ever when none is under way.
    async fn one_run_ended(&mut self) {
        match self.runs.join_next_with_id().await {
            None => std::future::pending().await,
            Some(Ok((id, ()))) => drop(self.running.remove(&id)),
            Some(Err(join)) => {
                error!(error = %join, "a backup task ended badly: it is taken up again");
                self.running.remove(&join.id());
            }
        }
        self.cx.metrics.open.set(self.running.len() as i64);
    }

    async fn drain(mut self) {
        let all = async { while self.runs.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, all).await.is_err() {
            warn!("backups are still under way: the next leader takes them up");
        }
        self.cx.metrics.open.set(0);
    }

    async fn tick(&mut self, now: Timestamp) {
        self.cx.metrics.ticks.inc();
        self.watch_clock(now);
        let backups = self.cx.caches.backups();
        let databases = self.cx.caches.databases();
        let mut unreadable = 0;
        for database in &databases {
            match annotations::parse(database.annotations()) {
                Ok(settings) => self.look_at(database, &settings, &backups, now).await,
                // The webhook denies these; one that was there before is counted, not shouted about every tick.
                Err(_) => unreadable += 1,
            }
        }
        self.cx.metrics.unreadable.set(unreadable);
        self.measure(&databases, &backups, now);
        self.take_up(&backups, &self.cx.caches.restores());
        self.forget(&databases);
    }

    /// Says when the wall clock was set: what was due or dated by the old time then looks odd, and is no fault.
    fn watch_clock(&mut self, now: Timestamp) {
        let last = self.clocks.replace((Instant::now(), now));
        let Some((when, before)) = last else { return };
        let passed = SignedDuration::try_from(when.elapsed()).unwrap_or(SignedDuration::MAX);
        if let Some(jump) = schedule::clock_jump(passed, before, now) {
            warn!(
                jump_s = jump.as_secs(),
                "the clock was set: see to time synchronisation; no slot is repeated, and backups dated in the future are \
                 kept until their time has come"
            );
            self.cx.metrics.clock_jumps.inc();
        }
    }

    /// Reserves the slot of one database if it is due.
    async fn look_at(
        &mut self,
        database: &StatefulSet,
        settings: &Settings,
        backups: &[Arc<PostgresBackup>],
        now: Timestamp,
    ) {
        let Some(expression) = &settings.schedule else { return };
        // An operation holds the database: a slot that falls due meanwhile is caught up afterwards, or was missed.
        if settings.gate.is_some() {
            return;
        }
        let key = key_of(database);
        let uid = database.uid().unwrap_or_default();
        let own: Vec<&PostgresBackup> =
            backups.iter().map(Arc::as_ref).filter(|b| belongs(b, database)).collect();
        let mut slots: BTreeSet<Timestamp> =
            own.iter().filter(|b| b.spec.trigger == Trigger::Schedule).filter_map(|b| b.spec.slot).collect();
        slots.extend(self.reserved.get(&uid).into_iter().flatten());
        let first_seen = self.first_seen(&uid, expression.as_str(), settings, &slots, now);
        let open_run =
            self.running.values().any(|running| *running == key) || own.iter().any(|backup| is_open(backup));
        let known = Known {
            schedule: expression,
            zone: &settings.time_zone,
            suspend: settings.suspend,
            first_seen,
            slots: &slots,
            open_run,
            uid: &uid,
        };
        match schedule::decide(now, &known) {
            Decision::Start { slot, late } => {
                info!(namespace = key.0, database = key.1, slot = %slot, late_ms = late.as_millis(), "slot is due");
                self.reserve(database, slot).await;
            }
            Decision::Wait(Waiting::Missed { slot }) if self.missed.insert((uid, slot)) => {
                warn!(namespace = key.0, database = key.1, slot = %slot, "slot was missed and is too old to catch up");
                self.cx.metrics.missed.inc();
            }
            Decision::Wait(_) => {}
        }
    }

    /// Since when this schedule is known. A new leader goes by the records of the last one.
    fn first_seen(
        &mut self,
        uid: &str,
        expression: &str,
        settings: &Settings,
        slots: &BTreeSet<Timestamp>,
        now: Timestamp,
    ) -> Timestamp {
        let zone = settings.time_zone.iana_name().unwrap_or_default();
        let text = format!("{expression} {zone}");
        match self.seen.get(uid) {
            Some((seen, since)) if *seen == text && !settings.suspend => *since,
            // The schedule was changed or is suspended: what is due before it runs again is not made up for.
            Some(_) => {
                self.seen.insert(uid.to_owned(), (text, now));
                now
            }
            None => {
                let since = slots.range(..=now).next_back().copied().unwrap_or(now);
                self.seen.insert(uid.to_owned(), (text, since));
                since
            }
        }
    }

    /// Creates the record, whose name is the lock on the slot.
    async fn reserve(&mut self, database: &StatefulSet, slot: Timestamp) {
        let (namespace, name) = key_of(database);
        let uid = database.uid();
        let record = names::backup_name(&name, slot);
        let mut backup = PostgresBackup::new(
            &record,
            PostgresBackupSpec {
                stateful_set: name.clone(),
                stateful_set_uid: uid.clone(),
                slot: Some(slot),
                trigger: Trigger::Schedule,
                consistency: None,
            },
        );
        // No owner reference: deleting the StatefulSet must not delete what is known of its backups.
        backup.metadata = ObjectMeta {
            labels: Some([(names::DATABASE_LABEL.to_owned(), name.clone())].into()),
            ..backup.metadata
        };
        let api = Api::<PostgresBackup>::namespaced(self.cx.kubernetes.client().clone(), &namespace);
        let parameters = PostParams::default();
        let attempt = format!("create the backup {namespace}/{record}");
        match call(attempt, api.create(&parameters, &backup)).await {
            Ok(created) => {
                self.reserved.entry(uid.unwrap_or_default()).or_default().insert(slot);
                self.spawn(Work::backup(&created));
            }
            // Another leader reserved it and the cache does not show it yet.
            Err(KubernetesError::AlreadyExists { .. }) => {
                self.reserved.entry(uid.unwrap_or_default()).or_default().insert(slot);
            }
            Err(error) => {
                warn!(namespace, database = name, slot = %slot, error = %error, "reserve: trying again")
            }
        }
    }

    /// Gives every open operation somebody to run it, one for each database: what was begun first, then by age.
    fn take_up(&mut self, backups: &[Arc<PostgresBackup>], restores: &[Arc<PostgresRestore>]) {
        let backups = backups.iter().filter(|backup| is_open(backup));
        let backups = backups.map(|backup| Work::backup(backup));
        let restores = restores.iter().filter(|restore| restore::is_open(restore));
        let restores = restores.map(|restore| Work::restore(restore));
        let mut open: Vec<Work> = backups.chain(restores).collect();
        open.sort_by(|a, b| (!a.begun, a.since, &a.name).cmp(&(!b.begun, b.since, &b.name)));
        for work in open {
            let free = !self.running.values().any(|running| *running == work.key);
            if free && (work.kind == Kind::Restore || work.begun || !self.is_held(&work.key)) {
                self.spawn(work);
            }
        }
    }

    /// Whether an operation holds the database; then no backup of it begins.
    fn is_held(&self, (namespace, name): &DatabaseKey) -> bool {
        let database = self.cx.caches.database(namespace, name);
        database.is_some_and(|database| database.annotations().contains_key(names::GATE))
    }

    fn spawn(&mut self, work: Work) {
        let (cx, mandate) = (self.cx.clone(), self.mandate.clone());
        let Work { key, name, kind, .. } = work;
        let namespace = key.0.clone();
        let task = self.runs.spawn(async move {
            let ended = match kind {
                Kind::Backup => backup::run(&cx, &namespace, &name, &mandate).await,
                Kind::Restore => restore::run(&cx, &namespace, &name, &mandate).await,
            };
            if let Err(error) = ended {
                warn!(
                    namespace,
                    name,
                    error = format!("{error:#}"),
                    "operation interrupted: taking it up again"
                );
            }
        });
        self.running.insert(task.id(), key);
        self.cx.metrics.open.set(self.running.len() as i64);
    }

    /// Sets the gauges that alerts are made of.
    fn measure(&self, databases: &[Arc<StatefulSet>], backups: &[Arc<PostgresBackup>], now: Timestamp) {
        let mut stalest = 0.0_f64;
        let mut without = 0;
        for database in databases {
            if !database.annotations().contains_key(names::SCHEDULE) {
                continue;
            }
            let good = backups.iter().filter(|b| belongs(b, database) && phase_of(b).is_success());
            match good.filter_map(|b| b.status.as_ref()?.finished_at).max() {
                Some(newest) => stalest = stalest.max(now.duration_since(newest).as_secs_f64()),
                None => without += 1,
            }
        }
        self.cx.metrics.stalest_success.set(stalest);
        self.cx.metrics.without_backup.set(without);
        let stuck = backups.iter().filter(|backup| phase_of(backup) == Phase::Stuck).count();
        self.cx.metrics.stuck.set(i64::try_from(stuck).unwrap_or(i64::MAX));
    }

    /// Drops the memory of StatefulSets that are gone.
    fn forget(&mut self, databases: &[Arc<StatefulSet>]) {
        let uids: HashSet<String> = databases.iter().filter_map(|database| database.uid()).collect();
        self.seen.retain(|uid, _| uids.contains(uid));
        self.reserved.retain(|uid, _| uids.contains(uid));
        self.missed.retain(|(uid, _)| uids.contains(uid));
    }
}

/// An operation that is open.
#[derive(Debug)]
struct Work {
    key: DatabaseKey,
    begun: bool,
    /// Its slot, or when it was created.
    since: Option<Timestamp>,
    name: String,
    kind: Kind,
}

impl Work {
    fn backup(backup: &PostgresBackup) -> Self {
        Self {
            key: (backup.namespace().unwrap_or_default(), backup.spec.stateful_set.clone()),
            begun: phase_of(backup) != Phase::Reserved,
            since: backup.spec.slot.or(created_at(backup)),
            name: backup.name_any(),
            kind: Kind::Backup,
        }
    }

    fn restore(restore: &PostgresRestore) -> Self {
        Self {
            key: (restore.namespace().unwrap_or_default(), restore.spec.target().to_owned()),
            begun: restore.status.is_some(),
            since: created_at(restore),
            name: restore.name_any(),
            kind: Kind::Restore,
        }
    }
}

/// What kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Backup,
    Restore,
}

fn key_of(database: &StatefulSet) -> DatabaseKey {
    (database.namespace().unwrap_or_default(), database.name_any())
}

/// Whether a backup is of this StatefulSet, and not of an earlier one of the same name.
fn belongs(backup: &PostgresBackup, database: &StatefulSet) -> bool {
    backup.namespace() == database.namespace()
        && backup.spec.stateful_set == database.name_any()
        && backup.spec.stateful_set_uid.as_ref().is_none_or(|uid| Some(uid) == database.metadata.uid.as_ref())
}

fn phase_of(backup: &PostgresBackup) -> Phase {
    backup.status.as_ref().map(|status| status.phase).unwrap_or_default()
}

/// Whether somebody has to run it. One that is being brought back from the catalogue has no status for a moment.
fn is_open(backup: &PostgresBackup) -> bool {
    let in_rebuilding = backup.status.is_none() && backup.annotations().contains_key(names::REBUILT);
    !phase_of(backup).is_terminal() && !in_rebuilding
}

fn created_at(record: &impl kube::Resource) -> Option<Timestamp> {
    record.meta().creation_timestamp.as_ref().map(|time| time.0)
}
