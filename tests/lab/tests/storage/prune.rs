//! Pruning that is killed between any two of its steps: the next scheduler ends it the same way.

use howdah_core::backup::Phase;
use howdah_lab::process::wait_until;
use howdah_lab::stage::{BACKUP_LIMIT, Stage};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::gate::{Gate, When};

/// The steps of a deletion that a killed scheduler is in the middle of. In the last one it is killed as soon as the record
/// is gone.
const STEPS: [(When, &str); 5] = [
    (When::Before, "snap rm"),
    (When::After, "snap rm"),
    (When::Before, "image-meta rm"),
    (When::After, "image-meta rm"),
    (When::After, NOTHING),
];
/// Words that are in no command.
const NOTHING: &str = "nothing at all";

#[test]
fn a_deletion_that_is_killed_at_any_step_is_completed_and_takes_nothing_else_with_it() {
    let stage = Stage::alone();
    stage.grant();
    let database = stage.database("db", json!({"howdah.dev/retention": "last=1"}));
    let gate = Gate::new(&stage);
    let start = |number: u16| stage.scheduler_on("scheduler-a", 18081 + number, &gate.path());
    let mut scheduler = start(0);
    let records =
        || -> Vec<String> { stage.backups().into_iter().filter_map(|backup| backup.metadata.name).collect() };
    // Foreign, and held: what no deletion may touch.
    database.order("held", None);
    assert_eq!(stage.wait_over("held").phase, Phase::Taken);
    stage.kubectl(&["annotate", "pgb", "held", "howdah.dev/hold=before the upgrade"]);
    let foreign = format!("{}@before-upgrade", database.image());
    stage.lab.rbd(&["snap", "create", "--no-progress", &foreign]).unwrap();
    let kept = stage.status("held").snapshot.unwrap().name;
    database.order("victim-0", None);
    assert_eq!(stage.wait_over("victim-0").phase, Phase::Taken);

    for (i, (when, what)) in STEPS.into_iter().enumerate() {
        let (victim, next) = (format!("victim-{i}"), format!("victim-{}", i + 1));
        let gone = stage.status(&victim).snapshot.unwrap().name;
        gate.close(when, what);
        database.order(&next, None);
        if what == NOTHING {
            assert!(wait_until(BACKUP_LIMIT, || stage.backup(&victim).is_none()));
        } else {
            gate.wait_reached();
            assert!(stage.backup(&victim).is_some(), "the record went before {when:?} {what}");
        }
        scheduler.signal(Signal::SIGKILL).unwrap();
        assert!(scheduler.wait_gone(BACKUP_LIMIT));
        gate.open();
        scheduler = start(1 + u16::try_from(i).unwrap());
        assert_eq!(stage.wait_over(&next).phase, Phase::Taken, "killed {when:?} {what}");
        let newest = stage.status(&next).snapshot.unwrap().name;
        let mut snapshots = database.snapshots();
        snapshots.sort();
        let mut wanted = vec![kept.clone(), newest.clone(), "before-upgrade".to_owned()];
        wanted.sort();
        assert_eq!(snapshots, wanted, "killed {when:?} {what}");
        assert_eq!(records(), ["held".to_owned(), next], "killed {when:?} {what}");
        let metadata = stage.lab.rbd(&["image-meta", "list", database.image()]).unwrap();
        assert!(
            !metadata.contains(&gone) && metadata.contains(&newest),
            "killed {when:?} {what}: {metadata}"
        );
    }
    scheduler.stop().unwrap();
}
