//! Webhooks fail open until they are seen to serve, and closed from then on, against a real API server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::time::Duration;

use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::webhook::{Webhook, documents, free_port};

/// Longer than the first attempts of a replica take, which come after 1, 2 and 4 s.
const ATTEMPTS: Duration = Duration::from_secs(5);

/// A labelled set with two replicas, which howdah refuses.
fn careless() -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "pg", "labels": {"howdah.dev/protect": "true"}},
        "spec": {
            "serviceName": "pg",
            "replicas": 2,
            "selector": {"matchLabels": {"app": "pg"}},
            "template": {
                "metadata": {"labels": {"app": "pg"}},
                "spec": {"containers": [{"name": "postgres", "image": "docker.io/library/postgres:15"}]},
            },
        },
    })
}

/// The names of the webhooks that fail closed.
async fn closed(webhook: &Webhook) -> Vec<String> {
    let policies = webhook.failure_policies().await;
    policies.into_iter().filter(|(_, policy)| policy == "Fail").map(|(name, _)| name).collect()
}

/// The names of the webhooks that are meant to, in the same order.
fn meant(yaml: &str) -> Vec<String> {
    let mut names = Vec::new();
    for configuration in documents(yaml) {
        let listed = configuration["metadata"]["annotations"]["howdah.dev/fail-closed"].as_str().unwrap();
        names.extend(listed.split(',').map(|name| name.trim().to_owned()));
    }
    names.sort();
    names
}

fn apply(webhook: &Webhook, yaml: &str) {
    // Without --force-conflicts: howdah must not stand in the way of whoever applies its manifests again.
    let output = webhook.lab.kubectl_with_input(&["apply", "--server-side", "-f", "-"], yaml).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn a_webhook_fails_closed_once_it_is_reached_and_again_after_an_apply() {
    let mut webhook = Webhook::absent().await;
    webhook.start_replicas(&[], 2);
    // Ready replicas that the API server cannot reach, as behind a firewall: nobody is locked out.
    let nobody = webhook.configurations(free_port(&webhook.lab));
    let meant = meant(&nobody);
    assert!(meant.len() >= 2, "{meant:?}");
    apply(&webhook, &nobody);
    webhook
        .eventually("the certificates are trusted", || async {
            webhook.bundles().await.iter().all(|bundle| !bundle.is_empty())
        })
        .await;
    tokio::time::sleep(ATTEMPTS).await;
    assert_eq!(closed(&webhook).await, [""; 0]);
    assert!(webhook.create("statefulsets", &careless(), true).await.passed());
    let metrics = webhook.metrics(0);
    assert!(metrics.contains(&format!("howdah_webhooks_failing_open {}", meant.len())), "{metrics}");
    let warned = webhook.output(0).matches("webhooks still fail open").count();
    assert_eq!(warned, 1, "once per outage");

    let reached = webhook.configurations(webhook.replica(0).reviews);
    for _ in 0..2 {
        apply(&webhook, &reached);
        webhook.eventually("it fails closed", || async { closed(&webhook).await == meant }).await;
        assert_eq!(webhook.create("statefulsets", &careless(), true).await.status, 403);
    }
    for replica in [0, 1] {
        webhook
            .eventually("the metric follows", || async {
                webhook.metrics(replica).contains("howdah_webhooks_failing_open 0")
            })
            .await;
    }
    // Client-side apply, which is what most people use, is a merge and cannot conflict.
    webhook.apply_configurations();
    webhook.eventually("it fails closed", || async { closed(&webhook).await == meant }).await;

    // Whoever takes a name out of the annotation and applies that has the last word.
    let open = reached.replace("howdah.dev/fail-closed", "example.com/not-any-more");
    let force = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
    let output = webhook.lab.kubectl_with_input(&force, &open).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let removed = Patch::Merge(json!({"metadata": {"annotations": {"howdah.dev/fail-closed": null}}}));
    for kind in ["mutatingwebhookconfigurations", "validatingwebhookconfigurations"] {
        let params = PatchParams::default();
        let name = webhook.namespace.name();
        assert!(webhook.send(kind, |request| request.patch(name, &params, &removed)).await.passed());
    }
    let output = webhook.lab.kubectl_with_input(&force, &open).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    tokio::time::sleep(ATTEMPTS).await;
    assert_eq!(closed(&webhook).await, [""; 0]);
}

#[tokio::test]
async fn the_probe_reaches_the_webhook_and_stores_nothing() {
    let webhook = Webhook::start(&[]).await;
    let probe = json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "ProtectedSets", "metadata": {"name": "probe"},
                       "spec": {"sets": []}});
    for dry_run in [true, false] {
        let answer = webhook.create("protectedsets", &probe, dry_run).await;
        assert_eq!(answer.status, 403);
        assert!(answer.message().contains("howdah answers"), "{}", answer.message());
    }
    let found = webhook.send("protectedsets", |request| request.get("probe", &Default::default())).await;
    assert_eq!(found.status, 404);
}
