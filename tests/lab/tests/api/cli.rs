//! `kubectl howdah`, as the built command, against a real API server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::process::{Command, Output};
use std::time::Duration;

use howdah_lab::lab::Lab;
use howdah_lab::process::wait_until;
use howdah_lab::testing::shared_name;

use crate::deploy::{TURN, apply_rights};
use crate::records::install_definitions;

/// Runs the command that cargo built beside this test.
fn howdah(lab: &Lab, arguments: &[&str]) -> (bool, String) {
    let (code, text) = howdah_code(lab, arguments);
    (code == Some(0), text)
}

/// The same with the exit code.
fn howdah_code(lab: &Lab, arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = output(lab, arguments);
    (status.code(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

fn output(lab: &Lab, arguments: &[&str]) -> Output {
    let test = std::env::current_exe().unwrap();
    let binary = test.ancestors().nth(2).unwrap().join("kubectl-howdah");
    assert!(binary.is_file(), "there is no {}: run `cargo build --workspace --bins`", binary.display());
    Command::new(binary).arg("--kubeconfig").arg(lab.kubeconfig()).args(arguments).output().unwrap()
}

/// The command reads the cluster twice before it orders.
const ORDER_LIMIT: Duration = Duration::from_secs(60);

const DATABASE: &str = r#"
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: db
  labels: {howdah.dev/protect: "true"}
  annotations: {howdah.dev/schedule: "0 3 * * *", howdah.dev/retention: "last=1"}
spec:
  replicas: 0
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec: {containers: [{name: postgres, image: "postgres:15"}]}
"#;

/// A record with the status of a completed backup; the test plays the scheduler.
fn record_backup(lab: &Lab, namespace: &str, day: u8) {
    let name = format!("db-202611{day:02}030000");
    let manifest = format!(
        r#"{{"apiVersion":"howdah.dev/v1alpha1","kind":"PostgresBackup","metadata":{{"name":"{name}","namespace":"{namespace}"}},"spec":{{"statefulSet":"db"}}}}"#
    );
    assert!(lab.kubectl_apply(&manifest).unwrap().status.success());
    let status = format!(
        r#"{{"status":{{"phase":"Taken","consistency":"online","slot":"2026-11-{day:02}T03:00:00Z","snapshot":{{"name":"howdah-202611{day:02}T030000Z","id":{day},"size":1}}}}}}"#
    );
    let patch =
        ["patch", "pgb", &name, "-n", namespace, "--subresource=status", "--type=merge", "-p", &status];
    lab.kubectl_ok(&patch).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn status_and_plan_follow_the_records() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    install_definitions(&lab);
    let namespace = lab.namespace("cli").unwrap();
    let place = ["-n", namespace.name()];

    let (ok, text) = howdah(&lab, &[&["status"], &place[..]].concat());
    assert!(ok && text.contains("No protected StatefulSet"), "{text}");
    let created = lab.kubectl_with_input(&["create", "-n", namespace.name(), "-f", "-"], DATABASE).unwrap();
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    let (ok, text) = howdah(&lab, &[&["status"], &place[..]].concat());
    assert!(ok && text.contains("waiting for its first backup"), "{text}");

    record_backup(&lab, namespace.name(), 1);
    record_backup(&lab, namespace.name(), 2);
    for arguments in [&["status", "-A"][..], &["status", place[0], place[1]]] {
        let (ok, text) = howdah(&lab, arguments);
        let line = text.lines().find(|line| line.starts_with(namespace.name())).unwrap_or_default();
        assert!(ok && line.contains("online") && line.ends_with("ok"), "{text}");
    }
    let (ok, text) = howdah(&lab, &[&["prune", "db", "--dry-run"], &place[..]].concat());
    assert!(ok && text.contains("1 kept, 1 to delete"), "{text}");
    assert!(text.contains("newest good") && text.contains("no rule keeps it"), "{text}");
    let left = lab.kubectl_ok(&["get", "pgb", "-n", namespace.name(), "-o", "name"]).unwrap();
    assert_eq!(left.lines().count(), 2, "a dry run deleted something: {left}");

    let (ok, text) = howdah(&lab, &[&["prune", "absent", "--dry-run"], &place[..]].concat());
    assert!(!ok && text.contains("get the StatefulSet") && text.contains("not found"), "{text}");
}

/// Names of the orders in a namespace.
fn orders(lab: &Lab, namespace: &str) -> Vec<String> {
    let names = ["get", "pgb", "-n", namespace, "-o", "jsonpath={.items[*].metadata.name}"];
    lab.kubectl_ok(&names).unwrap().split_whitespace().map(str::to_owned).collect()
}

/// Plays the scheduler: gives the first order that `known` does not have this status.
fn answer(lab: &Lab, namespace: &str, known: &[String], status: &str) -> String {
    let mut new = None;
    let found = wait_until(ORDER_LIMIT, || {
        new = orders(lab, namespace).into_iter().find(|name| !known.contains(name));
        new.is_some()
    });
    assert!(found, "no order appeared");
    let name = new.unwrap();
    let patch =
        ["patch", "pgb", &name, "-n", namespace, "--subresource=status", "--type=merge", "-p", status];
    lab.kubectl_ok(&patch).unwrap();
    name
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_by_hand_is_refused_with_a_cure_ordered_and_followed_to_its_end() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    install_definitions(&lab);
    let namespace = lab.namespace("order").unwrap();
    let place = ["-n", namespace.name()];
    let backup = |more: &[&str]| howdah_code(&lab, &[&["backup", "db"], &place[..], more].concat());

    let (code, text) = backup(&["--wait"]);
    assert!(code == Some(1) && text.contains("there is no such StatefulSet"), "{text}");
    let plain = DATABASE.replace("howdah.dev/protect", "example.com/protect");
    let created = lab.kubectl_with_input(&["create", "-n", namespace.name(), "-f", "-"], &plain).unwrap();
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    let (code, text) = backup(&[]);
    let cure = format!("kubectl label statefulset db -n {} howdah.dev/protect=true", namespace.name());
    assert!(code == Some(1) && text.contains(&cure), "{text}");
    assert!(orders(&lab, namespace.name()).is_empty(), "a refused order was made");

    lab.kubectl_ok(&["label", "statefulset", "db", "howdah.dev/protect=true", place[0], place[1]]).unwrap();
    let (code, text) = backup(&["--consistency", "crash"]);
    assert!(code == Some(0) && text.contains("is ordered"), "{text}");
    // Another in the same second gets a name of its own.
    let (first, second) =
        std::thread::scope(|scope| (scope.spawn(|| backup(&[])).join().unwrap(), backup(&[])));
    assert!(first.0 == Some(0) && second.0 == Some(0), "{first:?} {second:?}");
    let known = orders(&lab, namespace.name());
    assert_eq!(known.len(), 3, "{known:?}");
    let spec =
        lab.kubectl_ok(&["get", "pgb", &known[0], place[0], place[1], "-o", "jsonpath={.spec}"]).unwrap();
    assert!(spec.contains(r#""consistency":"crash""#) && spec.contains(r#""trigger":"Manual""#), "{spec}");

    let taken = r#"{"status":{"phase":"Taken","consistency":"online","image":{"pool":"p","name":"i","id":"1"},"snapshot":{"name":"s","id":4,"size":1}}}"#;
    let failed = r#"{"status":{"phase":"Failed","failure":{"step":"Preflight","kind":"Permanent","reason":"fsync is off","cure":"turn it on"}}}"#;
    let running = r#"{"status":{"phase":"Snapshotting","attempt":1}}"#;
    for (status, limit, code, parts) in [
        (taken, "60", 0, ["is taken: online, snapshot p/i@s", "Taken"]),
        (failed, "60", 1, ["failed in Preflight: fsync is off", "turn it on"]),
        (running, "20", 3, ["still in phase Snapshotting", "goes on"]),
    ] {
        let known = orders(&lab, namespace.name());
        let (ended, _) = std::thread::scope(|scope| {
            let following = scope.spawn(|| backup(&["--wait", "--timeout-seconds", limit]));
            let name = answer(&lab, namespace.name(), &known, status);
            (following.join().unwrap(), name)
        });
        assert!(ended.0 == Some(code) && parts.iter().all(|part| ended.1.contains(part)), "{ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn protect_lets_the_scheduler_read_secrets_there_and_nowhere_else() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    apply_rights(&lab, "rook").unwrap();
    let (granting, ordinary) = (lab.namespace("granting").unwrap(), lab.namespace("ordinary").unwrap());
    let may = |namespace: &str, verb: &str| {
        let account = "--as=system:serviceaccount:howdah-system:howdah-scheduler";
        let asked = lab.kubectl(&["auth", "can-i", verb, "secrets", "-n", namespace, account]).unwrap();
        asked.status.success()
    };
    assert!(!may(granting.name(), "get"));

    let (ok, yaml) = howdah(&lab, &["protect", granting.name(), "--dry-run"]);
    assert!(ok && yaml.contains("kind: RoleBinding"), "{yaml}");
    assert!(!may(granting.name(), "get"), "a dry run granted something");
    let (ok, text) = howdah(&lab, &["protect", granting.name()]);
    assert!(ok && text.contains("created"), "{text}");
    assert!(may(granting.name(), "get") && !may(granting.name(), "list") && !may(ordinary.name(), "get"));
    let (ok, text) = howdah(&lab, &["protect", granting.name()]);
    assert!(ok && text.contains("nothing changed"), "{text}");
    // What was printed is what was made.
    let applied = lab.kubectl_apply(&yaml).unwrap();
    assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));

    let (ok, text) = howdah(&lab, &["protect", "no-such-namespace"]);
    assert!(!ok && text.contains("no-such-namespace"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_is_ordered_undone_and_asked_again() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    install_definitions(&lab);
    let namespace = lab.namespace("cli").unwrap();
    let place = ["-n", namespace.name()];
    let (ok, text) = howdah(&lab, &[&["restore", "absent", "--to", "newest"], &place[..]].concat());
    assert!(!ok && text.contains("get the StatefulSet") && text.contains("not found"), "{text}");
    let created = lab.kubectl_with_input(&["create", "-n", namespace.name(), "-f", "-"], DATABASE).unwrap();
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    let (ok, text) = howdah(&lab, &[&["restore", "db", "--before", "2026-11-22 03:00"], &place[..]].concat());
    assert!(!ok && text.contains("no zone") && text.contains("2026-11-22T03:00Z"), "{text}");

    let (ok, text) = howdah(&lab, &[&["restore", "db", "--to", "newest"], &place[..]].concat());
    assert!(ok && text.contains("created"), "{text}");
    let jsonpath = "-o=jsonpath={.items[0].metadata.name} {.items[0].spec.statefulSet} {.items[0].spec.to}";
    let found = lab.kubectl_ok(&["get", "pgr", "-n", namespace.name(), jsonpath]).unwrap();
    let restore = found.split(' ').next().unwrap().to_owned();
    assert!(restore.starts_with("db-restore-") && found.ends_with(" db newest"), "{found}");
    let stand_at = |phase: &str| {
        let status = format!(r#"{{"status":{{"phase":"{phase}"}}}}"#);
        let patch =
            ["patch", "pgr", &restore, "-n", namespace.name(), "--subresource=status", "--type=merge", "-p"];
        lab.kubectl_ok(&[&patch[..], &[&status]].concat()).unwrap();
    };
    let resume = || {
        let jsonpath = r"-o=jsonpath={.metadata.annotations.howdah\.dev/resume}";
        lab.kubectl_ok(&["get", "pgr", &restore, "-n", namespace.name(), jsonpath]).unwrap()
    };
    let (ok, text) = howdah(&lab, &[&["restore", "retry", &restore], &place[..]].concat());
    assert!(!ok && text.contains("only a stuck one"), "{text}");
    stand_at("Stuck");
    let (ok, text) = howdah(&lab, &[&["restore", "retry", &restore], &place[..]].concat());
    assert!(ok && resume().starts_with("retry/"), "{text}");
    let (ok, text) = howdah(&lab, &[&["restore", "undo", &restore], &place[..]].concat());
    assert!(ok && resume().starts_with("undo/"), "{text}");

    stand_at("Completed");
    let (ok, text) = howdah(&lab, &[&["restore", "undo", &restore], &place[..]].concat());
    assert!(ok && text.contains("/db-undo-"), "{text}");
    let jsonpath = "-o=jsonpath={.items[*].spec.undo}";
    assert_eq!(lab.kubectl_ok(&["get", "pgr", "-n", namespace.name(), jsonpath]).unwrap(), restore);
    stand_at("Failed");
    let (ok, text) = howdah(&lab, &[&["restore", "undo", &restore], &place[..]].concat());
    assert!(!ok && text.contains("everything is as it was"), "{text}");
}

/// What the database of the original lies on; no controller of the test makes it.
const CLAIM: &str = r#"
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data-db-0}
spec: {storageClassName: rook-ceph-block, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Ti}}}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_into_another_set_makes_it_by_the_rights_of_who_asks() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    install_definitions(&lab);
    let namespace = lab.namespace("into").unwrap();
    let place = ["-n", namespace.name()];
    let create = |yaml: &str| {
        let created = lab.kubectl_with_input(&["create", place[0], place[1], "-f", "-"], yaml).unwrap();
        assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    };
    let restore =
        |more: &[&str]| howdah(&lab, &[&["restore", "db", "--to", "newest"], &place[..], more].concat());
    let get = |kind: &str, jsonpath: &str| {
        let jsonpath = format!("-o=jsonpath={jsonpath}");
        lab.kubectl_ok(&["get", kind, place[0], place[1], &jsonpath]).unwrap()
    };
    // Its data lies nowhere that the manifest tells.
    create(DATABASE);
    let (ok, text) = restore(&["--into", "db-copy"]);
    assert!(!ok && text.contains("make the other StatefulSet by hand"), "{text}");
    lab.kubectl_ok(&["delete", "statefulset", "db", place[0], place[1]]).unwrap();
    create(
        &LINTED
            .replace("CLASS", "rook-ceph-block")
            .replace("serviceName", "replicas: 0\n  serviceName")
            .replace(
                r#"image: "postgres:15"}"#,
                r#"image: "postgres:15", volumeMounts: [{name: data, mountPath: /var/lib/postgresql/data}]}"#,
            ),
    );
    let (ok, text) = restore(&["--into", "db-copy"]);
    assert!(!ok && text.contains("get the PersistentVolumeClaim") && text.contains("data-db-0"), "{text}");
    create(CLAIM);
    let (ok, text) = restore(&["--into", "db-copy"]);
    assert!(!ok && text.contains("there is no good backup of db"), "{text}");
    record_backup(&lab, namespace.name(), 1);
    let good = r#"{"status":{"finishedAt":"2026-11-01T03:00:09Z","image":{"pool":"p","name":"i","id":"1"},"snapshot":{"name":"s","id":1,"size":167772160}}}"#;
    let patch = ["patch", "pgb", "db-20261101030000", "--subresource=status", "--type=merge", "-p", good];
    lab.kubectl_ok(&[&patch[..], &place[..]].concat()).unwrap();

    let (ok, yaml) = restore(&["--into", "db-copy", "--dry-run"]);
    assert!(ok && yaml.matches("---\n").count() == 2 && yaml.contains("storage: 160Mi"), "{yaml}");
    assert_eq!(get("statefulset", "{.items[*].metadata.name}"), "db", "a dry run made something");
    let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    std::fs::write(file.path(), &yaml).unwrap();
    let (code, text) = howdah_code(&lab, &["lint", file.path().to_str().unwrap()]);
    assert!(code == Some(0) && text.contains("nothing would be denied"), "{text}");
    let valid = lab.kubectl_with_input(&["create", "--dry-run=server", "-f", "-"], &yaml).unwrap();
    assert!(valid.status.success(), "{}", String::from_utf8_lossy(&valid.stderr));

    let (ok, text) = restore(&["--into", "db-copy"]);
    assert!(ok && text.matches(" created").count() == 3, "{text}");
    let set = get("statefulset/db-copy", "{.spec.replicas} {.metadata.labels} {.spec.selector.matchLabels}");
    let wanted = r#"0 {"howdah.dev/protect":"true"} {"howdah.dev/database":"db-copy"}"#;
    assert_eq!(set, wanted);
    let claim = get("pvc/data-db-copy-0", "{.spec.storageClassName} {.spec.resources.requests.storage}");
    assert_eq!(claim, "rook-ceph-block 160Mi");
    let spec = get("pgr", "{.items[0].spec.statefulSet} {.items[0].spec.into} {.items[0].spec.to}");
    assert_eq!(spec, "db db-copy newest");
    let uid = get("statefulset/db-copy", "{.metadata.uid}");
    assert_eq!(get("pgr", "{.items[0].spec.statefulSetUid}"), uid, "the uid is not of what gets the data");
    assert_eq!(get("statefulset/db", "{.metadata.generation}"), "1", "the original was changed");

    let (ok, text) = restore(&["--into", "db-copy"]);
    assert!(!ok && text.contains("it exists already; give --into another name"), "{text}");
    let (ok, text) = restore(&["--into", "db"]);
    assert!(!ok && text.contains("give --into another name than db"), "{text}");
    // An undo is of the copy, too.
    let name = get("pgr", "{.items[0].metadata.name}");
    let patch = [
        "patch",
        "pgr",
        &name,
        "--subresource=status",
        "--type=merge",
        "-p",
        r#"{"status":{"phase":"Completed"}}"#,
    ];
    lab.kubectl_ok(&[&patch[..], &place[..]].concat()).unwrap();
    let (ok, text) = howdah(&lab, &[&["restore", "undo", &name], &place[..]].concat());
    assert!(ok && text.contains("/db-copy-undo-"), "{text}");
    let undo = get("pgr", r#"{.items[?(@.spec.undo)].spec.into}"#);
    assert_eq!(undo, "db-copy");
}

/// A set as people write it, with a class and a claim that are no part of the manifest.
const LINTED: &str = r#"
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: db
  labels: {howdah.dev/protect: "true"}
spec:
  serviceName: db
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      containers:
        - {name: postgres, image: "postgres:15"}
        - {name: exporter, image: "exporter:1"}
      affinity:
        podAntiAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
            - {weight: 1, podAffinityTerm: {topologyKey: example.com/rack, labelSelector: {matchLabels: {app: db}}}}
  volumeClaimTemplates:
    - metadata: {name: data}
      spec: {storageClassName: CLASS, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn lint_asks_the_cluster_only_when_told_and_then_knows_its_classes() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let namespace = lab.namespace("lint").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("db.yaml");
    let class = |name: &str, provisioner: &str| {
        let name = format!("{}-{name}", namespace.name());
        let yaml = format!(
            "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {{name: {name}}}\nprovisioner: {provisioner}\n"
        );
        assert!(lab.kubectl_apply(&yaml).unwrap().status.success());
        name
    };
    let (good, bad) = (class("good", "rook-ceph.rbd.csi.ceph.com"), class("bad", "example.com/nfs"));
    let lint = |class: &str, flags: &[&str]| {
        std::fs::write(&file, LINTED.replace("CLASS", class)).unwrap();
        let Output { status, stdout, .. } =
            output(&lab, &[&["lint", file.to_str().unwrap()], flags].concat());
        (status.code().unwrap(), String::from_utf8(stdout).unwrap())
    };
    let cluster = ["--cluster", "-n", namespace.name()];
    let (code, text) = lint(&bad, &[]);
    assert!(code == 0 && text.contains("which only the cluster knows"), "{text}");
    let (code, text) = lint(&bad, &cluster);
    assert!(code == 1 && text.contains("of example.com/nfs"), "{text}");
    let (code, text) = lint("absent", &cluster);
    assert!(code == 1 && text.contains("absent, which does not exist"), "{text}");
    let (code, text) = lint(&good, &cluster);
    assert!(
        code == 0 && text.contains("nothing would be denied") && !text.contains("only a cluster"),
        "{text}"
    );
    lab.kubectl_ok(&["delete", "storageclass", &good, &bad]).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_print_patch_prints_is_a_patch_to_kustomize_and_leaves_the_webhook_nothing_to_set() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("db.yaml", &LINTED.replace("storageClassName: CLASS, ", ""));
    let print = |file: &str| {
        let file = folder.path().join(file);
        let flags = ["--print-patch", "--storage-class", "rook-ceph-block"];
        let Output { stdout, .. } = output(&lab, &[&["lint", file.to_str().unwrap()], &flags[..]].concat());
        String::from_utf8(stdout).unwrap()
    };
    let patch = print("db.yaml");
    write("patch.yaml", &patch);
    write("kustomization.yaml", "resources: [db.yaml]\npatches: [{path: patch.yaml}]\n");
    let folder_name = folder.path().to_str().unwrap();
    let merged = lab.kubectl_ok(&["kustomize", folder_name]).unwrap();
    for kept in ["name: exporter", "example.com/rack", "storage: 1Gi", "storageClassName: rook-ceph-block"] {
        assert!(merged.contains(kept), "{kept} is not in\n{merged}");
    }
    write("merged.yaml", &merged);
    assert_eq!(print("merged.yaml"), "# The webhook would set nothing.\n", "after\n{merged}");
}
