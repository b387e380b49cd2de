//! A protected database that runs on the nodes, as a user would have it: for tests.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use howdah_adapters::records::PostgresBackup;
use howdah_core::backup::{BackupStatus, Phase};
use kube::ResourceExt as _;
use serde_json::{Value, json};

use crate::demo::load;
use crate::lab::Lab;
use crate::repository;
use crate::storage::claim::wait_slowly;
use crate::testing::TempNamespace;

/// A first start takes some 15 s; on a busy node, many times that.
pub const START_LIMIT: &str = "--timeout=420s";
/// A backup takes some 20 s on busy nodes; its schedule comes round every half minute, and another test takes the leading
/// scheduler away meanwhile.
pub const BACKUP_LIMIT: Duration = Duration::from_secs(480);
/// Rows that must come along.
pub const ROWS: u64 = 1000;
/// A label of the pods of a database that may be moved; its value is `true`.
pub const MOVES: &str = "howdah.test/moves";
/// A taint that moves no other pod of the tests.
pub const MOVE_TAINT: &str = "howdah.test/move";
const SCHEDULE: &str = "howdah.dev/schedule=*/30 * * * * *";

/// What a pod tolerates that is not to be moved by [`MOVE_TAINT`].
#[must_use]
pub fn stays() -> Value {
    json!([{"key": MOVE_TAINT, "operator": "Exists", "effect": "NoExecute"}])
}

fn push(list: &mut Value, item: Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(item);
    }
}

/// The database of deploy/examples/postgres.yaml, in a namespace of its own.
#[derive(Debug)]
pub struct Database {
    /// Where it runs.
    pub lab: Lab,
    /// What it is alone in; both go when this is dropped.
    pub namespace: TempNamespace,
}

impl Database {
    /// Applies it to a lab in which howdah is installed, and waits until it is Ready. Others that move their databases
    /// leave it where it is.
    pub fn start(lab: Lab) -> Result<Self> {
        Self::start_with(lab, |set| set["spec"]["template"]["spec"]["tolerations"] = stays())
    }

    /// The same with its WAL on a volume of its own.
    pub fn start_in_parts(lab: Lab) -> Result<Self> {
        Self::start_with(lab, |set| {
            set["spec"]["template"]["spec"]["tolerations"] = stays();
            let mut template = set["spec"]["volumeClaimTemplates"][0].clone();
            template["metadata"]["name"] = json!("wal");
            template["spec"]["resources"]["requests"]["storage"] = json!("128Mi");
            push(&mut set["spec"]["volumeClaimTemplates"], template);
            let container = &mut set["spec"]["template"]["spec"]["containers"][0];
            push(&mut container["env"], json!({"name": "POSTGRES_INITDB_WALDIR", "value": "/wal/pg"}));
            push(&mut container["volumeMounts"], json!({"name": "wal", "mountPath": "/wal"}));
        })
    }

    /// The same of one that is moved, by drains of what bears [`MOVES`] and by [`MOVE_TAINT`].
    pub fn start_to_move(lab: Lab) -> Result<Self> {
        Self::start_with(lab, |set| set["spec"]["template"]["metadata"]["labels"][MOVES] = json!("true"))
    }

    fn start_with(lab: Lab, change: impl Fn(&mut Value)) -> Result<Self> {
        let namespace = lab.namespace("backup")?;
        let database = Self { lab, namespace };
        let mut objects = repository::documents("deploy/examples/postgres.yaml")?;
        let sets = objects.iter_mut().filter(|object| object["kind"] == "StatefulSet");
        sets.for_each(&change);
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let apply = ["-n", database.namespace.name(), "apply", "-f", "-"];
        let applied = database.lab.kubectl_with_input(&apply, &list.to_string())?;
        ensure!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        // Nothing is backed up before the test says so.
        database.annotate(&["howdah.dev/suspend=true", SCHEDULE, "howdah.dev/retention=last=2"])?;
        database.kubectl(&["rollout", "status", "statefulset/db", START_LIMIT])?;
        // The image's entrypoint wrote pg_hba.conf a moment ago. What PostgreSQL does not write itself is in a snapshot
        // once the kernel has written it, some 30 s later (docs/restore.md).
        database.kubectl(&["exec", "db-0", "--", "sync"])?;
        Ok(database)
    }

    /// Runs kubectl in its namespace.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.lab.kubectl_ok(&[&["-n", self.namespace.name()], args].concat())
    }

    /// Sets annotations of its StatefulSet.
    pub fn annotate(&self, annotations: &[&str]) -> Result<String> {
        self.kubectl(&[&["annotate", "--overwrite", "statefulset", "db"], annotations].concat())
    }

    /// The address of one of its pods.
    pub fn address(&self, pod: &str) -> Result<String> {
        self.kubectl(&["get", "pod", pod, "-o", "jsonpath={.status.podIP}"])
    }

    /// Asks PostgreSQL in one of its pods one question.
    pub fn sql(&self, pod: &str, query: &str) -> Result<String> {
        Ok(load::ask(&self.lab, &self.address(pod)?, query)?.trim().to_owned())
    }

    /// Writes rows that must be there later, however it was moved or restored meanwhile.
    pub fn keep_rows(&self) -> Result<()> {
        self.sql("db-0", &format!("create table kept as select generate_series(1, {ROWS}) as n")).map(drop)
    }

    /// Waits until it answers and has the rows that were to be kept.
    pub fn has_kept_rows(&self) -> Result<()> {
        self.wait("the rows that were kept", || {
            Ok(self.sql("db-0", "select count(*) from kept")? == ROWS.to_string())
        })
    }

    /// The node it runs on.
    pub fn node(&self) -> Result<String> {
        let name = self.kubectl(&["get", "pod", "db-0", "-o", "jsonpath={.spec.nodeName}"])?;
        ensure!(!name.is_empty(), "the pod has no node");
        Ok(name)
    }

    /// What howdah refused to do with it: each denial is an Event.
    pub fn denials(&self) -> Result<String> {
        let reason = "--field-selector=reason=RequestDenied";
        self.kubectl(&["get", "events", reason, "-o", "jsonpath={.items[*].message}"])
    }

    /// Name and status of the backups, by name, which is by slot.
    pub fn backups(&self) -> Result<Vec<(String, BackupStatus)>> {
        let list: Value = serde_json::from_str(&self.kubectl(&["get", "pgb", "-o", "json"])?)?;
        let items = list["items"].as_array().context("read the list of backups")?;
        let mut backups = Vec::new();
        for item in items {
            let backup: PostgresBackup = serde_json::from_value(item.clone())?;
            backups.push((backup.name_any(), backup.status.unwrap_or_default()));
        }
        backups.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(backups)
    }

    /// The backups that are taken, and not verified.
    pub fn taken(&self) -> Result<Vec<(String, BackupStatus)>> {
        let all = self.backups()?.into_iter();
        Ok(all.filter(|(_, status)| status.phase == Phase::Taken).collect())
    }

    /// Waits until `condition` holds, which may fail while it does not; a backup fits into the time.
    pub fn wait(&self, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
        let mut last = None;
        let reached = wait_slowly(BACKUP_LIMIT, || {
            condition().unwrap_or_else(|error| {
                last = Some(error);
                false
            })
        });
        let seen = self.backups();
        ensure!(reached, "wait for {what}: {last:?}\n{seen:#?}");
        Ok(())
    }
}
