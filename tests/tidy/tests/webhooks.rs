//! What every entry of deploy/base/webhook-configuration.yaml has to have, so that howdah never takes a cluster down.

#![expect(clippy::expect_used, reason = "a test says what is wrong by failing")]

use std::fs;
use std::path::Path;

use howdah_core::names;
use serde::Deserialize as _;
use serde_json::{Value, json};

/// Both configurations.
fn configurations() -> Vec<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("tests/tidy has two parents");
    let text =
        fs::read_to_string(root.join("deploy/base/webhook-configuration.yaml")).expect("read the manifest");
    let documents: Vec<Value> = serde_yaml_ng::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).expect("read a configuration"))
        .collect();
    assert_eq!(documents.len(), 2);
    documents
}

fn webhooks(configuration: &Value) -> &[Value] {
    configuration["webhooks"].as_array().expect("a configuration has webhooks")
}

#[test]
fn every_webhook_is_applied_failing_open_and_lets_the_glass_be_broken() {
    let group = format!("\"{}\" in request.userInfo.groups", names::BREAK_GLASS_GROUP);
    for webhook in configurations().iter().flat_map(webhooks) {
        let name = &webhook["name"];
        assert_eq!(webhook["failurePolicy"], "Ignore", "{name}");
        assert_eq!(webhook["matchConditions"][0]["name"], "not-break-glass", "{name}");
        let condition = webhook["matchConditions"][0]["expression"].as_str().unwrap_or_default();
        assert!(condition.contains(&group), "{name}: {condition}");
        assert!(webhook["timeoutSeconds"].as_i64().is_some_and(|seconds| seconds <= 5), "{name}");
        if name == "probe.howdah.dev" {
            continue;
        }
        let selector = json!({"matchExpressions": [{
            "key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": names::EXCLUDED_NAMESPACES,
        }]});
        assert_eq!(webhook["namespaceSelector"], selector, "{name}");
    }
}

#[test]
fn only_what_asks_for_the_label_is_meant_to_fail_closed() {
    for configuration in configurations() {
        let meant =
            configuration["metadata"]["annotations"][names::FAIL_CLOSED].as_str().expect("it says which");
        let meant: Vec<&str> = meant.split(',').map(str::trim).collect();
        let labelled: Vec<&str> = webhooks(&configuration)
            .iter()
            .filter(|webhook| {
                webhook["objectSelector"]["matchLabels"][names::PROTECT_LABEL] == names::PROTECT_VALUE
            })
            .filter_map(|webhook| webhook["name"].as_str())
            .collect();
        assert_eq!(meant, labelled);
    }
}
