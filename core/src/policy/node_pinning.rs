//! `node-pinning`: there is another node to go to.
//!
//! **Intent.** A database that is bound to one node dies with it: neither a drain nor a failover can move it, although its
//! data on Ceph is within reach of every node.
//!
//! **Fields.** `spec.template.spec.nodeName`, a `nodeSelector` or required `nodeAffinity` that leaves a single host, and
//! volumes that can be mounted on a single node only. Pools of nodes and zones pass, and so do two hosts.
//!
//! **Fix.** Select nodes by a label that several carry, such as a node pool, a zone or a role.

use serde_json::Value;

use super::claims::{data_claims, resolve};
use super::floor::{Floor, Twin};
use super::{Check, Finding, Refusal, Rule, Subject, Target, json};

/// The rule.
pub const RULE: Rule = Rule {
    id: "node-pinning",
    intent: "The database is not bound to one node, so that it can move when that node fails or is drained.",
    fields: &[
        "spec.template.spec.nodeName",
        "spec.template.spec.nodeSelector",
        "spec.template.spec.affinity.nodeAffinity",
        "spec.volumeClaimTemplates[*]",
    ],
    fix: "select nodes by a label that several of them carry (a pool, a zone, a role), or prefer the node instead of requiring it",
    targets: &[Target::StatefulSet],
    refusal: Refusal::Policy,
    check: Check::State(check),
    filling: None,
    floor: FLOOR,
};

const POD: [&str; 3] = ["spec", "template", "spec"];
const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
/// The label and the field that only one node has.
const HOSTNAME: &str = "kubernetes.io/hostname";
const NODE_NAME: &str = "metadata.name";
const WANTED: &str = "at least two nodes to choose from";

const FLOOR: Floor = Floor {
    twins: &[Twin { target: Target::StatefulSet, findings: CEL }],
    makes: |finding| finding.field.ends_with(".nodeName") || finding.field.contains(".nodeSelector["),
    leaves: Some("node affinity, and volumes, which have to be looked up"),
};

const CEL: &str = r#"(it.spec.template.spec.?nodeName.orValue("") != ""
    ? ["spec.template.spec.nodeName is " + it.spec.template.spec.nodeName + ", wanted absent"]
    : []) +
  (it.spec.template.spec.?nodeSelector[?"kubernetes.io/hostname"].hasValue()
    ? ["spec.template.spec.nodeSelector[kubernetes.io/hostname] is " +
      it.spec.template.spec.nodeSelector["kubernetes.io/hostname"] + ", wanted at least two nodes to choose from"]
    : [])"#;

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let Some(pod) = json::at(subject.object, &POD) else { return Vec::new() };
    let mut findings = Vec::new();
    if let Some(node) = json::string(pod, &["nodeName"]).filter(|node| !node.is_empty()) {
        findings.push(Finding::new("spec.template.spec.nodeName", node, "absent"));
    }
    if let Some(node) = json::string(pod, &["nodeSelector", HOSTNAME]) {
        findings.push(Finding::new(format!("spec.template.spec.nodeSelector[{HOSTNAME}]"), node, WANTED));
    }
    let affinity = ["affinity", "nodeAffinity", REQUIRED, "nodeSelectorTerms"];
    if let Some(node) = only_node(json::list(pod, &affinity)) {
        let field = format!("spec.template.spec.affinity.nodeAffinity.{REQUIRED}");
        findings.push(Finding::new(field, format!("{node} alone"), WANTED));
    }
    for claim in data_claims(subject.object) {
        let backing = resolve(&claim, subject.request.namespace, subject.facts);
        if let Some((what, node)) = backing.ok().and_then(|backing| Some((backing.what, backing.node?))) {
            let found = format!("{what}, which only {node} can mount");
            findings.push(
                Finding::new(claim.field, found, "a volume that every node can mount")
                    .fix("move the data to a volume of Ceph RBD"),
            );
        }
    }
    findings
}

/// The one node that these terms of a node selector leave; `None` when they leave several. One of the terms is enough for
/// a node, and all expressions of a term are needed.
#[must_use]
pub(super) fn only_node(terms: &[Value]) -> Option<&str> {
    let mut nodes = terms.iter().map(|term| {
        let expressions = [("matchExpressions", HOSTNAME), ("matchFields", NODE_NAME)];
        expressions.into_iter().find_map(|(list, key)| {
            json::list(term, &[list]).iter().find_map(|expression| {
                let names_one = json::string(expression, &["key"]) == Some(key)
                    && json::string(expression, &["operator"]) == Some("In");
                match json::list(expression, &["values"]) {
                    [node] if names_one => node.as_str(),
                    _ => None,
                }
            })
        })
    });
    let first = nodes.next()??;
    nodes.all(|node| node == Some(first)).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Claim, ClusterFacts, Volume, testing};
    use serde_json::json;

    fn fields(pod: Value) -> Vec<String> {
        let object = json!({"spec": {"template": {"spec": pod}}});
        let found = testing::findings(&RULE, &object, &ClusterFacts::default());
        found.into_iter().map(|finding| finding.field.replace("spec.template.spec.", "")).collect()
    }

    fn required(terms: Value) -> bool {
        !fields(json!({"affinity": {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": terms}}}})).is_empty()
    }

    fn hosts(names: &[&str]) -> Value {
        json!({"matchExpressions": [{"key": HOSTNAME, "operator": "In", "values": names}]})
    }

    #[test]
    fn one_node_is_found_however_it_is_named() {
        assert_eq!(fields(json!({"nodeName": "a"})), ["nodeName"]);
        assert_eq!(
            fields(json!({"nodeSelector": {HOSTNAME: "a"}})),
            ["nodeSelector[kubernetes.io/hostname]"]
        );
        assert!(required(json!([hosts(&["a"])])));
        assert!(required(json!([hosts(&["a"]), hosts(&["a"])])));
        let field = json!({"matchFields": [{"key": NODE_NAME, "operator": "In", "values": ["a"]}]});
        assert!(required(json!([field])));
    }

    #[test]
    fn two_nodes_pools_and_preferences_pass() {
        assert!(fields(json!({"nodeName": "", "nodeSelector": {"pool": "databases"}})).is_empty());
        assert!(!required(json!([hosts(&["a", "b"])])));
        assert!(!required(json!([hosts(&["a"]), hosts(&["b"])])), "either is enough");
        let pool = json!({"matchExpressions": [{"key": "pool", "operator": "In", "values": ["databases"]}]});
        assert!(!required(json!([hosts(&["a"]), pool])));
        let not = json!({"matchExpressions": [{"key": HOSTNAME, "operator": "NotIn", "values": ["a"]}]});
        assert!(!required(json!([not])) && !required(json!([])));
        let preferred = json!([{"weight": 1, "preference": hosts(&["a"])}]);
        let affinity =
            json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}});
        assert!(fields(json!({"affinity": affinity})).is_empty());
    }

    #[test]
    fn a_volume_of_one_node_is_found() {
        let object = json!({"metadata": {"name": "pg"}, "spec": {"template": {"spec": {"volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": "by-hand"}},
        ]}}}});
        let volume = json!({"spec": {"local": {"path": "/disk"}, "nodeAffinity": {"required": {"nodeSelectorTerms": [hosts(&["a"])]}}}});
        let facts = ClusterFacts {
            claims: [("by-hand".to_owned(), Claim { volume: Some("disk".to_owned()), ..Claim::default() })]
                .into(),
            volumes: [("disk".to_owned(), Volume::from_json(&volume))].into(),
            ..ClusterFacts::default()
        };
        let found = testing::findings(&RULE, &object, &facts);
        assert_eq!(found[0].found, "volume disk, which only a can mount");
    }
}
