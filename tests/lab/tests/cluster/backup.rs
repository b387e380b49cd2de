//! The proof that a backup is a backup: howdah as installed snapshots a PostgreSQL under load, a clone of the snapshot is
//! started, and it holds every row that was committed before the backup began.

use anyhow::{Context, Result, ensure};
use howdah_core::annotations::Consistency;
use howdah_core::backup::BackupStatus;
use howdah_lab::database::{self, BACKUP_LIMIT, Database, START_LIMIT};
use howdah_lab::demo::load::{self, Load};
use howdah_lab::storage::claim::wait_slowly;
use serde_json::{Value, json};

use crate::lab;

/// A clone of a snapshot with a PostgreSQL on it; removed when dropped.
struct Restored<'a> {
    database: &'a Database,
    name: String,
}

impl<'a> Restored<'a> {
    /// Clones the snapshot as it is, without writing a backup label into it: PostgreSQL recovers from it as from a crash.
    fn start(database: &'a Database, status: &BackupStatus) -> Result<Self> {
        let (image, snapshot) =
            status.image.as_ref().zip(status.snapshot.as_ref()).context("find the snapshot")?;
        let name = format!("{}-restored", database.namespace.name());
        let source = format!("{}@{}", image.spec(), snapshot.name);
        let clone = format!("{}/{name}", image.pool);
        database.lab.rbd(&["clone", "--rbd-default-clone-format", "2", &source, &clone])?;
        let restored = Self { database, name };
        let applied = database.lab.kubectl_apply(&restored.objects(&image.pool).to_string())?;
        ensure!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        database.kubectl(&[
            "wait",
            "--for=condition=Ready",
            &format!("pod/{}", restored.name),
            START_LIMIT,
        ])?;
        Ok(restored)
    }

    /// A static volume as ceph-csi knows them (its docs, static-pvc.md), and a pod on it that howdah does not protect.
    fn objects(&self, pool: &str) -> Value {
        let (name, namespace) = (&self.name, self.database.namespace.name());
        json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": {
                "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "storageClassName": "",
                "persistentVolumeReclaimPolicy": "Retain", "claimRef": {"namespace": namespace, "name": name},
                "csi": {"driver": "rook-ceph.rbd.csi.ceph.com", "fsType": "ext4", "volumeHandle": name,
                    "nodeStageSecretRef": {"namespace": "rook-ceph", "name": "rook-csi-rbd-node"},
                    "volumeAttributes": {"clusterID": "rook-ceph", "pool": pool, "staticVolume": "true",
                        "imageFeatures": "layering", "mapOptions": "krbd:noshare"}}}},
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"namespace": namespace, "name": name},
                "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeName": name,
                    "resources": {"requests": {"storage": "1Gi"}}}},
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": namespace, "name": name}, "spec": {
                "securityContext": {"fsGroup": 999}, "terminationGracePeriodSeconds": 1, "tolerations": database::stays(),
                "containers": [{"name": "postgres", "image": "docker.io/library/postgres:15",
                    "imagePullPolicy": "IfNotPresent",
                    "env": [{"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"}],
                    "readinessProbe": {"tcpSocket": {"port": 5432}, "periodSeconds": 2},
                    "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}]}],
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": name}}]}}
        ]})
    }

    fn remove(&self) -> Result<()> {
        let name = self.name.as_str();
        self.database.kubectl(&["delete", "pod", name, "--ignore-not-found", "--timeout=120s"])?;
        self.database.kubectl(&["delete", "pvc", name, "--ignore-not-found", "--wait=false"])?;
        self.database.lab.kubectl_ok(&["delete", "pv", name, "--ignore-not-found", "--wait=false"])?;
        let clone = format!("replicapool/{name}");
        // The node unmaps it some seconds after the pod is gone.
        let removed =
            wait_slowly(BACKUP_LIMIT, || self.database.lab.rbd(&["rm", "--no-progress", &clone]).is_ok());
        ensure!(removed, "remove {clone}: it stays in use");
        Ok(())
    }
}

impl Drop for Restored<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("{error:#}");
        }
    }
}

#[test]
fn a_clone_of_a_backup_holds_every_row_committed_before_it_and_is_never_pruned_away() -> Result<()> {
    let database = Database::start(lab()?)?;
    let load = Load::start(&database.lab, &database.address("db-0")?)?;
    database.annotate(&["howdah.dev/suspend=false"])?;
    // The second one begins when the load has long been running.
    database.wait("two backups", || Ok(database.taken()?.len() >= 2))?;
    database.annotate(&["howdah.dev/suspend=true"])?;
    database.wait("no open backup", || {
        Ok(database.backups()?.iter().all(|(_, status)| status.phase.is_terminal()))
    })?;

    let (name, status) = database.taken()?.pop().context("find the newest backup")?;
    ensure!(status.consistency == Some(Consistency::Online), "{name} is no online backup: {status:?}");
    let start = status.start_lsn.as_deref().and_then(load::parse_lsn).context("read the start LSN")?;
    let committed = load.committed_before(start).context("find a count from before the backup")?;
    ensure!(committed > 0, "the load wrote nothing before the backup");
    let restored = Restored::start(&database, &status)?;
    let end = load.stop()?;
    // A port that is open is not a database that answers: PostgreSQL listens before its recovery is done.
    let address = database.address(&restored.name)?;
    database.wait("SQL from the clone", || {
        load::ask(&database.lab, &address, "select 1")?;
        Ok(true)
    })?;
    let rows = load::count_transactions(&database.lab, &address)?;
    ensure!(
        (committed..=end).contains(&rows),
        "the clone has {rows} rows: {committed} were committed before the backup, and {end} in all"
    );
    let log = database.kubectl(&["logs", &restored.name])?;
    ensure!(log.contains("automatic recovery in progress"), "no crash recovery: {log}");

    // With a clone on it the backup outlives a policy that would keep one only.
    let snapshot = status.snapshot.context("find the snapshot")?;
    let snapshots = || -> Result<bool> {
        let image = status.image.as_ref().context("find the image")?.spec();
        Ok(database.lab.rbd(&["snap", "ls", &image])?.contains(&snapshot.name))
    };
    database.annotate(&["howdah.dev/retention=last=1", "howdah.dev/suspend=false"])?;
    let newer =
        || -> Result<usize> { Ok(database.taken()?.iter().filter(|(other, _)| *other > name).count()) };
    database.wait("a newer backup", || Ok(newer()? >= 1))?;
    database.annotate(&["howdah.dev/suspend=true"])?;
    database.wait("no open backup", || {
        Ok(database.backups()?.iter().all(|(_, status)| status.phase.is_terminal()))
    })?;
    ensure!(snapshots()?, "a backup with a clone was pruned");
    Ok(())
}
