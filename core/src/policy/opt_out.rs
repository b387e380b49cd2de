//! `opt-out`: taking the label off is a step of its own.
//!
//! **Intent.** The label can be taken off at any time; it then protects nothing any more. What must not happen is that the
//! same change also does what the label forbids, by a tool that applies another branch, say: nobody would see the one
//! among the other. And a backup that is just being taken would lose its database under its hands.
//!
//! **Fields.** `metadata.labels[howdah.dev/protect]`, together with everything the rules for a StatefulSet read, and the
//! backups that hold it. A gate is seen to by `interlock`.
//!
//! **Fix.** Take the label off first, and make the other change afterwards.

use super::{Check, Finding, Floor, Operation, RULES, Refusal, Rule, Subject, Target, Weight, is_protected};
use crate::names;

/// The rule.
pub const RULE: Rule = Rule {
    id: "opt-out",
    intent: "The label is not taken off in the same change that does what it forbids, nor under a running backup.",
    fields: &["metadata.labels[howdah.dev/protect]"],
    fix: "take the label off in a change of its own, and make the other change after it",
    targets: &[Target::StatefulSet],
    refusal: Refusal::Policy,
    check: Check::Step(check),
    filling: None,
    floor: Floor::silent("every other rule has to be judged again, and backups have to be looked up"),
};

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let request = subject.request;
    let (Operation::Update, Some(old), Some(new)) = (request.operation, request.old_object, request.object)
    else {
        return Vec::new();
    };
    if is_protected(new) || !is_protected(old) {
        return Vec::new();
    }
    let finding = |found: String, wanted: &str| {
        Finding::new(format!("metadata.labels[{}]", names::PROTECT_LABEL), found, wanted)
    };
    let mut findings = Vec::new();
    for rule in RULES.iter().filter(|rule| rule.targets.contains(&Target::StatefulSet)) {
        let Check::State(check) = rule.check else { continue };
        if matches!(super::exemptions::covering(rule.id, subject.settings, subject.today()), Ok(Some(_))) {
            continue;
        }
        let before = check(&Subject { object: old, ..*subject });
        let after = check(&Subject { object: new, ..*subject });
        for violation in after.iter().filter(|after| after.weight == Weight::Full && !before.contains(after))
        {
            let (id, field, found) = (rule.id, &violation.field, &violation.found);
            findings.push(finding(
                format!("removed together with a violation of {id}: {field} is {found}"),
                "removed in a change of its own",
            ));
        }
    }
    for backup in subject.facts.backups.iter().filter(|backup| backup.holds_at(subject.now)) {
        let found = format!("removed while the backup {} is {}", backup.name, backup.phase.as_str());
        findings.push(finding(found, "removed after it").fix("wait until the backup is done"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing::{self, somebody};
    use crate::policy::{ClusterFacts, HoldingBackup, Request};
    use serde_json::{Value, json};

    fn set(label: &str, replicas: i64, exempt: bool) -> Value {
        let key = if exempt { "howdah.dev/exempt.single-replica" } else { "example.com/none" };
        json!({
            "metadata": {"labels": {names::PROTECT_LABEL: label}, "annotations": {key: "until=2027-01-31 reason=moving"}},
            "spec": {"replicas": replicas},
        })
    }

    fn found(old: &Value, new: &Value, facts: &ClusterFacts) -> Vec<String> {
        let user = somebody();
        let request = Request {
            operation: Operation::Update,
            target: Target::StatefulSet,
            namespace: "shop",
            name: "pg",
            object: Some(new),
            old_object: Some(old),
            user: Some(&user),
            grace_s: None,
        };
        testing::check(&RULE, &request, old, facts).into_iter().map(|finding| finding.found).collect()
    }

    #[test]
    fn the_label_alone_comes_off() {
        let none = ClusterFacts::default();
        assert!(found(&set("true", 1, false), &set("false", 1, false), &none).is_empty());
        assert!(found(&set("true", 2, false), &set("false", 2, false), &none).is_empty(), "it was so before");
        assert!(found(&set("true", 1, true), &set("false", 2, true), &none).is_empty(), "it was exempt");
        assert!(
            found(&set("true", 1, false), &set("true", 2, false), &none).is_empty(),
            "others see to that"
        );
    }

    #[test]
    fn together_with_what_it_forbids_it_stays() {
        assert_eq!(
            found(&set("true", 1, false), &set("false", 2, false), &ClusterFacts::default()),
            ["removed together with a violation of single-replica: spec.replicas is 2"]
        );
    }

    #[test]
    fn a_running_backup_keeps_it() {
        let backup = json!({"metadata": {"name": "b"}, "spec": {"statefulSet": "pg"},
                            "status": {"phase": "Snapshotting", "deadline": "2026-11-22T12:00:00Z"}});
        let facts = ClusterFacts {
            backups: HoldingBackup::from_json(&backup).into_iter().collect(),
            ..ClusterFacts::default()
        };
        assert_eq!(
            found(&set("true", 1, false), &set("false", 1, false), &facts),
            ["removed while the backup b is Snapshotting"]
        );
    }
}
