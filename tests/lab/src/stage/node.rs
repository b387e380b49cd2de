//! A stand-in for the node of a database: it ends the server when its pod goes, and starts it on the volume when a pod is
//! there again. And what restores do with it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use howdah_core::restore::{Method, Phase, RestoreStatus};
use howdah_core::{backup, names};
use serde_json::{Value, json};

use super::{Database, Part, Place, RESTORE_LIMIT, START_LIMIT, Server, Stage, name_of};
use crate::ceph::POOL;
use crate::netns::BRIDGE_ADDRESS;
use crate::postgres::{DEBIAN_MAJOR, PASSWORD};
use crate::process::wait_until;
use crate::storage::claim::{Claim, wait_slowly};
use crate::testing::Process;

/// Between two looks of the stand-in at its pod.
const LOOK: Duration = Duration::from_millis(200);
/// Each a process, so that a commit is acknowledged or not, and never lost in a pipe. What it prints was acknowledged. The
/// pause leaves the processors to what is tested.
const LEDGER: &str = "n=0; while n=$((n + 1)); do \
    psql -XAtqc \"INSERT INTO ledger VALUES ($n)\" >/dev/null 2>&1 && echo $n; sleep 0.05; done";

/// What a node does for the one pod of a StatefulSet.
pub struct Node<'a> {
    /// The stage it is on.
    pub stage: &'a Stage,
    /// Name of the StatefulSet.
    pub name: String,
    /// The image as POOL/NAME.
    pub image: String,
    /// Its further volumes.
    pub parts: Vec<Part>,
    place: Place,
    /// The server, and the uid of the pod it runs for.
    running: Mutex<Option<(String, Server)>>,
    ends: AtomicBool,
}

impl<'a> Node<'a> {
    /// Takes over a database that runs.
    pub fn of(database: Database<'a>) -> Self {
        let Database { stage, name, image, parts, server } = database;
        let place = server.place().clone();
        let uid = stage.pod_uid(&format!("{name}-0")).unwrap();
        let running = Mutex::new(Some((uid, server)));
        Self { stage, name, image, parts, place, running, ends: AtomicBool::new(false) }
    }

    /// Of a StatefulSet at zero, whose image has no database yet.
    pub fn empty(stage: &'a Stage, name: &str, place: Place) -> Self {
        let claim = Claim::bound(&stage.lab, stage.namespace.name(), &format!("data-{name}-0")).unwrap();
        let (image, running) = (claim.image().unwrap(), Mutex::new(None));
        let (name, parts) = (name.to_owned(), Vec::new());
        Self { stage, name, image, parts, place, running, ends: AtomicBool::new(false) }
    }

    /// Runs `work` beside the stand-in.
    pub fn play<T>(&self, work: impl FnOnce() -> T) -> T {
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
        let server =
            Server::again(&self.stage.lab, DEBIAN_MAJOR, &self.image, self.place.clone(), &self.parts);
        *running = Some((uid, server));
        self.stage.show_ready(&self.name);
    }

    /// Name, port and directory of its server.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What a query answers, a row a line.
    pub fn sql(&self, query: &str) -> String {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().unwrap().1.sql(query)
    }

    /// A writer that says which of its rows were acknowledged.
    pub fn ledger(&self) -> Process {
        self.sql("CREATE TABLE IF NOT EXISTS ledger (n int PRIMARY KEY)");
        let mut shell = self.stage.lab.command("bash");
        shell.args(["-c", LEDGER]).env("PGPASSWORD", PASSWORD).env("PGUSER", "postgres");
        shell.env("PGHOST", BRIDGE_ADDRESS.to_string()).env("PGPORT", self.place.port().to_string());
        self.stage.lab.spawn_inside(&format!("ledger-{}", self.place.port()), &shell).unwrap()
    }

    /// Asks for a backup by hand.
    pub fn order_backup(&self, name: &str) {
        self.stage.order_backup(&self.name, name, None);
    }

    /// Takes a backup and waits for its end.
    pub fn back_up(&self, name: &str) -> backup::BackupStatus {
        self.order_backup(name);
        let status = self.stage.wait_over(name);
        assert_eq!(status.phase, backup::Phase::Taken, "{status:?}");
        status
    }

    /// Asks for a restore by hand.
    pub fn order(&self, name: &str, what: Value) {
        let mut spec = json!({"statefulSet": self.name});
        spec.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
        self.stage.apply(&json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresRestore",
            "metadata": {"name": name}, "spec": spec}));
    }

    /// Waits until a restore is over.
    pub fn wait_over(&self, restore: &str) -> RestoreStatus {
        let status = || self.stage.restore(restore).unwrap_or_default();
        let over = wait_until(RESTORE_LIMIT, || status().phase.is_terminal());
        assert!(over, "{:#?}\n{}", status(), self.stage.scheduler_log());
        status()
    }

    /// Restores, waits for the end, and checks what holds after every restore that went well.
    pub fn restore(&self, name: &str, what: Value) -> RestoreStatus {
        self.order(name, what);
        let status = self.wait_over(name);
        self.check_completed(&status);
        status
    }

    /// Panics unless the restore went well and left nothing.
    pub fn check_completed(&self, status: &RestoreStatus) {
        assert_eq!(status.phase, Phase::Completed, "{status:#?}");
        assert!(status.proofs.iter().all(|proof| proof.holds) && status.failure.is_none(), "{status:#?}");
        assert_eq!(self.gate(), "");
        let replicas = status.replicas_after.or(status.replicas).unwrap();
        assert_eq!(self.field("{.spec.replicas}"), replicas.to_string());
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
        // What was done to the image with the data directory was done to the others.
        assert_eq!(status.parts.len(), self.parts.len());
        for part in &status.parts {
            let live = self.id(&part.image.spec());
            let claim =
                Claim::bound(&self.stage.lab, self.stage.namespace.name(), &part.volume.claim).unwrap();
            assert_eq!(claim.journal("csi.imageid").unwrap(), live, "ceph-csi would delete another image");
            match status.method.unwrap() {
                Method::Swap => {
                    assert_eq!(part.incoming.as_ref().unwrap().id, live, "{}", part.name);
                    let safety = part.safety_image.as_ref().unwrap();
                    assert_eq!(self.id(&safety.spec()), safety.id, "the safety copy is another image");
                }
                Method::Rollback => {
                    assert_eq!(part.image.id, live, "{}", part.name);
                    let safety = &part.safety_snapshot.as_ref().unwrap().name;
                    let snapshots = self.stage.lab.rbd(&["snap", "ls", &part.image.spec()]).unwrap();
                    assert!(snapshots.contains(safety), "{}", part.name);
                }
            }
        }
        // Somebody who deletes the record is not held up.
        let finalizers = self.stage.restore_record(status).metadata.finalizers.unwrap_or_default();
        assert!(finalizers.is_empty(), "{finalizers:?}");
    }

    /// The keys of the metadata of an image of howdah's: lineage, catalogue, holds.
    pub fn marks(&self, image: &str) -> Vec<String> {
        let text = self.stage.lab.rbd(&["image-meta", "list", "--format", "json", image]).unwrap();
        let metadata: Value = serde_json::from_str(&text).unwrap_or_default();
        let keys = metadata.as_object().into_iter().flatten().map(|(key, _)| key);
        keys.filter(|key| key.starts_with(names::ANNOTATION_PREFIX)).cloned().collect()
    }

    /// Stops the database, and waits until nobody has its image open.
    pub fn stop(&self) {
        self.stage.kubectl(&["scale", "statefulset", &self.name, "--replicas=0"]);
        let pod = format!("{}-0", self.name);
        let at_rest = || self.claim().watchers().is_ok_and(|watchers| watchers.is_empty());
        assert!(wait_slowly(START_LIMIT, || self.stage.pod_uid(&pod).is_none() && at_rest()));
    }

    /// Starts it again.
    pub fn start(&self) {
        self.stage.kubectl(&["scale", "statefulset", &self.name, "--replicas=1"]);
        self.wait_up();
    }

    /// Waits until its server runs.
    pub fn wait_up(&self) {
        assert!(wait_until(RESTORE_LIMIT, || self.is_up()));
    }

    /// Whether its server runs.
    pub fn is_up(&self) -> bool {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// A field of the StatefulSet.
    pub fn field(&self, jsonpath: &str) -> String {
        self.stage.kubectl(&["get", "statefulset", &self.name, "-o", &format!("jsonpath={jsonpath}")])
    }

    /// What holds its gate closed; nothing when it is open.
    pub fn gate(&self) -> String {
        self.field(r"{.metadata.annotations.howdah\.dev/gate}")
    }

    /// The claim of its volume.
    pub fn claim(&self) -> Claim {
        Claim::bound(&self.stage.lab, self.stage.namespace.name(), &format!("data-{}-0", self.name)).unwrap()
    }

    /// The id of an image, POOL/NAME.
    pub fn id(&self, image: &str) -> String {
        let info = self.stage.lab.rbd(&["info", "--format", "json", image]).unwrap();
        serde_json::from_str::<Value>(&info).unwrap()["id"].as_str().unwrap().to_owned()
    }

    /// Panics unless the volumes of a database in parts are of one instant.
    pub fn assert_one_state(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().unwrap().1.assert_one_state();
    }

    /// The names of all images of the volume.
    pub fn images(&self) -> Vec<String> {
        self.images_of(&self.image)
    }

    /// An image as POOL/NAME, and what restores made beside it; their names.
    pub fn images_of(&self, image: &str) -> Vec<String> {
        let all = self.stage.lab.rbd(&["ls", POOL]).unwrap();
        all.lines().filter(|name| name.starts_with(name_of(image))).map(str::to_owned).collect()
    }
}

/// The rows that a writer was acknowledged so far, in order.
pub fn acknowledged(ledger: &Process) -> Vec<u32> {
    ledger.output().unwrap().lines().filter_map(|line| line.parse().ok()).collect()
}
