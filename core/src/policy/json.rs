//! Reading and editing raw JSON by path, without ever failing on an unexpected shape.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// The value at `path`; `null` counts as absent, as it does for the API server.
#[must_use]
pub fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, key| value.get(*key)).filter(|value| !value.is_null())
}

/// The string at `path`.
#[must_use]
pub fn string<'a>(value: &'a Value, path: &[&str]) -> Option<&'a str> {
    at(value, path)?.as_str()
}

/// The integer at `path`.
#[must_use]
pub fn integer(value: &Value, path: &[&str]) -> Option<i64> {
    at(value, path)?.as_i64()
}

/// The items of the list at `path`; empty when there is none.
#[must_use]
pub fn list<'a>(value: &'a Value, path: &[&str]) -> &'a [Value] {
    at(value, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The map of strings at `path`; empty when there is none.
#[must_use]
pub fn strings(value: &Value, path: &[&str]) -> BTreeMap<String, String> {
    let entries = at(value, path).and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// The object at `path`, made where it is absent. `None` when something that is not an object is in the way: the API
/// server will refuse that anyway.
pub fn object_mut<'a>(value: &'a mut Value, path: &[&str]) -> Option<&'a mut Map<String, Value>> {
    let mut value = value;
    for key in path {
        value = value.as_object_mut()?.entry(*key).or_insert(Value::Null);
        if value.is_null() {
            *value = Value::Object(Map::new());
        }
    }
    value.as_object_mut()
}

/// Sets `key` of the object at `path`, making the object where it is absent.
pub fn set(value: &mut Value, path: &[&str], key: &str, new: Value) {
    if let Some(object) = object_mut(value, path) {
        object.insert(key.to_owned(), new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn null_is_absent() {
        assert_eq!(at(&json!({"a": null}), &["a"]), None);
        let mut value = json!({"a": null});
        set(&mut value, &["a", "b"], "c", json!(1));
        assert_eq!(value, json!({"a": {"b": {"c": 1}}}));
    }

    #[test]
    fn what_is_in_the_way_stays() {
        let mut value = json!({"a": "text"});
        set(&mut value, &["a"], "b", json!(1));
        assert_eq!(value, json!({"a": "text"}));
        assert_eq!(integer(&value, &["a", "b"]), None);
        assert!(list(&value, &["a"]).is_empty() && strings(&value, &["a"]).is_empty());
    }
}
