//! What operations stand on fails in the middle of them: the leader, Ceph, the API server, PostgreSQL.

use howdah_lab::stage::{LEAD_LIMIT, Node, Restored, Stage};
use std::thread;
use std::time::Duration;

use howdah_core::annotations::Consistency;
use howdah_core::backup;
use howdah_core::restore::Phase;
use howdah_lab::control_plane::API_SERVER;
use howdah_lab::postgres::DEBIAN_MAJOR;
use howdah_lab::process::{self, wait_until};
use howdah_lab::testing::Process;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::gate::{Gate, When};

/// How long a daemon hangs: longer than a leader may go without renewing its lease (10 s), so that its term ends.
const HANG: Duration = Duration::from_secs(13);
/// The caps of the scheduler's Ceph user, and what is left of them when they are withdrawn.
const CAPS: [&str; 4] = ["mon", "allow r", "osd", "profile rbd pool=replicapool"];
const NO_CAPS: [&str; 4] = ["mon", "allow r", "osd", "allow r pool=none"];

/// A daemon of the lab that is stopped; it goes on when this is dropped.
struct Hung(process::Identity);

impl Hung {
    fn daemon(stage: &Stage, name: &str) -> Self {
        let identity = process::running(&stage.lab, name).unwrap().identity();
        identity.signal(Signal::SIGSTOP).unwrap();
        Self(identity)
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        if let Err(error) = self.0.signal(Signal::SIGCONT) {
            eprintln!("{error:#}");
        }
    }
}

/// The caps of the scheduler's user are withdrawn; it has them again when this is dropped.
struct Refused<'a>(&'a Stage);

impl<'a> Refused<'a> {
    fn by_ceph(stage: &'a Stage) -> Self {
        let refused = Self(stage);
        refused.caps(&NO_CAPS);
        refused
    }

    fn caps(&self, caps: &[&str]) {
        let user = ["auth", "caps", "client.howdah-backup"];
        if let Err(error) = self.0.lab.ceph(&[&user[..], caps].concat()) {
            eprintln!("{error:#}");
        }
    }
}

impl Drop for Refused<'_> {
    fn drop(&mut self) {
        self.caps(&CAPS);
    }
}

/// How often a scheduler has acted on an operation.
fn acts(scheduler: &Process) -> usize {
    scheduler.output().unwrap().matches("\"operation event\"").count()
}

#[test]
fn a_leader_that_sleeps_through_its_term_between_intent_and_deed_does_nothing_when_it_wakes() {
    let stage = Stage::alone();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    let gate = Gate::new(&stage);
    node.play(|| {
        let first = stage.scheduler_on("scheduler-a", 18081, &gate.path());
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        node.sql("UPDATE t SET n = 2");
        let second = stage.scheduler("scheduler-b", 18082);
        // It has written that it renames the image in place, and its command has not begun.
        gate.close(When::Before, "mv");
        node.order("restore", json!({"to": "one"}));
        gate.wait_reached();
        assert_eq!(stage.restore("restore").unwrap().phase, Phase::SettingAside);
        first.signal(Signal::SIGSTOP).unwrap();
        let acted = acts(&first);

        assert!(wait_until(LEAD_LIMIT, || acts(&second) > 0), "{}", second.output().unwrap());
        let status = node.wait_over("restore");
        node.check_completed(&status);
        assert_eq!(node.sql("SELECT n FROM t"), "1");
        let (live, images) = (node.id(&node.image), node.images());
        node.sql("UPDATE t SET n = 3");

        // It wakes, and so does its command, while the database runs on the image that has the name now.
        first.signal(Signal::SIGCONT).unwrap();
        gate.open();
        let over = || first.output().unwrap().contains("\"leadership ended\"");
        assert!(wait_until(LEAD_LIMIT, over), "{}", first.output().unwrap());
        assert_eq!(acts(&first), acted, "it went on:\n{}", first.output().unwrap());
        assert_eq!(stage.restore("restore").unwrap(), status, "it wrote the record");
        assert_eq!((node.id(&node.image), node.images()), (live, images), "it renamed an image");
        assert_eq!((node.gate().as_str(), node.sql("SELECT n FROM t").as_str()), ("", "3"));

        // It has not lost its mind: when the other one goes, it leads again.
        second.stop().unwrap();
        node.back_up("two");
        first.stop().unwrap();
    });
}

#[test]
fn a_restore_outlives_a_ceph_that_hangs_or_refuses_and_an_api_server_that_is_gone() {
    let stage = Stage::alone();
    stage.grant();
    let node = Node::of(stage.database("db", json!({})));
    let gate = Gate::new(&stage);
    node.play(|| {
        let scheduler = stage.scheduler_on("scheduler-a", 18081, &gate.path());
        node.sql("CREATE TABLE t AS SELECT 1 AS n");
        node.back_up("one");
        node.sql("UPDATE t SET n = 2");
        let before = node.id(&node.image);

        // Refused when the image has its other name already: neither forward nor back, and so the gate stays closed.
        gate.close(When::After, "mv");
        node.order("refused", json!({"to": "one"}));
        gate.wait_reached();
        let refused = Refused::by_ceph(&stage);
        gate.open();
        let status = node.wait_over("refused");
        assert_eq!(status.phase, Phase::Stuck, "{status:#?}");
        let failure = status.failure.unwrap();
        assert!(failure.reason.contains("permission denied for client.howdah-backup"), "{failure:?}");
        assert!(failure.cure.contains("kubectl howdah restore retry refused"), "{failure:?}");
        assert_eq!((node.gate().as_str(), node.field("{.spec.replicas}").as_str()), ("restore/refused", "0"));
        assert!(stage.pod_uid("db-0").is_none());
        drop(refused);
        stage.kubectl(&["annotate", "pgr", "refused", "howdah.dev/resume=retry/1"]);
        stage.wait_restore("refused", |status| status.resumed.is_some() && status.phase.is_terminal());
        let status = stage.restore("refused").unwrap();
        assert_eq!(status.phase, Phase::Failed, "{status:#?}");
        assert_eq!((node.id(&node.image), node.images().len()), (before.clone(), 1));
        assert_eq!(node.claim().journal("csi.imageid").unwrap(), before);
        node.wait_up();
        assert_eq!((node.gate().as_str(), node.sql("SELECT n FROM t").as_str()), ("", "2"));

        // Ceph hangs at the first change of the storage, and the API server is gone at the next one.
        gate.close(When::Before, "clone");
        node.order("hangs", json!({"to": "one"}));
        gate.wait_reached();
        let hung = Hung::daemon(&stage, "ceph-osd.0");
        gate.open();
        thread::sleep(HANG);
        gate.close(When::Before, "mv");
        drop(hung);
        gate.wait_reached();
        let terms = scheduler.output().unwrap().matches("\"leading\"").count();
        let hung = Hung::daemon(&stage, API_SERVER);
        thread::sleep(HANG);
        drop(hung);
        gate.open();
        let status = node.wait_over("hangs");
        node.check_completed(&status);
        assert_eq!(node.sql("SELECT n FROM t"), "1");
        let log = scheduler.output().unwrap();
        assert!(log.contains("leadership lost") && log.matches("\"leading\"").count() > terms, "{log}");
        scheduler.stop().unwrap();
    });
}

#[test]
fn a_postgres_that_restarts_in_backup_mode_costs_the_class_and_not_the_backup() {
    let stage = Stage::alone();
    stage.grant();
    let mut database = stage.database("db", json!({}));
    database.sql("CREATE TABLE ledger AS SELECT g AS n FROM generate_series(1, 1000) g");
    let gate = Gate::new(&stage);
    let scheduler = stage.scheduler_on("scheduler-a", 18081, &gate.path());
    for (name, wanted, class, attempts) in [
        // The snapshot is good without the session: what is lost is the class.
        ("best", None, Consistency::Crash, 1),
        // Who says online gets that or nothing, and so it is tried again.
        ("online", Some("online"), Consistency::Online, 2),
    ] {
        gate.close(When::Before, "snap create");
        database.order(name, wanted);
        gate.wait_reached();
        assert_eq!(database.sessions(), "1", "not in backup mode");
        database.server.restart(DEBIAN_MAJOR);
        gate.open();
        let status = stage.wait_over(name);
        assert_eq!(
            (status.phase, status.consistency, status.attempt),
            (backup::Phase::Taken, Some(class), attempts),
            "{status:#?}"
        );
        assert_eq!(database.sessions(), "0");
        let snapshot = format!("{}@{}", database.image(), status.snapshot.unwrap().name);
        let clone = Restored::start(&stage.lab, DEBIAN_MAJOR, &snapshot);
        assert_eq!(clone.sql("SELECT count(*) FROM ledger"), "1000");
    }
    assert_eq!(database.snapshots().len(), 2, "a snapshot of a lost attempt is left");
    scheduler.stop().unwrap();
}
