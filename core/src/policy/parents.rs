//! Which StatefulSet something belongs to. Names and labels are followed as Kubernetes' own controllers do.

use serde_json::Value;

use super::json as raw;
use super::selector::selects;
use super::{Request, Target};

/// Whether the request is about something of this StatefulSet, which is of the same namespace.
///
/// An eviction names its pod and says nothing else, so the name alone decides here; whoever looks the pod up then holds
/// it against [`is_pod_of`].
#[must_use]
pub fn belongs_to(request: &Request<'_>, set: &Value) -> bool {
    let name = raw::string(set, &["metadata", "name"]).unwrap_or_default();
    let (Some(object), false) = (request.object.or(request.old_object), name.is_empty()) else {
        return false;
    };
    match request.target {
        Target::StatefulSet => false,
        Target::Scale => request.name == name && same_uid(raw::string(object, &["metadata", "uid"]), set),
        Target::HorizontalPodAutoscaler => scaled_set(object) == Some(name),
        Target::Pod => is_pod_of(object, set),
        Target::Eviction => request.name.strip_prefix(name).is_some_and(is_ordinal_suffix),
        Target::Claim => {
            raw::string(object, &["metadata", "name"]).is_some_and(|claim| has_claim(set, name, claim))
        }
        Target::DisruptionBudget => {
            let labels = raw::strings(set, &["spec", "template", "metadata", "labels"]);
            selects(raw::at(object, &["spec", "selector"]), &labels)
        }
    }
}

/// What an object is to the policy, where it belongs to a StatefulSet and is judged as it stands: an autoscaler or a
/// disruption budget.
#[must_use]
pub fn dependent(object: &Value) -> Option<Target> {
    let group = raw::string(object, &["apiVersion"])?.split('/').next()?;
    match (group, raw::string(object, &["kind"])?) {
        ("autoscaling", "HorizontalPodAutoscaler") => Some(Target::HorizontalPodAutoscaler),
        ("policy", "PodDisruptionBudget") => Some(Target::DisruptionBudget),
        _ => None,
    }
}

/// The StatefulSet that a scale or a pod names, protected or not.
#[must_use]
pub fn named_by<'a>(request: &Request<'a>) -> Option<&'a str> {
    match request.target {
        Target::Scale => Some(request.name),
        Target::Pod => raw::string(owner(request.old_object?)?, &["name"]),
        _ => None,
    }
}

/// Whether the StatefulSet controls the pod.
#[must_use]
pub fn is_pod_of(pod: &Value, set: &Value) -> bool {
    let name = raw::string(set, &["metadata", "name"]);
    owner(pod).is_some_and(|owner| {
        raw::string(owner, &["name"]) == name && same_uid(raw::string(owner, &["uid"]), set)
    })
}

/// The StatefulSet that controls a pod.
fn owner(pod: &Value) -> Option<&Value> {
    raw::list(pod, &["metadata", "ownerReferences"]).iter().find(|owner| {
        raw::at(owner, &["controller"]) == Some(&Value::Bool(true))
            && raw::string(owner, &["kind"]) == Some("StatefulSet")
            && raw::string(owner, &["apiVersion"]).is_some_and(|version| version.starts_with("apps/"))
    })
}

/// A set of the same name made later has another uid and is another database.
fn same_uid(uid: Option<&str>, set: &Value) -> bool {
    uid.is_some() && uid == raw::string(set, &["metadata", "uid"])
}

/// The StatefulSet that an autoscaler scales.
fn scaled_set(autoscaler: &Value) -> Option<&str> {
    let target = raw::at(autoscaler, &["spec", "scaleTargetRef"])?;
    let is_set = raw::string(target, &["kind"]) == Some("StatefulSet")
        && raw::string(target, &["apiVersion"]).is_none_or(|version| version.starts_with("apps/"));
    raw::string(target, &["name"]).filter(|_| is_set)
}

/// Whether the claim is made from a template of the set, for any of its pods, or is named by its pod.
fn has_claim(set: &Value, name: &str, claim: &str) -> bool {
    let templated = raw::list(set, &["spec", "volumeClaimTemplates"]).iter().any(|template| {
        let template = raw::string(template, &["metadata", "name"]).unwrap_or_default();
        let rest = claim.strip_prefix(template).and_then(|rest| rest.strip_prefix('-'));
        rest.and_then(|rest| rest.strip_prefix(name)).is_some_and(is_ordinal_suffix)
    });
    templated
        || raw::list(set, &["spec", "template", "spec", "volumes"])
            .iter()
            .any(|volume| raw::string(volume, &["persistentVolumeClaim", "claimName"]) == Some(claim))
}

/// Whether this is what a StatefulSet adds to its name for a pod: a hyphen and a number.
fn is_ordinal_suffix(text: &str) -> bool {
    text.strip_prefix('-')
        .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Operation;
    use serde_json::json;

    fn set() -> Value {
        json!({
            "metadata": {"name": "pg", "uid": "u1"},
            "spec": {
                "template": {
                    "metadata": {"labels": {"app": "pg"}},
                    "spec": {"volumes": [{"name": "old", "persistentVolumeClaim": {"claimName": "by-hand"}}]},
                },
                "volumeClaimTemplates": [{"metadata": {"name": "data"}}],
            },
        })
    }

    fn belongs(target: Target, name: &str, object: &Value) -> bool {
        let request = Request {
            operation: Operation::Create,
            target,
            namespace: "shop",
            name,
            object: Some(object),
            old_object: None,
            user: None,
            grace_s: None,
        };
        belongs_to(&request, &set())
    }

    #[test]
    fn claims_are_known_by_their_names() {
        let claim = |name: &str| belongs(Target::Claim, name, &json!({"metadata": {"name": name}}));
        for own in ["data-pg-0", "data-pg-17", "by-hand"] {
            assert!(claim(own), "{own}");
        }
        for other in [
            "data-pg",
            "data-pg-",
            "data-pg-0-old",
            "data-pgx-0",
            "wal-pg-0",
            "my-data-pg-0",
            "datapg-0",
            "data-my-pg-0",
        ] {
            assert!(!claim(other), "{other}");
        }
    }

    #[test]
    fn a_set_made_anew_is_another() {
        let owned = |uid: &str, kind: &str, controller: bool| {
            let owner = json!({"apiVersion": "apps/v1", "kind": kind, "name": "pg", "uid": uid, "controller": controller});
            belongs(Target::Pod, "pg-0", &json!({"metadata": {"ownerReferences": [owner]}}))
        };
        assert!(owned("u1", "StatefulSet", true));
        assert!(
            !owned("u2", "StatefulSet", true)
                && !owned("u1", "ReplicaSet", true)
                && !owned("u1", "StatefulSet", false)
        );
        let scale = |uid: Value| belongs(Target::Scale, "pg", &json!({"metadata": {"uid": uid}}));
        assert!(scale(json!("u1")) && !scale(json!("u2")) && !scale(json!(null)));
    }

    #[test]
    fn evictions_autoscalers_and_budgets_find_their_set() {
        assert!(belongs(Target::Eviction, "pg-0", &json!({})));
        assert!(
            !belongs(Target::Eviction, "pg-0-x", &json!({})) && !belongs(Target::Eviction, "pg", &json!({}))
        );
        let scaler = |target: Value| {
            belongs(Target::HorizontalPodAutoscaler, "h", &json!({"spec": {"scaleTargetRef": target}}))
        };
        assert!(scaler(json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "pg"})));
        assert!(scaler(json!({"kind": "StatefulSet", "name": "pg"})));
        assert!(!scaler(json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "pg"})));
        assert!(!scaler(json!({"apiVersion": "apps.kruise.io/v1", "kind": "StatefulSet", "name": "pg"})));
        let budget = |selector: Value| {
            belongs(Target::DisruptionBudget, "b", &json!({"spec": {"selector": selector}}))
        };
        assert!(budget(json!({"matchLabels": {"app": "pg"}})) && budget(json!({})));
        assert!(!budget(json!({"matchLabels": {"app": "web"}})) && !budget(json!(null)));
    }
}
