//! `retention-policy`: the data outlives its StatefulSet.
//!
//! **Intent.** `kubectl scale --replicas=0` is how a database is stopped. With `whenScaled: Delete` it also deletes the
//! claim, and with Rook's usual class the image with all its snapshots. `whenDeleted: Delete` does the same to
//! `kubectl delete statefulset`, unless the class retains the volume.
//!
//! **Fields.** `spec.persistentVolumeClaimRetentionPolicy`, with the reclaim policy behind the claim templates.
//!
//! **Fix.** Retain for both, which is also the default.

use serde_json::{Value, json};

use super::claims::{data_claims, resolve};
use super::floor::{Floor, Twin};
use super::{Check, ClusterFacts, Filling, Finding, Refusal, Rule, Subject, Target, Weight, json as raw};

/// The rule.
pub const RULE: Rule = Rule {
    id: "retention-policy",
    intent: "Stopping or deleting the StatefulSet does not delete its data.",
    fields: &[
        "spec.persistentVolumeClaimRetentionPolicy.whenScaled",
        "spec.persistentVolumeClaimRetentionPolicy.whenDeleted",
    ],
    fix: "set it to Retain, or leave it out",
    targets: &[Target::StatefulSet],
    refusal: Refusal::Policy,
    check: Check::State(check),
    filling: Some(Filling { says: "Retain for both, where absent", fill }),
    floor: FLOOR,
};

const FLOOR: Floor = Floor {
    twins: &[Twin { target: Target::StatefulSet, findings: CEL }],
    makes: |finding| finding.field.ends_with(".whenScaled"),
    leaves: Some("whenDeleted, because the reclaim policy of the class has to be looked up"),
};

const CEL: &str = r#"it.spec.?persistentVolumeClaimRetentionPolicy.?whenScaled.orValue("Retain") == "Delete"
  ? ["spec.persistentVolumeClaimRetentionPolicy.whenScaled is Delete, wanted Retain"]
  : []"#;

const POLICY: [&str; 2] = ["spec", "persistentVolumeClaimRetentionPolicy"];

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let Some(policy) = raw::at(subject.object, &POLICY) else { return Vec::new() };
    let field = |name: &str| format!("{}.{name}", POLICY.join("."));
    let mut findings = Vec::new();
    if raw::string(policy, &["whenScaled"]) == Some("Delete") {
        findings.push(Finding::new(field("whenScaled"), "Delete", "Retain"));
    }
    let deleted = raw::string(policy, &["whenDeleted"]) == Some("Delete");
    if let Some((what, weight)) = deleted.then(|| reclaimed(subject)).flatten() {
        let finding = Finding::new(field("whenDeleted"), format!("Delete, on {what}"), "Retain")
            .fix("set it to Retain, or use a class with reclaimPolicy Retain");
        findings.push(Finding { weight, ..finding });
    }
    findings
}

/// The first claim whose data goes with it, and what that weighs. What cannot be followed counts: the proof that it is safe
/// is missing.
fn reclaimed(subject: &Subject<'_>) -> Option<(String, Weight)> {
    let claims = data_claims(subject.object);
    let found = claims.iter().filter(|claim| claim.is_templated()).filter_map(|claim| {
        match resolve(claim, subject.request.namespace, subject.facts) {
            Ok(backing) => {
                let what = format!("{}, which deletes the image", backing.what);
                backing.reclaimed.then_some((what, Weight::Full))
            }
            Err(unresolved) => {
                Some((format!("claim {}, whose class is unknown", claim.name), unresolved.weight))
            }
        }
    });
    // One that is certain says more than an open one.
    found.min_by_key(|(_, weight)| *weight == Weight::Open)
}

fn fill(object: &mut Value, _: &ClusterFacts) {
    let Some(policy) = raw::object_mut(object, &POLICY) else { return };
    for name in ["whenDeleted", "whenScaled"] {
        let value = policy.entry(name).or_insert(Value::Null);
        if value.is_null() {
            *value = json!("Retain");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{StorageClass, testing};

    fn fields(scaled: &str, deleted: &str, class: &str) -> Vec<String> {
        let object = json!({"metadata": {"name": "pg"}, "spec": {
            "persistentVolumeClaimRetentionPolicy": {"whenScaled": scaled, "whenDeleted": deleted},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"storageClassName": class}}],
        }});
        let class = |reclaim_policy: &str| StorageClass {
            provisioner: "rbd.csi.ceph.com".to_owned(),
            reclaim_policy: reclaim_policy.to_owned(),
            default: false,
            created: String::new(),
            ..StorageClass::default()
        };
        let facts = ClusterFacts {
            storage_classes: [("kept".to_owned(), class("Retain")), ("gone".to_owned(), class("Delete"))]
                .into(),
            ..ClusterFacts::default()
        };
        let findings = testing::findings(&RULE, &object, &facts);
        findings
            .into_iter()
            .map(|finding| finding.field.replace("spec.persistentVolumeClaimRetentionPolicy.", ""))
            .collect()
    }

    #[test]
    fn deletion_is_refused_where_it_reaches_the_image() {
        assert!(fields("Retain", "Retain", "gone").is_empty());
        assert_eq!(fields("Delete", "Retain", "kept"), ["whenScaled"]);
        assert_eq!(fields("Retain", "Delete", "gone"), ["whenDeleted"]);
        assert!(fields("Retain", "Delete", "kept").is_empty());
        assert_eq!(fields("Retain", "Delete", "unknown"), ["whenDeleted"]);
    }

    #[test]
    fn without_a_cluster_an_unknown_class_stays_open_and_a_known_one_does_not() {
        let class = StorageClass::from_json(&json!({"provisioner": "rbd.csi.ceph.com"}));
        let facts = ClusterFacts {
            storage_classes: [("gone".to_owned(), class)].into(),
            offline: true,
            ..ClusterFacts::default()
        };
        let weights = |classes: &[&str]| {
            let templates: Vec<Value> = classes
                .iter()
                .map(|class| json!({"metadata": {"name": class}, "spec": {"storageClassName": class}}))
                .collect();
            let object = json!({"metadata": {"name": "pg"}, "spec": {
                "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}, "volumeClaimTemplates": templates,
            }});
            let findings = testing::findings(&RULE, &object, &facts);
            findings.into_iter().map(|finding| finding.weight).collect::<Vec<_>>()
        };
        assert_eq!(weights(&["unknown"]), [Weight::Open]);
        assert_eq!(weights(&["unknown", "gone"]), [Weight::Full], "one is certain");
    }

    #[test]
    fn what_is_absent_is_filled_in() {
        let mut object = json!({"spec": {"persistentVolumeClaimRetentionPolicy": {"whenScaled": "Delete"}}});
        fill(&mut object, &ClusterFacts::default());
        assert_eq!(
            raw::at(&object, &POLICY),
            Some(&json!({"whenScaled": "Delete", "whenDeleted": "Retain"}))
        );
    }
}
