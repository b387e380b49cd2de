//! Backups that are not the usual one: of a stopped database, and those that are refused and say why.

use std::time::Duration;
use std::{fs, thread};

use howdah_core::annotations::Consistency;
use howdah_core::backup::{BackupStatus, Phase};
use howdah_lab::mapping::Mapping;
use howdah_lab::postgres::DEBIAN_MAJOR;
use howdah_lab::process::wait_until;
use howdah_lab::stage::{BACKUP_LIMIT, Restored, Stage};
use howdah_lab::storage::claim::wait_slowly;
use serde_json::json;

/// The scheduler asks for Ceph's health again when its last answer is ten seconds old.
const HEALTH_FRESH: Duration = Duration::from_secs(11);

#[test]
fn a_stopped_database_is_backed_up_offline_and_one_whose_node_died_is_refused() {
    let stage = Stage::shared();
    let mut database = stage.database("db", json!({}));
    database.sql("CREATE TABLE ledger AS SELECT g AS n FROM generate_series(1, 1000) g");
    database.stop();
    database.order("at-rest", Some("offline"));
    let status = stage.wait_over("at-rest");
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Offline)), "{status:?}");
    let claim = status.conditions.iter().find(|condition| condition.kind == "AtRest").unwrap();
    assert!(claim.status == "True" && claim.message.contains("is not claimed"), "{claim:?}");
    let snapshot = format!("{}@{}", database.image(), status.snapshot.unwrap().name);
    let clone = Restored::start(&stage.lab, DEBIAN_MAJOR, &snapshot);
    assert!(clone.log().contains("database system was shut down at"), "{}", clone.log());
    assert_eq!(clone.sql("SELECT count(*) FROM ledger"), "1000");
    drop(clone);

    // A client that loses power while it writes leaves its lock.
    let (_, image) = database.image().split_once('/').unwrap();
    let mapping = Mapping::open(&stage.lab, image, "lost-client", false).unwrap();
    fs::write(mapping.path().join("file"), "written before the power went").unwrap();
    mapping.sync().unwrap();
    mapping.lose().unwrap();
    let status = || stage.lab.rbd(&["status", database.image()]).unwrap();
    assert!(wait_slowly(BACKUP_LIMIT, || status().contains("Watchers: none")), "{}", status());
    database.order("lock-left", None);
    let status = stage.wait_over("lock-left");
    let failure = status.failure.unwrap();
    assert_eq!(status.phase, Phase::Failed);
    assert!(
        failure.reason.contains("exclusive lock") && failure.cure.contains("start the database"),
        "{failure:?}"
    );
    assert_eq!(database.snapshots().len(), 1);
}

/// Sets the ratio at which Ceph calls an OSD nearly full, and back when dropped.
struct NearFull<'a>(&'a Stage);

impl<'a> NearFull<'a> {
    fn set(stage: &'a Stage) -> Self {
        stage.lab.ceph(&["osd", "set-nearfull-ratio", "0.01"]).unwrap();
        let near = || stage.lab.ceph(&["health", "detail"]).unwrap().contains("is nearfull");
        assert!(wait_slowly(BACKUP_LIMIT, near));
        thread::sleep(HEALTH_FRESH);
        Self(stage)
    }
}

impl Drop for NearFull<'_> {
    fn drop(&mut self) {
        self.0.lab.ceph(&["osd", "set-nearfull-ratio", "0.85"]).unwrap();
    }
}

/// Stops all reads and writes of the cluster until dropped.
struct Paused<'a>(&'a Stage);

impl<'a> Paused<'a> {
    fn set(stage: &'a Stage) -> Self {
        stage.lab.ceph(&["osd", "set", "pause"]).unwrap();
        thread::sleep(HEALTH_FRESH);
        Self(stage)
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.lab.ceph(&["osd", "unset", "pause"]).unwrap();
    }
}

/// Waits until an attempt has failed for a reason that holds `part`.
fn wait_reason(stage: &Stage, backup: &str, part: &str) -> BackupStatus {
    let reason = || stage.status(backup).failure.map(|failure| failure.reason).unwrap_or_default();
    assert!(wait_until(BACKUP_LIMIT, || reason().contains(part)), "{:?}", stage.status(backup));
    stage.status(backup)
}

#[test]
fn a_cluster_without_room_or_paused_and_a_missing_identity_are_named_and_waited_for() {
    let stage = Stage::alone();
    let database = stage.database("db", json!({}));
    let nobody = stage.scheduler_with("scheduler-a", 18081, &["--ceph-user", "howdah-nobody"]);
    database.order("no-identity", Some("crash"));
    let status = wait_reason(&stage, "no-identity", "rook-ceph-client-howdah-nobody");
    assert!(status.failure.unwrap().cure.contains("CephClient"));
    nobody.stop().unwrap();
    stage.kubectl(&["delete", "pgb", "no-identity"]);

    let _scheduler = stage.scheduler("scheduler-a", 18081);
    for backup in ["first", "second"] {
        database.order(backup, Some("crash"));
        assert_eq!(stage.wait_over(backup).phase, Phase::Taken);
    }
    let full = NearFull::set(&stage);
    stage.annotate("db", "howdah.dev/retention=last=1");
    database.order("third", Some("crash"));
    let status = wait_reason(&stage, "third", "is nearfull");
    assert!(status.failure.unwrap().cure.contains("howdah.dev/retention"));
    // What retention gives up goes first, or nothing would ever free the room.
    assert!(wait_until(BACKUP_LIMIT, || stage.backup("first").is_none()), "{:?}", stage.status("third"));
    assert_eq!(database.snapshots().len(), 1);
    drop(full);
    assert_eq!(stage.wait_over("third").phase, Phase::Taken);

    let paused = Paused::set(&stage);
    database.order("fourth", Some("crash"));
    let status = wait_reason(&stage, "fourth", "paused");
    assert!(status.failure.unwrap().cure.contains("ceph osd unset pause"));
    drop(paused);
    assert_eq!(stage.wait_over("fourth").phase, Phase::Taken);
}
