//! What pruning does in the images that hold parts of a database (tablespaces, WAL) beside the one with its data directory.
//!
//! A backup is deleted there after it is deleted in the data directory's image. Whatever a death in between leaves belongs to
//! no backup any more, and is swept up by the next run.

use std::collections::{BTreeMap, BTreeSet};

use howdah_adapters::ceph::{CephError, Snapshot};
use howdah_adapters::records::PostgresBackup;
use howdah_core::backup::{ImageRecord, PartRecord, Phase};
use howdah_core::catalogue::Entry;
use howdah_core::names;
use howdah_core::retention::{self, Item};
use jiff::{SignedDuration, Timestamp};
use tracing::{info, warn};

use super::{Held, PruneError, Pruning};

/// Age from which a snapshot of a part that has no entry in the catalogue counts as left behind: longer than any backup
/// takes, or its undoing.
const LEFT_AFTER: SignedDuration = SignedDuration::from_hours(24);

/// Whether all parts of a backup are there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wholeness {
    /// They are.
    Whole,
    /// The snapshot of one is gone from its image.
    Lacking,
    /// An image of one is gone, or in the trash.
    Unclear,
}

/// The images of the parts.
pub(super) struct Parts {
    /// For each part of the backup that just succeeded its image, and those that that took the place of.
    lineages: Vec<Vec<Held>>,
    /// Every other image that a record or the catalogue names.
    others: Vec<Held>,
    /// The snapshots of all of them, by the image's id. One that is gone is absent.
    snapshots: BTreeMap<String, Vec<Snapshot>>,
}

/// The images with the data directory by their ids, and the names of their snapshots.
type OfData = BTreeMap<String, BTreeSet<String>>;

fn names_of(snapshots: &[Snapshot]) -> BTreeSet<String> {
    snapshots.iter().filter(|own| own.by_user).map(|own| own.name.clone()).collect()
}

impl Parts {
    pub(super) fn lineages(&self) -> impl Iterator<Item = &Vec<Held>> {
        self.lineages.iter()
    }

    /// What is there of the parts of a backup, by its record or else by the catalogue.
    pub(super) fn of(&self, held: &Held, snapshot: &Snapshot, own: &[&PostgresBackup]) -> Wholeness {
        let recorded = own.iter().filter_map(|record| record.status.as_ref());
        let mut recorded: Vec<PartRecord> = recorded.flat_map(|status| status.parts.clone()).collect();
        if own.is_empty() {
            recorded.extend(held.entry(snapshot).into_iter().flat_map(|entry| entry.parts));
        }
        let mut found = Wholeness::Whole;
        for part in &recorded {
            // One that is being taken is in use.
            let Some(wanted) = &part.snapshot else { continue };
            match self.snapshots.get(&part.image.id) {
                // Of an image that is not there nothing is known.
                None => return Wholeness::Unclear,
                Some(there) if there.iter().all(|found| found.id != wanted.id) => found = Wholeness::Lacking,
                Some(_) => {}
            }
        }
        found
    }
}

impl Pruning<'_> {
    /// Looks at the images of the parts that the backup has, and that records and the catalogue name.
    pub(super) async fn parts(&self, all: &[Held], records: &[PostgresBackup]) -> Result<Parts, PruneError> {
        let mut lineages = Vec::new();
        for part in &self.status.parts {
            lineages.push(self.lineage(&part.image).await?);
        }
        let mut snapshots: BTreeMap<String, Vec<Snapshot>> =
            lineages.iter().flatten().map(|held| (held.image.id.clone(), held.snapshots.clone())).collect();
        let of_records = records.iter().filter_map(|record| record.status.as_ref());
        let of_records = of_records.flat_map(|status| status.parts.clone());
        let entries = all.iter().flat_map(|held| held.snapshots.iter().filter_map(|own| held.entry(own)));
        let named: BTreeMap<String, ImageRecord> = of_records
            .chain(entries.flat_map(|entry| entry.parts))
            .map(|part| (part.image.id.clone(), part.image))
            .filter(|(id, _)| !snapshots.contains_key(id))
            .collect();
        let mut others = Vec::new();
        for (id, image) in named {
            if let Some(image) = self.named_now(&image).await? {
                let held = self.held(image).await?;
                snapshots.insert(id, held.snapshots.clone());
                others.push(held);
            }
        }
        Ok(Parts { lineages, others, snapshots })
    }

    /// The images that hold the other parts of a backup, as far as they are there.
    pub(super) async fn parts_of(
        &self,
        item: &Item,
        held: &Held,
        record: Option<&PostgresBackup>,
    ) -> Result<Vec<ImageRecord>, CephError> {
        let recorded = record.and_then(|record| record.status.as_ref()).map(|status| status.parts.clone());
        let catalogued = || {
            let own = held.snapshots.iter().find(|own| own.by_user && own.name == item.snapshot)?;
            Some(held.entry(own)?.parts)
        };
        let mut images = Vec::new();
        for part in recorded.or_else(catalogued).unwrap_or_default() {
            images.extend(self.named_now(&part.image).await?);
        }
        Ok(images)
    }

    /// Removes the snapshot of a backup that is deleted from an image that holds a part of it.
    pub(super) async fn remove_part(&self, image: &ImageRecord, snapshot: &str) -> Result<(), CephError> {
        let spec = image.spec();
        match self.ceph.remove_snapshot(&spec, snapshot).await {
            Ok(()) | Err(CephError::NotFound { .. }) => {}
            Err(CephError::Busy { detail, .. }) => {
                warn!(
                    image = spec,
                    snapshot, detail, "a part of a deleted backup is in use; the next run sweeps it up"
                );
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        self.ceph.remove_metadata(&spec, &names::image_meta_key(snapshot)).await
    }

    /// Removes snapshots and entries that belong to no backup any more: their like in the image with the data directory is
    /// gone. Of an image that is not known nothing is said.
    pub(super) async fn sweep_parts(
        &self,
        all: &[Held],
        parts: &Parts,
        records: &[PostgresBackup],
        now: Timestamp,
    ) -> Result<(), PruneError> {
        let data: OfData =
            all.iter().map(|held| (held.image.id.clone(), names_of(&held.snapshots))).collect();
        // An image that the database merely used once may be another's by now: there only an entry tells.
        let left_by = now.checked_sub(LEFT_AFTER).ok();
        let own = parts.lineages.iter().flatten().map(|held| (held, left_by));
        let outlived: Vec<(&Held, Vec<String>)> = own
            .chain(parts.others.iter().map(|held| (held, None)))
            .map(|(held, left_by)| (held, outlived(held, &data, left_by, records)))
            .filter(|(_, names)| !names.is_empty())
            .collect();
        if outlived.is_empty() {
            return Ok(());
        }
        // Listed anew, after the parts: a part of a new backup may be younger than the list of the others.
        let mut there = BTreeSet::new();
        for held in all {
            there.extend(names_of(&self.ceph.snapshots(&held.image.spec()).await?));
        }
        for (held, names) in outlived {
            let spec = held.image.spec();
            for name in names.into_iter().filter(|name| !there.contains(name)) {
                if held.has(&name) && !self.ceph.children(&spec, &name).await?.is_empty() {
                    continue;
                }
                self.remove_part(&held.image, &name).await?;
                info!(image = spec, snapshot = name, "removed what no backup needs any more");
                tokio::time::sleep(super::PAUSE).await;
            }
        }
        Ok(())
    }
}

/// The names of the snapshots and entries of a part that have outlived their backups, as many as one run removes.
fn outlived(
    part: &Held,
    data: &OfData,
    left_by: Option<Timestamp>,
    records: &[PostgresBackup],
) -> Vec<String> {
    let entries = part.metadata.keys().filter_map(|key| key.strip_prefix(names::IMAGE_META_PREFIX));
    let mut found = names_of(&part.snapshots);
    found.extend(entries.map(str::to_owned));
    let left = found
        .into_iter()
        .filter(|name| belongs_to_nobody(name, part, data, left_by) && !is_wanted(records, name));
    left.take(retention::DELETIONS_PER_RUN_MAX).collect()
}

/// Whether a snapshot of a part, or its entry, has outlived its backup. One without an entry is of a backup that was not
/// completed; it was left behind if it is from before `left_by`.
fn belongs_to_nobody(name: &str, part: &Held, data: &OfData, left_by: Option<Timestamp>) -> bool {
    let Some(slot) = names::slot_of_snapshot(name) else { return false };
    match part.metadata.get(&names::image_meta_key(name)).map(|value| Entry::from_value(value)) {
        Some(Ok(entry)) => data.get(&entry.image_id).is_some_and(|own| !own.contains(name)),
        // What cannot be read stays.
        Some(Err(_)) => false,
        None => data.values().all(|own| !own.contains(name)) && left_by.is_some_and(|left_by| slot < left_by),
    }
}

/// Whether a record that is not over, or waits for a human, has this snapshot.
fn is_wanted(records: &[PostgresBackup], name: &str) -> bool {
    records.iter().any(|record| {
        let Some(status) = &record.status else { return false };
        let open = !status.phase.is_terminal() || status.phase == Phase::Stuck;
        let slot = status.slot;
        open && slot.is_some_and(|slot| {
            name == names::snapshot_name(slot) || name == names::manual_snapshot_name(slot)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn snapshot(id: u64) -> Snapshot {
        Snapshot { id, name: "howdah-20261122T030000Z".to_owned(), size: 1, by_user: true, protected: false }
    }

    fn image(id: &str) -> ImageRecord {
        ImageRecord {
            pool: "p".to_owned(),
            rados_namespace: String::new(),
            name: format!("csi-vol-{id}"),
            id: id.to_owned(),
        }
    }

    #[test]
    fn a_part_that_was_removed_is_told_from_an_image_that_may_be_in_the_trash() {
        let record = |parts: serde_json::Value| -> PostgresBackup {
            serde_json::from_value(json!({
                "apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup", "metadata": {"name": "b"},
                "spec": {"statefulSet": "db"}, "status": {"phase": "Verified", "parts": parts}
            }))
            .unwrap()
        };
        let wal = json!([{"volume": "wal", "wal": true, "image": image("2"),
            "snapshot": {"name": "howdah-20261122T030000Z", "id": 7, "size": 1}}]);
        let data = Held { image: image("1"), snapshots: vec![snapshot(4)], metadata: BTreeMap::new() };
        let found = |images: &[(&str, u64)], record: &PostgresBackup| {
            let snapshots = images.iter().map(|(id, own)| ((*id).to_owned(), vec![snapshot(*own)])).collect();
            Parts { lineages: Vec::new(), others: Vec::new(), snapshots }.of(&data, &snapshot(4), &[record])
        };
        let (whole, alone) = (record(wal), record(json!([])));
        assert!(found(&[("2", 7)], &whole) == Wholeness::Whole);
        assert!(found(&[("2", 8)], &whole) == Wholeness::Lacking);
        assert!(found(&[("3", 7)], &whole) == Wholeness::Unclear);
        assert!(found(&[], &alone) == Wholeness::Whole);
    }

    #[test]
    fn what_outlived_its_backup_is_told_from_what_is_being_made() {
        let at = |text: &str| Some(text.parse::<Timestamp>().unwrap());
        let by = at("2026-11-23T12:00:00Z");
        let name = snapshot(7).name;
        let part = |entry: Option<&str>| Held {
            image: image("2"),
            snapshots: vec![snapshot(7)],
            metadata: entry
                .map(|of| {
                    let entry = json!({"format": 2, "namespace": "shop", "database": "db", "backup": "b",
                        "slot": "2026-11-22T03:00:00Z", "trigger": "Schedule", "consistency": "online",
                        "snapshot": name, "snapshotId": 4, "imageId": of});
                    (names::image_meta_key(&name), entry.to_string())
                })
                .into_iter()
                .collect(),
        };
        let data = |names: &[&str]| -> OfData {
            [("1".to_owned(), names.iter().map(|name| (*name).to_owned()).collect())].into()
        };
        let nobodys = |part: &Held, data: &OfData, by| belongs_to_nobody(&name, part, data, by);
        assert!(nobodys(&part(Some("1")), &data(&[]), by), "its like is gone");
        assert!(!nobodys(&part(Some("1")), &data(&[&name]), by));
        assert!(!nobodys(&part(Some("9")), &data(&[]), by), "of an image that is not known");
        assert!(nobodys(&part(None), &data(&[]), by), "left behind a day ago");
        assert!(!nobodys(&part(None), &data(&[]), at("2026-11-22T02:00:00Z")), "just being taken");
        assert!(!nobodys(&part(None), &data(&[]), None), "in an image that may be another's");
        let mut unreadable = part(Some("1"));
        unreadable.metadata.insert(names::image_meta_key(&name), "{}".to_owned());
        assert!(!nobodys(&unreadable, &data(&[]), by), "what cannot be read");
        assert!(!belongs_to_nobody("before-upgrade", &part(None), &data(&[]), by), "somebody else's");
    }
}
