//! The scheduler as a process, with its own service account: what it records, prunes, survives and says.

use howdah_adapters::records::PostgresBackup;
use howdah_core::annotations::Consistency;
use howdah_core::backup::Phase;
use howdah_core::catalogue::Entry;
use howdah_core::names;
use howdah_lab::process::wait_until;
use howdah_lab::stage::{BACKUP_LIMIT, Database, LEAD_LIMIT, START_LIMIT, Stage};
use howdah_lab::testing::Process;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::linger::Linger;

/// What the server writes when a session in backup mode ends (PostgreSQL: `do_pg_abort_backup`).
const ABORTED: &str = "aborting backup due to backend exiting before pg_backup_stop was called";
/// As often as the scheduler can: a slot that falls into a backup is skipped.
const OFTEN: &str = "*/2 * * * * *";

#[test]
fn scheduled_backups_are_recorded_and_old_ones_pruned_but_never_a_held_one() {
    let stage = Stage::shared();
    stage.grant();
    let database = stage.database("db", json!({"howdah.dev/retention": "last=2"}));
    stage.annotate("db", &format!("howdah.dev/schedule={OFTEN}"));
    let taken = || -> Vec<PostgresBackup> {
        let all = stage.backups().into_iter();
        all.filter(|backup| backup.status.as_ref().is_some_and(|status| status.phase == Phase::Taken))
            .collect()
    };
    assert!(wait_until(BACKUP_LIMIT, || !taken().is_empty()), "{}", stage.scheduler_log());
    let first = taken().remove(0);
    let name = first.metadata.name.clone().unwrap();
    stage.kubectl(&["annotate", "pgb", &name, "howdah.dev/hold=before the upgrade"]);

    let status = first.status.unwrap();
    let (slot, image, snapshot) = (status.slot.unwrap(), status.image.unwrap(), status.snapshot.unwrap());
    assert_eq!(name, names::backup_name("db", slot));
    assert_eq!(snapshot.name, names::snapshot_name(slot));
    assert_eq!(format!("{}/{}", image.pool, image.name), database.image());
    assert_eq!(status.consistency, Some(Consistency::Online));
    assert_eq!(status.timeline, Some(1));
    assert_eq!(
        status.system_identifier.unwrap(),
        database.sql("SELECT system_identifier FROM pg_control_system()")
    );
    assert!(status.postgres_version.unwrap().starts_with("15."));
    let label = status.label.unwrap();
    let (start, stop) = (status.start_lsn.unwrap(), status.stop_lsn.unwrap());
    assert!(label.contains(&format!("START WAL LOCATION: {start}")), "{label}");
    assert_eq!(database.sql(&format!("SELECT '{start}'::pg_lsn < '{stop}'::pg_lsn")), "t");
    assert!(status.steps.iter().all(|step| step.took_ms.is_some()), "{:?}", status.steps);
    let key = names::image_meta_key(&snapshot.name);
    let entry = stage.lab.rbd(&["image-meta", "get", database.image(), &key]);
    let entry = Entry::from_value(entry.unwrap().trim()).unwrap();
    assert_eq!(
        (entry.backup.as_str(), entry.snapshot_id, &entry.label),
        (name.as_str(), snapshot.id, &Some(label))
    );

    // Four more: two are kept, two are not, and the held one stays beside them.
    let second =
        || taken().into_iter().map(|backup| backup.spec.slot.unwrap()).filter(|other| *other > slot).min();
    assert!(wait_until(BACKUP_LIMIT, || second().is_some()));
    let second = second().unwrap();
    let record = names::backup_name("db", second);
    // The record goes last.
    assert!(wait_until(BACKUP_LIMIT, || stage.backup(&record).is_none()), "{}", stage.scheduler_log());
    let gone = names::snapshot_name(second);
    let snapshots = database.snapshots();
    assert!(!snapshots.contains(&gone), "{snapshots:?}");
    assert!(snapshots.contains(&snapshot.name), "the held backup was pruned: {snapshots:?}");
    let metadata = stage.lab.rbd(&["image-meta", "list", database.image()]).unwrap();
    assert!(!metadata.contains(&gone), "{metadata}");
    let told = || stage.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"]);
    let pruned = format!("deleted {gone} (no rule keeps it)");
    assert!(wait_until(START_LIMIT, || told().contains(&pruned)), "{}", told());
    assert!(!database.log().contains(ABORTED), "{}", database.log());
}

#[test]
fn a_scheduler_killed_inside_a_backup_leaves_nothing_and_the_next_one_finishes_it() {
    let stage = Stage::alone();
    stage.grant();
    // The kill is for the one on several volumes; the other is hit wherever it stands.
    let several = stage.database_in_parts("several", &json!({}));
    let databases = [&stage.database("db", json!({})), &several];
    let mut scheduler = stage.scheduler("scheduler-a", 18081);
    let linger = Linger::of_backups(&stage);
    for (i, (phase, next)) in [
        // A container that is restarted bears its pod's name and takes its own lease at once...
        (Phase::StartingBackupMode, "scheduler-a"),
        (Phase::Snapshotting, "scheduler-a"),
        (Phase::StoppingBackupMode, "scheduler-a"),
        // ...and another pod waits until the lease has run out.
        (Phase::Recording, "scheduler-b"),
    ]
    .into_iter()
    .enumerate()
    {
        let backup = |database: &Database<'_>| format!("{}-{i}", database.name);
        linger.only_in([phase.as_str()]);
        for database in databases {
            database.order(&backup(database), None);
        }
        stage.wait_phase(&backup(&several), phase);
        scheduler.signal(Signal::SIGKILL).unwrap();
        assert!(scheduler.wait_gone(LEAD_LIMIT));
        assert_eq!(stage.status(&backup(&several)).phase, phase, "it ended its phase");
        linger.only_in([]);
        for database in databases {
            assert!(
                wait_until(START_LIMIT, || database.sessions() == "0"),
                "backup mode outlived the scheduler"
            );
        }

        scheduler = stage.scheduler(next, 18082);
        for database in databases {
            let status = stage.wait_over(&backup(database));
            assert_eq!(status.phase, Phase::Taken, "killed in {phase:?}: {status:?}");
            let own = status.snapshot.unwrap().name;
            for image in database.images() {
                let snapshots = stage.snapshots(&image);
                assert_eq!(snapshots.iter().filter(|name| **name == own).count(), 1, "{snapshots:?}");
                assert_eq!(
                    snapshots.len(),
                    i + 1,
                    "a stray snapshot after a kill in {phase:?}: {snapshots:?}"
                );
            }
            assert_eq!(database.sessions(), "0");
        }
    }
}

#[test]
fn of_two_schedulers_one_acts_and_the_other_follows() {
    let stage = Stage::alone();
    stage.grant();
    let _database = stage.database("db", json!({"howdah.dev/schedule": OFTEN}));
    let mut first = stage.scheduler("scheduler-a", 18081);
    let second = stage.scheduler("scheduler-b", 18082);
    assert!(wait_until(BACKUP_LIMIT, || stage.backups().len() >= 2), "{}", first.output().unwrap());
    let acted = |process: &Process| process.output().unwrap().contains("slot is due");
    assert!(acted(&first) && !acted(&second), "both acted, or the second one alone");
    first.signal(Signal::SIGTERM).unwrap();
    assert!(first.wait_gone(LEAD_LIMIT), "it does not end: {}", first.output().unwrap());
    assert_eq!(first.output().unwrap().matches("\"leading\"").count(), 1, "it led again while it ended");
    assert!(wait_until(LEAD_LIMIT, || acted(&second)), "{}", second.output().unwrap());
    let mut slots: Vec<_> = stage.backups().iter().map(|backup| backup.spec.slot.unwrap()).collect();
    let all = slots.len();
    slots.dedup();
    assert_eq!(slots.len(), all, "a slot was backed up twice");
}

#[test]
fn without_the_right_to_credentials_the_backup_is_crash_consistent_and_says_which_command_grants_it() {
    let stage = Stage::shared();
    let database = stage.database("db", json!({}));
    database.order("by-hand", None);
    let status = stage.wait_over("by-hand");
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Crash)), "{status:?}");
    let condition = status.conditions.iter().find(|condition| condition.kind == "Online").unwrap();
    let command = format!(
        "kubectl create rolebinding howdah-credentials -n {} --clusterrole=howdah-credentials \
         --serviceaccount=howdah-system:howdah-scheduler",
        stage.namespace.name()
    );
    assert!(condition.message.contains(&command), "{}", condition.message);

    stage.grant();
    database.order("granted", Some("online"));
    let status = stage.wait_over("granted");
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Online)), "{status:?}");
}

#[test]
fn a_frozen_node_fails_the_attempt_cleanly_and_its_database_lives_on() {
    let stage = Stage::shared();
    let database = stage.database("db", json!({}));
    // A write takes the exclusive lock, which the frozen client then holds.
    database.sql("CREATE TABLE ledger AS SELECT 1 AS n; CHECKPOINT");
    let clients = database.clients();
    assert_eq!(clients.len(), 1, "{clients:?}");
    database.mapping().freeze().unwrap();
    // In backup mode a frozen volume would stop PostgreSQL before it came to the snapshot.
    database.order("by-hand", Some("crash"));
    let failed = || stage.status("by-hand").failure.is_some();
    let seen = wait_until(BACKUP_LIMIT, failed);
    let status = stage.status("by-hand");
    database.mapping().thaw().unwrap();
    assert!(seen, "{status:?}\n{}", stage.scheduler_log());
    let failure = status.failure.unwrap();
    assert_eq!(failure.step, Phase::Snapshotting, "{failure:?}");
    assert!(!failure.cure.is_empty());
    let status = stage.wait_over("by-hand");
    assert_eq!(status.phase, Phase::Taken, "{status:?}");
    assert!(status.attempt > 1 && status.failure.is_none(), "{status:?}");
    assert_eq!(database.snapshots().len(), 1);
    let blocklist = stage.lab.ceph(&["osd", "blocklist", "ls"]).unwrap();
    assert!(!blocklist.contains(&clients[0]), "the backup blocklisted {}: {blocklist}", clients[0]);
    assert_eq!(database.sql("INSERT INTO ledger VALUES (2); SELECT count(*) FROM ledger"), "2");
}

#[test]
fn a_backup_that_waits_for_its_next_attempt_holds_up_no_other() {
    let stage = Stage::alone();
    stage.grant();
    let one = ["--concurrency=1", "--concurrency-per-pool=1"];
    let scheduler = stage.scheduler_with("scheduler-one", 18081, &one);
    let database = stage.database("db", json!({}));
    // Its pod goes to no node, so PostgreSQL cannot be asked.
    stage.empty_set("broken", "160Mi");
    stage.kubectl(&["scale", "statefulset", "broken", "--replicas=1"]);
    assert!(wait_until(START_LIMIT, || stage.pod_uid("broken-0").is_some()));
    stage.order_backup("broken", "waits", Some("online"));
    stage.wait_phase("waits", Phase::Waiting);
    let attempt = stage.status("waits").attempt;

    database.order("other", Some("online"));
    assert_eq!(stage.wait_over("other").phase, Phase::Taken);
    let again = || stage.status("waits").attempt > attempt;
    assert!(wait_until(BACKUP_LIMIT, again), "{:?}\n{}", stage.status("waits"), scheduler.output().unwrap());
    let begun = |backup: &str, attempt: u32| {
        let steps = stage.status(backup).steps;
        steps.into_iter().find(|step| step.attempt == attempt).map(|step| step.started_at).unwrap()
    };
    assert!(begun("other", 1) < begun("waits", attempt + 1), "it got its place only after the next attempt");
    scheduler.stop().unwrap();
}
