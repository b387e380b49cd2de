//! Metrics: no label outside a closed list, and no alert or panel about a metric that does not exist.

#![expect(clippy::expect_used, reason = "a test says what is wrong by failing")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use howdah_tidy::root;
use serde_json::Value;

/// Every label there may be. Each has a handful of values that the code names; a name, a namespace or a message has any
/// number, and would make a series of each.
const LABELS: [&str; 12] = [
    "certificate",
    "component",
    "consistency",
    "effect",
    "mode",
    "operation",
    "outcome",
    "phase",
    "rule",
    "source",
    "verdict",
    "version",
];
/// Crates whose code counts something.
const COUNTING: [&str; 4] = ["adapters/src", "certs/src", "webhook/src", "scheduler/src"];
/// Metrics of the API server itself that the alerts are about; they are stable names of Kubernetes.
const FOREIGN: [&str; 2] =
    ["apiserver_admission_webhook_fail_open_count", "apiserver_admission_webhook_rejection_count"];
/// What the exposition adds to the name of a metric, by its kind.
const SUFFIXES: [&str; 6] = ["", "_total", "_bucket", "_sum", "_count", "_info"];

#[test]
fn no_metric_has_a_label_outside_the_closed_list() {
    let mut found = BTreeSet::new();
    for (path, text) in sources() {
        assert!(!text.contains("sub_registry_with_label"), "{}: a label of a whole registry", path.display());
        for body in bodies_of_label_sets(&text) {
            found.extend(fields(body));
        }
        for pairs in text.split("Info::new([").skip(1) {
            let pairs = pairs.split("])").next().unwrap_or_default();
            found.extend(
                pairs.split('(').skip(1).filter_map(|pair| pair.split('"').nth(1)).map(str::to_owned),
            );
        }
    }
    // Both ways: a label that nothing has any more is a hole in the list.
    assert_eq!(
        found,
        LABELS.map(str::to_owned).into(),
        "the labels of the code, and those of the closed list"
    );
}

#[test]
fn every_metric_that_an_alert_or_a_panel_names_exists() {
    let known = known_metrics();
    assert!(known.contains("howdah_reviews_total") && known.contains("howdah_scheduler_backups_total"));
    let folder = root().join("deploy/alerts");
    let rules = fs::read_to_string(folder.join("prometheusrule.yaml")).expect("read the alerts");
    let dashboard = fs::read_to_string(folder.join("dashboard.json")).expect("read the dashboard");
    let mut expressions = Vec::new();
    collect("expr", &serde_yaml_ng::from_str(&rules).expect("parse the alerts"), &mut expressions);
    collect("expr", &serde_json::from_str(&dashboard).expect("parse the dashboard"), &mut expressions);
    assert!(expressions.len() > 20, "only {} expressions", expressions.len());
    let mut named = BTreeSet::new();
    for expression in &expressions {
        let metrics: Vec<&str> = metrics_in(expression).collect();
        assert!(!metrics.is_empty(), "{expression} names no metric");
        for metric in metrics {
            assert!(
                known.contains(metric) || FOREIGN.contains(&metric),
                "{expression}: there is no {metric}"
            );
            named.insert(metric.to_owned());
        }
    }
    for metric in FOREIGN {
        assert!(named.contains(metric), "no alert is about {metric} any more");
    }
}

#[test]
fn every_alert_says_what_to_do() {
    let rules =
        fs::read_to_string(root().join("deploy/alerts/prometheusrule.yaml")).expect("read the alerts");
    let rules: Value = serde_yaml_ng::from_str(&rules).expect("parse the alerts");
    let groups = rules["spec"]["groups"].as_array().expect("groups of alerts");
    for alert in groups.iter().flat_map(|group| group["rules"].as_array().expect("a group has rules")) {
        let name = alert["alert"].as_str().expect("an alert has a name");
        assert!(name.starts_with("Howdah"), "{name}");
        for annotation in ["summary", "description"] {
            assert!(alert["annotations"][annotation].is_string(), "{name} has no {annotation}");
        }
        let severity = alert["labels"]["severity"].as_str().unwrap_or_default();
        assert!(["critical", "warning", "info"].contains(&severity), "{name}: {severity}");
    }
}

/// The code without its tests, file by file.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for folder in COUNTING {
        let mut open = vec![root().join(folder)];
        while let Some(next) = open.pop() {
            for entry in fs::read_dir(&next).expect("list the source") {
                let path = entry.expect("read an entry").path();
                if path.is_dir() {
                    open.push(path);
                } else if path.extension().is_some_and(|end| end == "rs") {
                    found.push((path.clone(), code_of(&path)));
                }
            }
        }
    }
    found
}

fn code_of(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("read the source");
    text.split("#[cfg(test)]").next().unwrap_or_default().to_owned()
}

/// What stands between the braces of each structure that becomes labels.
fn bodies_of_label_sets(text: &str) -> impl Iterator<Item = &str> {
    let structures = text.split("EncodeLabelSet)]").skip(1);
    structures.filter_map(|rest| rest.split_once('{')?.1.split('}').next())
}

fn fields(body: &str) -> impl Iterator<Item = String> {
    let lines = body.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    lines.filter_map(|line| Some(line.split_once(':')?.0.trim_start_matches("pub ").to_owned()))
}

/// Every name under which a metric of ours may appear.
fn known_metrics() -> BTreeSet<String> {
    let mut known = BTreeSet::new();
    for (_, text) in sources() {
        let prefix = match text.split_once("sub_registry_with_prefix(\"") {
            Some((_, rest)) => format!("{}_", rest.split('"').next().unwrap_or_default()),
            None => String::new(),
        };
        // `registry.register("name", ...)`, and the helpers that do it, which take the registry first.
        for call in ["register(", "added("] {
            for rest in text.split(call).skip(1) {
                let rest = rest.trim_start().trim_start_matches("registry,").trim_start();
                let Some(name) = rest.strip_prefix('"').and_then(|rest| rest.split('"').next()) else {
                    continue;
                };
                known.extend(SUFFIXES.map(|suffix| format!("howdah_{prefix}{name}{suffix}")));
            }
        }
    }
    known
}

/// Every text under the key `key`.
fn collect(key: &str, value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if name == key => found.push(text.clone()),
                    value => collect(key, value, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(key, item, found)),
        _ => {}
    }
}

/// The metrics of a PromQL expression that are ours or the API server's.
fn metrics_in(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("howdah_") || word.starts_with("apiserver_"))
}
