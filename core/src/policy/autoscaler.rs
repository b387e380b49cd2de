//! `autoscaler`: no autoscaler scales a database out, or away.
//!
//! **Intent.** A HorizontalPodAutoscaler would be refused each time it scales past one, and go on trying; with a minimum of
//! 0 it stops the database when it is idle, and nothing starts it again when a client comes.
//!
//! **Fields.** `spec.maxReplicas` and `spec.minReplicas` of an autoscaler whose `scaleTargetRef` is a protected
//! StatefulSet. Those that KEDA and others make are seen as well.
//!
//! **Fix.** Delete the autoscaler; to give the database more, raise its resources.

use super::{Check, Finding, Floor, Refusal, Rule, Subject, Target, json};

/// The rule.
pub const RULE: Rule = Rule {
    id: "autoscaler",
    intent: "No autoscaler adds replicas to a database, or stops it.",
    fields: &["HorizontalPodAutoscaler spec.maxReplicas", "HorizontalPodAutoscaler spec.minReplicas"],
    fix: "delete the autoscaler: a database is scaled by its resources, not by replicas",
    targets: &[Target::HorizontalPodAutoscaler],
    refusal: Refusal::Policy,
    check: Check::State(check),
    filling: None,
    floor: Floor::silent(
        "what it would do is refused as a scale, and the autoscaler names its StatefulSet only",
    ),
};

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(most) = json::integer(subject.object, &["spec", "maxReplicas"]).filter(|most| *most > 1) {
        findings.push(Finding::new("spec.maxReplicas", most.to_string(), "1"));
    }
    if json::integer(subject.object, &["spec", "minReplicas"]) == Some(0) {
        findings.push(
            Finding::new("spec.minReplicas", "0", "1")
                .fix("set it to 1: at 0 the autoscaler stops the database whenever it is idle"),
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{ClusterFacts, testing};
    use serde_json::json;

    #[test]
    fn exactly_one_replica_passes() {
        for (spec, fields) in [
            (json!({"minReplicas": 1, "maxReplicas": 1}), &[][..]),
            (json!({"maxReplicas": 1}), &[]),
            (json!({"minReplicas": 1, "maxReplicas": 2}), &["spec.maxReplicas"]),
            (json!({"minReplicas": 0, "maxReplicas": 1}), &["spec.minReplicas"]),
            (json!({"minReplicas": 0, "maxReplicas": 9}), &["spec.maxReplicas", "spec.minReplicas"]),
        ] {
            let found = testing::findings(&RULE, &json!({"spec": spec}), &ClusterFacts::default());
            let found: Vec<&str> = found.iter().map(|finding| finding.field.as_str()).collect();
            assert_eq!(found, fields);
        }
    }
}
