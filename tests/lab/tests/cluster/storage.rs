//! Pods on volumes: what they write stays, and everything that production does to keep two writers apart, or
//! fails to do, happens here too.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::io::Write;
use std::time::{Duration, Instant};

use howdah_adapters::ceph::{Ceph, CephAccess, CephError, Runner, ToolboxRunner};
use howdah_adapters::kubernetes::Kubernetes;
use howdah_lab::ceph::POOL;
use howdah_lab::database::stays;
use howdah_lab::lab::Lab;
use howdah_lab::storage::NAMESPACE;
use howdah_lab::storage::claim::{Claim, wait_slowly};
use howdah_lab::testing::shared_name;
use serde_json::json;

pub const CLASS: &str = "rook-ceph-block";
pub const SHARED_CLASS: &str = "rook-ceph-block-shared";
/// A pod with a fresh volume is up within seconds. Beside another lab and compilers, on nodes that were emulated, staging alone
/// has taken 70 s, and a pod on a node that just booted some minutes.
pub const POD_LIMIT: Duration = Duration::from_secs(480);
/// For what follows within seconds.
pub const SOON: Duration = Duration::from_secs(90);

/// One node is enough here; where the others' tests have brought up three, these use them.
pub fn lab() -> Lab {
    Lab::open_or_up(&shared_name(), 1).unwrap()
}

/// Starts a pod that runs `script` with the claim mounted on /data.
pub fn start_pod(lab: &Lab, namespace: &str, name: &str, claim: &Claim, script: &str) {
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 1,
            "tolerations": stays(),
            "securityContext": { "runAsUser": 0 },
            "containers": [{
                "name": "pod",
                "image": "docker.io/library/postgres:15",
                "imagePullPolicy": "Never",
                "command": ["/bin/sh", "-c", script],
                "volumeMounts": [{ "name": "data", "mountPath": "/data" }],
            }],
            "volumes": [{ "name": "data", "persistentVolumeClaim": { "claimName": claim.name() } }],
        },
    });
    let applied = lab.kubectl_apply(&pod.to_string()).unwrap();
    assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
}

pub fn wait_running(lab: &Lab, namespace: &str, name: &str) {
    let wanted = ["get", "pod", name, "-n", namespace, "-o", "jsonpath={.status.containerStatuses[0].ready}"];
    if !wait_slowly(POD_LIMIT, || lab.kubectl_ok(&wanted).is_ok_and(|ready| ready == "true")) {
        let described = lab.kubectl_ok(&["describe", "pod", name, "-n", namespace]).unwrap_or_default();
        panic!("pod {name} did not become ready\n{described}");
    }
}

pub fn delete_pod(lab: &Lab, namespace: &str, name: &str) {
    lab.kubectl_ok(&["delete", "pod", name, "-n", namespace, "--wait=false"]).unwrap();
    let left = ["get", "pod", name, "-n", namespace, "--ignore-not-found", "-o", "name"];
    let gone = || lab.kubectl_ok(&left).is_ok_and(|left| left.is_empty());
    assert!(wait_slowly(POD_LIMIT, gone), "pod {name} is still there");
}

pub fn exec(lab: &Lab, namespace: &str, name: &str, script: &str) -> String {
    lab.kubectl_ok(&["exec", "-n", namespace, name, "--", "/bin/sh", "-c", script]).unwrap()
}

#[test]
fn data_outlives_its_pod_and_an_idle_volume_is_watched_by_its_node() {
    let lab = lab();
    let namespace = lab.namespace("data").unwrap();
    let namespace = namespace.name();
    let claim = Claim::create(&lab, namespace, "data", CLASS, "1Gi").unwrap();
    start_pod(&lab, namespace, "first", &claim, "echo written before >/data/file; sync; exec sleep 3600");
    wait_running(&lab, namespace, "first");
    // A container is ready before its first command has ended.
    let written =
        || exec(&lab, namespace, "first", "cat /data/file 2>/dev/null || true") == "written before\n";
    assert!(wait_slowly(SOON, written), "the first pod did not write its file");
    let node = ["get", "pod", "first", "-n", namespace, "-o", "jsonpath={.status.hostIP}"];
    let node = lab.kubectl_ok(&node).unwrap();
    let watchers = claim.watchers().unwrap();
    assert!(matches!(&watchers[..], [one] if one.starts_with(&format!("{node}:"))), "{node}: {watchers:?}");
    let mounted = exec(&lab, namespace, "first", "grep ' /data ' /proc/mounts");
    assert!(mounted.starts_with("/dev/rbd") && mounted.contains(" ext4 rw"), "{mounted}");

    delete_pod(&lab, namespace, "first");
    assert!(wait_slowly(SOON, || claim.watchers().unwrap().is_empty()), "the image stayed mapped");
    start_pod(&lab, namespace, "second", &claim, "exec sleep 3600");
    wait_running(&lab, namespace, "second");
    assert_eq!(exec(&lab, namespace, "second", "cat /data/file"), "written before\n");
    delete_pod(&lab, namespace, "second");
    claim.delete().unwrap();
}

#[test]
fn a_snapshot_by_an_identity_that_cannot_blocklist_does_not_disturb_the_writer() {
    let lab = lab();
    let namespace = lab.namespace("snapped").unwrap();
    let namespace = namespace.name();
    let claim = Claim::create(&lab, namespace, "data", CLASS, "1Gi").unwrap();
    let writer = "n=0; while n=$((n + 1)) && echo $n >/data/next && sync /data/next && mv /data/next /data/count; \
                  do sleep 0.2; done; echo failed >&2; exit 1";
    start_pod(&lab, namespace, "writer", &claim, writer);
    wait_running(&lab, namespace, "writer");
    // A container is ready before its first command has ended: there may be no file yet.
    let count = "cat /data/count 2>/dev/null || echo 0";
    let count = || -> u64 { exec(&lab, namespace, "writer", count).trim().parse().unwrap() };
    assert!(wait_slowly(SOON, || count() > 3), "the writer does not write");

    let user = format!("client.{namespace}");
    let key = lab
        .ceph(&[
            "auth",
            "get-or-create-key",
            &user,
            "mon",
            "allow r",
            "osd",
            &format!("profile rbd pool={POOL}"),
        ])
        .unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(key.trim().as_bytes()).unwrap();
    let snapshot = format!("{}@while-written", claim.image().unwrap());
    let rbd = |arguments: &[&str]| {
        let mut command = lab.command("rbd");
        command.args(["--id", namespace, "--keyfile"]).arg(file.path()).args(arguments);
        lab.output_inside(&mut command)
    };
    let before = count();
    let begin = Instant::now();
    rbd(&["snap", "create", "--no-progress", &snapshot]).unwrap();
    println!("snapshot of a written image: duration_ms={}", begin.elapsed().as_millis());
    assert!(wait_slowly(SOON, || count() > before + 3), "the writer stopped at {before}");
    let restarts = [
        "get",
        "pod",
        "writer",
        "-n",
        namespace,
        "-o",
        "jsonpath={.status.containerStatuses[0].restartCount}",
    ];
    assert_eq!(lab.kubectl_ok(&restarts).unwrap(), "0");
    let blocked = lab.ceph(&["osd", "blocklist", "ls"]).unwrap();
    let node = claim.watchers().unwrap().concat();
    assert!(!node.is_empty() && !blocked.contains(&node), "{node} in {blocked}");

    rbd(&["snap", "rm", "--no-progress", &snapshot]).unwrap();
    lab.ceph(&["auth", "del", &user]).unwrap();
    delete_pod(&lab, namespace, "writer");
    claim.delete().unwrap();
}

/// The toolbox's pod may still be starting when the nodes have just come up.
fn wait_toolbox(lab: &Lab) {
    let ready =
        ["get", "deployment", "rook-ceph-tools", "-n", NAMESPACE, "-o", "jsonpath={.status.readyReplicas}"];
    assert!(wait_slowly(POD_LIMIT, || lab.kubectl_ok(&ready).unwrap() == "1"), "no toolbox");
}

#[test]
fn the_toolbox_answers_for_the_administrator() {
    let lab = lab();
    wait_toolbox(&lab);
    let pools = ["exec", "-n", NAMESPACE, "deployment/rook-ceph-tools", "--", "ceph", "osd", "lspools"];
    assert!(lab.kubectl_ok(&pools).unwrap().contains(POOL));
}

/// The toolbox holds the administrator's key, who may blocklist; the runner must use its own identity all the same.
#[tokio::test]
async fn the_toolbox_runs_commands_as_howdahs_own_identity_and_reports_their_failures() {
    const USER: &str = "howdah-backup";
    // The user comes with howdah's installation.
    let lab = crate::lab().unwrap();
    wait_toolbox(&lab);
    let namespace = lab.namespace("toolbox").unwrap();
    let claim = Claim::create(&lab, namespace.name(), "data", CLASS, "1Gi").unwrap();
    let image = claim.image().unwrap();
    let kubernetes = Kubernetes::new(lab.client().await.unwrap(), "howdah-test");
    let runner = |user: &str, key: &str| {
        let access = CephAccess::new(user, key).unwrap();
        Runner::Toolbox(Box::new(ToolboxRunner::new(access, kubernetes.clone(), NAMESPACE)))
    };
    let key = kubernetes.secret_value(NAMESPACE, &format!("rook-ceph-client-{USER}"), USER).await.unwrap();
    let ceph = Ceph::connect(runner(USER, &key)).await.unwrap();
    ceph.create_snapshot(&image, "by-toolbox").await.unwrap();
    let again = ceph.create_snapshot(&image, "by-toolbox").await.unwrap_err();
    assert!(matches!(again, CephError::AlreadyExists { .. }), "{again:?}");
    let value = "it's \"quoted\" $HOME `id`\nsecond line";
    ceph.set_metadata(&image, "howdah.test", value).await.unwrap();
    assert_eq!(ceph.metadata(&image).await.unwrap()["howdah.test"], value);
    ceph.remove_snapshot(&image, "by-toolbox").await.unwrap();
    assert!(ceph.snapshots(&image).await.unwrap().is_empty());
    let missing = ceph.info(&format!("{POOL}/no-such-image")).await.unwrap_err();
    assert!(missing.is_not_found(), "{missing:?}");

    let usual = format!("client.{}", namespace.name());
    let osd = format!("profile rbd pool={POOL}");
    let key = lab.ceph(&["auth", "get-or-create-key", &usual, "mon", "profile rbd", "osd", &osd]).unwrap();
    let refused = Ceph::connect(runner(namespace.name(), &key)).await.unwrap_err();
    assert!(matches!(refused, CephError::UnsafeIdentity { .. }), "{refused:?}");
    lab.ceph(&["auth", "del", &usual]).unwrap();
    claim.delete().unwrap();
}
