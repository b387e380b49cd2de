//! `force-delete`: nobody tears a pod away from a kubelet that may still run it.
//!
//! **Intent.** With a grace period of 0 the API server forgets the pod at once, without the word of its kubelet. The
//! StatefulSet then starts it on another node, while on a node that is cut off, and not dead, the old PostgreSQL goes on
//! writing (lab.md C10: for eight minutes). Two writers on one disk are the end of the data.
//!
//! **Fields.** `gracePeriodSeconds` of the deletion of a pod, as the API server has resolved it. Kubelets, the garbage
//! collectors and the other parts of the control plane pass, as do pods that have finished or were never scheduled, the
//! end of the namespace, and a node that is proven to be cut off from the storage.
//!
//! **Fix.** Delete it without `--force`. If its node is dead, make sure of that first (power it off), then
//! `kubectl taint node NODE node.kubernetes.io/out-of-service=nodeshutdown:NoExecute`: the control plane then removes the
//! pod and detaches its volume.

use serde_json::Value;

use super::floor::{Floor, Twin};
use super::{Check, Finding, Operation, Refusal, Rule, Subject, Target, User, json};
use crate::policy::grace_period::KUBERNETES_DEFAULT_GRACE_S;

/// The rule.
pub const RULE: Rule = Rule {
    id: "force-delete",
    intent: "A pod is not forgotten before it has ended: a second one could then write to the same disk.",
    fields: &["DeleteOptions gracePeriodSeconds"],
    fix: "delete the pod without --force and let it end; if its node is dead, power that node off and then run \
          kubectl taint node NODE node.kubernetes.io/out-of-service=nodeshutdown:NoExecute",
    targets: &[Target::Pod],
    refusal: Refusal::Policy,
    check: Check::Step(check),
    filling: None,
    floor: FLOOR,
};

/// Who asks and whether the namespace ends stands in the conditions of the policy.
const FLOOR: Floor = Floor {
    twins: &[Twin { target: Target::Pod, findings: CEL }],
    makes: |_| true,
    leaves: Some("pods that belong to no StatefulSet any more"),
};

const CEL: &str = r#"it.spec.?nodeName.orValue("") != "" && !(it.?status.?phase.orValue("") in ["Succeeded", "Failed"]) &&
  (request.options != null && has(request.options.gracePeriodSeconds)
    ? request.options.gracePeriodSeconds
    : it.spec.?terminationGracePeriodSeconds.orValue(30)) == 0
  ? ["gracePeriodSeconds is 0, for a pod that may still run on node " + it.spec.nodeName + ", wanted 1 or more"]
  : []"#;

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let (request, facts) = (subject.request, subject.facts);
    let (Operation::Delete, Some(pod)) = (request.operation, request.old_object) else { return Vec::new() };
    let Some(node) = running_on(pod) else { return Vec::new() };
    let own = json::integer(pod, &["spec", "terminationGracePeriodSeconds"]);
    // A deletecollection leaves the grace to each pod. Below 0 the API server takes 1 second, so only 0 is none.
    let grace_s = request.grace_s.or(own).unwrap_or(KUBERNETES_DEFAULT_GRACE_S);
    let excused = |user: &User| user.is_kubelet_of(node) || user.is_control_plane();
    if grace_s != 0 || facts.namespace_terminating || facts.node_fenced || request.user.is_some_and(excused) {
        return Vec::new();
    }
    let found = format!("0, for a pod that may still run on node {node}");
    let finding = Finding::new("gracePeriodSeconds", found, "1 or more");
    // The pod may be so itself: then an ordinary deletion already comes with 0.
    if own == Some(0) {
        return vec![finding.fix(format!(
            "delete it with --grace-period={KUBERNETES_DEFAULT_GRACE_S}: its own terminationGracePeriodSeconds is 0"
        ))];
    }
    vec![finding]
}

/// The node a pod may be running on; `None` when it certainly runs nowhere.
pub(super) fn running_on(pod: &Value) -> Option<&str> {
    let phase = json::string(pod, &["status", "phase"]).unwrap_or_default();
    let node = json::string(pod, &["spec", "nodeName"]).filter(|node| !node.is_empty());
    node.filter(|_| !["Succeeded", "Failed"].contains(&phase))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::ClusterFacts;
    use crate::policy::testing::{self, deletion, somebody};
    use serde_json::json;

    fn pod(node: &str, phase: &str) -> Value {
        json!({"metadata": {"name": "pg-0"}, "spec": {"nodeName": node, "terminationGracePeriodSeconds": 300},
               "status": {"phase": phase}})
    }

    fn denied(pod: &Value, user: &User, grace_s: Option<i64>) -> bool {
        let request = deletion(Target::Pod, pod, user, grace_s);
        !testing::check(&RULE, &request, pod, &ClusterFacts::default()).is_empty()
    }

    #[test]
    fn only_a_grace_of_none_is_a_force_delete() {
        let pod = pod("a", "Running");
        assert!(denied(&pod, &somebody(), Some(0)));
        for grace in [Some(1), Some(30), Some(-1), None] {
            assert!(!denied(&pod, &somebody(), grace), "{grace:?}");
        }
    }

    #[test]
    fn a_pod_that_runs_nowhere_may_go() {
        for (node, phase) in [("a", "Succeeded"), ("a", "Failed"), ("", "Pending")] {
            assert!(!denied(&pod(node, phase), &somebody(), Some(0)), "{node} {phase}");
        }
        for phase in ["Pending", "Running", "Unknown", ""] {
            assert!(denied(&pod("a", phase), &somebody(), Some(0)), "{phase}");
        }
    }

    #[test]
    fn a_pod_that_already_ends_may_still_run() {
        let mut pod = pod("a", "Running");
        pod["metadata"]["deletionTimestamp"] = json!("2026-11-22T11:00:00Z");
        assert!(denied(&pod, &somebody(), Some(0)));
    }

    #[test]
    fn who_knows_that_it_has_ended_passes() {
        let user = |name: &str, group: &str| User { name: name.to_owned(), groups: vec![group.to_owned()] };
        let pod = pod("a", "Running");
        assert!(!denied(&pod, &user("system:node:a", "system:nodes"), Some(0)));
        assert!(denied(&pod, &user("system:node:b", "system:nodes"), Some(0)));
        assert!(!denied(&pod, &user("system:serviceaccount:kube-system:pod-garbage-collector", ""), Some(0)));
        assert!(denied(&pod, &user("admin", "system:masters"), Some(0)));
    }

    #[test]
    fn proof_and_the_end_of_the_namespace_pass() {
        let (pod, user) = (pod("a", "Running"), somebody());
        let request = deletion(Target::Pod, &pod, &user, Some(0));
        for facts in [
            ClusterFacts { namespace_terminating: true, ..ClusterFacts::default() },
            ClusterFacts { node_fenced: true, ..ClusterFacts::default() },
        ] {
            assert!(testing::check(&RULE, &request, &pod, &facts).is_empty());
        }
    }

    #[test]
    fn a_pod_of_no_grace_is_told_how_to_end_well() {
        let mut pod = pod("a", "Running");
        pod["spec"]["terminationGracePeriodSeconds"] = json!(0);
        let user = somebody();
        let request = deletion(Target::Pod, &pod, &user, None);
        let found = testing::check(&RULE, &request, &pod, &ClusterFacts::default());
        assert!(found[0].fix.as_deref().unwrap().contains("--grace-period=30"));
    }
}
