//! What must be true before a backup begins, judged from what the adapters read.
//!
//! Each judgement answers with the [`Problem`] that stops the backup, and with its cure.

use std::collections::BTreeSet;

use crate::backup::{FailureKind, Problem};
use crate::volume::RbdVolume;

/// Where the official image keeps its data when `PGDATA` is not set.
pub const DEFAULT_DATA_DIRECTORY: &str = "/var/lib/postgresql/data";

/// A folder a container sees, and what lies behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Path in the container.
    pub path: String,
    /// The claim, or `None` for a volume of another kind (emptyDir, Secret, ...).
    pub claim: Option<String>,
}

/// A folder of the database that the backup must contain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// What it is, for the message.
    pub what: String,
    /// Path in the container.
    pub path: String,
}

/// The one claim that holds all `places`.
///
/// Only one image can be snapshotted atomically. The link `pg_wal` cannot be read through SQL: the caller names the
/// folder of `POSTGRES_INITDB_WALDIR` as a place when it is set.
///
/// # Errors
/// Names the place that lies outside a claim, or the two that lie in different ones.
pub fn one_claim(mounts: &[Mount], places: &[Place]) -> Result<String, Problem> {
    let mut first: Option<(&Place, &str)> = None;
    for place in places {
        let Some(claim) = mount_of(mounts, &place.path).and_then(|mount| mount.claim.as_deref()) else {
            return Err(Problem::new(
                FailureKind::Permanent,
                format!("{} ({}) does not lie on a persistent volume", place.what, place.path),
                "mount a PersistentVolumeClaim there: what is outside it cannot be backed up",
            ));
        };
        match first {
            Some((other, other_claim)) if other_claim != claim => {
                return Err(Problem::new(
                    FailureKind::Permanent,
                    format!("{} lies on the claim {claim} and {} on {other_claim}", place.what, other.what),
                    "keep the whole database on one claim: two images are not snapshotted at the same instant",
                ));
            }
            Some(_) => {}
            None => first = Some((place, claim)),
        }
    }
    let found = first.map(|(_, claim)| claim.to_owned());
    found.ok_or_else(|| {
        Problem::new(FailureKind::Permanent, "no folder of the database is known", "report this as a bug")
    })
}

/// The mount a path lies on: the one with the longest path above it.
fn mount_of<'a>(mounts: &'a [Mount], path: &str) -> Option<&'a Mount> {
    let above = |mount: &&Mount| {
        let root = mount.path.trim_end_matches('/');
        path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    mounts.iter().filter(above).max_by_key(|mount| mount.path.trim_end_matches('/').len())
}

/// What PostgreSQL says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Whether it is a standby or still recovers.
    pub in_recovery: bool,
    /// `fsync`.
    pub fsync: bool,
    /// `full_page_writes`.
    pub full_page_writes: bool,
}

/// Whether a snapshot of this server starts again.
///
/// # Errors
/// Says which setting stands against it.
pub fn server_fit(server: &Server) -> Result<(), Problem> {
    let Server { in_recovery, fsync, full_page_writes } = server;
    if *in_recovery {
        return Err(Problem::new(
            FailureKind::Transient,
            "PostgreSQL is in recovery",
            "wait until recovery ends; howdah does not back up a standby",
        ));
    }
    for (name, on) in [("fsync", fsync), ("full_page_writes", full_page_writes)] {
        if !on {
            return Err(Problem::new(
                FailureKind::Permanent,
                format!("{name} is off: no snapshot of this database is sure to start"),
                format!("run: ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf();"),
            ));
        }
    }
    Ok(())
}

/// Whether the volume can be backed up by snapshots of its image; `in_use` says whether a pod has it.
///
/// # Errors
/// Names the property of the volume that stands against it.
pub fn volume_fit(volume: &RbdVolume, in_use: bool) -> Result<(), Problem> {
    if volume.encrypted {
        return Err(Problem::new(
            FailureKind::Permanent,
            format!(
                "volume {} is encrypted by ceph-csi, and a clone of its image loses the key",
                volume.volume
            ),
            "use a StorageClass without encryption, or back up through CSI VolumeSnapshots",
        ));
    }
    if in_use && volume.mapped_exclusively() {
        // lab.md K4: every snapshot of the live image fails with EROFS, for an administrator too.
        return Err(Problem::new(
            FailureKind::Permanent,
            format!(
                "volume {} is mapped with the option exclusive, so no live snapshot can be taken",
                volume.volume
            ),
            "use a StorageClass whose mapOptions do not hold exclusive, or back up while replicas is 0",
        ));
    }
    Ok(())
}

/// Whether the writer of the image is the pod's node alone.
///
/// `watchers` are the IP addresses of the clients that have the image open. A watcher says "in use", a lock does not:
/// after a snapshot it comes back only with the next write (lab.md C4). Where no watcher has an address of the node,
/// Ceph has a network of its own, and one client is taken for the node's. Without a watcher nothing writes, which is
/// fine for a pod that is about to start.
///
/// # Errors
/// Names the addresses of the other clients.
pub fn watchers_fit(pod: &str, host_ips: &[String], watchers: &[String]) -> Result<(), Problem> {
    let clients: BTreeSet<&str> = watchers.iter().map(String::as_str).collect();
    let others: Vec<&str> =
        clients.iter().copied().filter(|client| host_ips.iter().all(|ip| ip != client)).collect();
    let own_is_there = others.len() < clients.len();
    if others.is_empty() || (!own_is_there && others.len() == 1) {
        return Ok(());
    }
    Err(Problem::new(
        FailureKind::Transient,
        format!(
            "the image is open on {} while the pod {pod} runs on {}",
            others.join(", "),
            host_ips.join(", ")
        ),
        "wait: the watcher of a dead node goes after 30 s; if it stays, fence that client before anything else",
    ))
}

/// Whether the image is at rest.
///
/// # Errors
/// Names who has it open.
pub fn at_rest(watchers: &[String]) -> Result<(), Problem> {
    if watchers.is_empty() {
        return Ok(());
    }
    Err(Problem::new(
        FailureKind::Transient,
        format!("there is no pod, but the image is open on {}", watchers.join(", ")),
        "wait until the volume is unmapped; a restore or another client may be using it",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(path: &str, claim: Option<&str>) -> Mount {
        Mount { path: path.to_owned(), claim: claim.map(str::to_owned) }
    }

    fn place(path: &str) -> Place {
        Place { what: path.rsplit('/').next().unwrap_or_default().to_owned(), path: path.to_owned() }
    }

    #[test]
    fn one_claim_holds_everything() {
        let mounts = [mount("/var/lib/postgresql/data/", Some("data-pg-0")), mount("/tmp", None)];
        let places = [place("/var/lib/postgresql/data/pgdata"), place("/var/lib/postgresql/data/space")];
        assert_eq!(one_claim(&mounts, &places).unwrap(), "data-pg-0");
    }

    #[test]
    fn a_place_on_another_volume_is_named() {
        let mounts = [
            mount("/var/lib/postgresql", Some("data-pg-0")),
            mount("/var/lib/postgresql/wal", Some("wal-pg-0")),
            mount("/fast", None),
        ];
        let data = place("/var/lib/postgresql/data");
        let problem =
            one_claim(&mounts, &[data.clone(), place("/var/lib/postgresql/wal/pg_wal")]).unwrap_err();
        assert!(problem.reason.contains("wal-pg-0") && problem.kind == FailureKind::Permanent);
        for outside in ["/fast/space", "/elsewhere", "/var/lib/postgresql-old"] {
            let problem = one_claim(&mounts, &[data.clone(), place(outside)]).unwrap_err();
            assert!(problem.reason.contains(outside), "{}", problem.reason);
        }
    }

    #[test]
    fn unsafe_settings_are_refused_with_the_command_that_cures_them() {
        let good = Server { in_recovery: false, fsync: true, full_page_writes: true };
        assert_eq!(server_fit(&good), Ok(()));
        let problem = server_fit(&Server { full_page_writes: false, ..good.clone() }).unwrap_err();
        assert!(problem.cure.contains("ALTER SYSTEM SET full_page_writes = on"));
        assert_eq!(
            server_fit(&Server { fsync: false, ..good.clone() }).unwrap_err().kind,
            FailureKind::Permanent
        );
        assert_eq!(
            server_fit(&Server { in_recovery: true, ..good }).unwrap_err().kind,
            FailureKind::Transient
        );
    }

    #[test]
    fn exclusive_and_encrypted_volumes_are_refused() {
        let volume = |map_options: &str, encrypted| RbdVolume {
            volume: "pvc-1".to_owned(),
            driver: "rook-ceph.rbd.csi.ceph.com".to_owned(),
            cluster_id: "rook-ceph".to_owned(),
            pool: "replicapool".to_owned(),
            rados_namespace: String::new(),
            image: "csi-vol-1".to_owned(),
            map_options: map_options.to_owned(),
            encrypted,
            static_volume: false,
        };
        assert_eq!(volume_fit(&volume("krbd:noshare", false), true), Ok(()));
        assert!(volume_fit(&volume("krbd:exclusive", false), true).is_err());
        assert_eq!(volume_fit(&volume("krbd:exclusive", false), false), Ok(()));
        assert!(volume_fit(&volume("", true), false).is_err());
    }

    #[test]
    fn only_a_second_client_stops_a_backup() {
        let ips = |list: &[&str]| list.iter().map(|ip| (*ip).to_owned()).collect::<Vec<_>>();
        let host = ips(&["10.77.0.11"]);
        for fine in [&[][..], &["10.77.0.11"], &["192.168.9.4"]] {
            assert_eq!(watchers_fit("pg-0", &host, &ips(fine)), Ok(()), "{fine:?}");
        }
        for wrong in [&["10.77.0.11", "10.77.0.12"][..], &["192.168.9.4", "192.168.9.5"]] {
            let problem = watchers_fit("pg-0", &host, &ips(wrong)).unwrap_err();
            assert!(problem.reason.contains(wrong[1]), "{}", problem.reason);
        }
        assert_eq!(at_rest(&[]), Ok(()));
        assert!(at_rest(&ips(&["192.168.9.4"])).unwrap_err().reason.contains("192.168.9.4"));
    }
}
