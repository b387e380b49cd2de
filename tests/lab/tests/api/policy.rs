//! The policy through a real API server: every way to write a StatefulSet, and every fixture.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::path::{Path, PathBuf};

use howdah_lab::repository;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::webhook::{Answer, Webhook, documents};

/// A sensible protected StatefulSet.
pub fn database(name: &str) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "labels": {"howdah.dev/protect": "true"}},
        "spec": {
            "serviceName": name,
            "replicas": 1,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "postgres", "image": "docker.io/library/postgres:15"}]},
            },
        },
    })
}

fn without_label(mut object: Value) -> Value {
    object["metadata"]["labels"] = json!({});
    object
}

fn grace(object: &Value) -> i64 {
    object["spec"]["template"]["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap()
}

async fn scale(webhook: &Webhook, name: &str, replicas: i64) -> Answer {
    let body = Patch::Merge(json!({"spec": {"replicas": replicas}}));
    let params = PatchParams::default();
    webhook.send("statefulsets", |request| request.patch_subresource("scale", name, &params, &body)).await
}

#[tokio::test]
async fn a_labelled_set_gets_defaults_and_keeps_them() {
    let webhook = Webhook::start(&[]).await;
    let created = webhook.create("statefulsets", &database("pg"), false).await;
    assert!(created.passed(), "{}", created.message());
    let spec = &created.body["spec"];
    assert_eq!(grace(&created.body), 300);
    assert_eq!(spec["template"]["metadata"]["labels"]["howdah.dev/protect"], "true");
    assert_eq!(
        spec["persistentVolumeClaimRetentionPolicy"],
        json!({"whenDeleted": "Retain", "whenScaled": "Retain"})
    );
    let preferred = &spec["template"]["spec"]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"];
    assert_eq!(preferred[0]["weight"], 100);

    // A change of something else leaves the rest, and restarts nothing by itself.
    let change = Patch::Merge(json!({"metadata": {"annotations": {"howdah.dev/schedule": "@daily"}}}));
    let params = PatchParams::default();
    let changed = webhook.send("statefulsets", |request| request.patch("pg", &params, &change)).await;
    assert!(changed.passed(), "{}", changed.message());
    assert_eq!(changed.body["spec"], created.body["spec"]);
    assert_eq!(changed.body["metadata"]["generation"], 1);
}

#[tokio::test]
async fn an_unlabelled_set_is_stored_as_if_howdah_were_not_there() {
    let mut webhook = Webhook::absent().await;
    let careless = {
        let mut object = without_label(database("other"));
        object["spec"]["replicas"] = json!(0);
        object["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = json!(0);
        object["metadata"]["annotations"] = json!({"howdah.dev/schedule": "every day"});
        object
    };
    let control = webhook.create("statefulsets", &careless, false).await;
    assert!(control.passed());
    webhook.delete("statefulsets", "other").await;
    webhook.install(&[], 1);
    // Proof that the webhook is asked at all.
    let mut labelled = careless.clone();
    labelled["metadata"]["labels"] = json!({"howdah.dev/protect": "true"});
    assert!(!webhook.create("statefulsets", &labelled, false).await.passed());

    let stored = webhook.create("statefulsets", &careless, false).await;
    assert!(stored.passed() && stored.warnings.is_empty());
    let comparable = |answer: &Answer| {
        let mut object = answer.body.clone();
        for own in ["uid", "resourceVersion", "creationTimestamp"] {
            object["metadata"].as_object_mut().unwrap().remove(own);
        }
        for entry in object["metadata"]["managedFields"].as_array_mut().unwrap() {
            entry.as_object_mut().unwrap().remove("time");
        }
        serde_json::to_string(&object).unwrap()
    };
    assert_eq!(comparable(&stored), comparable(&control));
    let scaled = scale(&webhook, "other", 3).await;
    assert!(scaled.passed() && scaled.warnings.is_empty(), "{}", scaled.message());
}

#[tokio::test]
async fn a_denial_reaches_the_user_in_full() {
    let webhook = Webhook::start(&[]).await;
    let mut careless = database("pg");
    careless["spec"]["replicas"] = json!(3);
    careless["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = json!(0);
    let denied = webhook.create("statefulsets", &careless, false).await;
    assert_eq!(denied.status, 403);
    assert_eq!(denied.body["details"]["causes"].as_array().unwrap().len(), 2, "{}", denied.body);
    let metrics = webhook.metrics(0);
    let line = r#"rule="single-replica",verdict="deny",mode="enforce",operation="create"} 1"#;
    assert!(metrics.contains(line), "{metrics}");

    // By hand, with kubectl, which prints it.
    let yaml = serde_yaml_ng::to_string(&careless).unwrap();
    let output =
        webhook.lab.kubectl_with_input(&["apply", "-n", webhook.namespace.name(), "-f", "-"], &yaml).unwrap();
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    for part in [
        "[single-replica] spec.replicas is 3, wanted 1 or 0",
        "[grace-period] spec.template.spec.terminationGracePeriodSeconds is 0, wanted at least 30",
        "howdah.dev/exempt.grace-period=\"until=YYYY-MM-DD reason=...\"",
    ] {
        assert!(printed.contains(part), "{printed}");
    }
    careless["metadata"]["annotations"] =
        json!({"howdah.dev/schedule": "every day", "howdah.dev/mode": "audit"});
    assert_eq!(webhook.create("statefulsets", &careless, false).await.status, 422);
}

#[tokio::test]
async fn a_dry_run_is_judged_the_same_stores_nothing_and_counts_nothing() {
    let webhook = Webhook::start(&[]).await;
    let mut careless = database("pg");
    careless["spec"]["replicas"] = json!(2);
    let before = webhook.metrics(0);
    assert_eq!(webhook.create("statefulsets", &careless, true).await.status, 403);
    let mutated = webhook.create("statefulsets", &database("pg"), true).await;
    assert_eq!(grace(&mutated.body), 300);
    let counts = |text: &str| {
        text.lines().filter(|line| line.contains("_total")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(counts(&webhook.metrics(0)), counts(&before));
    let found = webhook.send("statefulsets", |request| request.get("pg", &Default::default())).await;
    assert_eq!(found.status, 404);
}

#[tokio::test]
async fn a_labelled_set_cannot_be_scaled_past_one_in_any_way() {
    let webhook = Webhook::start(&[]).await;
    assert!(webhook.create("statefulsets", &database("pg"), false).await.passed());
    let refused = |answer: &Answer| {
        assert_eq!(answer.status, 403, "{}", answer.body);
        assert!(
            answer.message().contains("[single-replica] spec.replicas is 2, wanted 1 or 0"),
            "{}",
            answer.message()
        );
    };
    // What `kubectl scale` and autoscalers send; right after the creation, when a cache may not know it yet.
    refused(&scale(&webhook, "pg", 2).await);
    let params = PostParams::default();
    let body = json!({"apiVersion": "autoscaling/v1", "kind": "Scale",
                      "metadata": {"name": "pg", "namespace": webhook.namespace.name()}, "spec": {"replicas": 2}});
    let data = serde_json::to_vec(&body).unwrap();
    refused(
        &webhook
            .send("statefulsets", |request| request.replace_subresource("scale", "pg", &params, data))
            .await,
    );
    let change = Patch::Merge(json!({"spec": {"replicas": 2}}));
    let patched =
        webhook.send("statefulsets", |request| request.patch("pg", &PatchParams::default(), &change)).await;
    refused(&patched);
    let applied =
        Patch::Apply(json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "pg"},
                                      "spec": {"replicas": 2}}));
    let force = PatchParams::apply("test").force();
    refused(&webhook.send("statefulsets", |request| request.patch("pg", &force, &applied)).await);
    let printed = webhook
        .lab
        .kubectl(&["scale", "statefulset", "pg", "--replicas=2", "-n", webhook.namespace.name()])
        .unwrap();
    assert!(String::from_utf8_lossy(&printed.stderr).contains("[single-replica]"));

    // A planned stop and the start after it pass.
    assert!(scale(&webhook, "pg", 0).await.passed());
    assert!(scale(&webhook, "pg", 1).await.passed());
    assert_eq!(webhook.get("statefulsets", "pg").await["spec"]["replicas"], 1);
}

#[tokio::test]
async fn applying_the_same_again_changes_nothing() {
    let webhook = Webhook::start(&["--storage-class", "rook-ceph-block"]).await;
    ensure_classes(&webhook).await;
    let with_claim = |name: &str| {
        let mut object = database(name);
        object["spec"]["volumeClaimTemplates"] = json!([{
            "metadata": {"name": "data"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        }]);
        object
    };
    let namespace = webhook.namespace.name();
    // A set of its own for each: claim templates are one field for server-side apply, so another manager conflicts.
    for (name, flags) in [("client-side", &["apply"][..]), ("server-side", &["apply", "--server-side"])] {
        let yaml = serde_yaml_ng::to_string(&with_claim(name)).unwrap();
        let kubectl = |flags: &[&str]| {
            let output = webhook
                .lab
                .kubectl_with_input(&[flags, &["-n", namespace, "-f", "-"]].concat(), &yaml)
                .unwrap();
            let printed = [output.stdout, output.stderr].concat();
            assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&printed));
        };
        kubectl(flags);
        let stored = webhook.get("statefulsets", name).await;
        assert_eq!(grace(&stored), 300);
        let template = &stored["spec"]["volumeClaimTemplates"][0];
        assert_eq!(template["spec"]["storageClassName"], "rook-ceph-block");
        assert_eq!(template["metadata"]["labels"]["howdah.dev/protect"], "true");
        kubectl(flags);
        kubectl(&[&["diff"], &flags[1..]].concat());
        let after = webhook.get("statefulsets", name).await;
        assert_eq!((&after["spec"], &after["metadata"]["generation"]), (&stored["spec"], &json!(1)));
    }
    // kubectl replace sends everything anew, without our defaults; the immutable ones are put back.
    let mut object = with_claim("client-side");
    let exempt = json!({"howdah.dev/exempt.anti-affinity": "until=2099-01-31 reason=replaced by a tool"});
    object["metadata"]["annotations"] = exempt;
    let yaml = serde_yaml_ng::to_string(&object).unwrap();
    let replaced = webhook.lab.kubectl_with_input(&["replace", "-n", namespace, "-f", "-"], &yaml).unwrap();
    assert!(replaced.status.success(), "{}", String::from_utf8_lossy(&replaced.stderr));
    let stored = webhook.get("statefulsets", "client-side").await;
    assert_eq!(stored["spec"]["volumeClaimTemplates"][0]["spec"]["storageClassName"], "rook-ceph-block");
    assert_eq!(grace(&stored), 30, "the pod template is the user's on a change");
}

pub fn fixtures() -> PathBuf {
    repository::root().join("core/fixtures")
}

pub fn folders_and_files(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

pub fn folders(folder: &Path) -> Vec<PathBuf> {
    folders_and_files(folder).into_iter().filter(|path| path.is_dir()).collect()
}

/// Makes the classes that every fixture counts on. They stay: other tests of this lab use them, too.
pub async fn ensure_classes(webhook: &Webhook) {
    for class in documents(&std::fs::read_to_string(fixtures().join("classes.yaml")).unwrap()) {
        let created = webhook.create("storageclasses", &class, false).await;
        assert!([201, 409].contains(&created.status), "{}", created.message());
    }
}
