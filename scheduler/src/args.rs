//! The configuration of the scheduler: flags, or environment variables of the same meaning.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use howdah_adapters::ceph::CephRunner;
use howdah_adapters::telemetry::LogFormat;

/// Backs up protected PostgreSQL StatefulSets on their schedule, and prunes old backups.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Args {
    /// Kubeconfig to use; without it the pod's service account, or what kubectl would use.
    #[arg(long, env = "HOWDAH_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of howdah itself: the Lease stands there.
    #[arg(long, env = "POD_NAMESPACE", default_value = "howdah-system")]
    pub namespace: String,
    /// Unique name of this replica in the leader election; the name of the pod.
    #[arg(long, env = "POD_NAME", default_value = "howdah-scheduler-local")]
    pub identity: String,
    /// Name of the service account, for the commands that error messages show.
    #[arg(long, env = "HOWDAH_SERVICE_ACCOUNT", default_value = "howdah-scheduler")]
    pub service_account: String,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, env = "HOWDAH_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Seconds between two looks at the schedules.
    #[arg(long, env = "HOWDAH_WAKE_SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=30))]
    pub wake_seconds: u32,
    /// Backups that may be under way at the same time in the whole cluster.
    #[arg(long, env = "HOWDAH_CONCURRENCY", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub concurrency: u16,
    /// Backups that may be under way at the same time in one pool. Where there are several pools, more places in the cluster
    /// than in a pool let a slow one hold up none but its own.
    #[arg(long, env = "HOWDAH_CONCURRENCY_PER_POOL", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub concurrency_per_pool: u16,
    /// Where the rbd command runs: `local`, in the scheduler's own container, or `toolbox`, in the pod of Rook's.
    #[arg(long, env = "HOWDAH_CEPH_RUNNER", default_value = "local")]
    pub ceph_runner: CephRunner,
    /// Namespace of the Secret with the Ceph key, of the monitors' addresses, and of the toolbox.
    #[arg(long, env = "HOWDAH_CEPH_NAMESPACE", default_value = "rook-ceph")]
    pub ceph_namespace: String,
    /// Ceph user that snapshots. It must not have the right to blocklist.
    #[arg(long, env = "HOWDAH_CEPH_USER", default_value = "howdah-backup")]
    pub ceph_user: String,
    /// `text` or `json`.
    #[arg(long, env = "HOWDAH_LOG_FORMAT", default_value = "json")]
    pub log_format: LogFormat,
    /// Which log lines are written, as `info` or `info,howdah_scheduler=debug`.
    #[arg(long, env = "HOWDAH_LOG", default_value = "info")]
    pub log: String,
}
