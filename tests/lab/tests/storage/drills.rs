//! Restore drills. The scheduler, the API server, Ceph and PostgreSQL are real; where a kubelet would run the drill's pod, the
//! test maps the clone and runs the pod's own script on it.

use std::fs::{self, File, OpenOptions, Permissions};
use std::ops::Deref;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use howdah_core::backup::{BackupStatus, Phase};
use howdah_core::names::{DRILL_PREFIX, VERIFY_NAMESPACE, VERIFY_NOW, image_meta_key};
use howdah_core::verify::{self, VerifyStatus};
use howdah_lab::ceph::POOL;
use howdah_lab::mapping::Mapping;
use howdah_lab::postgres::DEBIAN_MAJOR;
use howdah_lab::process::wait_until;
use howdah_lab::stage::{LEAD_LIMIT, Stage};
use howdah_lab::storage::claim::wait_slowly;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::linger::Linger;

/// A drill of a small database takes some twenty seconds.
const DRILL_LIMIT: Duration = Duration::from_secs(240);
/// Where Debian keeps the programs of a server.
const PROGRAMS: &str = "/usr/lib/postgresql";

/// A stage whose drills are played.
struct Drills(Stage);

/// Does it to a file, and says how it is repaired.
type Damage = fn(&Path) -> Box<dyn FnOnce()>;

/// What a drill finds in the image of a database beside PostgreSQL.
enum Tools {
    /// Those of this machine.
    Debian,
    /// Those of busybox, and none of this machine's. What it has no means for is called `gosu`, as in the official image.
    /// Its `POSTGRES_USER` is no superuser, as in Bitnami's.
    Alpine,
}

/// A role that is no superuser, where it exists.
const USER: &str = "app";
/// Becomes somebody else: `gosu USER:GROUP COMMAND...`.
const GOSU: &str = "#!/bin/sh\nwho=$1\nshift\nexec /usr/bin/setpriv --reuid=${who%:*} --regid=${who#*:} --clear-groups \"$@\"\n";

impl Tools {
    /// The `PATH` with them, made in `directory` if need be.
    fn path(&self, directory: &Path) -> String {
        let of_postgres = format!("{PROGRAMS}/{DEBIAN_MAJOR}/bin");
        match self {
            Self::Debian => format!("{of_postgres}:{}", std::env::var("PATH").unwrap()),
            Self::Alpine => {
                let installed = Command::new("busybox").args(["--install", "-s"]).arg(directory).status();
                assert!(installed.unwrap().success());
                let gosu = directory.join("gosu");
                fs::write(&gosu, GOSU).unwrap();
                // Another user runs them.
                for path in [gosu.as_path(), directory] {
                    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
                }
                format!("{of_postgres}:{}", directory.display())
            }
        }
    }
}

impl Deref for Drills {
    type Target = Stage;

    fn deref(&self) -> &Stage {
        &self.0
    }
}

impl Drills {
    fn drill(&self, backup: &str) -> VerifyStatus {
        self.status(backup).verification.unwrap_or_default()
    }

    fn drill_name(&self, backup: &str) -> String {
        format!("{DRILL_PREFIX}{}", self.backup(backup).unwrap().metadata.uid.unwrap())
    }

    fn in_drills(&self, args: &[&str]) -> String {
        self.lab.kubectl_ok(&[&["-n", VERIFY_NAMESPACE], args].concat()).unwrap()
    }

    /// Asks for a drill by hand.
    fn ask(&self, backup: &str, token: &str) {
        self.kubectl(&[
            "annotate",
            "--overwrite",
            "postgresbackup",
            backup,
            &format!("{VERIFY_NOW}={token}"),
        ]);
    }

    /// Waits for the pod of a backup's drill, and does what its kubelet would: runs the script and tells how it ended.
    fn play_drill(&self, backup: &str, tools: &Tools) {
        let name = self.drill_name(backup);
        let mut pod = Value::Null;
        let found = wait_slowly(DRILL_LIMIT, || {
            let text = self.in_drills(&["get", "pod", &name, "--ignore-not-found", "-o", "json"]);
            pod = serde_json::from_str(&text).unwrap_or_default();
            pod.is_object()
        });
        assert!(found, "no pod: {:?}\n{}", self.drill(backup), self.scheduler_log());
        let container = &pod["spec"]["containers"][0];
        let mapping = Mapping::open(&self.lab, &name, &name, false).unwrap();
        let report = tempfile::NamedTempFile::new().unwrap();
        let mut script = self.lab.command("sh");
        for variable in container["env"].as_array().unwrap() {
            script.env(variable["name"].as_str().unwrap(), variable["value"].as_str().unwrap());
        }
        let directory = tempfile::tempdir().unwrap();
        script
            .env("HOWDAH_MOUNT", mapping.path())
            .env_remove("PGDATA")
            .env("HOWDAH_REPORT", report.path())
            .env("PATH", tools.path(directory.path()));
        if matches!(tools, Tools::Alpine) {
            script.env("HOWDAH_ROLE", USER);
        }
        let command: Vec<&str> =
            container["command"].as_array().unwrap().iter().map(|part| part.as_str().unwrap()).collect();
        assert_eq!(command[0], "sh");
        let code = i32::from(self.lab.output_inside(script.args(&command[1..])).is_err());
        let message = fs::read_to_string(report.path()).unwrap();
        // PostgreSQL was told to end; it is waited for until the file system can be left.
        drop(mapping);
        let ended = json!({"status": {"phase": "Succeeded", "containerStatuses": [{
            "name": container["name"], "image": container["image"], "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": code, "reason": "Completed", "message": message}}}]}});
        self.in_drills(&[
            "patch",
            "pod",
            &name,
            "--subresource=status",
            "--type=merge",
            "-p",
            &ended.to_string(),
        ]);
    }

    fn wait_drilled(&self, backup: &str) -> BackupStatus {
        let over = wait_until(DRILL_LIMIT, || self.drill(backup).phase.is_terminal());
        assert!(over, "{:?}\n{}", self.drill(backup), self.scheduler_log());
        self.status(backup)
    }

    /// Whether anything of the drill of a backup is left, wherever it may be.
    fn nothing_left(&self, backup: &str) {
        self.nothing_named(&self.drill_name(backup));
    }

    fn nothing_named(&self, name: &str) {
        for kind in ["pod", "pvc"] {
            assert_eq!(self.in_drills(&["get", kind, name, "--ignore-not-found", "-o", "name"]), "");
        }
        assert_eq!(
            self.lab.kubectl_ok(&["get", "pv", name, "--ignore-not-found", "-o", "name"]).unwrap(),
            ""
        );
        let images = self.lab.rbd(&["ls", POOL]).unwrap();
        assert!(!images.contains(name), "the clone is left: {images}");
    }
}

#[test]
fn a_good_backup_is_proven_and_a_damaged_one_found() {
    let stage = Drills(Stage::shared());
    stage.grant();
    let query = json!({"howdah.dev/verify": "always", "howdah.dev/retention": "last=2",
        "howdah.dev/verify-query": "SELECT sum(n) FROM t", "howdah.dev/verify-expect": "500500"});
    let database = stage.database("db", query);
    database.sql("CREATE TABLE t (n int PRIMARY KEY, wide text DEFAULT repeat('x', 1000))");
    database.sql("INSERT INTO t SELECT generate_series(1, 1000)");
    database.sql("CREATE TABLE long (value text)");
    database.sql("ALTER TABLE long ALTER value SET STORAGE EXTERNAL");
    database.sql("INSERT INTO long VALUES (repeat('x', 10000))");
    database.sql("SELECT lo_from_bytea(0, 'a large object')");
    database.sql("CREATE TABLE lost AS SELECT 1 AS n");
    database.sql(&format!("CREATE ROLE {USER} LOGIN"));
    database.sql("VACUUM ANALYZE");
    let plan = database.sql("EXPLAIN SELECT count(*) FROM t");
    assert!(plan.contains("Index Only Scan"), "a drill has to look away from the index: {plan}");
    // Nothing in a drill is as quick as this.
    database.sql("ALTER DATABASE template1 SET statement_timeout = '1ms'");
    database.order("good", Some("online"));
    stage.wait_over("good");
    stage.play_drill("good", &Tools::Debian);
    let status = stage.wait_drilled("good");
    let drill = status.verification.unwrap();
    assert_eq!(
        (status.phase, drill.phase),
        (Phase::Verified, verify::Phase::Verified),
        "{:?}",
        drill.failure
    );
    let report = drill.report.unwrap();
    assert_eq!(report.rows, Some(1002));
    assert_eq!(report.answer.as_deref(), Some("500500"));
    assert_eq!(report.system_identifier, status.system_identifier);
    assert!(
        report.recovery_ms.is_some_and(|ms| ms > 0) && report.databases.is_some_and(|n| n >= 2),
        "{report:?}"
    );
    stage.nothing_left("good");
    // The catalogue knows it, too.
    let entry = image_meta_key(&status.snapshot.unwrap().name);
    let metadata = stage.lab.rbd(&["image-meta", "get", database.image(), &entry]).unwrap();
    assert!(metadata.contains(r#""rows":1002"#), "{metadata}");

    // A page of a table, one of its long values, one of large objects, and a whole table go bad behind PostgreSQL's back: the
    // file system has it, PostgreSQL's cache has not.
    database.sql("CHECKPOINT");
    let page: Damage = |path| {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut good = [0; 64];
        file.read_exact_at(&mut good, 0).unwrap();
        let write = move |bytes: &[u8]| {
            file.write_all_at(bytes, 0).unwrap();
            file.sync_all().unwrap();
        };
        write(&[0xff; 64]);
        Box::new(move || write(&good))
    };
    let loss: Damage = |path| {
        let (path, away) = (path.to_owned(), path.with_extension("away"));
        let sync = |path: &Path| File::open(path.parent().unwrap()).unwrap().sync_all().unwrap();
        fs::rename(&path, &away).unwrap();
        sync(&path);
        Box::new(move || {
            fs::rename(&away, &path).unwrap();
            sync(&path);
        })
    };
    // A whole segment file of nothing, of a table that had a page more: the next file is gone.
    database.sql("CREATE TABLE cut AS SELECT 1 AS n");
    database.sql("CHECKPOINT");
    database.sql("UPDATE pg_class SET relpages = 131073 WHERE relname = 'cut'");
    let cut: Damage = |path| {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let resize = move |length: u64| {
            file.set_len(length).unwrap();
            file.sync_all().unwrap();
        };
        resize(1 << 30);
        Box::new(move || resize(8192))
    };
    let toast = database.sql("SELECT reltoastrelid::regclass FROM pg_class WHERE relname = 'long'");
    for (name, relation, damage, seen, tools) in [
        ("bad-page", "t", page, "invalid page", Tools::Alpine),
        ("bad-value", toast.as_str(), page, "invalid page", Tools::Debian),
        ("bad-object", "pg_largeobject", page, "invalid page", Tools::Alpine),
        ("bad-loss", "lost", loss, "No such file", Tools::Alpine),
        ("bad-cut", "cut", cut, "public.cut has 131072 pages", Tools::Debian),
    ] {
        let file = database.sql(&format!("SELECT pg_relation_filepath('{relation}')"));
        let repair = damage(&database.mapping().path().join("data").join(file));
        database.order(name, Some("online"));
        assert_eq!(stage.wait_over(name).phase, Phase::Taken, "taking it reads no page");
        repair();
        stage.play_drill(name, &tools);
        let status = stage.wait_drilled(name);
        assert_eq!(status.phase, Phase::Damaged, "{name}: {:?}", status.verification);
        let failure = status.verification.unwrap().failure.unwrap();
        // `pg_amcheck` is not everywhere.
        assert!(
            failure.reason.contains("the database postgres ")
                && failure.reason.contains(seen)
                && failure.cure.contains("do not restore"),
            "{failure:?}"
        );
        stage.nothing_left(name);
    }
    let told = || {
        let events = stage.kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"]);
        events.contains("BackupDamaged") && events.contains("BackupVerified")
    };
    assert!(wait_slowly(LEAD_LIMIT, told), "no Event of it");

    // `last=1` would keep the damaged one alone if it counted.
    stage.annotate("db", "howdah.dev/retention=last=1");
    stage.annotate("db", "howdah.dev/verify=never");
    database.order("third", Some("crash"));
    stage.wait_over("third");
    let left = database.snapshots();
    assert_eq!(
        left.len(),
        2,
        "the newest verified one and the newest good one stay, the damaged one goes: {left:?}"
    );
    assert!(
        ["bad-page", "bad-value", "bad-object", "bad-loss", "bad-cut"]
            .iter()
            .all(|name| stage.backup(name).is_none())
            && stage.backup("good").is_some()
    );

    // A WAL that ends before what the data was known to hold is of another instant.
    let later = json!({"status": {"flushedLsn": "FF/0"}}).to_string();
    stage.kubectl(&["patch", "pgb", "third", "--subresource=status", "--type=merge", "-p", &later]);
    stage.ask("third", "by-hand");
    stage.play_drill("third", &Tools::Debian);
    let failure = stage.wait_drilled("third").verification.unwrap().failure.unwrap();
    assert!(failure.reason.contains("recovery ended at 0/"), "{failure:?}");
}

#[test]
fn a_drill_ends_the_same_in_whatever_phase_its_scheduler_is_killed() {
    let stage = Drills(Stage::alone());
    stage.grant();
    let database = stage.database("db", json!({}));
    let mut scheduler = stage.scheduler("scheduler-0", 18081);
    let linger = Linger::of_drills(&stage);
    database.sql("CREATE TABLE t AS SELECT generate_series(1, 10) AS n");
    database.order("one", Some("crash"));
    stage.wait_over("one");
    let phases = [
        verify::Phase::Cloning,
        verify::Phase::Starting,
        verify::Phase::Running,
        verify::Phase::Removing,
        verify::Phase::Recording,
    ];
    for (i, phase) in phases.into_iter().enumerate() {
        let token = phase.as_str().to_lowercase();
        linger.only_in([phase.as_str()]);
        stage.ask("one", &token);
        let of_this = |drill: &VerifyStatus| drill.asked.as_deref() == Some(token.as_str());
        let late = matches!(phase, verify::Phase::Removing | verify::Phase::Recording);
        if late {
            stage.play_drill("one", &Tools::Debian);
        }
        let mut seen = verify::Phase::Requested;
        let reached = wait_until(DRILL_LIMIT, || {
            let drill = stage.drill("one");
            if of_this(&drill) {
                seen = drill.phase;
            }
            seen == phase || seen.is_terminal()
        });
        assert!(reached && seen == phase, "{seen:?} and not {phase:?}\n{}", scheduler.output().unwrap());
        scheduler.signal(Signal::SIGKILL).unwrap();
        assert!(scheduler.wait_gone(LEAD_LIMIT));
        assert_eq!(stage.drill("one").phase, phase, "it ended its phase");
        linger.only_in([]);
        // The same name: what it leased is its own.
        scheduler = stage.scheduler("scheduler-0", 18082 + u16::try_from(i).unwrap());
        if !late {
            stage.play_drill("one", &Tools::Alpine);
        }
        let over = wait_until(DRILL_LIMIT, || {
            let drill = stage.drill("one");
            of_this(&drill) && drill.phase.is_terminal()
        });
        let status = stage.status("one");
        assert!(over, "{:?}\n{}", status.verification, scheduler.output().unwrap());
        assert_eq!(status.phase, Phase::Verified, "killed in {phase:?}: {:?}", status.verification);
        assert_eq!(status.verification.unwrap().report.unwrap().rows, Some(10));
        stage.nothing_left("one");
    }

    // A record that is deleted under its drill leaves the parts, and the next drill takes them away.
    database.order("two", Some("crash"));
    stage.wait_over("two");
    stage.ask("two", "lost");
    assert!(wait_until(DRILL_LIMIT, || stage.drill("two").phase == verify::Phase::Running));
    let lost = stage.drill_name("two");
    stage.kubectl(&["delete", "postgresbackup", "two"]);
    stage.ask("one", "sweep");
    assert!(wait_until(DRILL_LIMIT, || stage.drill("one").asked.as_deref() == Some("sweep")));
    stage.play_drill("one", &Tools::Alpine);
    assert_eq!(stage.wait_drilled("one").phase, Phase::Verified);
    stage.nothing_left("one");
    stage.nothing_named(&lost);
    scheduler.stop().unwrap();
}
