//! The wire format: an AdmissionReview of admission.k8s.io/v1 in, an AdmissionReview out. No IO.
//!
//! Objects stay raw JSON: a typed round trip would drop the fields that this build does not know.

use base64::Engine as _;
use howdah_certs::fail_closed::PROBE_ANSWER;
use howdah_core::policy::{Operation, Request, Target, User, Verdict};
use serde::Deserialize;
use serde_json::{Value, json};

/// The one version of the API that is spoken.
const API_VERSION: &str = "admission.k8s.io/v1";
/// Longest description of what is wrong: it may quote what was sent, and goes into the log.
const PROBLEM_CHARS_MAX: usize = 300;
/// What the API server calls a review.
const KIND: &str = "AdmissionReview";
/// Every resource that the webhook configurations send: API group, resource and sub-resource.
const RESOURCES: [(Target, &str, &str, &str); 7] = [
    (Target::StatefulSet, "apps", "statefulsets", ""),
    (Target::Scale, "apps", "statefulsets", "scale"),
    (Target::HorizontalPodAutoscaler, "autoscaling", "horizontalpodautoscalers", ""),
    (Target::Pod, "", "pods", ""),
    (Target::Eviction, "", "pods", "eviction"),
    (Target::Claim, "", "persistentvolumeclaims", ""),
    (Target::DisruptionBudget, "policy", "poddisruptionbudgets", ""),
];

/// A request to review.
#[derive(Debug)]
pub struct Review {
    /// Names the request; the answer has to repeat it.
    pub uid: String,
    /// What is done.
    pub operation: Operation,
    /// What it is done to.
    pub target: Target,
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object, empty when it is generated on creation.
    pub name: String,
    /// Who asks.
    pub user: User,
    /// The seconds that a deletion grants; `None` where the request leaves it to the object.
    pub grace_s: Option<i64>,
    /// Whether nothing is going to be stored.
    pub dry_run: bool,
    /// The object as it is going to be.
    pub object: Option<Value>,
    /// The object as it is.
    pub old_object: Option<Value>,
}

impl Review {
    /// The part that the policy judges.
    #[must_use]
    pub fn request(&self) -> Request<'_> {
        Request {
            operation: self.operation,
            target: self.target,
            namespace: &self.namespace,
            name: &self.name,
            object: self.object.as_ref(),
            old_object: self.old_object.as_ref(),
            user: Some(&self.user),
            grace_s: self.grace_s,
        }
    }
}

/// A body that is no review.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The uid, where at least that could be read.
    pub uid: Option<String>,
    /// What is wrong, naming the field.
    pub problem: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireRequest {
    #[serde(default)]
    uid: String,
    resource: WireResource,
    #[serde(default)]
    sub_resource: String,
    operation: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    user_info: WireUser,
    #[serde(default)]
    dry_run: Option<bool>,
    #[serde(default)]
    options: Option<WireOptions>,
    #[serde(default)]
    object: Value,
    #[serde(default)]
    old_object: Value,
}

#[derive(Deserialize)]
struct WireResource {
    #[serde(default)]
    group: String,
    resource: String,
}

#[derive(Deserialize, Default)]
struct WireUser {
    #[serde(default)]
    username: String,
    #[serde(default)]
    groups: Option<Vec<String>>,
}

/// The part of DeleteOptions that matters; the options of other operations have none of it.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct WireOptions {
    #[serde(default)]
    grace_period_seconds: Option<i64>,
}

/// The whole body. The objects in it are read into raw JSON once and not copied again.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireReview {
    api_version: String,
    kind: String,
    request: WireRequest,
}

impl Malformed {
    fn new(uid: Option<String>, problem: &str) -> Self {
        Self { uid, problem: problem.chars().take(PROBLEM_CHARS_MAX).collect() }
    }
}

/// Reads a body.
///
/// # Errors
/// If it is no AdmissionReview of v1, or asks about something the webhook configurations do not send.
pub fn decode(body: &[u8]) -> Result<Review, Malformed> {
    let WireReview { api_version, kind, request } =
        serde_json::from_slice(body).map_err(|error| what_is_wrong(body, &error))?;
    let uid = Some(request.uid).filter(|uid| !uid.is_empty());
    let malformed = |problem: String| Malformed::new(uid.clone(), &problem);
    for (field, found, wanted) in [("apiVersion", api_version, API_VERSION), ("kind", kind, KIND)] {
        if found != wanted {
            return Err(malformed(format!("{field} is {found:?}, wanted {wanted}")));
        }
    }
    let Some(uid) = uid.clone() else {
        return Err(malformed("request.uid is absent; without it there is no answer".to_owned()));
    };
    let asked =
        (request.resource.group.as_str(), request.resource.resource.as_str(), request.sub_resource.as_str());
    let known = RESOURCES.iter().find(|(_, group, resource, sub)| (*group, *resource, *sub) == asked);
    let Some((target, ..)) = known else {
        let (group, resource, subresource) = asked;
        return Err(malformed(format!(
            "request.resource is {group}/{resource}/{subresource}, which howdah's webhook configurations do not send"
        )));
    };
    let operation = match request.operation.as_str() {
        "CREATE" => Operation::Create,
        "UPDATE" => Operation::Update,
        "DELETE" => Operation::Delete,
        "CONNECT" => Operation::Other,
        other => {
            return Err(malformed(format!(
                "request.operation is {other:?}, wanted CREATE, UPDATE, DELETE or CONNECT"
            )));
        }
    };
    let object = |value: Value, field: &str| match value {
        Value::Null => Ok(None),
        Value::Object(_) => Ok(Some(value)),
        other => Err(malformed(format!("request.{field} is {}, wanted an object", shown(&other)))),
    };
    let old_object = object(request.old_object, "oldObject")?;
    let object = object(request.object, "object")?;
    let needs_object = matches!(operation, Operation::Create | Operation::Update);
    if needs_object && object.is_none() {
        return Err(malformed(format!("request.object is absent in an {}", request.operation)));
    }
    let needs_old = matches!(operation, Operation::Update | Operation::Delete);
    if needs_old && old_object.is_none() {
        return Err(malformed(format!("request.oldObject is absent in an {}", request.operation)));
    }
    Ok(Review {
        uid,
        operation,
        target: *target,
        namespace: request.namespace,
        name: request.name,
        user: User { name: request.user_info.username, groups: request.user_info.groups.unwrap_or_default() },
        grace_s: request.options.and_then(|options| options.grace_period_seconds),
        dry_run: request.dry_run.unwrap_or(false),
        object,
        old_object,
    })
}

/// Says what is wrong with a body that cannot be read as a whole, piece by piece, and finds its uid if it has one.
fn what_is_wrong(body: &[u8], error_of_the_whole: &serde_json::Error) -> Malformed {
    let mut review: Value = match serde_json::from_slice(body) {
        Ok(review) => review,
        Err(error) => return Malformed::new(None, &format!("the body is no JSON: {error}")),
    };
    let uid = review["request"]["uid"].as_str().filter(|uid| !uid.is_empty()).map(str::to_owned);
    for (field, wanted) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        if review[field] != wanted {
            let problem = format!("{field} is {}, wanted {wanted}", shown(&review[field]));
            return Malformed::new(uid, &problem);
        }
    }
    let problem = match review["request"].take() {
        request @ Value::Object(_) => {
            // Repeated fields are all that only the whole shows.
            let error = serde_json::from_value::<WireRequest>(request).err();
            format!("request cannot be read: {}", error.as_ref().unwrap_or(error_of_the_whole))
        }
        other => format!("request is {}, wanted an object", shown(&other)),
    };
    Malformed::new(uid, &problem)
}

/// The answer that carries a verdict.
#[must_use]
pub fn answer(review: &Review, verdict: &Verdict) -> Value {
    let mut response = json!({"uid": review.uid, "allowed": verdict.allowed});
    if !verdict.allowed {
        let causes: Vec<Value> = verdict
            .causes
            .iter()
            .map(|cause| json!({"reason": cause.rule, "field": cause.field, "message": cause.message}))
            .collect();
        let reason = match verdict.code {
            422 => "Invalid",
            429 => "TooManyRequests",
            _ => "Forbidden",
        };
        response["status"] = status(verdict.code, reason, &verdict.message);
        let (_, group, kind, _) =
            RESOURCES.iter().find(|known| known.0 == review.target).unwrap_or(&RESOURCES[0]);
        let mut details = json!({"group": group, "kind": kind, "name": review.name, "causes": causes});
        if let Some(seconds) = verdict.retry_after_s {
            details["retryAfterSeconds"] = json!(seconds);
        }
        response["status"]["details"] = details;
    }
    if !verdict.warnings.is_empty() {
        response["warnings"] = json!(verdict.warnings);
    }
    if !verdict.audit_annotations.is_empty() {
        response["auditAnnotations"] = json!(verdict.audit_annotations);
    }
    if let Some(patch) = &verdict.patch {
        // To write it into bytes cannot fail.
        let bytes = serde_json::to_vec(patch).unwrap_or_default();
        response["patchType"] = json!("JSONPatch");
        response["patch"] = json!(base64::engine::general_purpose::STANDARD.encode(bytes));
    }
    envelope(response)
}

/// The answer to a review that cannot be judged now, because the cluster did not answer a question about it.
#[must_use]
pub fn not_now(review: &Review, problem: &str) -> Value {
    let message = format!("howdah cannot judge this now: {problem}; try again");
    let status = status(429, "TooManyRequests", &message);
    envelope(json!({"uid": review.uid, "allowed": false, "status": status}))
}

/// The answer to the question whether the API server reaches the webhook: a denial, because an allowed request proves
/// nothing. `None` when the body is no review.
#[must_use]
pub fn probed(body: &[u8]) -> Option<Value> {
    let review: Value = serde_json::from_slice(body).ok()?;
    let uid = review["request"]["uid"].as_str().filter(|uid| !uid.is_empty())?;
    let message = format!(
        "{PROBE_ANSWER}: this object is a question whether the webhook is reached, and is never stored"
    );
    let status = status(403, "Forbidden", &message);
    Some(envelope(json!({"uid": uid, "allowed": false, "status": status})))
}

/// The answer to something that is no review, where at least its uid is known.
#[must_use]
pub fn refusal(uid: &str, problem: &str) -> Value {
    let status = status(400, "BadRequest", &format!("howdah cannot read this review: {problem}"));
    envelope(json!({"uid": uid, "allowed": false, "status": status}))
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"status": "Failure", "code": code, "reason": reason, "message": message})
}

fn envelope(response: Value) -> Value {
    json!({"apiVersion": API_VERSION, "kind": KIND, "response": response})
}

/// A value for a message, short.
fn shown(value: &Value) -> String {
    const CHARS_MAX: usize = 60;
    match value {
        Value::Null => "absent".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        other => other.to_string().chars().take(CHARS_MAX).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut review = json!({
            "apiVersion": API_VERSION,
            "kind": KIND,
            "request": {
                "uid": "42",
                "resource": {"group": "apps", "version": "v1", "resource": "statefulsets"},
                "operation": "UPDATE",
                "namespace": "shop",
                "name": "orders",
                "userInfo": {"username": "eve"},
                "dryRun": true,
                "object": {"unknown": {"field": 1}},
                "oldObject": {},
            },
        });
        change(&mut review);
        serde_json::to_vec(&review).unwrap()
    }

    fn problem(change: impl FnOnce(&mut Value)) -> (Option<String>, String) {
        let malformed = decode(&body(change)).unwrap_err();
        (malformed.uid, malformed.problem)
    }

    #[test]
    fn a_review_is_read_and_its_object_stays_raw() {
        let review = decode(&body(|_| ())).unwrap();
        assert_eq!(
            (review.uid.as_str(), review.name.as_str(), review.user.name.as_str()),
            ("42", "orders", "eve")
        );
        assert_eq!(
            (review.operation, review.target, review.dry_run),
            (Operation::Update, Target::StatefulSet, true)
        );
        assert_eq!(review.object, Some(json!({"unknown": {"field": 1}})));
        let scale = decode(&body(|review| review["request"]["subResource"] = json!("scale"))).unwrap();
        assert_eq!(scale.target, Target::Scale);
    }

    #[test]
    fn a_deletion_carries_who_asks_and_the_grace_it_gives() {
        let deletion = |options: Value| {
            let change = json!({"request": {
                "resource": {"group": "", "resource": "pods"},
                "operation": "DELETE", "name": "",
                "userInfo": {"groups": ["system:nodes"]},
                "object": null, "options": options,
            }});
            decode(&body(|review| merge(review, &change))).unwrap()
        };
        let review = deletion(json!({"kind": "DeleteOptions", "gracePeriodSeconds": 0}));
        assert_eq!(
            (review.target, review.operation, review.grace_s),
            (Target::Pod, Operation::Delete, Some(0))
        );
        assert_eq!(review.user.groups, ["system:nodes"]);
        assert_eq!(deletion(Value::Null).grace_s, None, "as deletecollection sends it");
    }

    #[test]
    fn not_now_says_when() {
        let review = decode(&body(|_| ())).unwrap();
        let verdict = Verdict { code: 429, retry_after_s: Some(5), ..Verdict::default() };
        let status = answer(&review, &verdict)["response"]["status"].take();
        assert_eq!(
            (&status["reason"], &status["details"]["retryAfterSeconds"]),
            (&json!("TooManyRequests"), &json!(5))
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_field() {
        let known = Some("42".to_owned());
        for (change, field) in [
            (json!({"apiVersion": "admission.k8s.io/v1beta1"}), "apiVersion"),
            (json!({"kind": "Pod"}), "kind"),
            (json!({"request": {"operation": "EXPLODE"}}), "request.operation"),
            (json!({"request": {"operation": 7}}), "request cannot be read"),
            (json!({"request": {"resource": {"resource": "pods"}}}), "request.resource"),
            (json!({"request": {"resource": null}}), "request cannot be read"),
            (json!({"request": {"object": []}}), "request.object"),
            (json!({"request": {"object": null}}), "request.object"),
            (json!({"request": {"oldObject": null}}), "request.oldObject"),
            (json!({"request": {"operation": "DELETE", "oldObject": null}}), "request.oldObject"),
            (json!({"request": {"options": {"gracePeriodSeconds": "soon"}}}), "request cannot be read"),
            (json!({"request": {"dryRun": "yes"}}), "request cannot be read"),
        ] {
            let (uid, problem) = problem(|review| merge(review, &change));
            assert_eq!(uid, known, "{change}");
            assert!(problem.contains(field), "{change}: {problem}");
        }
    }

    #[test]
    fn without_a_uid_there_is_no_answer() {
        for change in
            [json!({"request": {"uid": null}}), json!({"request": {"uid": 7}}), json!({"request": null})]
        {
            assert_eq!(problem(|review| merge(review, &change)).0, None, "{change}");
        }
        assert_eq!(decode(b"").unwrap_err().uid, None);
        assert_eq!(decode(b"[]").unwrap_err().uid, None);
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(decode(deep.as_bytes()).unwrap_err().problem.contains("recursion"));
    }

    #[test]
    fn an_answer_repeats_the_uid_and_carries_the_patch_in_base64() {
        let review = decode(&body(|_| ())).unwrap();
        let patch = json_patch::diff(&json!({}), &json!({"a": 1}));
        let allowed = Verdict { allowed: true, patch: Some(patch), ..Verdict::default() };
        let answer = answer(&review, &allowed);
        assert_eq!(answer["response"]["uid"], "42");
        assert_eq!(answer["response"]["patchType"], "JSONPatch");
        let text = answer["response"]["patch"].as_str().unwrap();
        let text = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
        assert_eq!(text, br#"[{"op":"add","path":"/a","value":1}]"#);
        assert!(answer["response"].get("status").is_none() && answer["response"].get("warnings").is_none());
    }

    #[test]
    fn a_probe_is_answered_with_a_denial() {
        let answer = probed(&body(|_| ())).unwrap();
        assert_eq!(answer["response"]["uid"], "42");
        assert_eq!(
            (&answer["response"]["allowed"], &answer["response"]["status"]["code"]),
            (&json!(false), &json!(403))
        );
        assert!(answer["response"]["status"]["message"].as_str().unwrap().starts_with(PROBE_ANSWER));
        for nonsense in [&b""[..], b"{}", b"[]"] {
            assert_eq!(probed(nonsense), None);
        }
    }

    fn merge(into: &mut Value, change: &Value) {
        match (into, change) {
            (Value::Object(into), Value::Object(change)) => {
                for (key, value) in change {
                    merge(into.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
            (into, change) => *into = change.clone(),
        }
    }
}
