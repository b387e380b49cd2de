//! `disruption-budget`: a node with the database on it can be drained.
//!
//! **Intent.** A database of one pod has no second one that could serve meanwhile: a budget that allows no disruption
//! blocks `kubectl drain`, and with it every upgrade of the nodes, for ever. howdah itself makes a drain wait while a
//! backup or a restore needs the pod, so no budget is needed for that.
//!
//! **Fields.** `spec.minAvailable` and `spec.maxUnavailable` of a budget that selects the pods of a protected StatefulSet.
//!
//! **Fix.** `maxUnavailable: 1`, or no budget.

use serde_json::Value;

use super::{Check, Finding, Floor, Refusal, Rule, Subject, Target, json};

/// The rule.
pub const RULE: Rule = Rule {
    id: "disruption-budget",
    intent: "A disruption budget does not make draining a node impossible (a warning, never a denial).",
    fields: &["PodDisruptionBudget spec.minAvailable", "PodDisruptionBudget spec.maxUnavailable"],
    fix: "set maxUnavailable to 1 instead: howdah makes a drain wait while the pod is needed",
    targets: &[Target::DisruptionBudget],
    refusal: Refusal::Advice,
    check: Check::State(check),
    filling: None,
    floor: Floor::silent("it only warns"),
};

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let spec = |key: &str| json::at(subject.object, &["spec", key]);
    // Kubernetes rounds both up, so of one pod any share above nothing is that pod.
    let blocking = [
        ("minAvailable", spec("minAvailable").filter(|value| !is_none(value))),
        ("maxUnavailable", spec("maxUnavailable").filter(|value| is_none(value))),
    ];
    let findings = blocking.into_iter().filter_map(|(key, value)| {
        let value = value?;
        let found = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        Some(Finding::new(format!("spec.{key}"), found, "maxUnavailable: 1"))
    });
    findings.collect()
}

/// Whether this number or percentage is none at all.
fn is_none(value: &Value) -> bool {
    value.as_i64() == Some(0)
        || value.as_str().is_some_and(|text| text.trim_end_matches('%').trim_start_matches('0').is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{ClusterFacts, testing};
    use serde_json::json;

    #[test]
    fn what_leaves_no_pod_to_spare_is_found() {
        for (spec, found) in [
            (json!({"minAvailable": 1}), 1),
            (json!({"minAvailable": "1%"}), 1),
            (json!({"minAvailable": "100%"}), 1),
            (json!({"maxUnavailable": 0}), 1),
            (json!({"maxUnavailable": "0%"}), 1),
            (json!({"minAvailable": 0}), 0),
            (json!({"minAvailable": "0%"}), 0),
            (json!({"maxUnavailable": 1}), 0),
            (json!({"maxUnavailable": "10%"}), 0),
            (json!({}), 0),
        ] {
            let findings = testing::findings(&RULE, &json!({"spec": spec}), &ClusterFacts::default());
            assert_eq!(findings.len(), found, "{spec}");
        }
    }
}
