//! Databases on several volumes: their images are snapshotted one after the other, and have to be one state all the same.

use howdah_core::annotations::Consistency;
use howdah_core::backup::{BackupStatus, Phase};
use howdah_lab::postgres::DEBIAN_MAJOR;
use howdah_lab::process::wait_until;
use howdah_lab::stage::{BACKUP_LIMIT, Database, Node, Part, Restored, START_LIMIT, Stage, acknowledged};
use howdah_lab::testing::Process;
use serde_json::{Value, json};

use crate::gate::{Gate, When};

/// A table on each volume, and an index of each on the other. The row of one transaction lies on both.
const TABLES: &str = "CREATE TABLE ledger (n int PRIMARY KEY USING INDEX TABLESPACE far); \
                      CREATE TABLE twin (n int PRIMARY KEY) TABLESPACE far";
/// What a writer is acknowledged is in both tables, whatever the order of the snapshots.
const TRIGGER: &str = "CREATE FUNCTION twice() RETURNS trigger LANGUAGE plpgsql AS \
                       'BEGIN INSERT INTO twin VALUES (NEW.n); RETURN NEW; END'; \
                       CREATE TRIGGER twice AFTER INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION twice()";
/// Rows that are in one table and not in the other, by the tables themselves and by their indexes.
const APART: &str = "SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off; \
                     SELECT count(*) FROM ledger FULL JOIN twin USING (n) WHERE ledger.n IS NULL OR twin.n IS NULL; \
                     RESET ALL; SET enable_seqscan = off; \
                     SELECT count(*) FROM (SELECT n FROM ledger EXCEPT SELECT n FROM twin) t";

fn furnish(database: &Database<'_>) {
    let folder = database.folder("space");
    // Not in the batch that uses it: no transaction block takes it.
    database.sql(&format!("CREATE TABLESPACE far LOCATION '{}'", folder.display()));
    database.sql(TABLES);
    database.sql(TRIGGER);
}

/// Every image of the database as POOL/NAME.
fn images(database: &Database<'_>) -> Vec<String> {
    let parts = database.parts.iter().map(|part| part.image.clone());
    std::iter::once(database.image.clone()).chain(parts).collect()
}

/// PostgreSQL on clones of a backup.
fn clone(stage: &Stage, status: &BackupStatus) -> Restored {
    let snapshot = |image: String, name: &str| format!("{image}@{name}");
    let data = snapshot(status.image.as_ref().unwrap().spec(), &status.snapshot.as_ref().unwrap().name);
    let parts: Vec<Part> = status
        .parts
        .iter()
        .map(|part| Part {
            volume: part.volume.clone(),
            image: snapshot(part.image.spec(), &part.snapshot.as_ref().unwrap().name),
        })
        .collect();
    Restored::start_parts(&stage.lab, DEBIAN_MAJOR, &data, &parts)
}

fn rows(server: &Restored) -> Vec<u32> {
    server.sql("SELECT n FROM ledger ORDER BY n").lines().map(|n| n.parse().unwrap()).collect()
}

fn wait_more(writer: &Process, more: usize) {
    let before = acknowledged(writer).len();
    assert!(wait_until(START_LIMIT, || acknowledged(writer).len() >= before + more));
}

fn assert_one_state(clone: &Restored, acknowledged: &[u32]) {
    let found = rows(clone);
    let missing: Vec<&u32> = acknowledged.iter().filter(|n| found.binary_search(n).is_err()).collect();
    assert!(missing.is_empty(), "acknowledged rows are missing: {missing:?}");
    assert_eq!(clone.sql(APART), "0\n0", "the volumes are of different instants");
}

#[test]
fn snapshots_of_three_volumes_are_one_state_with_every_acknowledged_row() {
    let stage = Stage::alone();
    stage.grant();
    let database = stage.database_in_parts("db", &json!({}));
    furnish(&database);
    let images = images(&database);
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
        let copy = clone(&stage, &status);
        assert_one_state(&copy, &before);
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
        writer.stop().unwrap();
    });
    scheduler.stop().unwrap();
}

#[test]
fn what_is_pruned_goes_from_every_volume_and_the_catalogue_knows_them_all() {
    let stage = Stage::shared();
    stage.grant();
    let mut database = stage.database_in_parts("db", &json!({"howdah.dev/retention": "last=2"}));
    furnish(&database);
    let names = |status: &BackupStatus| status.snapshot.as_ref().unwrap().name.clone();
    let back_up = |database: &Database<'_>, name: &str| -> BackupStatus {
        database.order(name, None);
        let status = stage.wait_over(name);
        assert_eq!(status.phase, Phase::Taken, "{status:?}");
        status
    };
    let all = images(&database);
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
    let copy = clone(&stage, &rebuilt);
    assert_eq!(copy.sql(APART), "0\n0");
}

#[test]
fn a_stopped_database_of_which_nothing_tells_where_its_tablespaces_lie_is_refused() {
    let stage = Stage::shared();
    stage.grant();
    let mut database = stage.database_in_parts("db", &json!({}));
    furnish(&database);
    database.stop();
    database.order("unknown", None);
    let status = stage.wait_over("unknown");
    let failure = status.failure.unwrap();
    assert_eq!(status.phase, Phase::Failed);
    assert!(failure.reason.contains("space-db-0"), "{failure:?}");
    assert!(failure.cure.contains("take one online backup"), "{failure:?}");
    for image in images(&database) {
        assert!(stage.snapshots(&image).is_empty(), "{image}");
    }
    assert!(wait_until(BACKUP_LIMIT, || stage.status("unknown").finished_at.is_some()));
}
