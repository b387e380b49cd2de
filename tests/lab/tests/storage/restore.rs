//! Restores of real databases, each in the place that it lies in.

use howdah_lab::stage::{BACKUP_LIMIT, Node, START_LIMIT, Stage, acknowledged};
use std::slice;
use std::thread;
use std::time::Duration;

use howdah_core::backup;
use howdah_core::names;
use howdah_core::restore::{Phase, RestoreStatus};
use howdah_lab::ceph::POOL;
use howdah_lab::process::wait_until;
use howdah_lab::storage::claim::wait_slowly;
use serde_json::{Value, json};

use crate::killer::{Killer, SWAP_PHASES};

#[test]
fn a_swap_under_load_holds_every_row_of_the_backup_and_is_undone_to_the_last_row() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        let writer = node.ledger();
        let some = |more: usize| {
            let before = acknowledged(&writer).len();
            assert!(wait_until(START_LIMIT, || acknowledged(&writer).len() >= before + more));
        };
        some(20);
        let before = acknowledged(&writer);
        let backup = node.back_up("first");
        some(20);
        let all = acknowledged(&writer);
        writer.stop().unwrap();
        // A row that was under way is in the ledger or not, and stays so.
        let others = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'psql' AND pid <> pg_backend_pid()";
        assert!(wait_until(START_LIMIT, || node.sql(others) == "0"));
        let rows = || -> Vec<u32> {
            node.sql("SELECT n FROM ledger ORDER BY n").lines().map(|n| n.parse().unwrap()).collect()
        };
        let ledger = rows();
        let holds = |rows: &[u32], acknowledged: &[u32]| {
            let missing: Vec<&u32> = acknowledged.iter().filter(|n| rows.binary_search(n).is_err()).collect();
            assert!(missing.is_empty(), "acknowledged rows are missing: {missing:?}");
        };
        holds(&ledger, &all);
        let restored = node.restore("to-first", json!({"to": "first"}));
        assert_eq!(restored.source.as_ref().unwrap().name, "first");
        let old = rows();
        holds(&old, &before);
        assert!(old.len() < ledger.len(), "nothing was restored");
        // No row without those that were acknowledged before it.
        let up_to: Vec<u32> = all.iter().copied().filter(|n| n <= old.last().unwrap()).collect();
        holds(&old, &up_to);
        let identifier = node.sql("SELECT system_identifier FROM pg_control_system()");
        assert_eq!(Some(identifier), backup.system_identifier);

        // The volume goes on: a backup of the image that took the place, and a restore of the one before it.
        node.sql("CREATE TABLE after_the_restore ()");
        let second = node.back_up("second");
        assert_eq!(second.image.unwrap().id, restored.incoming.unwrap().id);
        let again = node.restore("to-first-again", json!({"to": "first"}));
        assert_eq!(again.source.unwrap().image.id, backup.image.unwrap().id);
        assert_eq!(node.sql("SELECT to_regclass('after_the_restore') IS NULL"), "t");

        // Undone one by one, newest first, down to what the writer left.
        node.order("wrong-order", json!({"undo": "to-first"}));
        let refused = node.wait_over("wrong-order");
        assert_eq!(refused.phase, Phase::Failed);
        assert!(refused.failure.unwrap().cure.contains("undo the later restore first"));
        node.restore("undo-again", json!({"undo": "to-first-again"}));
        assert_eq!(node.sql("SELECT to_regclass('after_the_restore') IS NOT NULL"), "t");
        node.restore("undo-first", json!({"undo": "to-first"}));
        assert_eq!(rows(), ledger, "the undo lost rows");

        // A backup of the image that was undone is still one of this database.
        let newest = node.restore("to-second", json!({"to": "newest"}));
        assert_eq!(newest.source.unwrap().name, "second");
        assert_eq!(node.sql("SELECT to_regclass('after_the_restore') IS NOT NULL"), "t");
    });
}

#[test]
fn a_restore_ends_the_same_in_whatever_phase_its_scheduler_is_killed() {
    let stage = Stage::alone();
    stage.grant();
    // Two at once: one kill hits both, each wherever it stands. One lies on three volumes, so that it dies between their images.
    let nodes = [stage.database("db", json!({})), stage.database_in_parts("shop", &json!({}))].map(Node::of);
    nodes[0].play(|| {
        nodes[1].play(|| {
            let mut killer = Killer::new(&stage);
            for node in &nodes {
                node.sql("CREATE TABLE t AS SELECT 1 AS n");
                node.sql("CREATE TABLE IF NOT EXISTS ledger (n int PRIMARY KEY); INSERT INTO ledger VALUES (1), (2)");
                node.back_up(&format!("{}-one", node.name));
                node.sql("UPDATE t SET n = 2; INSERT INTO ledger VALUES (3)");
            }
            let restores = nodes.each_ref().map(|node| format!("{}-restore", node.name));
            killer.kill_in(&SWAP_PHASES, &restores, || {
                let order = |i: usize| {
                    nodes[i].order(&restores[i], json!({"to": format!("{}-one", nodes[i].name)}));
                };
                order(1);
                // Three images take it longer than there is between two kills, and after six it gives up.
                let begun = |status: &RestoreStatus| !matches!(status.phase, Phase::Reserved | Phase::Preflight);
                stage.wait_restore(&restores[1], begun);
                order(0);
            });
            for (node, restore) in nodes.iter().zip(&restores) {
                let status = node.wait_over(restore);
                node.check_completed(&status);
                assert_eq!(node.sql("SELECT n FROM t"), "1", "{restore}");
                // The image in place, and the safety copy.
                assert_eq!(node.images().len(), 2, "{restore}: {:?}", node.images());
                assert_eq!(node.sql("SELECT count(*) FROM ledger"), "2", "{restore}");
            }
            nodes[1].assert_one_state();
            killer.end();
        });
    });
}

#[test]
fn a_rollback_is_completed_by_the_next_scheduler_and_can_be_undone() {
    let stage = Stage::alone();
    stage.grant();
    let node = Node::of(stage.database_in_parts("db", &json!({})));
    node.play(|| {
        let mut killer = Killer::new(&stage);
        node.sql("CREATE TABLE t AS SELECT 1 AS n; INSERT INTO ledger SELECT generate_series(1, 100)");
        let backup = node.back_up("one");
        for (i, phase) in [Phase::Safeguarding, Phase::RollingBack].into_iter().enumerate() {
            node.sql(&format!("UPDATE t SET n = {}; DELETE FROM ledger", i + 2));
            let restore = format!("killed-in-{}", phase.as_str().to_lowercase());
            killer.kill_in(&[phase], slice::from_ref(&restore), || {
                node.order(&restore, json!({"to": "one", "method": "rollback"}));
            });
            let status = node.wait_over(&restore);
            node.check_completed(&status);
            assert_eq!(node.id(&node.image), backup.image.as_ref().unwrap().id);
            assert_eq!(node.sql("SELECT n FROM t"), "1", "killed in {phase:?}");
            assert_eq!(node.sql("SELECT count(*) FROM ledger"), "100", "killed in {phase:?}");
            node.assert_one_state();
        }
        node.restore("undo", json!({"undo": "killed-in-rollingback"}));
        assert_eq!(node.sql("SELECT n FROM t"), "3");
        killer.end();
    });
}

#[test]
fn a_volume_that_was_swapped_grows_and_is_deleted_and_its_safety_copy_outlives_it() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        let before = node.id(&node.image);
        let status = node.restore("restore", json!({"to": "one"}));
        let (live, safety) = (status.incoming.unwrap(), status.safety_image.unwrap());
        assert_ne!(live.id, before);

        let more = r#"{"spec":{"resources":{"requests":{"storage":"224Mi"}}}}"#;
        stage.kubectl(&["patch", "pvc", "data-db-0", "--patch", more]);
        let size = |image: &str| -> u64 {
            let info = stage.lab.rbd(&["info", "--format", "json", image]).unwrap();
            serde_json::from_str::<Value>(&info).unwrap()["size"].as_u64().unwrap()
        };
        assert!(wait_slowly(BACKUP_LIMIT, || size(&node.image) == 224 << 20), "{}", size(&node.image));
        assert_eq!(size(&safety.spec()), 160 << 20, "the safety copy was grown");
        // A backup from before the growth is grown to what Kubernetes knows.
        node.restore("again", json!({"to": "one"}));
        assert_eq!(size(&node.image), 224 << 20);
        let live = node.id(&node.image);

        node.stop();
        node.claim().delete_volume().unwrap();
        let trash = || stage.lab.rbd(&["trash", "ls", POOL]).unwrap();
        assert!(wait_slowly(BACKUP_LIMIT, || !trash().contains(&live)), "the volume was not removed");
        assert!(stage.lab.rbd(&["info", &node.image]).is_err());
        assert_eq!(node.id(&safety.spec()), safety.id, "the safety copy went with the volume");
        let snapshots = stage.lab.rbd(&["snap", "ls", &safety.spec()]).unwrap();
        assert!(snapshots.contains(names::SNAPSHOT_PREFIX), "the backup went with the volume: {snapshots}");
    });
}

#[test]
fn while_somebody_has_the_image_open_nothing_is_touched_and_no_backup_begins() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        node.sql("UPDATE t SET n = 2");
        let live = node.id(&node.image);
        // It ends with its input.
        let mut watch = stage.lab.command("bash");
        watch.args(["-c", &format!("exec rbd watch {} < <(sleep 600)", node.image)]);
        let watcher = stage.lab.spawn_inside("restore-test-watcher", &watch).unwrap();
        let watchers = || node.claim().watchers().unwrap().len();
        assert!(wait_slowly(START_LIMIT, || watchers() == 2), "{}", watcher.output().unwrap());

        node.order("waits", json!({"to": "one"}));
        let missing = |status: &RestoreStatus| {
            status.proofs.iter().any(|proof| !proof.holds && proof.seen.contains("is open on"))
                && status.proofs.iter().filter(|proof| !proof.holds).count() == 1
        };
        stage.wait_restore("waits", missing);
        assert_eq!((node.gate().as_str(), node.field("{.spec.replicas}").as_str()), ("restore/waits", "0"));
        // Due at every second, and one by hand: none begins while the gate is closed.
        stage.kubectl(&["annotate", "statefulset", "db", "howdah.dev/schedule=* * * * * *"]);
        node.order_backup("by-hand");
        thread::sleep(Duration::from_secs(6));
        let begun = stage.backups().into_iter().filter(|backup| {
            backup.metadata.name.as_deref() != Some("one")
                && backup.status.as_ref().is_some_and(|status| status.started_at.is_some())
        });
        assert_eq!(begun.count(), 0, "a backup began while the gate was closed");
        stage.kubectl(&["annotate", "statefulset", "db", "howdah.dev/schedule-"]);
        assert_eq!(stage.restore("waits").unwrap().phase, Phase::Proving);
        assert_eq!((node.id(&node.image), node.images().len()), (live, 1), "the storage was touched");

        watcher.stop().unwrap();
        let status = node.wait_over("waits");
        node.check_completed(&status);
        assert_eq!(node.sql("SELECT n FROM t"), "1");
        assert_eq!(stage.wait_over("by-hand").phase, backup::Phase::Taken);
    });
}

#[test]
fn a_backup_that_fails_and_waits_holds_up_no_restore() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        node.sql("UPDATE t SET n = 2");
        stage.annotate("db", "howdah.dev/credentials=nothing");
        stage.order_backup("db", "fails", Some("online"));
        stage.wait_phase("fails", backup::Phase::Waiting);
        node.restore("restore", json!({"to": "one"}));
        assert_eq!(node.sql("SELECT n FROM t"), "1");
        let waits = stage.status("fails");
        assert!(!waits.phase.is_terminal() && waits.snapshot.is_none(), "{waits:?}");
        // And goes on when the cause is gone.
        stage.kubectl(&["annotate", "statefulset", "db", "howdah.dev/credentials-"]);
        let status = stage.wait_over("fails");
        assert_eq!(status.phase, backup::Phase::Taken, "{status:?}");
        assert_eq!(status.image.unwrap().id, node.id(&node.image), "it is of the image that took the place");
    });
}

#[test]
fn what_cannot_be_restored_is_refused_with_its_cure_and_the_database_runs_on() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        let refused = |name: &str, what: Value, reason: &str| {
            node.order(name, what);
            let status = node.wait_over(name);
            assert_eq!(status.phase, Phase::Failed, "{status:#?}");
            let failure = status.failure.unwrap();
            assert!(failure.reason.contains(reason) && !failure.cure.is_empty(), "{failure:?}");
            let phases: Vec<Phase> = status.steps.iter().map(|step| step.phase).collect();
            assert_eq!(phases, [Phase::Preflight], "{name}");
        };
        refused("none", json!({"to": "newest"}), "there is no good backup of db");
        let backup = node.back_up("one");
        stage.apply(&json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
            "metadata": {"name": "other"}, "spec": {"statefulSet": "shop"}}));
        refused("unknown", json!({"to": "nothing"}), "there is no backup nothing");
        refused("other-set", json!({"to": "other"}), "is of shop, not of db");
        refused("early", json!({"before": "2020-01-01T00:00:00Z"}), "was taken before");
        refused("future", json!({"before": "2120-01-01T00:00:00Z"}), "lies in the future");
        refused("no-restore", json!({"undo": "nothing"}), "there is no restore nothing");
        refused("not-done", json!({"undo": "early"}), "only a completed one");
        node.restore("before", json!({"before": jiff::Timestamp::now()}));
        node.restore("undo", json!({"undo": "before"}));

        // A swap of the image by hand: the backup's is no longer of the lineage.
        let snapshot = format!("{}@{}", node.image, backup.snapshot.unwrap().name);
        stage.lab.rbd(&["snap", "rm", "--no-progress", &snapshot]).unwrap();
        refused("snapshot-gone", json!({"to": "one"}), "is gone");
        stage.kubectl(&["label", "statefulset", "db", "howdah.dev/protect-"]);
        refused("unlabelled", json!({"to": "one"}), "is not under howdah's care");
        assert_eq!(node.sql("SELECT 1"), "1");
    });
}

#[test]
fn a_database_that_was_stopped_is_restored_and_stays_so() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        node.sql("UPDATE t SET n = 2");
        node.stop();
        node.order("stopped", json!({"to": "newest"}));
        let status = node.wait_over("stopped");
        assert_eq!((status.phase, status.started), (Phase::Completed, false), "{status:#?}");
        assert_eq!((node.gate().as_str(), node.field("{.spec.replicas}").as_str()), ("", "0"));
        node.start();
        assert_eq!(node.sql("SELECT n FROM t"), "1");
    });
}
