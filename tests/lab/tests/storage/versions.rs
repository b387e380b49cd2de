//! Every supported major version of PostgreSQL: an online backup by the scheduler, and the proof that it is one.

use std::thread;

use howdah_core::annotations::Consistency;
use howdah_core::backup::Phase;
use howdah_lab::postgres::MAJORS;
use howdah_lab::stage::{Restored, Stage};
use serde_json::json;

/// Rows that are committed before the backup.
const ROWS: &str = "1000";

#[test]
fn an_online_backup_of_every_major_version_starts_on_a_clone_with_every_row() {
    let stage = Stage::shared();
    stage.grant();
    let stage = &stage;
    thread::scope(|scope| {
        for major in MAJORS {
            scope.spawn(move || prove(stage, major));
        }
    });
}

fn prove(stage: &Stage, major: u32) {
    let database = stage.database_of(major, &format!("db-{major}"), json!({}));
    database.sql(&format!("CREATE TABLE ledger AS SELECT g AS n FROM generate_series(1, {ROWS}) g"));
    let backup = format!("by-hand-{major}");
    database.order(&backup, Some("online"));
    let status = stage.wait_over(&backup);
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Online)), "{status:?}");
    assert!(status.postgres_version.unwrap().starts_with(&format!("{major}.")));
    // What is committed afterwards is not in it.
    database.sql("INSERT INTO ledger VALUES (0)");

    let snapshot = format!("{}@{}", database.image(), status.snapshot.unwrap().name);
    let clone = Restored::start(&stage.lab, major, &snapshot);
    assert!(clone.log().contains("automatic recovery in progress"), "{}", clone.log());
    assert_eq!(clone.sql("SELECT count(*) FROM ledger WHERE n > 0"), ROWS, "PostgreSQL {major}");
    assert_eq!(clone.sql("SELECT count(*) FROM ledger WHERE n = 0"), "0", "PostgreSQL {major}");
    let running: u32 = clone.sql("SHOW server_version_num").parse().unwrap();
    assert_eq!(running / 10_000, major);
}
