//! What is counted. Labels come from small fixed sets, never from a name or a namespace.

use std::collections::BTreeMap;
use std::time::Duration;

use howdah_core::annotations::Mode;
use howdah_core::policy::{Effect, Operation, RULES, Verdict};
use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
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
    untold: Counter,
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
            untold: Counter::default(),
        };
        registry.register("reviews", "Reviews answered, dry runs apart", metrics.reviews.clone());
        registry.register("policy_findings", "Violations found, dry runs apart", metrics.findings.clone());
        registry.register("review_duration_seconds", "Time to answer a review", metrics.duration.clone());
        registry.register(
            "parent_lookups",
            "Look-ups of the StatefulSet that a request is about",
            metrics.lookups.clone(),
        );
        registry.register(
            "denial_events_dropped",
            "Denials that became no Event, because there were too many",
            metrics.untold.clone(),
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

    /// Counts one denial that became no Event.
    pub fn untold(&self) {
        self.untold.inc();
    }

    fn review(&self, phase: Phase, operation: &'static str, verdict: &'static str, took: Duration) {
        let phase = phase.as_str();
        self.reviews.get_or_create(&ReviewLabels { phase, operation, verdict }).inc();
        self.duration.get_or_create(&PhaseLabel { phase }).observe(took.as_secs_f64());
    }
}

/// The metrics of the background work; only the replica that leads has values.
#[derive(Debug, Clone)]
pub struct AuditMetrics {
    findings: Family<AuditLabels, Gauge>,
    ending: Gauge,
    rounds: Counter,
    last: Gauge,
    written: Counter,
    /// 1 while this replica leads.
    pub leading: Gauge,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AuditLabels {
    rule: &'static str,
    effect: &'static str,
}

impl AuditMetrics {
    /// Makes the metrics and adds them to the registry.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            findings: Family::default(),
            ending: Gauge::default(),
            rounds: Counter::default(),
            last: Gauge::default(),
            written: Counter::default(),
            leading: Gauge::default(),
        };
        registry.register(
            "audit_findings",
            "Violations that protected StatefulSets have as they stand",
            metrics.findings.clone(),
        );
        registry.register(
            "audit_exemptions_ending",
            "Exemptions that end within 14 days",
            metrics.ending.clone(),
        );
        registry.register("audit_rounds", "Looks at all protected StatefulSets", metrics.rounds.clone());
        registry.register(
            "audit_last_round_timestamp_seconds",
            "When the last look ended, in seconds since 1970",
            metrics.last.clone(),
        );
        registry.register(
            "audit_reports_written",
            "Reports created, changed or deleted",
            metrics.written.clone(),
        );
        registry.register(
            "background_leading",
            "1 while this replica does the background work for all",
            metrics.leading.clone(),
        );
        metrics
    }

    /// Takes in one round: every rule and effect has a value, 0 where nothing was found.
    pub fn round(&self, counts: &BTreeMap<(&'static str, Effect), i64>, ending: usize, now: Timestamp) {
        for rule in &RULES {
            for effect in [Effect::Deny, Effect::Warn, Effect::Audit, Effect::Exempt] {
                let labels = AuditLabels { rule: rule.id, effect: effect.as_str() };
                let count = counts.get(&(rule.id, effect)).copied().unwrap_or(0);
                self.findings.get_or_create(&labels).set(count);
            }
        }
        self.ending.set(i64::try_from(ending).unwrap_or(i64::MAX));
        self.last.set(now.as_second());
        self.rounds.inc();
    }

    /// Counts a report that was written.
    pub fn wrote(&self) {
        self.written.inc();
    }

    /// Forgets what was found: another replica counts from now on.
    pub fn clear(&self) {
        self.findings.clear();
        self.ending.set(0);
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
