//! What the tests of rules share.

use jiff::Timestamp;
use serde_json::Value;

use super::{
    Check, ClusterFacts, Finding, Operation, Request, Rule, Subject, Target, User, readable_settings,
};

/// Noon of 22 November 2026.
pub(crate) fn now() -> Timestamp {
    "2026-11-22T12:00:00Z".parse().unwrap()
}

/// What a rule about states finds in a StatefulSet of the namespace `shop`.
pub(crate) fn findings(rule: &Rule, object: &Value, facts: &ClusterFacts) -> Vec<Finding> {
    let request = Request::look("shop", "pg", object);
    check(rule, &request, object, facts)
}

/// What a rule finds in a request, with the annotations of the parent, or of `object` without one.
pub(crate) fn check(
    rule: &Rule,
    request: &Request<'_>,
    object: &Value,
    facts: &ClusterFacts,
) -> Vec<Finding> {
    let (settings, unreadable) = readable_settings(facts.parent.as_ref().unwrap_or(object));
    let subject =
        Subject { object, request, settings: &settings, unreadable: &unreadable, facts, now: now() };
    match rule.check {
        Check::State(check) | Check::Step(check) => check(&subject),
    }
}

/// Somebody without special rights.
pub(crate) fn somebody() -> User {
    User { name: "eve".to_owned(), groups: vec!["system:authenticated".to_owned()] }
}

/// A deletion in the namespace `shop` by `user`.
pub(crate) fn deletion<'a>(
    target: Target,
    old: &'a Value,
    user: &'a User,
    grace_s: Option<i64>,
) -> Request<'a> {
    Request {
        operation: Operation::Delete,
        target,
        namespace: "shop",
        name: "",
        object: None,
        old_object: Some(old),
        user: Some(user),
        grace_s,
    }
}
