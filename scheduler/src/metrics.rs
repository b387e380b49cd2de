//! What the scheduler counts. No label ever carries a name or a namespace: their number has no bound.

use std::sync::atomic::AtomicU64;

use howdah_core::annotations::Consistency;
use howdah_core::backup::{BackupStatus, Phase};
use howdah_core::restore::{Phase as RestorePhase, RestoreStatus};
use howdah_core::verify::{Phase as DrillPhase, VerifyStatus};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// Upper bounds in seconds: a quiet backup takes about two, one that retries until its deadline half an hour.
const DURATION_BUCKETS: [f64; 9] = [1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 1800.0];

/// Upper bounds in seconds: an idle tick over ten thousand databases takes some ten milliseconds, and the next one comes
/// after five seconds.
const TICK_BUCKETS: [f64; 8] = [0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0];

/// How a backup ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
    consistency: &'static str,
}

/// How a restore or a restore drill ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndOutcome {
    outcome: &'static str,
}

/// The metrics of the scheduler; clones share the values.
#[derive(Debug, Clone)]
pub struct Metrics {
    backups: Family<Outcome, Counter>,
    duration: Histogram,
    last_end: Family<Outcome, Gauge<f64, AtomicU64>>,
    restores: Family<EndOutcome, Counter>,
    drills: Family<EndOutcome, Counter>,
    /// Age of the last good drill of the database that has waited longest for one, of those that ask for drills.
    pub stalest_drill: Gauge<f64, AtomicU64>,
    /// Backups that a restore drill found damaged.
    pub damaged: Gauge,
    /// Age of the last good backup of the database that has waited longest for one.
    pub stalest_success: Gauge<f64, AtomicU64>,
    /// Protected databases that have a schedule and no good backup at all.
    pub without_backup: Gauge,
    /// Backups that ended stuck and wait for a human.
    pub stuck: Gauge,
    /// Backups and restores under way.
    pub open: Gauge,
    /// 1 while this replica leads.
    pub leading: Gauge,
    /// Looks at the schedules.
    pub ticks: Counter,
    /// How long a look at all schedules takes.
    pub tick_duration: Histogram,
    /// Snapshots deleted by retention.
    pub pruned: Counter,
    /// Slots that were missed by more than the catch-up deadline.
    pub missed: Counter,
    /// Times the wall clock was seen to jump.
    pub clock_jumps: Counter,
    /// Protected databases whose annotations do not parse.
    pub unreadable: Gauge,
}

impl Metrics {
    /// Registers everything in `registry`.
    pub fn new(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("scheduler");
        Self {
            backups: added(registry, "backups", "Backups that ended", Family::default()),
            duration: added(
                registry,
                "backup_duration_seconds",
                "Time from the first attempt to the end of a backup",
                Histogram::new(DURATION_BUCKETS),
            ),
            last_end: added(
                registry,
                "last_backup_end_timestamp_seconds",
                "When the last backup with this outcome ended, since this replica leads",
                Family::default(),
            ),
            restores: added(registry, "restores", "Restores that ended", Family::default()),
            drills: added(registry, "drills", "Restore drills that ended", Family::default()),
            stalest_drill: added(
                registry,
                "stalest_drill_age_seconds",
                "Time since the last good restore drill of the database that has waited longest, of those that ask for drills",
                Gauge::default(),
            ),
            damaged: added(
                registry,
                "backups_damaged",
                "Backups that a restore drill found damaged",
                Gauge::default(),
            ),
            stalest_success: added(
                registry,
                "stalest_success_age_seconds",
                "Age of the newest good backup of the scheduled database that has waited longest",
                Gauge::default(),
            ),
            without_backup: added(
                registry,
                "databases_without_backup",
                "Scheduled databases without any good backup",
                Gauge::default(),
            ),
            stuck: added(
                registry,
                "backups_stuck",
                "Backups that ended stuck and wait for a human",
                Gauge::default(),
            ),
            open: added(registry, "backups_open", "Backups and restores under way", Gauge::default()),
            leading: added(registry, "leading", "1 while this replica leads", Gauge::default()),
            ticks: added(registry, "ticks", "Looks at the schedules", Counter::default()),
            tick_duration: added(
                registry,
                "tick_duration_seconds",
                "How long a look at all schedules takes",
                Histogram::new(TICK_BUCKETS),
            ),
            pruned: added(registry, "snapshots_pruned", "Snapshots deleted by retention", Counter::default()),
            missed: added(
                registry,
                "slots_missed",
                "Slots that were missed by more than the catch-up deadline",
                Counter::default(),
            ),
            clock_jumps: added(
                registry,
                "clock_jumps",
                "Times the wall clock was seen to jump by half a minute or more",
                Counter::default(),
            ),
            unreadable: added(
                registry,
                "databases_unreadable",
                "Protected databases whose annotations do not parse",
                Gauge::default(),
            ),
        }
    }

    /// Counts a restore that ended.
    pub fn restore_ended(&self, status: &RestoreStatus) {
        let outcome = match status.phase {
            RestorePhase::Completed => "completed",
            RestorePhase::Stuck => "stuck",
            _ => "failed",
        };
        self.restores.get_or_create(&EndOutcome { outcome }).inc();
    }

    /// Counts a restore drill that ended.
    pub fn drill_ended(&self, status: &VerifyStatus) {
        let outcome = match status.phase {
            DrillPhase::Verified => "verified",
            DrillPhase::Damaged => "damaged",
            _ => "inconclusive",
        };
        self.drills.get_or_create(&EndOutcome { outcome }).inc();
    }

    /// Counts a backup that ended.
    pub fn ended(&self, status: &BackupStatus) {
        let outcome = Outcome {
            outcome: match status.phase {
                Phase::Taken => "taken",
                Phase::Stuck => "stuck",
                _ => "failed",
            },
            consistency: status.consistency.map_or("none", Consistency::as_str),
        };
        self.backups.get_or_create(&outcome).inc();
        let (Some(start), Some(end)) = (status.started_at, status.finished_at) else { return };
        self.duration.observe(end.duration_since(start).as_secs_f64());
        self.last_end.get_or_create(&outcome).set(end.as_second() as f64);
    }
}

/// The metric, after adding it to the registry, which shares its value.
fn added<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}
