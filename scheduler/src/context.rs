//! What every part of the scheduler shares.

use howdah_adapters::kubernetes::Kubernetes;
use howdah_core::preflight::HealthCheck;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::args::Args;
use crate::cache::Caches;
use crate::metrics::Metrics;
use crate::places::Places;

/// The parts of a running scheduler.
#[derive(Debug)]
pub struct Context {
    /// The configuration.
    pub args: Args,
    /// The API server.
    pub kubernetes: Kubernetes,
    /// The caches.
    pub caches: Caches,
    /// The metrics.
    pub metrics: Metrics,
    /// How many backups may be under way.
    pub places: Places,
    /// What Ceph's health check found, and when.
    pub health: Mutex<Option<(Instant, Vec<HealthCheck>)>>,
}
