//! The scheduler as a process, with its own service account, against a real API server, a real Ceph image made by the
//! real provisioner, and a real PostgreSQL 15. There is no node here: the test gives the pod its address and readiness,
//! which a kubelet would. That the snapshot holds the data is proven where PostgreSQL lies on the image: in `cluster`.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt as _, pin_mut};
use howdah_adapters::records::PostgresBackup;
use howdah_core::annotations::Consistency;
use howdah_core::backup::{BackupStatus, Phase};
use howdah_core::catalogue::Entry;
use howdah_core::names;
use howdah_lab::ceph::POOL;
use howdah_lab::lab::Lab;
use howdah_lab::netns::BRIDGE_ADDRESS;
use howdah_lab::process::wait_until;
use howdah_lab::repository;
use howdah_lab::testing::{Process, TempNamespace, shared_name};
use kube::Api;
use kube::runtime::{WatchStreamExt as _, watcher};
use nix::sys::signal::Signal;
use nix::unistd::User;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A backup takes some five seconds; other labs may run beside this one.
const BACKUP_LIMIT: Duration = Duration::from_secs(180);
/// A claim is provisioned in a second or two.
const CLAIM_LIMIT: Duration = Duration::from_secs(120);
/// initdb and the first start of PostgreSQL.
const START_LIMIT: Duration = Duration::from_secs(60);
/// A lost lease is free after 15 s.
const LEAD_LIMIT: Duration = Duration::from_secs(90);
/// What the server writes when a session in backup mode ends (PostgreSQL: `do_pg_abort_backup`).
const ABORTED: &str = "aborting backup due to backend exiting before pg_backup_stop was called";
const PASSWORD: &str = "correct horse";
const PORT: u16 = 15432;
const BINARIES: &str = "/usr/lib/postgresql/15/bin";

/// A scheduler acts on the whole cluster: one test at a time.
static TURN: Mutex<()> = Mutex::new(());

/// A namespace with a protected database that can be backed up.
struct Stage {
    lab: Lab,
    namespace: TempNamespace,
    postgres: Process,
    _folder: TempDir,
    _turn: MutexGuard<'static, ()>,
}

/// Applies the parts of deploy/ that the scheduler needs, once for each lab.
fn install(lab: &Lab) {
    for part in [
        "deploy/base/namespace.yaml",
        "deploy/base/crds/postgresbackups.yaml",
        "deploy/base/scheduler-rbac.yaml",
        "deploy/base/credentials-clusterrole.yaml",
        "deploy/overlays/rook/ceph-rbac.yaml",
        "deploy/overlays/rook/cephclient.yaml",
    ] {
        let path = repository::root().join(part);
        lab.kubectl_ok(&["apply", "--server-side", "--force-conflicts", "-f", path.to_str().unwrap()])
            .unwrap();
    }
    let secret = ["-n", "rook-ceph", "get", "secret", "rook-ceph-client-howdah-backup"];
    assert!(wait_until(CLAIM_LIMIT, || lab.kubectl_ok(&secret).is_ok()), "Rook's glue made no key");
}

impl Stage {
    /// `annotations` of the StatefulSet; `granted`: whether the scheduler may read the namespace's Secrets.
    fn new(annotations: Value, granted: bool) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let lab = Lab::open_or_up(&shared_name(), 0).unwrap();
        install(&lab);
        let namespace = lab.namespace("scheduler").unwrap();
        let (folder, postgres) = start_postgres(&lab);
        let root = folder.path().to_str().unwrap();
        let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "db"}, "stringData": {"password": PASSWORD}},
            {"apiVersion": "apps/v1", "kind": "StatefulSet",
             "metadata": {"name": "db", "labels": {"howdah.dev/protect": "true"}, "annotations": annotations},
             "spec": {
                "serviceName": "db", "replicas": 1, "selector": {"matchLabels": {"app": "db"}},
                "template": {"metadata": {"labels": {"app": "db"}}, "spec": {
                    // No kubelet of a lab that others share may start it.
                    "nodeSelector": {"howdah.dev/no-such-node": "true"},
                    "containers": [{"name": "postgres", "image": "docker.io/library/postgres:15",
                        "env": [
                            {"name": "PGDATA", "value": format!("{root}/data")},
                            {"name": "PGPORT", "value": PORT.to_string()},
                            {"name": "POSTGRES_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "db", "key": "password"}}}],
                        "volumeMounts": [{"name": "data", "mountPath": root}]}]}},
                "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"],
                    "storageClassName": "rook-ceph-block", "resources": {"requests": {"storage": "64Mi"}}}}]}}
        ]});
        let stage = Self { lab, namespace, postgres, _folder: folder, _turn: turn };
        let applied = stage
            .lab
            .kubectl_with_input(&["-n", stage.namespace.name(), "apply", "-f", "-"], &objects.to_string());
        let applied = applied.unwrap();
        assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        if granted {
            stage.grant();
        }
        let phase = ["get", "pvc", "data-db-0", "-o", "jsonpath={.status.phase}"];
        assert!(wait_until(CLAIM_LIMIT, || stage.kubectl_try(&phase).is_ok_and(|phase| phase == "Bound")));
        let ready = json!({"status": {
            "phase": "Running", "podIP": BRIDGE_ADDRESS.to_string(), "podIPs": [{"ip": BRIDGE_ADDRESS.to_string()}],
            "hostIP": BRIDGE_ADDRESS.to_string(), "hostIPs": [{"ip": BRIDGE_ADDRESS.to_string()}],
            "conditions": [{"type": "Ready", "status": "True"}]}});
        let patch = ["patch", "pod", "db-0", "--subresource=status", "--type=merge", "-p"];
        stage.kubectl(&[&patch[..], &[&ready.to_string()]].concat());
        stage
    }

    /// What a user runs, word for word as a failed backup says it.
    fn grant(&self) {
        self.kubectl(&[
            "create",
            "rolebinding",
            "howdah-credentials",
            "--clusterrole=howdah-credentials",
            "--serviceaccount=howdah-system:howdah-scheduler",
        ]);
    }

    fn kubectl_try(&self, args: &[&str]) -> anyhow::Result<String> {
        self.lab.kubectl_ok(&[&["-n", self.namespace.name()], args].concat())
    }

    fn kubectl(&self, args: &[&str]) -> String {
        self.kubectl_try(args).unwrap()
    }

    /// Starts a scheduler as its service account.
    fn scheduler(&self, name: &str, port: u16) -> Process {
        let token = ["create", "token", "howdah-scheduler", "-n", "howdah-system", "--duration=1h"];
        let token = self.lab.kubectl_ok(&token).unwrap();
        let text = fs::read_to_string(self.lab.inside_kubeconfig()).unwrap();
        let mut config: Value = serde_yaml_ng::from_str(&text).unwrap();
        config["users"][0]["user"] = json!({"token": token.trim()});
        let kubeconfig = self.lab.path(format!("kubeconfig-{name}"));
        fs::write(&kubeconfig, config.to_string()).unwrap();
        let mut command = self.lab.command(scheduler_binary());
        command.arg("--kubeconfig").arg(kubeconfig);
        command.args(["--listen", &format!("127.0.0.1:{port}"), "--identity", name, "--wake-seconds", "2"]);
        command.env_remove("POD_NAMESPACE").env_remove("POD_NAME");
        let mut process = self.lab.spawn_inside(name, &command).unwrap();
        let url = format!("http://127.0.0.1:{port}/readyz");
        let answers = || {
            let mut curl = self.lab.command("curl");
            self.lab.output_inside(curl.args(["-sf", "--max-time", "2", &url])).is_ok()
        };
        process.wait_ready(LEAD_LIMIT, answers).unwrap();
        process
    }

    /// Asks for a backup by hand, as a user would.
    fn order(&self, name: &str, consistency: Option<&str>) {
        let mut order = json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
            "metadata": {"name": name}, "spec": {"statefulSet": "db"}});
        if let Some(class) = consistency {
            order["spec"]["consistency"] = json!(class);
        }
        let made = self
            .lab
            .kubectl_with_input(&["-n", self.namespace.name(), "create", "-f", "-"], &order.to_string());
        let made = made.unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }

    fn backups(&self) -> Vec<PostgresBackup> {
        let list: Value = serde_json::from_str(&self.kubectl(&["get", "pgb", "-o", "json"])).unwrap();
        list["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| serde_json::from_value(item.clone()).unwrap())
            .collect()
    }

    fn status(&self, backup: &str) -> BackupStatus {
        let text = self.kubectl(&["get", "pgb", backup, "-o", "json"]);
        serde_json::from_str::<PostgresBackup>(&text).unwrap().status.unwrap_or_default()
    }

    /// Waits until the backup is over.
    fn wait_over(&self, backup: &str, scheduler: &Process) -> BackupStatus {
        let over = wait_until(BACKUP_LIMIT, || self.status(backup).phase.is_terminal());
        assert!(over, "{:?}\n{}", self.status(backup), scheduler.output().unwrap());
        self.status(backup)
    }

    fn image(&self) -> String {
        let volume = self.kubectl(&["get", "pvc", "data-db-0", "-o", "jsonpath={.spec.volumeName}"]);
        let name = ["get", "pv", &volume, "-o", "jsonpath={.spec.csi.volumeAttributes.imageName}"];
        format!("{POOL}/{}", self.kubectl(&name))
    }

    fn snapshots(&self) -> Vec<String> {
        let text = self.lab.rbd(&["snap", "ls", "--format", "json", &self.image()]).unwrap();
        let list: Value = serde_json::from_str(&text).unwrap();
        list.as_array()
            .unwrap()
            .iter()
            .map(|snapshot| snapshot["name"].as_str().unwrap().to_owned())
            .collect()
    }

    fn sql(&self, query: &str) -> String {
        let mut psql = self.lab.command("psql");
        psql.env("PGPASSWORD", PASSWORD).args(["-h", &BRIDGE_ADDRESS.to_string(), "-p", &PORT.to_string()]);
        self.lab.output_inside(psql.args(["-U", "postgres", "-XAtc", query])).unwrap().trim().to_owned()
    }

    /// Sessions of howdah; one in backup mode is among them.
    fn sessions(&self) -> String {
        self.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'howdah'")
    }

    fn postgres_log(&self) -> String {
        self.postgres.output().unwrap()
    }
}

/// PostgreSQL in the lab's network, on the address that the pod is given.
fn start_postgres(lab: &Lab) -> (TempDir, Process) {
    let Some(user) = User::from_name("postgres").unwrap() else {
        panic!("there is no user postgres: run make setup, which installs postgresql-15")
    };
    let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
    let folder = tempfile::Builder::new().prefix("howdah-postgres-").tempdir().unwrap();
    chown(folder.path(), Some(uid), Some(gid)).unwrap();
    let (data, password) = (folder.path().join("data"), folder.path().join("password"));
    fs::write(&password, PASSWORD).unwrap();
    let made = Command::new(format!("{BINARIES}/initdb"))
        .uid(uid)
        .gid(gid)
        .current_dir(folder.path())
        .args(["--auth=scram-sha-256", "--username=postgres", "--no-sync", "--pgdata"])
        .arg(&data)
        .arg(format!("--pwfile={}", password.display()))
        .output()
        .unwrap();
    assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
    let append = |file: &str, line: &str| {
        let path = data.join(file);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, format!("{text}\n{line}\n")).unwrap();
    };
    append("pg_hba.conf", "host all all 10.77.0.0/16 scram-sha-256");
    append(
        "postgresql.conf",
        &format!("listen_addresses = '{BRIDGE_ADDRESS}'\nport = {PORT}\nunix_socket_directories = ''"),
    );
    let mut command = lab.command("setpriv");
    command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]);
    command.arg(format!("{BINARIES}/postgres")).arg("-D").arg(&data);
    let mut process = lab.spawn_inside("scheduler-test-postgres", &command).unwrap();
    let log = lab.path("logs/scheduler-test-postgres.log");
    let ready = || fs::read_to_string(&log).is_ok_and(|text| text.contains("ready to accept connections"));
    process.wait_ready(START_LIMIT, ready).unwrap();
    (folder, process)
}

/// The scheduler of this tree, built the way this test was.
fn scheduler_binary() -> PathBuf {
    static BUILT: Mutex<bool> = Mutex::new(false);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if !*built {
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "-p", "howdah-scheduler"])
            .current_dir(repository::root())
            .status()
            .unwrap();
        assert!(status.success(), "build howdah-scheduler");
        *built = true;
    }
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(|deps| deps.parent()).unwrap().join("howdah-scheduler")
}

/// Waits until the record of a backup shows `phase`, and returns at that moment.
fn wait_phase(lab: &Lab, namespace: &str, backup: &str, phase: Phase) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let api = Api::<PostgresBackup>::namespaced(lab.client().await.unwrap(), namespace);
        let only = watcher::Config::default().fields(&format!("metadata.name={backup}"));
        let stream = watcher(api, only).applied_objects();
        pin_mut!(stream);
        let reached = async {
            while let Some(Ok(found)) = stream.next().await {
                let now = found.status.unwrap_or_default().phase;
                if now == phase {
                    return;
                }
                assert!(!now.is_terminal(), "{backup} is over before it was seen in {phase:?}");
            }
        };
        tokio::time::timeout(BACKUP_LIMIT, reached).await.unwrap();
    });
}

#[test]
fn scheduled_backups_are_recorded_and_old_ones_pruned_but_never_a_held_one() {
    let annotations = json!({"howdah.dev/schedule": "*/10 * * * * *", "howdah.dev/retention": "last=2"});
    let stage = Stage::new(annotations, true);
    let scheduler = stage.scheduler("scheduler-a", 18081);
    let taken = || -> Vec<PostgresBackup> {
        let all = stage.backups().into_iter();
        all.filter(|backup| backup.status.as_ref().is_some_and(|status| status.phase == Phase::Taken))
            .collect()
    };
    assert!(wait_until(BACKUP_LIMIT, || !taken().is_empty()), "{}", scheduler.output().unwrap());
    let first = taken().remove(0);
    let name = first.metadata.name.clone().unwrap();
    stage.kubectl(&["annotate", "pgb", &name, "howdah.dev/hold=before the upgrade"]);

    let status = first.status.unwrap();
    let (slot, image, snapshot) = (status.slot.unwrap(), status.image.unwrap(), status.snapshot.unwrap());
    assert_eq!(name, names::backup_name("db", slot));
    assert_eq!(snapshot.name, names::snapshot_name(slot));
    assert_eq!(format!("{}/{}", image.pool, image.name), stage.image());
    assert_eq!(status.consistency, Some(Consistency::Online));
    assert_eq!(status.timeline, Some(1));
    assert_eq!(
        status.system_identifier.unwrap(),
        stage.sql("SELECT system_identifier FROM pg_control_system()")
    );
    assert!(status.postgres_version.unwrap().starts_with("15."));
    let label = status.label.unwrap();
    let (start, stop) = (status.start_lsn.unwrap(), status.stop_lsn.unwrap());
    assert!(label.contains(&format!("START WAL LOCATION: {start}")), "{label}");
    assert_eq!(stage.sql(&format!("SELECT '{start}'::pg_lsn < '{stop}'::pg_lsn")), "t");
    assert!(status.steps.iter().all(|step| step.took_ms.is_some()), "{:?}", status.steps);
    let entry = stage.lab.rbd(&["image-meta", "get", &stage.image(), &names::image_meta_key(&snapshot.name)]);
    let entry = Entry::from_value(entry.unwrap().trim()).unwrap();
    assert_eq!(
        (entry.backup.as_str(), entry.snapshot_id, &entry.label),
        (name.as_str(), snapshot.id, &Some(label))
    );

    // Four more: two are kept, two are not, and the held one stays beside them.
    let second =
        || taken().into_iter().map(|backup| backup.spec.slot.unwrap()).filter(|other| *other > slot).min();
    assert!(wait_until(BACKUP_LIMIT, || second().is_some()));
    let second = second().unwrap();
    let gone = names::snapshot_name(second);
    assert!(
        wait_until(BACKUP_LIMIT, || !stage.snapshots().contains(&gone)),
        "{}",
        scheduler.output().unwrap()
    );
    let record = names::backup_name("db", second);
    assert!(wait_until(BACKUP_LIMIT, || stage.kubectl_try(&["get", "pgb", &record]).is_err()));
    let metadata = stage.lab.rbd(&["image-meta", "list", &stage.image()]).unwrap();
    assert!(!metadata.contains(&gone), "{metadata}");
    assert!(stage.snapshots().contains(&snapshot.name), "the held backup was pruned");
    let events = stage.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"]);
    assert!(events.contains(&format!("deleted {gone} (no rule keeps it)")), "{events}");
    assert!(!stage.postgres_log().contains(ABORTED), "{}", stage.postgres_log());
}

#[test]
fn a_scheduler_killed_inside_a_backup_leaves_nothing_and_the_next_one_finishes_it() {
    let stage = Stage::new(json!({}), true);
    for (i, phase) in
        [Phase::StartingBackupMode, Phase::Snapshotting, Phase::StoppingBackupMode, Phase::Recording]
            .into_iter()
            .enumerate()
    {
        let backup = format!("by-hand-{i}");
        let scheduler = stage.scheduler("scheduler-a", 18081);
        stage.order(&backup, None);
        wait_phase(&stage.lab, stage.namespace.name(), &backup, phase);
        scheduler.signal(Signal::SIGKILL).unwrap();
        assert!(wait_until(START_LIMIT, || stage.sessions() == "0"), "backup mode outlived the scheduler");
        drop(scheduler);

        let next = stage.scheduler("scheduler-b", 18082);
        let status = stage.wait_over(&backup, &next);
        assert_eq!(status.phase, Phase::Taken, "killed in {phase:?}: {status:?}");
        let own = status.snapshot.unwrap().name;
        let snapshots = stage.snapshots();
        assert_eq!(snapshots.iter().filter(|name| **name == own).count(), 1, "{snapshots:?}");
        assert_eq!(snapshots.len(), i + 1, "a stray snapshot after a kill in {phase:?}: {snapshots:?}");
        assert_eq!(stage.sessions(), "0");
        next.stop().unwrap();
    }
}

#[test]
fn of_two_schedulers_one_acts_and_the_other_follows() {
    let stage = Stage::new(json!({"howdah.dev/schedule": "*/10 * * * * *"}), true);
    let mut first = stage.scheduler("scheduler-a", 18081);
    let second = stage.scheduler("scheduler-b", 18082);
    assert!(wait_until(BACKUP_LIMIT, || stage.backups().len() >= 2), "{}", first.output().unwrap());
    let acted = |process: &Process| process.output().unwrap().contains("slot is due");
    assert!(acted(&first) && !acted(&second), "both acted, or the second one alone");
    first.signal(Signal::SIGTERM).unwrap();
    assert!(first.wait_gone(LEAD_LIMIT), "it does not end: {}", first.output().unwrap());
    assert_eq!(first.output().unwrap().matches("\"leading\"").count(), 1, "it led again while it ended");
    assert!(wait_until(LEAD_LIMIT, || acted(&second)), "{}", second.output().unwrap());
    let mut slots: Vec<_> = stage.backups().iter().map(|backup| backup.spec.slot.unwrap()).collect();
    let all = slots.len();
    slots.dedup();
    assert_eq!(slots.len(), all, "a slot was backed up twice");
}

#[test]
fn without_the_right_to_credentials_the_backup_is_crash_consistent_and_says_which_command_grants_it() {
    let stage = Stage::new(json!({}), false);
    let scheduler = stage.scheduler("scheduler-a", 18081);
    stage.order("by-hand", None);
    let status = stage.wait_over("by-hand", &scheduler);
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Crash)), "{status:?}");
    let condition = status.conditions.iter().find(|condition| condition.kind == "Online").unwrap();
    let command = format!(
        "kubectl create rolebinding howdah-credentials -n {} --clusterrole=howdah-credentials \
         --serviceaccount=howdah-system:howdah-scheduler",
        stage.namespace.name()
    );
    assert!(condition.message.contains(&command), "{}", condition.message);

    stage.grant();
    stage.order("granted", Some("online"));
    let status = stage.wait_over("granted", &scheduler);
    assert_eq!((status.phase, status.consistency), (Phase::Taken, Some(Consistency::Online)), "{status:?}");
}

/// Who is blocklisted; clients of other tests that were killed may be among them.
fn blocklist(lab: &Lab) -> Vec<String> {
    lab.ceph(&["osd", "blocklist", "ls"]).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_stalled_writer_fails_the_attempt_cleanly_and_a_later_one_succeeds() {
    let stage = Stage::new(json!({}), true);
    let scheduler = stage.scheduler("scheduler-a", 18081);
    // It writes slowly and without end, and so holds the exclusive lock; stopped, it is a frozen node.
    let mut bench = stage.lab.command("rbd");
    bench.args(["bench", "--io-type", "write", "--io-size", "4K", "--io-threads", "1", "--io-total", "64G"]);
    let writer = stage.lab.spawn_inside("scheduler-test-writer", bench.arg(stage.image())).unwrap();
    let locked = || stage.lab.rbd(&["lock", "ls", &stage.image()]).is_ok_and(|text| text.contains("auto"));
    assert!(wait_until(START_LIMIT, locked), "{}", writer.output().unwrap());
    writer.signal(Signal::SIGSTOP).unwrap();
    let before = blocklist(&stage.lab);
    stage.order("by-hand", None);
    let failed = || stage.status("by-hand").failure.is_some();
    let seen = wait_until(BACKUP_LIMIT, failed);
    let status = stage.status("by-hand");
    writer.signal(Signal::SIGCONT).unwrap();
    assert!(seen, "{status:?}\n{}", scheduler.output().unwrap());
    let failure = status.failure.unwrap();
    assert_eq!(failure.step, Phase::Snapshotting, "{failure:?}");
    assert!(!failure.cure.is_empty());
    let status = stage.wait_over("by-hand", &scheduler);
    assert_eq!(status.phase, Phase::Taken, "{status:?}");
    assert!(status.attempt > 1 && status.failure.is_none(), "{status:?}");
    assert_eq!(stage.snapshots().len(), 1);
    let after = blocklist(&stage.lab);
    assert!(after.iter().all(|entry| before.contains(entry)), "the backup blocklisted a client: {after:?}");
    assert_eq!(stage.sessions(), "0");
}
