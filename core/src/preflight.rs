//! What must be true before a backup begins, judged from what the adapters read.
//!
//! Each judgement answers with the [`Problem`] that stops the backup, and with its cure.

use std::collections::BTreeSet;

use crate::backup::{BackupStatus, FailureKind, ImageRecord, PartRecord, Problem};
use crate::volume::RbdVolume;

/// Where the official image keeps its data when `PGDATA` is not set.
pub const DEFAULT_DATA_DIRECTORY: &str = "/var/lib/postgresql/data";
/// Variables that name the data directory, first come first served: of the official image, and of Bitnami's.
pub const DATA_VARIABLES: [&str; 2] = ["PGDATA", "POSTGRESQL_DATA_DIR"];
/// Variables that name a folder of its own for the write-ahead log, of the same images.
pub const WAL_VARIABLES: [&str; 2] = ["POSTGRES_INITDB_WALDIR", "POSTGRESQL_INITDB_WAL_DIR"];
/// Folders below the data that are part of it, and may be volumes of their own. Others, such as `pg_stat_tmp`, `log` or one
/// for dumps, may be lost.
pub const DATA_FOLDERS: [&str; 12] = [
    "base",
    "global",
    "pg_clog",
    "pg_commit_ts",
    "pg_logical",
    "pg_multixact",
    "pg_replslot",
    "pg_tblspc",
    "pg_twophase",
    "pg_wal",
    "pg_xact",
    "pg_xlog",
];
/// Most claims beside the one with the data directory: each adds its snapshot to the time in which no checkpoint may end.
pub const PARTS_MAX: usize = 7;

/// A folder a container sees, and what lies behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Path in the container.
    pub path: String,
    /// The name of the pod's volume.
    pub volume: String,
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
    /// Whether the WAL lies there.
    pub wal: bool,
}

impl Place {
    /// The place of the data directory.
    #[must_use]
    pub fn data(path: impl Into<String>) -> Self {
        Self { what: "the data directory".to_owned(), path: path.into(), wal: false }
    }

    /// The place of the WAL.
    #[must_use]
    pub fn wal(path: impl Into<String>) -> Self {
        Self { what: "the WAL directory".to_owned(), path: path.into(), wal: true }
    }

    /// The place of a tablespace.
    #[must_use]
    pub fn tablespace(name: &str, path: impl Into<String>) -> Self {
        Self { what: format!("the tablespace {name}"), path: path.into(), wal: false }
    }
}

/// The claims that hold a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The one with the data directory.
    pub data: String,
    /// The others.
    pub parts: Vec<PartClaim>,
}

/// A claim that holds a part of a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartClaim {
    /// The name of the pod's volume.
    pub volume: String,
    /// The claim.
    pub claim: String,
    /// Whether the WAL lies there.
    pub wal: bool,
}

/// The claims that hold all `places`, of which the first is the data directory.
///
/// What is mounted at a folder below the data directory that is part of it ([`DATA_FOLDERS`]) belongs to it. The link
/// `pg_wal` cannot be read through SQL: the caller names the folder of one of [`WAL_VARIABLES`] as a place when it is set.
///
/// # Errors
/// Names the place that lies outside a claim, or a claim that holds the WAL and something else: which of its snapshot and
/// that of the data has to be the last then hangs on whether the WAL really lies there. Or says that there are more than
/// [`PARTS_MAX`] further claims.
pub fn claims(mounts: &[Mount], places: &[Place]) -> Result<Claims, Problem> {
    let Some(data) = places.first() else {
        return Err(Problem::new(
            FailureKind::Permanent,
            "no folder of the database is known",
            "report this as a bug",
        ));
    };
    let claim_of = |place: &Place| {
        let mount = mount_of(mounts, &place.path);
        mount.and_then(|mount| Some((mount.volume.clone(), mount.claim.clone()?))).ok_or_else(|| {
            Problem::new(
                FailureKind::Permanent,
                format!("{} ({}) does not lie on a persistent volume", place.what, place.path),
                "mount a PersistentVolumeClaim there: what is outside it cannot be backed up",
            )
        })
    };
    let mut claims = Claims { data: claim_of(data)?.1, parts: Vec::new() };
    for place in places.iter().chain(&inside(mounts, &data.path)) {
        let (volume, claim) = claim_of(place)?;
        if claim == claims.data {
            continue;
        }
        match claims.parts.iter().find(|part| part.claim == claim) {
            Some(part) if part.wal == place.wal => {}
            Some(_) => {
                return Err(Problem::new(
                    FailureKind::Permanent,
                    format!(
                        "the claim {claim} holds the WAL and {}",
                        place_beside(places, mounts, &claim, place)
                    ),
                    "give the WAL a claim of its own, or keep it with the data directory",
                ));
            }
            None => claims.parts.push(PartClaim { volume, claim, wal: place.wal }),
        }
    }
    if claims.parts.len() > PARTS_MAX {
        return Err(Problem::new(
            FailureKind::Permanent,
            format!("the database lies on {} claims", claims.parts.len() + 1),
            format!("keep it on {} at most: their snapshots are taken one after the other", PARTS_MAX + 1),
        ));
    }
    Ok(claims)
}

/// What lies on a claim beside `place`, for the message.
fn place_beside<'p>(places: &'p [Place], mounts: &[Mount], claim: &str, place: &'p Place) -> &'p str {
    let on_it = |other: &&Place| {
        !other.wal && mount_of(mounts, &other.path).is_some_and(|mount| mount.claim.as_deref() == Some(claim))
    };
    places.iter().find(on_it).unwrap_or(place).what.as_str()
}

/// The WAL below the data directory, and what has a mount of its own there and is part of it.
fn inside(mounts: &[Mount], data: &str) -> Vec<Place> {
    let data = data.trim_end_matches('/');
    let mut places = vec![Place::wal(format!("{data}/pg_wal"))];
    for mount in mounts.iter().filter(|mount| mount.claim.is_some()) {
        let below = mount.path.strip_prefix(data).and_then(|rest| rest.strip_prefix('/'));
        let folder = below.and_then(|below| below.split('/').next()).unwrap_or_default();
        if DATA_FOLDERS.contains(&folder) {
            places.push(Place {
                what: format!("the folder {folder} of the data directory"),
                path: mount.path.clone(),
                wal: ["pg_wal", "pg_xlog"].contains(&folder),
            });
        }
    }
    places
}

/// The claims of a container that may hold a part of a stopped database, beside those in `known`: its tablespaces can be
/// asked for only while it runs.
#[must_use]
pub fn unexplained(mounts: &[Mount], known: &Claims) -> Vec<PartClaim> {
    let mut all: Vec<PartClaim> = Vec::new();
    for mount in mounts {
        let Some(claim) = &mount.claim else { continue };
        let is_known = *claim == known.data || known.parts.iter().any(|part| part.claim == *claim);
        if !is_known && all.iter().all(|part| part.claim != *claim) {
            all.push(PartClaim { volume: mount.volume.clone(), claim: claim.clone(), wal: false });
        }
    }
    all
}

/// What is known of a database that cannot be asked where its tablespaces lie: a backup that was recorded says which
/// volumes hold parts of it, and which nothing.
///
/// `recorded` are the good backups, the newest first. Answers with the claims that hold the database, and with the volumes
/// beside it.
///
/// # Errors
/// Names the claims of which no record tells.
pub fn explain(
    mut known: Claims,
    mounts: &[Mount],
    recorded: &[&BackupStatus],
) -> Result<(Claims, Vec<String>), Problem> {
    let open = unexplained(mounts, &known);
    if open.is_empty() {
        return Ok((known, Vec::new()));
    }
    let tells = |status: &&&BackupStatus| {
        open.iter().all(|claim| part_of(status, claim).is_some() || status.beside.contains(&claim.volume))
    };
    let Some(status) = recorded.iter().find(tells) else {
        let names: Vec<&str> = open.iter().map(|claim| claim.claim.as_str()).collect();
        return Err(Problem::new(
            FailureKind::Permanent,
            format!(
                "PostgreSQL cannot be asked whether tablespaces lie on {}, and no earlier backup tells",
                names.join(", ")
            ),
            "take one online backup while the database runs, and later ones know by it: a PostgresBackup with \
             spec.consistency: online, and credentials (howdah.dev/credentials)",
        ));
    };
    let mut beside = Vec::new();
    for claim in open {
        match part_of(status, &claim) {
            Some(part) => known.parts.push(PartClaim { wal: part.wal, ..claim }),
            None => beside.push(claim.volume),
        }
    }
    Ok((known, beside))
}

fn part_of<'s>(status: &'s BackupStatus, claim: &PartClaim) -> Option<&'s PartRecord> {
    status.parts.iter().find(|part| part.volume == claim.volume)
}

/// Whether the images of one database share pool and namespace.
///
/// # Errors
/// Names the image that lies elsewhere.
pub fn one_pool(data: &ImageRecord, parts: &[PartRecord]) -> Result<(), Problem> {
    let place = |image: &ImageRecord| (image.pool.clone(), image.rados_namespace.clone());
    match parts.iter().find(|part| place(&part.image) != place(data)) {
        Some(part) => Err(Problem::new(
            FailureKind::Permanent,
            format!(
                "the volume {} lies in {} and the data directory in {}",
                part.volume,
                part.image.spec(),
                data.spec()
            ),
            "keep the whole database in one pool: use one storage class for all of its volumes",
        )),
        None => Ok(()),
    }
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
        let volume = claim.and_then(|claim| claim.split('-').next()).unwrap_or("scratch").to_owned();
        Mount { path: path.to_owned(), volume, claim: claim.map(str::to_owned) }
    }

    fn place(path: &str) -> Place {
        Place {
            what: path.rsplit('/').next().unwrap_or_default().to_owned(),
            path: path.to_owned(),
            wal: false,
        }
    }

    fn part(volume: &str, claim: &str, wal: bool) -> PartClaim {
        PartClaim { volume: volume.to_owned(), claim: claim.to_owned(), wal }
    }

    #[test]
    fn one_claim_holds_everything() {
        let mounts = [mount("/var/lib/postgresql/data/", Some("data-pg-0")), mount("/tmp", None)];
        let places = [place("/var/lib/postgresql/data/pgdata"), place("/var/lib/postgresql/data/space")];
        let found = claims(&mounts, &places).unwrap();
        assert_eq!(found, Claims { data: "data-pg-0".to_owned(), parts: Vec::new() });
    }

    #[test]
    fn wal_and_tablespaces_on_further_claims_are_parts_and_what_lies_on_none_is_named() {
        let mounts = [
            mount("/var/lib/postgresql", Some("data-pg-0")),
            mount("/var/lib/postgresql/wal", Some("wal-pg-0")),
            mount("/space", Some("space-pg-0")),
            mount("/dumps", Some("dumps-pg-0")),
            mount("/fast", None),
        ];
        let data = place("/var/lib/postgresql/data");
        let wal = Place::wal("/var/lib/postgresql/wal/pg_wal");
        let found = claims(&mounts, &[data.clone(), place("/space/a"), wal, place("/space/b")]).unwrap();
        assert_eq!(found.data, "data-pg-0");
        assert_eq!(found.parts, [part("space", "space-pg-0", false), part("wal", "wal-pg-0", true)]);
        assert_eq!(unexplained(&mounts, &found), [part("dumps", "dumps-pg-0", false)]);
        for outside in ["/fast/space", "/elsewhere", "/var/lib/other"] {
            let problem = claims(&mounts, &[data.clone(), place(outside)]).unwrap_err();
            assert!(problem.reason.contains(outside), "{}", problem.reason);
        }
    }

    #[test]
    fn what_a_stopped_database_lies_on_is_known_from_its_records_or_not_at_all() {
        let mounts = [
            mount("/data", Some("data-pg-0")),
            mount("/space", Some("space-pg-0")),
            mount("/dumps", Some("dumps-pg-0")),
        ];
        let known = || claims(&mounts, &[Place::data("/data/pg")]).unwrap();
        let image = ImageRecord {
            pool: "p".to_owned(),
            rados_namespace: String::new(),
            name: "s".to_owned(),
            id: "2".to_owned(),
        };
        let space = PartRecord { volume: "space".to_owned(), wal: false, image, snapshot: None };
        let told =
            BackupStatus { parts: vec![space], beside: vec!["dumps".to_owned()], ..BackupStatus::default() };
        let older =
            BackupStatus { beside: vec!["dumps".to_owned(), "space".to_owned()], ..BackupStatus::default() };
        let silent = BackupStatus::default();
        let (found, beside) = explain(known(), &mounts, &[&silent, &told, &older]).unwrap();
        assert_eq!(
            (found.parts, beside),
            (vec![part("space", "space-pg-0", false)], vec!["dumps".to_owned()])
        );
        let problem = explain(known(), &mounts, &[&silent]).unwrap_err();
        assert!(problem.reason.contains("space-pg-0, dumps-pg-0"), "{}", problem.reason);
        let (found, beside) = explain(known(), &mounts[..1], &[]).unwrap();
        assert!(found.parts.is_empty() && beside.is_empty());
    }

    #[test]
    fn what_is_mounted_inside_the_data_directory_belongs_to_it() {
        let with = |more: Mount| {
            claims(&[mount("/data", Some("data-pg-0")), more], &[place("/data/pg/")]).map(|found| found.parts)
        };
        assert_eq!(
            with(mount("/data/pg/pg_wal", Some("wal-pg-0"))).unwrap(),
            [part("wal", "wal-pg-0", true)]
        );
        assert_eq!(
            with(mount("/data/pg/base", Some("base-pg-0"))).unwrap(),
            [part("base", "base-pg-0", false)]
        );
        assert_eq!(with(mount("/data/pg-old", Some("old-pg-0"))).unwrap(), []);
        assert_eq!(with(mount("/data/pg/pg_stat_tmp", None)).unwrap(), []);
        assert_eq!(with(mount("/data/pg/postgresql.conf", None)).unwrap(), []);
        let lost = with(mount("/data/pg/pg_wal", None)).unwrap_err();
        assert!(lost.reason.contains("/data/pg/pg_wal"), "{}", lost.reason);
    }

    #[test]
    fn a_claim_that_holds_the_wal_and_a_tablespace_is_refused() {
        let mounts = [mount("/data", Some("data-pg-0")), mount("/fast", Some("fast-pg-0"))];
        let places =
            [Place::data("/data/pg"), Place::tablespace("far", "/fast/far"), Place::wal("/fast/wal")];
        let problem = claims(&mounts, &places).unwrap_err();
        assert!(
            problem.reason.contains("fast-pg-0 holds the WAL and the tablespace far"),
            "{}",
            problem.reason
        );
    }

    #[test]
    fn too_many_claims_and_another_pool_are_refused() {
        let mounts: Vec<Mount> =
            (0..PARTS_MAX + 2).map(|n| mount(&format!("/{n}"), Some(&format!("v{n}-pg-0")))).collect();
        let places: Vec<Place> = mounts.iter().map(|mount| place(&mount.path)).collect();
        assert_eq!(claims(&mounts, &places[..=PARTS_MAX]).unwrap().parts.len(), PARTS_MAX);
        let problem = claims(&mounts, &places).unwrap_err();
        assert!(problem.reason.contains("9 claims"), "{}", problem.reason);

        let image = |pool: &str, name: &str| ImageRecord {
            pool: pool.to_owned(),
            rados_namespace: String::new(),
            name: name.to_owned(),
            id: name.to_owned(),
        };
        let wal = |pool| PartRecord {
            volume: "wal".to_owned(),
            wal: true,
            image: image(pool, "w"),
            snapshot: None,
        };
        assert_eq!(one_pool(&image("a", "d"), &[wal("a")]), Ok(()));
        let problem = one_pool(&image("a", "d"), &[wal("a"), wal("b")]).unwrap_err();
        assert!(problem.reason.contains("wal lies in b/w"), "{}", problem.reason);
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
