//! `eviction`: a drain waits while the pod is needed where it is.
//!
//! **Intent.** An eviction inside backup mode costs the backup, and one during a restore can start the database in the
//! middle of it. Both are over in a moment, so the answer is "not now": `kubectl drain` tries again by itself. An eviction
//! without grace is a force delete by another door: the API server deletes the pod without asking anybody again.
//!
//! **Fields.** `deleteOptions.gracePeriodSeconds` of the eviction; the `PostgresBackup`s of the StatefulSet that are in
//! backup mode or take their snapshot; its gate.
//!
//! **Fix.** Wait: the drain goes on by itself. Evict without `gracePeriodSeconds: 0`.

use super::{Check, Finding, Floor, Refusal, Rule, Subject, Target, force_delete, json};
use crate::names;

/// The rule.
pub const RULE: Rule = Rule {
    id: "eviction",
    intent: "A drain waits (429) while a backup or a restore holds the database; an eviction without grace is refused (403).",
    fields: &["Eviction deleteOptions.gracePeriodSeconds", "metadata.annotations[howdah.dev/gate]"],
    fix: "wait: kubectl drain tries again by itself until it passes",
    targets: &[Target::Eviction],
    refusal: Refusal::Policy,
    check: Check::Step(check),
    filling: None,
    floor: Floor::silent("an eviction names its pod and says nothing else, and backups have to be looked up"),
};

/// When a held database is worth another try, in seconds: a snapshot takes about one, and a drain asks every five anyway.
const RETRY_AFTER_S: u32 = 5;

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let facts = subject.facts;
    // A pod that could not be looked up is taken for a running one.
    let node = facts.pod.as_ref().map_or(Some("?"), force_delete::running_on);
    let Some(node) = node.filter(|_| !facts.namespace_terminating) else { return Vec::new() };
    let mut findings = Vec::new();
    if json::integer(subject.object, &["deleteOptions", "gracePeriodSeconds"]) == Some(0)
        && !facts.node_fenced
    {
        let found = format!("0, for a pod that may still run on node {node}");
        findings.push(
            Finding::new("deleteOptions.gracePeriodSeconds", found, "absent, or 1 or more")
                .fix("evict it with its own grace period: kubectl drain without --grace-period=0"),
        );
    }
    for backup in facts.backups.iter().filter(|backup| backup.holds_at(subject.now)) {
        let found = format!("held by the backup {}, which is {}", backup.name, backup.phase.as_str());
        findings
            .push(Finding::new("metadata.name", found, "a pod that nothing holds").not_now(RETRY_AFTER_S));
    }
    if let Some(gate) = &subject.settings.gate {
        let field = format!("metadata.annotations[{}]", names::GATE);
        findings.push(Finding::new(field, format!("held by {gate}"), "absent").not_now(RETRY_AFTER_S));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing::{self, somebody};
    use crate::policy::{ClusterFacts, HoldingBackup, Operation, Request, Weight};
    use serde_json::{Value, json};

    fn found(eviction: &Value, facts: &ClusterFacts) -> Vec<Finding> {
        let user = somebody();
        let request = Request {
            operation: Operation::Create,
            target: Target::Eviction,
            namespace: "shop",
            name: "pg-0",
            object: Some(eviction),
            old_object: None,
            user: Some(&user),
            grace_s: None,
        };
        testing::check(&RULE, &request, eviction, facts)
    }

    fn facts(annotations: Value, phase: &str, deadline: &str) -> ClusterFacts {
        let backup = json!({"metadata": {"name": "b"}, "spec": {"statefulSet": "pg"},
                            "status": {"phase": "Snapshotting", "deadline": deadline}});
        ClusterFacts {
            parent: Some(json!({"metadata": {"annotations": annotations}})),
            pod: Some(json!({"spec": {"nodeName": "a"}, "status": {"phase": phase}})),
            backups: HoldingBackup::from_json(&backup).into_iter().collect(),
            ..ClusterFacts::default()
        }
    }

    const OVER: &str = "2026-11-22T11:00:00Z";
    const OPEN: &str = "2026-11-22T12:00:00Z";

    #[test]
    fn a_healthy_pod_is_evicted() {
        assert!(found(&json!({}), &facts(json!({}), "Running", OVER)).is_empty());
        assert!(
            found(&json!({"deleteOptions": {"gracePeriodSeconds": 1}}), &facts(json!({}), "Running", OVER))
                .is_empty()
        );
    }

    #[test]
    fn a_held_pod_is_evicted_later() {
        let held = found(&json!({}), &facts(json!({}), "Running", OPEN));
        assert_eq!(held[0].weight, Weight::NotNow { retry_after_s: 5 });
        assert!(held[0].found.contains("the backup b"), "{}", held[0].found);
        let held = found(&json!({}), &facts(json!({"howdah.dev/gate": "restore/r"}), "Running", OVER));
        assert_eq!(
            (held[0].weight, held[0].found.as_str()),
            (Weight::NotNow { retry_after_s: 5 }, "held by restore/r")
        );
    }

    #[test]
    fn an_eviction_without_grace_is_a_force_delete() {
        let forced = json!({"deleteOptions": {"gracePeriodSeconds": 0}});
        let denied = found(&forced, &facts(json!({}), "Running", OVER));
        assert_eq!(denied[0].weight, Weight::Full);
        assert!(found(&forced, &facts(json!({}), "Succeeded", OPEN)).is_empty(), "it runs nowhere");
        let unknown = ClusterFacts { pod: None, ..facts(json!({}), "Running", OVER) };
        assert_eq!(found(&forced, &unknown).len(), 1);
    }
}
