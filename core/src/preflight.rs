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
                    "keep the whole database on one claim: two images are snapshotted at the same instant only as a group, \
                     and before Ceph 19 no clone can be made of a group's snapshot, so it could be neither proven nor \
                     restored beside the original",
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

/// Whether the image of a stopped database is at rest. `owners` are the addresses that hold its exclusive lock.
///
/// A client that unmaps gives its lock back; one that dies while it writes leaves it listed until somebody breaks it
/// (lab.md K6), and then nobody without the right to blocklist can take a snapshot either: Ceph answers EROFS.
///
/// # Errors
/// Names who has it open, or who left it.
pub fn at_rest(image: &str, watchers: &[String], owners: &[String]) -> Result<(), Problem> {
    if !watchers.is_empty() {
        return Err(Problem::new(
            FailureKind::Transient,
            format!("there is no pod, but the image {image} is open on {}", watchers.join(", ")),
            "wait until the volume is unmapped; a restore or another client may be using it",
        ));
    }
    if !owners.is_empty() {
        return Err(Problem::new(
            FailureKind::Permanent,
            format!(
                "the exclusive lock of {image} is still listed for {}: that client died or was cut off before it \
                 unmapped the volume",
                owners.join(", ")
            ),
            "start the database, so that its node takes the lock over and PostgreSQL recovers, and stop it again (scale \
             the StatefulSet to 1, then to 0)",
        ));
    }
    Ok(())
}

/// Why it cannot be said of an image at rest that no client left writes behind; `None` when it can.
#[must_use]
pub fn rest_unproven(image: &str, has_exclusive_lock: bool) -> Option<Problem> {
    (!has_exclusive_lock).then(|| {
        Problem::new(
            FailureKind::Permanent,
            format!(
                "the image {image} lacks the feature exclusive-lock: a client that died would leave no trace"
            ),
            format!("run: rbd feature enable {image} exclusive-lock"),
        )
    })
}

/// A finding of Ceph's own health check (`ceph health detail`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// For instance `POOL_FULL`.
    pub code: String,
    /// One line.
    pub summary: String,
    /// One line for each thing that is affected.
    pub details: Vec<String>,
}

/// Whether there is room for a backup in `pool`; `Some` is why not. Deleting works then, too.
///
/// Ceph itself judges, by the ratios its administrator has set: a snapshot keeps what would else be overwritten, so one
/// taken of a busy database in a nearly full pool could be what stops the database. In a full one the command would
/// hang.
///
/// # Errors
/// The cluster is paused: no command would come to its end.
pub fn cluster_fit(checks: &[HealthCheck], pool: &str) -> Result<Option<Problem>, Problem> {
    let refuse = |reason: String, cure: &str| Problem::new(FailureKind::Transient, reason, cure);
    let found = |code: &str| checks.iter().find(|check| check.code == code);
    if let Some(check) = found("OSDMAP_FLAGS") {
        let paused = ["pauserd", "pausewr"].iter().any(|flag| check.summary.contains(flag));
        if paused {
            let reason = format!("the Ceph cluster is paused ({})", check.summary);
            return Err(refuse(reason, "run: ceph osd unset pause"));
        }
    }
    // "pool 'replicapool' is full (running out of quota)", "pool 'replicapool' is nearfull" (as Ceph 16 says it).
    let quoted = format!("'{pool}'");
    let of_pool = |code: &str| found(code)?.details.iter().find(|line| line.contains(&quoted));
    let codes = ["POOL_FULL", "POOL_BACKFILLFULL", "POOL_NEARFULL", "POOL_NEAR_FULL"];
    Ok(codes.into_iter().find_map(of_pool).map(|line| {
        refuse(
            format!("Ceph says: {line}; a snapshot would keep what the database overwrites, and could fill it"),
            "what howdah.dev/retention gives up is deleted now; if that is not enough, add OSDs, remove data that is not \
             needed (ceph df; rbd du), or raise the pool's quota (ceph osd pool set-quota)",
        )
    }))
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
            journal: None,
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
        assert_eq!(at_rest("p/i", &[], &[]), Ok(()));
        let in_use = at_rest("p/i", &ips(&["192.168.9.4"]), &[]).unwrap_err();
        assert!(in_use.reason.contains("192.168.9.4") && in_use.kind == FailureKind::Transient);
    }

    #[test]
    fn a_lock_that_was_left_is_named_and_an_image_without_locks_proves_nothing() {
        let left = at_rest("p/i", &[], &["10.77.0.11:0/3".to_owned()]).unwrap_err();
        assert!(left.reason.contains("10.77.0.11:0/3") && left.kind == FailureKind::Permanent, "{left:?}");
        assert_eq!(rest_unproven("p/i", true), None);
        assert!(rest_unproven("p/i", false).unwrap().cure.contains("exclusive-lock"));
    }

    fn check(code: &str, summary: &str, details: &[&str]) -> HealthCheck {
        HealthCheck {
            code: code.to_owned(),
            summary: summary.to_owned(),
            details: details.iter().map(|line| (*line).to_owned()).collect(),
        }
    }

    #[test]
    fn a_paused_cluster_is_named() {
        assert_eq!(cluster_fit(&[], "rbd"), Ok(None));
        let flags = |flags: &str| check("OSDMAP_FLAGS", &format!("{flags} flag(s) set"), &[]);
        assert_eq!(cluster_fit(&[flags("noout,norebalance")], "rbd"), Ok(None));
        let paused = cluster_fit(&[flags("pauserd,pausewr")], "rbd").unwrap_err();
        assert!(paused.reason.contains("paused") && paused.cure.contains("unset pause"), "{paused:?}");
    }

    #[test]
    fn a_full_or_nearly_full_pool_has_no_room_and_another_pool_has() {
        for (code, line) in [
            ("POOL_FULL", "pool 'rbd' is full (running out of quota)"),
            ("POOL_NEARFULL", "pool 'rbd' is nearfull"),
        ] {
            let check = check(code, "1 pool(s) ...", &["pool 'ssd' is nearfull", line]);
            let problem = cluster_fit(std::slice::from_ref(&check), "rbd").unwrap().unwrap();
            assert!(problem.reason.contains(line) && problem.kind == FailureKind::Transient, "{problem:?}");
            assert_eq!(cluster_fit(&[check], "rb"), Ok(None));
        }
    }
}
