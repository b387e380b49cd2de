//! The alerts, tried on Prometheus' own engine: each fires when it should, and none when all is well.

use std::fs;
use std::process::Command;

use howdah_tidy::root;
use serde_json::Value;

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    let folder = root().join("deploy/alerts");
    let read = |name: &str| fs::read_to_string(folder.join(name)).expect("read the alerts");
    let rule: Value = serde_yaml_ng::from_str(&read("prometheusrule.yaml")).expect("parse the alerts");
    let work = tempfile::tempdir().expect("make a folder");
    // What the Prometheus operator hands to Prometheus is the spec.
    fs::write(work.path().join("rules.yaml"), rule["spec"].to_string()).expect("write the rules");
    let tests = read("tests.yaml");
    fs::write(work.path().join("tests.yaml"), &tests).expect("write the tests");
    let groups = rule["spec"]["groups"].as_array().expect("there are groups");
    let alerts = groups.iter().flat_map(|group| group["rules"].as_array().expect("a group has rules"));
    for alert in alerts.map(|rule| rule["alert"].as_str().expect("a rule is an alert")) {
        assert!(
            tests.contains(&format!("{{alertname=\"{alert}\"}}")),
            "deploy/alerts/tests.yaml never sees {alert} fire"
        );
    }
    let output = Command::new("promtool")
        .args(["test", "rules", "tests.yaml"])
        .current_dir(work.path())
        .output()
        .expect("run promtool: make setup installs it (Debian's package prometheus)");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{said}");
}
