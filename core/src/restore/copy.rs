//! The StatefulSet and the claims that a backup is restored into, made from those of the original. Only manifests:
//! whoever asks for the copy creates them, by his own rights.
//!
//! What ties the original to others is left behind. No label goes along, so that no Service sends the original's clients
//! to the copy, no NetworkPolicy and no other controller takes it for the original, and no tool that tends the original
//! by its labels or annotations removes the copy. The terms about other pods go with the labels they are about.

use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::names;
use crate::policy::{data_volume, json as raw};

/// Annotations of the original that the copy keeps: how howdah gets in, and what it looks away from. A schedule would
/// take backups of the copy by the clock of the original.
const KEPT_ANNOTATIONS: [&str; 3] = [names::CREDENTIALS, names::MODE, names::TIME_ZONE];
/// Terms about other pods, by labels that the copy does not have.
const POD_TERMS: [&str; 2] = ["podAffinity", "podAntiAffinity"];
/// What a claim takes over from the original's; its size is the backup's.
const KEPT_OF_CLAIM: [&str; 3] = ["accessModes", "storageClassName", "volumeMode"];

/// Why no copy can be made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CopyError {
    /// Nothing tells where the data lies.
    #[error(
        "find the claim of the StatefulSet {0}'s data: its manifest does not say; make the other StatefulSet by hand and create \
         a PostgresRestore with spec.into"
    )]
    NoData(String),
    /// A volume that the backup holds and no template makes a claim for.
    #[error(
        "find the claim of the volume {volume}, which the backup holds: the StatefulSet {set} has no volumeClaimTemplate of that \
         name; make the other StatefulSet by hand, as the original was, and create a PostgresRestore with spec.into"
    )]
    NoPart {
        /// The original.
        set: String,
        /// The volume of the pod.
        volume: String,
    },
    /// A claim that no template makes, which the copy would mount, too.
    #[error(
        "copy the StatefulSet {set}: its volume {volume} names the claim {claim}, which both would write to; make the other \
         StatefulSet by hand, with a claim of its own, and create a PostgresRestore with spec.into"
    )]
    Shared {
        /// The original.
        set: String,
        /// The volume of the pod.
        volume: String,
        /// The claim.
        claim: String,
    },
}

/// The name of the claim that the data of `set` lies on, if the set were called `name`.
///
/// # Errors
/// See [`CopyError`].
pub fn claim_name(set: &Value, name: &str) -> Result<String, CopyError> {
    none_shared(set)?;
    let volume = data_volume(set).ok_or_else(|| CopyError::NoData(name_of(set)))?;
    Ok(claim_of(set, name, volume))
}

/// The name of the claim behind the pod's volume `volume`, if the set were called `name`.
///
/// # Errors
/// See [`CopyError`].
pub fn part_claim_name(set: &Value, name: &str, volume: &str) -> Result<String, CopyError> {
    none_shared(set)?;
    let templates = raw::list(set, &["spec", "volumeClaimTemplates"]);
    if templates.iter().any(|template| raw::string(template, &["metadata", "name"]) == Some(volume)) {
        return Ok(claim_of(set, name, volume));
    }
    Err(CopyError::NoPart { set: name_of(set), volume: volume.to_owned() })
}

fn none_shared(set: &Value) -> Result<(), CopyError> {
    for volume in raw::list(set, &["spec", "template", "spec", "volumes"]) {
        if let Some(claim) = raw::string(volume, &["persistentVolumeClaim", "claimName"]) {
            return Err(CopyError::Shared {
                set: name_of(set),
                volume: raw::string(volume, &["name"]).unwrap_or_default().to_owned(),
                claim: claim.to_owned(),
            });
        }
    }
    Ok(())
}

fn name_of(set: &Value) -> String {
    raw::string(set, &["metadata", "name"]).unwrap_or_default().to_owned()
}

/// As the StatefulSet controller names the claim of a template.
fn claim_of(set: &Value, name: &str, template: &str) -> String {
    let ordinal = raw::integer(set, &["spec", "ordinals", "start"]).unwrap_or(0);
    format!("{template}-{name}-{ordinal}")
}

/// The StatefulSet `name`: `set` with a name, a selector and a governing Service of its own, stopped, and protected.
#[must_use]
pub fn stateful_set(set: &Value, name: &str) -> Value {
    let mut copy = json!({"apiVersion": "apps/v1", "kind": "StatefulSet"});
    let mut spec = raw::at(set, &["spec"]).cloned().unwrap_or_default();
    let labels = json!({names::DATABASE_LABEL: name, names::PROTECT_LABEL: names::PROTECT_VALUE});
    raw::set(&mut spec, &[], "replicas", json!(0));
    raw::set(&mut spec, &[], "serviceName", json!(name));
    raw::set(&mut spec, &[], "selector", json!({"matchLabels": {names::DATABASE_LABEL: name}}));
    raw::set(&mut spec, &["template", "metadata"], "labels", labels);
    if let Some(pod) = raw::object_mut(&mut spec, &["template", "spec"]) {
        pod.remove("topologySpreadConstraints");
        if let Some(affinity) = pod.get_mut("affinity").and_then(Value::as_object_mut) {
            affinity.retain(|terms, _| !POD_TERMS.contains(&terms.as_str()));
        }
    }
    copy["metadata"] = metadata(set, name, &json!({names::PROTECT_LABEL: names::PROTECT_VALUE}));
    copy["spec"] = spec;
    copy
}

/// The claim `name` for a copy called `set_name`, like `claim` and of `bytes`. The StatefulSet takes it for its own.
#[must_use]
pub fn claim(claim: &Value, name: &str, set_name: &str, bytes: u64) -> Value {
    let mut spec: Map<String, Value> = KEPT_OF_CLAIM
        .iter()
        .filter_map(|key| Some(((*key).to_owned(), raw::at(claim, &["spec", key])?.clone())))
        .collect();
    spec.insert("resources".to_owned(), json!({"requests": {"storage": quantity(bytes)}}));
    let labels = json!({names::DATABASE_LABEL: set_name, names::PROTECT_LABEL: names::PROTECT_VALUE});
    json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": raw::at(claim, &["metadata", "namespace"]), "labels": labels},
        "spec": spec,
    })
}

fn metadata(original: &Value, name: &str, labels: &Value) -> Value {
    let annotations: Map<String, Value> = raw::strings(original, &["metadata", "annotations"])
        .into_iter()
        .filter(|(key, _)| KEPT_ANNOTATIONS.contains(&key.as_str()) || key.starts_with(names::EXEMPT_PREFIX))
        .map(|(key, value)| (key, json!(value)))
        .collect();
    json!({
        "name": name,
        "namespace": raw::at(original, &["metadata", "namespace"]),
        "labels": labels,
        "annotations": annotations,
    })
}

/// Bytes as people write them.
fn quantity(bytes: u64) -> String {
    [("Gi", 30), ("Mi", 20), ("Ki", 10)]
        .into_iter()
        .find(|(_, bits)| bytes > 0 && bytes.trailing_zeros() >= *bits)
        .map_or_else(|| bytes.to_string(), |(unit, bits)| format!("{}{unit}", bytes >> bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn original() -> Value {
        json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": {
                "name": "db", "namespace": "shop", "uid": "1", "resourceVersion": "7", "finalizers": ["x/y"],
                "ownerReferences": [{"kind": "Shop", "name": "shop"}],
                "labels": {"howdah.dev/protect": "true", "app": "db", "app.kubernetes.io/instance": "shop"},
                "annotations": {"howdah.dev/schedule": "@daily", "howdah.dev/retention": "last=3",
                    "howdah.dev/gate": "restore/r", "howdah.dev/credentials": "pg-backup",
                    "howdah.dev/exempt.grace-period": "until=2027-01-31 reason=legacy image",
                    "meta.helm.sh/release-name": "shop", "kubectl.kubernetes.io/last-applied-configuration": "{}"}
            },
            "spec": {
                "replicas": 1, "serviceName": "db", "selector": {"matchLabels": {"app": "db"}},
                "persistentVolumeClaimRetentionPolicy": {"whenScaled": "Retain", "whenDeleted": "Retain"},
                "template": {
                    "metadata": {"labels": {"app": "db"}, "annotations": {"example.com/a": "b"}},
                    "spec": {
                        "containers": [{"name": "postgres", "image": "postgres:15",
                            "env": [{"name": "PGDATA", "value": "/data/pg"}],
                            "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
                        "affinity": {
                            "nodeAffinity": {"x": 1},
                            "podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                                {"weight": 1, "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname",
                                    "labelSelector": {"matchLabels": {"app": "db"}}}}]}},
                        "topologySpreadConstraints": [{"maxSkew": 1}]
                    }
                },
                "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"storageClassName": "rbd"}}]
            },
            "status": {"replicas": 1}
        })
    }

    #[test]
    fn the_copy_shares_no_label_no_owner_and_no_schedule_with_the_original() {
        let copy = stateful_set(&original(), "db-copy");
        let metadata = &copy["metadata"];
        let keys: Vec<&String> = metadata.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["name", "namespace", "labels", "annotations"]);
        assert_eq!((&metadata["name"], &metadata["namespace"]), (&json!("db-copy"), &json!("shop")));
        assert_eq!(metadata["labels"], json!({"howdah.dev/protect": "true"}));
        let annotations: Vec<&String> = metadata["annotations"].as_object().unwrap().keys().collect();
        assert_eq!(annotations, ["howdah.dev/credentials", "howdah.dev/exempt.grace-period"]);
        let spec = &copy["spec"];
        assert_eq!((&spec["replicas"], &spec["serviceName"]), (&json!(0), &json!("db-copy")));
        let own = json!({"howdah.dev/database": "db-copy"});
        assert_eq!(spec["selector"], json!({"matchLabels": own}));
        let labels = &spec["template"]["metadata"]["labels"];
        assert_eq!(labels, &json!({"howdah.dev/database": "db-copy", "howdah.dev/protect": "true"}));
        assert!(copy.get("status").is_none());
        // What the pod is made of stays.
        let pod = &spec["template"]["spec"];
        assert_eq!(pod["containers"], original()["spec"]["template"]["spec"]["containers"]);
        assert_eq!(pod["affinity"], json!({"nodeAffinity": {"x": 1}}));
        assert!(pod.get("topologySpreadConstraints").is_none());
        assert_eq!(spec["volumeClaimTemplates"], original()["spec"]["volumeClaimTemplates"]);
        assert_eq!(spec["template"]["metadata"]["annotations"], json!({"example.com/a": "b"}));
    }

    #[test]
    fn the_claim_is_found_by_where_the_data_lies() {
        assert_eq!(claim_name(&original(), "db").unwrap(), "data-db-0");
        assert_eq!(claim_name(&original(), "db-copy").unwrap(), "data-db-copy-0");
        let mut numbered = original();
        numbered["spec"]["ordinals"] = json!({"start": 3});
        assert_eq!(claim_name(&numbered, "db-copy").unwrap(), "data-db-copy-3");
        let mut nowhere = original();
        nowhere["spec"]["volumeClaimTemplates"] = json!([]);
        assert_eq!(claim_name(&nowhere, "db-copy"), Err(CopyError::NoData("db".to_owned())));
    }

    #[test]
    fn the_claim_of_a_further_volume_is_found_by_its_name() {
        let mut set = original();
        let templates = set["spec"]["volumeClaimTemplates"].as_array_mut().unwrap();
        templates.push(json!({"metadata": {"name": "wal"}, "spec": {"storageClassName": "rbd"}}));
        assert_eq!(part_claim_name(&set, "db", "wal").unwrap(), "wal-db-0");
        set["spec"]["ordinals"] = json!({"start": 3});
        assert_eq!(part_claim_name(&set, "db-copy", "wal").unwrap(), "wal-db-copy-3");
        let missing = part_claim_name(&set, "db-copy", "fast").unwrap_err().to_string();
        assert!(
            missing.contains("the volume fast") && missing.contains("StatefulSet db has no"),
            "{missing}"
        );
    }

    #[test]
    fn a_claim_that_both_would_mount_is_refused() {
        let mut shared = original();
        shared["spec"]["template"]["spec"]["volumes"] =
            json!([{"name": "more", "persistentVolumeClaim": {"claimName": "mine"}}]);
        let error = claim_name(&shared, "db-copy").unwrap_err().to_string();
        assert!(error.contains("its volume more names the claim mine"), "{error}");
        assert_eq!(part_claim_name(&shared, "db-copy", "more").unwrap_err().to_string(), error);
    }

    #[test]
    fn the_claim_is_of_the_same_class_and_of_the_size_of_the_backup() {
        let original = json!({"metadata": {"name": "data-db-0", "namespace": "shop", "finalizers": ["f"]},
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "rbd", "volumeMode": "Filesystem",
                "volumeName": "pvc-1", "dataSource": {"name": "x"}, "resources": {"requests": {"storage": "1Ti"}}}});
        let copy = claim(&original, "data-db-copy-0", "db-copy", 160 << 20);
        assert_eq!(
            copy["spec"],
            json!({"accessModes": ["ReadWriteOnce"], "storageClassName": "rbd", "volumeMode": "Filesystem",
                "resources": {"requests": {"storage": "160Mi"}}})
        );
        assert_eq!(copy["metadata"]["name"], "data-db-copy-0");
        let labels = json!({"howdah.dev/database": "db-copy", "howdah.dev/protect": "true"});
        assert_eq!(copy["metadata"]["labels"], labels);
    }

    #[test]
    fn a_size_is_written_exactly() {
        for (bytes, text) in [(3 << 30, "3Gi"), (1 << 20, "1Mi"), (4096, "4Ki"), (1000, "1000"), (0, "0")] {
            assert_eq!(quantity(bytes), text);
        }
    }
}
