//! Deletes what the retention policy of one database no longer keeps, after a backup of it succeeded.
//!
//! The facts are read fresh, judged by [`retention::plan`], and each deletion is checked once more. A deletion goes
//! snapshot, catalogue entry, record, in this order: whatever is left after a crash is found by the next run.
//!
//! A restore may have set the image aside that earlier backups lie in: all images of the lineage are judged as one, and
//! an image that was set aside goes to the trash once its time is over and nothing depends on it.
//!
//! A database on several volumes is judged by the image with its data directory; what lies in the others goes with that
//! (`prune/parts.rs`).

mod parts;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use howdah_adapters::ceph::{Ceph, CephError, Snapshot};
use howdah_adapters::kubernetes::{KubernetesError, call, find};
use howdah_adapters::records::{PostgresBackup, PostgresRestore};
use howdah_core::annotations::Settings;
use howdah_core::backup::{BackupStatus, ImageRecord, Phase};
use howdah_core::catalogue::{Drill, Entry};
use howdah_core::lineage::{self, Predecessor};
use howdah_core::names;
use howdah_core::restore;
use howdah_core::retention::{self, Item, ItemState, KeepReason, Verdict};
use jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Preconditions};
use kube::{Api, Client, ResourceExt as _};
use thiserror::Error;
use tracing::{debug, info, warn};

use self::parts::{Parts, Wholeness};
use crate::run::Record;

/// Pause between two deletions: each one makes every OSD trim objects in the background.
const PAUSE: Duration = Duration::from_millis(500);
/// Kept of the reason of a hold in its copy.
const HOLD_REASON_MAX: usize = 256;
/// Records of failed backups that are kept for each database; they hold no snapshot, only the reason.
const FAILED_RECORDS_MAX: usize = 10;
/// Records read in one request.
const RECORDS_PAGE: u32 = 500;
/// Pages read before pruning gives up: far above [`retention::SNAPSHOTS_PER_IMAGE_MAX`] records of one database.
const RECORD_PAGES_MAX: usize = 20;

/// Why pruning stopped.
#[derive(Debug, Error)]
pub enum PruneError {
    /// Ceph said no.
    #[error(transparent)]
    Ceph(#[from] CephError),
    /// The API server said no.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
    /// The image behind the claim is another one by now.
    #[error("prune {image}: its id is {found} where the backup has {wanted}")]
    OtherImage {
        /// The image.
        image: String,
        /// Its id now.
        found: String,
        /// Its id when the backup was taken.
        wanted: String,
    },
}

/// What was deleted, and why.
#[derive(Debug, Default)]
pub struct Pruned {
    /// Snapshot and reason.
    pub deleted: Vec<(String, String)>,
    /// How many are kept.
    pub kept: usize,
}

/// What is pruned.
pub struct Pruning<'a> {
    /// Ceph.
    pub ceph: &'a Ceph,
    /// The API server.
    pub client: &'a Client,
    /// Namespace of the database.
    pub namespace: &'a str,
    /// The StatefulSet.
    pub database: &'a str,
    /// The backup that just succeeded.
    pub status: &'a BackupStatus,
    /// The image it lies in.
    pub image: &'a ImageRecord,
    /// The settings of the database.
    pub settings: &'a Settings,
}

/// One image that the database lies in or lay in, and what is in it.
struct Held {
    image: ImageRecord,
    snapshots: Vec<Snapshot>,
    metadata: BTreeMap<String, String>,
}

impl Pruning<'_> {
    /// Applies the retention policy once.
    ///
    /// # Errors
    /// If the facts cannot be read, or a deletion fails; what was deleted before stays deleted.
    pub async fn run(&self, now: Timestamp) -> Result<Pruned, PruneError> {
        let records = self.records().await?;
        let wanted = self.wanted_by_restores().await?;
        let all = self.lineage(self.image).await?;
        let parts = self.parts(&all, &records).await?;
        for held in &all {
            self.copy_holds(held, &records).await?;
        }
        let items: Vec<Item> =
            all.iter().flat_map(|held| self.items(held, &records, &wanted, &parts)).collect();
        let plan = retention::plan(now, &self.settings.time_zone, self.settings.retention.as_ref(), &items);
        let mut pruned = Pruned {
            kept: plan.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Keep(_))).count(),
            ..Pruned::default()
        };
        for (item, verdict) in &plan {
            if let Verdict::Keep(reasons) = verdict {
                let reasons: Vec<String> = reasons.iter().map(KeepReason::to_string).collect();
                debug!(snapshot = item.snapshot, reasons = reasons.join(", "), "kept");
            }
        }
        for (item, reason) in retention::deletions(&plan) {
            let mut holders = all.iter().filter(|held| held.has(&item.snapshot));
            let (Some(held), None) = (holders.next(), holders.next()) else {
                info!(snapshot = item.snapshot, "kept: two images have a snapshot of this name");
                continue;
            };
            if self.delete(item, held, &records).await? {
                let image = held.image.spec();
                info!(image, snapshot = item.snapshot, reason = %reason, "backup deleted by retention");
                pruned.deleted.push((item.snapshot.clone(), reason.to_string()));
                tokio::time::sleep(PAUSE).await;
            }
        }
        self.tidy_catalogue(&all).await?;
        self.tidy_records(&records, &all, &pruned).await;
        self.sweep_parts(&all, &parts, &records, now).await?;
        for lineage in std::iter::once(&all).chain(parts.lineages()) {
            self.retire(lineage, now).await?;
        }
        Ok(pruned)
    }

    /// The image, and those that it took the place of and that are still there.
    async fn lineage(&self, image: &ImageRecord) -> Result<Vec<Held>, PruneError> {
        let found = self.ceph.info(&image.spec()).await?.id;
        if found != image.id {
            return Err(PruneError::OtherImage { image: image.spec(), found, wanted: image.id.clone() });
        }
        let live = self.held(image.clone()).await?;
        let mut all = Vec::new();
        for id in lineage::ids(&live.metadata) {
            let wanted = ImageRecord { id, ..image.clone() };
            if let Some(image) = self.named_now(&wanted).await? {
                all.push(self.held(image).await?);
            }
        }
        all.insert(0, live);
        Ok(all)
    }

    /// The image by the name it has now; `None` when it is gone.
    async fn named_now(&self, image: &ImageRecord) -> Result<Option<ImageRecord>, CephError> {
        match self.ceph.image_by_id(image).await {
            Ok(found) => Ok(Some(ImageRecord { name: found.name, ..image.clone() })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn held(&self, image: ImageRecord) -> Result<Held, CephError> {
        let spec = image.spec();
        let snapshots = self.ceph.snapshots(&spec).await?;
        let metadata = self.ceph.metadata(&spec).await?;
        Ok(Held { image, snapshots, metadata })
    }

    /// Ends what restores kept for an undo, once its time is over and nothing depends on it. An image goes to the trash
    /// and no further; while it has a snapshot (a backup, or the parent of a clone such as the live image) it stays.
    async fn retire(&self, all: &[Held], now: Timestamp) -> Result<(), PruneError> {
        for held in all {
            let image = held.image.spec();
            for (snapshot, until) in lineage::safety_snapshots(&held.metadata) {
                let there = held.has(&snapshot);
                if until.is_none_or(|until| until > now) && there {
                    continue;
                }
                if there && !self.ceph.children(&image, &snapshot).await?.is_empty() {
                    continue;
                }
                if there {
                    self.ceph.remove_snapshot(&image, &snapshot).await?;
                    info!(image, snapshot, "safety snapshot removed: its time is over");
                }
                self.ceph.remove_metadata(&image, &lineage::safety_key(&snapshot)).await?;
            }
        }
        let Some((live, set_aside)) = all.split_first() else { return Ok(()) };
        for held in set_aside {
            let (image, key) = (held.image.spec(), lineage::key(&held.image.id));
            let entry = live.metadata.get(&key).and_then(|value| Predecessor::from_value(value).ok());
            if entry.is_none_or(|entry| entry.until > now) {
                continue;
            }
            let free =
                self.ceph.snapshots(&image).await?.is_empty() && self.ceph.watchers(&image).await?.is_empty();
            if free {
                self.ceph.move_to_trash(&image).await?;
                info!(image, "safety copy moved to the trash: its time is over, and nothing depends on it");
                self.ceph.remove_metadata(&live.image.spec(), &key).await?;
            }
        }
        Ok(())
    }

    /// The records of this database, from the API server itself: a cache could hide a hold.
    async fn records(&self) -> Result<Vec<PostgresBackup>, KubernetesError> {
        let of_this = |record: &PostgresBackup| record.spec.stateful_set == self.database;
        self.list("backups", of_this).await
    }

    /// The snapshots that restores which are not over are made from, by the ids of image and snapshot. One into another
    /// StatefulSet runs beside the backups of this one.
    async fn wanted_by_restores(&self) -> Result<BTreeSet<(String, u64)>, KubernetesError> {
        let of_this = |record: &PostgresRestore| record.spec.stateful_set == self.database;
        let restores = self.list("restores", of_this).await?;
        let open = restores
            .into_iter()
            .filter_map(|restore| restore.status)
            .filter(|status| !matches!(status.phase, restore::Phase::Completed | restore::Phase::Failed));
        let source = open.filter_map(|status| status.source);
        Ok(source.filter_map(|source| Some((source.image.id, source.snapshot?.id))).collect())
    }

    /// The records of the namespace that are `wanted`, from the API server itself.
    async fn list<K: Record>(
        &self,
        what: &str,
        wanted: impl Fn(&K) -> bool,
    ) -> Result<Vec<K>, KubernetesError> {
        let api = Api::<K>::namespaced(self.client.clone(), self.namespace);
        let attempt = format!("list the {what} of {}/{}", self.namespace, self.database);
        let mut parameters = ListParams::default().limit(RECORDS_PAGE);
        let mut records = Vec::new();
        for _ in 0..RECORD_PAGES_MAX {
            let page = call(attempt.as_str(), api.list(&parameters)).await?;
            let more = page.metadata.continue_.clone().filter(|token| !token.is_empty());
            records.extend(page.items.into_iter().filter(|record| wanted(record)));
            match more {
                Some(token) => parameters = parameters.continue_token(&token),
                None => return Ok(records),
            }
        }
        // Deciding on half of the holds would be worse than not pruning.
        Err(KubernetesError::Incomplete {
            attempt,
            problem: format!(
                "the namespace has more than {} {what}",
                RECORDS_PAGE as usize * RECORD_PAGES_MAX
            ),
        })
    }

    /// Keeps a second copy of each hold beside the catalogue, so that a hold outlives the loss of the records. Where there is
    /// no record the copy stays as it is.
    async fn copy_holds(&self, held: &Held, records: &[PostgresBackup]) -> Result<(), CephError> {
        let Held { image, snapshots, metadata } = held;
        let spec = image.spec();
        for snapshot in snapshots {
            let Some(record) = records.iter().find(|record| is_of(record, snapshot, image)) else { continue };
            let key = names::hold_meta_key(&snapshot.name);
            match (record.annotations().get(names::HOLD), metadata.contains_key(&key)) {
                (Some(reason), false) => {
                    let reason: String = reason.chars().take(HOLD_REASON_MAX).collect();
                    let value = serde_json::Value::from(reason).to_string();
                    self.ceph.set_metadata(&spec, &key, &value).await?;
                }
                (None, true) => self.ceph.remove_metadata(&spec, &key).await?,
                _ => {}
            }
        }
        Ok(())
    }

    /// What is known of each snapshot of an image. Its clones are asked for only before a deletion.
    fn items(
        &self,
        shelf: &Held,
        records: &[PostgresBackup],
        wanted: &BTreeSet<(String, u64)>,
        parts: &Parts,
    ) -> Vec<Item> {
        let Held { image, snapshots, metadata } = shelf;
        let item = |snapshot: &Snapshot| {
            let name = &snapshot.name;
            let own: Vec<&PostgresBackup> =
                records.iter().filter(|record| is_of(record, snapshot, image)).collect();
            let whole = parts.of(shelf, snapshot, &own);
            // Without a record the copy of the hold counts, until the catalogue was rebuilt.
            let mut held = own.is_empty() && metadata.contains_key(&names::hold_meta_key(name));
            let (mut in_use, mut taken, mut verified, mut damaged) = (false, false, false, false);
            for record in own {
                held |= record.annotations().contains_key(names::HOLD);
                let phase = record.status.as_ref().map(|status| status.phase).unwrap_or_default();
                taken |= phase.is_success();
                // `Stuck` waits for a human, who may still want to look.
                in_use |= !phase.is_terminal() || phase == Phase::Stuck;
                verified |= phase == Phase::Verified;
                damaged |= phase == Phase::Damaged;
                let drill = record.status.as_ref().and_then(|status| status.verification.as_ref());
                in_use |= drill.is_some_and(|drill| !drill.phase.is_terminal());
            }
            let just_taken = image.id == self.image.id
                && self.status.snapshot.as_ref().is_some_and(|own| own.id == snapshot.id);
            let entry = shelf.entry(snapshot);
            // The record is written first, so it knows the later drill.
            let drill = entry.as_ref().filter(|_| !taken && !damaged).and_then(|entry| entry.drill.as_ref());
            verified |= drill.is_some_and(Drill::is_good);
            damaged |= drill.is_some_and(|drill| !drill.is_good());
            let catalogued = entry.is_some();
            let slot = names::slot_of_snapshot(name).filter(|_| snapshot.by_user);
            let state = match slot {
                None => ItemState::Foreign,
                Some(_) if whole == Wholeness::Lacking => ItemState::Unfinished,
                Some(_) if damaged => ItemState::Damaged,
                Some(_) if verified => ItemState::Verified,
                Some(_) if taken || catalogued || just_taken => ItemState::Taken,
                Some(_) => ItemState::Unfinished,
            };
            Item {
                snapshot: name.clone(),
                taken_at: slot.unwrap_or(Timestamp::UNIX_EPOCH),
                sequence: snapshot.id,
                state,
                held,
                has_clones: snapshot.protected,
                unclear: whole == Wholeness::Unclear,
                in_use: (in_use && !just_taken) || wanted.contains(&(image.id.clone(), snapshot.id)),
            }
        };
        snapshots.iter().map(item).collect()
    }

    /// Deletes one backup, unless somebody came to need it in the meantime.
    async fn delete(&self, item: &Item, held: &Held, records: &[PostgresBackup]) -> Result<bool, PruneError> {
        let image = held.image.spec();
        let clones = self.ceph.children(&image, &item.snapshot).await?;
        if !clones.is_empty() {
            info!(image, snapshot = item.snapshot, clones = clones.join(", "), "kept: it has clones");
            return Ok(false);
        }
        let api = Api::<PostgresBackup>::namespaced(self.client.clone(), self.namespace);
        let record = records.iter().find(|record| {
            let status = record.status.as_ref();
            let own = status.and_then(|status| status.snapshot.as_ref().zip(status.image.as_ref()));
            own.is_some_and(|(own, image)| own.name == item.snapshot && image.id == held.image.id)
        });
        let parts = self.parts_of(item, held, record).await?;
        for part in &parts {
            let clones = self.ceph.children(&part.spec(), &item.snapshot).await?;
            if !clones.is_empty() {
                info!(
                    image = part.spec(),
                    snapshot = item.snapshot,
                    clones = clones.join(", "),
                    "kept: it has clones"
                );
                return Ok(false);
            }
        }
        if let Some(record) = record {
            let name = record.name_any();
            let fresh = find(format!("get the backup {}/{name}", self.namespace), &api, &name).await?;
            if fresh.is_some_and(|fresh| fresh.annotations().contains_key(names::HOLD)) {
                info!(image, snapshot = item.snapshot, "kept: a hold was put on it");
                return Ok(false);
            }
        }
        match self.ceph.remove_snapshot(&image, &item.snapshot).await {
            Ok(()) | Err(CephError::NotFound { .. }) => {}
            Err(CephError::Busy { detail, .. }) => {
                info!(image, snapshot = item.snapshot, detail, "kept: it is in use");
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
        self.ceph.remove_metadata(&image, &names::image_meta_key(&item.snapshot)).await?;
        for part in &parts {
            self.remove_part(part, &item.snapshot).await?;
        }
        if let Some(record) = record {
            self.delete_record(record).await?;
        }
        Ok(true)
    }

    async fn delete_record(&self, record: &PostgresBackup) -> Result<(), KubernetesError> {
        let name = record.name_any();
        let api = Api::<PostgresBackup>::namespaced(self.client.clone(), self.namespace);
        let parameters = DeleteParams {
            preconditions: Some(Preconditions { uid: record.uid(), resource_version: None }),
            ..DeleteParams::default()
        };
        match call(format!("delete the backup {}/{name}", self.namespace), api.delete(&name, &parameters))
            .await
        {
            Ok(_) | Err(KubernetesError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes entries of the catalogue that stand for nothing: a deletion that was cut off after the snapshot leaves one.
    /// What cannot be read stays, and so does the copy of another image's entry.
    async fn tidy_catalogue(&self, all: &[Held]) -> Result<(), PruneError> {
        for Held { image, snapshots, metadata } in all {
            let gone = |snapshots: &[Snapshot], id: u64| !snapshots.iter().any(|s| s.by_user && s.id == id);
            let entries = metadata.iter().filter(|(key, _)| key.starts_with(names::IMAGE_META_PREFIX));
            let entries = entries.filter_map(|(key, value)| Some((key, Entry::from_value(value).ok()?)));
            let orphans: Vec<(&String, u64)> = entries
                .filter(|(_, entry)| entry.image_id == image.id && gone(snapshots, entry.snapshot_id))
                .map(|(key, entry)| (key, entry.snapshot_id))
                .take(retention::DELETIONS_PER_RUN_MAX)
                .collect();
            if orphans.is_empty() {
                continue;
            }
            // Listed anew, after the metadata: an entry is written when its snapshot is there.
            let (spec, now) = (image.spec(), self.ceph.snapshots(&image.spec()).await?);
            for (key, _) in orphans.into_iter().filter(|(_, id)| gone(&now, *id)) {
                self.ceph.remove_metadata(&spec, key).await?;
                info!(image = spec, key, "catalogue entry removed: its snapshot is gone");
            }
        }
        Ok(())
    }

    /// Deletes records that stand for nothing: of snapshots that are gone from their image, and old failures.
    async fn tidy_records(&self, records: &[PostgresBackup], all: &[Held], pruned: &Pruned) {
        let is_held = |record: &PostgresBackup| record.annotations().contains_key(names::HOLD);
        let gone = |record: &&PostgresBackup| {
            let Some(status) = &record.status else { return false };
            let (Some(own), Some(image)) = (&status.snapshot, &status.image) else { return false };
            let deleted = pruned.deleted.iter().any(|(name, _)| *name == own.name);
            // Of an image that is not there nothing is known.
            let held = all.iter().find(|held| held.image.id == image.id);
            status.phase.is_success()
                && !deleted
                && held.is_some_and(|held| held.snapshots.iter().all(|snapshot| snapshot.id != own.id))
        };
        let mut failed: Vec<&PostgresBackup> = records
            .iter()
            .filter(|record| record.status.as_ref().is_some_and(|status| status.phase == Phase::Failed))
            .collect();
        failed.sort_by_key(|record| record.status.as_ref().and_then(|status| status.slot));
        let old = failed.len().saturating_sub(FAILED_RECORDS_MAX);
        let stale = records.iter().filter(gone).chain(failed.into_iter().take(old));
        for record in stale.filter(|record| !is_held(record)).take(retention::DELETIONS_PER_RUN_MAX) {
            match self.delete_record(record).await {
                Ok(()) => info!(backup = record.name_any(), "record deleted: it stands for no snapshot"),
                Err(error) => warn!(backup = record.name_any(), error = %error, "delete a stale record"),
            }
        }
    }
}

impl Held {
    /// The catalogue's entry of a snapshot of this image.
    fn entry(&self, snapshot: &Snapshot) -> Option<Entry> {
        let value = self.metadata.get(&names::image_meta_key(&snapshot.name))?;
        let entry = Entry::from_value(value).ok()?;
        (entry.snapshot_id == snapshot.id && entry.image_id == self.image.id).then_some(entry)
    }

    /// Whether a user's snapshot has this name.
    fn has(&self, snapshot: &str) -> bool {
        self.snapshots.iter().any(|found| found.by_user && found.name == snapshot)
    }
}

/// Whether `record` is of `snapshot` in `image`: by id once it is known, by name before.
fn is_of(record: &PostgresBackup, snapshot: &Snapshot, image: &ImageRecord) -> bool {
    let Some(status) = &record.status else { return false };
    match (&status.snapshot, &status.image) {
        (Some(own), Some(of)) => own.id == snapshot.id && of.id == image.id,
        _ => {
            let Some(slot) = status.slot else { return false };
            snapshot.name == names::snapshot_name(slot) || snapshot.name == names::manual_snapshot_name(slot)
        }
    }
}
