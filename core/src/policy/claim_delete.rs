//! `claim-delete`: the data goes only when somebody says so in as many words.
//!
//! **Intent.** `kubectl delete pvc` on the wrong line takes, with Rook's usual class, the image and every snapshot of it.
//! The claim of a running pod stays in Terminating and goes with the pod's next restart, days later, when nobody thinks of
//! it any more.
//!
//! **Fields.** The deletion of a claim that a protected StatefulSet has made or that its pod names. A claim without a
//! volume holds nothing and passes, as do the end of the namespace, the control plane, and a claim whose StatefulSet is
//! gone.
//!
//! **Fix.** Annotate the claim with `howdah.dev/allow-delete` and its own uid, then delete it. The uid makes it a token for
//! this claim alone: a copied manifest does not carry it.

use super::{Check, Finding, Floor, Operation, Refusal, Rule, Subject, Target, User, json};
use crate::names;

/// The rule.
pub const RULE: Rule = Rule {
    id: "claim-delete",
    intent: "The claim of a database is not deleted by accident: with it go the image and its snapshots.",
    fields: &["PersistentVolumeClaim metadata.annotations[howdah.dev/allow-delete]"],
    fix: "annotate the claim with howdah.dev/allow-delete and its uid, then delete it",
    targets: &[Target::Claim],
    refusal: Refusal::Policy,
    check: Check::Step(check),
    filling: None,
    floor: Floor::silent(
        "a claim does not say which StatefulSet it is of; the webhook fails closed for claims that carry the label",
    ),
};

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let request = subject.request;
    let (Operation::Delete, Some(claim)) = (request.operation, request.old_object) else { return Vec::new() };
    let text = |path: &[&str]| json::string(claim, path).unwrap_or_default();
    let token = json::string(claim, &["metadata", "annotations", names::ALLOW_DELETE]);
    let (name, uid, volume) =
        (text(&["metadata", "name"]), text(&["metadata", "uid"]), text(&["spec", "volumeName"]));
    let passes = subject.facts.namespace_terminating
        || request.user.is_some_and(User::is_control_plane)
        || volume.is_empty()
        || (token == Some(uid) && !uid.is_empty());
    if passes {
        return Vec::new();
    }
    let found = match token {
        None => format!("absent, and the claim holds volume {volume}"),
        Some(other) => format!("{other}, which is not the uid of this claim"),
    };
    let namespace = request.namespace;
    vec![Finding::new(format!("metadata.annotations[{}]", names::ALLOW_DELETE), found, uid).fix(format!(
        "if the data shall go, run kubectl -n {namespace} annotate --overwrite pvc {name} {}={uid} and delete it again",
        names::ALLOW_DELETE
    ))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::ClusterFacts;
    use crate::policy::testing::{self, deletion, somebody};
    use serde_json::{Value, json};

    fn found(claim: &Value, user: &User, facts: &ClusterFacts) -> Vec<Finding> {
        testing::check(&RULE, &deletion(Target::Claim, claim, user, None), claim, facts)
    }

    fn claim(volume: &str, annotations: Value) -> Value {
        json!({"metadata": {"name": "data-pg-0", "uid": "u1", "annotations": annotations},
               "spec": {"volumeName": volume}})
    }

    #[test]
    fn only_the_token_of_this_claim_lets_it_go() {
        let none = ClusterFacts::default();
        let denied = found(&claim("pv", json!({})), &somebody(), &none);
        let fix = denied[0].fix.as_deref().unwrap();
        assert!(
            fix.contains("kubectl -n shop annotate --overwrite pvc data-pg-0 howdah.dev/allow-delete=u1"),
            "{fix}"
        );
        assert_eq!(found(&claim("pv", json!({names::ALLOW_DELETE: "true"})), &somebody(), &none).len(), 1);
        assert_eq!(found(&claim("pv", json!({names::ALLOW_DELETE: "u2"})), &somebody(), &none).len(), 1);
        assert!(found(&claim("pv", json!({names::ALLOW_DELETE: "u1"})), &somebody(), &none).is_empty());
    }

    #[test]
    fn what_holds_nothing_or_goes_anyway_passes() {
        let none = ClusterFacts::default();
        assert!(found(&claim("", json!({})), &somebody(), &none).is_empty());
        let ending = ClusterFacts { namespace_terminating: true, ..ClusterFacts::default() };
        assert!(found(&claim("pv", json!({})), &somebody(), &ending).is_empty());
        let name = "system:serviceaccount:kube-system:generic-garbage-collector".to_owned();
        let collector = User { name, groups: Vec::new() };
        assert!(found(&claim("pv", json!({})), &collector, &none).is_empty());
    }
}
