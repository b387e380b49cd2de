//! A node that is shut down in order, as for a new kernel: its kubelet ends the pods before it goes, the database among
//! them, and howdah stands in the way of nothing that kubelet and controllers do about it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use howdah_lab::database::{Database, START_LIMIT};
use howdah_lab::install;
use howdah_lab::node::Node;
use howdah_lab::node::faults;
use howdah_lab::node::vm::{self, State};
use howdah_lab::process::wait_until;

use crate::{Victim, lab, take_all};

/// The kubelet may take 50 s (images/node/kubelet.yaml), then init ends what is left.
const OFF_LIMIT: Duration = Duration::from_secs(150);
/// What the kubelet says last.
const COMPLETED: &str = "Shutdown manager completed processing shutdown event";

#[test]
fn a_node_that_is_shut_down_ends_its_database_in_order_and_howdah_lets_it() -> Result<()> {
    let turns = take_all();
    let lab = lab();
    install::install(&lab)?;
    let database = Database::start(lab.clone())?;
    database.keep_rows()?;
    let uid = || database.kubectl(&["get", "pod", "db-0", "-o", "jsonpath={.metadata.uid}"]);
    let before = uid()?;
    let victim = Victim { lab, node: Node::named(&database.node()?)?, _turns: turns };
    let log = victim.lab.path("logs").join(format!("{}.kubelet.log", victim.node.name()));
    let kubelet = || fs::read(&log).with_context(|| format!("read {}", log.display()));
    let from = kubelet()?.len();

    victim.administrator().exec("nsenter --target 1 --all loginctl poweroff")?;
    let off = wait_until(OFF_LIMIT, || vm::state(&victim.lab, victim.node) == State::Dead);
    ensure!(off, "{} did not power off", victim.node.name());
    let said = String::from_utf8_lossy(kubelet()?.get(from..).context("read on in the log")?).into_owned();
    ensure!(said.contains(COMPLETED), "the kubelet did not end its pods in time:\n{said}");

    // Another node may have to wait for this one to say that it let the volume go.
    faults::start(&victim.lab, victim.node)?;
    database.kubectl(&["rollout", "status", "statefulset/db", START_LIMIT])?;
    ensure!(uid()? != before, "the pod outlived its node");
    database.has_kept_rows()?;
    let log = database.kubectl(&["logs", "db-0"])?;
    ensure!(
        log.contains("database system was shut down at"),
        "PostgreSQL was not shut down in order:\n{log}"
    );
    let denied = database.denials()?;
    ensure!(denied.is_empty(), "howdah stood in the way: {denied}");
    Ok(())
}
