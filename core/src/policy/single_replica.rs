//! `single-replica`: one pod, one writer.
//!
//! **Intent.** A plain PostgreSQL on a shared disk has one pod. A second replica is not a standby: it is an empty
//! database on a claim of its own, or a second writer on a shared one.
//!
//! **Fields.** `spec.replicas` of the StatefulSet and of its scale subresource, which is what `kubectl scale` and
//! autoscalers write. 0 is a planned stop and passes.
//!
//! **Fix.** Set replicas to 1 (or 0 to stop the database).

use super::floor::{Floor, Twin};
use super::{Check, Finding, Refusal, Rule, Subject, Target, json};

/// The rule.
pub const RULE: Rule = Rule {
    id: "single-replica",
    intent: "There is at most one pod: a second replica is a second database, or a second writer.",
    fields: &["spec.replicas"],
    fix: "set replicas to 1, or to 0 to stop the database",
    targets: &[Target::StatefulSet, Target::Scale],
    refusal: Refusal::Policy,
    check: Check::State(check),
    filling: None,
    floor: FLOOR,
};

const FLOOR: Floor = Floor {
    twins: &[
        Twin { target: Target::StatefulSet, findings: CEL },
        Twin { target: Target::Scale, findings: CEL },
    ],
    makes: |_| true,
    leaves: None,
};

const CEL: &str = r#"it.spec.?replicas.orValue(1) > 1
  ? ["spec.replicas is " + string(it.spec.replicas) + ", wanted 1 or 0"]
  : []"#;

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    // Absent is 1 in a StatefulSet and 0 in a Scale; both pass.
    match json::integer(subject.object, &["spec", "replicas"]) {
        Some(replicas) if replicas > 1 => vec![Finding::new("spec.replicas", replicas.to_string(), "1 or 0")],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{ClusterFacts, testing};
    use serde_json::json;

    #[test]
    fn at_most_one_replica_passes() {
        for (spec, findings) in [
            (json!({}), 0),
            (json!({"replicas": null}), 0),
            (json!({"replicas": 0}), 0),
            (json!({"replicas": 1}), 0),
            (json!({"replicas": 2}), 1),
            (json!({"replicas": i64::MAX}), 1),
        ] {
            let object = json!({"spec": spec});
            let found = testing::findings(&RULE, &object, &ClusterFacts::default());
            assert_eq!(found.len(), findings, "{object}");
        }
    }
}
