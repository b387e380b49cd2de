//! How a howdah process starts and ends: crypto provider first; on a signal not ready, drain, join every task by name.

use std::collections::HashMap;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

/// Makes aws-lc-rs the process's TLS crypto provider. Call it first in every `main` (and in tests that use TLS).
///
/// rustls picks a provider by itself only if exactly one is compiled in, and panics at first use otherwise.
///
/// # Errors
/// If another provider was installed before: then two crypto libraries are in the process, which is never meant.
pub fn install_crypto_provider() -> anyhow::Result<()> {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        bail!("install the aws-lc-rs crypto provider: another one is already installed");
    }
    Ok(())
}

/// A token that is cancelled by the first SIGTERM or SIGINT. Must be called inside a tokio runtime.
///
/// # Errors
/// If the signal handlers cannot be installed.
pub fn on_signal() -> anyhow::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let token = CancellationToken::new();
    let cancelled_by_signal = token.clone();
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        info!(signal = name, "shutting down");
        cancelled_by_signal.cancel();
    });
    Ok(token)
}

/// The named tasks of a process. One that ends before the shutdown is fatal: the others are stopped and the
/// process exits with an error, so that Kubernetes restarts it, instead of living on half dead.
#[derive(Debug)]
pub struct Tasks {
    set: JoinSet<anyhow::Result<()>>,
    names: HashMap<Id, &'static str>,
    shutdown: CancellationToken,
}

impl Tasks {
    /// No tasks yet. `shutdown` is what every task watches; it is cancelled when any task ends early.
    #[must_use]
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { set: JoinSet::new(), names: HashMap::new(), shutdown }
    }

    /// Starts a task. It should return `Ok(())` soon after the shutdown token is cancelled, and not before.
    pub fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let handle = self.set.spawn(task);
        self.names.insert(handle.id(), name);
    }

    /// Runs until the shutdown token is cancelled or a task ends, then gives all tasks `drain` to end.
    ///
    /// # Errors
    /// Names each task that ended early, failed, panicked, or had to be aborted because it outlived `drain`.
    pub async fn run(mut self, drain: Duration) -> anyhow::Result<()> {
        let mut problems = Vec::new();
        tokio::select! {
            () = self.shutdown.cancelled() => {}
            ended = self.set.join_next_with_id() => match ended {
                None => return Ok(()),
                Some(ended) => {
                    // A signal and the end of a task may arrive together; then the end is not early.
                    let early = !self.shutdown.is_cancelled();
                    let (name, problem) = self.outcome(ended);
                    match problem {
                        Some(problem) => problems.push(format!("{name}: {problem}")),
                        None if early => problems.push(format!("{name}: ended before the shutdown")),
                        None => {}
                    }
                    self.shutdown.cancel();
                }
            },
        }
        let deadline = tokio::time::Instant::now() + drain;
        loop {
            match tokio::time::timeout_at(deadline, self.set.join_next_with_id()).await {
                Ok(None) => break,
                Ok(Some(ended)) => {
                    if let (name, Some(problem)) = self.outcome(ended) {
                        problems.push(format!("{name}: {problem}"));
                    }
                }
                Err(_) => {
                    let mut late: Vec<&str> = self.names.values().copied().collect();
                    late.sort_unstable();
                    self.set.abort_all();
                    problems.push(format!(
                        "{}: still running {} s after the signal",
                        late.join(", "),
                        drain.as_secs()
                    ));
                    break;
                }
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        for problem in &problems {
            error!(task.problem = %problem, "a task ended badly");
        }
        Err(anyhow!("tasks ended badly: {}", problems.join("; ")))
    }

    /// The name of an ended task, and what was wrong with its end.
    fn outcome(
        &mut self,
        ended: Result<(Id, anyhow::Result<()>), JoinError>,
    ) -> (&'static str, Option<String>) {
        let (id, problem) = match ended {
            Ok((id, Ok(()))) => (id, None),
            Ok((id, Err(failure))) => (id, Some(format!("{failure:#}"))),
            Err(join) => (join.id(), Some(join.to_string())),
        };
        (self.names.remove(&id).unwrap_or("unnamed task"), problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAIN: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn tasks_that_end_after_the_signal_are_a_clean_exit() {
        let token = CancellationToken::new();
        let mut tasks = Tasks::new(token.clone());
        let watched = token.clone();
        tasks.spawn("watcher", async move {
            watched.cancelled().await;
            Ok(())
        });
        token.cancel();
        tasks.run(DRAIN).await.unwrap();
    }

    #[tokio::test]
    async fn a_task_that_ends_early_stops_the_others_and_is_named() {
        let token = CancellationToken::new();
        let mut tasks = Tasks::new(token.clone());
        let watched = token.clone();
        tasks.spawn("watcher", async move {
            watched.cancelled().await;
            Ok(())
        });
        tasks.spawn("server", async { Ok(()) });
        let error = tasks.run(DRAIN).await.unwrap_err().to_string();
        assert!(token.is_cancelled());
        assert!(error.contains("server: ended before the shutdown"), "{error}");
        assert!(!error.contains("watcher"), "{error}");
    }

    #[tokio::test]
    async fn a_failure_and_a_panic_are_reported_by_name() {
        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.spawn("reader", async { Err(anyhow!("read the socket").context("serve")) });
        tasks.spawn("writer", async { panic!("disk on fire") });
        let error = tasks.run(DRAIN).await.unwrap_err().to_string();
        assert!(error.contains("reader: serve: read the socket"), "{error}");
        assert!(error.contains("writer: ") && error.contains("disk on fire"), "{error}");
    }

    #[tokio::test]
    async fn a_task_that_outlives_the_drain_is_aborted_and_named() {
        let token = CancellationToken::new();
        let mut tasks = Tasks::new(token.clone());
        tasks.spawn("stubborn", std::future::pending());
        token.cancel();
        let error = tasks.run(DRAIN).await.unwrap_err().to_string();
        assert!(error.contains("stubborn: still running"), "{error}");
    }
}
