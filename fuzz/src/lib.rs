//! What holds for every input, however wrong: [`review`] for the body of a review, [`annotations`] for annotations.
//!
//! Two drivers call them. `tests/bounded.rs` is part of `make test`: the corpus and a fixed number of changes to it, the same
//! each time ([`mutation`]). `make fuzz` has libFuzzer search for new ways through the code for as long as it is let.
//!
//! What the cluster knows is made up here, because only the decisions are in question; the limits on connections and bodies
//! are tested on the real process.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a property that does not hold is a panic")]

use std::collections::BTreeMap;

use base64::Engine as _;
use howdah_core::annotations::{Settings, parse};
use howdah_core::names;
use howdah_core::policy::{
    self, ClusterFacts, Effect, HoldingBackup, Operation, Request, StorageClass, Target, Verdict,
};
use howdah_webhook::review::{self, Review};
use jiff::Timestamp;
use serde_json::{Value, json};

pub mod corpus;
pub mod mutation;

/// Longest explanation of what is wrong with a body: it is logged.
const PROBLEM_BYTES_MAX: usize = 1200;
/// An answer is at most this long, whatever the review,
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// plus this often the length of the review: it repeats names and paths that are as long as the user made them.
const ANSWER_GROWTH_MAX: usize = 12;
/// Longest and most warnings (docs/reference/rules.md).
const WARNING_CHARS_MAX: usize = 120;
const WARNINGS_MAX: usize = 20;

/// The time of every review.
fn now() -> Timestamp {
    Timestamp::from_second(1_795_348_800).unwrap()
}

/// Decodes a body, has it mutated and judged, and looks at every answer.
///
/// # Panics
/// If a property does not hold.
pub fn review(body: &[u8]) {
    let review = match review::decode(body) {
        Ok(review) => review,
        Err(malformed) => {
            assert!(!malformed.problem.is_empty() && malformed.problem.len() <= PROBLEM_BYTES_MAX);
            if let Some(uid) = malformed.uid {
                let refused = review::refusal(&uid, &malformed.problem);
                assert_eq!(well_formed(&refused, &uid, body.len())["allowed"], false);
            }
            return;
        }
    };
    let request = review.request();
    // The length is a part of the input like any other, and libFuzzer varies it.
    let facts = facts(body.len());
    let mutation = policy::mutate(&request, &facts, now());
    let judged = policy::validate(&request, &facts, now());
    looked_at(&review, &judged, body.len(), false);
    looked_at(&review, &mutation, body.len(), true);
    assert!(mutation.allowed, "a mutation never denies");
    let Some(patch) = mutation.patch else {
        assert!(
            !refused_by_the_floor(&request, &judged) || is_marked(&review),
            "the floor would speak before the webhook"
        );
        return;
    };
    let mut changed = review.object.clone().expect("only what is there is patched");
    json_patch::patch(&mut changed, &patch).expect("a patch applies");
    if review.operation == Operation::Update {
        for operation in &patch.0 {
            let path = operation.path().to_string();
            assert!(!path.starts_with("/spec/template"), "{path} is changed by an update");
        }
    }
    let request = Request { object: Some(&changed), ..request };
    assert!(policy::mutate(&request, &facts, now()).patch.is_none(), "a second patch");
    let before = judged;
    let judged = policy::validate(&request, &facts, now());
    let marked = changed["metadata"]["annotations"].get(names::WEBHOOK_ANSWERS).is_some();
    assert!(
        marked == refused_by_the_floor(&request, &judged) || is_marked(&review),
        "the mark is not what it says"
    );
    for outcome in judged.outcomes {
        let known = before
            .outcomes
            .iter()
            .any(|known| known.rule.id == outcome.rule.id && known.finding.field == outcome.finding.field);
        assert!(known || outcome.effect != Effect::Deny, "denied after the defaults: {:?}", outcome.finding);
    }
}

/// Whether the policy for StatefulSets in the API server refuses what was judged like this. It is asked about protected
/// ones that no operator made, and not about deletions (deploy/base/floor.yaml).
fn refused_by_the_floor(request: &Request<'_>, judged: &Verdict) -> bool {
    let asked = request.target == Target::StatefulSet
        && request.operation != Operation::Delete
        && request
            .object
            .is_some_and(|object| policy::is_protected(object) && policy::made_by(object).is_none());
    asked && judged.outcomes.iter().any(policy::floor::refuses)
}

/// Whether the object has come with howdah's own mark, which nobody else should write.
fn is_marked(review: &Review) -> bool {
    let annotations = review.object.as_ref().map(|object| &object["metadata"]["annotations"]);
    annotations.is_some_and(|annotations| annotations.get(names::WEBHOOK_ANSWERS).is_some())
}

/// Checks the answer that carries a verdict.
fn looked_at(review: &Review, verdict: &Verdict, body_bytes: usize, may_patch: bool) {
    let answer = review::answer(review, verdict);
    let response = well_formed(&answer, &review.uid, body_bytes);
    assert_eq!(response["allowed"], verdict.allowed);
    assert_eq!(response.get("patch").is_some(), verdict.patch.is_some() && may_patch);
    if let Some(patch) = response.get("patch") {
        assert_eq!(response["patchType"], "JSONPatch");
        let text = base64::engine::general_purpose::STANDARD.decode(patch.as_str().unwrap()).unwrap();
        serde_json::from_slice::<json_patch::Patch>(&text).expect("a patch of RFC 6902");
    }
    assert_eq!(verdict.allowed, verdict.causes.is_empty());
    let denied = verdict.outcomes.iter().any(|outcome| outcome.effect == Effect::Deny);
    assert_eq!(verdict.allowed, !denied);
}

/// What the API server demands of every answer (k8s.io/apiserver, admission/plugin/webhook/request).
fn well_formed<'a>(answer: &'a Value, uid: &str, body_bytes: usize) -> &'a Value {
    let text = answer.to_string();
    assert!(text.len() <= ANSWER_BYTES_MAX + ANSWER_GROWTH_MAX * body_bytes, "{} bytes", text.len());
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), *answer);
    assert_eq!(
        (&answer["apiVersion"], &answer["kind"]),
        (&json!("admission.k8s.io/v1"), &json!("AdmissionReview"))
    );
    let response = &answer["response"];
    assert!(response["uid"] == uid && !uid.is_empty());
    let allowed = response["allowed"].as_bool().expect("a decision");
    assert_eq!(response.get("status").is_none(), allowed);
    if !allowed {
        let status = &response["status"];
        let code = status["code"].as_u64().unwrap();
        assert!((400..500).contains(&code), "{code}");
        assert_eq!(status["status"], "Failure");
        assert!(
            !status["message"].as_str().unwrap().is_empty() && !status["reason"].as_str().unwrap().is_empty()
        );
    }
    let warnings = response.get("warnings").map_or(&[][..], |warnings| warnings.as_array().unwrap());
    assert!(warnings.len() <= WARNINGS_MAX);
    for warning in warnings {
        let warning = warning.as_str().unwrap();
        assert!(warning.chars().count() <= WARNING_CHARS_MAX && !warning.contains('\n'), "{warning:?}");
    }
    for (key, text) in response.get("auditAnnotations").and_then(Value::as_object).into_iter().flatten() {
        assert!(!key.contains('/') && text.is_string(), "{key}");
    }
    response
}

/// One of four states of the cluster.
fn facts(choice: usize) -> ClusterFacts {
    let class = |provisioner: &str| {
        StorageClass::from_json(&json!({"provisioner": provisioner, "reclaimPolicy": "Delete"}))
    };
    let mut facts = ClusterFacts::default();
    facts.storage_classes.insert("rbd".to_owned(), class("rook-ceph.rbd.csi.ceph.com"));
    facts.storage_classes.insert("local".to_owned(), class("rancher.io/local-path"));
    let set = json!({
        "kind": "StatefulSet",
        "metadata": {"name": "db", "uid": "u", "labels": {names::PROTECT_LABEL: names::PROTECT_VALUE}},
        "spec": {"replicas": 1, "template": {"metadata": {"labels": {"app": "db"}}}},
    });
    match choice % 4 {
        0 => {}
        1 => facts.parent = Some(set),
        2 => {
            facts.parent = Some(set);
            facts.pod = Some(json!({"metadata": {"name": "db-0"}, "spec": {"nodeName": "n"}}));
            facts.backups.extend(HoldingBackup::from_json(&json!({
                "metadata": {"name": "db-20261122"}, "spec": {"statefulSet": "db"},
                "status": {"phase": "Snapshotting", "deadline": "2027-01-01T00:00:00Z"},
            })));
        }
        _ => {
            facts.config.storage_class = Some("rbd".to_owned());
            facts.namespace_terminating = true;
        }
    }
    facts
}

/// Reads lines `key=value` as annotations of howdah and looks at what comes of them.
///
/// # Panics
/// If a property does not hold.
pub fn annotations(text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().map(|line| line.split_once('=').unwrap_or((line, "")));
    let mut annotations: BTreeMap<String, String> =
        lines.map(|(key, value)| (format!("{}{key}", names::ANNOTATION_PREFIX), value.to_owned())).collect();
    match parse(&annotations) {
        Ok(settings) => usable(&settings),
        Err(errors) => {
            assert!(!errors.is_empty() && errors.len() <= annotations.len());
            for error in &errors {
                assert!(annotations.contains_key(&error.annotation));
                assert!(!error.problem.is_empty() && !error.fix.is_empty(), "{error}");
            }
            // The others do not depend on them.
            annotations.retain(|key, _| !errors.iter().any(|error| error.annotation == *key));
            usable(&parse(&annotations).expect("what was not wrong is right"));
        }
    }
}

fn usable(settings: &Settings) {
    if let Some(schedule) = &settings.schedule {
        let zone = &settings.time_zone;
        assert!(schedule.latest(now(), zone).is_none_or(|slot| slot <= now()));
        assert!(schedule.next(now(), zone).is_none_or(|slot| slot > now()));
        assert_eq!(schedule.as_str().parse().as_ref(), Ok(schedule), "its text is read as itself");
    }
    assert!(settings.exemptions.values().all(|exemption| !exemption.reason.is_empty()));
}
