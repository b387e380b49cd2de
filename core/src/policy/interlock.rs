//! `interlock`: while an operation holds the database, nobody else moves it.
//!
//! **Intent.** During a restore or a failover the image is exchanged or fenced under a database that has to stay stopped. A
//! pod that starts in the middle of it writes to what is about to be rolled back, or is the second writer.
//!
//! **Fields.** The annotation `howdah.dev/gate` of the StatefulSet (`restore/NAME` or `failover/NAME`), which howdah alone
//! sets and removes. While it stands: `spec.replicas` (no scale-up, by the StatefulSet or its scale), `spec.template`, the
//! label, and the deletion of the StatefulSet and its claims.
//!
//! **Fix.** Wait until the operation is done. In every mode, and without an exemption: it is about a second writer.

use serde_json::Value;

use super::floor::{Floor, Twin};
use super::{Check, Finding, Operation, Refusal, Rule, Subject, Target, User, is_protected, json};
use crate::names;

/// The rule.
pub const RULE: Rule = Rule {
    id: "interlock",
    intent: "While a restore or a failover holds the database, nobody else starts, changes or deletes it.",
    fields: &[
        "metadata.annotations[howdah.dev/gate]",
        "spec.replicas",
        "spec.template",
        "metadata.labels[howdah.dev/protect]",
    ],
    fix: "wait until the operation that the gate names is done (kubectl get postgresrestores)",
    targets: &[Target::StatefulSet, Target::Scale, Target::Claim],
    refusal: Refusal::Held,
    check: Check::Step(check),
    filling: None,
    floor: FLOOR,
};

/// The gate stands on the StatefulSet, so the floor sees it as it is. That it is howdah who asks is taken from the name
/// of the account in any namespace: the floor does not know where howdah is installed.
const FLOOR: Floor = Floor {
    twins: &[Twin { target: Target::StatefulSet, findings: CEL }],
    makes: |finding| ["spec.replicas", "spec.template"].contains(&finding.field.as_str()),
    leaves: Some(
        "the gate itself, the label, scales and deletions, which are judged by what has to be looked up",
    ),
};

const CEL: &str = r#"oldObject == null || it == oldObject || !oldObject.metadata.?annotations[?"howdah.dev/gate"].hasValue() ||
    request.userInfo.username.matches("^system:serviceaccount:[^:]+:howdah-(scheduler|failover)$") ||
    request.userInfo.username.matches("^system:(kube-controller-manager|kube-scheduler|serviceaccount:kube-system:.*)$")
  ? []
  : (it.spec.?replicas.orValue(1) > oldObject.spec.?replicas.orValue(1)
      ? ["spec.replicas is " + string(it.spec.?replicas.orValue(1)) + " while " +
        oldObject.metadata.annotations["howdah.dev/gate"] + " holds the database, wanted " +
        string(oldObject.spec.?replicas.orValue(1))]
      : []) +
    (it.spec.template != oldObject.spec.template
      ? ["spec.template is changed while " + oldObject.metadata.annotations["howdah.dev/gate"] +
        " holds the database, wanted unchanged"]
      : [])"#;

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let (request, facts) = (subject.request, subject.facts);
    let excused = |user: &User| user.runs_operations(&facts.config) || user.is_control_plane();
    if request.user.is_some_and(excused) || facts.namespace_terminating {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let field = format!("metadata.annotations[{}]", names::GATE);
    if request.target != Target::StatefulSet {
        // A claim may go with the data of the operation; a scale may start the database.
        let replicas = |object: Option<&Value>| {
            object.and_then(|object| json::integer(object, &["spec", "replicas"])).unwrap_or(0)
        };
        let starts =
            request.target == Target::Scale && replicas(request.object) > replicas(request.old_object);
        let gate = facts.parent.as_ref().and_then(gate);
        if let Some(gate) = gate.filter(|_| starts || request.target == Target::Claim) {
            let what = if starts { "a scale-up" } else { "the deletion of a claim" };
            findings.push(Finding::new(field, format!("{gate}, which forbids {what}"), "absent"));
        }
        return findings;
    }
    let (old, new) = (request.old_object, request.object);
    let (before, after) = (old.and_then(gate), new.and_then(gate));
    if request.operation == Operation::Delete {
        let held =
            before.map(|gate| Finding::new(field, format!("{gate}, which forbids the deletion"), "absent"));
        return held.into_iter().collect();
    }
    if before != after {
        let found = after.unwrap_or("removed").to_owned();
        let (wanted, fix) = match before {
            Some(gate) => (
                gate.to_owned(),
                "leave it as it is: howdah removes it when the operation is done".to_owned(),
            ),
            None => ("absent".to_owned(), "leave it out: howdah sets it when an operation begins".to_owned()),
        };
        findings.push(Finding::new(field, found, wanted).fix(fix));
    }
    let (Some(gate), Some(old), Some(new)) = (before, old, new) else { return findings };
    let mut forbid = |field: &str, found: String, wanted: String| {
        findings.push(Finding::new(field, format!("{found} while {gate} holds the database"), wanted));
    };
    // Absent is 1.
    let replicas = |object: &Value| json::integer(object, &["spec", "replicas"]).unwrap_or(1);
    if replicas(new) > replicas(old) {
        forbid("spec.replicas", replicas(new).to_string(), replicas(old).to_string());
    }
    if json::at(new, &["spec", "template"]) != json::at(old, &["spec", "template"]) {
        forbid("spec.template", "changed".to_owned(), "unchanged".to_owned());
    }
    if !is_protected(new) {
        let field = format!("metadata.labels[{}]", names::PROTECT_LABEL);
        forbid(&field, "removed".to_owned(), format!("{:?}", names::PROTECT_VALUE));
    }
    findings
}

/// The operation that holds a StatefulSet. One that cannot be read holds it all the same.
fn gate(set: &Value) -> Option<&str> {
    json::string(set, &["metadata", "annotations", names::GATE])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing::{self, deletion, somebody};
    use crate::policy::{ClusterFacts, Request};
    use serde_json::json;

    fn set(gate: Option<&str>, replicas: i64, image: &str) -> Value {
        let annotations = gate.map(|gate| json!({names::GATE: gate})).unwrap_or_default();
        json!({
            "metadata": {"name": "pg", "labels": {names::PROTECT_LABEL: "true"}, "annotations": annotations},
            "spec": {"replicas": replicas, "template": {"spec": {"containers": [{"image": image}]}}},
        })
    }

    fn step(
        target: Target,
        old: Option<&Value>,
        new: &Value,
        user: &User,
        parent: Option<Value>,
    ) -> Vec<String> {
        let request = Request {
            operation: if old.is_some() { Operation::Update } else { Operation::Create },
            target,
            namespace: "shop",
            name: "pg",
            object: Some(new),
            old_object: old,
            user: Some(user),
            grace_s: None,
        };
        let facts = ClusterFacts { parent, ..ClusterFacts::default() };
        let found = testing::check(&RULE, &request, new, &facts);
        found.into_iter().map(|finding| finding.field).collect()
    }

    fn scheduler() -> User {
        let name = "system:serviceaccount:howdah-system:howdah-scheduler".to_owned();
        User { name, groups: Vec::new() }
    }

    const GATE: &str = "metadata.annotations[howdah.dev/gate]";

    #[test]
    fn nobody_but_howdah_touches_the_gate() {
        let (open, held) = (set(None, 0, "a"), set(Some("restore/r"), 0, "a"));
        let other = set(Some("restore/s"), 0, "a");
        for (old, new) in [(&open, &held), (&held, &open), (&held, &other)] {
            assert_eq!(step(Target::StatefulSet, Some(old), new, &somebody(), None), [GATE]);
            assert!(step(Target::StatefulSet, Some(old), new, &scheduler(), None).is_empty());
        }
        assert_eq!(step(Target::StatefulSet, None, &held, &somebody(), None), [GATE], "nor on creation");
        assert!(step(Target::StatefulSet, Some(&held), &held, &somebody(), None).is_empty());
    }

    #[test]
    fn a_held_database_stays_as_it_is() {
        let held = set(Some("restore/r"), 0, "a");
        let change = |new: &Value| step(Target::StatefulSet, Some(&held), new, &somebody(), None);
        assert_eq!(change(&set(Some("restore/r"), 1, "a")), ["spec.replicas"]);
        assert_eq!(change(&set(Some("restore/r"), 0, "b")), ["spec.template"]);
        let mut unlabelled = held.clone();
        unlabelled["metadata"]["labels"] = json!({});
        assert_eq!(change(&unlabelled), ["metadata.labels[howdah.dev/protect]"]);
        let mut annotated = held.clone();
        annotated["metadata"]["annotations"]["howdah.dev/suspend"] = json!("true");
        assert!(change(&annotated).is_empty(), "what does not move it passes");
        let running = set(Some("failover/f"), 1, "a");
        let stop =
            step(Target::StatefulSet, Some(&running), &set(Some("failover/f"), 0, "a"), &somebody(), None);
        assert!(stop.is_empty(), "a stop starts no writer");
    }

    #[test]
    fn the_gate_of_the_parent_holds_its_scale_and_its_claims() {
        let scale = |replicas: i64| json!({"spec": {"replicas": replicas}});
        let held = || Some(set(Some("restore/r"), 0, "a"));
        assert_eq!(step(Target::Scale, Some(&scale(0)), &scale(1), &somebody(), held()), [GATE]);
        assert!(step(Target::Scale, Some(&scale(1)), &scale(0), &somebody(), held()).is_empty());
        assert!(step(Target::Scale, Some(&scale(0)), &scale(1), &scheduler(), held()).is_empty());
        assert!(
            step(Target::Scale, Some(&scale(0)), &scale(1), &somebody(), Some(set(None, 0, "a"))).is_empty()
        );
    }

    #[test]
    fn neither_set_nor_claim_is_deleted_meanwhile() {
        let (held, user) = (set(Some("restore/r"), 0, "a"), somebody());
        let facts = ClusterFacts { parent: Some(held.clone()), ..ClusterFacts::default() };
        for target in [Target::StatefulSet, Target::Claim] {
            let request = deletion(target, &held, &user, None);
            assert_eq!(testing::check(&RULE, &request, &held, &facts).len(), 1, "{target:?}");
            let ending = ClusterFacts { namespace_terminating: true, ..facts.clone() };
            assert!(testing::check(&RULE, &request, &held, &ending).is_empty(), "{target:?}");
        }
    }
}
