//! The background audit and the Events of denials, through a real API server and with the rights of the webhook's own
//! account.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::collections::BTreeSet;

use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::certs::own_account;
use crate::deploy::{TURN, apply_rights};
use crate::records::install_definitions;
use crate::webhook::{Webhook, send};

/// A round a second: a test cannot wait ten minutes.
const OFTEN: [&str; 2] = ["--audit-interval-seconds", "1"];

/// A labelled set that violates three rules; without a webhook nobody minds.
fn careless(name: &str) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "labels": {"howdah.dev/protect": "true"}},
        "spec": {
            "serviceName": name,
            "replicas": 2,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {
                    "terminationGracePeriodSeconds": 5,
                    "containers": [{"name": "postgres", "image": "docker.io/library/postgres:15"}],
                },
            },
        },
    })
}

/// An autoscaler and a disruption budget of a set, neither as they should be.
fn around(set: &str, namespace: &str) -> Value {
    let metadata = json!({"name": set, "namespace": namespace});
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": {
            "maxReplicas": 3, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": set},
        }},
        {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata, "spec": {
            "minAvailable": 1, "selector": {"matchLabels": {"app": set}},
        }},
    ]})
}

async fn report(webhook: &Webhook) -> Option<Value> {
    let path = format!("/apis/howdah.dev/v1alpha1/namespaces/{}/howdahreports", webhook.namespace.name());
    let answer = send(&webhook.client, &path, |request| request.get("howdah", &Default::default())).await;
    answer.passed().then_some(answer.body)
}

/// The Events about a set with this reason.
async fn events(webhook: &Webhook, set: &str, reason: &str) -> Vec<Value> {
    let path = format!("/apis/events.k8s.io/v1/namespaces/{}/events", webhook.namespace.name());
    let answer = send(&webhook.client, &path, |request| request.list(&Default::default())).await;
    let events = answer.body["items"].as_array().unwrap().iter();
    let wanted = |event: &&Value| event["reason"] == reason && event["regarding"]["name"] == set;
    events.filter(wanted).cloned().collect()
}

/// The value of a metric line that begins like this, over all replicas.
fn metric(webhook: &Webhook, replicas: usize, line: &str) -> f64 {
    let texts = (0..replicas).map(|index| webhook.metrics(index));
    let values = texts.filter_map(|text| {
        let line = text.lines().find_map(|found| found.strip_prefix(line))?.trim().to_owned();
        line.parse::<f64>().ok()
    });
    values.sum()
}

async fn rounds(webhook: &Webhook, replicas: usize, more: f64) {
    let wanted = metric(webhook, replicas, "howdah_audit_rounds_total") + more;
    webhook
        .eventually("rounds of the audit", || async {
            metric(webhook, replicas, "howdah_audit_rounds_total") >= wanted
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_there_before_howdah_is_told_once_and_its_report_ends_with_it() {
    let mut webhook = Webhook::absent().await;
    let _turn = TURN.lock().await;
    apply_rights(&webhook.lab, "rook").unwrap();
    install_definitions(&webhook.lab);
    let account = own_account(&webhook.lab);
    assert!(webhook.create("statefulsets", &careless("orders"), false).await.passed());
    let output = webhook.lab.kubectl_apply(&around("orders", webhook.namespace.name()).to_string()).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut exempt = careless("stock");
    exempt["metadata"]["annotations"] = json!({
        "howdah.dev/mode": "audit",
        "howdah.dev/exempt.single-replica": format!("until={} reason=moving", (jiff::Timestamp::now() + jiff::SignedDuration::from_hours(7 * 24)).strftime("%Y-%m-%d")),
    });
    assert!(webhook.create("statefulsets", &exempt, false).await.passed());

    // Two replicas: only the one that holds the Lease may say anything.
    webhook.run_as_installed(account.path().to_owned());
    webhook.install(&OFTEN, 2);
    webhook.eventually("a report of the audit", || async { report(&webhook).await.is_some() }).await;
    let first = report(&webhook).await.unwrap();
    assert_eq!(first["spec"]["leftOut"], 0);
    let findings = first["spec"]["findings"].as_array().unwrap();
    let effect = |set: &str, rule: &str| {
        let found = findings.iter().find(|found| found["statefulSet"] == set && found["rule"] == rule);
        found.unwrap_or_else(|| panic!("no {rule} of {set} in {first:#}"))["effect"].clone()
    };
    let told: BTreeSet<&str> = findings
        .iter()
        .filter(|found| {
            found["statefulSet"] == "orders" && ["deny", "warn"].iter().any(|told| found["effect"] == *told)
        })
        .map(|found| found["rule"].as_str().unwrap())
        .collect();
    let rules = ["anti-affinity", "autoscaler", "disruption-budget", "grace-period", "single-replica"];
    assert!(told.is_superset(&rules.into()), "{first:#}");
    for (set, rule, wanted) in [
        ("orders", "single-replica", "deny"),
        ("orders", "autoscaler", "deny"),
        ("orders", "disruption-budget", "warn"),
        ("stock", "single-replica", "exempt"),
        ("stock", "grace-period", "audit"),
        ("stock", "annotations", "warn"),
    ] {
        assert_eq!(effect(set, rule), wanted, "{set} {rule}");
        let counted = findings.iter().filter(|found| found["effect"] == wanted).count();
        assert_eq!(first["spec"]["summary"][wanted], counted, "{first:#}");
    }
    let message = findings.iter().find(|found| found["rule"] == "single-replica").unwrap();
    assert_eq!(message["message"], "spec.replicas is 2, wanted 1 or 0");
    let message = findings.iter().find(|found| found["rule"] == "autoscaler").unwrap();
    assert_eq!(message["message"], "HorizontalPodAutoscaler/orders spec.maxReplicas is 3, wanted 1");

    // Round after round nothing is written and nothing is told again.
    rounds(&webhook, 2, 3.0).await;
    let later = report(&webhook).await.unwrap();
    assert_eq!(later["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    webhook
        .eventually("the Events of the audit", || async {
            events(&webhook, "orders", "PolicyViolation").await.len() == told.len()
        })
        .await;
    for event in events(&webhook, "orders", "PolicyViolation").await {
        assert!(event["series"].is_null(), "it was told twice: {event:#}");
        let set = webhook.get("statefulsets", "orders").await;
        assert_eq!(event["regarding"]["uid"], set["metadata"]["uid"]);
    }
    let quiet = events(&webhook, "stock", "PolicyViolation").await;
    assert_eq!(quiet.len(), 1, "only that the exemption is about to end: {quiet:#?}");
    assert_eq!(metric(&webhook, 2, "howdah_background_leading"), 1.0, "one of two leads");
    let counted = r#"howdah_audit_findings{rule="single-replica",effect="deny"}"#;
    assert!(metric(&webhook, 2, counted) >= 1.0);
    assert!(metric(&webhook, 2, "howdah_audit_exemptions_ending") >= 1.0);
    let shown = webhook.lab.kubectl_ok(&["get", "hwr", "-n", webhook.namespace.name()]).unwrap();
    assert!(shown.starts_with("NAME"), "{shown}");

    // Cured and unprotected: nothing is left to say.
    let cure = Patch::Merge(json!({"metadata": {"labels": {"howdah.dev/protect": "false"}}}));
    // Past the webhook, which would judge the way out of its care.
    webhook.remove_configurations();
    for set in ["orders", "stock"] {
        let params = PatchParams::default();
        let cured = webhook.send("statefulsets", |request| request.patch(set, &params, &cure)).await;
        assert!(cured.passed(), "{}", cured.message());
    }
    webhook.eventually("the end of the report", || async { report(&webhook).await.is_none() }).await;
    rounds(&webhook, 2, 2.0).await;
    assert!(report(&webhook).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_capped_and_says_what_it_leaves_out() {
    let mut webhook = Webhook::absent().await;
    let _turn = TURN.lock().await;
    install_definitions(&webhook.lab);
    let sets: Vec<Value> = (0..40).map(|i| careless(&format!("db-{i}"))).collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": sets}).to_string();
    let arguments = ["create", "-n", webhook.namespace.name(), "-f", "-"];
    assert!(webhook.lab.kubectl_with_input(&arguments, &list).unwrap().status.success());
    webhook.install(&OFTEN, 1);
    webhook.eventually("a report of the audit", || async { report(&webhook).await.is_some() }).await;
    // Until every finding of the report was told, each round remembers what it told.
    webhook
        .eventually("the last Event", || async {
            let report = report(&webhook).await.unwrap();
            report["spec"]["findings"]
                .as_array()
                .unwrap()
                .iter()
                .all(|finding| !finding["reportedAt"].is_null())
        })
        .await;
    let full = report(&webhook).await.unwrap();
    assert_eq!(full["spec"]["findings"].as_array().map(Vec::len), Some(100));
    let denied = full["spec"]["summary"]["deny"].as_u64().unwrap();
    assert!(denied >= 120, "three rules and forty sets: {denied}");
    let all: u64 = full["spec"]["summary"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert_eq!(full["spec"]["leftOut"], all - 100, "{:#}", full["spec"]["summary"]);
    rounds(&webhook, 1, 3.0).await;
    let later = report(&webhook).await.unwrap();
    assert_eq!(later["metadata"]["resourceVersion"], full["metadata"]["resourceVersion"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_is_an_event_on_the_set_and_a_flood_of_them_is_not() {
    let webhook = Webhook::start(&[]).await;
    for name in ["orders", "tried"] {
        let mut good = careless(name);
        good["spec"]["replicas"] = json!(1);
        good["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = json!(60);
        assert!(webhook.create("statefulsets", &good, false).await.passed());
    }
    assert!(!webhook.create("statefulsets", &careless("other"), false).await.passed());
    let scale_up = Patch::Merge(json!({"spec": {"replicas": 3}}));
    let refuse = async |name: &str, dry_run: bool| {
        let params = PatchParams { dry_run, ..PatchParams::default() };
        let refused = webhook.send("statefulsets", |request| request.patch(name, &params, &scale_up)).await;
        assert_eq!(refused.status, 403, "{}", refused.message());
    };
    refuse("tried", true).await;
    refuse("orders", false).await;
    webhook
        .eventually("the Event of a denial", || async {
            events(&webhook, "orders", "RequestDenied").await.len() == 1
        })
        .await;
    let event = events(&webhook, "orders", "RequestDenied").await.remove(0);
    assert!(
        events(&webhook, "tried", "RequestDenied").await.is_empty(),
        "the dry run, which came first, is an Event, too"
    );
    assert_eq!(event["action"], "single-replica");
    let note = event["note"].as_str().unwrap();
    assert!(note.contains("[single-replica] spec.replicas is 3, wanted 1 or 0"), "{note}");
    assert!(
        events(&webhook, "other", "RequestDenied").await.is_empty(),
        "what was never made bears no Event"
    );

    // More than the rate takes: every one is answered, the rest of the Events is only counted.
    for _ in 0..60 {
        refuse("orders", false).await;
    }
    assert!(metric(&webhook, 1, "howdah_denial_events_dropped_total") > 0.0);
    webhook
        .eventually("the count of the series", || async {
            let events = events(&webhook, "orders", "RequestDenied").await;
            assert_eq!(events.len(), 1, "{events:#?}");
            events[0]["series"]["count"].as_u64().is_some_and(|count| count > 1)
        })
        .await;
}
