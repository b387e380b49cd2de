//! What happens to a protected database in real life passes, and what would hurt it does not: on a real API server, with
//! its real controllers, kubectl and no nodes. A test plays the kubelet.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::time::Duration;

use howdah_lab::lab::Lab;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::policy::database;
use crate::scene::{path_of, place};
use crate::webhook::{Answer, Webhook, Who};

/// A node that only exists in the API.
struct PaperNode {
    lab: Lab,
    name: String,
}

impl PaperNode {
    fn new(lab: &Lab, name: String) -> Self {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        assert!(lab.kubectl_apply(&node.to_string()).unwrap().status.success());
        Self { lab: lab.clone(), name }
    }
}

impl Drop for PaperNode {
    fn drop(&mut self) {
        if let Err(error) = self.lab.kubectl_ok(&["delete", "node", &self.name, "--wait=false"]) {
            eprintln!("{error:#}");
        }
    }
}

fn administrator() -> Who {
    Who::new(["administrator".to_owned()])
}

fn of_kind(webhook: &Webhook, kind: &str) -> String {
    path_of(webhook, &json!({"apiVersion": "v1", "kind": kind}))
}

async fn find(webhook: &Webhook, kind: &str, name: &str) -> Answer {
    let path = of_kind(webhook, kind);
    webhook.send_as(&administrator(), &path, |request| request.get(name, &Default::default())).await
}

async fn create(webhook: &Webhook, object: &Value) -> Value {
    let data = serde_json::to_vec(object).unwrap();
    let path = path_of(webhook, object);
    let created = webhook
        .send_as(&administrator(), &path, |request| request.create(&PostParams::default(), data))
        .await;
    assert!(created.passed(), "{}", created.message());
    created.body
}

/// The database `name`, its pod on `node`, running.
async fn running(webhook: &Webhook, name: &str, node: &str) -> Value {
    create(webhook, &database(name)).await;
    let (pods, pod) = (of_kind(webhook, "Pod"), format!("{name}-0"));
    place(webhook, &administrator(), &pods, &pod, Some(node)).await;
    let status = Patch::Merge(json!({"status": {"phase": "Running"}}));
    let params = PatchParams::default();
    let set = webhook
        .send_as(&administrator(), &pods, |request| {
            request.patch_subresource("status", &pod, &params, &status)
        })
        .await;
    assert!(set.passed(), "{}", set.message());
    set.body
}

async fn delete_pod(webhook: &Webhook, who: &Who, name: &str, grace_s: Option<u32>) -> Answer {
    let options = DeleteParams { grace_period_seconds: grace_s, ..DeleteParams::default() };
    let pods = of_kind(webhook, "Pod");
    webhook.send_as(who, &pods, |request| request.delete(name, &options)).await
}

#[tokio::test]
async fn a_pod_is_forgotten_only_by_who_knows_that_it_has_ended() {
    let webhook = Webhook::start(&[]).await;
    let pod = running(&webhook, "pg", "node-a").await;
    assert_eq!(pod["metadata"]["labels"]["howdah.dev/protect"], "true");
    let forced = delete_pod(&webhook, &administrator(), "pg-0", Some(0)).await;
    assert_eq!(forced.status, 403, "{}", forced.body);
    for part in ["[force-delete]", "node node-a", "out-of-service", "exempt: annotate"] {
        assert!(forced.message().contains(part), "{}", forced.message());
    }
    assert!(find(&webhook, "Pod", "pg-0").await.body["metadata"]["deletionTimestamp"].is_null());
    let kubectl = [
        "delete",
        "pod",
        "pg-0",
        "--force",
        "--grace-period=0",
        "-n",
        webhook.namespace.name(),
        "--wait=false",
    ];
    let printed = webhook.lab.kubectl(&kubectl).unwrap();
    assert!(String::from_utf8_lossy(&printed.stderr).contains("[force-delete]"));

    // An ordinary deletion begins, and cannot be cut short: its node may be cut off, and not dead.
    assert!(delete_pod(&webhook, &administrator(), "pg-0", None).await.passed());
    assert!(find(&webhook, "Pod", "pg-0").await.body["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(delete_pod(&webhook, &administrator(), "pg-0", Some(0)).await.status, 403);
    let other = Who::new(["system:node:node-b", "system:nodes"].map(str::to_owned));
    assert_eq!(delete_pod(&webhook, &other, "pg-0", Some(0)).await.status, 403);
    // The kubelet has the last word; the controller then makes the pod anew.
    let kubelet = Who::new(["system:node:node-a", "system:nodes"].map(str::to_owned));
    let gone = delete_pod(&webhook, &kubelet, "pg-0", Some(0)).await;
    assert!(gone.passed(), "{}", gone.message());
    webhook
        .eventually("another pod takes its place", || async {
            let found = find(&webhook, "Pod", "pg-0").await;
            found.passed() && found.body["metadata"]["uid"] != pod["metadata"]["uid"]
        })
        .await;
}

#[tokio::test]
async fn the_out_of_service_way_passes() {
    // What the control plane does for a node with the out-of-service taint: fail the pod, then forget it.
    let webhook = Webhook::start(&[]).await;
    let pod = running(&webhook, "pg", "node-a").await;
    let failed = Patch::Merge(json!({"status": {"phase": "Failed"}}));
    let collector = Who::new(["system:serviceaccount:kube-system:pod-garbage-collector".to_owned()]);
    let (pods, params) = (of_kind(&webhook, "Pod"), PatchParams::default());
    let set = webhook
        .send_as(&collector, &pods, |request| request.patch_subresource("status", "pg-0", &params, &failed))
        .await;
    assert!(set.passed(), "{}", set.message());
    // The controller of the set may have been faster: it, too, removes a failed pod without grace.
    let gone = delete_pod(&webhook, &collector, "pg-0", Some(0)).await;
    assert!([200, 404].contains(&gone.status), "{}", gone.message());
    webhook
        .eventually("another pod takes its place", || async {
            let found = find(&webhook, "Pod", "pg-0").await;
            found.passed() && found.body["metadata"]["uid"] != pod["metadata"]["uid"]
        })
        .await;
}

#[tokio::test]
async fn a_graceful_node_shutdown_passes() {
    // What a kubelet does that is told that its node goes down: it ends the pods, each in its grace period, and says so.
    // It deletes nothing; the controller of the set does, and makes the pod anew.
    let webhook = Webhook::start(&[]).await;
    let pod = running(&webhook, "pg", "node-a").await;
    let kubelet = Who::new(["system:node:node-a", "system:nodes"].map(str::to_owned));
    let ended = Patch::Merge(json!({"status": {
        "phase": "Failed", "reason": "Terminated",
        "message": "Pod was terminated in response to imminent node shutdown."}}));
    let (pods, params) = (of_kind(&webhook, "Pod"), PatchParams::default());
    let set = webhook
        .send_as(&kubelet, &pods, |request| request.patch_subresource("status", "pg-0", &params, &ended))
        .await;
    assert!(set.passed(), "{}", set.message());
    webhook
        .eventually("another pod takes its place", || async {
            let found = find(&webhook, "Pod", "pg-0").await;
            found.passed() && found.body["metadata"]["uid"] != pod["metadata"]["uid"]
        })
        .await;
}

#[tokio::test]
async fn a_drain_waits_for_the_backup_and_then_goes_on() {
    let mut webhook = Webhook::absent().await;
    webhook.install(&[], 1);
    let node = PaperNode::new(&webhook.lab, format!("{}-node", webhook.namespace.name()));
    running(&webhook, "pg", &node.name).await;
    let set_phase = async |phase: &str| {
        let status = Patch::Merge(
            json!({"status": {"phase": phase, "attempt": 1, "deadline": "2099-01-01T00:00:00Z"}}),
        );
        let path = of_kind(&webhook, "PostgresBackup");
        let params = PatchParams::default();
        let set = webhook
            .send_as(&administrator(), &path, |request| {
                request.patch_subresource("status", "pg-1", &params, &status)
            })
            .await;
        assert!(set.passed(), "{}", set.message());
    };
    let backup = json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
                        "metadata": {"name": "pg-1"}, "spec": {"statefulSet": "pg"}});
    create(&webhook, &backup).await;
    set_phase("Snapshotting").await;
    let evict = async || {
        let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "pg-0"}});
        let data = serde_json::to_vec(&eviction).unwrap();
        let (pods, dry) = (of_kind(&webhook, "Pod"), PostParams { dry_run: true, ..PostParams::default() });
        webhook
            .send_as(&administrator(), &pods, |request| {
                request.create_subresource("eviction", "pg-0", &dry, data)
            })
            .await
    };
    webhook.eventually("the backup holds the pod", || async { evict().await.status == 429 }).await;
    assert_eq!(evict().await.body["details"]["retryAfterSeconds"], 5);

    let (lab, drained) = (webhook.lab.clone(), node.name.clone());
    let drain = tokio::task::spawn_blocking(move || {
        let selector = "--pod-selector=howdah.dev/protect=true";
        lab.kubectl(&["drain", &drained, "--force", "--ignore-daemonsets", selector, "--timeout=120s"])
            .unwrap()
    });
    // Long enough for it to have been told to wait.
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert!(!drain.is_finished(), "the drain did not wait for the backup");
    assert!(find(&webhook, "Pod", "pg-0").await.body["metadata"]["deletionTimestamp"].is_null());
    set_phase("Taken").await;
    webhook
        .eventually("the pod is evicted", || async {
            find(&webhook, "Pod", "pg-0").await.body["metadata"]["deletionTimestamp"].is_string()
        })
        .await;
    let kubelet = Who::new([format!("system:node:{}", node.name), "system:nodes".to_owned()]);
    assert!(delete_pod(&webhook, &kubelet, "pg-0", Some(0)).await.passed());
    let printed = drain.await.unwrap();
    assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
}

#[tokio::test]
async fn a_namespace_goes_with_everything_in_it() {
    let webhook = Webhook::start(&[]).await;
    let mut set = database("pg");
    set["spec"]["volumeClaimTemplates"] = json!([{
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": "rook-ceph-block", "volumeName": "pv-of-nobody"},
    }]);
    set["metadata"]["annotations"] =
        json!({"howdah.dev/exempt.storage-class": "until=2099-01-31 reason=nothing stands behind it"});
    create(&webhook, &set).await;
    webhook
        .eventually("the claim is made", || async {
            find(&webhook, "PersistentVolumeClaim", "data-pg-0").await.passed()
        })
        .await;
    let pods = of_kind(&webhook, "Pod");
    place(&webhook, &administrator(), &pods, "pg-0", None).await;
    let claims = of_kind(&webhook, "PersistentVolumeClaim");
    let options = DeleteParams::default();
    let denied =
        webhook.send_as(&administrator(), &claims, |request| request.delete("data-pg-0", &options)).await;
    assert_eq!(denied.status, 403, "{}", denied.body);
    // Even with a gate that nobody will ever open.
    let scheduler = Who::new([format!("system:serviceaccount:{}:howdah-scheduler", webhook.system())]);
    let gate = Patch::Merge(json!({"metadata": {"annotations": {"howdah.dev/gate": "restore/drill"}}}));
    let (sets, params) = (of_kind(&webhook, "StatefulSet"), PatchParams::default());
    let closed = webhook.send_as(&scheduler, &sets, |request| request.patch("pg", &params, &gate)).await;
    assert!(closed.passed(), "{}", closed.message());
    let denied = webhook.send_as(&administrator(), &sets, |request| request.delete("pg", &options)).await;
    assert!(denied.message().contains("[interlock]"), "{}", denied.body);

    webhook.lab.kubectl_ok(&["delete", "namespace", webhook.namespace.name(), "--wait=false"]).unwrap();
    webhook
        .eventually("the namespace is gone", || async {
            let path = "/api/v1/namespaces";
            let name = webhook.namespace.name();
            let found = webhook
                .send_as(&administrator(), path, |request| request.get(name, &Default::default()))
                .await;
            found.status == 404
        })
        .await;
}

#[tokio::test]
async fn a_set_is_made_anew_around_its_pod() {
    // The way to change claim templates: the set goes alone, and comes back with its pod running all the time.
    let webhook = Webhook::start(&[]).await;
    let pod = running(&webhook, "pg", "node-a").await;
    let namespace = webhook.namespace.name();
    webhook.lab.kubectl_ok(&["-n", namespace, "delete", "statefulset", "pg", "--cascade=orphan"]).unwrap();
    webhook
        .eventually("the pod is an orphan", || async {
            find(&webhook, "Pod", "pg-0").await.body["metadata"]["ownerReferences"].is_null()
        })
        .await;
    let forced = delete_pod(&webhook, &administrator(), "pg-0", Some(0)).await;
    assert_eq!(forced.status, 403, "the old pod may still write when the set comes back: {}", forced.body);
    create(&webhook, &database("pg")).await;
    webhook
        .eventually("the pod has its set again", || async {
            find(&webhook, "Pod", "pg-0").await.body["metadata"]["ownerReferences"][0]["name"] == "pg"
        })
        .await;
    assert_eq!(find(&webhook, "Pod", "pg-0").await.body["metadata"]["uid"], pod["metadata"]["uid"]);
}

#[tokio::test]
async fn several_managers_apply_their_parts_without_a_quarrel() {
    let webhook = Webhook::start(&[]).await;
    let sets = of_kind(&webhook, "StatefulSet");
    let apply = async |manager: &str, object: &Value| {
        let params = PatchParams::apply(manager);
        webhook
            .send_as(&administrator(), &sets, |request| request.patch("pg", &params, &Patch::Apply(object)))
            .await
    };
    let part = |annotations: Value, spec: Value| {
        json!({"apiVersion": "apps/v1", "kind": "StatefulSet",
               "metadata": {"name": "pg", "annotations": annotations}, "spec": spec})
    };
    let base = database("pg");
    let notes = part(json!({"howdah.dev/schedule": "@daily"}), json!({}));
    let size = json!([{"name": "postgres", "resources": {"requests": {"memory": "1Gi"}}}]);
    let size = part(json!({}), json!({"template": {"spec": {"containers": size}}}));
    for (manager, object) in [("git", &base), ("backup-team", &notes), ("sizing", &size)] {
        let applied = apply(manager, object).await;
        assert!(applied.passed(), "{manager}: {}", applied.message());
    }
    let before = find(&webhook, "StatefulSet", "pg").await.body;
    for (manager, object) in [("sizing", &size), ("git", &base), ("backup-team", &notes), ("git", &base)] {
        let applied = apply(manager, object).await;
        assert!(applied.passed(), "{manager}: {}", applied.message());
        assert_eq!(applied.body["spec"], before["spec"], "{manager}");
        assert_eq!(applied.body["metadata"]["generation"], before["metadata"]["generation"], "{manager}");
    }
    assert_eq!(before["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], 300);
    // Whoever takes a part of it beyond the policy is told; the others are not held up by it.
    let greedy = part(json!({}), json!({"replicas": 3}));
    let params = PatchParams::apply("greedy").force();
    let denied = webhook
        .send_as(&administrator(), &sets, |request| request.patch("pg", &params, &Patch::Apply(&greedy)))
        .await;
    assert_eq!(denied.status, 403, "{}", denied.body);
    assert!(apply("git", &base).await.passed());
}

#[tokio::test]
async fn an_upgrade_and_its_rollback_change_what_they_say() {
    // Helm computes a patch from the chart before, the chart after and what is there, as kubectl apply does.
    let webhook = Webhook::start(&[]).await;
    let release = |version: u32| {
        let mut object = database("pg");
        object["metadata"]["labels"]["helm.sh/chart"] = json!(format!("pg-{version}"));
        object["spec"]["template"]["metadata"]["labels"]["helm.sh/chart"] = json!(format!("pg-{version}"));
        object["spec"]["template"]["spec"]["containers"][0]["image"] =
            json!(format!("docker.io/library/postgres:15.{version}"));
        object.to_string()
    };
    let namespace = webhook.namespace.name();
    let apply = |version: u32| {
        let output = webhook
            .lab
            .kubectl_with_input(&["apply", "-n", namespace, "-f", "-"], &release(version))
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let template = async || find(&webhook, "StatefulSet", "pg").await.body["spec"]["template"].clone();
    apply(1);
    let first = template().await;
    apply(2);
    let second = template().await;
    apply(1);
    assert_eq!(template().await, first, "the rollback leads back to the very same template");
    let found = find(&webhook, "StatefulSet", "pg").await.body;
    assert_eq!(found["metadata"]["generation"], 3);
    let mut changed = second;
    changed["metadata"]["labels"]["helm.sh/chart"] = json!("pg-1");
    changed["spec"]["containers"][0]["image"] = json!("docker.io/library/postgres:15.1");
    assert_eq!(changed, first, "the upgrade changed image and label, and nothing of howdah's");
}
