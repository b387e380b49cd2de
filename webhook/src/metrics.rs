//! What is counted. Labels come from small fixed sets, never from a name or a namespace.

use std::time::Duration;

use howdah_core::annotations::Mode;
use howdah_core::policy::{Operation, Verdict};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::http::Phase;

/// Bounds of the review times: a review from the caches takes well below a millisecond, one look-up a few.
const SECONDS: [f64; 9] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 4.0];

/// The metrics of reviews.
#[derive(Debug, Clone)]
pub struct Metrics {
    reviews: Family<ReviewLabels, Counter>,
    findings: Family<FindingLabels, Counter>,
    duration: Family<PhaseLabel, Histogram>,
    lookups: Family<LookupLabel, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReviewLabels {
    phase: &'static str,
    operation: &'static str,
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FindingLabels {
    rule: &'static str,
    verdict: &'static str,
    mode: &'static str,
    operation: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookupLabel {
    source: &'static str,
}

/// Where the StatefulSet that something belongs to was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// At the API server.
    ApiServer,
    /// In the cache of protected StatefulSets, because the API server did not answer.
    Cache,
    /// Nowhere, because the API server did not answer and the cache does not know it.
    Failed,
}

impl Metrics {
    /// Makes the metrics and adds them to the registry.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            reviews: Family::default(),
            findings: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            lookups: Family::default(),
        };
        registry.register("reviews", "Reviews answered, dry runs apart", metrics.reviews.clone());
        registry.register("policy_findings", "Violations found, dry runs apart", metrics.findings.clone());
        registry.register("review_duration_seconds", "Time to answer a review", metrics.duration.clone());
        registry.register(
            "parent_lookups",
            "Look-ups of the StatefulSet that a request is about",
            metrics.lookups.clone(),
        );
        metrics
    }

    /// Counts one review that was judged.
    pub fn judged(&self, phase: Phase, operation: Operation, verdict: &Verdict, took: Duration) {
        let operation = operation_label(operation);
        self.review(phase, operation, if verdict.allowed { "allow" } else { "deny" }, took);
        let mode = match verdict.mode {
            Some(Mode::Enforce) => "enforce",
            Some(Mode::Warn) => "warn",
            Some(Mode::Audit) => "audit",
            None => return,
        };
        for outcome in &verdict.outcomes {
            let labels =
                FindingLabels { rule: outcome.rule.id, verdict: outcome.effect.as_str(), mode, operation };
            self.findings.get_or_create(&labels).inc();
        }
    }

    /// Counts one review that could not be judged.
    pub fn unjudged(&self, phase: Phase, verdict: &'static str, took: Duration) {
        self.review(phase, "unknown", verdict, took);
    }

    /// Counts one look-up.
    pub fn looked_up(&self, lookup: Lookup) {
        let source = match lookup {
            Lookup::Cache => "cache",
            Lookup::ApiServer => "api-server",
            Lookup::Failed => "failed",
        };
        self.lookups.get_or_create(&LookupLabel { source }).inc();
    }

    fn review(&self, phase: Phase, operation: &'static str, verdict: &'static str, took: Duration) {
        let phase = phase.as_str();
        self.reviews.get_or_create(&ReviewLabels { phase, operation, verdict }).inc();
        self.duration.get_or_create(&PhaseLabel { phase }).observe(took.as_secs_f64());
    }
}

const fn operation_label(operation: Operation) -> &'static str {
    match operation {
        Operation::Create => "create",
        Operation::Update => "update",
        Operation::Delete => "delete",
        Operation::Other => "other",
    }
}
