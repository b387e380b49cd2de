//! Certificates, the life of the process, and what comes over the wire, against a real API server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use base64::Engine as _;
use howdah_lab::lab::Lab;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::deploy::{TURN, apply_rights};
use crate::webhook::{Webhook, send, tls_post};

fn database(name: &str, labels: Value) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "serviceName": name,
            "replicas": 0,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "postgres", "image": "docker.io/library/postgres:15"}]},
            },
        },
    })
}

/// A protected StatefulSet that passes.
pub fn protected(name: &str) -> Value {
    database(name, json!({"howdah.dev/protect": "true"}))
}

fn certificates(bundle: &str) -> Vec<String> {
    bundle.split_inclusive("-----END CERTIFICATE-----\n").map(str::to_owned).collect()
}

#[tokio::test]
async fn authority_and_leaf_rotate_without_one_failed_request() {
    // A third of its life before its end each is renewed: leaves every 6 s, the authority after 12 s. The API server hears of
    // a new bundle well within the time it is given, on a busy machine, too.
    let lives =
        ["--ca-lifetime-seconds", "18", "--certificate-lifetime-seconds", "9", "--settle-seconds", "3"];
    let webhook = Webhook::start(&lives).await;
    let address = webhook.replica(0).reviews;
    let mut authorities = BTreeSet::new();
    let mut overlapped = false;
    let mut requests = 0;
    let started = Instant::now();
    // The first authority has ended for good by then, so whatever still depended on it would have failed.
    while started.elapsed() < Duration::from_secs(22) {
        let created = webhook.create("statefulsets", &protected("pg"), true).await;
        assert!(created.passed(), "after {:?}: {}", started.elapsed(), created.message());
        // A handshake of its own each time: the API server keeps its connection, so its requests alone prove little.
        let bundle = webhook.bundles().await.remove(0);
        let answer = tls_post(&webhook.lab, address, &bundle, "/validate", b"{}")
            .unwrap_or_else(|error| panic!("after {:?}: {error}\n{bundle}", started.elapsed()));
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        requests += 1;
        let certificates = certificates(&bundle);
        overlapped |= certificates.len() > 1;
        authorities.extend(certificates);
    }
    assert!(requests > 20, "only {requests} requests were made");
    assert!(authorities.len() >= 2 && overlapped, "{} authorities in {requests} requests", authorities.len());
    let leaves = webhook.output(0).matches("serving a new certificate").count();
    assert!(leaves >= 3, "{leaves} leaves");
    let metrics = webhook.metrics(0);
    for certificate in ["authority", "serving"] {
        let name = format!("howdah_certificate_not_after_seconds{{certificate=\"{certificate}\"}}");
        assert!(metrics.contains(&name), "{metrics}");
    }
}

#[tokio::test]
async fn an_overwritten_bundle_is_repaired() {
    let webhook = Webhook::start(&[]).await;
    let right = webhook.bundles().await;
    assert!(right.iter().all(|bundle| *bundle == right[0] && certificates(bundle).len() == 1), "{right:?}");
    for (wrong, kind) in [
        (Value::Null, "mutatingwebhookconfigurations"),
        (
            json!(base64::engine::general_purpose::STANDARD.encode(other_authority())),
            "validatingwebhookconfigurations",
        ),
    ] {
        let mut configuration = webhook.get(kind, webhook.namespace.name()).await;
        for hook in configuration["webhooks"].as_array_mut().unwrap() {
            hook["clientConfig"]["caBundle"] = wrong.clone();
        }
        let data = serde_json::to_vec(&configuration).unwrap();
        let name = webhook.namespace.name();
        let overwritten =
            webhook.send(kind, |request| request.replace(name, &Default::default(), data)).await;
        assert!(overwritten.passed(), "{}", overwritten.message());
        webhook.eventually("the bundle is repaired", || async { webhook.bundles().await == right }).await;
        webhook
            .eventually("requests pass again", || async {
                webhook.create("statefulsets", &protected("pg"), true).await.passed()
            })
            .await;
    }
    // Whoever applies the configurations again does not take the bundle away for longer than a moment.
    webhook.apply_configurations();
    webhook.eventually("the bundle is still right", || async { webhook.bundles().await == right }).await;
}

/// A certificate of somebody else.
fn other_authority() -> String {
    rcgen::generate_simple_self_signed(["example.com".to_owned()]).unwrap().cert.pem()
}

#[tokio::test]
async fn two_replicas_share_one_authority() {
    let mut webhook = Webhook::absent().await;
    webhook.install(&[], 2);
    let bundles = webhook.bundles().await;
    assert_eq!(certificates(&bundles[0]).len(), 1, "both found or made the same");
    for index in [0, 1] {
        let address = webhook.replica(index).reviews;
        let answer = tls_post(&webhook.lab, address, &bundles[0], "/validate", b"").unwrap();
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    // Emptied by somebody, it comes back as it was: what is served stays trusted.
    let emptied = Patch::Merge(json!({"data": null}));
    let params = PatchParams::default();
    let answer =
        webhook.send("secrets", |request| request.patch("howdah-webhook-ca", &params, &emptied)).await;
    assert!(answer.passed(), "{}", answer.message());
    webhook
        .eventually("the authority is back", || async {
            let secret = webhook.get("secrets", "howdah-webhook-ca").await;
            let bundle = base64::engine::general_purpose::STANDARD
                .decode(secret["data"]["ca.crt"].as_str().unwrap_or_default())
                .unwrap();
            bundle == bundles[0].as_bytes()
        })
        .await;
    assert_eq!(webhook.bundles().await, bundles);
}

#[tokio::test]
async fn while_the_webhook_is_down_only_labelled_sets_wait() {
    let mut webhook = Webhook::start(&[]).await;
    let bundles = webhook.bundles().await;
    assert!(webhook.create("statefulsets", &database("other", json!({})), false).await.passed());
    assert!(webhook.create("statefulsets", &protected("pg"), false).await.passed());
    webhook.kill();
    let refused = webhook.create("statefulsets", &protected("new"), true).await;
    assert_eq!(refused.status, 500, "{}", refused.body);
    assert!(refused.message().contains("howdah.dev"), "{}", refused.message());
    assert!(webhook.create("statefulsets", &database("another", json!({})), true).await.passed());
    // What the cluster itself stands on is left out, label or not.
    let data = serde_json::to_vec(&protected("new")).unwrap();
    let params = PostParams { dry_run: true, ..PostParams::default() };
    let system = "/apis/apps/v1/namespaces/kube-system/statefulsets";
    let created = send(&webhook.client, system, |request| request.create(&params, data)).await;
    assert!(created.passed(), "{}", created.message());
    let three = Patch::Merge(json!({"spec": {"replicas": 3}}));
    let params = PatchParams::default();
    let scaled = webhook
        .send("statefulsets", |request| request.patch_subresource("scale", "other", &params, &three))
        .await;
    assert!(scaled.passed(), "{}", scaled.message());
    // Stopping and deleting a database needs no webhook.
    let zero = Patch::Merge(json!({"spec": {"replicas": 0}}));
    assert!(
        webhook
            .send("statefulsets", |request| request.patch_subresource("scale", "pg", &params, &zero))
            .await
            .passed()
    );
    webhook.delete("statefulsets", "pg").await;

    webhook.restart();
    assert_eq!(webhook.bundles().await, bundles, "the authority outlives the process");
    webhook
        .eventually("requests pass again", || async {
            webhook.create("statefulsets", &protected("new"), true).await.passed()
        })
        .await;
}

/// A kubeconfig of the webhook's own service account, which has to be there.
pub fn own_account(lab: &Lab) -> tempfile::NamedTempFile {
    let token = ["create", "token", "howdah-webhook", "--namespace", "howdah-system"];
    let token = lab.kubectl_ok(&token).unwrap();
    let mut kubeconfig: Value =
        serde_yaml_ng::from_str(&std::fs::read_to_string(lab.inside_kubeconfig()).unwrap()).unwrap();
    kubeconfig["users"][0]["user"] = json!({"token": token.trim()});
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), kubeconfig.to_string()).unwrap();
    file
}

#[tokio::test]
async fn the_rights_of_its_own_account_are_enough() {
    let mut webhook = Webhook::absent().await;
    let _turn = TURN.lock().await;
    apply_rights(&webhook.lab, "rook").unwrap();
    let file = own_account(&webhook.lab);
    webhook.run_as_installed(file.path().to_owned());
    webhook.install(&[], 1);

    // Everything it looks up: claim and volume by name, the volume reserved for a claim, the parent of a scale.
    let mut object = protected("pg");
    object["spec"]["template"]["spec"]["volumes"] =
        json!([{"name": "extra", "persistentVolumeClaim": {"claimName": "missing"}}]);
    let claim = |name: &str, volume: &str| {
        json!({"metadata": {"name": name}, "spec": {
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": "", "volumeName": volume,
        }})
    };
    object["spec"]["volumeClaimTemplates"] = json!([claim("reserved", ""), claim("named", "no-such-volume")]);
    let denied = webhook.create("statefulsets", &object, true).await;
    assert_eq!(denied.status, 403, "{}", denied.message());
    assert_eq!(denied.body["details"]["causes"].as_array().map(Vec::len), Some(3), "{}", denied.message());
    assert!(webhook.create("statefulsets", &protected("pg"), false).await.passed());
    let two = Patch::Merge(json!({"spec": {"replicas": 2}}));
    let params = PatchParams::default();
    let scaled =
        webhook.send("statefulsets", |request| request.patch_subresource("scale", "pg", &params, &two)).await;
    assert_eq!(scaled.status, 403, "{}", scaled.message());
    let output = webhook.output(0);
    assert!(!output.contains("orbidden"), "{output}");
    webhook
        .lab
        .kubectl_ok(&["delete", "secret", "howdah-webhook-ca", "--namespace", "howdah-system"])
        .unwrap();
}

#[tokio::test]
async fn a_signal_fails_no_request() {
    let mut webhook = Webhook::start(&[]).await;
    let started = Instant::now();
    webhook.terminate();
    // One second is the propagation time of the tests; until then everything is answered.
    while started.elapsed() < Duration::from_millis(700) {
        let created = webhook.create("statefulsets", &protected("pg"), true).await;
        assert!(created.passed() || started.elapsed() > Duration::from_secs(1), "{}", created.message());
    }
    webhook.wait_gone();
    let output = webhook.output(0);
    assert!(output.contains("shutting down") && !output.contains("ERROR"), "{output}");
}

#[tokio::test]
async fn whatever_is_posted_gets_a_clear_answer() {
    let webhook = Webhook::start(&[]).await;
    let bundle = webhook.bundles().await.remove(0);
    let address = webhook.replica(0).reviews;
    let review = |request: Value| {
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request})
            .to_string()
    };
    let sets = json!({"group": "apps", "version": "v1", "resource": "statefulsets"});
    let deep = format!("{}{}", "[".repeat(50_000), "]".repeat(50_000));
    let large = " ".repeat(8 * 1024 * 1024);
    for (body, status, part) in [
        (String::new(), 400, "the body is no JSON"),
        ("{".to_owned(), 400, "the body is no JSON"),
        ("\u{0}".to_owned(), 400, "the body is no JSON"),
        (deep, 400, "recursion"),
        ("{}".to_owned(), 400, "apiVersion is absent"),
        (review(Value::Null), 400, "request is absent"),
        (
            review(json!({"resource": sets, "operation": "CREATE", "object": {}})),
            400,
            "request.uid is absent",
        ),
        (review(json!({"uid": "1", "operation": "CREATE"})), 200, "missing field `resource`"),
        (
            review(json!({"uid": "1", "resource": sets, "operation": "CREATE"})),
            200,
            "request.object is absent",
        ),
        (
            review(json!({"uid": "1", "resource": sets, "operation": "X", "object": {}})),
            200,
            "request.operation",
        ),
        (large, 413, "7340032 bytes"),
    ] {
        let shown: String = body.chars().take(200).collect();
        let answer = tls_post(&webhook.lab, address, &bundle, "/mutate", body.as_bytes()).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{shown}: {answer}");
        assert!(answer.contains(part), "{shown}: {answer}");
        if status == 200 {
            assert!(answer.contains(r#""uid":"1""#) && answer.contains(r#""allowed":false"#), "{answer}");
        }
    }
    assert!(!webhook.output(0).contains("panicked"));
    assert!(webhook.create("statefulsets", &protected("pg"), true).await.passed());
}
