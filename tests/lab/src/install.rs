//! Installs howdah into a lab as a user would install it, from deploy/overlays/lab. Its images are already
//! there: they are part of the nodes' disk.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::lab::Lab;
use crate::{process, progress, repository};

/// The namespace of all that is installed.
pub const NAMESPACE: &str = "howdah-system";
/// What is installed from; a path in the repository.
pub const OVERLAY: &str = "deploy/overlays/lab";
/// Both deployments, ready: a pod starts in some 10 s on an emulated node, and both nodes may be busy.
const READY_LIMIT: Duration = Duration::from_secs(240);
/// The caBundle follows the first webhook pod's start.
const CA_LIMIT: Duration = Duration::from_secs(60);
/// The last lines of a pod's log that an error quotes.
const LOG_LINES: &str = "--tail=20";

/// Applies deploy/overlays/lab to a lab with nodes and waits until both components serve. Doing it again
/// applies what changed.
pub fn install(lab: &Lab) -> Result<()> {
    let overlay = repository::root().join(OVERLAY);
    let overlay = overlay.to_str().context("write the overlay's path as text")?;
    lab.kubectl_ok(&["apply", "--server-side", "--force-conflicts", "-k", overlay])?;
    progress::step("howdah serves", || wait_ready(lab))
        .map_err(|error| anyhow!("{error:#}\n{}", circumstances(lab)))
}

fn wait_ready(lab: &Lab) -> Result<()> {
    let limit = format!("--timeout={}s", READY_LIMIT.as_secs());
    for deployment in ["deployment/howdah-webhook", "deployment/howdah-scheduler"] {
        lab.kubectl_ok(&["-n", NAMESPACE, "rollout", "status", deployment, &limit])
            .with_context(|| format!("wait for {deployment}"))?;
    }
    let trusted = process::wait_until(CA_LIMIT, || all_trusted(lab).unwrap_or(false));
    ensure!(trusted, "wait for the caBundle of howdah's webhooks: not set after {} s", CA_LIMIT.as_secs());
    Ok(())
}

/// Whether every webhook of both configurations carries a CA.
fn all_trusted(lab: &Lab) -> Result<bool> {
    for kind in ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"] {
        let text = lab.kubectl_ok(&["get", kind, "howdah", "-o", "json"])?;
        let configuration: Value = serde_json::from_str(&text).context("read a webhook configuration")?;
        let webhooks =
            configuration["webhooks"].as_array().context("find the webhooks in their configuration")?;
        let trusted = |webhook: &Value| {
            webhook["clientConfig"]["caBundle"].as_str().is_some_and(|bundle| !bundle.is_empty())
        };
        if webhooks.is_empty() || !webhooks.iter().all(trusted) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What somebody would look at next: pods, events, and the ends of the logs.
fn circumstances(lab: &Lab) -> String {
    let looks: [&[&str]; 4] = [
        &["get", "pods", "-o", "wide"],
        &["get", "events", "--sort-by=.lastTimestamp"],
        &["logs", "-l", "app.kubernetes.io/component=webhook", "--prefix", LOG_LINES],
        &["logs", "-l", "app.kubernetes.io/component=scheduler", "--prefix", LOG_LINES],
    ];
    let mut text = String::new();
    for look in looks {
        let args = [&["-n", NAMESPACE], look].concat();
        let answer = lab.kubectl_ok(&args).unwrap_or_else(|error| format!("{error:#}"));
        text.push_str(&format!("--- kubectl {}\n{}\n", args.join(" "), answer.trim_end()));
    }
    text
}
