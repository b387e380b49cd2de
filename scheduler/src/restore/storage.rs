//! What a restore does in Ceph. Every step may be repeated: images are found by their ids, made images bear names of the
//! record's own. Each step is written for one image, and ends when it was done to all that the database lies in.

use std::collections::BTreeMap;

use howdah_adapters::ceph::{Ceph, CephError, IMAGE_ID_KEY};
use howdah_core::backup::{ImageRecord, Problem, SnapshotRecord};
use howdah_core::lineage::{self, Predecessor};
use howdah_core::names;
use howdah_core::restore::{Event, Goal, Method, Piece, RestoreStatus};

use super::{Restore, known, permanent, pieces, transient};
use crate::effects::of_ceph;

impl Restore<'_> {
    pub(super) async fn prepare(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let ceph = self.ceph().await?;
        let mut prepared = Vec::new();
        for piece in pieces(status)? {
            prepared.push(self.prepare_one(&ceph, status, &piece).await?);
        }
        Ok(Event::Prepared(prepared))
    }

    /// Makes the image that takes the place: the safety copy of an undo is there already, a backup is cloned.
    async fn prepare_one(
        &self,
        ceph: &Ceph,
        status: &RestoreStatus,
        piece: &Piece<'_>,
    ) -> Result<ImageRecord, Problem> {
        let incoming = if matches!(self.order.goal, Goal::Undo(_)) {
            let kept = known(&piece.incoming, "safety copy")?;
            let found = ceph.image_by_id(kept).await.map_err(of_ceph)?;
            ImageRecord { name: found.name, ..(*kept).clone() }
        } else {
            self.clone_backup(ceph, piece).await?
        };
        let open = ceph.watchers(&incoming.spec()).await.map_err(of_ceph)?;
        if let Some(watcher) = open.first() {
            return Err(transient(
                format!("{} is open on {}", incoming.spec(), watcher.address),
                "end what uses it: it is to take the place of the database's image",
            ));
        }
        self.inherit(ceph, status, piece.image, &incoming).await?;
        Ok(incoming)
    }

    /// Clones the snapshot from nothing: a clone that an earlier try left may be one that was cut off, which looks like an
    /// empty image.
    async fn clone_backup(&self, ceph: &Ceph, piece: &Piece<'_>) -> Result<ImageRecord, Problem> {
        let Piece { image, source_image: source, .. } = *piece;
        let snapshot = known(&piece.source_snapshot, "snapshot")?;
        let clone = ImageRecord { name: self.order.incoming_name(&image.name), ..image.clone() };
        let spec = clone.spec();
        let live = ceph.info(&image.spec()).await.map_err(of_ceph)?;
        // The source may have been renamed since the preflight, by hand.
        let from = ceph.image_by_id(source).await.map_err(of_ceph)?;
        let from = ImageRecord { name: from.name, ..source.clone() };
        // Since the preflight somebody may have started it.
        if self.record.spec.into.is_some() && ceph.used_bytes(&image.spec()).await.map_err(of_ceph)? > 0 {
            return Err(permanent(
                format!("the image {} was written to since the preflight", image.spec()),
                "see who started the StatefulSet, and name one that never ran",
            ));
        }
        ceph.remove_unused(&spec).await.map_err(of_ceph)?;
        ceph.clone_snapshot(&from.spec(), &snapshot.name, &spec, &live).await.map_err(of_ceph)?;
        let made = ceph.info(&spec).await.map_err(of_ceph)?;
        let children = ceph.children(&from.spec(), &snapshot.name).await.map_err(of_ceph)?;
        if !children.contains(&spec) || made.parent.is_none() {
            return Err(transient(
                format!("{spec} was cloned from {}@{} and is not its child", from.spec(), snapshot.name),
                "see the health of the Ceph cluster (ceph status)",
            ));
        }
        if made.size < live.size {
            // The volume was grown since the backup; the node grows the file system when it mounts it.
            ceph.grow(&spec, live.size).await.map_err(of_ceph)?;
        }
        Ok(ImageRecord { id: made.id, ..clone })
    }

    /// Lets the image that takes the place know what the one in place knows: what ceph-csi noted, and the lineage.
    async fn inherit(
        &self,
        ceph: &Ceph,
        status: &RestoreStatus,
        image: &ImageRecord,
        incoming: &ImageRecord,
    ) -> Result<(), Problem> {
        let old: BTreeMap<String, String> = ceph.metadata(&image.spec()).await.map_err(of_ceph)?;
        let new = ceph.metadata(&incoming.spec()).await.map_err(of_ceph)?;
        let mut wanted: BTreeMap<String, String> = old
            .into_iter()
            .filter(|(key, _)| !key.starts_with(names::ANNOTATION_PREFIX) || lineage::is_key(key))
            .collect();
        wanted.insert(lineage::key(&image.id), self.predecessor(status, image)?);
        wanted.remove(&lineage::key(&incoming.id));
        // The clone brings the metadata of the image it was made from. Of another database that would be its lineage, by
        // which this one would prune that one's backups.
        if self.record.spec.into.is_some() && !matches!(self.order.goal, Goal::Undo(_)) {
            for key in new.keys().filter(|key| !wanted.contains_key(*key)) {
                ceph.remove_metadata_at_rest(&incoming.spec(), key).await.map_err(of_ceph)?;
            }
        }
        for (key, value) in wanted.iter().filter(|(key, value)| new.get(*key) != Some(*value)) {
            ceph.set_metadata_at_rest(&incoming.spec(), key, value).await.map_err(of_ceph)?;
        }
        Ok(())
    }

    fn predecessor(&self, status: &RestoreStatus, image: &ImageRecord) -> Result<String, Problem> {
        let until = *known(&status.safety_until, "end of the safety copy's retention")?;
        let restore = format!("{}/{}", self.namespace(), self.order.name);
        let entry = Predecessor::new(self.order.aside_name(&image.name), restore, until);
        entry.to_value().map_err(|error| permanent(error, "report this as a bug"))
    }

    pub(super) async fn set_aside(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let ceph = self.ceph().await?;
        for Piece { image, .. } in pieces(status)? {
            ceph.give_name(image, &self.order.aside_name(&image.name)).await.map_err(of_ceph)?;
        }
        Ok(Event::SetAside)
    }

    pub(super) async fn place(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let ceph = self.ceph().await?;
        for piece in pieces(status)? {
            let incoming = known(&piece.incoming, "new image")?;
            ceph.give_name(incoming, &piece.image.name).await.map_err(of_ceph)?;
        }
        Ok(Event::Placed)
    }

    /// Tells ceph-csi which image each volume is now: with the old id it would purge the safety copy when the volume is
    /// deleted (field notes, lab C14).
    pub(super) async fn book(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let ceph = self.ceph().await?;
        for piece in pieces(status)? {
            note(&ceph, &piece, &known(&piece.incoming, "new image")?.id).await?;
        }
        Ok(Event::Booked)
    }

    pub(super) async fn safeguard(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let ceph = self.ceph().await?;
        let mut taken = Vec::new();
        for piece in pieces(status)? {
            taken.push(self.safeguard_one(&ceph, status, &piece).await?);
        }
        Ok(Event::Safeguarded(taken))
    }

    /// Takes the safety snapshot, and notes in the image how long it is kept.
    async fn safeguard_one(
        &self,
        ceph: &Ceph,
        status: &RestoreStatus,
        piece: &Piece<'_>,
    ) -> Result<SnapshotRecord, Problem> {
        let image = piece.image.spec();
        let name = self.order.safety_snapshot_name();
        match ceph.create_snapshot_at_rest(&image, &name).await {
            // Its name is of this record alone: an earlier try.
            Ok(()) | Err(CephError::AlreadyExists { .. }) => {}
            Err(error) => return Err(of_ceph(error)),
        }
        let until = known(&status.safety_until, "end of the safety copy's retention")?.to_string();
        ceph.set_metadata_at_rest(&image, &lineage::safety_key(&name), &until).await.map_err(of_ceph)?;
        let snapshots = ceph.snapshots(&image).await.map_err(of_ceph)?;
        let taken = snapshots.into_iter().find(|snapshot| snapshot.by_user && snapshot.name == name);
        let taken = taken.ok_or_else(|| {
            transient(
                format!("the snapshot {image}@{name} was taken but is not listed"),
                "look who else removes snapshots of this image",
            )
        })?;
        Ok(SnapshotRecord { name: taken.name, id: taken.id, size: taken.size })
    }

    pub(super) async fn roll_back(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let ceph = self.ceph().await?;
        for piece in pieces(status)? {
            overwrite(&ceph, &piece, &known(&piece.source_snapshot, "snapshot")?.name).await?;
        }
        Ok(Event::RolledBack)
    }

    /// Puts everything back, as far as it was changed.
    pub(super) async fn put_back(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let ceph = self.ceph().await?;
        for piece in pieces(status)? {
            match status.method.unwrap_or_default() {
                Method::Swap => self.put_image_back(&ceph, &piece, status.started).await?,
                Method::Rollback => self.put_data_back(&ceph, &piece).await?,
            }
        }
        Ok(Event::PutBack)
    }

    /// `started` says whether somebody may have written to what took the place.
    async fn put_image_back(&self, ceph: &Ceph, piece: &Piece<'_>, started: bool) -> Result<(), Problem> {
        let image = piece.image;
        if let Some(incoming) = piece.incoming {
            match ceph.give_name(incoming, &incoming.name).await {
                Ok(()) => {}
                // An earlier try removed it.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(of_ceph(error)),
            }
        }
        match ceph.give_name(image, &image.name).await {
            Ok(()) => note(ceph, piece, &image.id).await?,
            // Its volume was deleted meanwhile, with the namespace perhaps: nothing must be held up by that.
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(of_ceph(error)),
        }
        if matches!(self.order.goal, Goal::Undo(_)) {
            return Ok(());
        }
        let clone = ImageRecord { name: self.order.incoming_name(&image.name), ..image.clone() }.spec();
        let removed = match started {
            // It can be brought back from the trash.
            true => ceph.move_to_trash(&clone).await,
            false => ceph.remove_unused(&clone).await,
        };
        match removed {
            Ok(()) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(of_ceph(error)),
        }
    }

    async fn put_data_back(&self, ceph: &Ceph, piece: &Piece<'_>) -> Result<(), Problem> {
        match ceph.image_by_id(piece.image).await {
            Ok(_) => {}
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(of_ceph(error)),
        }
        // Those of all images are written down before the first object of any is overwritten. It stays as long as any safety
        // snapshot: a repeated try needs it.
        if let Some(safety) = piece.safety_snapshot {
            return overwrite(ceph, piece, &safety.name).await;
        }
        let name = self.order.safety_snapshot_name();
        let image = piece.image.spec();
        match ceph.remove_snapshot(&image, &name).await {
            Ok(()) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(of_ceph(error)),
        }
        ceph.remove_metadata(&image, &lineage::safety_key(&name)).await.map_err(of_ceph)
    }
}

/// Writes `id` into ceph-csi's journal, after a look that the volume's name means that image.
async fn note(ceph: &Ceph, piece: &Piece<'_>, id: &str) -> Result<(), Problem> {
    let spec = piece.image.spec();
    let named = ceph.info(&spec).await.map_err(of_ceph)?;
    if named.id != id {
        return Err(transient(
            format!("{spec} has the id {} where {id} is expected", named.id),
            "see who else renames images",
        ));
    }
    let Some(journal) = &piece.volume.journal else { return Ok(()) };
    let namespace = &journal.rados_namespace;
    ceph.set_journal_value(&journal.pool, namespace, &journal.object, IMAGE_ID_KEY, id).await.map_err(of_ceph)
}

async fn overwrite(ceph: &Ceph, piece: &Piece<'_>, snapshot: &str) -> Result<(), Problem> {
    let image = piece.image.spec();
    ceph.roll_back(&image, snapshot).await.map_err(of_ceph)?;
    // A rollback also takes back the size, which Kubernetes does not expect.
    if ceph.info(&image).await.map_err(of_ceph)?.size < piece.size {
        ceph.grow(&image, piece.size).await.map_err(of_ceph)?;
    }
    Ok(())
}
