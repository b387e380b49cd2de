//! What kubelet takes minutes to notice of a volume. Apart from the other tests of storage, and named so that they begin
//! before all others: they mostly wait.

use std::time::Duration;

use howdah_lab::lab::Lab;
use howdah_lab::storage::claim::{Claim, wait_slowly};

use crate::storage::{CLASS, POD_LIMIT, SHARED_CLASS, SOON, delete_pod, exec, lab, start_pod, wait_running};

/// ceph-csi polls for 56 s before it refuses; kubelet tells of it then.
const REFUSAL_LIMIT: Duration = Duration::from_secs(300);

#[test]
fn a_volume_grows_under_its_pod() {
    let lab = lab();
    let namespace = lab.namespace("grows").unwrap();
    let namespace = namespace.name();
    let claim = Claim::create(&lab, namespace, "data", SHARED_CLASS, "1Gi").unwrap();
    start_pod(&lab, namespace, "pod", &claim, "echo kept >/data/file; exec sleep 3600");
    wait_running(&lab, namespace, "pod");
    let size = |lab: &Lab| -> u64 {
        exec(lab, namespace, "pod", "df --output=size --block-size=1M /data | tail -n 1")
            .trim()
            .parse()
            .unwrap()
    };
    assert!((900..1024).contains(&size(&lab)), "{} MiB", size(&lab));
    let more = r#"{"spec":{"resources":{"requests":{"storage":"2Gi"}}}}"#;
    lab.kubectl_ok(&["patch", "pvc", "data", "-n", namespace, "--patch", more]).unwrap();
    let capacity = ["get", "pvc", "data", "-n", namespace, "-o", "jsonpath={.status.capacity.storage}"];
    assert!(wait_slowly(POD_LIMIT, || lab.kubectl_ok(&capacity).unwrap() == "2Gi"), "the claim did not grow");
    assert!((1900..2048).contains(&size(&lab)), "{} MiB", size(&lab));
    assert_eq!(exec(&lab, namespace, "pod", "cat /data/file"), "kept\n");
    delete_pod(&lab, namespace, "pod");
    claim.delete().unwrap();
}

#[test]
fn staging_is_refused_while_somebody_else_watches_the_image() {
    let lab = lab();
    let namespace = lab.namespace("watched").unwrap();
    let namespace = namespace.name();
    let claim = Claim::create(&lab, namespace, "data", CLASS, "1Gi").unwrap();
    // It watches until its input ends, so it gets one that never does: a pipe that it holds both ends of.
    let folder = tempfile::tempdir().unwrap();
    let mut rbd = lab.command("bash");
    rbd.args(["-c", r#"mkfifo "$1" && exec rbd watch "$0" <>"$1""#, &claim.image().unwrap()]);
    rbd.arg(folder.path().join("input"));
    let watcher = lab.spawn_inside(&format!("watcher-{namespace}"), &rbd).unwrap();
    assert!(wait_slowly(SOON, || claim.watchers().unwrap().len() == 1));

    start_pod(&lab, namespace, "pod", &claim, "exec sleep 3600");
    let refusal = format!("rbd image {} is still being used", claim.image().unwrap());
    let events = ["get", "events", "-n", namespace, "-o", "jsonpath={.items[*].message}"];
    let told = || lab.kubectl_ok(&events).unwrap();
    assert!(wait_slowly(REFUSAL_LIMIT, || told().contains(&refusal)), "{}", told());
    let phase = ["get", "pod", "pod", "-n", namespace, "-o", "jsonpath={.status.phase}"];
    assert_eq!(lab.kubectl_ok(&phase).unwrap(), "Pending");
    assert_eq!(claim.watchers().unwrap().len(), 1, "the node mapped an image that is in use");

    watcher.stop().unwrap();
    wait_running(&lab, namespace, "pod");
    delete_pod(&lab, namespace, "pod");
    claim.delete().unwrap();
}
