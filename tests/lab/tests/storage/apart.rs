//! Databases on several volumes: their images are snapshotted one after the other, and have to be one state all the same. Named
//! so that they begin before all others: they take the longest.

use std::sync::Mutex;

use howdah_core::annotations::Consistency;
use howdah_core::backup::{BackupStatus, Phase};
use howdah_lab::process::wait_until;
use howdah_lab::stage::{
    BACKUP_LIMIT, Database, Node, Restored, START_LIMIT, Server, Stage, acknowledged, install_definitions,
};
use howdah_lab::storage::claim::wait_slowly;
use howdah_lab::testing::Process;
use serde_json::{Value, json};

use crate::gate::{Gate, When};

fn rows(server: &Server) -> Vec<u32> {
    server.sql("SELECT n FROM ledger ORDER BY n").lines().map(|n| n.parse().unwrap()).collect()
}

fn wait_more(writer: &Process, more: usize) {
    let before = acknowledged(writer).len();
    assert!(wait_until(START_LIMIT, || acknowledged(writer).len() >= before + more));
}

fn assert_holds(server: &Server, acknowledged: &[u32]) {
    let found = rows(server);
    let missing: Vec<&u32> = acknowledged.iter().filter(|n| found.binary_search(n).is_err()).collect();
    assert!(missing.is_empty(), "acknowledged rows are missing: {missing:?}");
    server.assert_one_state();
}

#[test]
fn snapshots_of_three_volumes_are_one_state_with_every_acknowledged_row() {
    let stage = Stage::alone();
    stage.grant();
    let database = stage.database_in_parts("db", &json!({}));
    let images = database.images();
    // Between the snapshots of the volumes the writer goes on: the WAL's is taken last.
    let gate = Gate::new(&stage);
    let scheduler = stage.scheduler_on("scheduler-a", 18081, &gate.path());
    let node = Node::of(database);
    node.play(|| {
        let writer = node.ledger();
        wait_more(&writer, 20);
        let before = acknowledged(&writer);
        gate.close(When::After, "snap create");
        node.order_backup("first");
        gate.wait_reached();
        wait_more(&writer, 20);
        gate.open();
        let status = stage.wait_over("first");
        assert_eq!(
            (status.phase, status.consistency),
            (Phase::Taken, Some(Consistency::Online)),
            "{status:?}"
        );
        let parts: Vec<(&str, bool)> =
            status.parts.iter().map(|part| (part.volume.as_str(), part.wal)).collect();
        assert_eq!(parts, [("space", false), ("wal", true)]);
        let copy = Restored::of(&stage.lab, &status);
        assert_holds(&copy, &before);
        assert!(copy.log().contains("redo starts at"), "{}", copy.log());
        drop(copy);

        // A checkpoint that ends in between makes them several states: it is seen, and everything taken back.
        gate.close(When::After, "snap create");
        node.order_backup("second");
        gate.wait_reached();
        node.sql("CHECKPOINT");
        gate.open();
        let status = stage.wait_over("second");
        assert_eq!((status.phase, status.attempt), (Phase::Taken, 2), "{status:?}");
        let said: Vec<&String> = status.steps.iter().filter_map(|step| step.message.as_ref()).collect();
        assert!(said.iter().any(|message| message.contains("a checkpoint ended while")), "{said:?}");
        for image in &images {
            assert_eq!(stage.snapshots(image).len(), 2, "{image}");
        }

        // So does a tablespace, which may lie on another volume.
        let again = |backup: &str, disturb: &dyn Fn(), reason: &str| -> BackupStatus {
            gate.close(When::After, "snap create");
            node.order_backup(backup);
            gate.wait_reached();
            disturb();
            gate.open();
            let said =
                || stage.status(backup).steps.into_iter().filter_map(|step| step.message).collect::<String>();
            assert!(wait_until(BACKUP_LIMIT, || said().contains(reason)), "{:?}", stage.status(backup));
            stage.status(backup)
        };
        let far = node.sql("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'far'");
        let create = || {
            node.sql(&format!("COPY (SELECT 1) TO PROGRAM 'cat >/dev/null; mkdir {far}/more'"));
            node.sql(&format!("CREATE TABLESPACE more LOCATION '{far}/more'"));
        };
        again("third", &create, "a tablespace was created");
        let status = stage.wait_over("third");
        assert_eq!((status.phase, status.attempt), (Phase::Taken, 2), "{status:?}");
        writer.stop().unwrap();

        // And somebody who opens an image of a stopped database.
        node.stop();
        let watcher = Mutex::new(None);
        let open = || {
            let mut watch = stage.lab.command("bash");
            watch.args(["-c", &format!("exec rbd watch {} < <(sleep 600)", images[1])]);
            let process = stage.lab.spawn_inside("several-test-watcher", &watch).unwrap();
            let watched = || !stage.lab.rbd(&["status", &images[1]]).unwrap().contains("Watchers: none");
            assert!(wait_slowly(START_LIMIT, watched), "{}", process.output().unwrap());
            *watcher.lock().unwrap() = Some(process);
        };
        again("offline", &open, "was opened by");
        watcher.into_inner().unwrap().unwrap().stop().unwrap();
        let status = stage.wait_over("offline");
        assert_eq!(
            (status.phase, status.consistency),
            (Phase::Taken, Some(Consistency::Offline)),
            "{status:?}"
        );
    });
    scheduler.stop().unwrap();
}

#[test]
fn what_is_pruned_goes_from_every_volume_and_the_catalogue_knows_them_all() {
    let stage = Stage::shared();
    stage.grant();
    let mut database = stage.database_in_parts("db", &json!({"howdah.dev/retention": "last=2"}));
    let names = |status: &BackupStatus| status.snapshot.as_ref().unwrap().name.clone();
    let back_up = |database: &Database<'_>, name: &str| -> BackupStatus {
        database.order(name, None);
        let status = stage.wait_over(name);
        assert_eq!(status.phase, Phase::Taken, "{status:?}");
        status
    };
    let all = database.images();
    let everywhere = |wanted: &[String]| {
        for image in &all {
            let mut found = stage.snapshots(image);
            found.sort();
            assert_eq!(found, wanted, "{image}");
        }
    };
    let first = back_up(&database, "first");
    let second = back_up(&database, "second");
    everywhere(&[names(&first), names(&second)]);
    // What a scheduler leaves that dies after it removed the first one of the data directory.
    stage.lab.rbd(&["snap", "rm", "--no-progress", &format!("{}@{}", all[0], names(&first))]).unwrap();
    let third = back_up(&database, "third");
    everywhere(&[names(&second), names(&third)]);
    assert!(stage.backup("first").is_none());
    let marks: Value =
        serde_json::from_str(&stage.lab.rbd(&["image-meta", "list", "--format", "json", &all[1]]).unwrap())
            .unwrap();
    let keys: Vec<&String> = marks.as_object().unwrap().keys().collect();
    assert!(!keys.iter().any(|key| key.ends_with(&names(&first))), "{keys:?}");

    // A stopped database cannot be asked where its tablespaces lie: the records tell.
    database.stop();
    let offline = back_up(&database, "offline");
    assert_eq!(offline.consistency, Some(Consistency::Offline));
    assert_eq!(offline.parts.len(), 2);
    everywhere(&[names(&third), names(&offline)]);

    // The catalogue brings a backup back whole, or not at all.
    let lost = offline.parts.iter().find(|part| part.volume == "space").unwrap().image.spec();
    stage.lab.rbd(&["snap", "rm", "--no-progress", &format!("{lost}@{}", names(&offline))]).unwrap();
    stage.kubectl(&["delete", "pgb", "--all"]);
    let target = format!("{}/db", stage.namespace.name());
    let told = stage.howdah(&["catalog", "rebuild", "--ceph-runner", "local", &target]);
    assert!(
        told.contains("1 brought back") && told.contains("its part on the volume space is gone"),
        "{told}"
    );
    let rebuilt = stage.status("third");
    assert_eq!((rebuilt.phase, &rebuilt.parts), (Phase::Taken, &third.parts));
    Restored::of(&stage.lab, &rebuilt).assert_one_state();
}

#[test]
fn a_stopped_database_of_which_nothing_tells_where_its_tablespaces_lie_is_refused() {
    let stage = Stage::shared();
    stage.grant();
    let mut database = stage.database_in_parts("db", &json!({}));
    database.stop();
    database.order("unknown", None);
    let status = stage.wait_over("unknown");
    let failure = status.failure.unwrap();
    assert_eq!(status.phase, Phase::Failed);
    assert!(failure.reason.contains("space-db-0"), "{failure:?}");
    assert!(failure.cure.contains("take one online backup"), "{failure:?}");
    for image in database.images() {
        assert!(stage.snapshots(&image).is_empty(), "{image}");
    }
}

#[test]
fn a_restore_of_three_volumes_is_of_all_of_them_and_so_is_its_undo() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database_in_parts("db", &json!({})));
    let all = || -> Vec<u32> {
        node.assert_one_state();
        node.sql("SELECT n FROM ledger ORDER BY n").lines().map(|n| n.parse().unwrap()).collect()
    };
    node.play(|| {
        let writer = node.ledger();
        wait_more(&writer, 20);
        let before = acknowledged(&writer);
        node.back_up("first");
        wait_more(&writer, 20);
        writer.stop().unwrap();
        let others = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'psql' AND pid <> pg_backend_pid()";
        assert!(wait_until(START_LIMIT, || node.sql(others) == "0"));
        let last = all();

        for (method, restore, undo) in [("swap", "swapped", "back"), ("rollback", "rolled", "back-again")] {
            node.restore(restore, json!({"to": "first", "method": method}));
            let old = all();
            let missing: Vec<&u32> = before.iter().filter(|n| old.binary_search(n).is_err()).collect();
            assert!(missing.is_empty() && old.len() < last.len(), "{method}: {missing:?}");
            node.restore(undo, json!({"undo": restore}));
            assert_eq!(all(), last, "the undo of {method} lost rows");
        }

        // A backup that does not hold all volumes is not put among those that it does not hold.
        let parts = serde_json::to_value(stage.status("first").parts).unwrap();
        let record = |parts: &Value| {
            let patch = json!({"status": {"parts": parts}}).to_string();
            stage.kubectl(&["patch", "pgb", "first", "--subresource=status", "--type=merge", "-p", &patch]);
        };
        record(&json!([parts[0]]));
        node.order("lacking", json!({"to": "first"}));
        let failure = node.wait_over("lacking").failure.unwrap();
        assert!(failure.reason.contains("lies on the volume wal"), "{failure:?}");
        record(&parts);

        // A StatefulSet that does not mount what a backup holds gets nothing of it.
        let mount = r#"[{"op": "test", "path": "/spec/template/spec/containers/0/volumeMounts/1/name", "value": "space"},
            {"op": "remove", "path": "/spec/template/spec/containers/0/volumeMounts/1"}]"#;
        stage.kubectl(&["patch", "statefulset", "db", "--type=json", "-p", mount]);
        node.order("unmounted", json!({"to": "first"}));
        let failure = node.wait_over("unmounted").failure.unwrap();
        assert!(failure.reason.contains("the volume space"), "{failure:?}");
    });
}

#[test]
fn an_api_server_that_does_not_know_of_parts_gets_no_half_of_a_record() {
    let stage = Stage::alone();
    stage.grant();
    let database = stage.database_in_parts("db", &json!({}));
    let scheduler = stage.scheduler("scheduler-a", 18081);
    // As before there were any.
    let path = "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties/parts";
    let remove = json!([{"op": "remove", "path": path}]).to_string();
    let definition = "postgresbackups.howdah.dev";
    stage.lab.kubectl_ok(&["patch", "crd", definition, "--type=json", "-p", &remove]).unwrap();
    database.order("by-hand", None);
    let told = || scheduler.output().unwrap().contains("apply deploy/base/crds");
    let found = wait_until(BACKUP_LIMIT, told);
    let status = stage.status("by-hand");
    install_definitions(&stage.lab);
    assert!(found, "{}", scheduler.output().unwrap());
    assert_eq!(status.phase, Phase::Preflight, "{status:?}");
    for image in database.images() {
        assert!(stage.snapshots(&image).is_empty(), "{image}");
    }
    let status = stage.wait_over("by-hand");
    assert_eq!((status.phase, status.parts.len()), (Phase::Taken, 2), "{status:?}");
    scheduler.stop().unwrap();
}
