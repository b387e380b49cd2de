//! A cluster without nodes in which the scheduler backs up real databases: the API server, the volumes and their
//! provisioner, Ceph and PostgreSQL are real, and each database lies on its volume's image, mapped on this machine. Where
//! a kubelet would run the pod, whoever uses this runs PostgreSQL and gives the pod its address and readiness.
//!
//! As in a test, whatever does not work ends the program, with where and why.

#![expect(clippy::unwrap_used, reason = "it is the stage of tests and benchmarks")]

mod node;
mod parts;
mod restores;
mod venues;

use std::fmt::Debug;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{OnceLock, PoisonError};
use std::time::Duration;

use crate::ceph::POOL;
use crate::files;
use crate::lab::Lab;
use crate::mapping::Mapping;
use crate::netns::BRIDGE_ADDRESS;
use crate::postgres::{self, Binaries, DEBIAN_MAJOR, PASSWORD};
use crate::process::{self, TERM_LIMIT, wait_some, wait_until};
use crate::repository;
use crate::storage::claim::{Claim, wait_slowly};
use crate::testing::{Process, TempNamespace};
use futures::{StreamExt as _, pin_mut};
use howdah_adapters::kubernetes::{KubernetesError, find};
use howdah_adapters::records::PostgresBackup;
use howdah_core::backup::{BackupStatus, Phase};
use kube::api::ListParams;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

pub use node::{Node, acknowledged};
pub use parts::Part;
pub use restores::RESTORE_LIMIT;
use venues::{Turn, Venue};

/// A backup takes some five seconds; other labs may run beside this one.
pub const BACKUP_LIMIT: Duration = Duration::from_secs(180);
/// Rook's glue makes a key in a second.
const KEY_LIMIT: Duration = Duration::from_secs(120);
/// initdb, recovery and the first start of PostgreSQL.
pub const START_LIMIT: Duration = Duration::from_secs(60);
/// A lost lease is free after 15 s.
pub const LEAD_LIMIT: Duration = Duration::from_secs(90);
/// The scheduler that tests share, and where it listens.
const SHARED: (&str, u16) = ("scheduler-shared", 18080);
/// Volume of a database of a few rows.
const VOLUME: &str = "160Mi";
/// Memory and WAL of a database of a few rows; its image is small.
const SMALL: &str = "shared_buffers = 8MB\nmin_wal_size = 2MB\nmax_wal_size = 16MB\nmax_connections = 20";

/// Each database of this process listens on a port of its own.
static PORT: AtomicU16 = AtomicU16::new(15432);

/// A namespace, and a turn.
pub struct Stage {
    /// The lab it is in.
    pub lab: Lab,
    /// The namespace of its objects.
    pub namespace: TempNamespace,
    /// For calls of the API server.
    pub runtime: Runtime,
    /// With the rights of an administrator.
    pub client: Client,
    venue: &'static Venue,
    _turn: Turn,
}

impl Stage {
    /// With the scheduler that others use, too; it runs.
    pub fn shared() -> Self {
        let stage = Self::new(Venue::shared());
        let mut scheduler = stage.venue.scheduler.lock().unwrap_or_else(PoisonError::into_inner);
        if !scheduler.as_mut().is_some_and(Process::is_alive) {
            *scheduler = Some(stage.scheduler(SHARED.0, SHARED.1));
        }
        drop(scheduler);
        stage
    }

    /// With no scheduler but those that the test starts.
    pub fn alone() -> Self {
        let stage = Self::new(Venue::alone());
        let shared = stage.venue.scheduler.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(scheduler) = shared {
            scheduler.stop().unwrap();
        }
        // One that an earlier run of the tests left.
        if let Some(left) = process::running(&stage.lab, SHARED.0) {
            left.stop(&stage.lab, TERM_LIMIT).unwrap();
        }
        stage
    }

    fn new((venue, turn): (&'static Venue, Turn)) -> Self {
        let lab = Lab::open_or_up(&venue.name, 0).unwrap();
        venue.installed.get_or_init(|| install(&lab));
        let namespace = lab.namespace("scheduler").unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let client = runtime.block_on(lab.client()).unwrap();
        Self { lab, namespace, runtime, client, venue, _turn: turn }
    }

    /// What a user runs, word for word as a failed backup says it.
    pub fn grant(&self) {
        self.kubectl(&[
            "create",
            "rolebinding",
            "howdah-credentials",
            "--clusterrole=howdah-credentials",
            "--serviceaccount=howdah-system:howdah-scheduler",
        ]);
    }

    /// Runs kubectl in the namespace.
    pub fn kubectl(&self, args: &[&str]) -> String {
        self.lab.kubectl_ok(&[&["-n", self.namespace.name()], args].concat()).unwrap()
    }

    /// Applies objects in the namespace.
    pub fn apply(&self, objects: &Value) {
        // The server's kind takes half as long as the client's.
        let apply = ["-n", self.namespace.name(), "apply", "--server-side", "--force-conflicts", "-f", "-"];
        let applied = self.lab.kubectl_with_input(&apply, &objects.to_string()).unwrap();
        assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    }

    /// Annotates a StatefulSet with `KEY=VALUE`.
    pub fn annotate(&self, set: &str, annotation: &str) {
        self.kubectl(&["annotate", "--overwrite", "statefulset", set, annotation]);
    }

    /// Starts a scheduler as its service account.
    pub fn scheduler(&self, name: &str, port: u16) -> Process {
        self.scheduler_with(name, port, &[])
    }

    /// The same with more arguments.
    pub fn scheduler_with(&self, name: &str, port: u16, more: &[&str]) -> Process {
        self.start_scheduler(name, port, |command| {
            command.args(more);
        })
    }

    /// The same with a `PATH` on which it finds its commands.
    pub fn scheduler_on(&self, name: &str, port: u16, path: &str) -> Process {
        self.start_scheduler(name, port, |command| {
            command.env("PATH", path);
        })
    }

    /// Starts one and does not wait until it is ready: whoever wants to see its first deed has to look before that.
    pub fn launch_scheduler(&self, name: &str, port: u16) -> Process {
        self.launch(name, port, |_| ())
    }

    fn start_scheduler(&self, name: &str, port: u16, more: impl FnOnce(&mut Command)) -> Process {
        let mut process = self.launch(name, port, more);
        let url = format!("http://127.0.0.1:{port}/readyz");
        let answers = || {
            let mut curl = self.lab.command("curl");
            self.lab.output_inside(curl.args(["-sf", "--max-time", "2", &url])).is_ok()
        };
        process.wait_ready(LEAD_LIMIT, answers).unwrap();
        process
    }

    fn launch(&self, name: &str, port: u16, more: impl FnOnce(&mut Command)) -> Process {
        let token = ["create", "token", "howdah-scheduler", "-n", "howdah-system", "--duration=1h"];
        let token = self.lab.kubectl_ok(&token).unwrap();
        let text = fs::read_to_string(self.lab.inside_kubeconfig()).unwrap();
        let mut config: Value = serde_yaml_ng::from_str(&text).unwrap();
        config["users"][0]["user"] = json!({"token": token.trim()});
        let kubeconfig = self.lab.path(format!("kubeconfig-{name}"));
        fs::write(&kubeconfig, config.to_string()).unwrap();
        let mut command = self.lab.command(scheduler_binary());
        command.arg("--kubeconfig").arg(kubeconfig);
        command.args(["--listen", &format!("127.0.0.1:{port}"), "--identity", name, "--wake-seconds", "1"]);
        more(&mut command);
        command.env_remove("POD_NAMESPACE").env_remove("POD_NAME");
        // A scheduler that is killed leaves its key behind: with the lab that goes, too.
        let temporary = self.lab.path("tmp");
        fs::create_dir_all(&temporary).unwrap();
        command.env("TMPDIR", temporary);
        self.lab.spawn_inside(name, &command).unwrap()
    }

    /// Runs `kubectl howdah` where it can reach Ceph itself.
    pub fn howdah(&self, arguments: &[&str]) -> String {
        self.howdah_on(&std::env::var("PATH").unwrap(), arguments)
    }

    /// The same with another `PATH`.
    pub fn howdah_on(&self, path: &str, arguments: &[&str]) -> String {
        let mut command = self.lab.command(scheduler_binary().with_file_name("kubectl-howdah"));
        command.env("PATH", path).arg("--kubeconfig").arg(self.lab.inside_kubeconfig()).args(arguments);
        self.lab.output_inside(&mut command).unwrap()
    }

    /// What the shared scheduler has said, for a test that fails.
    pub fn scheduler_log(&self) -> String {
        let scheduler = self.venue.scheduler.lock().unwrap_or_else(PoisonError::into_inner);
        scheduler.as_ref().map(|process| process.output().unwrap()).unwrap_or_default()
    }

    /// The names of the snapshots of users that an image has.
    pub fn snapshots(&self, image: &str) -> Vec<String> {
        let text = self.lab.rbd(&["snap", "ls", "--format", "json", image]).unwrap();
        let list: Value = serde_json::from_str(&text).unwrap();
        let names = list.as_array().unwrap().iter();
        names.map(|snapshot| snapshot["name"].as_str().unwrap().to_owned()).collect()
    }

    fn records(&self) -> Api<PostgresBackup> {
        Api::namespaced(self.client.clone(), self.namespace.name())
    }

    /// The records of the namespace.
    pub fn backups(&self) -> Vec<PostgresBackup> {
        self.runtime.block_on(self.records().list(&ListParams::default())).unwrap().items
    }

    /// Asks for a backup of a StatefulSet by hand, as a user would.
    pub fn order_backup(&self, set: &str, backup: &str, consistency: Option<&str>) {
        let mut order = json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
            "metadata": {"name": backup}, "spec": {"statefulSet": set}});
        if let Some(class) = consistency {
            order["spec"]["consistency"] = json!(class);
        }
        self.apply(&order);
    }

    /// The record; none when it is gone.
    pub fn backup(&self, name: &str) -> Option<PostgresBackup> {
        self.ask(|| self.runtime.block_on(find("get a backup", &self.records(), name)))
    }

    /// Asks again while there is no answer: an API server that was stopped has closed its connections meanwhile.
    fn ask<T>(&self, look: impl Fn() -> Result<T, KubernetesError>) -> T {
        let mut last = None;
        let answer = wait_some(START_LIMIT, || look().map_err(|error| last = Some(error)).ok());
        answer.unwrap_or_else(|| panic!("{last:?}"))
    }

    /// What the record says; nothing yet is the default.
    pub fn status(&self, backup: &str) -> BackupStatus {
        self.backup(backup).unwrap().status.unwrap_or_default()
    }

    /// Waits until the backup is over.
    pub fn wait_over(&self, backup: &str) -> BackupStatus {
        let over = wait_until(BACKUP_LIMIT, || self.status(backup).phase.is_terminal());
        assert!(over, "{:?}\n{}", self.status(backup), self.scheduler_log());
        self.status(backup)
    }

    /// Waits until the record of a backup shows `phase`, and returns at that moment.
    pub fn wait_phase(&self, backup: &str, phase: Phase) {
        self.wait_record(self.records(), backup, BACKUP_LIMIT, |record| {
            let now = record.status.as_ref().map(|status| status.phase).unwrap_or_default();
            assert!(now == phase || !now.is_terminal(), "{backup} is over before it was seen in {phase:?}");
            now == phase
        });
    }

    /// Waits until a record is so, and returns at that moment.
    fn wait_record<K>(&self, records: Api<K>, name: &str, limit: Duration, so: impl Fn(&K) -> bool)
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        self.runtime.block_on(async {
            let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
            let stream = watcher(records, only).default_backoff().applied_objects();
            pin_mut!(stream);
            // An error is of an API server that is away; the watcher asks again.
            let reached = async { while !stream.next().await.unwrap().is_ok_and(|record| so(&record)) {} };
            let waited = tokio::time::timeout(limit, reached).await;
            assert!(waited.is_ok(), "{name} did not become what was waited for in {limit:?}");
        });
    }

    /// What a kubelet says of the pod of a StatefulSet when it is ready.
    pub fn show_ready(&self, set: &str) {
        let address = BRIDGE_ADDRESS.to_string();
        let ready = json!({"status": {
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
            "hostIP": address, "hostIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}]}});
        let (pod, ready) = (format!("{set}-0"), ready.to_string());
        self.kubectl(&["patch", "pod", &pod, "--subresource=status", "--type=merge", "-p", &ready]);
    }

    /// A protected StatefulSet `name` at zero whose claim, of `size`, nobody has mounted.
    pub fn empty_set(&self, name: &str, size: &str) -> Place {
        let place = Place::next(&self.lab);
        let root = place.root(&self.lab);
        let mut objects =
            stateful_set(name, DEBIAN_MAJOR, VOLUME, &json!({}), &place, root.to_str().unwrap());
        objects["items"][1]["spec"]["replicas"] = json!(0);
        self.apply(&objects);
        let claim = format!("data-{name}-0");
        Claim::create(&self.lab, self.namespace.name(), &claim, "rook-ceph-block", size).unwrap();
        place
    }

    /// A protected StatefulSet with a running database `name` of Debian's PostgreSQL.
    pub fn database(&self, name: &str, annotations: Value) -> Database<'_> {
        self.database_of(DEBIAN_MAJOR, name, annotations)
    }

    /// The same of another major version.
    pub fn database_of(&self, major: u32, name: &str, annotations: Value) -> Database<'_> {
        self.database_with(major, name, VOLUME, annotations)
    }

    /// The same on a volume of this size.
    pub fn database_on(&self, name: &str, volume: &str, annotations: Value) -> Database<'_> {
        self.database_with(DEBIAN_MAJOR, name, volume, annotations)
    }

    fn database_with(&self, major: u32, name: &str, volume: &str, annotations: Value) -> Database<'_> {
        let place = Place::next(&self.lab);
        let root = place.root(&self.lab);
        let objects = stateful_set(name, major, volume, &annotations, &place, root.to_str().unwrap());
        self.database_of_objects(major, name, &objects, place, &[])
    }

    fn database_of_objects(
        &self,
        major: u32,
        name: &str,
        objects: &Value,
        place: Place,
        further: &[&str],
    ) -> Database<'_> {
        self.apply(objects);
        let image = |volume: &str| {
            let claim = format!("{volume}-{name}-0");
            Claim::bound(&self.lab, self.namespace.name(), &claim).unwrap().image().unwrap()
        };
        let parts: Vec<Part> = further
            .iter()
            .map(|volume| Part { volume: (*volume).to_owned(), image: image(volume) })
            .collect();
        let image = image("data");
        let server = Server::make(&self.lab, major, &image, place, &parts);
        let database = Database { stage: self, name: name.to_owned(), image, parts, server };
        self.show_ready(name);
        database
    }
}

/// Name, port and directory of one server.
#[derive(Clone, Debug)]
pub struct Place {
    name: String,
    port: u16,
}

impl Place {
    /// One that no other server of this process has.
    pub fn next(lab: &Lab) -> Self {
        let port = PORT.fetch_add(1, Ordering::Relaxed);
        // What a killed run left would be taken for this one's.
        let name = format!("postgres-{port}");
        if let Some(left) = process::running(lab, &name) {
            left.stop(lab, TERM_LIMIT).unwrap();
        }
        Self { name, port }
    }

    /// Where the file system is mounted.
    pub fn root(&self, lab: &Lab) -> PathBuf {
        Mapping::place(lab, &self.name)
    }

    /// Where the server listens.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// A PostgreSQL whose data lies on an image, in the lab's network on the address that pods are given.
pub struct Server {
    lab: Lab,
    place: Place,
    // In this order: the server leaves the file systems before they are unmounted.
    postgres: Option<Process>,
    parts: Vec<Mapping>,
    mapping: Option<Mapping>,
}

impl Server {
    /// On new file systems.
    fn make(lab: &Lab, major: u32, image: &str, place: Place, further: &[Part]) -> Self {
        let mapping = Mapping::open(lab, name_of(image), &place.name, true).unwrap();
        let data = mapping.path().join("data");
        let binaries = Binaries::find(major, lab.dir()).unwrap();
        binaries.initdb(&data).unwrap();
        postgres::append(&data, "pg_hba.conf", "host all all 10.77.0.0/16 scram-sha-256").unwrap();
        let parts = parts::map(lab, &place, further, true);
        parts::furnish(lab, &place, &binaries, further);
        let server = Self { lab: lab.clone(), place, postgres: None, parts, mapping: Some(mapping) };
        server.start(&binaries)
    }

    /// On a clone of a snapshot, as it is: PostgreSQL recovers from it as from a crash.
    pub fn on_clone(lab: &Lab, major: u32, image: &str, parts: &[Part]) -> Self {
        Self::again(lab, major, image, Place::next(lab), parts)
    }

    /// On images that have a database, under a name and port that are given.
    pub fn again(lab: &Lab, major: u32, image: &str, place: Place, further: &[Part]) -> Self {
        let mapping = Mapping::open(lab, name_of(image), &place.name, false).unwrap();
        // It names a process that still runs on this machine: the server that was backed up. PostgreSQL does not sync
        // it, so it need not be there.
        files::remove_file(&mapping.path().join("data/postmaster.pid")).unwrap();
        let parts = parts::map(lab, &place, further, false);
        parts::link(lab, &place, further);
        let server = Self { lab: lab.clone(), place, postgres: None, parts, mapping: Some(mapping) };
        server.start(&Binaries::find(major, lab.dir()).unwrap())
    }

    fn start(mut self, binaries: &Binaries) -> Self {
        self.configure();
        self.launch(binaries);
        self
    }

    fn configure(&self) {
        let data = self.mapping().path().join("data");
        let ours = format!(
            "listen_addresses = '{BRIDGE_ADDRESS}'\nport = {}\nunix_socket_directories = ''\n{SMALL}",
            self.place.port
        );
        postgres::append(&data, "postgresql.conf", &ours).unwrap();
        // initdb was told not to sync, and a checkpoint syncs only what the server itself wrote.
        for mapping in self.parts.iter().chain(&self.mapping) {
            mapping.sync().unwrap();
        }
    }

    fn launch(&mut self, binaries: &Binaries) {
        let data = self.mapping().path().join("data");
        let mut process = self.lab.spawn_inside(&self.place.name, &binaries.server(&data)).unwrap();
        let log = process::log_path(&self.lab, &self.place.name);
        let before = process.log_start();
        let ready = || {
            fs::read(&log).is_ok_and(|text| {
                String::from_utf8_lossy(&text[before..]).contains("ready to accept connections")
            })
        };
        process.wait_ready(START_LIMIT, ready).unwrap();
        self.postgres = Some(process);
    }

    /// Ends it and starts it again on the same volume, as the restart of a container does.
    pub fn restart(&mut self, major: u32) {
        self.end();
        self.launch(&Binaries::find(major, self.lab.dir()).unwrap());
    }

    /// What a query answers, a row a line.
    pub fn sql(&self, query: &str) -> String {
        let mut psql = self.lab.command("psql");
        let (host, port) = (BRIDGE_ADDRESS.to_string(), self.place.port.to_string());
        psql.env("PGPASSWORD", PASSWORD).args(["-h", &host, "-p", &port, "-U", "postgres", "-XAtqc", query]);
        self.lab.output_inside(&mut psql).unwrap().trim().to_owned()
    }

    /// What the server has said since it was started.
    pub fn log(&self) -> String {
        self.postgres.as_ref().map(|process| process.output().unwrap()).unwrap_or_default()
    }

    /// Its name, port and directory.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its client of Ceph.
    pub fn mapping(&self) -> &Mapping {
        self.mapping.as_ref().unwrap()
    }

    /// Ends it with a fast shutdown, and unmaps its volume.
    fn stop(&mut self) {
        self.end();
        self.parts.clear();
        self.mapping = None;
    }

    fn end(&mut self) {
        if let Some(mut process) = self.postgres.take() {
            if let Err(error) = process.signal(Signal::SIGINT) {
                eprintln!("{error:#}");
            }
            process.wait_gone(START_LIMIT);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A protected StatefulSet and its database.
pub struct Database<'a> {
    /// The stage it is on.
    pub stage: &'a Stage,
    /// Name of the StatefulSet.
    pub name: String,
    /// The image as POOL/NAME.
    pub image: String,
    /// Its further volumes.
    pub parts: Vec<Part>,
    /// The server that a kubelet would run.
    pub server: Server,
}

impl std::ops::Deref for Database<'_> {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

impl Database<'_> {
    /// The image as POOL/NAME.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Scales the StatefulSet to zero; PostgreSQL shuts down and its volume is unmapped, as a node would do it.
    pub fn stop(&mut self) {
        self.stage.kubectl(&["scale", "statefulset", &self.name, "--replicas=0"]);
        self.server.stop();
        let pod = format!("{}-0", self.name);
        let left = ["get", "pod", &pod, "--ignore-not-found", "-o", "name"];
        assert!(wait_slowly(START_LIMIT, || self.stage.kubectl(&left).is_empty()), "the pod {pod} stays");
    }

    /// Asks for a backup by hand, as a user would.
    pub fn order(&self, backup: &str, consistency: Option<&str>) {
        self.stage.order_backup(&self.name, backup, consistency);
    }

    /// The addresses of the clients that have the image open.
    pub fn clients(&self) -> Vec<String> {
        let text = self.stage.lab.rbd(&["status", "--format", "json", &self.image]).unwrap();
        let status: Value = serde_json::from_str(&text).unwrap();
        let watchers = status["watchers"].as_array().unwrap().iter();
        watchers.map(|watcher| watcher["address"].as_str().unwrap().to_owned()).collect()
    }

    /// The names of the snapshots of users.
    pub fn snapshots(&self) -> Vec<String> {
        self.stage.snapshots(&self.image)
    }

    /// Sessions of howdah; one in backup mode is among them.
    pub fn sessions(&self) -> String {
        self.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'howdah'")
    }
}

/// Clones of a backup's snapshots with a PostgreSQL on them; removed when dropped.
pub struct Restored {
    lab: Lab,
    images: Vec<String>,
    server: Option<Server>,
}

impl Restored {
    /// `snapshot` is POOL/IMAGE@NAME.
    pub fn start(lab: &Lab, major: u32, snapshot: &str) -> Self {
        Self::start_parts(lab, major, snapshot, &[])
    }

    /// Of a database on several volumes; the image of each part is POOL/IMAGE@NAME, too.
    fn start_parts(lab: &Lab, major: u32, snapshot: &str, parts: &[Part]) -> Self {
        let mut clone = Self { lab: lab.clone(), images: Vec::new(), server: None };
        let image = clone.make(snapshot);
        let parts: Vec<Part> = parts
            .iter()
            .map(|part| Part { volume: part.volume.clone(), image: clone.make(&part.image) })
            .collect();
        clone.server = Some(Server::on_clone(lab, major, &image, &parts));
        clone
    }

    fn make(&mut self, snapshot: &str) -> String {
        let number = PORT.fetch_add(1, Ordering::Relaxed);
        let image = format!("{POOL}/clone-{}-{number}", std::process::id());
        self.lab.rbd(&["clone", "--rbd-default-clone-format", "2", snapshot, &image]).unwrap();
        self.images.push(image.clone());
        image
    }
}

impl std::ops::Deref for Restored {
    type Target = Server;

    fn deref(&self) -> &Server {
        self.server.as_ref().unwrap()
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        self.server = None;
        for image in &self.images {
            // The watcher of a client that ended by itself is gone at once.
            let removed = wait_slowly(START_LIMIT, || self.lab.rbd(&["rm", "--no-progress", image]).is_ok());
            if !removed {
                eprintln!("remove {image}: it stays in use");
            }
        }
    }
}

/// NAME of POOL/NAME.
pub fn name_of(image: &str) -> &str {
    image.split_once('/').map_or(image, |(_, name)| name)
}

fn stateful_set(
    name: &str,
    major: u32,
    volume: &str,
    annotations: &Value,
    place: &Place,
    root: &str,
) -> Value {
    let port = place.port.to_string();
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {"password": PASSWORD}},
        {"apiVersion": "apps/v1", "kind": "StatefulSet",
         "metadata": {"name": name, "labels": {"howdah.dev/protect": "true"}, "annotations": annotations},
         "spec": {
            "serviceName": name, "replicas": 1, "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {
                // No kubelet of a lab that others share may start it.
                "nodeSelector": {"howdah.dev/no-such-node": "true"},
                "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "postgres", "image": format!("docker.io/library/postgres:{major}"),
                    "env": [
                        {"name": "PGDATA", "value": format!("{root}/data")},
                        {"name": "PGPORT", "value": port},
                        {"name": "POSTGRES_PASSWORD", "valueFrom": {"secretKeyRef": {"name": name, "key": "password"}}}],
                    "volumeMounts": [{"name": "data", "mountPath": root}]}]}},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"],
                "storageClassName": "rook-ceph-block", "resources": {"requests": {"storage": volume}}}}]}}
    ]})
}

/// Applies the custom resource definitions.
pub fn install_definitions(lab: &Lab) {
    let definitions = format!("--filename={}", repository::root().join("deploy/base/crds").display());
    lab.kubectl_ok(&["apply", "--server-side", "--force-conflicts", &definitions]).unwrap();
}

/// Applies the parts of deploy/ that the scheduler needs.
fn install(lab: &Lab) {
    let parts = [
        "deploy/base/namespace.yaml",
        "deploy/base/scheduler-rbac.yaml",
        "deploy/base/verify.yaml",
        "deploy/base/credentials-clusterrole.yaml",
        "deploy/overlays/rook/ceph-rbac.yaml",
        "deploy/overlays/rook/cephclient.yaml",
    ];
    let parts = parts.map(|part| format!("--filename={}", repository::root().join(part).display()));
    let apply = ["apply", "--server-side", "--force-conflicts"];
    let arguments: Vec<&str> = apply.into_iter().chain(parts.iter().map(String::as_str)).collect();
    lab.kubectl_ok(&arguments).unwrap();
    install_definitions(lab);
    let secret = ["-n", "rook-ceph", "get", "secret", "rook-ceph-client-howdah-backup"];
    assert!(wait_slowly(KEY_LIMIT, || lab.kubectl_ok(&secret).is_ok()), "Rook's glue made no key");
}

/// The scheduler of this tree: a test builds it the way it was built itself, and a program's lies beside the program.
fn scheduler_binary() -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    let own = std::env::current_exe().unwrap();
    let mut directory = own.parent().unwrap();
    if directory.ends_with("deps") {
        directory = directory.parent().unwrap();
        BUILT.get_or_init(|| {
            let built = Command::new(env!("CARGO"))
                // The whole workspace: with one package alone cargo would choose other features of foreign crates.
                .args(["build", "--quiet", "--workspace", "--bins", "--locked"])
                .current_dir(repository::root())
                .status();
            assert!(built.unwrap().success(), "build the scheduler");
        });
    }
    directory.join("howdah-scheduler")
}
