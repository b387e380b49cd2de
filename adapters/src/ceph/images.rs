//! Whole images: found by their immutable id, renamed, cloned, rolled back, moved to the trash.
//!
//! A restore may die anywhere and be repeated, and what a killed `rbd` leaves is half done: so [`Ceph::give_name`] goes by
//! ids and mends a rename that was cut off, and a clone that was cut off is not used but made again.

use std::time::Duration;

use howdah_core::backup::ImageRecord;
use serde::Deserialize;

use super::{Ceph, CephError, ImageInfo, WRITE_LIMIT, part, spec};

/// How long a rollback may take: it overwrites every object of the image, 262144 for 1 TiB, some hundred a second.
pub const ROLLBACK_LIMIT: Duration = Duration::from_secs(6 * 3600);

/// How long removing a clone may take that was never written to; Ceph deletes objects that could exist one by one.
const REMOVE_LIMIT: Duration = Duration::from_secs(600);

/// Breaks the lock of a client that is gone (has no watch) without blocklisting it, which we may not. Only for images
/// of which it is proven that nobody else works on them: then the client was an `rbd` of ours that was killed.
const BREAK_OWN_LOCK: &str = "--rbd_blocklist_on_break_lock=false";

/// The features that can be chosen when an image is made; `rbd info` also lists what follows from the image's state.
const FEATURES: [&str; 5] = ["layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten"];

/// Where an image's data came from, as `rbd info` says it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Parent {
    /// The pool of the parent.
    pub pool: String,
    /// Its rados namespace.
    #[serde(default)]
    pub pool_namespace: String,
    /// Its name.
    pub image: String,
}

impl Parent {
    /// The parent as the `rbd` command takes it.
    #[must_use]
    pub fn spec(&self) -> String {
        if self.pool_namespace.is_empty() {
            return format!("{}/{}", self.pool, self.image);
        }
        format!("{}/{}/{}", self.pool, self.pool_namespace, self.image)
    }
}

#[derive(Deserialize)]
struct UsageAnswer {
    images: Vec<UsedAnswer>,
}

#[derive(Deserialize)]
struct UsedAnswer {
    used_size: u64,
}

impl Ceph {
    /// How many bytes the image and its snapshots use, in whole objects: 0 for one that nobody has written to, not even a
    /// file system.
    ///
    /// # Errors
    /// See [`CephError`].
    pub async fn used_bytes(&self, image: &str) -> Result<u64, CephError> {
        let attempt = format!("see how much of {image} is used");
        let answer: UsageAnswer = self.read(&["disk-usage", spec(image)?], &attempt).await?;
        match answer.images.as_slice() {
            [] => Err(CephError::NotFound { attempt }),
            images => Ok(images.iter().map(|image| image.used_size).sum()),
        }
    }

    /// The image with the id of `image`, whatever it is called now.
    ///
    /// # Errors
    /// See [`CephError`]; one in the trash is not found.
    pub async fn image_by_id(&self, image: &ImageRecord) -> Result<ImageInfo, CephError> {
        let attempt = format!("find the image with the id {} in {}", image.id, image.pool);
        let mut arguments = vec!["info", "--pool", part(&image.pool)?];
        if !image.rados_namespace.is_empty() {
            arguments.extend(["--namespace", part(&image.rados_namespace)?]);
        }
        arguments.extend(["--image-id", part(&image.id)?]);
        let found: ImageInfo = self.read(&arguments, &attempt).await?;
        // An image in the trash opens by its id, too, with the name it had.
        let named = ImageRecord { name: found.name.clone(), ..image.clone() };
        match self.info(&named.spec()).await {
            Ok(by_name) if by_name.id == image.id => Ok(by_name),
            Ok(_) => Err(CephError::NotFound { attempt }),
            Err(error) => Err(error),
        }
    }

    /// Lets the image with the id of `image` bear `name`; done already is done.
    ///
    /// # Errors
    /// [`CephError::AlreadyExists`] when another image bears it; else see [`CephError`].
    pub async fn give_name(&self, image: &ImageRecord, name: &str) -> Result<(), CephError> {
        let found = self.image_by_id(image).await?;
        if found.name == name {
            return Ok(());
        }
        let from = ImageRecord { name: found.name, ..image.clone() }.spec();
        let to = ImageRecord { name: name.to_owned(), ..image.clone() };
        let attempt = format!("rename the image {from} to {name}");
        let to_spec = to.spec();
        let arguments = ["mv", spec(&from)?, spec(&to_spec)?];
        match self.run("rbd", &arguments, WRITE_LIMIT, &attempt).await {
            Err(CephError::AlreadyExists { .. }) if self.forget_half_a_rename(&to).await? => {
                self.run("rbd", &arguments, WRITE_LIMIT, &attempt).await.map(drop)
            }
            other => other.map(drop),
        }
    }

    /// A rename writes the new name's object, then the pool's directory, then removes the old name's object. One that was
    /// killed in between leaves an object of a name that the directory does not know; it stands in the way of the next.
    async fn forget_half_a_rename(&self, image: &ImageRecord) -> Result<bool, CephError> {
        let (pool, namespace) = (image.pool.as_str(), image.rados_namespace.as_str());
        let key = format!("name_{}", image.name);
        let attempt = format!("look whether the pool's directory knows {}", image.name);
        if self.omap_value(pool, namespace, "rbd_directory", &key, &attempt).await?.is_some() {
            return Ok(false);
        }
        let attempt = format!("remove what a cut-off rename left of the name {}", image.name);
        let object = format!("rbd_id.{}", image.name);
        self.rados(pool, namespace, &["rm", part(&object)?], WRITE_LIMIT, &attempt).await?;
        Ok(true)
    }

    /// Clones a snapshot into a new image with the features and the data pool that `like` has. The clone inherits the
    /// metadata of its parent.
    ///
    /// # Errors
    /// See [`CephError`]. After any error what was made is not to be used.
    pub async fn clone_snapshot(
        &self,
        image: &str,
        snapshot: &str,
        clone: &str,
        like: &ImageInfo,
    ) -> Result<(), CephError> {
        let attempt = format!("clone {image}@{snapshot} to {clone}");
        let source = format!("{}@{}", spec(image)?, part(snapshot)?);
        let mut arguments = vec!["clone", "--rbd-default-clone-format", "2"];
        for feature in like.features.iter().filter(|feature| FEATURES.contains(&feature.as_str())) {
            arguments.extend(["--image-feature", feature]);
        }
        if let Some(pool) = &like.data_pool {
            arguments.extend(["--data-pool", part(pool)?]);
        }
        arguments.extend([source.as_str(), spec(clone)?]);
        self.run("rbd", &arguments, WRITE_LIMIT, &attempt).await.map(drop)
    }

    /// Grows an image that nobody uses.
    ///
    /// # Errors
    /// See [`CephError`].
    pub async fn grow(&self, image: &str, bytes: u64) -> Result<(), CephError> {
        let attempt = format!("grow {image} to {bytes} bytes");
        let size = format!("{bytes}B");
        let arguments = [BREAK_OWN_LOCK, "resize", "--no-progress", "--size", &size, spec(image)?];
        self.run("rbd", &arguments, WRITE_LIMIT, &attempt).await.map(drop)
    }

    /// Sets a key of the metadata of an image that nobody uses.
    ///
    /// # Errors
    /// See [`CephError`].
    pub async fn set_metadata_at_rest(&self, image: &str, key: &str, value: &str) -> Result<(), CephError> {
        let attempt = format!("set the metadata {key} of {image}");
        let arguments = [BREAK_OWN_LOCK, "image-meta", "set", spec(image)?, part(key)?, value];
        self.run("rbd", &arguments, WRITE_LIMIT, &attempt).await.map(drop)
    }

    /// Removes a key that is there from the metadata of an image that nobody uses.
    ///
    /// # Errors
    /// See [`CephError`].
    pub async fn remove_metadata_at_rest(&self, image: &str, key: &str) -> Result<(), CephError> {
        let attempt = format!("remove the metadata {key} of {image}");
        let arguments = [BREAK_OWN_LOCK, "image-meta", "rm", spec(image)?, part(key)?];
        self.run("rbd", &arguments, WRITE_LIMIT, &attempt).await.map(drop)
    }

    /// Removes an image of our own that was never used; one that is not there is no error.
    ///
    /// # Errors
    /// See [`CephError`]; [`CephError::Busy`] while the watch of a killed `rbd` lasts, which is 30 s.
    pub async fn remove_unused(&self, image: &str) -> Result<(), CephError> {
        let attempt = format!("remove the unused image {image}");
        let arguments = [BREAK_OWN_LOCK, "rm", "--no-progress", spec(image)?];
        match self.run("rbd", &arguments, REMOVE_LIMIT, &attempt).await {
            Ok(_) | Err(CephError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Moves an image to the trash, from where it can be brought back until somebody purges it.
    ///
    /// # Errors
    /// See [`CephError`].
    pub async fn move_to_trash(&self, image: &str) -> Result<(), CephError> {
        let attempt = format!("move {image} to the trash");
        self.run("rbd", &["trash", "mv", spec(image)?], WRITE_LIMIT, &attempt).await.map(drop)
    }

    /// Takes a snapshot of an image that nobody uses; see [`Ceph::create_snapshot`].
    ///
    /// # Errors
    /// See [`CephError`].
    pub async fn create_snapshot_at_rest(&self, image: &str, snapshot: &str) -> Result<(), CephError> {
        let attempt = format!("take the snapshot {image}@{snapshot}");
        let full = format!("{}@{}", spec(image)?, part(snapshot)?);
        let arguments = [BREAK_OWN_LOCK, "snap", "create", "--no-progress", &full];
        self.run("rbd", &arguments, WRITE_LIMIT, &attempt).await.map(drop)
    }

    /// Overwrites an image that nobody uses with one of its snapshots. Until it has ended well the image holds a
    /// mixture; repeating it completes it.
    ///
    /// # Errors
    /// See [`CephError`].
    pub async fn roll_back(&self, image: &str, snapshot: &str) -> Result<(), CephError> {
        let attempt = format!("roll {image} back to {snapshot}");
        let full = format!("{}@{}", spec(image)?, part(snapshot)?);
        let arguments = [BREAK_OWN_LOCK, "snap", "rollback", "--no-progress", &full];
        self.run("rbd", &arguments, ROLLBACK_LIMIT, &attempt).await.map(drop)
    }
}
