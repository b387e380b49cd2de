//! A restore where everything is as in production: kubelet, krbd and the CSI driver stage the image that took the place,
//! and the webhook guards the gate.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use howdah_lab::lab::Lab;
use howdah_lab::repository;
use howdah_lab::storage::claim::wait_slowly;
use howdah_lab::testing::TempNamespace;
use serde_json::json;

use crate::lab;

/// initdb alone takes 17 s on an emulated node; a busy one, several times that.
const START_LIMIT: &str = "--timeout=420s";
/// A stop, a start and a crash recovery on emulated nodes take a minute or two.
const OPERATION_LIMIT: Duration = Duration::from_secs(600);

/// The database of deploy/examples/postgres.yaml, in a namespace of its own.
struct Database {
    lab: Lab,
    namespace: TempNamespace,
}

impl Database {
    fn start() -> Result<Self> {
        let lab = lab()?;
        let namespace = lab.namespace("restore")?;
        let database = Self { lab, namespace };
        let manifest = repository::root().join("deploy/examples/postgres.yaml");
        database.kubectl(&["apply", "-f", manifest.to_str().context("write the path as text")?])?;
        database.kubectl(&["annotate", "--overwrite", "statefulset", "db", "howdah.dev/suspend=true"])?;
        database.kubectl(&["rollout", "status", "statefulset/db", START_LIMIT])?;
        // The image's entrypoint wrote pg_hba.conf a moment ago. What PostgreSQL does not write itself is in a snapshot
        // once the kernel has written it, some 30 s later (docs/restore.md).
        database.kubectl(&["exec", "db-0", "--", "sync"])?;
        Ok(database)
    }

    fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.lab.kubectl_ok(&[&["-n", self.namespace.name()], args].concat())
    }

    fn sql(&self, query: &str) -> Result<String> {
        let address = self.kubectl(&["get", "pod", "db-0", "-o", "jsonpath={.status.podIP}"])?;
        let mut psql = self.lab.command("psql");
        psql.env("PGPASSWORD", "change-me").args(["-h", &address, "-U", "postgres", "-XAtqc", query]);
        Ok(self.lab.output_inside(&mut psql)?.trim().to_owned())
    }

    /// Creates an operation and waits until it stands at `end`.
    fn operate(&self, kind: &str, name: &str, spec: serde_json::Value, end: &str) -> Result<()> {
        let order = json!({"apiVersion": "howdah.dev/v1alpha1", "kind": kind,
            "metadata": {"name": name, "namespace": self.namespace.name()}, "spec": spec});
        let applied = self.lab.kubectl_apply(&order.to_string())?;
        ensure!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        let resource = format!("{}/{name}", kind.to_lowercase());
        let mut phase = String::new();
        wait_slowly(OPERATION_LIMIT, || {
            let wanted = ["get", &resource, "-o", "jsonpath={.status.phase}"];
            phase = self.kubectl(&wanted).unwrap_or_default();
            phase == end || ["Failed", "Stuck"].contains(&phase.as_str())
        });
        ensure!(phase == end, "{}", self.kubectl(&["get", &resource, "-o", "yaml"])?);
        Ok(())
    }
}

#[test]
fn a_pod_comes_back_on_the_restored_volume_and_on_the_old_one_after_the_undo() -> Result<()> {
    let database = Database::start()?;
    database.sql("CREATE TABLE t AS SELECT 1 AS n")?;
    database.operate("PostgresBackup", "one", json!({"statefulSet": "db"}), "Taken")?;
    database.sql("UPDATE t SET n = 2")?;
    database.operate("PostgresRestore", "back", json!({"statefulSet": "db", "to": "one"}), "Completed")?;
    ensure!(database.sql("SELECT n FROM t")? == "1", "the backup is not in place");
    database.operate("PostgresRestore", "undo", json!({"statefulSet": "db", "undo": "back"}), "Completed")?;
    ensure!(database.sql("SELECT n FROM t")? == "2", "what was there before is not in place");
    Ok(())
}
