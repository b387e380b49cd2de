//! What administrators and controllers do to nodes and namespaces goes on, whatever howdah protects: a drain waits for a
//! backup and then moves the database, a taint moves it too, and a namespace with it goes when it is deleted. Only what
//! would risk a second writer is refused.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use howdah_core::backup::Phase;
use howdah_lab::database::{BACKUP_LIMIT, Database, MOVE_TAINT, MOVES, START_LIMIT};
use howdah_lab::lab::Lab;
use howdah_lab::process::{self, Identity, wait_until};
use howdah_lab::storage::claim::wait_slowly;
use nix::sys::signal::Signal;

use crate::lab;

/// A pod that leaves its node shuts PostgreSQL down, detaches, attaches elsewhere and recovers.
const MOVE_LIMIT: Duration = Duration::from_secs(420);
/// A drain may have to wait for a whole backup, and then for the pod's end.
const DRAIN_LIMIT: &str = "--timeout=400s";
/// The lab's name for Ceph's one OSD.
const OSD: &str = "ceph-osd.0";
/// kubectl starts in a second; a step of a backup may take half a minute before it fails.
const TOLD_LIMIT: Duration = Duration::from_secs(30);
/// Backups that the drain may miss the middle of before the test gives up.
const TRIES_MAX: usize = 4;

/// A node that is schedulable and untainted again at the end.
struct Node<'a> {
    lab: &'a Lab,
    name: String,
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        for args in [&["uncordon", &self.name][..], &["taint", "node", &self.name, &format!("{MOVE_TAINT}-")]]
        {
            // It may carry no taint; there is nobody to tell.
            let _ = self.lab.kubectl_ok(args);
        }
    }
}

impl<'a> Node<'a> {
    /// The node that the database runs on.
    fn of(database: &'a Database) -> Result<Self> {
        Ok(Self { lab: &database.lab, name: database.node()? })
    }
}

/// Waits until the database is Ready on another node and has the rows it had.
fn moved(database: &Database, from: &str) -> Result<()> {
    let path = "jsonpath={.spec.nodeName} {.status.conditions[?(@.type=='Ready')].status}";
    let elsewhere = || {
        let said = database.kubectl(&["get", "pod", "db-0", "-o", path]).unwrap_or_default();
        said.strip_suffix(" True").is_some_and(|node| !node.is_empty() && node != from)
    };
    ensure!(wait_slowly(MOVE_LIMIT, elsewhere), "{}", database.kubectl(&["describe", "pod", "db-0"])?);
    database.kubectl(&["rollout", "status", "statefulset/db", START_LIMIT])?;
    database.has_kept_rows()
}

/// Whether a backup is in backup mode or takes its snapshot now.
fn held(database: &Database) -> Result<bool> {
    let holding = [Phase::StartingBackupMode, Phase::Snapshotting];
    Ok(database.backups()?.iter().any(|(_, status)| holding.contains(&status.phase)))
}

/// Ceph answers nobody until this is dropped, so that a backup in its middle stays there.
struct Paused(Identity);

impl Paused {
    /// At once: the middle of a backup may last two seconds, in which no `ceph` command has begun.
    fn now(lab: &Lab) -> Result<Self> {
        let osd = process::running(lab, OSD).context("find the OSD")?.identity();
        osd.signal(Signal::SIGSTOP)?;
        Ok(Self(osd))
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if let Err(error) = self.0.signal(Signal::SIGCONT) {
            eprintln!("let Ceph go on: {error:#}");
        }
    }
}

/// Drains the database's node when a backup is in its middle; says whether the drain was told to wait, or came when that
/// was over. It moves the database in either case.
fn drain_in_a_backup(database: &Database) -> Result<bool> {
    let node = Node::of(database)?;
    database.annotate(&["howdah.dev/suspend=false"])?;
    // Looked for often: it may last two seconds.
    let seen = wait_until(BACKUP_LIMIT, || held(database).unwrap_or(false));
    ensure!(seen, "no backup in its middle: {:#?}", database.backups());
    let paused = Paused::now(&database.lab)?;
    let mut drain = database.lab.command(database.lab.path("bin/kubectl"));
    drain.args(["drain", &node.name, &format!("--pod-selector={MOVES}=true"), DRAIN_LIMIT]);
    let mut drain = drain.stdin(Stdio::null()).spawn().context("run kubectl drain")?;
    // kubectl's client tries a 429 again by itself, ten times, before kubectl says a word; the denial is an Event, too.
    let waited =
        wait_slowly(TOLD_LIMIT, || database.denials().is_ok_and(|denials| denials.contains("[eviction]")));
    drop(paused);
    database.annotate(&["howdah.dev/suspend=true"])?;
    let status = drain.wait().context("wait for kubectl drain")?;
    ensure!(status.success(), "the drain failed");
    moved(database, &node.name)?;
    Ok(waited)
}

#[test]
fn a_drain_waits_for_a_backup_and_nothing_but_force_is_stopped() -> Result<()> {
    let database = Database::start_to_move(lab()?)?;
    database.keep_rows()?;

    let forced = database.kubectl(&["delete", "pod", "db-0", "--force", "--grace-period=0"]);
    let refused = forced.err().context("force-delete the pod: howdah let it pass")?.to_string();
    ensure!(refused.contains("force-delete"), "{refused}");

    let mut waited = false;
    for _ in 0..TRIES_MAX {
        waited = drain_in_a_backup(&database)?;
        if waited {
            break;
        }
    }
    ensure!(waited, "no drain of {TRIES_MAX} that came in the middle of a backup was told to wait");

    // A taint's eviction and the kubelet's last word, a delete without grace, come from the cluster itself.
    let node = Node::of(&database)?;
    database.wait("no open backup", || {
        Ok(database.backups()?.iter().all(|(_, status)| status.phase.is_terminal()))
    })?;
    database.lab.kubectl_ok(&["taint", "node", &node.name, &format!("{MOVE_TAINT}=now:NoExecute")])?;
    moved(&database, &node.name)?;
    drop(node);

    // A namespace goes with everything in it: claims and pods of a protected set do not hold it.
    let namespace = database.namespace.name().to_owned();
    database.lab.kubectl_ok(&["delete", "namespace", &namespace, "--wait=false"])?;
    let left = ["get", "namespace", &namespace, "--ignore-not-found", "-o", "name"];
    let gone = wait_slowly(BACKUP_LIMIT, || database.lab.kubectl_ok(&left).is_ok_and(|left| left.is_empty()));
    ensure!(gone, "{}", database.lab.kubectl_ok(&["get", "namespace", &namespace, "-o", "yaml"])?);
    Ok(())
}
