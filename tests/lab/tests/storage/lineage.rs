//! Backups across a restore that swapped the image: they are judged as one, and the image that was set aside is kept as long
//! as its time lasts or anything depends on it, and no longer.

use howdah_core::lineage::{self, Predecessor};
use howdah_lab::stage::{Node, Stage, name_of};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

#[test]
fn backups_of_two_images_are_judged_as_one_and_the_one_set_aside_goes_when_nothing_needs_it() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({"howdah.dev/retention": "last=2"})));
    node.play(|| {
        let snapshot = |backup: &str| stage.status(backup).snapshot.unwrap().name;
        let back_up = |backup: &str| {
            node.back_up(backup);
            snapshot(backup)
        };
        let (_, second) = (back_up("first"), back_up("second"));
        let restored = node.restore("restore", json!({"to": "second"}));
        let aside = restored.safety_image.unwrap();
        // By the clock of the image's metadata: the record's is no longer asked.
        let kept_until = |offset: SignedDuration| {
            let until = Timestamp::now() + offset;
            let entry = Predecessor::new(aside.name.clone(), "shop/restore".to_owned(), until);
            let (key, value) = (lineage::key(&aside.id), entry.to_value().unwrap());
            stage.lab.rbd(&["image-meta", "set", &node.image, &key, &value]).unwrap();
        };
        let (past, future) = (SignedDuration::from_hours(-1), SignedDuration::from_hours(24));
        let is_there = || stage.lab.rbd(&["ls", howdah_lab::ceph::POOL]).unwrap().contains(&aside.name);

        // Two are kept in all, not two of each image.
        let third = back_up("third");
        assert_eq!(stage.snapshots(&aside.spec()), [second.as_str()]);
        assert_eq!(stage.snapshots(&node.image), [third.as_str()]);
        assert!(stage.backup("first").is_none() && stage.backup("second").is_some());

        // Its time is over, and the image in place is a clone of a backup in it.
        kept_until(past);
        let fourth = back_up("fourth");
        assert_eq!(
            stage.snapshots(&aside.spec()),
            [second.as_str()],
            "the parent of the live image was deleted"
        );
        assert_eq!(stage.snapshots(&node.image), [third.as_str(), fourth.as_str()]);
        assert!(stage.backup("second").is_some() && is_there());

        // Nothing depends on it, and its time is not over.
        kept_until(future);
        node.stop();
        stage.lab.rbd(&["flatten", "--no-progress", &node.image]).unwrap();
        node.start();
        let fifth = back_up("fifth");
        assert!(stage.snapshots(&aside.spec()).is_empty(), "no rule keeps it, and no clone");
        assert_eq!(stage.snapshots(&node.image), [fourth.as_str(), fifth.as_str()]);
        assert!(is_there(), "it went to the trash before its time");

        kept_until(past);
        let sixth = back_up("sixth");
        assert!(!is_there());
        let trash = stage.lab.rbd(&["trash", "ls", howdah_lab::ceph::POOL]).unwrap();
        assert!(trash.contains(name_of(&aside.spec())), "it can be brought back no more: {trash}");
        assert!(!node.marks(&node.image).contains(&lineage::key(&aside.id)));
        assert_eq!(stage.snapshots(&node.image), [fifth.as_str(), sixth.as_str()]);
        // The newest is good for a restore.
        node.restore("again", json!({"to": "newest"}));
    });
}
