//! `anti-affinity`: protected databases keep away from each other.
//!
//! **Intent.** With all databases on one node, one node's death is every database's outage, and every failover at once.
//! The tools that check anti-affinity skip sets of one replica, but it is between sets that it matters here.
//!
//! **Fields.** `spec.template.spec.affinity.podAntiAffinity`: at least one term, required or preferred, per host or
//! zone, whose selector matches every protected pod (by `howdah.dev/protect` alone) and the pod itself. A term that asks
//! for that label and cannot match its own pod is a mistake and is reported, too.
//!
//! **Fix.** Use the label alone in the selector, and keep it on the pod template.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{
    Check, ClusterFacts, Filling, Finding, Floor, Refusal, Rule, Subject, Target, json as raw, selector,
};
use crate::names;

/// The rule.
pub const RULE: Rule = Rule {
    id: "anti-affinity",
    intent: "Protected databases prefer different nodes, so that a node's death does not take them all.",
    fields: &["spec.template.spec.affinity.podAntiAffinity", "spec.template.metadata.labels"],
    fix: "add a podAntiAffinity term with topologyKey kubernetes.io/hostname and matchLabels howdah.dev/protect: \"true\", \
          and the same label to the pod template",
    targets: &[Target::StatefulSet],
    refusal: Refusal::Policy,
    check: Check::State(check),
    filling: Some(Filling {
        says: "a preferred term of weight 100 against all other protected pods, per host, where no term does that",
        fill,
    }),
    floor: Floor::silent("the webhook fills it in, so that its absence means nothing while there is none"),
};

const FIELD: &str = "spec.template.spec.affinity.podAntiAffinity";
const ANTI_AFFINITY: [&str; 5] = ["spec", "template", "spec", "affinity", "podAntiAffinity"];
const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";
/// Domains that keep two pods on different nodes.
const TOPOLOGY_KEYS: [&str; 2] = ["kubernetes.io/hostname", "topology.kubernetes.io/zone"];
/// Strongest preference there is. Not a requirement: after the loss of a node, sharing one beats not running.
const WEIGHT: i64 = 100;

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let own = own_labels(subject.object);
    let mut findings = Vec::new();
    for (path, term) in terms(subject.object) {
        if mentions_label(term) && !selects(term, &own) {
            findings.push(
                Finding::new(format!("{path}.labelSelector"), "a selector that its own pod does not match", "one that it matches")
                    .fix("make the selector match the labels of the pod template: two pods that do not match each other's term do not avoid each other"),
            );
        }
    }
    if !terms(subject.object).iter().any(|(_, term)| keeps_apart(term, &own)) {
        findings.push(Finding::new(FIELD, "no term against the other protected databases", "at least one"));
    }
    findings
}

fn fill(object: &mut Value, _: &ClusterFacts) {
    let own = own_labels(object);
    let default = default_term();
    // A template that could not be stamped with the label would not match the default either.
    if !selects(&default, &own) || terms(object).iter().any(|(_, term)| keeps_apart(term, &own)) {
        return;
    }
    let Some(anti_affinity) = raw::object_mut(object, &ANTI_AFFINITY) else { return };
    let preferred = anti_affinity.entry(PREFERRED).or_insert(Value::Null);
    if preferred.is_null() {
        *preferred = json!([]);
    }
    if let Some(terms) = preferred.as_array_mut() {
        terms.push(json!({"weight": WEIGHT, "podAffinityTerm": default}));
    }
}

/// The term that howdah fills in: against protected pods of every namespace.
pub(super) fn default_term() -> Value {
    json!({
        "labelSelector": {"matchLabels": {names::PROTECT_LABEL: names::PROTECT_VALUE}},
        "namespaceSelector": {},
        "topologyKey": TOPOLOGY_KEYS[0],
    })
}

fn own_labels(object: &Value) -> BTreeMap<String, String> {
    raw::strings(object, &["spec", "template", "metadata", "labels"])
}

/// Every anti-affinity term with its path.
fn terms(object: &Value) -> Vec<(String, &Value)> {
    let Some(anti_affinity) = raw::at(object, &ANTI_AFFINITY) else { return Vec::new() };
    let required = raw::list(anti_affinity, &[REQUIRED]).iter().enumerate();
    let required = required.map(|(i, term)| (format!("{FIELD}.{REQUIRED}[{i}]"), term));
    let preferred = raw::list(anti_affinity, &[PREFERRED]).iter().enumerate();
    let preferred = preferred.filter_map(|(i, weighted)| {
        Some((format!("{FIELD}.{PREFERRED}[{i}].podAffinityTerm"), raw::at(weighted, &["podAffinityTerm"])?))
    });
    required.chain(preferred).collect()
}

/// Whether the term keeps this pod away from every other protected pod.
fn keeps_apart(term: &Value, own: &BTreeMap<String, String>) -> bool {
    // The label is all that protected pods are known to share.
    let shared = BTreeMap::from([(names::PROTECT_LABEL.to_owned(), names::PROTECT_VALUE.to_owned())]);
    let topology = raw::string(term, &["topologyKey"]).unwrap_or_default();
    // These keys narrow the selector to pods that share (or do not share) further labels.
    let narrowed =
        ["matchLabelKeys", "mismatchLabelKeys"].iter().any(|key| !raw::list(term, &[key]).is_empty());
    TOPOLOGY_KEYS.contains(&topology) && !narrowed && selects(term, &shared) && selects(term, own)
}

fn mentions_label(term: &Value) -> bool {
    raw::at(term, &["labelSelector", "matchLabels", names::PROTECT_LABEL]).is_some()
        || raw::list(term, &["labelSelector", "matchExpressions"])
            .iter()
            .any(|expression| raw::string(expression, &["key"]) == Some(names::PROTECT_LABEL))
}

/// Whether the selector of the term matches these labels.
fn selects(term: &Value, labels: &BTreeMap<String, String>) -> bool {
    selector::selects(raw::at(term, &["labelSelector"]), labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::testing;

    fn object(labels: Value, anti_affinity: Value) -> Value {
        json!({"spec": {"template": {
            "metadata": {"labels": labels},
            "spec": {"affinity": {"podAntiAffinity": anti_affinity}},
        }}})
    }

    fn fields(object: &Value) -> Vec<String> {
        let findings = testing::findings(&RULE, object, &ClusterFacts::default());
        findings.into_iter().map(|finding| finding.field.replace(FIELD, "")).collect()
    }

    fn required(labels: &Value, selector: Value, topology: &str) -> Vec<String> {
        fields(&object(
            labels.clone(),
            json!({REQUIRED: [{"labelSelector": selector, "topologyKey": topology}]}),
        ))
    }

    #[test]
    fn a_term_counts_when_it_matches_all_protected_pods_and_its_own() {
        let own = json!({"app": "pg", names::PROTECT_LABEL: "true"});
        let host = TOPOLOGY_KEYS[0];
        let by_label = json!({"matchLabels": {names::PROTECT_LABEL: "true"}});
        assert!(required(&own, by_label.clone(), host).is_empty());
        assert!(required(&own, by_label.clone(), TOPOLOGY_KEYS[1]).is_empty());
        let exists = json!({"matchExpressions": [{"key": names::PROTECT_LABEL, "operator": "Exists"}]});
        assert!(required(&own, exists, host).is_empty());
        let everything = json!({});
        assert!(required(&own, everything, host).is_empty());
        assert_eq!(required(&own, by_label, "example.com/rack").len(), 1, "not known to be another node");
        assert_eq!(
            required(&own, json!({"matchLabels": {"app": "pg"}}), host).len(),
            1,
            "others may be called otherwise"
        );
        assert_eq!(fields(&object(own, json!(null))), [""]);
    }

    #[test]
    fn a_term_that_cannot_match_its_own_pod_is_named() {
        let host = TOPOLOGY_KEYS[0];
        let selector = json!({"matchLabels": {names::PROTECT_LABEL: "true"}});
        let found = required(&json!({"app": "pg"}), selector, host);
        assert_eq!(found, [".requiredDuringSchedulingIgnoredDuringExecution[0].labelSelector", ""]);
        let elsewhere = json!({"matchLabels": {"app": "noisy-batch"}});
        let found = required(&json!({"app": "pg", names::PROTECT_LABEL: "true"}), elsewhere, host);
        assert_eq!(found, [""], "keeping away from something else is no mistake");
    }

    #[test]
    fn the_default_term_satisfies_the_rule_and_is_added_once() {
        let own = json!({"app": "pg", names::PROTECT_LABEL: "true"});
        let other = json!({"weight": 1, "podAffinityTerm": {
            "labelSelector": {"matchLabels": {"app": "pg"}}, "topologyKey": TOPOLOGY_KEYS[0],
        }});
        let mut filled = object(own, json!({PREFERRED: [other]}));
        fill(&mut filled, &ClusterFacts::default());
        assert!(fields(&filled).is_empty());
        let once = filled.clone();
        fill(&mut filled, &ClusterFacts::default());
        assert_eq!(filled, once);
        assert_eq!(terms(&filled).len(), 2);
    }
}
