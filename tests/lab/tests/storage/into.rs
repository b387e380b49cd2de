//! Restores into another StatefulSet, beside a database that runs on.

use howdah_lab::stage::{Node, Place, START_LIMIT, Stage, acknowledged, name_of};
use std::slice;

use howdah_core::lineage;
use howdah_core::restore::{Phase, RestoreStatus};
use howdah_lab::mapping::Mapping;
use howdah_lab::process::wait_until;
use serde_json::{Value, json};

use crate::gate::{Gate, When};
use crate::killer::Killer;

/// What `kubectl howdah restore db --into db-copy` would create: the StatefulSet, the claim and the restore.
fn copy(stage: &Stage, source: &Node<'_>, place: &Place) -> [Value; 3] {
    let order = ["restore", "db", "--to", "newest", "--into", "db-copy", "--dry-run"];
    let text = stage.howdah(&[&order[..], &["-n", stage.namespace.name()]].concat());
    // Each node has an address of its own; here all databases share one, and tell each other by port and folder.
    let text = text.replace(&source.place().port().to_string(), &place.port().to_string());
    let documents: Vec<Value> =
        text.split("---\n").map(|document| serde_yaml_ng::from_str(document).unwrap()).collect();
    documents.try_into().unwrap()
}

/// What a restore in place changes.
fn standing(node: &Node<'_>) -> Vec<String> {
    let pod = node.stage.pod_uid(&format!("{}-0", node.name)).unwrap();
    let set = node.field("{.metadata.generation} {.metadata.annotations} {.spec.replicas}");
    let mut standing = vec![pod, set, node.id(&node.image)];
    standing.extend(node.images());
    standing
}

#[test]
fn a_copy_is_made_beside_a_database_that_runs_on_whatever_kills_the_scheduler_and_is_undone() {
    let stage = Stage::alone();
    stage.grant();
    let source = Node::of(stage.database("db", json!({"howdah.dev/retention": "last=1"})));
    source.play(|| {
        let mut killer = Killer::new(&stage);
        let writer = source.ledger();
        let some = |more: usize| {
            let before = acknowledged(&writer).len();
            assert!(wait_until(START_LIMIT, || acknowledged(&writer).len() >= before + more));
        };
        some(20);
        let before = acknowledged(&writer);
        let first = source.back_up("first").snapshot.unwrap();
        let (stands, marks) = (standing(&source), source.marks(&source.image));

        let place = Place::next(&stage.lab);
        let [set, claim, record] = copy(&stage, &source, &place);
        stage.apply(&set);
        stage.apply(&claim);
        let copy = Node::empty(&stage, "db-copy", place);
        let empty = copy.id(&copy.image);
        let restore = record["metadata"]["name"].as_str().unwrap().to_owned();
        copy.play(|| {
            let swap =
                [Phase::Preparing, Phase::SettingAside, Phase::Placing, Phase::Bookkeeping, Phase::Starting];
            killer.kill_in(&swap, slice::from_ref(&restore), || stage.apply(&record));
            let status = copy.wait_over(&restore);
            copy.check_completed(&status);
            let safety = status.safety_image.unwrap();
            assert_eq!(safety.id, empty);

            // Every row of the backup, and the source has never noticed.
            let rows: Vec<u32> =
                copy.sql("SELECT n FROM ledger ORDER BY n").lines().map(|n| n.parse().unwrap()).collect();
            let missing: Vec<&u32> = before.iter().filter(|n| rows.binary_search(n).is_err()).collect();
            assert!(missing.is_empty(), "rows of the backup are missing: {missing:?}");
            some(20);
            assert!(acknowledged(&writer).len() > rows.len(), "the source stood still");
            assert_eq!(standing(&source), stands, "the source was touched");
            assert_eq!(source.marks(&source.image), marks);
            // Of the source the copy knows nothing: not its backups, not what it lay in before.
            assert_eq!(copy.marks(&copy.image), [lineage::key(&empty)]);

            // The copy is the child of the first backup, which therefore outlives the policy; others do not.
            let second = source.back_up("second").snapshot.unwrap();
            let third = source.back_up("third").snapshot.unwrap();
            assert_eq!(stage.snapshots(&source.image), [first.name.as_str(), third.name.as_str()]);
            assert!(stage.backup("first").is_some() && stage.backup("second").is_none(), "{second:?}");
            // Backups of the copy are pruned by its own policy, and none of the source's with them.
            stage.annotate("db-copy", "howdah.dev/retention=last=1");
            copy.back_up("copy-1");
            let newest = copy.back_up("copy-2").snapshot.unwrap();
            assert_eq!(stage.snapshots(&copy.image), [newest.name.as_str()]);
            assert_eq!(stage.snapshots(&source.image), [first.name.as_str(), third.name.as_str()]);
            assert!(stage.backup("third").is_some() && stage.backup("copy-1").is_none());

            // Undone, it stands where it stood: stopped, with an image that nobody has used.
            source.order("undo", json!({"undo": restore, "into": "db-copy"}));
            let undone = copy.wait_over("undo");
            copy.check_completed(&undone);
            assert_eq!(
                (copy.id(&copy.image), copy.field("{.spec.replicas}")),
                (empty.clone(), "0".to_owned())
            );
            assert_eq!(standing(&source), stands, "the undo touched the source");

            // Without the copy nothing keeps the first backup.
            let clone = undone.safety_image.unwrap().spec();
            stage.lab.rbd(&["snap", "purge", "--no-progress", &clone]).unwrap();
            stage.lab.rbd(&["rm", "--no-progress", &clone]).unwrap();
            let fourth = source.back_up("fourth").snapshot.unwrap();
            assert_eq!(stage.snapshots(&source.image), [fourth.name.as_str()]);
            // And what was never used can be used.
            source.order("again", json!({"to": "newest", "into": "db-copy"}));
            copy.check_completed(&copy.wait_over("again"));
            assert!(copy.sql("SELECT count(*) FROM ledger").parse::<usize>().unwrap() > rows.len());
        });
        writer.stop().unwrap();
        killer.end();
    });
}

#[test]
fn a_backup_that_is_about_to_be_cloned_is_not_pruned() {
    let stage = Stage::alone();
    stage.grant();
    let source = Node::of(stage.database("db", json!({"howdah.dev/retention": "last=1"})));
    let copy = Node::empty(&stage, "db-copy", stage.empty_set("db-copy", "160Mi"));
    let gate = Gate::new(&stage);
    let scheduler = stage.scheduler_on("scheduler-a", 18081, &gate.path());
    source.play(|| {
        copy.play(|| {
            source.sql("CREATE TABLE t AS SELECT 1 AS n");
            let first = source.back_up("first").snapshot.unwrap().name;
            gate.close(When::Before, "clone");
            source.order("restore", json!({"to": "first", "into": "db-copy"}));
            gate.wait_reached();
            // The database that is copied is backed up meanwhile, and its policy keeps one.
            let second = source.back_up("second").snapshot.unwrap().name;
            assert_eq!(stage.snapshots(&source.image), [first.as_str(), second.as_str()]);
            gate.open();
            copy.check_completed(&copy.wait_over("restore"));
            assert_eq!(copy.sql("SELECT n FROM t"), "1");
        });
    });
    scheduler.stop().unwrap();
}

#[test]
fn what_ran_or_does_not_fit_takes_no_backup_of_another_and_says_why() {
    let stage = Stage::shared();
    stage.grant();
    let source = Node::of(stage.database("db", json!({})));
    stage.empty_set("used", "160Mi");
    stage.empty_set("small", "64Mi");
    source.play(|| {
        let size = source.back_up("one").snapshot.unwrap().size;
        let refused = |name: &str, into: &str, reason: &str| {
            source.order(name, json!({"to": "one", "into": into}));
            let status = source.wait_over(name);
            assert_eq!(status.phase, Phase::Failed, "{status:#?}");
            let failure = status.failure.unwrap();
            assert!(failure.reason.contains(reason) && !failure.cure.is_empty(), "{failure:?}");
            let phases: Vec<Phase> = status.steps.iter().map(|step| step.phase).collect();
            assert_eq!(phases, [Phase::Preflight], "{name}");
        };
        refused("absent", "nothing", "there is no StatefulSet");
        let needs = format!("the claim data-small-0 has {} bytes, and the backup one needs {size}", 64 << 20);
        refused("too-small", "small", &needs);
        stage.kubectl(&["label", "statefulset", "small", "howdah.dev/protect-"]);
        refused("unprotected", "small", "is not under howdah's care");
        stage.kubectl(&["scale", "statefulset", "used", "--replicas=1"]);
        assert!(wait_until(START_LIMIT, || stage.pod_uid("used-0").is_some()));
        refused("wanted", "used", "the StatefulSet used has spec.replicas 1");
        stage.kubectl(&["scale", "statefulset", "used", "--replicas=0"]);
        assert!(wait_until(START_LIMIT, || stage.pod_uid("used-0").is_none()));
        // A file system without a file is enough: somebody has mounted it.
        let image = Node::empty(&stage, "used", Place::next(&stage.lab)).image;
        drop(Mapping::open(&stage.lab, name_of(&image), "used-before", true).unwrap());
        refused("used-before", "used", "is not new: it holds ");

        // A claim that is not there may yet be made.
        stage.kubectl(&["delete", "pvc", "data-small-0", "--wait=true"]);
        stage.kubectl(&["label", "statefulset", "small", "howdah.dev/protect=true"]);
        source.order("no-claim", json!({"to": "one", "into": "small"}));
        let waits = |status: &RestoreStatus| status.phase == Phase::Waiting && status.failure.is_some();
        stage.wait_restore("no-claim", waits);
        let failure = stage.restore("no-claim").unwrap().failure.unwrap();
        assert!(failure.reason.contains("data-small-0"), "{failure:?}");
        stage.kubectl(&["delete", "pgr", "no-claim"]);
        assert_eq!(source.sql("SELECT 1"), "1");
        assert_eq!(source.images().len(), 1);
    });
}
