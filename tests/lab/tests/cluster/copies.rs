//! A drill and restores where everything is as in production: kubelet, krbd and the CSI driver stage the images, the drill's
//! pod runs in its isolated namespace, and the webhook guards the gate. Named so that it begins early: it takes the longest.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use howdah_core::names::VERIFY_NAMESPACE;
use howdah_lab::ceph::POOL;
use howdah_lab::database::{Database, ROWS};
use howdah_lab::storage::claim::wait_slowly;
use serde_json::{Value, json};

use crate::lab;

/// A stop, a start and a crash recovery take half a minute; on a machine that does much else, minutes.
const OPERATION_LIMIT: Duration = Duration::from_secs(600);

/// Creates an operation and waits until it stands at `end`.
fn operate(database: &Database, kind: &str, name: &str, spec: Value, end: &str) -> Result<()> {
    let order = json!({"apiVersion": "howdah.dev/v1alpha1", "kind": kind,
        "metadata": {"name": name, "namespace": database.namespace.name()}, "spec": spec});
    let applied = database.lab.kubectl_apply(&order.to_string())?;
    ensure!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    wait_for(database, &format!("{}/{name}", kind.to_lowercase()), end)
}

/// Waits until an operation stands at `end`.
fn wait_for(database: &Database, resource: &str, end: &str) -> Result<()> {
    let mut phase = String::new();
    wait_slowly(OPERATION_LIMIT, || {
        let wanted = ["get", resource, "-o", "jsonpath={.status.phase}"];
        phase = database.kubectl(&wanted).unwrap_or_default();
        phase == end || ["Failed", "Stuck"].contains(&phase.as_str())
    });
    ensure!(phase == end, "{}", database.kubectl(&["get", resource, "-o", "yaml"])?);
    Ok(())
}

/// Orders a copy of the backup `one` by the command, and waits until it is there.
fn copy(database: &Database, name: &str) -> Result<()> {
    let test = std::env::current_exe().context("find this test")?;
    let command =
        test.ancestors().nth(2).context("find the folder of what was built")?.join("kubectl-howdah");
    ensure!(command.is_file(), "there is no {}: run `cargo build --workspace --bins`", command.display());
    let mut command = database.lab.command(command);
    command.arg("--kubeconfig").arg(database.lab.inside_kubeconfig()).args(["restore", "db", "--to", "one"]);
    let target = ["--into", name, "-n", database.namespace.name()];
    database.lab.output_inside(command.args(target))?;
    let order = database.kubectl(&["get", "pgr", "-o", "jsonpath={.items[0].metadata.name}"])?;
    wait_for(database, &format!("pgr/{order}"), "Completed")
}

/// One test, because a database takes a minute of both processors to start. Its WAL lies on a volume of its own, so that each
/// of these operations is of two images, and none of them starts without the other.
#[test]
fn a_backup_is_proven_and_comes_back_beside_the_original_and_in_its_place_and_an_undo_takes_it_away_again()
-> Result<()> {
    let database = Database::start_in_parts(lab()?)?;
    database.keep_rows()?;
    database.sql("db-0", "CREATE TABLE t AS SELECT 1 AS n")?;
    database.annotate(&["howdah.dev/verify=always"])?;
    operate(&database, "PostgresBackup", "one", json!({"statefulSet": "db"}), "Verified")?;
    database.annotate(&["howdah.dev/verify-"])?;
    let backups = database.backups()?;
    let (_, status) = backups.first().context("find the backup")?;
    ensure!(status.parts.len() == 1, "{status:#?}");
    let report = status.verification.as_ref().and_then(|drill| drill.report.as_ref());
    ensure!(report.and_then(|report| report.rows) == Some(ROWS + 1), "the drill read {report:?}");
    for kind in ["pod", "pvc"] {
        let left = database.lab.kubectl_ok(&["-n", VERIFY_NAMESPACE, "get", kind, "-o", "name"])?;
        ensure!(left.is_empty(), "left behind: {left}");
    }
    let images = database.lab.rbd(&["ls", POOL])?;
    ensure!(!images.contains("howdah-verify-"), "a clone is left behind: {images}");
    database.sql("db-0", "UPDATE t SET n = 2")?;

    copy(&database, "db-copy")?;
    ensure!(database.sql("db-copy-0", "SELECT n FROM t")? == "1", "the copy is not of the backup");
    ensure!(database.sql("db-0", "SELECT n FROM t")? == "2", "the original was touched");

    operate(&database, "PostgresRestore", "back", json!({"statefulSet": "db", "to": "one"}), "Completed")?;
    ensure!(database.sql("db-0", "SELECT n FROM t")? == "1", "the backup is not in place");
    operate(&database, "PostgresRestore", "undo", json!({"statefulSet": "db", "undo": "back"}), "Completed")?;
    ensure!(database.sql("db-0", "SELECT n FROM t")? == "2", "what was there before is not in place");
    Ok(())
}
