//! A restore drill where everything is as in production: the pod runs on a node, in its isolated namespace, on a clone that
//! the CSI driver staged.

use anyhow::{Result, ensure};
use howdah_core::backup::Phase;
use howdah_core::names::VERIFY_NAMESPACE;
use howdah_lab::ceph::POOL;
use howdah_lab::database::{Database, ROWS};

use crate::lab;

/// The rows lie on a tablespace, and what recovery needs of them in the WAL: both on volumes of their own.
#[test]
fn a_backup_is_proven_by_a_pod_that_is_gone_afterwards() -> Result<()> {
    let database = Database::start_in_parts(lab()?)?;
    database.sql("db-0", "ALTER DATABASE postgres SET default_tablespace = far")?;
    database.keep_rows()?;
    let lies = "SELECT spcname FROM pg_tablespace t JOIN pg_class c ON c.reltablespace = t.oid WHERE relname = 'kept'";
    ensure!(database.sql("db-0", lies)? == "far", "the rows lie elsewhere");
    database.annotate(&["howdah.dev/verify=always", "howdah.dev/suspend=false"])?;
    database.wait("a backup", || Ok(!database.backups()?.is_empty()))?;
    database.annotate(&["howdah.dev/suspend=true"])?;
    database.wait("a verified backup", || {
        Ok(database.backups()?.iter().any(|(_, status)| status.phase == Phase::Verified))
    })?;
    let verified = database.backups()?.into_iter().find(|(_, status)| status.phase == Phase::Verified);
    let report = verified.and_then(|(_, status)| status.verification?.report);
    let rows = report.as_ref().and_then(|report| report.rows);
    ensure!(rows == Some(ROWS), "the drill read {report:?}");
    for kind in ["pod", "pvc"] {
        let left = database.lab.kubectl_ok(&["-n", VERIFY_NAMESPACE, "get", kind, "-o", "name"])?;
        ensure!(left.is_empty(), "left behind: {left}");
    }
    let images = database.lab.rbd(&["ls", POOL])?;
    ensure!(!images.contains("howdah-verify-"), "a clone is left behind: {images}");
    Ok(())
}
