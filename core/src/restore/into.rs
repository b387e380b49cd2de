//! Whether a StatefulSet may take a backup of another: it must be one that never ran.

use crate::backup::{FailureKind, ImageRecord, Problem};

/// The StatefulSet that a backup is restored into, as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newcomer<'a> {
    /// Its name.
    pub name: &'a str,
    /// `spec.replicas`.
    pub replicas: i32,
    /// Its pod, if there is one.
    pub pod: Option<&'a str>,
    /// The claim that its database is going to lie on.
    pub claim: &'a str,
    /// The image behind the claim.
    pub image: &'a ImageRecord,
    /// Size of the image in bytes.
    pub size: u64,
    /// Bytes of it that were ever written to, in whole objects.
    pub used: u64,
    /// How many snapshots it has, those in the trash included.
    pub snapshots: usize,
    /// Whether it is a clone.
    pub is_clone: bool,
}

/// Whether the backup `backup`, which lies in `source` and is of `bytes`, may be put into `newcomer`.
///
/// That nobody's data is in the way is proven by Ceph: an image that no byte was written to, which has no snapshot and
/// no parent, never held a file system. A name, an age or an empty list of backups prove nothing.
///
/// # Errors
/// Names what stands against it, and what to do.
pub fn fits(newcomer: &Newcomer<'_>, backup: &str, source: &ImageRecord, bytes: u64) -> Result<(), Problem> {
    let Newcomer { name, replicas, pod, claim, image, size, used, snapshots, is_clone } = newcomer;
    let refuse = |reason: String, cure: String| Err(Problem::new(FailureKind::Permanent, reason, cure));
    if *replicas > 0 {
        return refuse(
            format!("the StatefulSet {name} has spec.replicas {replicas}, and a backup is put into one at 0"),
            "name one that never ran, such as kubectl howdah restore --into makes".to_owned(),
        );
    }
    if let Some(pod) = pod {
        return refuse(
            format!("the StatefulSet {name} still has the pod {pod}"),
            "name one that never ran, such as kubectl howdah restore --into makes".to_owned(),
        );
    }
    if image.id == source.id || *used > 0 || *snapshots > 0 || *is_clone {
        let found = match (used, snapshots, is_clone) {
            (0, 0, true) => "is a clone of another".to_owned(),
            (0, 0, false) => format!("is the one that the backup {backup} lies in"),
            (0, snapshots, _) => format!("has {snapshots} snapshots"),
            (used, ..) => format!("holds {used} bytes"),
        };
        return refuse(
            format!("the image {} of the claim {claim} is not new: it {found}", image.spec()),
            format!(
                "name a StatefulSet whose claim was just made and never mounted; to put {name} back to a backup of its \
                 own, restore it in place"
            ),
        );
    }
    if (&image.pool, &image.rados_namespace) != (&source.pool, &source.rados_namespace) {
        let place = |image: &ImageRecord| match image.rados_namespace.as_str() {
            "" => image.pool.clone(),
            namespace => format!("{}/{namespace}", image.pool),
        };
        return refuse(
            format!(
                "the claim {claim} lies in the pool {}, and the backup {backup} in {}",
                place(image),
                place(source)
            ),
            format!("make {claim} of the StorageClass that the original has"),
        );
    }
    if *size < bytes {
        return refuse(
            format!("the claim {claim} has {size} bytes, and the backup {backup} needs {bytes}"),
            format!(
                "set spec.resources.requests.storage of {claim} to {bytes} or more, and order the restore anew"
            ),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str, pool: &str) -> ImageRecord {
        ImageRecord {
            pool: pool.to_owned(),
            rados_namespace: String::new(),
            name: name.to_owned(),
            id: name.to_owned(),
        }
    }

    fn judged(change: impl FnOnce(&mut Newcomer<'_>), image: &ImageRecord) -> Result<(), String> {
        let mut newcomer = Newcomer {
            name: "db-copy",
            replicas: 0,
            pod: None,
            claim: "data-db-copy-0",
            image,
            size: 1 << 30,
            used: 0,
            snapshots: 0,
            is_clone: false,
        };
        change(&mut newcomer);
        fits(&newcomer, "db-1", &self::image("old", "p"), 1 << 30).map_err(|problem| {
            assert_eq!(problem.kind, FailureKind::Permanent);
            assert!(!problem.cure.is_empty());
            problem.reason
        })
    }

    #[test]
    fn one_that_never_ran_fits() {
        assert_eq!(judged(|_| {}, &image("new", "p")), Ok(()));
        assert_eq!(judged(|newcomer| newcomer.size = 2 << 30, &image("new", "p")), Ok(()));
    }

    #[test]
    fn anything_that_somebody_may_have_used_is_refused_by_name_and_value() {
        let new = image("new", "p");
        let refused = |change: fn(&mut Newcomer<'_>), words: &str| {
            let reason = judged(change, &new).unwrap_err();
            assert!(reason.contains(words), "{reason}");
        };
        refused(|newcomer| newcomer.replicas = 1, "spec.replicas 1");
        refused(|newcomer| newcomer.pod = Some("db-copy-0"), "the pod db-copy-0");
        refused(|newcomer| newcomer.used = 4096, "holds 4096 bytes");
        refused(|newcomer| newcomer.snapshots = 2, "has 2 snapshots");
        refused(|newcomer| newcomer.is_clone = true, "is a clone of another");
        refused(
            |newcomer| newcomer.size = 1 << 20,
            "has 1048576 bytes, and the backup db-1 needs 1073741824",
        );
        let other = judged(|_| {}, &image("new", "other")).unwrap_err();
        assert!(other.contains("lies in the pool other, and the backup db-1 in p"), "{other}");
        let same = judged(|_| {}, &image("old", "p")).unwrap_err();
        assert!(same.contains("is the one that the backup db-1 lies in"), "{same}");
    }
}
