//! Which images a database has lain in: a swap restore puts a clone in the place of the image, and the backups taken
//! before it stay behind as snapshots of the old one.
//!
//! The live image names its predecessors in its own metadata, one key each, by their immutable id. So a backup is
//! found by the id of its image, whatever that is called by now, and losing etcd loses none of it. A clone inherits
//! the metadata, and so the older predecessors.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Prefix of the keys; the id of a predecessor follows.
const KEY_PREFIX: &str = "howdah.dev/lineage/";
/// Prefix of the keys that say how long the safety snapshot of a rollback is kept; its name follows.
const SAFETY_PREFIX: &str = "howdah.dev/safety/";
/// Version of the format of [`Predecessor`].
const FORMAT: u32 = 1;
/// Longest value that is read: far above what [`Predecessor::to_value`] writes.
const VALUE_MAX: usize = 4096;

/// An image the database lay in before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Predecessor {
    /// Version of the format.
    pub format: u32,
    /// The name it was given when it was set aside. For humans: go by the id.
    pub name: String,
    /// The restore that set it aside, as namespace/name.
    pub restore: String,
    /// Until when it is kept in any case; after that as long as something depends on it.
    pub until: Timestamp,
}

impl Predecessor {
    /// A predecessor, as it is written now.
    #[must_use]
    pub fn new(name: String, restore: String, until: Timestamp) -> Self {
        Self { format: FORMAT, name, restore, until }
    }

    /// The value as it is written.
    ///
    /// # Errors
    /// If it cannot be written as JSON, or is longer than what is read back.
    pub fn to_value(&self) -> Result<String, String> {
        let value = serde_json::to_string(self).map_err(|error| format!("write the lineage: {error}"))?;
        if value.len() > VALUE_MAX {
            return Err(format!("keep the lineage's entry under {VALUE_MAX} bytes"));
        }
        Ok(value)
    }

    /// Reads a value back.
    ///
    /// # Errors
    /// Says why it is none: too long, not JSON of this form, or of a newer format.
    pub fn from_value(value: &str) -> Result<Self, String> {
        if value.len() > VALUE_MAX {
            return Err(format!("read a lineage entry of more than {VALUE_MAX} bytes"));
        }
        let found: Self =
            serde_json::from_str(value).map_err(|error| format!("read the lineage: {error}"))?;
        if found.format != FORMAT {
            return Err(format!("read a lineage entry of format {} where {FORMAT} is known", found.format));
        }
        Ok(found)
    }
}

/// The key of the image with this id.
#[must_use]
pub fn key(image_id: &str) -> String {
    format!("{KEY_PREFIX}{image_id}")
}

/// Whether a key of the metadata names a predecessor.
#[must_use]
pub fn is_key(key: &str) -> bool {
    key.starts_with(KEY_PREFIX)
}

/// The ids of the predecessors that the metadata of an image names. An entry that cannot be read still names one: the
/// id is in the key.
pub fn ids<'a>(metadata: impl IntoIterator<Item = (&'a String, &'a String)>) -> Vec<String> {
    metadata
        .into_iter()
        .filter_map(|(key, _)| key.strip_prefix(KEY_PREFIX))
        .filter(|id| !id.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The key that says until when a safety snapshot is kept; its value is the instant.
#[must_use]
pub fn safety_key(snapshot: &str) -> String {
    format!("{SAFETY_PREFIX}{snapshot}")
}

/// The safety snapshots that the metadata of an image names, and until when each is kept; `None` for one whose instant
/// cannot be read, which is kept.
pub fn safety_snapshots<'a>(
    metadata: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Vec<(String, Option<Timestamp>)> {
    metadata
        .into_iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(SAFETY_PREFIX)?.to_owned(), value.parse().ok())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn until() -> Timestamp {
        "2026-11-29T03:00:00Z".parse().unwrap()
    }

    #[test]
    fn a_predecessor_is_read_back_as_it_was_written() {
        let written = Predecessor::new("csi-vol-1.howdah-1a2b".to_owned(), "shop/r".to_owned(), until());
        assert_eq!(Predecessor::from_value(&written.to_value().unwrap()).unwrap(), written);
        let newer = Predecessor { format: FORMAT + 1, ..written };
        assert!(Predecessor::from_value(&newer.to_value().unwrap()).is_err());
        assert!(Predecessor::from_value("{").is_err());
        assert!(Predecessor::from_value(&"x".repeat(VALUE_MAX + 1)).is_err());
    }

    #[test]
    fn the_keys_name_the_images() {
        let metadata: BTreeMap<String, String> = [
            (key("1a2b"), "unreadable".to_owned()),
            (key(""), String::new()),
            ("howdah.dev/backup/howdah-20261122T030000Z".to_owned(), "{}".to_owned()),
            (safety_key("howdah-pre-restore-1"), until().to_string()),
            (safety_key("howdah-pre-restore-2"), "soon".to_owned()),
        ]
        .into();
        assert_eq!(ids(&metadata), ["1a2b"]);
        let safety = safety_snapshots(&metadata);
        assert_eq!(safety[0], ("howdah-pre-restore-1".to_owned(), Some(until())));
        assert_eq!(safety[1], ("howdah-pre-restore-2".to_owned(), None));
    }
}
