//! Where inputs come from: the files of `corpus/`, and the fixtures of the policy as reviews, so that a new rule is
//! fuzzed without a word.

use std::fs;
use std::path::{Path, PathBuf};

use howdah_core::names;
use serde::Deserialize as _;
use serde_json::{Value, json};

/// API group, resource, sub-resource and operation by which a document of a fixture is reviewed.
const KINDS: [(&str, &str, &str, &str, &str); 7] = [
    ("StatefulSet", "apps", "statefulsets", "", "CREATE"),
    ("Scale", "apps", "statefulsets", "scale", "UPDATE"),
    ("HorizontalPodAutoscaler", "autoscaling", "horizontalpodautoscalers", "", "CREATE"),
    ("Pod", "", "pods", "", "DELETE"),
    ("Eviction", "", "pods", "eviction", "CREATE"),
    ("PersistentVolumeClaim", "", "persistentvolumeclaims", "", "DELETE"),
    ("PodDisruptionBudget", "policy", "poddisruptionbudgets", "", "CREATE"),
];

/// The files of `corpus/NAME`, in the order of their names.
///
/// # Panics
/// If they cannot be read.
#[must_use]
pub fn files(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    below(&folder).iter().map(|file| fs::read(file).expect("read a file of the corpus")).collect()
}

/// The fixtures of the policy, each document as a review of it.
///
/// # Panics
/// If they cannot be read.
#[must_use]
pub fn fixtures() -> Vec<Vec<u8>> {
    let mut reviews = Vec::new();
    for file in below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/fixtures")) {
        if file.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = fs::read_to_string(&file).expect("read a fixture");
        let mut before: Option<Value> = None;
        for document in serde_yaml_ng::Deserializer::from_str(&text) {
            let object = Value::deserialize(document).expect("read a document of a fixture");
            let Some(kind) = KINDS.iter().find(|kind| object["kind"] == kind.0) else { continue };
            reviews.push(review(kind, before.as_ref(), &object));
            before = Some(object);
        }
    }
    reviews
}

fn review(kind: &(&str, &str, &str, &str, &str), before: Option<&Value>, object: &Value) -> Vec<u8> {
    let (kind, group, resource, subresource, operation) = *kind;
    let operation = if kind == "StatefulSet" && before.is_some() { "UPDATE" } else { operation };
    let (new, old) = match operation {
        "DELETE" => (None, Some(object)),
        "UPDATE" => (Some(object), before.or(Some(object))),
        _ => (Some(object), None),
    };
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "resource": {"group": group, "version": "v1", "resource": resource},
            "subResource": subresource,
            "operation": operation,
            "namespace": names::NAMESPACE,
            "name": object["metadata"]["name"],
            "userInfo": {"username": "somebody", "groups": ["system:authenticated"]},
            "options": {"gracePeriodSeconds": 0},
            "object": new,
            "oldObject": old,
        },
    })
    .to_string()
    .into_bytes()
}

/// The files below a folder, in the order of their names.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("list a folder") {
        let path = entry.expect("read an entry").path();
        if path.is_dir() {
            files.extend(below(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}
