//! `howdah-lab demo`: howdah's main job, shown on a real cluster and checked while it is shown. Everything is
//! done with the commands a user would type; a step that did not happen ends the demo with an error.

use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use howdah_core::backup::{BackupStatus, Phase};
use serde_json::{Value, json};

use crate::demo::load::Load;
use crate::lab::Lab;
use crate::story::{Look, Story};
use crate::up::{self, Wanted};
use crate::{install, repository};

pub mod load;

const CHAPTERS: usize = 10;
/// Where the demo's databases live.
const NAMESPACE: &str = "howdah-demo";
/// The clone of the last backup, and everything made of it.
const RESTORED: &str = "restored";
/// Often enough to watch, and no more often than a busy node can follow.
const SCHEDULE: &str = "*/30 * * * * *";
/// Fewer than are taken, so that some are pruned.
const RETENTION: &str = "last=2";
/// Backups to wait for before looking at what was pruned.
const BACKUPS: usize = 2;
/// A first start makes the database's files, which takes a busy node a minute.
const START_LIMIT: Duration = Duration::from_secs(300);
/// Several slots of [`SCHEDULE`]; on a busy node each rbd command takes seconds: two backups took two minutes on a machine
/// that did much else.
const BACKUP_LIMIT: Duration = Duration::from_secs(480);
/// Deleting a namespace with a database waits for the pod's end and the volume's.
const CLEAN_LIMIT: Duration = Duration::from_secs(300);

/// Tells the whole story, from a lab of `nodes` nodes that need not be up. Fails at the first step that did
/// not happen.
pub fn run(lab: &Lab, nodes: u8) -> Result<()> {
    Demo { lab, story: &mut Story::new(CHAPTERS) }.tell(nodes)
}

struct Demo<'a> {
    lab: &'a Lab,
    story: &'a mut Story,
}

/// A `PostgresBackup` of the demo's database.
struct Backup {
    name: String,
    status: BackupStatus,
}

impl Demo<'_> {
    fn tell(mut self, nodes: u8) -> Result<()> {
        self.cluster_comes_up(nodes)?;
        self.howdah_is_installed()?;
        self.clean_up()?;
        self.unlabelled_passes()?;
        self.careless_is_refused()?;
        self.good_one_runs()?;
        self.scale_is_refused()?;
        let address = self.pod_address("db-0")?;
        self.wait_for_sql(&address)?;
        let load = Load::start(self.lab, &address)?;
        self.backups_appear()?;
        self.old_ones_are_pruned()?;
        let (last, committed) = self.last_backup(&load)?;
        let end = load.stop()?;
        self.clone_answers(&last, committed, end)?;
        self.farewell();
        Ok(())
    }

    fn cluster_comes_up(&mut self, nodes: u8) -> Result<()> {
        self.story.chapter("A real cluster: Kubernetes, Ceph, and virtual machines as nodes");
        self.story.say("The first time on a machine everything is built from source, which takes minutes.");
        up::run(self.lab, Wanted { nodes, ceph: true, profile: None })?;
        self.shown(&["get", "nodes"])?;
        self.shown(&["get", "storageclass"])
    }

    fn howdah_is_installed(&mut self) -> Result<()> {
        self.story.chapter("howdah is installed as a user would install it");
        self.story.command(&format!("kubectl apply --server-side -k {}", install::OVERLAY));
        install::install(self.lab)?;
        self.shown(&["--namespace", install::NAMESPACE, "get", "deployments"])
    }

    /// Removes what an earlier demo left.
    fn clean_up(&mut self) -> Result<()> {
        if self.json(&["get", "namespace", NAMESPACE, "--ignore-not-found"])?.is_some() {
            // Pods first: the namespace controller sleeps for half of a pod's grace period before it looks again.
            self.kubectl(&["delete", "statefulset,pod", "--all", "--timeout=300s"])?;
            self.kubectl(&["delete", "namespace", NAMESPACE, "--wait=false"])?;
            self.story.wait("what an earlier demo left is gone", CLEAN_LIMIT, || {
                Ok(match json_of(self.lab, &["get", "namespace", NAMESPACE, "--ignore-not-found"])? {
                    None => Look::Found(()),
                    Some(_) => Look::NotYet("the namespace is being deleted".into()),
                })
            })?;
        }
        self.kubectl(&["delete", "persistentvolume", RESTORED, "--ignore-not-found"])?;
        if self.lab.rbd(&["ls", "--pool", "replicapool"])?.lines().any(|image| image == RESTORED) {
            self.lab.rbd(&["rm", "--no-progress", &format!("replicapool/{RESTORED}")])?;
        }
        self.kubectl(&["create", "namespace", NAMESPACE])?;
        Ok(())
    }

    fn unlabelled_passes(&mut self) -> Result<()> {
        self.story.chapter("What carries no label is not howdah's business");
        self.story.say(&format!("From here on all commands are meant in the namespace {NAMESPACE}."));
        self.shown(&["apply", "-f", "deploy/examples/unlabelled.yaml"])?;
        let set = self.require(&["get", "statefulset", "not-a-database"])?;
        let pod = &set["spec"]["template"]["spec"];
        ensure!(set["spec"]["replicas"] == json!(2), "the unlabelled set lost a replica: {set}");
        ensure!(
            pod["terminationGracePeriodSeconds"] == json!(0) && pod["affinity"].is_null(),
            "howdah changed a set without its label: {pod}"
        );
        ensure!(!set.to_string().contains("howdah.dev"), "howdah marked a set without its label: {set}");
        self.story.proven("two replicas, no grace period, claims deleted with it: passed as written");
        self.kubectl(&["delete", "statefulset", "not-a-database"])?;
        Ok(())
    }

    fn careless_is_refused(&mut self) -> Result<()> {
        self.story.chapter("A labelled database with bad habits is refused, with reasons");
        let denial = self.refused(&["apply", "-f", "deploy/examples/refused.yaml"])?;
        for rule in ["annotations", "single-replica", "grace-period", "storage-class", "retention-policy"] {
            ensure!(denial.contains(rule), "the denial does not name the rule {rule}: {denial}");
        }
        ensure!(
            self.json(&["get", "statefulset", "careless", "--ignore-not-found"])?.is_none(),
            "the refused set exists"
        );
        self.story.proven("five mistakes, five reasons, nothing created");
        Ok(())
    }

    fn good_one_runs(&mut self) -> Result<()> {
        self.story.chapter("A plain PostgreSQL gets safe defaults, and runs");
        self.shown(&["apply", "-f", "deploy/examples/postgres.yaml"])?;
        let set = self.require(&["get", "statefulset", "db"])?;
        let pod = &set["spec"]["template"]["spec"];
        let retention = &set["spec"]["persistentVolumeClaimRetentionPolicy"];
        ensure!(pod["terminationGracePeriodSeconds"] == json!(300), "the grace period is not 300 s: {pod}");
        ensure!(!pod["affinity"]["podAntiAffinity"].is_null(), "no anti-affinity was set: {pod}");
        ensure!(
            retention["whenScaled"] == "Retain" && retention["whenDeleted"] == "Retain",
            "the claims are not retained: {retention}"
        );
        self.story
            .proven("howdah added: grace period 300 s, anti-affinity to other databases, claims retained");
        let lab = self.lab;
        self.story.wait("PostgreSQL runs on a Ceph volume", START_LIMIT, || {
            let pod = json_of(lab, &["get", "pod", "db-0", "--ignore-not-found"])?;
            Ok(pod.as_ref().map_or_else(|| Look::NotYet("no pod yet".into()), ready))
        })?;
        self.shown(&["get", "statefulset,pod,pvc"])?;
        Ok(())
    }

    fn scale_is_refused(&mut self) -> Result<()> {
        self.story.chapter("A second writer on the same volume: refused, also through the side door");
        let denial = self.refused(&["scale", "statefulset", "db", "--replicas=2"])?;
        ensure!(denial.contains("single-replica"), "the denial does not name its rule: {denial}");
        let set = self.require(&["get", "statefulset", "db"])?;
        ensure!(set["spec"]["replicas"] == json!(1), "the set was scaled: {set}");
        self.story.proven("still one replica");
        Ok(())
    }

    fn backups_appear(&mut self) -> Result<()> {
        self.story.chapter("Backups appear on schedule, while pgbench writes");
        let (schedule, retention) =
            (format!("howdah.dev/schedule={SCHEDULE}"), format!("howdah.dev/retention={RETENTION}"));
        self.shown(&["annotate", "statefulset", "db", &schedule, &retention, "--overwrite"])?;
        let lab = self.lab;
        self.story.wait("two backups were taken", BACKUP_LIMIT, || {
            let backups = backups(lab)?;
            let ended_badly = |backup: &&Backup| [Phase::Failed, Phase::Stuck].contains(&backup.status.phase);
            if let Some(bad) = backups.iter().find(ended_badly) {
                bail!("take the backup {}: {:?}", bad.name, bad.status.failure);
            }
            let taken = backups.iter().filter(|backup| backup.status.phase.is_success()).count();
            Ok(if taken >= BACKUPS {
                Look::Found(())
            } else {
                Look::NotYet(format!("{taken} taken, {} in all", backups.len()))
            })
        })?;
        self.shown(&["get", "pgb"])?;
        Ok(())
    }

    fn old_ones_are_pruned(&mut self) -> Result<()> {
        self.story.chapter("Old backups are pruned, each with its reason");
        let lab = self.lab;
        let before = backups(lab)?;
        let pruned =
            self.story.wait("the first backup left the retention and was pruned", BACKUP_LIMIT, || {
                let now = backups(lab)?;
                let gone = before.iter().find(|old| now.iter().all(|backup| backup.name != old.name));
                Ok(gone.map_or_else(
                    || Look::NotYet(format!("{} backups", now.len())),
                    |gone| Look::Found(gone.name.clone()),
                ))
            })?;
        self.shown(&["get", "pgb"])?;
        self.shown(&["get", "events", "--field-selector", "reason=BackupsPruned"])?;
        let pruned = before.iter().find(|backup| backup.name == pruned).context("find the pruned backup")?;
        let (image, snapshot) = pruned.places()?;
        let snapshots = lab.rbd(&["snap", "ls", &image])?;
        ensure!(
            !snapshots.contains(&snapshot),
            "{} is pruned, its snapshot is not: {snapshots}",
            pruned.name
        );
        self.story.proven(&format!("the snapshot {snapshot} is gone from Ceph"));
        Ok(())
    }

    /// Stops the schedule and picks the newest backup; with it, how many transactions had certainly ended
    /// before it began.
    fn last_backup(&mut self, load: &Load) -> Result<(Backup, u64)> {
        self.story.chapter("Is the last one a backup? Start a clone of it and count");
        self.shown(&["annotate", "statefulset", "db", "howdah.dev/suspend=true", "--overwrite"])?;
        let lab = self.lab;
        self.story.wait("no backup is on its way", BACKUP_LIMIT, || {
            let open = backups(lab)?.into_iter().find(|backup| !backup.status.phase.is_terminal());
            Ok(open.map_or(Look::Found(()), |backup| {
                Look::NotYet(format!("{} is {}", backup.name, backup.status.phase.as_str()))
            }))
        })?;
        let mut all = backups(lab)?.into_iter();
        let last =
            all.rfind(|backup| backup.status.phase.is_success()).context("find a backup that was taken")?;
        let start = last.status.start_lsn.as_deref().and_then(load::parse_lsn);
        let start = start.with_context(|| format!("find the start LSN of {}", last.name))?;
        let committed = load.committed_before(start).with_context(|| {
            format!("know what was committed before {}: no count was taken before it", last.name)
        })?;
        self.story
            .say(&format!("The last one is {}; {committed} transactions had ended before it.", last.name));
        Ok((last, committed))
    }

    fn clone_answers(&mut self, last: &Backup, committed: u64, end: u64) -> Result<()> {
        let lab = self.lab;
        let (image, snapshot) = last.places()?;
        let snapshot = format!("{image}@{snapshot}");
        let clone = format!("replicapool/{RESTORED}");
        let line = ["clone", "--rbd-default-clone-format", "2", &snapshot, &clone];
        self.story.command(&format!("rbd {}", line.join(" ")));
        lab.rbd(&line)?;
        self.story.command("kubectl apply -f -  # a static volume over the clone, and a pod");
        let applied = lab.kubectl_apply(&restored_manifests())?;
        ensure!(
            applied.status.success(),
            "start the clone: {}",
            String::from_utf8_lossy(&applied.stderr).trim()
        );
        self.story.wait("PostgreSQL started from the clone", START_LIMIT, || {
            let pod = json_of(lab, &["get", "pod", RESTORED, "--ignore-not-found"])?;
            Ok(pod.as_ref().map_or_else(|| Look::NotYet("no pod yet".into()), ready))
        })?;
        let address = self.pod_address(RESTORED)?;
        self.wait_for_sql(&address)?;
        let log = self.kubectl(&["logs", RESTORED])?;
        // Those who ask meanwhile are told that recovery is under way, every half second.
        let milestones = ["automatic recovery in progress", "redo starts", "redo done", "accept connections"];
        for line in log.lines().filter(|line| milestones.iter().any(|milestone| line.contains(milestone))) {
            self.story.output(line);
        }
        ensure!(log.contains("automatic recovery in progress"), "no crash recovery in the log: {log}");
        let rows = load::count_transactions(lab, &address)?;
        ensure!(
            (committed..=end).contains(&rows),
            "the clone has {rows} transactions: {committed} were committed before the backup, {end} in all"
        );
        self.story.proven(&format!(
            "{rows} transactions in the clone: all {committed} from before the backup, of {end} in all"
        ));
        Ok(())
    }

    /// A port that is open is not a database that answers: PostgreSQL listens before its recovery is done.
    fn wait_for_sql(&self, address: &str) -> Result<()> {
        self.story.wait("it answers SQL", START_LIMIT, || {
            Ok(match load::ask(self.lab, address, "select 1") {
                Ok(_) => Look::Found(()),
                Err(error) => Look::NotYet(format!("{error:#}")),
            })
        })
    }

    fn farewell(&mut self) {
        let name = self.lab.name();
        let seconds = self.story.elapsed().as_secs();
        self.story.chapter(&format!("Done in {} min {} s. The lab is yours", seconds / 60, seconds % 60));
        self.story.say("Look around:");
        let flag = if name == "main" { String::new() } else { format!(" --name {name}") };
        // cargo's folder need not be the clone's.
        let binary =
            std::env::current_exe().map_or_else(|_| "howdah-lab".into(), |path| path.display().to_string());
        self.story.command(&format!("export KUBECONFIG=$({binary} kubeconfig{flag})"));
        self.story.command(&format!("kubectl -n {NAMESPACE} get statefulset,pod,pvc,pgb"));
        self.story.command(&format!("kubectl -n {NAMESPACE} describe pgb"));
        self.story.command(&format!("{binary} exec{flag} -- rbd ls -l replicapool"));
        self.story.say("Clean up; nothing is left:");
        self.story.command(&format!("{binary} down{flag}"));
    }

    fn pod_address(&self, pod: &str) -> Result<String> {
        let pod = self.require(&["get", "pod", pod])?;
        let address = pod["status"]["podIP"].as_str().context("find the pod's address")?;
        Ok(address.to_owned())
    }

    /// Shows a command and its answer; it must succeed.
    fn shown(&self, args: &[&str]) -> Result<()> {
        self.story.command(&shown_command(args));
        let answer = self.kubectl(args)?;
        self.story.output(&answer);
        Ok(())
    }

    /// Shows a command that howdah must refuse; returns the denial.
    fn refused(&self, args: &[&str]) -> Result<String> {
        self.story.command(&shown_command(args));
        let output = kubectl_output(self.lab, args)?;
        let denial = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "howdah let this pass: {}", shown_command(args));
        ensure!(denial.contains("howdah.dev"), "this failed, and not by howdah's word: {denial}");
        self.story.refusal(&denial);
        Ok(denial)
    }

    fn kubectl(&self, args: &[&str]) -> Result<String> {
        kubectl(self.lab, args)
    }

    fn json(&self, args: &[&str]) -> Result<Option<Value>> {
        json_of(self.lab, args)
    }

    fn require(&self, args: &[&str]) -> Result<Value> {
        self.json(args)?.with_context(|| format!("find an answer to {}", shown_command(args)))
    }
}

impl Backup {
    fn of(record: &Value) -> Result<Self> {
        let name = record["metadata"]["name"].as_str().context("find a backup's name")?.to_owned();
        let status = match &record["status"] {
            Value::Null => BackupStatus::default(),
            status => serde_json::from_value(status.clone())
                .with_context(|| format!("read the status of {name}"))?,
        };
        Ok(Self { name, status })
    }

    /// The image and the snapshot, as the rbd command takes them.
    fn places(&self) -> Result<(String, String)> {
        let image = self.status.image.as_ref().with_context(|| format!("find the image of {}", self.name))?;
        let snapshot =
            self.status.snapshot.as_ref().with_context(|| format!("find the snapshot of {}", self.name))?;
        Ok((image.spec(), snapshot.name.clone()))
    }
}

/// All backups of the demo's database, in the order of their names, which is that of their slots.
fn backups(lab: &Lab) -> Result<Vec<Backup>> {
    let list = json_of(lab, &["get", "pgb"])?.context("list the backups")?;
    let items = list["items"].as_array().into_iter().flatten();
    let mut backups = items.map(Backup::of).collect::<Result<Vec<Backup>>>()?;
    backups.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(backups)
}

fn ready(pod: &Value) -> Look<()> {
    let conditions = pod["status"]["conditions"].as_array();
    let is_ready = conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
    let waiting = pod.pointer("/status/containerStatuses/0/state/waiting/reason").and_then(Value::as_str);
    if is_ready {
        return Look::Found(());
    }
    let phase = pod["status"]["phase"].as_str().unwrap_or("without a phase");
    Look::NotYet(format!("pod {phase} {}", waiting.unwrap_or_default()))
}

/// A static volume over the clone, as ceph-csi knows them (its docs, static-pvc.md), and a pod on it.
fn restored_manifests() -> String {
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": RESTORED},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": NAMESPACE, "name": RESTORED},
            "csi": {
                "driver": "rook-ceph.rbd.csi.ceph.com", "fsType": "ext4", "volumeHandle": RESTORED,
                "nodeStageSecretRef": {"namespace": "rook-ceph", "name": "rook-csi-rbd-node"},
                "volumeAttributes": {
                    "clusterID": "rook-ceph", "pool": "replicapool", "staticVolume": "true",
                    "imageFeatures": "layering", "mapOptions": "krbd:noshare"
                }
            }
        }
    });
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"namespace": NAMESPACE, "name": RESTORED},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeName": RESTORED,
            "resources": {"requests": {"storage": "1Gi"}}
        }
    });
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": NAMESPACE, "name": RESTORED},
        "spec": {
            "securityContext": {"fsGroup": 999},
            "containers": [{
                "name": "postgres", "image": "docker.io/library/postgres:15",
                "env": [{"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"}],
                "readinessProbe": {"tcpSocket": {"port": 5432}, "periodSeconds": 2},
                "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}]
            }],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": RESTORED}}]
        }
    });
    [volume, claim, pod].map(|object| object.to_string()).join("\n---\n")
}

fn shown_command(args: &[&str]) -> String {
    let quoted =
        args.iter().map(|arg| if arg.contains([' ', '*']) { format!("'{arg}'") } else { (*arg).to_owned() });
    format!("kubectl {}", quoted.collect::<Vec<_>>().join(" "))
}

fn kubectl_output(lab: &Lab, args: &[&str]) -> Result<Output> {
    let mut command = lab.kubectl_command();
    command.current_dir(repository::root()).args(["--namespace", NAMESPACE]).args(args);
    command.output().context("run kubectl")
}

fn kubectl(lab: &Lab, args: &[&str]) -> Result<String> {
    let output = kubectl_output(lab, args)?;
    if !output.status.success() {
        bail!("run {}: {}", shown_command(args), String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).context("read kubectl's answer as text")
}

/// The answer as JSON; none where kubectl answers nothing, as `--ignore-not-found` makes it.
fn json_of(lab: &Lab, args: &[&str]) -> Result<Option<Value>> {
    let answer = kubectl(lab, &[args, &["--output", "json"]].concat())?;
    if answer.trim().is_empty() {
        return Ok(None);
    }
    serde_json::from_str(&answer).map(Some).context("read kubectl's answer as JSON")
}
