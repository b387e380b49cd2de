//! Backups, restores and undos of a database under load, in a random order, by a scheduler that is killed at random moments,
//! or stopped until another one leads, for as long as `HOWDAH_SOAK_SECONDS` says. After each of them the rows are counted
//! against a ledger of acknowledged commits, and nothing may be left over.
//!
//! `make soak` runs it; the tests of the storage level kill at every phase, this one anywhere in between. The seed that it
//! prints repeats its choices (`HOWDAH_SOAK_SEED`), not its moments.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use howdah_adapters::records::PostgresBackup;
use howdah_core::backup::{self, ImageRecord};
use howdah_core::names::SNAPSHOT_PREFIX;
use howdah_core::restore::{Phase, RestoreStatus};
use howdah_lab::ceph::POOL;
use howdah_lab::process::wait_until;
use howdah_lab::stage::{Node, RESTORE_LIMIT, Restored, Stage, acknowledged};
use howdah_lab::testing::Process;
use kube::ResourceExt as _;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// How long it runs where nobody says.
const SECONDS: u64 = 600;
/// A backup or a restore that is killed again and again is tried again after a pause each time.
const OPERATION_LIMIT: Duration = Duration::from_secs(900);
/// Between two looks at an operation.
const LOOK: Duration = Duration::from_millis(50);
/// Most kills in one operation: a backup may be interrupted five times, and be taken in its sixth attempt.
const KILLS_MAX: u32 = 4;
/// From the order, or from the last kill, to the next. A backup takes two seconds and a restore ten.
const KILL_AFTER_MS: Range<u64> = 0..6000;
/// From a kill to the start of the next scheduler.
const DEAD_MS: Range<u64> = 0..1500;
/// One fault in so many is no kill: the scheduler is stopped, as with the machine under it, and another one takes over.
const FREEZE_ONE_IN: u32 = 5;
/// From the stop to where the stopped one goes on with what it was about to do. A lease is lost after 15 s.
const FROZEN_MS: Range<u64> = 0..30_000;
/// How long it then goes on beside the other.
const WOKEN: Duration = Duration::from_secs(3);
/// The schedulers: one leads, and one may be stopped.
const NAMES: [&str; 2] = ["scheduler-soak-a", "scheduler-soak-b"];
/// Each scheduler listens on a port of its own: the last one's may be in use for a moment.
const PORTS: Range<u16> = 18100..18400;
/// Rows between two operations.
const ROWS: usize = 10;

/// A scheduler that was stopped, and goes on for a while beside the one that leads by then.
struct Frozen {
    process: Process,
    wakes: Instant,
    woken: bool,
}

/// The database, and what was promised of it.
struct Soak<'a> {
    stage: &'a Stage,
    node: &'a Node<'a>,
    rng: Rng,
    /// Which of [`NAMES`] leads, or will.
    name: usize,
    scheduler: Process,
    port: u16,
    /// One that was stopped.
    frozen: Option<Frozen>,
    writer: Process,
    /// What has to be in the database, without what the writer was acknowledged since.
    base: BTreeSet<u32>,
    /// How many of the writer's rows were acknowledged before the database became what it is.
    since: usize,
    /// What has to be in each backup.
    promised: BTreeMap<String, BTreeSet<u32>>,
    /// The restores that can be undone, the last one first to go, and what has to be there afterwards.
    undoable: Vec<(String, BTreeSet<u32>)>,
    /// Operations so far.
    count: u32,
    kills: u32,
    freezes: u32,
    refused: u32,
    clones: u32,
}

impl<'a> Soak<'a> {
    fn new(stage: &'a Stage, node: &'a Node<'a>, rng: Rng) -> Self {
        let port = PORTS.start;
        let scheduler = stage.scheduler(NAMES[0], port);
        let writer = node.ledger();
        Self {
            stage,
            node,
            rng,
            name: 0,
            scheduler,
            port,
            frozen: None,
            writer,
            base: BTreeSet::new(),
            since: 0,
            promised: BTreeMap::new(),
            undoable: Vec::new(),
            count: 0,
            kills: 0,
            freezes: 0,
            refused: 0,
            clones: 0,
        }
    }

    /// What has to be in the database now.
    fn owed(&self) -> BTreeSet<u32> {
        let mut owed = self.base.clone();
        owed.extend(&acknowledged(&self.writer)[self.since..]);
        owed
    }

    fn name(&mut self, what: &str) -> String {
        self.count += 1;
        format!("{}-{what}-{}", self.node.name, self.count)
    }

    /// One operation, chosen by chance, and what has to hold after it.
    fn step(&mut self) {
        let backups = self.good();
        self.promised.retain(|name, _| backups.iter().any(|backup| backup.name_any() == *name));
        match self.rng.u32(0..10) {
            0..5 => self.back_up(),
            5..8 if !backups.is_empty() => self.restore(&backups),
            8 if !self.undoable.is_empty() => self.undo(),
            _ if !backups.is_empty() => self.start_a_clone(&backups),
            _ => self.back_up(),
        }
        self.check();
        let before = acknowledged(&self.writer).len();
        assert!(wait_until(RESTORE_LIMIT, || acknowledged(&self.writer).len() >= before + ROWS));
    }

    /// The backups that are good.
    fn good(&self) -> Vec<PostgresBackup> {
        let good = |backup: &PostgresBackup| {
            backup.spec.stateful_set == self.node.name
                && backup.status.as_ref().is_some_and(|status| status.phase.is_success())
        };
        self.stage.backups().into_iter().filter(good).collect()
    }

    fn back_up(&mut self) {
        let (name, owed) = (self.name("backup"), self.owed());
        // Several volumes are one state only by what PostgreSQL says of its checkpoints.
        let class = (self.node.parts.is_empty() && self.rng.u32(0..3) == 0).then_some("crash");
        self.stage.order_backup(&self.node.name, &name, class);
        let killed = self.kill_until(|soak| soak.stage.status(&name).phase.is_terminal());
        let status = self.stage.status(&name);
        eprintln!(
            "{name}: {} ({:?}) in attempt {}, {killed} faults, {} rows",
            status.phase.as_str(),
            status.consistency,
            status.attempt,
            owed.len()
        );
        assert_eq!(status.phase, backup::Phase::Taken, "{status:#?}");
        self.promised.insert(name, owed);
    }

    fn restore(&mut self, backups: &[PostgresBackup]) {
        let backup = &backups[self.rng.usize(0..backups.len())];
        let from = backup.name_any();
        let mut what = json!({"to": from});
        // A rollback is of the image in place.
        let image = backup.status.as_ref().and_then(|status| status.image.as_ref()).unwrap();
        if image.id == self.node.id(&self.node.image) && self.rng.bool() {
            what["method"] = json!("rollback");
        }
        let promised = self.promised[&from].clone();
        if let Some((name, before)) = self.run_restore(&what, promised) {
            self.undoable.push((name, before));
        }
    }

    fn undo(&mut self) {
        let (restore, owed) = self.undoable.last().unwrap().clone();
        if self.run_restore(&json!({"undo": restore}), owed).is_some() {
            self.undoable.pop();
        }
    }

    /// Runs it to its end; its name, and what its safety copy has to hold, if it was not refused.
    fn run_restore(&mut self, what: &Value, promised: BTreeSet<u32>) -> Option<(String, BTreeSet<u32>)> {
        let name = self.name("restore");
        self.node.order(&name, what.clone());
        // When the server is gone, the writer can have been acknowledged nothing since.
        let mut down = None;
        let killed = self.kill_until(|soak| {
            if down.is_none() && !soak.node.is_up() {
                down = Some(acknowledged(&soak.writer).len());
            }
            soak.stage.restore(&name).is_some_and(|status| status.phase.is_terminal())
        });
        let status = self.stage.restore(&name).unwrap();
        eprintln!("{name}: {what} {} ({:?}), {killed} faults", status.phase.as_str(), status.method);
        if status.phase == Phase::Failed {
            self.accept_refusal(&status);
            return None;
        }
        self.node.check_completed(&status);
        let down = down.unwrap_or_else(|| panic!("{name} did not stop the database: {status:#?}"));
        let mut before = self.base.clone();
        before.extend(&acknowledged(&self.writer)[self.since..down]);
        (self.base, self.since) = (promised, down);
        Some((name, before))
    }

    /// What cannot be is refused before anything was touched. A chain of clones that is too long is what a user would cut, too.
    fn accept_refusal(&mut self, status: &RestoreStatus) {
        let failure = status.failure.as_ref().unwrap();
        assert!(status.steps.iter().all(|step| step.phase == Phase::Preflight), "{status:#?}");
        eprintln!("  refused: {}; {}", failure.reason, failure.cure);
        self.refused += 1;
        if failure.cure.contains("rbd flatten") {
            self.node.stop();
            for image in
                std::iter::once(&self.node.image).chain(self.node.parts.iter().map(|part| &part.image))
            {
                self.stage.lab.rbd(&["flatten", "--no-progress", image]).unwrap();
            }
            self.node.start();
        }
    }

    /// Starts a clone of a backup, and looks for what was promised of it.
    fn start_a_clone(&mut self, backups: &[PostgresBackup]) {
        let backup = &backups[self.rng.usize(0..backups.len())];
        let status = backup.status.as_ref().unwrap();
        let clone = Restored::of(&self.stage.lab, status);
        holds(&clone.sql(LEDGER), &self.promised[&backup.name_any()], &backup.name_any());
        if !self.node.parts.is_empty() {
            clone.assert_one_state();
        }
        self.clones += 1;
    }

    /// Kills or stops the scheduler at random moments until `over`; says how often.
    fn kill_until(&mut self, mut over: impl FnMut(&Self) -> bool) -> u32 {
        let begun = Instant::now();
        let mut left = self.rng.u32(0..=KILLS_MAX);
        let mut next = self.after(KILL_AFTER_MS);
        let mut faults = 0;
        while !over(self) {
            assert!(begun.elapsed() < OPERATION_LIMIT, "{}", self.scheduler.output().unwrap());
            self.thaw();
            if left > 0 && Instant::now() >= next {
                if self.frozen.is_none() && self.rng.u32(0..FREEZE_ONE_IN) == 0 {
                    self.freeze();
                } else {
                    self.scheduler.signal(Signal::SIGKILL).unwrap();
                    assert!(self.scheduler.wait_gone(RESTORE_LIMIT));
                    let start_at = self.after(DEAD_MS);
                    while Instant::now() < start_at {
                        over(self);
                        thread::sleep(LOOK);
                    }
                    // Under the same name, as a container is started again: it leads at once.
                    self.scheduler = self.launch();
                    self.kills += 1;
                }
                (left, faults) = (left - 1, faults + 1);
                next = self.after(KILL_AFTER_MS);
            }
            thread::sleep(LOOK);
        }
        while let Some(frozen) = &mut self.frozen {
            if !frozen.woken {
                frozen.wakes = Instant::now();
            }
            self.thaw();
            thread::sleep(LOOK);
        }
        faults
    }

    fn launch(&mut self) -> Process {
        self.port = if self.port + 1 == PORTS.end { PORTS.start } else { self.port + 1 };
        self.stage.launch_scheduler(NAMES[self.name], self.port)
    }

    /// Stops the scheduler, and starts the other one, which leads when the lease is lost.
    fn freeze(&mut self) {
        self.scheduler.signal(Signal::SIGSTOP).unwrap();
        self.name = 1 - self.name;
        let other = self.launch();
        let process = std::mem::replace(&mut self.scheduler, other);
        self.frozen = Some(Frozen { process, wakes: self.after(FROZEN_MS), woken: false });
        self.freezes += 1;
    }

    /// Lets a stopped scheduler go on when it is time, and ends it when it has gone on for a while.
    fn thaw(&mut self) {
        let Some(frozen) = &mut self.frozen else { return };
        if !frozen.woken && Instant::now() >= frozen.wakes {
            frozen.process.signal(Signal::SIGCONT).unwrap();
            frozen.woken = true;
        }
        if frozen.woken && frozen.wakes.elapsed() >= WOKEN {
            frozen.process.signal(Signal::SIGKILL).unwrap();
            self.frozen = None;
        }
    }

    fn after(&mut self, ms: Range<u64>) -> Instant {
        Instant::now() + Duration::from_millis(self.rng.u64(ms))
    }

    /// What holds whenever nothing is under way.
    fn check(&mut self) {
        let owed = self.owed();
        holds(&self.node.sql(LEDGER), &owed, "the database");
        let modes = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'howdah'";
        assert!(wait_until(RESTORE_LIMIT, || self.node.sql(modes) == "0"), "backup mode is on");

        if !self.node.parts.is_empty() {
            self.node.assert_one_state();
        }
        let in_place =
            std::iter::once(&self.node.image).chain(self.node.parts.iter().map(|part| &part.image));
        for image in in_place {
            self.check_images(image);
        }
    }

    /// What holds of an image of the database, and of those that it took the place of.
    fn check_images(&self, in_place: &str) {
        // Every snapshot is of a record, and of every good record there is one.
        let restores = self.stage.all_restores();
        let safety = |status: &RestoreStatus| status.safety_snapshot.clone().map(|snapshot| snapshot.name);
        let mut known: BTreeSet<String> = restores.iter().filter_map(safety).collect();
        let backups =
            self.stage.backups().into_iter().filter(|backup| backup.spec.stateful_set == self.node.name);
        let backups = backups.filter_map(|backup| backup.status?.snapshot);
        let backups: BTreeSet<String> = backups.map(|snapshot| snapshot.name).collect();
        let images = self.node.images_of(in_place);
        let found: BTreeSet<String> =
            images.iter().flat_map(|image| self.stage.snapshots(&format!("{POOL}/{image}"))).collect();
        let lost: Vec<&String> = backups.difference(&found).collect();
        assert!(lost.is_empty(), "records without a snapshot: {lost:?}");
        known.extend(backups);
        let left: Vec<&String> = found.difference(&known).collect();
        assert!(left.is_empty(), "snapshots ({SNAPSHOT_PREFIX}) without a record: {left:?}");

        // Every image is in place, or what a restore set aside.
        let of_parts =
            |status: &RestoreStatus| status.parts.clone().into_iter().filter_map(|part| part.safety_image);
        let aside: Vec<ImageRecord> = restores
            .iter()
            .flat_map(|status| status.safety_image.clone().into_iter().chain(of_parts(status)))
            .collect();
        let aside: BTreeSet<&str> = aside.iter().map(|image| image.id.as_str()).collect();
        for image in &images {
            let id = self.node.id(&format!("{POOL}/{image}"));
            assert!(
                format!("{POOL}/{image}") == in_place || aside.contains(id.as_str()),
                "nobody set {image} aside"
            );
        }
    }
}

/// The rows that are there.
const LEDGER: &str = "SELECT n FROM ledger";

/// Panics if a row is missing.
fn holds(rows: &str, owed: &BTreeSet<u32>, what: &str) {
    let rows: BTreeSet<u32> = rows.lines().map(|row| row.parse().unwrap()).collect();
    let missing: Vec<&u32> = owed.difference(&rows).collect();
    assert!(missing.is_empty(), "{what} lacks acknowledged rows: {missing:?}");
}

/// A variable that is a number.
fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}, wanted a number")))
}

#[test]
fn no_acknowledged_row_is_lost_and_nothing_is_left_whenever_the_scheduler_is_killed() {
    let limit = Duration::from_secs(number("HOWDAH_SOAK_SECONDS").unwrap_or(SECONDS));
    let rng = number("HOWDAH_SOAK_SEED").map_or_else(Rng::new, Rng::with_seed);
    eprintln!("HOWDAH_SOAK_SEED={}", rng.get_seed());
    let stage = Stage::alone();
    stage.grant();
    let retention = json!({"howdah.dev/retention": "last=4"});
    soak(&stage, &Node::of(stage.database("db", retention.clone())), rng.clone(), limit / 2);
    // And one whose images have to be of one state, all along.
    soak(&stage, &Node::of(stage.database_in_parts("parts", &retention)), rng, limit / 2);
}

fn soak(stage: &Stage, node: &Node<'_>, rng: Rng, limit: Duration) {
    node.play(|| {
        let mut soak = Soak::new(stage, node, rng);
        let begun = Instant::now();
        while begun.elapsed() < limit {
            soak.step();
        }
        let Soak { count, kills, freezes, refused, clones, scheduler, writer, .. } = soak;
        eprintln!(
            "{}: {count} operations, {kills} kills, {freezes} stops, {refused} refusals, {clones} clones started",
            node.name
        );
        writer.stop().unwrap();
        scheduler.stop().unwrap();
    });
}
