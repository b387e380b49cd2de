//! The images of one restore, each in the same form: every step does to the further volumes what it does to the one with
//! the data directory.

use super::record::{RestoreStatus, RestoredPart, VolumeRecord};
use crate::backup::{ImageRecord, SnapshotRecord};

/// What the record says of one image that is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The name of the pod's volume; `None` for the one with the data directory.
    pub name: Option<&'a str>,
    /// The volume.
    pub volume: &'a VolumeRecord,
    /// The image that was in place before.
    pub image: &'a ImageRecord,
    /// Its size in bytes.
    pub size: u64,
    /// The image that is restored, by the name it had in the preflight.
    pub source_image: &'a ImageRecord,
    /// Its snapshot; `None` where the whole image is the source.
    pub source_snapshot: Option<&'a SnapshotRecord>,
    /// Swap: the image that takes the place, once there is one.
    pub incoming: Option<&'a ImageRecord>,
    /// Rollback: the safety snapshot, once those of all images are there.
    pub safety_snapshot: Option<&'a SnapshotRecord>,
}

impl RestoreStatus {
    /// Every image that is restored: the one with the data directory, then the others in the order of `parts`. `None`
    /// until a preflight has passed.
    #[must_use]
    pub fn pieces(&self) -> Option<Vec<Piece<'_>>> {
        let source = self.source.as_ref()?;
        let data = Piece {
            name: None,
            volume: self.volume.as_ref()?,
            image: self.image.as_ref()?,
            size: self.size?,
            source_image: &source.image,
            source_snapshot: source.snapshot.as_ref(),
            incoming: self.incoming.as_ref(),
            safety_snapshot: self.safety_snapshot.as_ref(),
        };
        Some(std::iter::once(data).chain(self.parts.iter().map(Piece::of_part)).collect())
    }
}

impl<'a> Piece<'a> {
    fn of_part(part: &'a RestoredPart) -> Self {
        Self {
            name: Some(&part.name),
            volume: &part.volume,
            image: &part.image,
            size: part.size,
            source_image: &part.source_image,
            source_snapshot: part.source_snapshot.as_ref(),
            incoming: part.incoming.as_ref(),
            safety_snapshot: part.safety_snapshot.as_ref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn image(name: &str) -> Value {
        json!({"pool": "p", "name": name, "id": format!("id-of-{name}")})
    }

    /// As a record of a database on one volume has always been.
    fn on_one_volume() -> Value {
        json!({
            "phase": "Preparing", "attempt": 1, "method": "swap", "size": 4096, "image": image("csi-vol-1"),
            "source": {"name": "db-1", "image": image("old"), "snapshot": {"name": "s", "id": 4, "size": 4096}},
            "volume": {"claim": "data-db-0", "volume": "pvc-1"}
        })
    }

    fn status(value: Value) -> RestoreStatus {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_record_without_parts_is_of_one_image() {
        let status = status(on_one_volume());
        let pieces = status.pieces().unwrap();
        let [piece] = &pieces[..] else { panic!("{pieces:?}") };
        assert_eq!((piece.name, piece.image.name.as_str(), piece.size), (None, "csi-vol-1", 4096));
        assert_eq!(piece.source_snapshot.unwrap().id, 4);
        assert!(serde_json::to_value(&status).unwrap().get("parts").is_none());
    }

    #[test]
    fn the_parts_follow_in_their_order() {
        let part = |name: &str| {
            json!({"name": name, "volume": {"claim": format!("{name}-db-0"), "volume": format!("pvc-{name}")},
                "image": image(name), "size": 1, "sourceImage": image(&format!("old-{name}"))})
        };
        let mut value = on_one_volume();
        value["parts"] = json!([part("wal"), part("fast")]);
        let status = status(value);
        let pieces = status.pieces().unwrap();
        let sources: Vec<_> =
            pieces.iter().map(|piece| (piece.name, piece.source_image.name.as_str())).collect();
        assert_eq!(sources, [(None, "old"), (Some("wal"), "old-wal"), (Some("fast"), "old-fast")]);
    }

    #[test]
    fn before_a_preflight_has_passed_nothing_is_restored() {
        assert_eq!(RestoreStatus::default().pieces(), None);
    }
}
