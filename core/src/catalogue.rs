//! The catalogue: the record of a backup a second time, in the metadata of the RBD image it lies in.
//!
//! Whoever loses etcd still has the volumes, and each volume says what its snapshots are.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::annotations::Consistency;
use crate::backup::{
    BackupStatus, CONDITION_CATALOGUED, Condition, ImageRecord, PartRecord, Phase, SnapshotRecord, Trigger,
};
use crate::names;
use crate::verify::{self, Report, VerifyStatus};

/// Version of the format of an [`Entry`] of one image.
const FORMAT: u32 = 1;
/// Of one of several: who does not know of the others must not take it for a whole backup.
const FORMAT_OF_PARTS: u32 = 2;
/// Longest entry: what one value of the metadata holds without trouble (`rbd image-meta` passes it as an argument).
pub const ENTRY_MAX: usize = 16 * 1024;

/// Condition: the record was written anew from the catalogue.
pub const CONDITION_REBUILT: &str = "Rebuilt";

/// What the catalogue keeps of one backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Version of the format.
    pub format: u32,
    /// Namespace of the StatefulSet.
    pub namespace: String,
    /// Name of the StatefulSet.
    pub database: String,
    /// Name of the `PostgresBackup`.
    pub backup: String,
    /// The slot.
    pub slot: Timestamp,
    /// Who asked for it.
    pub trigger: Trigger,
    /// Its class.
    pub consistency: Consistency,
    /// When it was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_at: Option<Timestamp>,
    /// Name of the snapshot.
    pub snapshot: String,
    /// Id of the snapshot.
    pub snapshot_id: u64,
    /// Id of the image with the data directory; a copy of the metadata on another image shows by it.
    pub image_id: String,
    /// The further images, each with its snapshot. They carry the entry, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartRecord>,
    /// The pod's volumes that hold nothing of the database.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub beside: Vec<String>,
    /// `server_version`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgres_version: Option<String>,
    /// The system identifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<String>,
    /// The timeline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<u32>,
    /// What `pg_backup_start` returned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_lsn: Option<String>,
    /// How far recovery has to come, of several images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flushed_lsn: Option<String>,
    /// What `pg_backup_stop` returned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_lsn: Option<String>,
    /// The backup label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The tablespace map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spcmap: Option<String>,
    /// How the last restore drill ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill: Option<Drill>,
}

/// How a restore drill ended that came to a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Drill {
    /// When.
    pub ended_at: Timestamp,
    /// What PostgreSQL said.
    pub report: Report,
}

impl Drill {
    fn of(status: &BackupStatus, now: Timestamp) -> Option<Self> {
        let drill = status.verification.as_ref()?;
        Some(Self { ended_at: drill.finished_at.unwrap_or(now), report: drill.report.clone()? })
    }

    /// Whether it found the backup good.
    #[must_use]
    pub const fn is_good(&self) -> bool {
        self.report.damage.is_none()
    }
}

impl Entry {
    /// The entry of a backup whose snapshot was taken by `now`; `None` when its record lacks the snapshot.
    #[must_use]
    pub fn of(
        namespace: &str,
        database: &str,
        backup: &str,
        trigger: Trigger,
        status: &BackupStatus,
        now: Timestamp,
    ) -> Option<Self> {
        let snapshot = status.snapshot.as_ref()?;
        Some(Self {
            format: if status.parts.is_empty() { FORMAT } else { FORMAT_OF_PARTS },
            namespace: namespace.to_owned(),
            database: database.to_owned(),
            backup: backup.to_owned(),
            slot: status.slot?,
            trigger,
            consistency: status.consistency?,
            taken_at: Some(now),
            snapshot: snapshot.name.clone(),
            snapshot_id: snapshot.id,
            image_id: status.image.as_ref()?.id.clone(),
            parts: status.parts.clone(),
            beside: status.beside.clone(),
            postgres_version: status.postgres_version.clone(),
            system_identifier: status.system_identifier.clone(),
            timeline: status.timeline,
            start_lsn: status.start_lsn.clone(),
            flushed_lsn: status.flushed_lsn.clone(),
            stop_lsn: status.stop_lsn.clone(),
            label: status.label.clone(),
            spcmap: status.spcmap.clone(),
            drill: Drill::of(status, now),
        })
    }

    /// The entry as it is written. A tablespace map too long for the limit is left out; the record still has it.
    ///
    /// # Errors
    /// Says that even the rest is longer than [`ENTRY_MAX`].
    pub fn to_value(&self) -> Result<String, String> {
        for entry in [self.clone(), Self { spcmap: None, ..self.clone() }] {
            let value = serde_json::to_string(&entry).map_err(|error| format!("write the entry: {error}"))?;
            if value.len() <= ENTRY_MAX {
                return Ok(value);
            }
        }
        Err(format!("keep the entry under {ENTRY_MAX} bytes"))
    }

    /// Reads an entry back.
    ///
    /// # Errors
    /// Says why the value is no entry: too long, not JSON of this form, or of a newer format.
    pub fn from_value(value: &str) -> Result<Self, String> {
        if value.len() > ENTRY_MAX {
            return Err(format!("read an entry of more than {ENTRY_MAX} bytes"));
        }
        let entry: Self = serde_json::from_str(value).map_err(|error| format!("read the entry: {error}"))?;
        if ![FORMAT, FORMAT_OF_PARTS].contains(&entry.format) {
            return Err(format!("read an entry of format {} where {FORMAT_OF_PARTS} is known", entry.format));
        }
        Ok(entry)
    }
}

/// What an image's metadata says of one of its snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A backup.
    Backup(Box<Rebuilt>),
    /// Nothing that could be brought back.
    Nothing {
        /// The name of the snapshot.
        snapshot: String,
        /// Why not.
        reason: String,
    },
}

/// The record of a backup, as far as the catalogue has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilt {
    /// The entry.
    pub entry: Entry,
    /// The status: steps and timings are lost, the evidence is not.
    pub status: BackupStatus,
    /// Why it was held, if it was.
    pub hold: Option<String>,
}

/// Reads the catalogue of `image` against the snapshots that it has.
///
/// Snapshots that howdah did not take are not looked at. Entries of another image are passed over: a clone carries a copy
/// of its parent's metadata, and an image that holds a part of a database the entries of the one with the data directory. The image may have another name by now (a restore renames it); its id does not change.
#[must_use]
pub fn read(
    image: &ImageRecord,
    snapshots: &[SnapshotRecord],
    metadata: &BTreeMap<String, String>,
    now: Timestamp,
) -> Vec<Found> {
    let nothing = |snapshot: &str, reason: String| Found::Nothing { snapshot: snapshot.to_owned(), reason };
    let mut found = Vec::new();
    for (key, value) in metadata {
        let Some(snapshot) = key.strip_prefix(names::IMAGE_META_PREFIX) else { continue };
        let entry = match Entry::from_value(value) {
            Ok(entry) => entry,
            Err(error) => {
                found.push(nothing(snapshot, error));
                continue;
            }
        };
        if entry.image_id != image.id {
            continue;
        }
        let own = snapshots.iter().find(|own| own.id == entry.snapshot_id && own.name == entry.snapshot);
        let Some(own) = own.filter(|own| own.name == snapshot) else {
            found.push(nothing(snapshot, "the snapshot itself is gone".to_owned()));
            continue;
        };
        let hold = metadata.get(&names::hold_meta_key(snapshot));
        // Whatever stands there, it is a hold.
        let hold = hold.map(|hold| serde_json::from_str(hold).unwrap_or_else(|_| hold.clone()));
        let status = entry.status(image, own, now);
        found.push(Found::Backup(Box::new(Rebuilt { entry, status, hold })));
    }
    for snapshot in snapshots.iter().filter(|own| names::slot_of_snapshot(&own.name).is_some()) {
        if !metadata.contains_key(&names::image_meta_key(&snapshot.name)) {
            let reason = "it has no entry: the backup was not completed".to_owned();
            found.push(nothing(&snapshot.name, reason));
        }
    }
    found
}

impl Rebuilt {
    /// Looks for the further images of the backup among `images`, all of the pool by their ids, and takes over the names they
    /// have now.
    ///
    /// # Errors
    /// Names the part that is gone: without it the others are no backup.
    pub fn find_parts(
        mut self,
        images: &BTreeMap<String, (ImageRecord, Vec<SnapshotRecord>)>,
    ) -> Result<Self, String> {
        for part in &mut self.status.parts {
            let wanted = part.snapshot.as_ref().map(|snapshot| snapshot.id);
            let found = images.get(&part.image.id).filter(|(_, snapshots)| {
                snapshots.iter().any(|own| Some(own.id) == wanted && own.name == self.entry.snapshot)
            });
            let Some((image, _)) = found else {
                return Err(format!(
                    "its part on the volume {} is gone: {}@{}",
                    part.volume,
                    part.image.spec(),
                    self.entry.snapshot
                ));
            };
            part.image.clone_from(image);
        }
        Ok(self)
    }
}

impl Entry {
    /// The status of the backup that this is the entry of.
    fn status(&self, image: &ImageRecord, snapshot: &SnapshotRecord, now: Timestamp) -> BackupStatus {
        let condition = |kind: &str, reason: &str, message: &str| Condition {
            kind: kind.to_owned(),
            status: "True".to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            last_transition_time: now,
        };
        let verification = self.drill.as_ref().map(|drill| VerifyStatus {
            phase: if drill.is_good() { verify::Phase::Verified } else { verify::Phase::Damaged },
            finished_at: Some(drill.ended_at),
            report: Some(drill.report.clone()),
            ..VerifyStatus::default()
        });
        BackupStatus {
            phase: match &self.drill {
                Some(drill) if drill.is_good() => Phase::Verified,
                Some(_) => Phase::Damaged,
                None => Phase::Taken,
            },
            verification,
            consistency: Some(self.consistency),
            slot: Some(self.slot),
            finished_at: Some(self.taken_at.unwrap_or(self.slot)),
            image: Some(image.clone()),
            snapshot: Some(snapshot.clone()),
            parts: self.parts.clone(),
            beside: self.beside.clone(),
            postgres_version: self.postgres_version.clone(),
            system_identifier: self.system_identifier.clone(),
            timeline: self.timeline,
            start_lsn: self.start_lsn.clone(),
            flushed_lsn: self.flushed_lsn.clone(),
            stop_lsn: self.stop_lsn.clone(),
            label: self.label.clone(),
            spcmap: self.spcmap.clone(),
            conditions: vec![
                condition(CONDITION_CATALOGUED, "Written", "the image carries the catalogue entry"),
                condition(
                    CONDITION_REBUILT,
                    "FromTheImage",
                    "the record was written anew from the image's metadata; steps and timings are lost",
                ),
            ],
            ..BackupStatus::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn status() -> BackupStatus {
        BackupStatus {
            slot: Some("2026-11-22T03:00:00Z".parse().unwrap()),
            consistency: Some(Consistency::Online),
            image: Some(ImageRecord {
                pool: "replicapool".to_owned(),
                rados_namespace: String::new(),
                name: "csi-vol-1".to_owned(),
                id: "1a2b".to_owned(),
            }),
            snapshot: Some(SnapshotRecord { name: "howdah-20261122T030000Z".to_owned(), id: 4, size: 1 }),
            label: Some("START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n".to_owned()),
            spcmap: Some(String::new()),
            ..BackupStatus::default()
        }
    }

    fn now() -> Timestamp {
        "2026-11-22T03:00:05Z".parse().unwrap()
    }

    fn entry(status: &BackupStatus) -> Option<Entry> {
        Entry::of("shop", "pg", "pg-20261122030000", Trigger::Schedule, status, now())
    }

    #[test]
    fn an_entry_is_read_back_as_it_was_written() {
        let entry = entry(&status()).unwrap();
        assert_eq!(Entry::from_value(&entry.to_value().unwrap()).unwrap(), entry);
    }

    #[test]
    fn a_backup_without_snapshot_has_no_entry() {
        assert_eq!(entry(&BackupStatus { snapshot: None, ..status() }), None);
    }

    #[test]
    fn a_long_tablespace_map_is_left_out_and_a_long_label_refused() {
        let long = Some("x".repeat(ENTRY_MAX));
        let written = entry(&BackupStatus { spcmap: long.clone(), ..status() }).unwrap().to_value().unwrap();
        assert_eq!(Entry::from_value(&written).unwrap().spcmap, None);
        assert!(entry(&BackupStatus { label: long, ..status() }).unwrap().to_value().is_err());
    }

    fn image(id: &str) -> ImageRecord {
        ImageRecord {
            pool: "replicapool".to_owned(),
            rados_namespace: String::new(),
            // Renamed since.
            name: "howdah-safety-1".to_owned(),
            id: id.to_owned(),
        }
    }

    /// The metadata of an image with the entry of [`status`], a hold on it, and what others left there.
    fn metadata() -> BTreeMap<String, String> {
        let snapshot = "howdah-20261122T030000Z";
        let entry = entry(&status()).unwrap().to_value().unwrap();
        [
            (names::image_meta_key(snapshot), entry),
            (names::hold_meta_key(snapshot), r#""before the upgrade""#.to_owned()),
            ("csi.storage.k8s.io/pv/name".to_owned(), "pvc-1".to_owned()),
        ]
        .into()
    }

    fn snapshots() -> Vec<SnapshotRecord> {
        let snapshot = |name: &str, id| SnapshotRecord { name: name.to_owned(), id, size: 1 };
        vec![snapshot("before-upgrade", 3), snapshot("howdah-20261122T030000Z", 4)]
    }

    #[test]
    fn a_backup_is_read_back_with_its_class_and_evidence_under_the_images_present_name() {
        let found = read(&image("1a2b"), &snapshots(), &metadata(), now());
        let [Found::Backup(rebuilt)] = &found[..] else { panic!("{found:?}") };
        assert_eq!(rebuilt.hold.as_deref(), Some("before the upgrade"));
        let (read, written) = (&rebuilt.status, status());
        assert_eq!((read.phase, read.consistency), (Phase::Taken, Some(Consistency::Online)));
        assert_eq!(
            (&read.label, &read.slot, &read.snapshot),
            (&written.label, &written.slot, &written.snapshot)
        );
        assert_eq!(read.image, Some(image("1a2b")));
        assert_eq!(read.finished_at, Some(now()));
    }

    #[test]
    fn the_copy_that_a_clone_carries_is_passed_over() {
        assert!(read(&image("9f9f"), &[], &metadata(), now()).is_empty());
    }

    #[test]
    fn a_backup_of_several_images_is_brought_back_whole_or_not_at_all() {
        let own = SnapshotRecord { name: "howdah-20261122T030000Z".to_owned(), id: 7, size: 1 };
        let wal = PartRecord {
            volume: "wal".to_owned(),
            wal: true,
            image: ImageRecord { name: "csi-vol-2".to_owned(), ..image("9f9f") },
            snapshot: Some(own.clone()),
        };
        let entry = entry(&BackupStatus { parts: vec![wal], ..status() }).unwrap().to_value().unwrap();
        let metadata = [(names::image_meta_key(&own.name), entry)].into();
        let found = read(&image("1a2b"), &snapshots(), &metadata, now());
        let [Found::Backup(rebuilt)] = &found[..] else { panic!("{found:?}") };
        // The image of the part carries the entry, too, and tells nothing by itself.
        assert!(read(&image("9f9f"), std::slice::from_ref(&own), &metadata, now()).is_empty());

        let renamed = ImageRecord { name: "howdah-safety-2".to_owned(), ..image("9f9f") };
        let there = [("9f9f".to_owned(), (renamed.clone(), vec![own.clone()]))].into();
        let whole = rebuilt.as_ref().clone().find_parts(&there).unwrap();
        assert_eq!(whole.status.parts[0].image, renamed);
        let other = SnapshotRecord { id: 8, ..own };
        for images in [BTreeMap::new(), [("9f9f".to_owned(), (renamed, vec![other]))].into()] {
            let gone = rebuilt.as_ref().clone().find_parts(&images).unwrap_err();
            assert!(gone.contains("wal") && gone.contains("csi-vol-2@howdah-"), "{gone}");
        }
    }

    #[test]
    fn what_cannot_be_brought_back_says_why() {
        let mut metadata = metadata();
        metadata.insert(names::image_meta_key("howdah-20261123T030000Z"), "{}".to_owned());
        let unfinished = SnapshotRecord { name: "howdah-20261124T030000Z".to_owned(), id: 9, size: 1 };
        // A snapshot of the same name that was taken again is another one.
        let again = SnapshotRecord { name: "howdah-20261122T030000Z".to_owned(), id: 8, size: 1 };
        let found = read(&image("1a2b"), &[again, unfinished], &metadata, now());
        let reasons: Vec<&str> = found
            .iter()
            .map(|found| match found {
                Found::Nothing { reason, .. } => reason.as_str(),
                Found::Backup(_) => "a backup",
            })
            .collect();
        assert_eq!(reasons[0], "the snapshot itself is gone");
        assert!(reasons[1].starts_with("read the entry"), "{reasons:?}");
        assert!(reasons.len() == 3 && reasons[2].contains("not completed"), "{reasons:?}");
    }

    #[test]
    fn a_newer_format_is_refused() {
        let newer = Entry { format: FORMAT_OF_PARTS + 1, ..entry(&status()).unwrap() };
        assert!(Entry::from_value(&newer.to_value().unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn no_value_makes_the_reader_panic(value in "\\PC{0,200}") {
            let _ = Entry::from_value(&value);
        }
    }
}
