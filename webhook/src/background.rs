//! What one replica does for all of them: the one that holds the Lease `howdah-webhook`.
//!
//! Reviews need no leader. The audit does: two of them would write the same reports and tell everything twice. The lists of
//! protected StatefulSets do: one replica would put back what another has just taken away.

use howdah_adapters::leader::Election;
use prometheus_client::metrics::gauge::Gauge;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::audit::Auditor;
use crate::lists::Lists;

/// Leads whenever the Lease allows it, until the shutdown.
///
/// # Errors
/// If a part of the work ends by itself.
pub async fn run(
    election: Election,
    lists: Lists,
    auditor: Option<Auditor>,
    leading: Gauge,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    while !shutdown.is_cancelled() {
        let Some(leadership) = election.acquire(&shutdown).await else { break };
        leading.set(1);
        let ended = tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            ended = lists.run(leadership.lost()) => ended,
            ended = audit(auditor.as_ref(), leadership.lost()) => ended,
        };
        leading.set(0);
        leadership.resign().await;
        ended?;
        info!("leadership ended");
    }
    Ok(())
}

/// Audits until the leadership is lost, unless the audit is turned off.
async fn audit(auditor: Option<&Auditor>, lost: &CancellationToken) -> anyhow::Result<()> {
    match auditor {
        Some(auditor) => auditor.run(lost).await,
        None => {
            lost.cancelled().await;
            Ok(())
        }
    }
}
