//! Restores of real databases: each lies on its volume's image, and a stand-in for its node ends it when its pod goes and
//! starts it on the volume when a pod is there again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use futures::{StreamExt as _, pin_mut};
use howdah_adapters::records::PostgresRestore;
use howdah_core::backup;
use howdah_core::names;
use howdah_core::restore::{Method, Phase, RestoreStatus};
use howdah_lab::ceph::POOL;
use howdah_lab::netns::BRIDGE_ADDRESS;
use howdah_lab::postgres::{DEBIAN_MAJOR, PASSWORD};
use howdah_lab::process::wait_until;
use howdah_lab::storage::claim::{Claim, wait_slowly};
use howdah_lab::testing::Process;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;
use kube::runtime::{WatchStreamExt as _, watcher};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::stage::{BACKUP_LIMIT, Database, Place, START_LIMIT, Server, Stage, name_of};

/// A restore takes some fifteen seconds, most of them the stop and the start of the server on a busy machine.
const RESTORE_LIMIT: Duration = Duration::from_secs(300);
/// Between two looks of the stand-in at its pod.
const LOOK: Duration = Duration::from_millis(200);
/// Each a process, so that a commit is acknowledged or not, and never lost in a pipe. What it prints was acknowledged.
const LEDGER: &str = "n=0; while n=$((n + 1)); do \
    psql -XAtqc \"INSERT INTO ledger VALUES ($n)\" >/dev/null 2>&1 && echo $n; done";

/// What a node does for the one pod of a StatefulSet.
struct Node<'a> {
    stage: &'a Stage,
    name: String,
    image: String,
    place: Place,
    /// The server, and the uid of the pod it runs for.
    running: Mutex<Option<(String, Server)>>,
    ends: AtomicBool,
}

impl<'a> Node<'a> {
    fn of(database: Database<'a>) -> Self {
        let Database { stage, name, image, server } = database;
        let place = server.place().clone();
        let uid = stage.pod_uid(&format!("{name}-0")).unwrap();
        let running = Mutex::new(Some((uid, server)));
        Self { stage, name, image, place, running, ends: AtomicBool::new(false) }
    }

    /// Runs `work` beside the stand-in.
    fn play<T>(&self, work: impl FnOnce() -> T) -> T {
        /// Ends the stand-in also when `work` panics.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        thread::scope(|scope| {
            scope.spawn(|| {
                while !self.ends.load(Ordering::Relaxed) {
                    self.look();
                    thread::sleep(LOOK);
                }
            });
            let _end = End(&self.ends);
            work()
        })
    }

    fn look(&self) {
        let wanted = self.stage.pod_uid(&format!("{}-0", self.name));
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.as_ref().map(|(uid, _)| uid) != wanted.as_ref() {
            // Ends the server, unmounts and unmaps.
            *running = None;
        }
        let (None, Some(uid)) = (&*running, wanted) else { return };
        let server = Server::again(&self.stage.lab, DEBIAN_MAJOR, &self.image, self.place.clone());
        *running = Some((uid, server));
        self.stage.show_ready(&self.name);
    }

    fn sql(&self, query: &str) -> String {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().unwrap().1.sql(query)
    }

    /// A writer that says which of its rows were acknowledged.
    fn ledger(&self) -> Process {
        self.sql("CREATE TABLE IF NOT EXISTS ledger (n int PRIMARY KEY)");
        let mut shell = self.stage.lab.command("bash");
        shell.args(["-c", LEDGER]).env("PGPASSWORD", PASSWORD).env("PGUSER", "postgres");
        shell.env("PGHOST", BRIDGE_ADDRESS.to_string()).env("PGPORT", self.place.port().to_string());
        self.stage.lab.spawn_inside(&format!("ledger-{}", self.place.port()), &shell).unwrap()
    }

    fn order_backup(&self, name: &str) {
        let spec = json!({"statefulSet": self.name});
        self.stage.apply(&json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
            "metadata": {"name": name}, "spec": spec}));
    }

    /// Takes a backup and waits for its end.
    fn back_up(&self, name: &str) -> backup::BackupStatus {
        self.order_backup(name);
        let status = self.stage.wait_over(name);
        assert_eq!(status.phase, backup::Phase::Taken, "{status:?}");
        status
    }

    fn order(&self, name: &str, what: Value) {
        let mut spec = json!({"statefulSet": self.name});
        spec.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
        self.stage.apply(&json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresRestore",
            "metadata": {"name": name}, "spec": spec}));
    }

    fn wait_over(&self, restore: &str) -> RestoreStatus {
        let status = || self.stage.restore(restore).unwrap_or_default();
        let over = wait_until(RESTORE_LIMIT, || status().phase.is_terminal());
        assert!(over, "{:#?}\n{}", status(), self.stage.scheduler_log());
        status()
    }

    /// Restores, waits for the end, and checks what holds after every restore that went well.
    fn restore(&self, name: &str, what: Value) -> RestoreStatus {
        self.order(name, what);
        let status = self.wait_over(name);
        self.check_completed(&status);
        status
    }

    fn check_completed(&self, status: &RestoreStatus) {
        assert_eq!(status.phase, Phase::Completed, "{status:#?}");
        assert!(status.proofs.iter().all(|proof| proof.holds) && status.failure.is_none(), "{status:#?}");
        assert_eq!(self.gate(), "");
        assert_eq!(self.field("{.spec.replicas}"), "1");
        let live = self.id(&self.image);
        assert_eq!(self.claim().journal("csi.imageid").unwrap(), live, "ceph-csi would delete another image");
        let images = self.images();
        assert!(
            images.iter().all(|image| !image.contains(".howdah-new-")),
            "a clone is left over: {images:?}"
        );
        match status.method.unwrap() {
            Method::Swap => {
                assert_eq!(status.incoming.as_ref().unwrap().id, live);
                let safety = status.safety_image.as_ref().unwrap();
                assert_eq!(self.id(&safety.spec()), safety.id, "the safety copy is another image");
            }
            Method::Rollback => {
                assert_eq!(status.image.as_ref().unwrap().id, live);
                let safety = &status.safety_snapshot.as_ref().unwrap().name;
                assert!(self.stage.lab.rbd(&["snap", "ls", &self.image]).unwrap().contains(safety));
            }
        }
        // Somebody who deletes the record is not held up.
        let finalizers = self.stage.restore_record(status).metadata.finalizers.unwrap_or_default();
        assert!(finalizers.is_empty(), "{finalizers:?}");
    }

    fn field(&self, jsonpath: &str) -> String {
        self.stage.kubectl(&["get", "statefulset", &self.name, "-o", &format!("jsonpath={jsonpath}")])
    }

    fn gate(&self) -> String {
        self.field(r"{.metadata.annotations.howdah\.dev/gate}")
    }

    fn claim(&self) -> Claim {
        Claim::bound(&self.stage.lab, self.stage.namespace.name(), &format!("data-{}-0", self.name)).unwrap()
    }

    fn id(&self, image: &str) -> String {
        let info = self.stage.lab.rbd(&["info", "--format", "json", image]).unwrap();
        serde_json::from_str::<Value>(&info).unwrap()["id"].as_str().unwrap().to_owned()
    }

    /// The names of all images of the volume.
    fn images(&self) -> Vec<String> {
        let all = self.stage.lab.rbd(&["ls", POOL]).unwrap();
        all.lines().filter(|name| name.starts_with(name_of(&self.image))).map(str::to_owned).collect()
    }
}

impl Stage {
    fn restores(&self) -> Api<PostgresRestore> {
        Api::namespaced(self.client.clone(), self.namespace.name())
    }

    fn restore(&self, name: &str) -> Option<RestoreStatus> {
        self.runtime.block_on(self.restores().get_opt(name)).unwrap()?.status
    }

    /// The record with this status: no two are alike.
    fn restore_record(&self, status: &RestoreStatus) -> PostgresRestore {
        let all = self.runtime.block_on(self.restores().list(&ListParams::default())).unwrap().items;
        all.into_iter().find(|record| record.status.as_ref() == Some(status)).unwrap()
    }

    /// Waits until a restore's status is so, and returns at that moment.
    fn wait_restore(&self, restore: &str, so: impl Fn(&RestoreStatus) -> bool) {
        self.runtime.block_on(async {
            let only = watcher::Config::default().fields(&format!("metadata.name={restore}"));
            let stream = watcher(self.restores(), only).applied_objects();
            pin_mut!(stream);
            let reached = async {
                while let Some(Ok(found)) = stream.next().await {
                    if so(&found.status.unwrap_or_default()) {
                        return;
                    }
                }
            };
            tokio::time::timeout(RESTORE_LIMIT, reached).await.unwrap();
        });
    }

    /// The uid of a pod; none when there is none, or when it is going.
    fn pod_uid(&self, pod: &str) -> Option<String> {
        let pods = Api::<Pod>::namespaced(self.client.clone(), self.namespace.name());
        let found = self.runtime.block_on(pods.get_opt(pod)).unwrap()?;
        found.metadata.deletion_timestamp.is_none().then_some(found.metadata.uid?)
    }
}

fn acknowledged(ledger: &Process) -> Vec<u32> {
    ledger.output().unwrap().lines().filter_map(|line| line.parse().ok()).collect()
}

#[test]
fn a_swap_under_load_holds_every_row_of_the_backup_and_is_undone_to_the_last_row() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        let writer = node.ledger();
        let some = |more: usize| {
            let before = acknowledged(&writer).len();
            assert!(wait_until(START_LIMIT, || acknowledged(&writer).len() >= before + more));
        };
        some(20);
        let before = acknowledged(&writer);
        let backup = node.back_up("first");
        some(20);
        let all = acknowledged(&writer);
        writer.stop().unwrap();
        // A row that was under way is in the ledger or not, and stays so.
        let others = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'psql' AND pid <> pg_backend_pid()";
        assert!(wait_until(START_LIMIT, || node.sql(others) == "0"));
        let rows = || -> Vec<u32> {
            node.sql("SELECT n FROM ledger ORDER BY n").lines().map(|n| n.parse().unwrap()).collect()
        };
        let ledger = rows();
        let holds = |rows: &[u32], acknowledged: &[u32]| {
            let missing: Vec<&u32> = acknowledged.iter().filter(|n| rows.binary_search(n).is_err()).collect();
            assert!(missing.is_empty(), "acknowledged rows are missing: {missing:?}");
        };
        holds(&ledger, &all);
        let restored = node.restore("to-first", json!({"to": "first"}));
        assert_eq!(restored.source.as_ref().unwrap().name, "first");
        let old = rows();
        holds(&old, &before);
        assert!(old.len() < ledger.len(), "nothing was restored");
        // No row without those that were acknowledged before it.
        let up_to: Vec<u32> = all.iter().copied().filter(|n| n <= old.last().unwrap()).collect();
        holds(&old, &up_to);
        let identifier = node.sql("SELECT system_identifier FROM pg_control_system()");
        assert_eq!(Some(identifier), backup.system_identifier);

        // The volume goes on: a backup of the image that took the place, and a restore of the one before it.
        node.sql("CREATE TABLE after_the_restore ()");
        let second = node.back_up("second");
        assert_eq!(second.image.unwrap().id, restored.incoming.unwrap().id);
        let again = node.restore("to-first-again", json!({"to": "first"}));
        assert_eq!(again.source.unwrap().image.id, backup.image.unwrap().id);
        assert_eq!(node.sql("SELECT to_regclass('after_the_restore') IS NULL"), "t");

        // Undone one by one, newest first, down to what the writer left.
        node.order("wrong-order", json!({"undo": "to-first"}));
        let refused = node.wait_over("wrong-order");
        assert_eq!(refused.phase, Phase::Failed);
        assert!(refused.failure.unwrap().cure.contains("undo the later restore first"));
        node.restore("undo-again", json!({"undo": "to-first-again"}));
        assert_eq!(node.sql("SELECT to_regclass('after_the_restore') IS NOT NULL"), "t");
        node.restore("undo-first", json!({"undo": "to-first"}));
        assert_eq!(rows(), ledger, "the undo lost rows");

        // A backup of the image that was undone is still one of this database.
        let newest = node.restore("to-second", json!({"to": "newest"}));
        assert_eq!(newest.source.unwrap().name, "second");
        assert_eq!(node.sql("SELECT to_regclass('after_the_restore') IS NOT NULL"), "t");
    });
}

#[test]
fn a_restore_ends_the_same_in_whatever_phase_its_scheduler_is_killed() {
    let stage = Stage::alone();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        let mut scheduler = stage.scheduler("scheduler-0", 18081);
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        node.sql("UPDATE t SET n = 2");
        node.back_up("two");
        let swaps = [
            Phase::Gating,
            Phase::Stopping,
            Phase::Proving,
            Phase::Preparing,
            Phase::SettingAside,
            Phase::Placing,
            Phase::Bookkeeping,
            Phase::Starting,
            Phase::Answering,
            Phase::Opening,
        ];
        for (i, phase) in swaps.into_iter().enumerate() {
            let (backup, wanted) = if i % 2 == 0 { ("one", "1") } else { ("two", "2") };
            let restore = format!("killed-in-{}", phase.as_str().to_lowercase());
            node.order(&restore, json!({"to": backup}));
            scheduler = kill_in(&node, scheduler, &restore, phase, i);
            let status = node.wait_over(&restore);
            node.check_completed(&status);
            assert_eq!(node.sql("SELECT n FROM t"), wanted, "killed in {phase:?}");
            // The image in place, and one safety copy for each restore.
            assert_eq!(node.images().len(), i + 2, "killed in {phase:?}: {:?}", node.images());
        }
        scheduler.stop().unwrap();
    });
}

#[test]
fn a_rollback_is_completed_by_the_next_scheduler_and_can_be_undone() {
    let stage = Stage::alone();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        let mut scheduler = stage.scheduler("scheduler-0", 18081);
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        let backup = node.back_up("one");
        for (i, phase) in [Phase::Safeguarding, Phase::RollingBack].into_iter().enumerate() {
            node.sql(&format!("UPDATE t SET n = {}", i + 2));
            let restore = format!("killed-in-{}", phase.as_str().to_lowercase());
            node.order(&restore, json!({"to": "one", "method": "rollback"}));
            scheduler = kill_in(&node, scheduler, &restore, phase, i);
            let status = node.wait_over(&restore);
            node.check_completed(&status);
            assert_eq!(node.id(&node.image), backup.image.as_ref().unwrap().id);
            assert_eq!(node.sql("SELECT n FROM t"), "1", "killed in {phase:?}");
        }
        node.restore("undo", json!({"undo": "killed-in-rollingback"}));
        assert_eq!(node.sql("SELECT n FROM t"), "3");
        scheduler.stop().unwrap();
    });
}

/// Kills the scheduler when the restore is in `phase`, and starts another.
fn kill_in(node: &Node<'_>, scheduler: Process, restore: &str, phase: Phase, number: usize) -> Process {
    node.stage.wait_restore(restore, |status| {
        assert!(
            !status.phase.is_terminal(),
            "{restore} is over before it was seen in {phase:?}: {status:#?}"
        );
        status.phase == phase
    });
    scheduler.signal(Signal::SIGKILL).unwrap();
    drop(scheduler);
    node.stage.scheduler(&format!("scheduler-{}", number + 1), 18082 + number as u16)
}

#[test]
fn a_volume_that_was_swapped_grows_and_is_deleted_and_its_safety_copy_outlives_it() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        let before = node.id(&node.image);
        let status = node.restore("restore", json!({"to": "one"}));
        let (live, safety) = (status.incoming.unwrap(), status.safety_image.unwrap());
        assert_ne!(live.id, before);

        let more = r#"{"spec":{"resources":{"requests":{"storage":"224Mi"}}}}"#;
        stage.kubectl(&["patch", "pvc", "data-db-0", "--patch", more]);
        let size = |image: &str| -> u64 {
            let info = stage.lab.rbd(&["info", "--format", "json", image]).unwrap();
            serde_json::from_str::<Value>(&info).unwrap()["size"].as_u64().unwrap()
        };
        assert!(wait_slowly(BACKUP_LIMIT, || size(&node.image) == 224 << 20), "{}", size(&node.image));
        assert_eq!(size(&safety.spec()), 160 << 20, "the safety copy was grown");
        // A backup from before the growth is grown to what Kubernetes knows.
        node.restore("again", json!({"to": "one"}));
        assert_eq!(size(&node.image), 224 << 20);
        let live = node.id(&node.image);

        let claim = node.claim();
        stage.kubectl(&["scale", "statefulset", "db", "--replicas=0"]);
        let at_rest = || claim.watchers().is_ok_and(|watchers| watchers.is_empty());
        assert!(wait_slowly(START_LIMIT, || stage.pod_uid("db-0").is_none() && at_rest()));
        claim.delete_volume().unwrap();
        let trash = || stage.lab.rbd(&["trash", "ls", POOL]).unwrap();
        assert!(wait_slowly(BACKUP_LIMIT, || !trash().contains(&live)), "the volume was not removed");
        assert!(stage.lab.rbd(&["info", &node.image]).is_err());
        assert_eq!(node.id(&safety.spec()), safety.id, "the safety copy went with the volume");
        let snapshots = stage.lab.rbd(&["snap", "ls", &safety.spec()]).unwrap();
        assert!(snapshots.contains(names::SNAPSHOT_PREFIX), "the backup went with the volume: {snapshots}");
    });
}

#[test]
fn while_somebody_has_the_image_open_nothing_is_touched_and_no_backup_begins() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        node.sql("UPDATE t SET n = 2");
        let live = node.id(&node.image);
        // It ends with its input.
        let mut watch = stage.lab.command("bash");
        watch.args(["-c", &format!("exec rbd watch {} < <(sleep 600)", node.image)]);
        let watcher = stage.lab.spawn_inside("restore-test-watcher", &watch).unwrap();
        let watchers = || node.claim().watchers().unwrap().len();
        assert!(wait_slowly(START_LIMIT, || watchers() == 2), "{}", watcher.output().unwrap());

        node.order("waits", json!({"to": "one"}));
        let missing = |status: &RestoreStatus| {
            status.proofs.iter().any(|proof| !proof.holds && proof.seen.contains("is open on"))
                && status.proofs.iter().filter(|proof| !proof.holds).count() == 1
        };
        stage.wait_restore("waits", missing);
        assert_eq!((node.gate().as_str(), node.field("{.spec.replicas}").as_str()), ("restore/waits", "0"));
        // Due at every second, and one by hand: none begins while the gate is closed.
        stage.kubectl(&["annotate", "statefulset", "db", "howdah.dev/schedule=* * * * * *"]);
        node.order_backup("by-hand");
        thread::sleep(Duration::from_secs(6));
        let begun = stage.backups().into_iter().filter(|backup| {
            backup.metadata.name.as_deref() != Some("one")
                && backup.status.as_ref().is_some_and(|status| status.started_at.is_some())
        });
        assert_eq!(begun.count(), 0, "a backup began while the gate was closed");
        stage.kubectl(&["annotate", "statefulset", "db", "howdah.dev/schedule-"]);
        assert_eq!(stage.restore("waits").unwrap().phase, Phase::Proving);
        assert_eq!((node.id(&node.image), node.images().len()), (live, 1), "the storage was touched");

        watcher.stop().unwrap();
        let status = node.wait_over("waits");
        node.check_completed(&status);
        assert_eq!(node.sql("SELECT n FROM t"), "1");
        assert_eq!(stage.wait_over("by-hand").phase, backup::Phase::Taken);
    });
}

#[test]
fn what_cannot_be_restored_is_refused_with_its_cure_and_the_database_runs_on() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        let refused = |name: &str, what: Value, reason: &str| {
            node.order(name, what);
            let status = node.wait_over(name);
            assert_eq!(status.phase, Phase::Failed, "{status:#?}");
            let failure = status.failure.unwrap();
            assert!(failure.reason.contains(reason) && !failure.cure.is_empty(), "{failure:?}");
            let phases: Vec<Phase> = status.steps.iter().map(|step| step.phase).collect();
            assert_eq!(phases, [Phase::Preflight], "{name}");
        };
        refused("none", json!({"to": "newest"}), "there is no good backup of db");
        let backup = node.back_up("one");
        stage.apply(&json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
            "metadata": {"name": "other"}, "spec": {"statefulSet": "shop"}}));
        refused("unknown", json!({"to": "nothing"}), "there is no backup nothing");
        refused("other-set", json!({"to": "other"}), "is of shop, not of db");
        refused("early", json!({"before": "2020-01-01T00:00:00Z"}), "was taken before");
        refused("future", json!({"before": "2120-01-01T00:00:00Z"}), "lies in the future");
        refused("no-restore", json!({"undo": "nothing"}), "there is no restore nothing");
        refused("not-done", json!({"undo": "early"}), "only a completed one");
        node.restore("before", json!({"before": jiff::Timestamp::now()}));
        node.restore("undo", json!({"undo": "before"}));

        // A swap of the image by hand: the backup's is no longer of the lineage.
        let snapshot = format!("{}@{}", node.image, backup.snapshot.unwrap().name);
        stage.lab.rbd(&["snap", "rm", "--no-progress", &snapshot]).unwrap();
        refused("snapshot-gone", json!({"to": "one"}), "is gone");
        stage.kubectl(&["label", "statefulset", "db", "howdah.dev/protect-"]);
        refused("unlabelled", json!({"to": "one"}), "is not under howdah's care");
        assert_eq!(node.sql("SELECT 1"), "1");
    });
}

#[test]
fn a_database_that_was_stopped_is_restored_and_stays_so() {
    let stage = Stage::shared();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    node.play(|| {
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        node.sql("UPDATE t SET n = 2");
        stage.kubectl(&["scale", "statefulset", "db", "--replicas=0"]);
        let at_rest = || node.claim().watchers().is_ok_and(|watchers| watchers.is_empty());
        assert!(wait_slowly(START_LIMIT, || stage.pod_uid("db-0").is_none() && at_rest()));
        node.order("stopped", json!({"to": "newest"}));
        let status = node.wait_over("stopped");
        assert_eq!((status.phase, status.started), (Phase::Completed, false), "{status:#?}");
        assert_eq!((node.gate().as_str(), node.field("{.spec.replicas}").as_str()), ("", "0"));
        stage.kubectl(&["scale", "statefulset", "db", "--replicas=1"]);
        let back = || node.running.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        assert!(wait_until(RESTORE_LIMIT, back));
        assert_eq!(node.sql("SELECT n FROM t"), "1");
    });
}
