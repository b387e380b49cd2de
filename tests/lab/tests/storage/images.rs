//! What a restore asks of Ceph, as the identity of the backups: that its rights are enough, and that what a killed `rbd`
//! leaves half done is mended or made again.

use std::time::Duration;

use howdah_adapters::ceph::{Ceph, CephError, IMAGE_ID_KEY};
use howdah_core::backup::ImageRecord;
use howdah_lab::ceph::POOL;
use howdah_lab::lab::Lab;
use howdah_lab::process::wait_until;
use howdah_lab::storage::claim::{rados, wait_slowly};
use howdah_lab::testing::shared_name;
use nix::sys::signal::Signal;

use crate::ceph::{BACKUP_CAPS, OPEN_LIMIT, inside, runner};

/// The watch of a killed client lasts half a minute.
const WATCH_LIMIT: Duration = Duration::from_secs(90);
const SNAPSHOT: &str = "howdah-20261122T030000Z";

/// Images of one test's own, by the beginning of their names; removed, also from the trash, when dropped.
struct Images<'a> {
    lab: &'a Lab,
    name: String,
}

impl<'a> Images<'a> {
    fn create(lab: &'a Lab, name: &str) -> Self {
        let images = Self { lab, name: format!("{name}-{}", std::process::id()) };
        lab.rbd(&["create", "--size", "64M", &images.spec()]).unwrap();
        images
    }

    fn spec(&self) -> String {
        format!("{POOL}/{}", self.name)
    }

    fn record(&self, id: &str) -> ImageRecord {
        ImageRecord {
            pool: POOL.to_owned(),
            rados_namespace: String::new(),
            name: self.name.clone(),
            id: id.to_owned(),
        }
    }

    fn all(&self) -> Vec<String> {
        let listed = self.lab.rbd(&["ls", POOL]).unwrap_or_default();
        listed.lines().filter(|name| name.starts_with(&self.name)).map(str::to_owned).collect()
    }
}

impl Drop for Images<'_> {
    fn drop(&mut self) {
        let trash = self.lab.rbd(&["trash", "ls", POOL]).unwrap_or_default();
        for line in trash.lines().filter(|line| line.contains(&self.name)) {
            let id = line.split_whitespace().next().unwrap_or_default();
            let _ = self.lab.rbd(&["trash", "restore", &format!("{POOL}/{id}")]);
        }
        // Clones go before their parents, so the second round takes what the first could not.
        for _ in 0..2 {
            for name in self.all() {
                let image = format!("{POOL}/{name}");
                let _ = self.lab.rbd(&["snap", "purge", "--no-progress", &image]);
                let _ = self.lab.rbd(&["rm", "--no-progress", &image]);
            }
        }
        for name in self.all() {
            eprintln!("image {name} is left over");
        }
    }
}

/// The id that a name stands for.
async fn id_of(ceph: &Ceph, spec: &str) -> String {
    ceph.info(spec).await.unwrap().id
}

#[test]
fn a_swap_and_its_books_need_no_more_rights_than_a_backup() {
    let lab = Lab::open_or_up(&shared_name(), 0).unwrap();
    let images = Images::create(&lab, "swap");
    let (spec, name) = (images.spec(), images.name.clone());
    let (clone, aside) = (format!("{spec}.new"), format!("{name}.aside"));
    let object = format!("csi.volume.{name}");
    rados(&lab, &["create", &object]).unwrap();
    rados(&lab, &["setomapval", &object, IMAGE_ID_KEY, "before"]).unwrap();
    let backup = runner(&lab, "test-backup", &BACKUP_CAPS);
    inside(&lab, || async {
        let ceph = Ceph::connect(backup).await.unwrap();
        let old = images.record(&id_of(&ceph, &spec).await);
        ceph.set_metadata(&spec, "csi.storage.k8s.io/pv/name", "pvc-1").await.unwrap();
        ceph.create_snapshot(&spec, SNAPSHOT).await.unwrap();
        let like = ceph.info(&spec).await.unwrap();
        ceph.clone_snapshot(&spec, SNAPSHOT, &clone, &like).await.unwrap();
        let made = ceph.info(&clone).await.unwrap();
        for feature in &like.features {
            assert!(made.features.contains(feature), "{feature} is lost: {:?}", made.features);
        }
        assert_eq!(made.parent.as_ref().unwrap().spec(), spec);
        assert_eq!(ceph.metadata(&clone).await.unwrap()["csi.storage.k8s.io/pv/name"], "pvc-1");
        ceph.grow(&clone, 128 << 20).await.unwrap();

        let new = images.record(&made.id);
        let taken = ceph.give_name(&new, &name).await.unwrap_err();
        assert!(matches!(taken, CephError::AlreadyExists { .. }), "{taken}");
        for _ in 0..2 {
            ceph.give_name(&old, &aside).await.unwrap();
            ceph.give_name(&new, &name).await.unwrap();
        }
        assert_eq!(id_of(&ceph, &spec).await, made.id);
        assert_eq!(ceph.image_by_id(&old).await.unwrap().name, aside);

        let value = async || ceph.journal_value(POOL, "", &object, IMAGE_ID_KEY).await.unwrap();
        assert_eq!(value().await.as_deref(), Some("before"));
        ceph.set_journal_value(POOL, "", &object, IMAGE_ID_KEY, &made.id).await.unwrap();
        assert_eq!(value().await.as_ref(), Some(&made.id));
        let absent =
            ceph.set_journal_value(POOL, "", "csi.volume.none", IMAGE_ID_KEY, "x").await.unwrap_err();
        assert!(absent.is_not_found(), "{absent}");

        ceph.move_to_trash(&spec).await.unwrap();
        let gone = ceph.image_by_id(&new).await.unwrap_err();
        assert!(gone.is_not_found(), "one in the trash is not found: {gone}");
        ceph.remove_unused(&format!("{spec}.nothing")).await.unwrap();
    });
    rados(&lab, &["rm", &object]).unwrap();
}

#[test]
fn a_rename_that_was_cut_off_is_mended() {
    let lab = Lab::open_or_up(&shared_name(), 0).unwrap();
    let images = Images::create(&lab, "renamed");
    let (spec, name) = (images.spec(), images.name.clone());
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let (aside, third) = (format!("{name}.aside"), format!("{name}.third"));
    // As after the first of the three steps of a rename: both names' objects, and the old name in the directory.
    rados(&lab, &["get", &format!("rbd_id.{name}"), path]).unwrap();
    rados(&lab, &["put", &format!("rbd_id.{aside}"), path]).unwrap();
    let backup = runner(&lab, "test-backup", &BACKUP_CAPS);
    inside(&lab, || async {
        let ceph = Ceph::connect(backup).await.unwrap();
        let image = images.record(&id_of(&ceph, &spec).await);
        ceph.give_name(&image, &aside).await.unwrap();
        assert_eq!(ceph.image_by_id(&image).await.unwrap().name, aside);
        assert!(ceph.info(&spec).await.unwrap_err().is_not_found());
    });
    // As after the second: the old name's object is still there, and means an image that is called otherwise.
    rados(&lab, &["put", &format!("rbd_id.{name}"), path]).unwrap();
    lab.rbd(&["create", "--size", "64M", &format!("{POOL}/{third}")]).unwrap();
    let backup = runner(&lab, "test-backup", &BACKUP_CAPS);
    inside(&lab, || async {
        let ceph = Ceph::connect(backup).await.unwrap();
        let other = images.record(&id_of(&ceph, &format!("{POOL}/{third}")).await);
        ceph.give_name(&other, &name).await.unwrap();
        assert_eq!(id_of(&ceph, &spec).await, other.id);
    });
    assert_eq!(images.all().len(), 2);
}

#[test]
fn the_lock_that_a_killed_command_left_is_broken_without_blocklisting_anybody() {
    let lab = Lab::open_or_up(&shared_name(), 0).unwrap();
    let images = Images::create(&lab, "locked");
    let spec = images.spec();
    let mut bench = lab.command("rbd");
    bench.args(["bench", "--io-type", "write", "--io-size", "4K", "--io-threads", "1", "--io-total", "64G"]);
    let mut writer = lab.spawn_inside("test-killed-writer", bench.arg(&spec)).unwrap();
    let locked = || lab.rbd(&["lock", "ls", &spec]).is_ok_and(|text| text.contains("auto"));
    assert!(wait_until(OPEN_LIMIT, locked), "{}", writer.output().unwrap());
    writer.signal(Signal::SIGKILL).unwrap();
    assert!(writer.wait_gone(OPEN_LIMIT));
    let unwatched = || lab.rbd(&["status", &spec]).is_ok_and(|text| text.contains("Watchers: none"));
    assert!(wait_slowly(WATCH_LIMIT, unwatched));
    let before = lab.ceph(&["osd", "blocklist", "ls"]).unwrap();
    let backup = runner(&lab, "test-backup", &BACKUP_CAPS);
    inside(&lab, || async {
        let ceph = Ceph::connect(backup).await.unwrap();
        assert_eq!(ceph.lock_owners(&spec).await.unwrap().len(), 1);
        // The way of a backup: it leaves the lock of somebody who may come back alone.
        let refused = ceph.create_snapshot(&spec, SNAPSHOT).await.unwrap_err();
        assert!(matches!(refused, CephError::ReadOnly { .. }), "{refused}");
        // The way of a restore, which has proven that the lock is its own.
        ceph.create_snapshot_at_rest(&spec, SNAPSHOT).await.unwrap();
        ceph.roll_back(&spec, SNAPSHOT).await.unwrap();
    });
    let after = lab.ceph(&["osd", "blocklist", "ls"]).unwrap();
    assert!(after.lines().all(|entry| before.contains(entry)), "somebody was blocklisted: {after}");
}
