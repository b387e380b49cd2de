//! `grace-period`: PostgreSQL gets the time to shut down.
//!
//! **Intent.** A clean shutdown writes a checkpoint. Killed before that, the database has to recover on its next start,
//! and 0 is worse: the API server then forgets the pod without waiting for the kubelet, and a replacement can start
//! while the old process still writes.
//!
//! **Fields.** `terminationGracePeriodSeconds` of the pod (30 when absent) and of the liveness and startup probes, which
//! override it when they kill; `lifecycle.preStop`, whose sleep runs on the same clock.
//!
//! **Fix.** At least the minimum (30 s unless configured), no probe-level override below it, a shorter preStop.

use serde_json::{Value, json};

use super::floor::{Floor, Twin};
use super::{Check, ClusterFacts, Filling, Finding, Refusal, Rule, Subject, Target, json as raw};

/// The shortest grace period that passes unless the operator configures another; Kubernetes' own default.
pub const MINIMUM_GRACE_S: i64 = 30;
/// What the API server fills in where nothing is written.
pub const KUBERNETES_DEFAULT_GRACE_S: i64 = 30;
/// What howdah fills in: long enough for the shutdown checkpoint of a busy database.
pub const DEFAULT_GRACE_S: i64 = 300;

/// The rule.
pub const RULE: Rule = Rule {
    id: "grace-period",
    intent: "PostgreSQL has the time to shut down cleanly before it is killed.",
    fields: &[
        "spec.template.spec.terminationGracePeriodSeconds",
        "spec.template.spec.containers[*].livenessProbe.terminationGracePeriodSeconds",
        "spec.template.spec.containers[*].startupProbe.terminationGracePeriodSeconds",
        "spec.template.spec.containers[*].lifecycle.preStop",
    ],
    fix: "leave terminationGracePeriodSeconds out (howdah fills in 300), or raise it",
    targets: &[Target::StatefulSet],
    refusal: Refusal::Policy,
    check: Check::State(check),
    filling: Some(Filling {
        says: "300 s where it is absent or 30; the API server writes 30 where nothing is written, so a chosen 30 cannot be \
               told from that: choose 31, or exempt the rule",
        fill,
    }),
    floor: FLOOR,
};

/// Below any minimum that can be configured: the API server then forgets the pod at once.
const FLOOR: Floor = Floor {
    twins: &[Twin { target: Target::StatefulSet, findings: CEL }],
    makes: |finding| {
        finding.field == format!("{POD}.{GRACE}") && finding.found.parse::<i64>().is_ok_and(|grace| grace < 1)
    },
    leaves: Some("periods of 1 s and more, because the minimum is configured there; probes and preStop"),
};

const CEL: &str = r#"it.spec.template.spec.?terminationGracePeriodSeconds.orValue(30) < 1
  ? ["spec.template.spec.terminationGracePeriodSeconds is " + string(it.spec.template.spec.terminationGracePeriodSeconds) + ", wanted at least 30"]
  : []"#;

const POD: &str = "spec.template.spec";
const GRACE: &str = "terminationGracePeriodSeconds";

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let Some(pod) = raw::at(subject.object, &["spec", "template", "spec"]) else { return Vec::new() };
    let minimum = subject.facts.config.minimum_grace_s;
    let grace = raw::integer(pod, &[GRACE]).unwrap_or(KUBERNETES_DEFAULT_GRACE_S);
    let mut findings = Vec::new();
    if grace < minimum {
        findings.push(Finding::new(
            format!("{POD}.{GRACE}"),
            grace.to_string(),
            format!("at least {minimum}"),
        ));
    }
    for list in ["containers", "initContainers"] {
        for container in raw::list(pod, &[list]) {
            let name = raw::string(container, &["name"]).unwrap_or("?");
            check_container(container, &format!("{POD}.{list}[{name}]"), grace, minimum, &mut findings);
        }
    }
    findings
}

fn fill(object: &mut Value, facts: &ClusterFacts) {
    let Some(pod) = raw::object_mut(object, &["spec", "template", "spec"]) else { return };
    let grace = pod.entry(GRACE).or_insert(Value::Null);
    if grace.is_null() || grace.as_i64() == Some(KUBERNETES_DEFAULT_GRACE_S) {
        *grace = json!(DEFAULT_GRACE_S.max(facts.config.minimum_grace_s));
    }
}

fn check_container(container: &Value, path: &str, grace: i64, minimum: i64, findings: &mut Vec<Finding>) {
    for probe in ["livenessProbe", "startupProbe"] {
        if let Some(own) = raw::integer(container, &[probe, GRACE]).filter(|own| *own < minimum) {
            let field = format!("{path}.{probe}.{GRACE}");
            findings.push(
                Finding::new(field, own.to_string(), format!("absent, or at least {minimum}"))
                    .fix(format!("remove it: the {probe} then uses the grace period of the pod")),
            );
        }
    }
    if let Some(sleep) = pre_stop_sleep(container).filter(|sleep| *sleep >= grace) {
        let field = format!("{path}.lifecycle.preStop");
        findings.push(
            Finding::new(
                field,
                format!("a sleep of {sleep} s"),
                format!("less than {GRACE}, which is {grace}"),
            )
            .fix(format!("shorten the sleep or raise {GRACE}: both run on the same clock")),
        );
    }
}

/// Seconds that the preStop hook sleeps, where that can be read from it.
fn pre_stop_sleep(container: &Value) -> Option<i64> {
    let hook = raw::at(container, &["lifecycle", "preStop"])?;
    if let Some(seconds) = raw::integer(hook, &["sleep", "seconds"]) {
        return Some(seconds);
    }
    let words: Vec<&str> = raw::list(hook, &["exec", "command"])
        .iter()
        .filter_map(Value::as_str)
        .flat_map(|word| word.split(|c: char| c.is_whitespace() || c == ';' || c == '&'))
        .collect();
    let sleeps = words.windows(2).filter(|pair| pair[0] == "sleep" || pair[0].ends_with("/sleep"));
    sleeps.filter_map(|pair| pair[1].trim_end_matches('s').parse::<i64>().ok()).reduce(i64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing;

    fn fields(pod: Value) -> Vec<String> {
        let object = json!({"spec": {"template": {"spec": pod}}});
        let found = testing::findings(&RULE, &object, &ClusterFacts::default());
        found.into_iter().map(|finding| finding.field.replace("spec.template.spec.", "")).collect()
    }

    #[test]
    fn the_boundary_is_the_minimum() {
        assert!(fields(json!({})).is_empty(), "absent is 30");
        assert!(fields(json!({GRACE: 30})).is_empty());
        for grace in [29, 0, -1] {
            assert_eq!(fields(json!({GRACE: grace})), [GRACE], "{grace}");
        }
    }

    #[test]
    fn probes_of_every_container_are_read() {
        let containers = json!([
            {"name": "pg", "livenessProbe": {GRACE: 5}, "startupProbe": {GRACE: 30}, "readinessProbe": {}},
            {"name": "exporter", "startupProbe": {GRACE: 29}},
        ]);
        let sidecars = json!([{"name": "proxy", "livenessProbe": {GRACE: 1}}]);
        assert_eq!(
            fields(json!({"containers": containers, "initContainers": sidecars})),
            [
                "containers[pg].livenessProbe.terminationGracePeriodSeconds",
                "containers[exporter].startupProbe.terminationGracePeriodSeconds",
                "initContainers[proxy].livenessProbe.terminationGracePeriodSeconds",
            ]
        );
    }

    #[test]
    fn a_pre_stop_sleep_must_leave_time() {
        let hook = |hook: Value| {
            fields(json!({GRACE: 60, "containers": [{"name": "pg", "lifecycle": {"preStop": hook}}]}))
        };
        for long in [
            json!({"sleep": {"seconds": 60}}),
            json!({"exec": {"command": ["sleep", "90"]}}),
            json!({"exec": {"command": ["/bin/sh", "-c", "/bin/sleep 40; pg_ctl stop; sleep 20s"]}}),
        ] {
            assert_eq!(hook(long.clone()), ["containers[pg].lifecycle.preStop"], "{long}");
        }
        for short in [
            json!({"sleep": {"seconds": 59}}),
            json!({"exec": {"command": ["sh", "-c", "sleep 5 && pg_ctl stop"]}}),
            json!({"exec": {"command": ["pg_ctl", "stop"]}}),
            json!({"exec": {"command": ["sleep"]}}),
            json!({"httpGet": {"path": "/sleep 900", "port": 80}}),
        ] {
            assert!(hook(short.clone()).is_empty(), "{short}");
        }
    }

    #[test]
    fn only_what_the_user_did_not_choose_is_filled_in() {
        for (before, after) in
            [(json!({}), 300), (json!({GRACE: 30}), 300), (json!({GRACE: 31}), 31), (json!({GRACE: 0}), 0)]
        {
            let mut object = json!({"spec": {"template": {"spec": before}}});
            fill(&mut object, &ClusterFacts::default());
            assert_eq!(object["spec"]["template"]["spec"][GRACE], after);
        }
    }
}
