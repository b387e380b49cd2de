//! The HTTP side: limits around every review, and an answer for whatever comes in.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use futures::FutureExt as _;
use howdah_core::policy::{self, Effect, Verdict};
use jiff::Timestamp;
use serde_json::Value;
use tracing::{Instrument as _, debug, error, info, info_span, warn};

use crate::denials::Denials;
use crate::facts::Cluster;
use crate::intake::Intake;
use crate::metrics::Metrics;
use crate::review::{self, Review};

/// Longest review. Below the `timeoutSeconds` of the webhook configurations (5 s), so that it is us who answers.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(4);

/// Which of the two calls of the API server a review is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Defaults are filled in.
    Mutate,
    /// The result is judged.
    Validate,
}

impl Phase {
    /// The word in logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mutate => "mutate",
            Self::Validate => "validate",
        }
    }
}

/// What every review needs.
#[derive(Clone)]
pub struct App {
    cluster: Cluster,
    metrics: Metrics,
    denials: Denials,
    intake: Intake,
    closing: Arc<AtomicBool>,
}

impl App {
    /// An app that answers from these facts.
    #[must_use]
    pub fn new(cluster: Cluster, metrics: Metrics, denials: Denials) -> Self {
        Self { cluster, metrics, denials, intake: Intake::default(), closing: Arc::default() }
    }

    /// From now on every answer asks the API server to close its connection: it keeps them for long, and a connection to
    /// a pod that ends is a failed request.
    pub fn close_connections(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }
}

/// The routes with their limits.
pub fn router(app: App) -> Router {
    let route = |phase: Phase| {
        post(async move |State(app): State<App>, request: Request| {
            answer(app, phase, request.into_body()).await
        })
    };
    Router::new()
        .route("/mutate", route(Phase::Mutate))
        .route("/validate", route(Phase::Validate))
        .route(
            "/probe",
            post(async |State(app): State<App>, request: Request| probe(app, request.into_body()).await),
        )
        .with_state(app)
}

/// Proves to a replica that asks through the API server that it reaches the webhook; see `howdah_certs::fail_closed`.
async fn probe(app: App, body: Body) -> Response {
    let refuse = |status: StatusCode, problem: &str| {
        (status, format!("howdah cannot read this probe: {problem}\n")).into_response()
    };
    match tokio::time::timeout(REVIEW_TIMEOUT, app.intake.take(body)).await {
        Ok(Ok(taken)) => match review::probed(&taken.bytes) {
            Some(answer) => json(&answer),
            None => refuse(StatusCode::BAD_REQUEST, "it is no review"),
        },
        Ok(Err(refused)) => refuse(refused.status, &refused.problem),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "it did not come in time"),
    }
}

/// One answer for one body, whatever it is and however slowly it comes.
async fn answer(app: App, phase: Phase, body: Body) -> Response {
    let started = Instant::now();
    let review = AssertUnwindSafe(review(&app, phase, body, started)).catch_unwind();
    let mut response = match tokio::time::timeout(REVIEW_TIMEOUT, review).await {
        Ok(Ok(response)) => response,
        Ok(Err(_)) => {
            error!(phase = phase.as_str(), "a review ended in a panic, which is a mistake in howdah");
            let problem = "howdah failed at this review; its log says where";
            unjudged(&app, phase, "failed", started, StatusCode::INTERNAL_SERVER_ERROR, problem)
        }
        Err(_) => {
            let limit_s = REVIEW_TIMEOUT.as_secs();
            let problem = format!("howdah did not have this review, or not its facts, within {limit_s} s");
            unjudged(&app, phase, "late", started, StatusCode::SERVICE_UNAVAILABLE, &problem)
        }
    };
    if app.closing.load(Ordering::Relaxed) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The answer, in plain text, to what is no review or was not judged: for the API server that is a failed call.
fn unjudged(
    app: &App,
    phase: Phase,
    verdict: &'static str,
    started: Instant,
    status: StatusCode,
    problem: &str,
) -> Response {
    app.metrics.unjudged(phase, verdict, started.elapsed());
    (status, format!("{problem}\n")).into_response()
}

async fn review(app: &App, phase: Phase, body: Body, started: Instant) -> Response {
    let taken = match app.intake.take(body).await {
        Ok(taken) => taken,
        Err(refused) => {
            let problem = format!("howdah cannot read this review: {}", refused.problem);
            return unjudged(app, phase, "malformed", started, refused.status, &problem);
        }
    };
    let review = match review::decode(&taken.bytes) {
        Ok(review) => review,
        Err(malformed) => {
            warn!(problem = malformed.problem, uid = malformed.uid, "received a malformed review");
            return match malformed.uid {
                Some(uid) => {
                    app.metrics.unjudged(phase, "malformed", started.elapsed());
                    json(&review::refusal(&uid, &malformed.problem))
                }
                None => {
                    let problem = format!("howdah cannot read this review: {}", malformed.problem);
                    unjudged(app, phase, "malformed", started, StatusCode::BAD_REQUEST, &problem)
                }
            };
        }
    };
    let _room = taken.into_room();
    let span = info_span!(
        "review",
        phase = phase.as_str(),
        uid = review.uid,
        namespace = review.namespace,
        name = review.name,
        operation = ?review.operation,
        target = ?review.target,
        dry_run = review.dry_run,
    );
    judge(app, phase, &review, started).instrument(span).await
}

async fn judge(app: &App, phase: Phase, review: &Review, started: Instant) -> Response {
    let request = review.request();
    let now = Timestamp::now();
    let verdict = match phase {
        Phase::Mutate => policy::mutate(&request, &app.cluster.configured(), now),
        Phase::Validate => match app.cluster.facts(&request).await {
            Ok(gathered) => {
                if let Some(lookup) = gathered.lookup.filter(|_| !review.dry_run) {
                    app.metrics.looked_up(lookup);
                }
                let verdict = policy::validate(&request, &gathered.facts, now);
                if !review.dry_run {
                    app.denials.tell(&request, &gathered.facts, &review.user.name, &verdict);
                }
                verdict
            }
            Err(error) => {
                if !review.dry_run {
                    app.metrics.unjudged(phase, "not-now", started.elapsed());
                }
                warn!(%error, "refusing for now: a fact is missing");
                return json(&review::not_now(review, &error.to_string()));
            }
        },
    };
    if !review.dry_run {
        app.metrics.judged(phase, review.operation, &verdict, started.elapsed());
    }
    log(review, &verdict, started.elapsed());
    json(&review::answer(review, &verdict))
}

fn log(review: &Review, verdict: &Verdict, took: Duration) {
    let rules = |effect: Effect| {
        let outcomes = verdict.outcomes.iter().filter(|outcome| outcome.effect == effect);
        let fields = outcomes.map(|outcome| format!("{}:{}", outcome.rule.id, outcome.finding.field));
        fields.collect::<Vec<_>>().join(",")
    };
    let duration_ms = took.as_secs_f64() * 1000.0;
    if verdict.outcomes.is_empty() {
        let operations = verdict.patch.as_ref().map_or(0, |patch| patch.0.len());
        debug!(patch.operations = operations, duration_ms, "allowed");
    } else {
        info!(
            user = review.user.name,
            allowed = verdict.allowed,
            denied = rules(Effect::Deny),
            warned = rules(Effect::Warn),
            audited = rules(Effect::Audit),
            exempt = rules(Effect::Exempt),
            duration_ms,
            "judged"
        );
    }
}

fn json(answer: &Value) -> Response {
    // To write a value into bytes cannot fail.
    let bytes = serde_json::to_vec(answer).unwrap_or_default();
    ([(header::CONTENT_TYPE, "application/json")], bytes).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::to_bytes;
    use howdah_adapters::telemetry::{Readiness, registry};
    use howdah_core::policy::Config;
    use prometheus_client::registry::Registry;
    use serde_json::json;
    use tower::ServiceExt as _;

    use crate::intake::BODY_BYTES_MAX;

    /// A router whose cluster answers nothing: the address is one where nobody listens.
    fn app() -> (App, Registry) {
        let _ = howdah_adapters::shutdown::install_crypto_provider();
        let nowhere = kube::Config::new("http://127.0.0.1:9".parse().unwrap());
        let client = kube::Client::try_from(nowhere).unwrap();
        let (cluster, _) = Cluster::new(client, Config::default(), Readiness::new().gate("caches"));
        let mut registry = registry("webhook", "test");
        let metrics = Metrics::register(&mut registry);
        let (denials, _) = Denials::new(metrics.clone());
        (App::new(cluster, metrics, denials), registry)
    }

    async fn post(app: &App, path: &str, body: impl Into<Body>) -> (StatusCode, String) {
        let request = Request::post(path).body(body.into()).unwrap();
        let response = router(app.clone()).oneshot(request).await.unwrap();
        let status = response.status();
        let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    fn review(change: impl FnOnce(&mut Value)) -> String {
        let mut request = json!({
            "uid": "42",
            "resource": {"group": "apps", "version": "v1", "resource": "statefulsets"},
            "operation": "CREATE",
            "namespace": "shop",
            "name": "orders",
            "object": {
                "metadata": {"name": "orders", "labels": {"howdah.dev/protect": "true"}},
                "spec": {"replicas": 2, "template": {"spec": {}}},
            },
        });
        change(&mut request);
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request})
            .to_string()
    }

    async fn judged(app: &App, path: &str, body: String) -> Value {
        let (status, answer) = post(app, path, body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        serde_json::from_str::<Value>(&answer).unwrap()["response"].take()
    }

    fn metrics(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    #[tokio::test]
    async fn a_review_is_mutated_and_judged_and_counted() {
        let (app, registry) = app();
        let mutated = judged(&app, "/mutate", review(|_| ())).await;
        assert_eq!((&mutated["allowed"], &mutated["patchType"]), (&json!(true), &json!("JSONPatch")));
        let denied = judged(&app, "/validate", review(|_| ())).await;
        assert_eq!((&denied["uid"], &denied["status"]["code"]), (&json!("42"), &json!(403)));
        assert_eq!(denied["status"]["details"]["causes"][0]["field"], "spec.replicas");
        let text = metrics(&registry);
        let line = r#"howdah_policy_findings_total{rule="single-replica",verdict="deny",mode="enforce",operation="create"} 1"#;
        assert!(text.contains(line), "{text}");
        assert!(
            text.contains(r#"howdah_reviews_total{phase="mutate",operation="create",verdict="allow"} 1"#),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_dry_run_is_judged_the_same_and_counts_nothing() {
        let (app, registry) = app();
        let before = metrics(&registry);
        let denied = judged(&app, "/validate", review(|request| request["dryRun"] = json!(true))).await;
        assert_eq!(denied["allowed"], false);
        assert_eq!(metrics(&registry), before);
    }

    #[tokio::test]
    async fn a_probe_is_denied_by_its_answer_and_not_counted() {
        let (app, registry) = app();
        let before = metrics(&registry);
        let answer = judged(&app, "/probe", review(|_| ())).await;
        assert_eq!((&answer["uid"], &answer["allowed"]), (&json!("42"), &json!(false)));
        assert_eq!(post(&app, "/probe", "{}").await.0, StatusCode::BAD_REQUEST);
        assert_eq!(metrics(&registry), before);
    }

    #[tokio::test]
    async fn a_malformed_review_gets_a_clear_answer() {
        let (app, registry) = app();
        for body in ["", "{", "null", "[]", r#"{"kind":"AdmissionReview"}"#] {
            let (status, answer) = post(&app, "/validate", body).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
            assert!(answer.starts_with("howdah cannot read this review: "), "{answer}");
        }
        let refused =
            judged(&app, "/mutate", review(|request| request["operation"] = json!("EXPLODE"))).await;
        assert_eq!((&refused["uid"], &refused["status"]["code"]), (&json!("42"), &json!(400)));
        assert!(refused["status"]["message"].as_str().unwrap().contains("request.operation"));
        let (status, _) = post(&app, "/elsewhere", "{}").await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert!(metrics(&registry).contains(r#"verdict="malformed"} 5"#));
    }

    #[tokio::test]
    async fn a_body_beyond_the_limit_is_refused_and_one_at_it_is_read() {
        let (app, _) = app();
        let (status, answer) = post(&app, "/validate", vec![b' '; BODY_BYTES_MAX + 1]).await;
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
        assert!(answer.contains("7340032 bytes"), "{answer}");
        let mut body = review(|_| ()).into_bytes();
        body.resize(BODY_BYTES_MAX, b' ');
        let (status, _) = post(&app, "/validate", body).await;
        assert_eq!(status, StatusCode::OK);
    }

    #[tokio::test]
    async fn a_missing_fact_is_refused_for_now() {
        let (app, _) = app();
        let body = review(|request| {
            request["object"]["spec"]["template"]["spec"]["volumes"] =
                json!([{"name": "data", "persistentVolumeClaim": {"claimName": "by-hand"}}]);
        });
        let refused = judged(&app, "/validate", body).await;
        assert_eq!(refused["status"]["code"], 429);
        let message = refused["status"]["message"].as_str().unwrap();
        assert!(message.contains("look up the claim shop/by-hand"), "{message}");
    }

    #[tokio::test]
    async fn a_scale_whose_parent_is_unknown_passes() {
        let (app, registry) = app();
        let scale = json!({"metadata": {"uid": "u"}, "spec": {"replicas": 2}});
        let body = review(|request| {
            request["subResource"] = json!("scale");
            request["operation"] = json!("UPDATE");
            request["oldObject"] = scale.clone();
            request["object"] = scale;
        });
        assert_eq!(judged(&app, "/validate", body).await["allowed"], true);
        assert!(metrics(&registry).contains(r#"howdah_parent_lookups_total{source="failed"} 1"#));
    }

    #[tokio::test]
    async fn connections_are_closed_once_the_end_is_near() {
        let (app, _) = app();
        let send = || router(app.clone()).oneshot(Request::post("/mutate").body(Body::empty()).unwrap());
        assert!(!send().await.unwrap().headers().contains_key(header::CONNECTION));
        app.close_connections();
        assert_eq!(send().await.unwrap().headers()[header::CONNECTION], "close");
    }
}
