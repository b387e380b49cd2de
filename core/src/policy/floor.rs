//! The floor: what the API server refuses by itself, in CEL, while no webhook serves.
//!
//! A rule that can be judged from the request alone has a twin in CEL in its own file ([`Floor`]). From them
//! [`manifests`] makes ValidatingAdmissionPolicies with the same modes, exemptions and ratchet as [`super::validate`].
//! The floor never refuses what the webhook would let pass; where it cannot know, it is silent.
//!
//! - **Clock.** CEL has none, so the floor reads the time from the object: the API server has just stamped it
//!   (`creationTimestamp`, `managedFields[*].time`). An exemption counts as ended only when one of these stamps is past it:
//!   it may be honoured for longer than its date, never for less.
//! - **Parents.** CEL sees one object. Of a Scale the floor knows only the uid of its StatefulSet, so howdah keeps a list
//!   of those that are protected in each namespace ([`protected_sets`]), and the policy reads that.
//! - **Who speaks first.** The API server asks policies before validating webhooks, and a policy says less. A webhook that
//!   serves is asked before both, to fill in defaults: it then marks what it is going to refuse ([`refuses`]), and the
//!   floor leaves that to it, so that the user gets every finding and the webhook counts it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Context, Effect, Finding, Outcome, RULES, Refusal, Rule, Target, json as raw, users};
use crate::names;

/// Most StatefulSets in the list of one namespace; an object of the API server is bounded (1.5 MiB), and a thousand are
/// some 200 KiB. Those beyond it, by name, are guarded by the webhook alone.
pub const SETS_MAX: usize = 1000;

/// What of a rule the API server can hold without the webhook.
#[derive(Debug, Clone, Copy)]
pub struct Floor {
    /// The twins in CEL, one for each target that has one.
    pub twins: &'static [Twin],
    /// Which findings of the rule its twins make, too.
    pub makes: fn(&Finding) -> bool,
    /// What is left to the webhook and why, as a clause; `None` when nothing is.
    pub leaves: Option<&'static str>,
}

/// A rule in CEL.
#[derive(Debug, Clone, Copy)]
pub struct Twin {
    /// What it judges.
    pub target: Target,
    /// A list of strings, one for each violation in the object `it`: "FIELD is FOUND, wanted WANTED".
    pub findings: &'static str,
}

impl Floor {
    /// A rule that only the webhook can hold, and why.
    #[must_use]
    pub const fn silent(why: &'static str) -> Self {
        Self { twins: &[], makes: |_| false, leaves: Some(why) }
    }

    /// Whether the API server judges this kind of request by the rule.
    pub(super) fn has_twin(&self, target: Target) -> bool {
        self.twins.iter().any(|twin| twin.target == target)
    }
}

/// One protected StatefulSet, as the API server gets to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProtectedSet {
    /// Its name.
    pub name: String,
    /// Its uid: one of the same name that is made later is another.
    pub uid: String,
    /// The rules that are in force for it: not exempted from when howdah last looked.
    pub refuses: Vec<String>,
}

/// A list that is not as it has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Where.
    pub namespace: String,
    /// What has to stand in it; empty when it is to be removed.
    pub sets: Vec<ProtectedSet>,
}

/// Whether the floor refuses what was found, too. On creation and change of a StatefulSet the webhook marks the object by
/// this.
#[must_use]
pub fn refuses(outcome: &Outcome) -> bool {
    outcome.effect == Effect::Deny && (outcome.rule.floor.makes)(&outcome.finding)
}

/// Marks `object` as one that the webhook is going to refuse.
pub(super) fn mark(object: &mut Value) {
    raw::set(object, &["metadata", "annotations"], names::WEBHOOK_ANSWERS, json!("true"));
}

/// The list of every namespace that has one, from the metadata of all protected StatefulSets.
#[must_use]
pub fn protected_sets(sets: &[Value], now: Timestamp) -> BTreeMap<String, Vec<ProtectedSet>> {
    let today = super::today(now);
    let mut lists: BTreeMap<String, Vec<ProtectedSet>> = BTreeMap::new();
    for set in sets.iter().filter(|set| super::has_a_say(set)) {
        let text = |key: &str| raw::string(set, &["metadata", key]).unwrap_or_default().to_owned();
        let (settings, made_by) = (super::readable_settings(set).0, super::made_by(set));
        let context = Context { settings: &settings, made_by: made_by.as_deref(), today };
        let any = Finding::new("", "", "");
        let refuses: Vec<String> = RULES
            .iter()
            .filter(|rule| rule.floor.twins.iter().any(|twin| twin.target != Target::StatefulSet))
            .filter(|rule| context.weigh(rule, &any, false).0 == Effect::Deny)
            .map(|rule| rule.id.to_owned())
            .collect();
        if !refuses.is_empty() {
            let set = ProtectedSet { name: text("name"), uid: text("uid"), refuses };
            lists.entry(text("namespace")).or_default().push(set);
        }
    }
    for list in lists.values_mut() {
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list.truncate(SETS_MAX);
    }
    lists
}

/// What has to be written so that the lists `found` become those `wanted`.
#[must_use]
pub fn changes(
    wanted: BTreeMap<String, Vec<ProtectedSet>>,
    found: &BTreeMap<String, Vec<ProtectedSet>>,
) -> Vec<Change> {
    let gone = found.keys().filter(|namespace| !wanted.contains_key(*namespace));
    let gone: Vec<Change> =
        gone.map(|namespace| Change { namespace: namespace.clone(), sets: Vec::new() }).collect();
    let other = wanted.into_iter().filter(|(namespace, sets)| found.get(namespace) != Some(sets));
    other.map(|(namespace, sets)| Change { namespace, sets }).chain(gone).collect()
}

/// How one kind of request is policed.
struct Place {
    target: Target,
    /// Name of the policy and its binding.
    name: &'static str,
    /// The word for what is protected, in a denial.
    kind: &'static str,
    group: &'static str,
    resource: &'static str,
    operations: &'static [&'static str],
    /// CEL: which entries `set` of the list govern the request; `None` where the object governs itself.
    parent: Option<&'static str>,
}

const PLACES: [Place; 3] = [
    Place {
        target: Target::StatefulSet,
        name: "howdah-statefulsets",
        kind: "StatefulSet",
        group: "apps",
        resource: "statefulsets",
        operations: &["CREATE", "UPDATE"],
        parent: None,
    },
    Place {
        target: Target::Scale,
        name: "howdah-scale",
        kind: "StatefulSet",
        group: "apps",
        resource: "statefulsets/scale",
        operations: &["UPDATE"],
        parent: Some("set.uid == object.metadata.uid"),
    },
    Place {
        target: Target::Pod,
        name: "howdah-pods",
        kind: "Pod",
        group: "",
        resource: "pods",
        operations: &["DELETE"],
        parent: Some(
            "oldObject.metadata.?ownerReferences.orValue([]).exists(owner, owner.?controller.orValue(false) && \
             owner.uid == set.uid)",
        ),
    },
];

impl Place {
    /// The object that is judged, and what stands beside it for the ratchet.
    fn objects(&self) -> &'static str {
        if self.is_deletion() { "[oldObject, object]" } else { "[object, oldObject]" }
    }

    fn object(&self) -> &'static str {
        if self.is_deletion() { "oldObject" } else { "object" }
    }

    fn is_deletion(&self) -> bool {
        self.operations == ["DELETE"]
    }
}

/// The variables that hold the denials.
const POLICY: &str = "denied";
const INVALID: &str = "unreadable";
/// The end of an exemption, as a regular expression.
const UNTIL: &str = "until=[0-9]{4}-[0-9]{2}-[0-9]{2}";

/// Every ValidatingAdmissionPolicy with its binding.
#[must_use]
pub fn manifests() -> Vec<Value> {
    PLACES.iter().flat_map(|place| [policy(place), binding(place)]).collect()
}

fn policy(place: &Place) -> Value {
    let rules: Vec<(&Rule, &Twin)> = RULES
        .iter()
        .flat_map(|rule| rule.floor.twins.iter().map(move |twin| (rule, twin)))
        .filter(|(_, twin)| twin.target == place.target)
        .collect();
    let mut spec = json!({
        // An error of an expression must not lock anybody out: the webhook still judges.
        "failurePolicy": "Ignore",
        "matchConstraints": {
            "namespaceSelector": {"matchExpressions": [{
                "key": "kubernetes.io/metadata.name",
                "operator": "NotIn",
                "values": names::EXCLUDED_NAMESPACES,
            }]},
            "resourceRules": [{
                "apiGroups": [place.group],
                "apiVersions": ["v1"],
                "resources": [place.resource],
                "operations": place.operations,
                "scope": "Namespaced",
            }],
        },
        "matchConditions": conditions(place),
        "variables": variables(place, &rules),
        "validations": validations(place, &rules),
    });
    if place.parent.is_none() {
        spec["matchConstraints"]["objectSelector"] =
            json!({"matchLabels": {names::PROTECT_LABEL: names::PROTECT_VALUE}});
    } else {
        let kind =
            json!({"apiVersion": format!("{}/{}", names::GROUP, names::VERSION), "kind": "ProtectedSets"});
        spec["paramKind"] = kind;
    }
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": place.name},
        "spec": spec,
    })
}

/// Which requests are judged at all.
fn conditions(place: &Place) -> Vec<Value> {
    let group = names::BREAK_GLASS_GROUP;
    let mut conditions = vec![named(
        "not-break-glass",
        format!("!has(request.userInfo.groups) || !({group:?} in request.userInfo.groups)"),
    )];
    if place.parent.is_none() {
        let (label, value, mark) = (names::PROTECT_LABEL, names::PROTECT_VALUE, names::WEBHOOK_ANSWERS);
        conditions.extend([
            // The selector also matches what carried the label before.
            named("protected", format!("object.metadata.?labels[?{label:?}].orValue(\"\") == {value:?}")),
            named("not-on-its-way-out", "!has(object.metadata.deletionTimestamp)".to_owned()),
            // Of what an operator made, the webhook only warns.
            named(
                "not-made-by-an-operator",
                "!object.metadata.?ownerReferences.orValue([]).exists(owner, owner.?controller.orValue(false))"
                    .to_owned(),
            ),
            named(
                "not-refused-by-the-webhook",
                format!(
                    "!object.metadata.?annotations[?{mark:?}].hasValue() ||\n\
                     (oldObject != null && oldObject.metadata.?annotations[?{mark:?}].hasValue())"
                ),
            ),
        ]);
    }
    if place.is_deletion() {
        let cleaners: Vec<String> = users::cleaners().collect();
        conditions.extend([
            named("not-the-control-plane", format!("!(request.userInfo.username in {cleaners:?})")),
            named(
                "not-its-kubelet",
                "request.userInfo.username != \"system:node:\" + oldObject.spec.?nodeName.orValue(\"\")"
                    .to_owned(),
            ),
            named("not-with-its-namespace", "!has(namespaceObject.metadata.deletionTimestamp)".to_owned()),
        ]);
    }
    conditions
}

fn variables(place: &Place, rules: &[(&Rule, &Twin)]) -> Vec<Value> {
    let mut variables = Vec::new();
    if place.parent.is_none() {
        let ids: Vec<&str> =
            rules.iter().filter(|(rule, _)| rule.exemption().is_some()).map(|(rule, _)| rule.id).collect();
        variables.extend([
            named("settings", "object.metadata.?annotations.orValue({})".to_owned()),
            // Stamps of the API server, as days; the newest of a request that changes something is now.
            named(
                "days",
                "([object.metadata.?creationTimestamp] + \
                 object.metadata.?managedFields.orValue([]).map(entry, entry.?time))\n  \
                 .filter(stamp, stamp.hasValue())\n  \
                 .map(stamp, string(stamp.value()).substring(0, 10))"
                    .to_owned(),
            ),
            // What looks like an exemption counts as one: whether it can be read is for the webhook to say.
            named(
                "exempt",
                format!(
                    "{ids:?}.filter(rule,\n  \
                     variables.settings[?{:?}].orValue(\"enforce\").trim() in [\"warn\", \"audit\"] ||\n  \
                     [variables.settings[?({:?} + rule)].orValue(\"\")].exists(text,\n    \
                     text.contains(\"until=\") && text.contains(\"reason=\") &&\n    \
                     !(text.matches(\"{UNTIL}\") && text.findAll(\"{UNTIL}\").all(until,\n      \
                     variables.days.exists(day, \"until=\" + day > until)))))",
                    names::MODE,
                    names::EXEMPT_PREFIX,
                ),
            ),
        ]);
    }
    for (rule, twin) in rules {
        let found = format!("{}.map(it, it == null ? [] : {})", place.objects(), twin.findings);
        variables.push(named(&identifier(rule), found));
    }
    for (name, invalid) in [(POLICY, false), (INVALID, true)] {
        let denials: Vec<String> = rules
            .iter()
            .filter(|(rule, _)| is_invalid(rule) == invalid)
            .map(|(rule, _)| denials(place, rule))
            .collect();
        if !denials.is_empty() {
            variables.push(named(name, denials.join(" +\n")));
        }
    }
    variables
}

/// CEL: what of the rule is denied, each explained: found in the new object, not in the old one, and the rule in force.
fn denials(place: &Place, rule: &Rule) -> String {
    let found = format!("variables.{}", identifier(rule));
    let exempt = match rule.exemption() {
        Some(annotation) => {
            format!("; exempt: annotate the StatefulSet with {annotation}=\"until=YYYY-MM-DD reason=...\"")
        }
        None => String::new(),
    };
    let (before, after) = (format!("[{}] ", rule.id), format!(" (fix: {}{exempt})", rule.fix));
    let explained =
        format!("{found}[0].filter(new, !(new in {found}[1]))\n  .map(new, {before:?} + new + {after:?})");
    let in_force = match place.parent {
        Some(governs) => format!("params.spec.sets.exists(set, {governs} && {:?} in set.refuses)", rule.id),
        None if rule.exemption().is_some() => format!("!({:?} in variables.exempt)", rule.id),
        None => return explained,
    };
    format!("({in_force} ? {explained} : [])")
}

/// One for each kind of refusal, because a validation has one status; the first says everything.
fn validations(place: &Place, rules: &[(&Rule, &Twin)]) -> Vec<Value> {
    let lists = [
        (POLICY, false, "Forbidden", "against howdah's policy: see docs/reference/rules.md"),
        (INVALID, true, "Invalid", "an annotation of howdah cannot be read: see docs/reference/rules.md"),
    ];
    let present: Vec<_> = lists
        .iter()
        .filter(|(_, invalid, ..)| rules.iter().any(|(rule, _)| is_invalid(rule) == *invalid))
        .collect();
    let all: Vec<String> = present.iter().map(|(list, ..)| format!("variables.{list}")).collect();
    // On one line: the API server drops a message with a line break.
    let message = format!(
        "\"howdah protects {} \" + request.namespace + \"/\" + {}.metadata.name + \": \" + ({}).join(\", \")",
        place.kind,
        place.object(),
        all.join(" + ")
    );
    present
        .iter()
        .map(|(list, _, reason, short)| {
            json!({
                "expression": format!("size(variables.{list}) == 0"),
                "reason": reason,
                "message": short,
                "messageExpression": message,
            })
        })
        .collect()
}

fn binding(place: &Place) -> Value {
    let mut spec = json!({"policyName": place.name, "validationActions": ["Deny"]});
    if place.parent.is_some() {
        // No list means no protected StatefulSet that anybody knows of.
        spec["paramRef"] = json!({"name": names::PROTECTED_SETS, "parameterNotFoundAction": "Allow"});
    }
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": place.name},
        "spec": spec,
    })
}

/// A named expression.
fn named(name: &str, expression: String) -> Value {
    json!({"name": name, "expression": expression})
}

/// Whether the rule is about what cannot be read, and not about what is forbidden.
fn is_invalid(rule: &Rule) -> bool {
    rule.refusal == Refusal::Invalid
}

/// The id of the rule as a name in CEL.
fn identifier(rule: &Rule) -> String {
    rule.id.replace('-', "_")
}

/// What the floor holds of each rule, as a Markdown table.
#[must_use]
pub fn reference() -> String {
    let mut text =
        String::from("| rule | held by the API server alone | left to the webhook |\n|---|---|---|\n");
    for rule in &RULES {
        let mut held: Vec<&str> = rule.floor.twins.iter().map(|twin| twin.target.as_str()).collect();
        if held.is_empty() {
            held.push("nothing");
        }
        text.push_str(&format!(
            "| [`{0}`](rules.md#{0}) | {1} | {2} |\n",
            rule.id,
            held.join(", "),
            rule.floor.leaves.unwrap_or("nothing")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2026-11-22T12:00:00Z".parse().unwrap()
    }

    fn set(name: &str, annotations: Value) -> Value {
        json!({"metadata": {
            "namespace": "shop", "name": name, "uid": format!("uid-of-{name}"),
            "labels": {names::PROTECT_LABEL: "true"}, "annotations": annotations,
        }})
    }

    fn refused(set: Value) -> Vec<String> {
        let mut lists = protected_sets(&[set], now());
        lists.remove("shop").into_iter().flatten().flat_map(|set| set.refuses).collect()
    }

    #[test]
    fn a_list_has_the_rules_that_are_in_force() {
        let rule = "single-replica".to_owned();
        assert!(refused(set("pg", json!({}))).contains(&rule));
        for mode in ["warn", "audit"] {
            assert!(refused(set("pg", json!({names::MODE: mode}))).is_empty(), "{mode}");
        }
        let exempt =
            |until: &str| json!({"howdah.dev/exempt.single-replica": format!("until={until} reason=moving")});
        assert!(!refused(set("pg", exempt("2026-11-22"))).contains(&rule));
        assert!(refused(set("pg", exempt("2026-11-21"))).contains(&rule), "it ended");
        let mut leaving = set("pg", json!({}));
        leaving["metadata"]["deletionTimestamp"] = json!("2026-11-22T00:00:00Z");
        assert!(refused(leaving).is_empty());
        let mut made = set("pg", json!({}));
        made["metadata"]["ownerReferences"] = json!([{"kind": "Cluster", "name": "c", "controller": true}]);
        assert!(!refused(made).contains(&rule), "of what an operator made, it is only warned");
        let mut unprotected = set("pg", json!({}));
        unprotected["metadata"]["labels"] = json!({});
        assert!(refused(unprotected).is_empty());
    }

    #[test]
    fn a_list_is_sorted_and_bounded() {
        let sets: Vec<Value> = (0..=SETS_MAX).rev().map(|i| set(&format!("pg-{i:04}"), json!({}))).collect();
        let list = &protected_sets(&sets, now())["shop"];
        assert_eq!((list.len(), list[0].name.as_str()), (SETS_MAX, "pg-0000"));
        assert!(list.is_sorted_by(|a, b| a.name < b.name));
    }

    #[test]
    fn only_what_differs_is_written() {
        let list = |name: &str| protected_sets(&[set(name, json!({}))], now())["shop"].clone();
        let lists = |entries: &[(&str, &str)]| -> BTreeMap<String, Vec<ProtectedSet>> {
            entries.iter().map(|(namespace, name)| ((*namespace).to_owned(), list(name))).collect()
        };
        let wanted = lists(&[("same", "pg"), ("other", "new"), ("missing", "pg")]);
        let found = lists(&[("same", "pg"), ("other", "old"), ("left", "pg")]);
        let written: Vec<(String, usize)> =
            changes(wanted, &found).into_iter().map(|change| (change.namespace, change.sets.len())).collect();
        assert_eq!(written, [("missing".to_owned(), 1), ("other".to_owned(), 1), ("left".to_owned(), 0)]);
    }

    #[test]
    fn every_twin_has_a_policy_and_says_what_is_left() {
        for rule in &RULES {
            for twin in rule.floor.twins {
                assert!(PLACES.iter().any(|place| place.target == twin.target), "{}", rule.id);
                assert!(twin.findings.contains("it."), "{}", rule.id);
            }
            assert!(!rule.floor.twins.is_empty() || rule.floor.leaves.is_some(), "{}", rule.id);
        }
    }
}
