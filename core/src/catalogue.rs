//! The catalogue: the record of a backup a second time, in the metadata of the RBD image it lies in.
//!
//! Whoever loses etcd still has the volumes, and each volume says what its snapshots are.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::annotations::Consistency;
use crate::backup::{BackupStatus, Trigger};

/// Version of the format of [`Entry`].
const FORMAT: u32 = 1;
/// Longest entry: what one value of the metadata holds without trouble (`rbd image-meta` passes it as an argument).
pub const ENTRY_MAX: usize = 16 * 1024;

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
    /// Name of the snapshot.
    pub snapshot: String,
    /// Id of the snapshot.
    pub snapshot_id: u64,
    /// Id of the image; a copy of the metadata on another image shows by it.
    pub image_id: String,
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
    /// What `pg_backup_stop` returned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_lsn: Option<String>,
    /// The backup label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The tablespace map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spcmap: Option<String>,
}

impl Entry {
    /// The entry of a backup whose snapshot was taken; `None` when its record lacks the snapshot.
    #[must_use]
    pub fn of(
        namespace: &str,
        database: &str,
        backup: &str,
        trigger: Trigger,
        status: &BackupStatus,
    ) -> Option<Self> {
        let snapshot = status.snapshot.as_ref()?;
        Some(Self {
            format: FORMAT,
            namespace: namespace.to_owned(),
            database: database.to_owned(),
            backup: backup.to_owned(),
            slot: status.slot?,
            trigger,
            consistency: status.consistency?,
            snapshot: snapshot.name.clone(),
            snapshot_id: snapshot.id,
            image_id: status.image.as_ref()?.id.clone(),
            postgres_version: status.postgres_version.clone(),
            system_identifier: status.system_identifier.clone(),
            timeline: status.timeline,
            start_lsn: status.start_lsn.clone(),
            stop_lsn: status.stop_lsn.clone(),
            label: status.label.clone(),
            spcmap: status.spcmap.clone(),
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
        if entry.format != FORMAT {
            return Err(format!("read an entry of format {} where {FORMAT} is known", entry.format));
        }
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::{ImageRecord, SnapshotRecord};
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

    fn entry(status: &BackupStatus) -> Option<Entry> {
        Entry::of("shop", "pg", "pg-20261122030000", Trigger::Schedule, status)
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

    #[test]
    fn a_newer_format_is_refused() {
        let newer = Entry { format: FORMAT + 1, ..entry(&status()).unwrap() };
        assert!(Entry::from_value(&newer.to_value().unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn no_value_makes_the_reader_panic(value in "\\PC{0,200}") {
            let _ = Entry::from_value(&value);
        }
    }
}
