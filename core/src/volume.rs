//! From a PersistentVolume to the RBD image behind it, by the rules of ceph-csi.
//!
//! Sources: ceph-csi `internal/rbd/controllerserver.go` (the volume context), `internal/util/volid.go` (the handle),
//! `internal/journal/voljournal.go` (names). Volumes that these rules do not explain are refused with a reason: a
//! guessed image name could be somebody else's image.

use std::collections::BTreeMap;

use thiserror::Error;

/// The driver name of ceph-csi for RBD; Rook puts its operator's namespace and a dot before it.
pub const RBD_DRIVER: &str = "rbd.csi.ceph.com";
/// The image name prefix of ceph-csi where the class sets no `volumeNamePrefix`.
const DEFAULT_IMAGE_PREFIX: &str = "csi-vol-";
/// The handle of a volume that was migrated from the in-tree provisioner begins with this.
const MIGRATED_HANDLE_PREFIX: &str = "mig_";
/// Before the uuid in the name of ceph-csi's omap object.
const JOURNAL_OBJECT_PREFIX: &str = "csi.volume.";
/// Kubernetes' own, removed, RBD volume plug-in.
const IN_TREE_PROVISIONER: &str = "kubernetes.io/rbd";

/// Whether a CSI driver or provisioner name is ceph-csi's RBD driver, with or without Rook's prefix.
#[must_use]
pub fn is_rbd_driver(name: &str) -> bool {
    name.strip_suffix(RBD_DRIVER)
        .is_some_and(|prefix| prefix.is_empty() || (prefix.len() > 1 && prefix.ends_with('.')))
}

/// What this module needs to know of a PersistentVolume; the adapter copies it out of the API object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PersistentVolumeFacts {
    /// The PersistentVolume's name.
    pub name: String,
    /// `spec.csi.driver`; none for a volume that is not CSI.
    pub driver: Option<String>,
    /// `spec.csi.volumeHandle`.
    pub volume_handle: String,
    /// `spec.csi.volumeAttributes`.
    pub attributes: BTreeMap<String, String>,
    /// The parameters of the volume's StorageClass, if the class still exists.
    pub class_parameters: BTreeMap<String, String>,
    /// Whether `spec.rbd` (the in-tree plug-in) is set.
    pub in_tree_rbd: bool,
}

/// Where a volume's data lies, and how nodes map it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdVolume {
    /// The PersistentVolume's name.
    pub volume: String,
    /// The CSI driver's name.
    pub driver: String,
    /// Which Ceph cluster: in Rook the namespace of the CephCluster.
    pub cluster_id: String,
    /// The pool of the image's header.
    pub pool: String,
    /// The rados namespace inside the pool; empty for the default one.
    pub rados_namespace: String,
    /// The image's name. Names survive a re-creation, so record the image id (`rbd info`) next to it.
    pub image: String,
    /// `mapOptions`, e.g. `krbd:noshare`; empty where none are set.
    pub map_options: String,
    /// Whether ceph-csi encrypts the volume; a raw clone of it loses its key.
    pub encrypted: bool,
    /// Whether the volume was made by hand, so that CSI snapshots and resizing do not work on it.
    pub static_volume: bool,
    /// Where ceph-csi keeps its books of the volume; `None` for a static one, of which it keeps none.
    pub journal: Option<Journal>,
}

/// The omap object in which ceph-csi keeps its books of a volume. Its key `csi.imageid` decides what is deleted with
/// the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journal {
    /// The pool of the object; it may be another than the image's.
    pub pool: String,
    /// The object.
    pub object: String,
}

impl RbdVolume {
    /// The image as the `rbd` command takes it: `pool/image` or `pool/namespace/image`.
    #[must_use]
    pub fn image_spec(&self) -> String {
        if self.rados_namespace.is_empty() {
            return format!("{}/{}", self.pool, self.image);
        }
        format!("{}/{}/{}", self.pool, self.rados_namespace, self.image)
    }

    /// Whether nodes take the exclusive lock for good (`mapOptions` holds `exclusive`): then no other client can
    /// snapshot the image while it is mapped.
    #[must_use]
    pub fn mapped_exclusively(&self) -> bool {
        has_map_option(&self.map_options, "exclusive")
    }
}

/// Whether the `mapOptions` of a class or a volume give `option` to the kernel's client.
#[must_use]
pub fn has_map_option(map_options: &str, option: &str) -> bool {
    // `krbd:a,b;nbd:c`, or `a,b` without a mounter, which means krbd (ceph-csi internal/rbd/rbd_attach.go).
    map_options
        .split(';')
        .filter_map(|part| match part.trim().split_once(':') {
            Some(("krbd", options)) => Some(options),
            Some(_) => None,
            None => Some(part),
        })
        .flat_map(|options| options.split(','))
        .any(|found| found.trim() == option)
}

/// Why a volume has no image that howdah can use.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum VolumeError {
    /// Not RBD at all.
    #[error("volume {volume} is of driver {driver:?}: howdah works on RBD volumes only (*.{RBD_DRIVER})")]
    NotRbd {
        /// The PersistentVolume's name.
        volume: String,
        /// The driver found, or `none`.
        driver: String,
    },
    /// A volume of the removed in-tree plug-in, or one that was migrated from it.
    #[error(
        "volume {volume} comes from the in-tree provisioner {IN_TREE_PROVISIONER}: its handle names no image; copy the data to a volume of the CSI driver"
    )]
    Migrated {
        /// The PersistentVolume's name.
        volume: String,
    },
    /// A field is missing or does not parse.
    #[error("volume {volume} names no {what}: {detail}")]
    Incomplete {
        /// The PersistentVolume's name.
        volume: String,
        /// What could not be found.
        what: &'static str,
        /// Where it was looked for, and the fix if there is one.
        detail: String,
    },
}

/// A decoded `volumeHandle` of a volume that ceph-csi provisioned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeHandle {
    /// Which Ceph cluster.
    pub cluster_id: String,
    /// The pool's number (`ceph osd pool ls detail`).
    pub pool_id: u64,
    /// The uuid that image and journal object names end with.
    pub uuid: String,
}

impl VolumeHandle {
    /// Decodes `version(4 hex)-length(4 hex)-clusterID-poolID(16 hex)-uuid(36)`; none if the handle is not of that form.
    #[must_use]
    pub fn decode(handle: &str) -> Option<Self> {
        let (version, rest) = handle.split_once('-')?;
        let (length, rest) = rest.split_once('-')?;
        if version != "0001" || length.len() != 4 {
            return None;
        }
        let length = usize::from_str_radix(length, 16).ok()?;
        let cluster_id = rest.get(..length)?;
        let (pool_id, uuid) = rest.get(length..)?.strip_prefix('-')?.split_once('-')?;
        if cluster_id.is_empty() || pool_id.len() != 16 || !is_uuid(uuid) {
            return None;
        }
        let pool_id = u64::from_str_radix(pool_id, 16).ok()?;
        Some(Self { cluster_id: cluster_id.to_owned(), pool_id, uuid: uuid.to_owned() })
    }
}

fn is_uuid(text: &str) -> bool {
    const GROUP_LENGTHS: [usize; 5] = [8, 4, 4, 4, 12];
    let groups: Vec<&str> = text.split('-').collect();
    groups.len() == GROUP_LENGTHS.len()
        && groups.iter().zip(GROUP_LENGTHS).all(|(group, length)| {
            group.len() == length && group.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
}

/// Finds the image of a PersistentVolume.
///
/// # Errors
/// If the volume is not an RBD volume of ceph-csi, or does not say which image it is.
pub fn resolve(facts: &PersistentVolumeFacts) -> Result<RbdVolume, VolumeError> {
    let volume = facts.name.clone();
    let driver = match facts.driver.as_deref() {
        Some(driver) if is_rbd_driver(driver) => driver.to_owned(),
        _ if facts.in_tree_rbd => return Err(VolumeError::Migrated { volume }),
        other => return Err(VolumeError::NotRbd { volume, driver: other.unwrap_or("none").to_owned() }),
    };
    if facts.volume_handle.starts_with(MIGRATED_HANDLE_PREFIX) {
        return Err(VolumeError::Migrated { volume });
    }

    let attribute = |key: &str| facts.attributes.get(key).filter(|value| !value.is_empty()).cloned();
    let of_class = |key: &str| facts.class_parameters.get(key).filter(|value| !value.is_empty()).cloned();
    let static_volume = facts.attributes.get("staticVolume").is_some_and(|value| value == "true");
    let handle = if static_volume { None } else { VolumeHandle::decode(&facts.volume_handle) };

    let image = match (static_volume, attribute("imageName"), &handle) {
        // A static volume's handle is its image's name; ceph-csi looks at nothing else.
        (true, _, _) => facts.volume_handle.clone(),
        (false, Some(name), _) => name,
        (false, None, Some(handle)) => {
            let prefix = of_class("volumeNamePrefix").unwrap_or_else(|| DEFAULT_IMAGE_PREFIX.to_owned());
            format!("{prefix}{}", handle.uuid)
        }
        (false, None, None) => String::new(),
    };
    if image.is_empty() {
        let detail = format!(
            "spec.csi.volumeAttributes has no imageName and volumeHandle {:?} is not one of ceph-csi's",
            facts.volume_handle
        );
        return Err(VolumeError::Incomplete { volume, what: "image", detail });
    }
    let Some(pool) = attribute("pool").or_else(|| of_class("pool")) else {
        let number = handle
            .as_ref()
            .map_or(String::new(), |handle| format!(" (its handle says pool {})", handle.pool_id));
        let detail =
            format!("neither spec.csi.volumeAttributes nor its StorageClass has the key pool{number}");
        return Err(VolumeError::Incomplete { volume, what: "pool", detail });
    };
    let journal = handle.as_ref().map(|handle| Journal {
        pool: attribute("journalPool").unwrap_or_else(|| pool.clone()),
        object: format!("{JOURNAL_OBJECT_PREFIX}{}", handle.uuid),
    });
    let cluster_id = attribute("clusterID")
        .or_else(|| handle.map(|handle| handle.cluster_id))
        .or_else(|| of_class("clusterID"))
        .unwrap_or_default();
    let encrypted =
        attribute("encrypted").or_else(|| of_class("encrypted")).is_some_and(|value| value == "true");
    Ok(RbdVolume {
        volume,
        driver,
        cluster_id,
        pool,
        rados_namespace: attribute("radosNamespace").unwrap_or_default(),
        image,
        // A dynamic volume carries its class's parameters of the day it was made, and those are what nodes use.
        map_options: attribute("mapOptions").or_else(|| of_class("mapOptions")).unwrap_or_default(),
        encrypted,
        static_volume,
        journal,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "8c6f9e5e-7c1b-4f0e-9a53-0a3f4c1d2e3f";

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn dynamic() -> PersistentVolumeFacts {
        PersistentVolumeFacts {
            name: "pvc-1".to_owned(),
            driver: Some("rook-ceph.rbd.csi.ceph.com".to_owned()),
            volume_handle: format!("0001-0009-rook-ceph-0000000000000001-{UUID}"),
            attributes: map(&[
                ("clusterID", "rook-ceph"),
                ("pool", "replicapool"),
                ("journalPool", "replicapool"),
                ("imageName", "csi-vol-from-attributes"),
                ("imageFormat", "2"),
                ("storage.kubernetes.io/csiProvisionerIdentity", "1-1-rook-ceph.rbd.csi.ceph.com"),
            ]),
            ..PersistentVolumeFacts::default()
        }
    }

    #[test]
    fn only_ceph_csis_rbd_driver_is_accepted() {
        for name in ["rbd.csi.ceph.com", "rook-ceph.rbd.csi.ceph.com", "a.b.rbd.csi.ceph.com"] {
            assert!(is_rbd_driver(name), "{name}");
        }
        for name in [
            "",
            ".rbd.csi.ceph.com",
            "xrbd.csi.ceph.com",
            "rook-ceph.cephfs.csi.ceph.com",
            "rbd.csi.ceph.com.evil",
        ] {
            assert!(!is_rbd_driver(name), "{name}");
        }
        let facts = PersistentVolumeFacts { driver: Some("ebs.csi.aws.com".to_owned()), ..dynamic() };
        assert!(
            matches!(resolve(&facts), Err(VolumeError::NotRbd { driver, .. }) if driver == "ebs.csi.aws.com")
        );
        let facts = PersistentVolumeFacts { driver: None, ..dynamic() };
        assert!(matches!(resolve(&facts), Err(VolumeError::NotRbd { .. })));
    }

    #[test]
    fn a_dynamic_volume_says_everything_in_its_attributes() {
        let found = resolve(&dynamic()).unwrap();
        assert_eq!(found.image_spec(), "replicapool/csi-vol-from-attributes");
        assert_eq!(found.cluster_id, "rook-ceph");
        assert_eq!(found.map_options, "");
        let journal = found.journal.as_ref().unwrap();
        assert_eq!((journal.pool.as_str(), &journal.object), ("replicapool", &format!("csi.volume.{UUID}")));
        assert!(!found.static_volume && !found.encrypted && !found.mapped_exclusively());
    }

    #[test]
    fn a_rados_namespace_is_part_of_the_image_spec() {
        let mut facts = dynamic();
        facts.attributes.insert("radosNamespace".to_owned(), "tenant".to_owned());
        assert_eq!(resolve(&facts).unwrap().image_spec(), "replicapool/tenant/csi-vol-from-attributes");
    }

    #[test]
    fn an_old_volume_without_image_name_is_decoded_from_its_handle() {
        let mut facts = dynamic();
        facts.attributes.remove("imageName");
        facts.attributes.remove("clusterID");
        let found = resolve(&facts).unwrap();
        assert_eq!(found.image, format!("csi-vol-{UUID}"));
        assert_eq!(found.cluster_id, "rook-ceph");
        facts.class_parameters = map(&[("volumeNamePrefix", "db-")]);
        assert_eq!(resolve(&facts).unwrap().image, format!("db-{UUID}"));
    }

    #[test]
    fn a_static_volumes_handle_is_its_image() {
        let facts = PersistentVolumeFacts {
            volume_handle: "my-image".to_owned(),
            attributes: map(&[
                ("clusterID", "c"),
                ("pool", "p"),
                ("staticVolume", "true"),
                ("imageName", "ignored"),
            ]),
            ..dynamic()
        };
        let found = resolve(&facts).unwrap();
        assert_eq!(found.image_spec(), "p/my-image");
        assert!(found.static_volume && found.journal.is_none());
    }

    #[test]
    fn in_tree_and_migrated_volumes_are_refused() {
        let facts = PersistentVolumeFacts {
            volume_handle: "mig_mons-b7f67366bb43f32e07d8a261a7840da9_image-2f_706f6f6c".to_owned(),
            ..dynamic()
        };
        assert!(matches!(resolve(&facts), Err(VolumeError::Migrated { .. })));
        let facts = PersistentVolumeFacts { driver: None, in_tree_rbd: true, ..dynamic() };
        assert!(matches!(resolve(&facts), Err(VolumeError::Migrated { .. })));
    }

    #[test]
    fn missing_pool_or_image_is_named() {
        let mut facts = dynamic();
        facts.attributes.remove("pool");
        let error = resolve(&facts).unwrap_err().to_string();
        assert!(error.contains("names no pool") && error.contains("pool 1"), "{error}");
        facts.class_parameters = map(&[("pool", "of-class")]);
        assert_eq!(resolve(&facts).unwrap().pool, "of-class");
        let mut facts = dynamic();
        facts.attributes.remove("imageName");
        facts.volume_handle = "something-else".to_owned();
        assert!(resolve(&facts).unwrap_err().to_string().contains("names no image"));
    }

    #[test]
    fn handles_decode_or_not_at_all() {
        let good = format!("0001-0009-rook-ceph-00000000000000ff-{UUID}");
        let handle = VolumeHandle::decode(&good).unwrap();
        assert_eq!(
            (handle.cluster_id.as_str(), handle.pool_id, handle.uuid.as_str()),
            ("rook-ceph", 255, UUID)
        );
        for bad in [
            "",
            "0001",
            "my-image",
            &format!("0002-0009-rook-ceph-0000000000000001-{UUID}"),
            &format!("0001-0008-rook-ceph-0000000000000001-{UUID}"),
            &format!("0001-ffff-rook-ceph-0000000000000001-{UUID}"),
            &format!("0001-0000--0000000000000001-{UUID}"),
            &format!("0001-0009-rook-ceph-1-{UUID}"),
            "0001-0009-rook-ceph-0000000000000001-not-a-uuid",
            "0001-0002-\u{00e9}\u{00e9}-0000000000000001-x",
        ] {
            assert_eq!(VolumeHandle::decode(bad), None, "{bad}");
        }
    }

    #[test]
    fn exclusive_mapping_is_found_in_every_spelling() {
        let mut volume = resolve(&dynamic()).unwrap();
        for (options, exclusive) in [
            ("krbd:noshare", false),
            ("krbd:exclusive", true),
            ("exclusive", true),
            ("krbd:noshare,exclusive", true),
            ("nbd:exclusive", false),
            ("nbd:try-netlink;krbd:noshare, exclusive", true),
            ("lock_on_read", false),
        ] {
            volume.map_options = options.to_owned();
            assert_eq!(volume.mapped_exclusively(), exclusive, "{options}");
        }
    }
}
