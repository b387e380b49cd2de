//! The scheduler of howdah: cron wake-ups become backups, old backups are pruned, and restores are carried out.
//!
//! Read it along a tick: [`tick`] wakes and asks `howdah_core::schedule` what is due, [`run`] drives the operation
//! ([`backup`]: `howdah_core::backup`, [`restore`]: `howdah_core::restore`), [`effects`] and [`restore`] do what that
//! says through `howdah_adapters`.

pub mod args;
mod backup;
mod cache;
mod context;
mod effects;
mod metrics;
mod places;
mod prune;
mod restore;
mod run;
mod tick;
mod verify;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use howdah_adapters::kubernetes::{self, Kubernetes};
use howdah_adapters::leader::{Election, LeaderSettings};
use howdah_adapters::shutdown::{self, Tasks};
use howdah_adapters::telemetry::{self, Diagnostics, Readiness};
use tokio::runtime::Runtime;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::args::Args;
use crate::cache::Caches;
use crate::context::Context;
use crate::metrics::Metrics;
use crate::places::Places;

/// Name of the Lease, of the component in events, and of the metrics' `component`.
const NAME: &str = "howdah-scheduler";
/// How long the tasks may take to end: a little more than the drain of the running backups.
const DRAIN: Duration = Duration::from_secs(80);

/// Runs the scheduler until a signal.
///
/// Waits itself: a future is compiled where it is first polled, and all of this would be a second time for `main`.
///
/// # Errors
/// If it cannot start, or a part of it ends early.
pub fn serve(args: Args) -> anyhow::Result<()> {
    Runtime::new().context("start the runtime")?.block_on(until_signal(args))
}

async fn until_signal(args: Args) -> anyhow::Result<()> {
    let shutdown = shutdown::on_signal()?;
    let client = kubernetes::connect(args.kubeconfig.as_deref()).await?;
    let mut registry = telemetry::registry(NAME, env!("CARGO_PKG_VERSION"));
    let metrics = Metrics::new(&mut registry);
    let readiness = Readiness::new();
    let ready = readiness.gate("caches");
    let diagnostics = Diagnostics::bind(args.listen, registry, readiness).await?;
    let (caches, feeds) = Caches::new(&client, &shutdown);
    let settings = LeaderSettings::new(&args.namespace, NAME, &args.identity);
    let election = Election::new(client.clone(), settings)?;
    let cx = Arc::new(Context {
        places: Places::new(usize::from(args.concurrency), usize::from(args.concurrency_per_pool)),
        kubernetes: Kubernetes::new(client, NAME),
        caches,
        metrics,
        health: Mutex::new(None),
        args,
    });

    // The server and the watches outlive the backups that are under way.
    let drained = CancellationToken::new();
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn("diagnostics", diagnostics.serve(drained.clone()));
    let [databases, backups, restores] = feeds;
    tasks.spawn("watch StatefulSets", databases);
    tasks.spawn("watch PostgresBackups", backups);
    tasks.spawn("watch PostgresRestores", restores);
    tasks.spawn("schedule", async move {
        let _drained = drained.drop_guard();
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            filled = cx.caches.filled() => filled?,
        }
        // Ready means able to lead; who leads is the Lease's business.
        ready.open();
        let ended = lead_terms(&cx, &election, &shutdown).await;
        ready.close();
        ended
    });
    tasks.run(DRAIN).await
}

/// Leads whenever the Lease allows it, until the shutdown.
async fn lead_terms(
    cx: &Arc<Context>,
    election: &Election,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    // A lease that was just given back is free: without this look it would be taken again at once.
    while !shutdown.is_cancelled() {
        let Some(leadership) = election.acquire(shutdown).await else { break };
        cx.metrics.leading.set(1);
        let ended = tick::lead(cx, leadership.mandate(), shutdown).await;
        cx.metrics.leading.set(0);
        leadership.resign().await;
        ended.context("lead")?;
        info!("leadership ended");
    }
    Ok(())
}
