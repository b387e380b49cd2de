//! Label selectors of the API, on raw JSON.

use std::collections::BTreeMap;

use serde_json::Value;

use super::json as raw;

/// Whether the selector matches these labels. An absent selector matches nothing, an empty one everything.
#[must_use]
pub fn selects(selector: Option<&Value>, labels: &BTreeMap<String, String>) -> bool {
    let Some(selector) = selector else { return false };
    let exact = raw::strings(selector, &["matchLabels"]);
    exact.iter().all(|(key, value)| labels.get(key) == Some(value))
        && raw::list(selector, &["matchExpressions"]).iter().all(|expression| {
            let found = raw::string(expression, &["key"]).and_then(|key| labels.get(key));
            let values = raw::list(expression, &["values"]);
            let listed = found.is_some_and(|found| values.iter().any(|value| value.as_str() == Some(found)));
            match raw::string(expression, &["operator"]) {
                Some("In") => listed,
                Some("NotIn") => !listed,
                Some("Exists") => found.is_some(),
                Some("DoesNotExist") => found.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_part_of_a_selector_counts() {
        let labels = BTreeMap::from([("app".to_owned(), "pg".to_owned())]);
        let expression = |operator: &str, values: Value| json!({"matchExpressions": [{"key": "app", "operator": operator, "values": values}]});
        for (selector, matches) in [
            (json!({}), true),
            (json!({"matchLabels": {"app": "pg"}}), true),
            (json!({"matchLabels": {"app": "pg", "tier": "db"}}), false),
            (expression("In", json!(["mysql", "pg"])), true),
            (expression("NotIn", json!(["pg"])), false),
            (expression("Exists", json!(null)), true),
            (expression("DoesNotExist", json!(null)), false),
            (expression("Near", json!(["pg"])), false),
        ] {
            assert_eq!(selects(Some(&selector), &labels), matches, "{selector}");
        }
        assert!(!selects(None, &labels));
    }
}
