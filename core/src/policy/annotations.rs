//! `annotations`: what stands in howdah's annotations can be read.
//!
//! **Intent.** A schedule, a zone or a retention that does not parse is refused at `kubectl apply`, while somebody is
//! looking, and not ignored at three in the morning. The same goes for an exemption from a rule that does not exist
//! or whose date has passed: it would exempt nothing.
//!
//! **Fields.** `metadata.annotations[howdah.dev/*]`. On an unprotected object they mean nothing and are not read.
//!
//! **Fix.** Correct the value, or remove the annotation.

use super::floor::{Floor, Twin};
use super::{Check, Finding, Refusal, Rule, Subject, Target};
use crate::annotations::nearest;
use crate::names;

/// The rule.
pub const RULE: Rule = Rule {
    id: "annotations",
    intent: "Every annotation of howdah can be read, so that none is silently ignored.",
    fields: &["metadata.annotations[howdah.dev/*]"],
    fix: "correct the value, or remove the annotation",
    targets: &[Target::StatefulSet],
    refusal: Refusal::Invalid,
    check: Check::State(check),
    filling: None,
    floor: FLOOR,
};

const FLOOR: Floor = Floor {
    twins: &[Twin { target: Target::StatefulSet, findings: CEL }],
    makes: |finding| WORDS.iter().any(|key| finding.field == field(key)),
    leaves: Some("schedules, zones, retention, names and exemptions, whose grammar CEL does not know"),
};

/// Those whose value is one of a few words.
const WORDS: [&str; 4] = [names::MODE, names::CONSISTENCY, names::SUSPEND, names::FAILOVER];

const CEL: &str = r#"[
    ["howdah.dev/mode", "enforce|warn|audit"],
    ["howdah.dev/consistency", "online|crash|offline"],
    ["howdah.dev/suspend", "true|false"],
    ["howdah.dev/failover", "auto|manual|off"],
  ].filter(one, it.metadata.?annotations[?one[0]].hasValue() &&
    !it.metadata.annotations[one[0]].trim().matches("^(" + one[1] + ")$"))
  .map(one, "metadata.annotations[" + one[0] + "] is \"" + it.metadata.annotations[one[0]] + "\", wanted " + one[1])"#;

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    if !super::is_protected(subject.object) {
        return Vec::new();
    }
    let mut findings: Vec<Finding> = subject
        .unreadable
        .iter()
        .map(|error| {
            let found = format!("{:?}, which {}", error.value, error.problem);
            Finding::new(field(&error.annotation), found, "a value that can be read").fix(error.fix.clone())
        })
        .collect();
    for (id, exemption) in &subject.settings.exemptions {
        let field = field(&format!("{}{id}", names::EXEMPT_PREFIX));
        let exemptible = || super::RULES.iter().filter(|rule| rule.exemption().is_some()).map(|rule| rule.id);
        if !exemptible().any(|known| known == id) {
            let known: Vec<&str> = exemptible().collect();
            let nearest = nearest(id, exemptible()).unwrap_or_default();
            findings.push(
                Finding::new(
                    field,
                    format!("an exemption from {id}"),
                    format!("one of {}", known.join(", ")),
                )
                .fix(format!("use {}{nearest} or remove the annotation", names::EXEMPT_PREFIX)),
            );
        } else if !exemption.holds_on(subject.today()) {
            let found = format!("an exemption until {}, which has passed", exemption.until);
            findings.push(
                Finding::new(field, found, format!("{} or later", subject.today()))
                    .fix("fix the violation and remove the annotation, or decide on a later date"),
            );
        }
    }
    findings
}

fn field(annotation: &str) -> String {
    format!("metadata.annotations[{annotation}]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{ClusterFacts, testing};
    use serde_json::json;

    fn findings(protect: &str, key: &str, value: &str) -> Vec<Finding> {
        let object =
            json!({"metadata": {"labels": {"howdah.dev/protect": protect}, "annotations": {key: value}}});
        testing::findings(&RULE, &object, &ClusterFacts::default())
    }

    #[test]
    fn an_unreadable_value_is_found_on_protected_objects_only() {
        let found = findings("true", "howdah.dev/schedule", "every day");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].field, "metadata.annotations[howdah.dev/schedule]");
        assert!(found[0].found.starts_with("\"every day\""));
        assert!(findings("false", "howdah.dev/schedule", "every day").is_empty());
        assert!(findings("true", "example.com/schedule", "every day").is_empty());
    }

    #[test]
    fn an_exemption_needs_an_existing_rule() {
        let found = findings("true", "howdah.dev/exempt.grace", "until=2027-01-31 reason=old image");
        assert_eq!(found.len(), 1);
        assert!(found[0].fix.as_deref().unwrap().contains("exempt.grace-period"));
        let own = findings("true", "howdah.dev/exempt.annotations", "until=2027-01-31 reason=no time");
        assert_eq!(own.len(), 1, "what cannot be read cannot be exempted");
    }

    #[test]
    fn an_exemption_in_the_past_exempts_nothing() {
        let key = "howdah.dev/exempt.grace-period";
        assert_eq!(findings("true", key, "until=2026-11-21 reason=old image").len(), 1);
        assert!(findings("true", key, "until=2026-11-22 reason=old image").is_empty());
    }
}
