//! A volume that somebody else watches goes to no pod. Apart from the other tests of storage, and named so that it begins
//! before them: it mostly waits.

use std::time::Duration;

use howdah_lab::storage::claim::{Claim, wait_slowly};

use crate::storage::{CLASS, SOON, delete_pod, lab, start_pod, wait_running};

/// ceph-csi polls for 56 s before it refuses; kubelet tells of it then.
const REFUSAL_LIMIT: Duration = Duration::from_secs(300);

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
