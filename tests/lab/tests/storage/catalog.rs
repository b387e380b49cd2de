//! The catalogue: the records of backups survive the loss of every howdah object.

use std::collections::BTreeMap;
use std::time::Duration;

use howdah_adapters::records::PostgresBackup;
use howdah_core::backup::Phase;
use howdah_core::names;
use howdah_lab::ceph::POOL;
use howdah_lab::process::wait_until;
use howdah_lab::stage::{BACKUP_LIMIT, START_LIMIT, Stage, install_definitions};
use howdah_lab::storage::claim::wait_slowly;
use serde_json::json;

use crate::gate::{Gate, When};

/// In which an image beside the one that is held has been read; if it was not, it is gone when it is read, which is as good.
const COPY_READ: Duration = Duration::from_secs(3);

fn rebuild(stage: &Stage, arguments: &[&str]) -> String {
    rebuild_on(stage, &std::env::var("PATH").unwrap(), arguments)
}

fn rebuild_on(stage: &Stage, path: &str, arguments: &[&str]) -> String {
    stage.howdah_on(path, &[&["catalog", "rebuild", "--ceph-runner", "local"], arguments].concat())
}

/// Everything of a record that must come back.
fn evidence(backup: &PostgresBackup) -> serde_json::Value {
    let status = backup.status.clone().unwrap();
    json!([
        backup.spec.stateful_set,
        backup.spec.trigger,
        backup.metadata.annotations.as_ref().and_then(|all| all.get(names::HOLD)),
        status.phase,
        status.consistency,
        status.slot,
        status.image,
        status.snapshot,
        status.postgres_version,
        status.system_identifier,
        status.timeline,
        status.start_lsn,
        status.stop_lsn,
        status.label,
        status.spcmap
    ])
}

/// Takes what howdah wrote off every other image of the pool: what other tests left is not to come back.
fn forget_others(stage: &Stage, own: &str) {
    let all = stage.lab.rbd(&["ls", POOL]).unwrap();
    for image in all.lines().map(|name| format!("{POOL}/{name}")).filter(|image| image != own) {
        let text = stage.lab.rbd(&["image-meta", "list", "--format", "json", &image]).unwrap();
        // Of an image without metadata it prints nothing.
        let all: BTreeMap<String, String> = serde_json::from_str(&text).unwrap_or_default();
        for key in all.keys().filter(|key| key.starts_with(names::IMAGE_META_PREFIX)) {
            stage.lab.rbd(&["image-meta", "rm", &image, key]).unwrap();
        }
    }
}

#[test]
fn the_records_come_back_from_the_images_and_what_was_held_is_held() {
    let stage = Stage::alone();
    stage.grant();
    let database = stage.database("db", json!({}));
    let scheduler = stage.scheduler("scheduler-a", 18081);
    for (backup, class) in [("held", "crash"), ("second", "online"), ("third", "online")] {
        database.order(backup, Some(class));
        assert_eq!(stage.wait_over(backup).phase, Phase::Taken);
        if backup == "held" {
            stage.kubectl(&["annotate", "pgb", "held", "howdah.dev/hold=before the upgrade"]);
        }
    }
    scheduler.stop().unwrap();
    stage
        .lab
        .rbd(&["snap", "create", "--no-progress", &format!("{}@before-upgrade", database.image())])
        .unwrap();
    let mut before: Vec<_> =
        ["held", "second", "third"].map(|name| evidence(&stage.backup(name).unwrap())).into();
    let snapshots = database.snapshots();
    forget_others(&stage, database.image());

    // Every object of howdah's is lost.
    stage.lab.kubectl_ok(&["delete", "crd", "postgresbackups.howdah.dev"]).unwrap();
    install_definitions(&stage.lab);
    let served = || stage.lab.kubectl_ok(&["get", "pgb", "-A"]).is_ok();
    assert!(wait_slowly(START_LIMIT, served));
    let text = rebuild(&stage, &["--pool", POOL, "--dry-run"]);
    assert!(text.contains("3 would be brought back"), "{text}");
    assert!(stage.backups().is_empty(), "a dry run wrote something");

    let target = format!("{}/db", stage.namespace.name());
    let text = rebuild(&stage, &[&target]);
    assert!(text.contains("3 brought back, 0 there already"), "{text}");
    let mut after: Vec<_> =
        ["held", "second", "third"].map(|name| evidence(&stage.backup(name).unwrap())).into();
    assert_eq!(after, before);
    let text = rebuild(&stage, &["--pool", POOL]);
    assert!(text.contains("0 brought back, 3 there already"), "{text}");
    assert_eq!(database.snapshots(), snapshots);

    // Before the image is read, and when its copy has been, which carries a copy of its metadata, these two are swapped, as by a
    // restore: no name is missing then, and the image has one that was not listed.
    let (aside, copy) = (format!("{}-aside", database.image()), format!("{}-copy", database.image()));
    let last = format!("{}@{}", database.image(), snapshots[0]);
    stage.lab.rbd(&["clone", "--rbd-default-clone-format", "2", &last, &copy]).unwrap();
    stage.kubectl(&["delete", "pgb", "--all"]);
    let gate = Gate::new(&stage);
    gate.close(When::Before, &format!("image-meta list {}", database.image()));
    let text = std::thread::scope(|scope| {
        let reading = scope.spawn(|| rebuild_on(&stage, &gate.path(), &["--pool", POOL]));
        gate.wait_reached();
        std::thread::sleep(COPY_READ);
        stage.lab.rbd(&["rename", database.image(), &aside]).unwrap();
        stage.lab.rbd(&["rename", &copy, database.image()]).unwrap();
        gate.open();
        reading.join().unwrap()
    });
    stage.lab.rbd(&["rm", "--no-progress", database.image()]).unwrap();
    stage.lab.rbd(&["rename", &aside, database.image()]).unwrap();
    assert!(text.contains("3 brought back, 0 there already, 0 failed"), "{text}");
    for evidence in &mut before {
        let name = evidence[6]["name"].as_str().unwrap().to_owned();
        evidence[6]["name"] = json!(format!("{name}-aside"));
    }
    after = ["held", "second", "third"].map(|name| evidence(&stage.backup(name).unwrap())).into();
    assert_eq!(after, before);

    // The scheduler takes them for what they are: it runs none of them again, and prunes by the policy.
    stage.annotate("db", "howdah.dev/retention=last=1");
    let _scheduler = stage.scheduler("scheduler-a", 18081);
    database.order("fourth", None);
    assert_eq!(stage.wait_over("fourth").phase, Phase::Taken);
    let names =
        || -> Vec<String> { stage.backups().into_iter().filter_map(|backup| backup.metadata.name).collect() };
    assert!(wait_until(BACKUP_LIMIT, || names() == ["fourth", "held"]), "{:?}", names());
    let left = database.snapshots();
    assert!(left.len() == 3 && left.contains(&"before-upgrade".to_owned()), "{left:?}");
}
