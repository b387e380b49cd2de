//! Installs howdah into a lab as a user would install it, from deploy/overlays/lab. Its images are already
//! there: they are part of the nodes' disk.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::lab::Lab;
use crate::{progress, repository};

/// The namespace of all that is installed.
pub const NAMESPACE: &str = "howdah-system";
/// What is installed from; a path in the repository.
pub const OVERLAY: &str = "deploy/overlays/lab";
/// Both deployments, ready: a pod starts in seconds, and both nodes may be busy.
const READY_LIMIT: Duration = Duration::from_secs(240);
/// The first webhook pod that is ready writes the caBundle, asks itself through the API server, and closes.
const CA_LIMIT: Duration = Duration::from_secs(60);
/// Each look is a kubectl of its own, and costs a busy machine.
const POLL: Duration = Duration::from_secs(1);
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
    for deployment in ["howdah-webhook", "howdah-scheduler"] {
        let ready = holds_within(READY_LIMIT, || is_rolled_out(lab, deployment));
        ensure!(ready, "wait for deployment {deployment}: not ready after {} s", READY_LIMIT.as_secs());
    }
    let closed = holds_within(CA_LIMIT, || all_reached(lab));
    ensure!(closed, "wait for howdah's webhooks to fail closed: they do not after {} s", CA_LIMIT.as_secs());
    Ok(())
}

/// Looks once a second until `holds`, for at most `limit`. A look that fails is a look too early: the API
/// server of a busy lab may be slow to answer.
fn holds_within(limit: Duration, holds: impl Fn() -> Result<bool>) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if holds().unwrap_or(false) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(POLL);
    }
}

/// Whether all replicas are of the newest template, and ready.
fn is_rolled_out(lab: &Lab, deployment: &str) -> Result<bool> {
    let text = lab.kubectl_ok(&["-n", NAMESPACE, "get", "deployment", deployment, "-o", "json"])?;
    let object: Value = serde_json::from_str(&text).context("read a deployment")?;
    let (wanted, status) = (&object["spec"]["replicas"], &object["status"]);
    let counts = ["replicas", "updatedReplicas", "readyReplicas"];
    let observed = status["observedGeneration"] == object["metadata"]["generation"];
    Ok(observed && counts.iter().all(|count| status[count] == *wanted))
}

/// Whether every webhook that is meant to fail closed does: the API server has reached howdah then.
fn all_reached(lab: &Lab) -> Result<bool> {
    for kind in ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"] {
        let text = lab.kubectl_ok(&["get", kind, "howdah", "-o", "json"])?;
        let configuration: Value = serde_json::from_str(&text).context("read a webhook configuration")?;
        let webhooks =
            configuration["webhooks"].as_array().context("find the webhooks in their configuration")?;
        let meant = configuration["metadata"]["annotations"]["howdah.dev/fail-closed"].as_str();
        let meant = meant.context("find which webhooks are meant to fail closed")?;
        let closed = |name: &str| {
            webhooks.iter().any(|webhook| webhook["name"] == name && webhook["failurePolicy"] == "Fail")
        };
        if !meant.split(',').map(str::trim).all(closed) {
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
