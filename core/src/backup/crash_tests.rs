//! Runs whole backups against a small model of Ceph and PostgreSQL, killing the process at every point.

use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;

const NAME: &str = "howdah-20261122T030000Z";

fn slot() -> Timestamp {
    "2026-11-22T03:00:00Z".parse().unwrap()
}

fn order(wanted: WantedConsistency) -> Order {
    Order { slot: slot(), trigger: Trigger::Schedule, wanted, deadline: slot() + DEADLINE }
}

fn image() -> ImageRecord {
    ImageRecord {
        pool: "replicapool".to_owned(),
        rados_namespace: String::new(),
        name: "csi-vol-1".to_owned(),
        id: "1a2b".to_owned(),
    }
}

fn facts(database: Database) -> Facts {
    Facts {
        image: image(),
        parts: Vec::new(),
        beside: Vec::new(),
        by_record: false,
        snapshots: 1,
        snapshots_in_all: 2,
        no_room: None,
        name_taken: false,
        database,
    }
}

/// Images of a database on several volumes, beside the one with the data directory.
const PARTS: [&str; 2] = ["csi-vol-2", "csi-vol-3"];

fn parts() -> Vec<PartRecord> {
    let part = |name: &str| PartRecord {
        volume: name.to_owned(),
        wal: name == PARTS[1],
        image: ImageRecord { name: name.to_owned(), id: name.to_owned(), ..image() },
        snapshot: None,
    };
    PARTS.map(part).to_vec()
}

/// The snapshot of a part, as [`World::snapshots`] names it.
fn of_part(part: &str) -> String {
    format!("{part}@{NAME}")
}

fn taken(name: &str, parts: usize) -> Event {
    let snapshot = |id| SnapshotRecord { name: name.to_owned(), id, size: 1 << 30 };
    Event::SnapshotTaken(Snapshots { data: snapshot(4), parts: vec![snapshot(5); parts], flushed: None })
}

fn transient() -> Problem {
    Problem::new(FailureKind::Transient, "the world said no", "ask again")
}

/// What survives the death of the scheduler, and the session, which does not.
#[derive(Clone)]
struct World {
    snapshots: BTreeSet<String>,
    catalogue: BTreeSet<String>,
    session: bool,
    backup_mode: bool,
    now: Timestamp,
    running: bool,
    absent: Option<Problem>,
    /// `pg_backup_start` is refused for good.
    no_right: bool,
    /// The stopped database's image has no exclusive lock.
    unproven: bool,
    /// It lies on several volumes: those that lie beside the data directory's.
    parts: Vec<PartRecord>,
    /// How many more preflights find no room in the pool.
    no_room: u32,
    pruned: u32,
    /// Effects still to fail, by their order; `true` fails, and for a snapshot the answer alone is lost.
    script: VecDeque<bool>,
    /// A snapshot whose answer is lost appears only after it was looked for.
    arrives_late: bool,
}

impl World {
    fn new() -> Self {
        Self {
            // Another backup and somebody else's snapshot: neither may ever be touched.
            snapshots: ["howdah-20261121T030000Z", "before-upgrade"].map(str::to_owned).into(),
            catalogue: BTreeSet::new(),
            session: false,
            backup_mode: false,
            now: slot(),
            running: true,
            absent: None,
            no_right: false,
            unproven: false,
            parts: Vec::new(),
            no_room: 0,
            pruned: 0,
            script: VecDeque::new(),
            arrives_late: false,
        }
    }

    fn die(&mut self) {
        self.session = false;
        self.backup_mode = false;
    }

    fn perform(&mut self, effect: &Effect) -> Option<Event> {
        self.now += SignedDuration::from_secs(1);
        let fails = match effect {
            Effect::AbandonBackupMode | Effect::Announce | Effect::Wait { .. } => false,
            _ => self.script.pop_front().unwrap_or(false),
        };
        Some(match effect {
            Effect::AbandonBackupMode => {
                self.die();
                return None;
            }
            Effect::Announce => return None,
            Effect::Wait { until } => {
                self.now = self.now.max(*until);
                if std::mem::take(&mut self.arrives_late) {
                    self.snapshots.insert(NAME.to_owned());
                }
                Event::RetryDue
            }
            Effect::Preflight => {
                if fails {
                    return Some(Event::Failed(transient()));
                }
                let session = match &self.absent {
                    Some(problem) => Session::Absent(problem.clone()),
                    None => Session::Open { version: "15.8".to_owned(), system_identifier: "7".to_owned() },
                };
                self.session = self.running && self.absent.is_none();
                let database = if self.running {
                    Database::Running { pod: "pg-0".to_owned(), node: Some("node-1".to_owned()), session }
                } else {
                    let doubt = || Problem::new(FailureKind::Permanent, "no lock", "enable it");
                    Database::Stopped { doubt: self.unproven.then(doubt) }
                };
                let no_room = (self.no_room > 0).then(transient);
                self.no_room = self.no_room.saturating_sub(1);
                let name_taken = self.snapshots.contains(NAME);
                let parts = self.parts.clone();
                let name_taken =
                    name_taken || parts.iter().any(|part| self.snapshots.contains(&of_part(&part.volume)));
                Event::PreflightPassed(Box::new(Facts { parts, name_taken, no_room, ..facts(database) }))
            }
            Effect::StartBackupMode { .. } => {
                assert!(self.session, "backup mode needs the session of the preflight");
                if self.no_right {
                    return Some(Event::Failed(Problem::new(
                        FailureKind::Credentials,
                        "no right",
                        "GRANT it",
                    )));
                }
                // The answer may be lost after PostgreSQL did it.
                self.backup_mode = true;
                if fails {
                    return Some(Event::Failed(transient()));
                }
                Event::BackupModeStarted { lsn: "0/2000028".to_owned(), timeline: Some(1) }
            }
            Effect::TakeSnapshot { name } => {
                let several = !self.parts.is_empty();
                assert!(
                    !several || self.backup_mode || !self.running,
                    "nobody could see a checkpoint come between"
                );
                self.snapshots.extend(self.parts.iter().map(|part| of_part(&part.volume)));
                // One of several fails in between.
                if !(fails && (self.arrives_late || several)) {
                    self.snapshots.insert(name.clone());
                }
                if fails {
                    return Some(Event::Failed(transient()));
                }
                taken(name, self.parts.len())
            }
            Effect::FindSnapshot { name } => {
                if fails {
                    return Some(Event::Failed(transient()));
                }
                assert!(
                    self.parts.is_empty(),
                    "of several images it is not known whether they are one state"
                );
                if !self.snapshots.contains(name) {
                    return Some(Event::SnapshotMissing);
                }
                taken(name, 0)
            }
            Effect::StopBackupMode => {
                assert!(self.backup_mode, "only a session in backup mode is stopped");
                if fails {
                    return Some(Event::Failed(transient()));
                }
                self.die();
                Event::BackupModeStopped {
                    lsn: "0/2000100".to_owned(),
                    label: "START WAL LOCATION: 0/2000028".to_owned(),
                    spcmap: String::new(),
                }
            }
            Effect::Record => {
                if fails {
                    return Some(Event::Failed(transient()));
                }
                self.catalogue.insert(NAME.to_owned());
                Event::Recorded
            }
            Effect::Prune => {
                if fails {
                    return Some(Event::Failed(transient()));
                }
                self.pruned += 1;
                Event::Pruned
            }
            Effect::RemoveSnapshot { name } => {
                assert_eq!(name, NAME, "only its own snapshot is removed");
                if fails {
                    return Some(Event::Failed(transient()));
                }
                self.snapshots.remove(name);
                for part in &self.parts {
                    self.snapshots.remove(&of_part(&part.volume));
                }
                Event::Undone
            }
        })
    }
}

/// Where the process dies, counted in effects: before the effect was performed, or after it but before its event
/// was written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    Before(usize),
    After(usize),
}

/// Runs to the end, dying at each of `deaths`; returns the final status and the number of effects performed.
fn run(order: &Order, world: &mut World, deaths: &[Death]) -> (BackupStatus, usize) {
    let mut written = BackupStatus::default();
    let mut event = Event::Resumed;
    let mut performed = 0;
    // Far above what any run needs; reaching it means the machine does not end.
    for _ in 0..10_000 {
        let (status, effects) = next(order, &written, event, world.now).unwrap();
        // What is read after a restart went through JSON.
        written = serde_json::from_str(&serde_json::to_string(&status).unwrap()).unwrap();
        let mut answer = None;
        let mut died = false;
        for effect in &effects {
            if deaths.contains(&Death::Before(performed)) {
                performed += 1;
                died = true;
                break;
            }
            answer = world.perform(effect);
            performed += 1;
            if deaths.contains(&Death::After(performed - 1)) {
                died = true;
                break;
            }
        }
        if died {
            world.die();
            event = Event::Resumed;
            continue;
        }
        match answer {
            Some(next_event) => event = next_event,
            None => {
                assert!(written.phase.is_terminal(), "{:?} has no way on", written.phase);
                return (written, performed);
            }
        }
    }
    panic!("the operation does not end");
}

/// What must hold whatever happened.
fn check(status: &BackupStatus, world: &World) {
    assert!(!world.backup_mode && !world.session, "backup mode is left on in {:?}", status.phase);
    assert!(
        world.snapshots.contains("before-upgrade") && world.snapshots.contains("howdah-20261121T030000Z")
    );
    match status.phase {
        Phase::Taken => {
            assert!(world.snapshots.contains(NAME), "taken, but there is no snapshot");
            assert_eq!(status.snapshot.as_ref().unwrap().name, NAME);
            assert_eq!(status.parts.len(), world.parts.len());
            for part in &status.parts {
                assert!(
                    part.snapshot.is_some() && world.snapshots.contains(&of_part(&part.volume)),
                    "{part:?}"
                );
            }
            assert!(status.failure.is_none());
            let online = status.consistency == Some(Consistency::Online);
            assert_eq!(online, status.stop_lsn.is_some() && status.label.is_some());
        }
        Phase::Failed => {
            let left = |part: &PartRecord| world.snapshots.contains(&of_part(&part.volume));
            assert!(!world.snapshots.contains(NAME), "a failed backup left its snapshot");
            assert!(!world.parts.iter().any(left), "a failed backup left a snapshot");
            let failure = status.failure.as_ref().unwrap();
            assert!(!failure.reason.is_empty() && !failure.cure.is_empty());
            assert!(status.snapshot.is_none() && status.consistency.is_none());
        }
        Phase::Stuck => assert!(status.failure.as_ref().unwrap().cure.contains(NAME)),
        other => panic!("{other:?} is no end"),
    }
    assert!(status.finished_at.is_some());
    assert!(status.steps.iter().all(|step| step.outcome.is_some() && step.took_ms.is_some()));
}

const EXPLICIT_ONLINE: WantedConsistency = WantedConsistency::Explicit(Consistency::Online);

#[test]
fn an_online_backup_goes_through_its_phases() {
    let mut world = World::new();
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    check(&status, &world);
    let phases: Vec<Phase> = status.steps.iter().map(|step| step.phase).collect();
    assert_eq!(
        phases,
        [
            Phase::Preflight,
            Phase::StartingBackupMode,
            Phase::Snapshotting,
            Phase::StoppingBackupMode,
            Phase::Recording,
            Phase::Pruning
        ]
    );
    assert_eq!(status.consistency, Some(Consistency::Online));
    assert_eq!(status.start_lsn.as_deref(), Some("0/2000028"));
    assert_eq!(status.system_identifier.as_deref(), Some("7"));
    assert!(world.catalogue.contains(NAME));
}

#[test]
fn a_death_at_any_point_ends_in_the_same_good_backup() {
    let stopped = World { running: false, ..World::new() };
    let unproven = World { unproven: true, ..stopped.clone() };
    let no_right = World { no_right: true, ..World::new() };
    let no_room = World { no_room: 1, ..World::new() };
    let credentials = Problem::new(FailureKind::Credentials, "no Secret", "make one");
    let locked_out = World { absent: Some(credentials), ..World::new() };
    for (world, wanted) in [
        (World::new(), WantedConsistency::Default),
        (World::new(), EXPLICIT_ONLINE),
        (World::new(), WantedConsistency::Explicit(Consistency::Crash)),
        (stopped, WantedConsistency::Default),
        (unproven, WantedConsistency::Default),
        (no_right, WantedConsistency::Default),
        (no_room, WantedConsistency::Default),
        (locked_out, WantedConsistency::Default),
        (World { parts: parts(), ..World::new() }, WantedConsistency::Default),
        (World { parts: parts(), running: false, ..World::new() }, WantedConsistency::Default),
    ] {
        let order = order(wanted);
        let (_, effects) = run(&order, &mut world.clone(), &[]);
        for at in 0..effects {
            for death in [Death::Before(at), Death::After(at)] {
                let mut world = world.clone();
                let (status, _) = run(&order, &mut world, &[death]);
                check(&status, &world);
                assert_eq!(status.phase, Phase::Taken, "{wanted:?} {death:?}");
                assert!(world.catalogue.contains(NAME));
                if wanted == EXPLICIT_ONLINE {
                    assert_eq!(status.consistency, Some(Consistency::Online), "{death:?}");
                }
            }
        }
    }
}

#[test]
fn a_failure_at_any_point_is_undone_and_tried_again() {
    for (wanted, parts) in [
        (WantedConsistency::Default, vec![]),
        (EXPLICIT_ONLINE, vec![]),
        (WantedConsistency::Default, parts()),
    ] {
        for failing in 0..6 {
            let mut world = World { parts: parts.clone(), ..World::new() };
            world.script = (0..=failing).map(|i| i == failing).collect();
            let (status, _) = run(&order(wanted), &mut world, &[]);
            check(&status, &world);
            assert_eq!(status.phase, Phase::Taken, "{wanted:?} {failing}");
        }
    }
}

#[test]
fn without_credentials_the_class_is_crash_and_a_condition_says_why() {
    let mut world = World::new();
    world.absent =
        Some(Problem::new(FailureKind::Credentials, "no Secret pg-backup", "kubectl create secret"));
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Crash)));
    let condition = status.conditions.iter().find(|condition| condition.kind == CONDITION_ONLINE).unwrap();
    assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", "CredentialsMissing"));
    assert!(condition.message.contains("kubectl create secret"));
}

#[test]
fn an_explicit_online_fails_instead_of_downgrading() {
    let mut world = World::new();
    world.absent = Some(Problem::new(FailureKind::Credentials, "no Secret", "make one"));
    let (status, _) = run(&order(EXPLICIT_ONLINE), &mut world, &[]);
    check(&status, &world);
    assert_eq!(status.phase, Phase::Failed);
    assert_eq!(status.attempt, ATTEMPTS_MAX);
}

#[test]
fn a_database_that_does_not_answer_is_snapshotted_on_the_second_attempt() {
    let mut world = World::new();
    world.absent = Some(Problem::new(FailureKind::Connection, "refused", "start it"));
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    check(&status, &world);
    assert_eq!((status.phase, status.attempt), (Phase::Taken, ATTEMPTS_BEFORE_DOWNGRADE));
    assert_eq!(status.consistency, Some(Consistency::Crash));
}

#[test]
fn what_is_known_of_the_volumes_from_a_record_alone_is_said() {
    let judge = |by_record| {
        let facts =
            Facts { beside: vec!["dumps".to_owned()], by_record, ..facts(Database::Stopped { doubt: None }) };
        let order = order(WantedConsistency::Default);
        let (status, _) = next(&order, &BackupStatus::default(), Event::Resumed, slot()).unwrap();
        let (status, _) = next(&order, &status, Event::PreflightPassed(Box::new(facts)), slot()).unwrap();
        status.conditions.into_iter().find(|condition| condition.kind == CONDITION_LAYOUT)
    };
    let said = judge(true).unwrap();
    assert!(said.status == "Unknown" && said.message.contains("on dumps is known"), "{said:?}");
    assert_eq!(judge(false), None);
}

#[test]
fn a_stopped_database_gives_an_offline_backup() {
    let mut world = World { running: false, ..World::new() };
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Offline)));
    let at_rest = status.conditions.iter().find(|condition| condition.kind == CONDITION_AT_REST).unwrap();
    assert_eq!(at_rest.status, "True");
}

#[test]
fn an_explicit_offline_refuses_a_running_database_at_once() {
    let wanted = WantedConsistency::Explicit(Consistency::Offline);
    let mut world = World::new();
    let (status, _) = run(&order(wanted), &mut world, &[]);
    check(&status, &world);
    assert_eq!((status.phase, status.attempt), (Phase::Failed, 1));
}

#[test]
fn a_snapshot_that_was_there_before_is_left_alone() {
    let mut world = World::new();
    world.snapshots.insert(NAME.to_owned());
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    assert_eq!(status.phase, Phase::Failed);
    assert!(world.snapshots.contains(NAME));
    assert!(!world.backup_mode);
}

#[test]
fn a_snapshot_that_arrives_after_it_was_undone_is_undone_again() {
    for wanted in [WantedConsistency::Default, EXPLICIT_ONLINE] {
        let mut world = World { arrives_late: true, script: [false, false, true].into(), ..World::new() };
        let (status, _) = run(&order(wanted), &mut world, &[]);
        check(&status, &world);
        assert_eq!((status.phase, status.attempt), (Phase::Taken, 3));
    }
}

#[test]
fn an_image_full_of_snapshots_is_refused() {
    let own = Facts { snapshots: SNAPSHOTS_PER_IMAGE_MAX, ..facts(Database::Stopped { doubt: None }) };
    let foreign = Facts { snapshots_in_all: IMAGE_SNAPSHOTS_MAX, ..facts(Database::Stopped { doubt: None }) };
    for (facts, cure) in [(own, "howdah.dev/retention"), (foreign, "rbd snap ls --all")] {
        let order = order(WantedConsistency::Default);
        let (status, _) = next(&order, &BackupStatus::default(), Event::Resumed, slot()).unwrap();
        let (status, _) = next(&order, &status, Event::PreflightPassed(Box::new(facts)), slot()).unwrap();
        assert_eq!(status.phase, Phase::Failed);
        assert!(status.failure.unwrap().cure.contains(cure));
    }
}

#[test]
fn in_a_no_room_pool_old_backups_go_before_a_new_one_is_taken() {
    let mut world = World { no_room: 1, ..World::new() };
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    check(&status, &world);
    assert_eq!((status.phase, status.attempt, world.pruned), (Phase::Taken, 2, 2));

    let mut world = World { no_room: u32::MAX, ..World::new() };
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    check(&status, &world);
    assert_eq!((status.phase, world.pruned), (Phase::Failed, ATTEMPTS_MAX));
}

#[test]
fn a_missing_right_to_backup_mode_gives_a_crash_consistent_backup_unless_online_was_demanded() {
    let mut world = World { no_right: true, ..World::new() };
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    check(&status, &world);
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Crash)));
    let condition = status.conditions.iter().find(|condition| condition.kind == CONDITION_ONLINE).unwrap();
    assert!(condition.status == "False" && condition.message.contains("GRANT it"), "{condition:?}");

    let mut world = World { no_right: true, ..World::new() };
    let (status, _) = run(&order(EXPLICIT_ONLINE), &mut world, &[]);
    check(&status, &world);
    assert_eq!(status.phase, Phase::Failed);
}

#[test]
fn an_image_without_locks_makes_a_stopped_database_crash_consistent_or_refuses_an_explicit_class() {
    for (wanted, class) in [
        (WantedConsistency::Default, Some(Consistency::Crash)),
        (WantedConsistency::Explicit(Consistency::Crash), Some(Consistency::Crash)),
        (WantedConsistency::Explicit(Consistency::Offline), None),
        (EXPLICIT_ONLINE, None),
    ] {
        let mut world = World { running: false, unproven: true, ..World::new() };
        let (status, _) = run(&order(wanted), &mut world, &[]);
        check(&status, &world);
        assert_eq!(status.consistency, class, "{wanted:?}");
        if class.is_some() {
            let at_rest =
                status.conditions.iter().find(|condition| condition.kind == CONDITION_AT_REST).unwrap();
            assert!(at_rest.status == "False" && at_rest.message.contains("no lock"), "{at_rest:?}");
        }
    }
}

#[test]
fn several_volumes_are_backed_up_online_or_at_rest_and_never_without_a_session() {
    let several = World { parts: parts(), ..World::new() };
    let mut world = several.clone();
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    check(&status, &world);
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Online)));

    let credentials = || Some(Problem::new(FailureKind::Credentials, "no Secret", "make one"));
    let locked_out = World { absent: credentials(), ..several.clone() };
    let no_right = World { no_right: true, ..several.clone() };
    let unproven = World { running: false, unproven: true, ..several.clone() };
    let crash = WantedConsistency::Explicit(Consistency::Crash);
    for (mut world, wanted, cure) in [
        (locked_out, WantedConsistency::Default, "make one"),
        (no_right, WantedConsistency::Default, "GRANT it"),
        (unproven, WantedConsistency::Default, "enable it"),
        (several, crash, "annotate online"),
    ] {
        let (status, _) = run(&order(wanted), &mut world, &[]);
        check(&status, &world);
        assert_eq!(status.phase, Phase::Failed, "{cure}");
        assert!(status.failure.unwrap().cure.contains(cure), "{cure}");
    }
}

#[test]
fn a_session_that_is_lost_after_all_snapshots_leaves_a_crash_consistent_backup_of_several_volumes() {
    let mut world = World { parts: parts(), script: [false, false, false, true].into(), ..World::new() };
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    check(&status, &world);
    assert_eq!((status.phase, status.attempt), (Phase::Taken, 1));
    assert_eq!(status.consistency, Some(Consistency::Crash));
}

#[test]
fn an_undo_that_never_works_is_stuck_and_says_what_to_run() {
    let mut world = World { parts: parts(), ..World::new() };
    // Preflight and start work, the snapshot's answer is lost, and no removal works.
    world.script = [false, false].into_iter().chain(std::iter::repeat_n(true, 100)).collect();
    let (status, _) = run(&order(WantedConsistency::Default), &mut world, &[]);
    check(&status, &world);
    assert_eq!(status.phase, Phase::Stuck);
    let cure = status.failure.unwrap().cure;
    for image in ["csi-vol-1", PARTS[0], PARTS[1]] {
        assert!(cure.contains(&format!("rbd snap rm replicapool/{image}@howdah-")), "{cure}");
    }
}

#[test]
fn a_backup_found_after_its_deadline_fails_without_touching_anything() {
    let mut world = World::new();
    world.now = slot() + DEADLINE + SignedDuration::from_secs(1);
    let (status, effects) = run(&order(WantedConsistency::Default), &mut world, &[]);
    check(&status, &world);
    assert_eq!((status.phase, effects), (Phase::Failed, 1));
}

#[test]
fn every_phase_answers_every_event() {
    let facts = facts(Database::Stopped { doubt: None });
    let events = [
        Event::Resumed,
        Event::PreflightPassed(Box::new(facts)),
        Event::BackupModeStarted { lsn: String::new(), timeline: None },
        taken(NAME, 0),
        Event::SnapshotMissing,
        Event::BackupModeStopped { lsn: String::new(), label: String::new(), spcmap: String::new() },
        Event::Recorded,
        Event::Pruned,
        Event::Undone,
        Event::RetryDue,
        Event::Failed(transient()),
    ];
    let order = order(WantedConsistency::Default);
    for phase in PHASES {
        for event in &events {
            let status = BackupStatus { phase, ..BackupStatus::default() };
            let answer = next(&order, &status, event.clone(), slot());
            match answer {
                Ok((after, effects)) if phase.is_terminal() => {
                    assert_eq!(*event, Event::Resumed);
                    assert_eq!(after, status);
                    assert!(effects.is_empty());
                }
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.phase, phase);
                    assert_ne!(*event, Event::Resumed, "a restart is possible in every phase");
                }
            }
        }
    }
}

#[test]
fn a_retry_is_due_at_its_time_and_when_the_clock_was_set_back() {
    let at = slot();
    let due_before = |seconds| retry_is_due(at, at - SignedDuration::from_secs(seconds));
    assert!(due_before(0) && due_before(-3600));
    assert!(!due_before(1) && !due_before(RETRY_DELAY_MAX.as_secs()));
    assert!(due_before(RETRY_DELAY_MAX.as_secs() + 1));
}

const PHASES: [Phase; 13] = [
    Phase::Reserved,
    Phase::Preflight,
    Phase::StartingBackupMode,
    Phase::Snapshotting,
    Phase::Adopting,
    Phase::StoppingBackupMode,
    Phase::Recording,
    Phase::Pruning,
    Phase::Undoing,
    Phase::Waiting,
    Phase::Taken,
    Phase::Failed,
    Phase::Stuck,
];

proptest! {
    #[test]
    fn any_mix_of_failures_and_deaths_ends_clean(
        script in proptest::collection::vec(any::<bool>(), 0..60),
        deaths in proptest::collection::vec((any::<bool>(), 0usize..60), 0..8),
        explicit in any::<bool>(),
        running in any::<bool>(),
        several in any::<bool>(),
    ) {
        let wanted = if explicit { EXPLICIT_ONLINE } else { WantedConsistency::Default };
        let deaths: Vec<Death> =
            deaths.into_iter().map(|(before, at)| if before { Death::Before(at) } else { Death::After(at) }).collect();
        let parts = if several { parts() } else { Vec::new() };
        let mut world = World { running, parts, script: script.into(), ..World::new() };
        let (status, _) = run(&order(wanted), &mut world, &deaths);
        check(&status, &world);
    }
}
