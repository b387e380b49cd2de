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
use futures::{StreamExt as _, stream};
use howdah_adapters::kubernetes::{KubernetesError, call};
use howdah_adapters::leader::Mandate;
use howdah_adapters::records::{PostgresBackup, PostgresBackupSpec, PostgresRestore};
use howdah_core::annotations::{self, Settings};
use howdah_core::backup::{self as core_backup, Trigger};
use howdah_core::names;
use howdah_core::schedule::{self, Decision, Waiting};
use howdah_core::verify::{self as core_verify, Known};
use jiff::{SignedDuration, Timestamp};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, ResourceExt as _};
use tokio::sync::Notify;
use tokio::task::{Id, JoinSet};
use tokio_cron_scheduler::{Job, JobScheduler};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::cache::{DatabaseKey, Drills, Open, Protected};
use crate::context::Context;
use crate::{backup, restore, verify};

/// Wake-ups in a row that may stay out before the alarm clock is wound again.
const SILENT_WAKES_MAX: u32 = 4;
/// Wake-ups between two looks whether a restore drill is due.
const DRILL_LOOK_WAKES: u32 = 12;
/// Slots that are reserved at a time. Thousands may be due in one tick; an API server answers so many at once without haste.
const RESERVED_AT_A_TIME: usize = 8;
/// Operations that have somebody to run them, most of whom wait for their place. Four places end some hundred between two
/// wake-ups when each fails at once; the others wait in the index, where one takes a tenth of the memory.
const RUNS_MAX: usize = 512;
/// An operation that waits for its place.
const WAITING_BYTES_MAX: usize = 1024;
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
    /// The same databases: each has one task at most.
    busy: HashSet<DatabaseKey>,
    /// Ends the drill at the end of the term: nobody waits for it, and the next leader goes on.
    stop_drills: CancellationToken,
    /// The task of the one drill.
    drill: Option<Id>,
    /// When it was last looked whether a drill is due.
    drills_looked: Option<Instant>,
    /// Per StatefulSet uid: the schedule as it was last seen, and since when.
    seen: HashMap<String, (String, Timestamp)>,
    /// Slots reserved in this term, which the cache may not show yet.
    reserved: HashMap<String, BTreeSet<Timestamp>>,
    /// Slots already reported as missed.
    missed: HashSet<(String, Timestamp)>,
    /// Per StatefulSet uid: what need not be looked at again.
    quiet: HashMap<String, Quiet>,
    /// The last look at both clocks: the one that cannot jump, and the wall's.
    clocks: Option<(Instant, Timestamp)>,
}

/// What a look at a database found: nothing to do, as long as this stays the same and the time has not come.
#[derive(Debug, Clone, Default)]
struct Quiet {
    /// Until when; `None` is until something changes.
    until: Option<Timestamp>,
    /// Of the StatefulSet.
    resource_version: Option<String>,
    /// The version of what is known of its backups.
    backups: u64,
    /// Whether its annotations do not parse.
    unreadable: bool,
}

impl Quiet {
    fn of(cx: &Context, database: &Protected) -> Self {
        Self {
            until: None,
            resource_version: database.metadata.resource_version.clone(),
            backups: cx.caches.backups().version(&key_of(database)),
            unreadable: false,
        }
    }
}

impl Term {
    fn new(cx: Arc<Context>, mandate: Mandate) -> Self {
        Self {
            cx,
            stop_drills: CancellationToken::new(),
            mandate,
            runs: JoinSet::new(),
            running: HashMap::new(),
            busy: HashSet::new(),
            drill: None,
            drills_looked: None,
            seen: HashMap::new(),
            reserved: HashMap::new(),
            missed: HashSet::new(),
            quiet: HashMap::new(),
            clocks: None,
        }
    }

    /// Waits for a run to end; for ever when none is under way.
    async fn one_run_ended(&mut self) {
        match self.runs.join_next_with_id().await {
            None => std::future::pending().await,
            Some(Ok((id, ()))) => self.ended(id),
            Some(Err(join)) => {
                error!(error = %join, "a backup task ended badly: it is taken up again");
                self.ended(join.id());
            }
        }
        self.cx.metrics.open.set(self.running.len() as i64);
    }

    fn ended(&mut self, task: Id) {
        if self.drill == Some(task) {
            self.drill = None;
        }
        if let Some(key) = self.running.remove(&task) {
            self.busy.remove(&key);
        }
    }

    async fn drain(mut self) {
        self.stop_drills.cancel();
        let all = async { while self.runs.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, all).await.is_err() {
            warn!("backups are still under way: the next leader takes them up");
        }
        self.cx.metrics.open.set(0);
    }

    async fn tick(&mut self, now: Timestamp) {
        self.cx.metrics.ticks.inc();
        self.watch_clock(now);
        let began = Instant::now();
        let databases = self.cx.caches.databases();
        let mut due = Vec::new();
        for database in &databases {
            if self.is_quiet(database, now) {
                continue;
            }
            let quiet = match annotations::parse(database.annotations()) {
                Ok(settings) => self.look_at(database, &settings, now, &mut due),
                // The webhook denies these; one that was there before is counted, not shouted about every tick.
                Err(_) => Some(Quiet { until: None, unreadable: true, ..Quiet::of(&self.cx, database) }),
            };
            let uid = database.uid().unwrap_or_default();
            match quiet {
                Some(quiet) => self.quiet.insert(uid, quiet),
                None => self.quiet.remove(&uid),
            };
        }
        self.reserve(due).await;
        let unreadable = self.quiet.values().filter(|quiet| quiet.unreadable).count();
        self.cx.metrics.unreadable.set(i64::try_from(unreadable).unwrap_or(i64::MAX));
        self.measure(&databases, now);
        self.take_up(&self.cx.caches.restores(), now);
        self.take_up_drill(&databases, now);
        self.forget(&databases);
        self.cx.metrics.tick_duration.observe(began.elapsed().as_secs_f64());
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
            // What was quiet until a time of the old clock may be due by the new one.
            self.quiet.clear();
        }
    }

    /// Whether a look at the database would find what the last one found: that nothing is due.
    fn is_quiet(&self, database: &Protected, now: Timestamp) -> bool {
        let Some(quiet) = database.metadata.uid.as_ref().and_then(|uid| self.quiet.get(uid)) else {
            return false;
        };
        quiet.until.is_none_or(|until| now < until)
            && quiet.resource_version == database.metadata.resource_version
            && quiet.backups == self.cx.caches.backups().version(&key_of(database))
    }

    /// Puts the slot of one database on the list if it is due; says for how long nothing will be, if that is known.
    fn look_at(
        &mut self,
        database: &Protected,
        settings: &Settings,
        now: Timestamp,
        due: &mut Vec<Due>,
    ) -> Option<Quiet> {
        let quiet = Quiet::of(&self.cx, database);
        let Some(expression) = &settings.schedule else { return Some(quiet) };
        // An operation holds the database: a slot that falls due meanwhile is caught up afterwards, or was missed.
        if settings.gate.is_some() {
            return Some(quiet);
        }
        let key = key_of(database);
        let uid = database.uid().unwrap_or_default();
        let backups = self.cx.caches.backups().clone();
        let mut slots = backups.slots(&key, &uid);
        slots.extend(self.reserved.get(&uid).into_iter().flatten());
        let first_seen = self.first_seen(&uid, expression.as_str(), settings, &slots, now);
        let open_run = self.busy.contains(&key) || backups.is_open(&key, &uid);
        let known = schedule::Known {
            schedule: expression,
            zone: &settings.time_zone,
            suspend: settings.suspend,
            first_seen,
            slots: &slots,
            open_run,
            uid: &uid,
        };
        let decision = schedule::decide(now, &known);
        match decision {
            Decision::Start { slot, late } => due.push(Due { database: key, uid: uid.clone(), slot, late }),
            Decision::Wait(Waiting::Missed { slot }) if self.missed.insert((uid.clone(), slot)) => {
                warn!(namespace = key.0, database = key.1, slot = %slot, "slot was missed and is too old to catch up");
                self.cx.metrics.missed.inc();
            }
            Decision::Wait(_) => {}
        }
        decision.holds_until(now, &known).map(|until| Quiet { until: Some(until), ..quiet })
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

    /// Creates the records of slots that are due. The name of a record is the lock on its slot.
    async fn reserve(&mut self, due: Vec<Due>) {
        let client = self.cx.kubernetes.client().clone();
        let create = |due: Due| {
            let api = Api::<PostgresBackup>::namespaced(client.clone(), &due.database.0);
            async move {
                let backup = due.record();
                let attempt = format!("create the backup {}/{}", due.database.0, backup.name_any());
                let created = call(attempt, api.create(&PostParams::default(), &backup)).await;
                (due, backup.name_any(), created)
            }
        };
        let mut answers = stream::iter(due).map(create).buffer_unordered(RESERVED_AT_A_TIME);
        while let Some((Due { database, uid, slot, late }, name, created)) = answers.next().await {
            match created {
                Ok(_) => {
                    info!(namespace = database.0, database = database.1, slot = %slot, late_ms = late.as_millis(), "slot is due");
                    self.reserved.entry(uid).or_default().insert(slot);
                    let work =
                        Open { database, name, since: Some(slot), begun: false, retry_at: None }.into();
                    if self.has_room_for(&work) {
                        self.spawn(work);
                    }
                }
                // Another leader reserved it and the cache does not show it yet.
                Err(KubernetesError::AlreadyExists { .. }) => {
                    self.reserved.entry(uid).or_default().insert(slot);
                }
                Err(error) => {
                    warn!(namespace = database.0, database = database.1, slot = %slot, error = %error, "reserve: trying again");
                }
            }
            // Whoever leads now reserves what is left.
            if !self.mandate.holds() {
                return;
            }
        }
    }

    /// Gives one restore drill somebody to run it: the one that is under way or asked for, else the first that is due. Drills
    /// read whole databases, so there is one at a time.
    fn take_up_drill(&mut self, databases: &[Arc<Protected>], now: Timestamp) {
        if self.drill.is_some() {
            return;
        }
        let backups = self.cx.caches.backups();
        let found = backups.open_drill().or_else(|| {
            // Most of the time none is due, and reading the annotations of all costs more than the rest of a tick.
            let again = DRILL_LOOK_WAKES * self.cx.args.wake_seconds;
            let looked = self.drills_looked.is_some_and(|last| last.elapsed().as_secs() < u64::from(again));
            if looked {
                return None;
            }
            self.drills_looked = Some(Instant::now());
            databases.iter().find_map(|database| self.due_drill(database, now))
        });
        let Some((namespace, name)) = found else { return };
        let (cx, mandate, stop) = (self.cx.clone(), self.mandate.clone(), self.stop_drills.clone());
        let task = self.runs.spawn(async move {
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = verify::run(&cx, &namespace, &name, &mandate) => ended,
            };
            if let Err(error) = ended {
                warn!(
                    namespace,
                    name,
                    error = format!("{error:#}"),
                    "restore drill interrupted: taking it up again"
                );
            }
        });
        self.drill = Some(task.id());
    }

    /// The backup of the database whose drill is due.
    fn due_drill(&self, database: &Protected, now: Timestamp) -> Option<(String, String)> {
        database.annotations().get(names::VERIFY)?;
        let settings = annotations::parse(database.annotations()).ok()?;
        let (key, uid) = (key_of(database), database.uid().unwrap_or_default());
        let Drills { newest, oldest, last } = self.cx.caches.backups().drills(&key, &uid);
        let (name, finished, tried) = newest?;
        let known = Known {
            verify: &settings.verify,
            zone: &settings.time_zone,
            newest: Some(finished),
            newest_tried: tried,
            last,
            oldest,
        };
        core_verify::due(now, &known).then_some((key.0, name))
    }

    /// Gives every open operation somebody to run it, one for each database: what was begun first, then by age. A backup that
    /// waits for its next attempt is nobody's until then.
    fn take_up(&mut self, restores: &[Arc<PostgresRestore>], now: Timestamp) {
        let backups = self.cx.caches.backups().open().into_iter();
        let due = |open: &Open| open.retry_at.is_none_or(|at| core_backup::retry_is_due(at, now));
        let backups = backups.filter(due).map(Work::from);
        let restores = restores.iter().filter(|restore| restore::is_open(restore));
        let restores = restores.map(|restore| Work::restore(restore));
        let mut open: Vec<Work> = backups.chain(restores).collect();
        open.sort_by(|a, b| (!a.begun, a.since, &a.name).cmp(&(!b.begun, b.since, &b.name)));
        for work in open {
            let free = !self.busy.contains(&work.key) && self.has_room_for(&work);
            if free && (work.kind == Kind::Restore || work.begun || !self.is_held(&work.key)) {
                self.spawn(work);
            }
        }
    }

    /// Whether it may be given somebody to run it now. A restore waits for no place, and somebody waits for it.
    fn has_room_for(&self, work: &Work) -> bool {
        work.kind == Kind::Restore || self.running.len() < RUNS_MAX
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
        let operation = async move {
            let ended = match kind {
                Kind::Backup => backup::run(&cx, &namespace, &name, &mandate).await,
                // The task of a backup that waits for its place would be as large as a restore otherwise.
                Kind::Restore => Box::pin(restore::run(&cx, &namespace, &name, &mandate)).await,
            };
            if let Err(error) = ended {
                warn!(
                    namespace,
                    name,
                    error = format!("{error:#}"),
                    "operation interrupted: taking it up again"
                );
            }
        };
        let bytes = size_of_val(&operation);
        debug_assert!(bytes <= WAITING_BYTES_MAX, "an operation takes {bytes} bytes while it waits");
        let task = self.runs.spawn(operation);
        self.busy.insert(key.clone());
        self.running.insert(task.id(), key);
        self.cx.metrics.open.set(self.running.len() as i64);
    }

    /// Sets the gauges that alerts are made of.
    fn measure(&self, databases: &[Arc<Protected>], now: Timestamp) {
        let backups = self.cx.caches.backups();
        let mut stalest = 0.0_f64;
        let mut without = 0;
        for database in databases {
            if !database.annotations().contains_key(names::SCHEDULE) {
                continue;
            }
            match backups.newest_good(&key_of(database), database.metadata.uid.as_deref().unwrap_or_default())
            {
                Some(newest) => stalest = stalest.max(now.duration_since(newest).as_secs_f64()),
                None => without += 1,
            }
        }
        self.cx.metrics.stalest_success.set(stalest);
        self.cx.metrics.without_backup.set(without);
        self.measure_drills(databases, now);
        self.cx.metrics.stuck.set(i64::try_from(backups.stuck()).unwrap_or(i64::MAX));
    }

    /// How long ago the last good drill was, for those that ask for drills; before their first it counts from their oldest
    /// backup.
    fn measure_drills(&self, databases: &[Arc<Protected>], now: Timestamp) {
        let backups = self.cx.caches.backups();
        let wanted = |database: &&Arc<Protected>| {
            database.annotations().get(names::VERIFY).is_some_and(|verify| verify.trim() != "never")
        };
        let since = databases.iter().filter(wanted).filter_map(|database| {
            let uid = database.metadata.uid.as_deref().unwrap_or_default();
            backups.unproven_since(&key_of(database), uid)
        });
        let stalest = since.map(|since| now.duration_since(since).as_secs_f64()).fold(0.0, f64::max);
        self.cx.metrics.stalest_drill.set(stalest);
        self.cx.metrics.damaged.set(i64::try_from(backups.damaged()).unwrap_or(i64::MAX));
    }

    /// Drops the memory of StatefulSets that are gone.
    fn forget(&mut self, databases: &[Arc<Protected>]) {
        let uids: HashSet<String> = databases.iter().filter_map(|database| database.uid()).collect();
        self.seen.retain(|uid, _| uids.contains(uid));
        self.reserved.retain(|uid, _| uids.contains(uid));
        self.missed.retain(|(uid, _)| uids.contains(uid));
        self.quiet.retain(|uid, _| uids.contains(uid));
    }
}

/// A slot that is due.
#[derive(Debug)]
struct Due {
    database: DatabaseKey,
    /// Of the StatefulSet.
    uid: String,
    slot: Timestamp,
    /// How long after the slot it was found.
    late: SignedDuration,
}

impl Due {
    /// The record that takes the slot.
    fn record(&self) -> PostgresBackup {
        let name = &self.database.1;
        let spec = PostgresBackupSpec {
            stateful_set: name.clone(),
            stateful_set_uid: Some(self.uid.clone()),
            slot: Some(self.slot),
            trigger: Trigger::Schedule,
            consistency: None,
        };
        let mut backup = PostgresBackup::new(&names::backup_name(name, self.slot), spec);
        // No owner reference: deleting the StatefulSet must not delete what is known of its backups.
        backup.metadata = ObjectMeta {
            labels: Some([(names::DATABASE_LABEL.to_owned(), name.clone())].into()),
            ..backup.metadata
        };
        backup
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

impl From<Open> for Work {
    fn from(Open { database, name, since, begun, .. }: Open) -> Self {
        Self { key: database, begun, since, name, kind: Kind::Backup }
    }
}

impl Work {
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

fn key_of(database: &Protected) -> DatabaseKey {
    (database.namespace().unwrap_or_default(), database.name_any())
}

fn created_at(record: &impl kube::Resource) -> Option<Timestamp> {
    record.meta().creation_timestamp.as_ref().map(|time| time.0)
}
