//! What a restore does in Ceph. Every step may be repeated: images are found by their ids, made images bear names of the
//! record's own.

use std::collections::BTreeMap;

use howdah_adapters::ceph::{Ceph, CephError, IMAGE_ID_KEY};
use howdah_core::backup::{ImageRecord, Problem, SnapshotRecord};
use howdah_core::lineage::{self, Predecessor};
use howdah_core::names;
use howdah_core::restore::{Event, Goal, Method, RestoreStatus};

use super::{Restore, known, permanent, transient};
use crate::effects::of_ceph;

impl Restore<'_> {
    /// Makes the image that takes the place: the safety copy of an undo is there already, a backup is cloned.
    pub(super) async fn prepare(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let ceph = self.ceph().await?;
        let image = known(&status.image, "image")?;
        let incoming = if matches!(self.order.goal, Goal::Undo(_)) {
            let kept = known(&status.incoming, "safety copy")?;
            let found = ceph.image_by_id(kept).await.map_err(of_ceph)?;
            ImageRecord { name: found.name, ..kept.clone() }
        } else {
            self.clone_backup(&ceph, status).await?
        };
        let open = ceph.watchers(&incoming.spec()).await.map_err(of_ceph)?;
        if let Some(watcher) = open.first() {
            return Err(transient(
                format!("{} is open on {}", incoming.spec(), watcher.address),
                "end what uses it: it is to take the place of the database's image",
            ));
        }
        self.inherit(&ceph, status, image, &incoming).await?;
        Ok(Event::Prepared(incoming))
    }

    /// Clones the snapshot from nothing: a clone that an earlier try left may be one that was cut off, which looks like an
    /// empty image.
    async fn clone_backup(&self, ceph: &Ceph, status: &RestoreStatus) -> Result<ImageRecord, Problem> {
        let image = known(&status.image, "image")?;
        let source = known(&status.source, "backup")?;
        let snapshot = known(&source.snapshot, "snapshot")?;
        let clone = ImageRecord { name: self.order.incoming_name(&image.name), ..image.clone() };
        let spec = clone.spec();
        let live = ceph.info(&image.spec()).await.map_err(of_ceph)?;
        // The source may have been renamed since the preflight, by hand.
        let from = ceph.image_by_id(&source.image).await.map_err(of_ceph)?;
        let from = ImageRecord { name: from.name, ..source.image.clone() };
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
        let image = known(&status.image, "image")?;
        let name = self.order.aside_name(&image.name);
        self.ceph().await?.give_name(image, &name).await.map_err(of_ceph)?;
        Ok(Event::SetAside)
    }

    pub(super) async fn place(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let (image, incoming) = (known(&status.image, "image")?, known(&status.incoming, "new image")?);
        self.ceph().await?.give_name(incoming, &image.name).await.map_err(of_ceph)?;
        Ok(Event::Placed)
    }

    /// Tells ceph-csi which image the volume is now: with the old id it would purge the safety copy when the volume is
    /// deleted (field notes, lab C14).
    pub(super) async fn book(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let (image, incoming) = (known(&status.image, "image")?, known(&status.incoming, "new image")?);
        self.note(status, image, &incoming.id).await?;
        Ok(Event::Booked)
    }

    /// Writes `id` into ceph-csi's journal, after a look that the volume's name means that image.
    async fn note(&mut self, status: &RestoreStatus, image: &ImageRecord, id: &str) -> Result<(), Problem> {
        let ceph = self.ceph().await?;
        let named = ceph.info(&image.spec()).await.map_err(of_ceph)?;
        if named.id != id {
            return Err(transient(
                format!("{} has the id {} where {id} is expected", image.spec(), named.id),
                "see who else renames images",
            ));
        }
        let volume = known(&status.volume, "volume")?;
        let Some(journal) = &volume.journal else { return Ok(()) };
        let namespace = &journal.rados_namespace;
        ceph.set_journal_value(&journal.pool, namespace, &journal.object, IMAGE_ID_KEY, id)
            .await
            .map_err(of_ceph)
    }

    /// Takes the safety snapshot, and notes in the image how long it is kept.
    pub(super) async fn safeguard(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let ceph = self.ceph().await?;
        let image = known(&status.image, "image")?.spec();
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
                format!("the snapshot {name} was taken but is not listed"),
                "look who else removes snapshots of this image",
            )
        })?;
        Ok(Event::Safeguarded(SnapshotRecord { name: taken.name, id: taken.id, size: taken.size }))
    }

    pub(super) async fn roll_back(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let source = known(&status.source, "backup")?;
        let snapshot = known(&source.snapshot, "snapshot")?.name.clone();
        self.overwrite(status, &snapshot).await?;
        Ok(Event::RolledBack)
    }

    async fn overwrite(&mut self, status: &RestoreStatus, snapshot: &str) -> Result<(), Problem> {
        let ceph = self.ceph().await?;
        let image = known(&status.image, "image")?.spec();
        ceph.roll_back(&image, snapshot).await.map_err(of_ceph)?;
        // A rollback also takes back the size, which Kubernetes does not expect.
        let (found, size) = (ceph.info(&image).await.map_err(of_ceph)?.size, *known(&status.size, "size")?);
        if found < size {
            ceph.grow(&image, size).await.map_err(of_ceph)?;
        }
        Ok(())
    }

    /// Puts everything back, as far as it was changed.
    pub(super) async fn put_back(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        match status.method.unwrap_or_default() {
            Method::Swap => self.put_image_back(status).await?,
            Method::Rollback => self.put_data_back(status).await?,
        }
        Ok(Event::PutBack)
    }

    async fn put_image_back(&mut self, status: &RestoreStatus) -> Result<(), Problem> {
        let ceph = self.ceph().await?;
        let image = known(&status.image, "image")?;
        if let Some(incoming) = &status.incoming {
            match ceph.give_name(incoming, &incoming.name).await {
                Ok(()) => {}
                // An earlier try removed it.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(of_ceph(error)),
            }
        }
        match ceph.give_name(image, &image.name).await {
            Ok(()) => self.note(status, image, &image.id).await?,
            // Its volume was deleted meanwhile, with the namespace perhaps: nothing must be held up by that.
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(of_ceph(error)),
        }
        if matches!(self.order.goal, Goal::Undo(_)) {
            return Ok(());
        }
        let clone = ImageRecord { name: self.order.incoming_name(&image.name), ..image.clone() }.spec();
        let removed = match status.started {
            // Somebody may have written to it: it can be brought back from the trash.
            true => ceph.move_to_trash(&clone).await,
            false => ceph.remove_unused(&clone).await,
        };
        match removed {
            Ok(()) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(of_ceph(error)),
        }
    }

    async fn put_data_back(&mut self, status: &RestoreStatus) -> Result<(), Problem> {
        match self.ceph().await?.image_by_id(known(&status.image, "image")?).await {
            Ok(_) => {}
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(of_ceph(error)),
        }
        // It is written down before the first object is overwritten. It stays as long as any safety snapshot: a repeated
        // try needs it.
        if let Some(safety) = &status.safety_snapshot {
            return self.overwrite(status, &safety.name).await;
        }
        let name = self.order.safety_snapshot_name();
        let ceph = self.ceph().await?;
        let image = known(&status.image, "image")?.spec();
        match ceph.remove_snapshot(&image, &name).await {
            Ok(()) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(of_ceph(error)),
        }
        ceph.remove_metadata(&image, &lineage::safety_key(&name)).await.map_err(of_ceph)
    }
}
