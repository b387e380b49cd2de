//! The patch with what howdah fills in.
//!
//! Most of an object is never filled in, so it is neither copied nor compared name by name: a general diff would make a
//! pointer for every field of it.

use json_patch::jsonptr::PointerBuf;
use json_patch::{AddOperation, Patch, PatchOperation, ReplaceOperation};
use serde_json::Value;

/// What the API server keeps for itself: long, and never filled in.
const KEPT: [&str; 2] = ["status", "managedFields"];

/// A copy to fill in, without what is never filled in.
pub(super) fn copy(object: &Value) -> Value {
    let Value::Object(fields) = object else { return object.clone() };
    let fields = fields.iter().filter(|(key, _)| !KEPT.contains(&key.as_str()));
    let copied = fields.map(|(key, value)| {
        let value = if key == "metadata" { copy(value) } else { value.clone() };
        (key.clone(), value)
    });
    Value::Object(copied.collect())
}

/// What has to be done to `object` so that it has everything that `filled` has. What `filled` leaves out stays.
pub(super) fn to_fill_in(object: &Value, filled: &Value) -> Patch {
    let mut operations = Vec::new();
    compare(object, filled, &mut PointerBuf::new(), &mut operations);
    Patch(operations)
}

fn compare(before: &Value, after: &Value, path: &mut PointerBuf, operations: &mut Vec<PatchOperation>) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            for (key, value) in after {
                match before.get(key) {
                    Some(old) if old == value => {}
                    old => {
                        path.push_back(key.as_str());
                        match old {
                            Some(old) => compare(old, value, path, operations),
                            None => operations.push(PatchOperation::Add(AddOperation {
                                path: path.clone(),
                                value: value.clone(),
                            })),
                        }
                        path.pop_back();
                    }
                }
            }
        }
        (Value::Array(before), Value::Array(after)) if before.len() == after.len() => {
            for (i, (old, value)) in before.iter().zip(after).enumerate().filter(|(_, (a, b))| a != b) {
                path.push_back(i);
                compare(old, value, path, operations);
                path.pop_back();
            }
        }
        _ => operations
            .push(PatchOperation::Replace(ReplaceOperation { path: path.clone(), value: after.clone() })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_patch_fills_in_and_leaves_the_rest() {
        let object = json!({
            "metadata": {"name": "pg", "managedFields": [{"manager": "x"}]},
            "spec": {"a/b": {"c": null, "list": [{"x": 1}, {"y": 2}]}, "terms": [1]},
            "status": {"replicas": 1},
        });
        let mut filled = copy(&object);
        assert_eq!((&filled["status"], &filled["metadata"]), (&Value::Null, &json!({"name": "pg"})));
        assert!(to_fill_in(&object, &filled).0.is_empty());
        filled["metadata"]["labels"] = json!({"l": "1"});
        filled["spec"]["a/b"]["c"] = json!({"d": 1});
        filled["spec"]["a/b"]["list"][1]["z"] = json!(3);
        filled["spec"]["terms"] = json!([1, 2]);
        let patch = to_fill_in(&object, &filled);
        let paths: Vec<String> = patch.0.iter().map(|operation| operation.path().to_string()).collect();
        assert_eq!(paths, ["/metadata/labels", "/spec/a~1b/c", "/spec/a~1b/list/1/z", "/spec/terms"]);
        let mut patched = object.clone();
        json_patch::patch(&mut patched, &patch).unwrap();
        filled["status"] = object["status"].clone();
        filled["metadata"]["managedFields"] = object["metadata"]["managedFields"].clone();
        assert_eq!(patched, filled);
    }
}
