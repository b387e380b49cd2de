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

/// The images of the parts.
pub(super) struct Parts {
    /// For each part of the backup that just succeeded its image, and those that that took the place of.
    lineages: Vec<Vec<Held>>,
    /// The snapshots of those and of every other image that a record names, by the image's id. One that is gone is absent.
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

    /// Whether every part of a backup is there, by its record or else by the catalogue.
    pub(super) fn are_whole(&self, held: &Held, snapshot: &Snapshot, own: &[&PostgresBackup]) -> bool {
        let recorded = own.iter().filter_map(|record| record.status.as_ref());
        let mut recorded: Vec<PartRecord> = recorded.flat_map(|status| status.parts.clone()).collect();
        if own.is_empty() {
            recorded.extend(held.entry(snapshot).into_iter().flat_map(|entry| entry.parts));
        }
        recorded.iter().all(|part| {
            // One that is being taken is in use.
            let Some(wanted) = &part.snapshot else { return true };
            let there = self.snapshots.get(&part.image.id);
            there.is_some_and(|there| there.iter().any(|found| found.id == wanted.id))
        })
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
        for (id, image) in named {
            if let Some(image) = self.named_now(&image).await? {
                snapshots.insert(id, self.ceph.snapshots(&image.spec()).await?);
            }
        }
        Ok(Parts { lineages, snapshots })
    }

    /// The image by the name it has now; `None` when it is gone.
    async fn named_now(&self, image: &ImageRecord) -> Result<Option<ImageRecord>, CephError> {
        match self.ceph.image_by_id(image).await {
            Ok(found) => Ok(Some(ImageRecord { name: found.name, ..image.clone() })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
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
        for held in parts.lineages.iter().flatten() {
            let outlived = |data: &OfData| -> Vec<String> {
                let of_users = names_of(&held.snapshots).into_iter();
                let entries =
                    held.metadata.keys().filter_map(|key| key.strip_prefix(names::IMAGE_META_PREFIX));
                let found: BTreeSet<String> = of_users.chain(entries.map(str::to_owned)).collect();
                let left = found
                    .into_iter()
                    .filter(|name| belongs_to_nobody(name, held, data, now) && !is_wanted(records, name));
                left.take(retention::DELETIONS_PER_RUN_MAX).collect()
            };
            if outlived(&data).is_empty() {
                continue;
            }
            // Listed anew, after the part: a part of a new backup may be younger than the list of the others.
            let mut now_there = OfData::new();
            for held in all {
                let snapshots = self.ceph.snapshots(&held.image.spec()).await?;
                now_there.insert(held.image.id.clone(), names_of(&snapshots));
            }
            let spec = held.image.spec();
            for name in outlived(&now_there) {
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

/// Whether a snapshot of a part, or its entry, has outlived its backup.
fn belongs_to_nobody(name: &str, part: &Held, data: &OfData, now: Timestamp) -> bool {
    let Some(slot) = names::slot_of_snapshot(name) else { return false };
    let entry =
        part.metadata.get(&names::image_meta_key(name)).and_then(|value| Entry::from_value(value).ok());
    match entry {
        Some(entry) => data.get(&entry.image_id).is_some_and(|own| !own.contains(name)),
        None => data.values().all(|own| !own.contains(name)) && now.duration_since(slot) > LEFT_AFTER,
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
