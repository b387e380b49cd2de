//! `backup`: asks for a backup by hand, and follows it to its end.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use howdah_adapters::kubernetes::{KubernetesError, call, find};
use howdah_adapters::records::{PostgresBackup, PostgresBackupSpec};
use howdah_core::annotations;
use howdah_core::backup::{BackupStatus, Phase, Trigger};
use howdah_core::names;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt as _};
use tokio::time::Instant;

use crate::args::BackupArgs;

/// Between two looks at the record.
const POLL: Duration = Duration::from_secs(1);
/// Tries for a name that nobody has: more orders for one database in as many seconds are a runaway loop.
const NAME_TRIES: u32 = 5;
/// A scheduler takes an order up within some seconds; after this somebody should look for it.
const UNNOTICED: Duration = Duration::from_secs(30);

/// Exit code of a command that stopped waiting for what goes on; 2 is clap's.
const STILL_RUNNING: u8 = 3;

/// What was followed goes on, but was not over when the time to wait was.
#[derive(Debug)]
pub struct StillRunning(pub String);

impl fmt::Display for StillRunning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StillRunning {}

/// How a command ends that ended with `error`.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<StillRunning>() {
        Some(_) => ExitCode::from(STILL_RUNNING),
        None => ExitCode::FAILURE,
    }
}

/// Creates the record and, if asked to, waits for its end; the answer is what to print.
pub async fn run(client: Client, arguments: BackupArgs) -> anyhow::Result<String> {
    let namespace = arguments.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let database = protected(&client, &namespace, &arguments.name).await?;
    let records = Api::<PostgresBackup>::namespaced(client, &namespace);
    let name = create(&records, &namespace, &arguments, &database).await?;
    if !arguments.wait {
        return Ok(format!(
            "backup {namespace}/{name} is ordered; follow it with: kubectl get pgb {name} -n {namespace} -w\n"
        ));
    }
    follow(&records, &namespace, &name, Duration::from_secs(arguments.timeout_seconds)).await
}

/// Creates the record and returns its name, which holds the second: somebody else's of the same second is waited out.
async fn create(
    records: &Api<PostgresBackup>,
    namespace: &str,
    arguments: &BackupArgs,
    database: &StatefulSet,
) -> anyhow::Result<String> {
    for left in (0..NAME_TRIES).rev() {
        let order = order(arguments, database, Timestamp::now());
        let name = order.name_any();
        let attempt = format!("create the PostgresBackup {namespace}/{name}");
        match call(attempt, records.create(&PostParams::default(), &order)).await {
            Err(KubernetesError::AlreadyExists { .. }) if left > 0 => tokio::time::sleep(POLL).await,
            created => return Ok(created.map(|_| name)?),
        }
    }
    bail!("create a PostgresBackup in {namespace}: others take every second; try again")
}

/// The StatefulSet, if howdah would back it up.
async fn protected(client: &Client, namespace: &str, name: &str) -> anyhow::Result<StatefulSet> {
    let label = format!("{}={}", names::PROTECT_LABEL, names::PROTECT_VALUE);
    let sets = Api::<StatefulSet>::namespaced(client.clone(), namespace);
    let found = find(format!("get the StatefulSet {namespace}/{name}"), &sets, name).await?;
    let Some(set) = found else {
        bail!(
            "back up {namespace}/{name}: there is no such StatefulSet; list the protected ones with: \
             kubectl get statefulsets -A -l {label}"
        )
    };
    let value = set.labels().get(names::PROTECT_LABEL);
    ensure!(
        value.is_some_and(|value| value == names::PROTECT_VALUE),
        "back up {namespace}/{name}: it is not protected by howdah; run: \
         kubectl label statefulset {name} -n {namespace} {label}"
    );
    if let Err(errors) = annotations::parse(set.annotations()) {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        bail!("back up {namespace}/{name}: its annotations cannot be read: {}", errors.join("; "));
    }
    Ok(set)
}

fn order(arguments: &BackupArgs, database: &StatefulSet, now: Timestamp) -> PostgresBackup {
    let spec = PostgresBackupSpec {
        stateful_set: arguments.name.clone(),
        stateful_set_uid: database.uid(),
        slot: None,
        trigger: Trigger::Manual,
        consistency: arguments.consistency,
    };
    let mut order = PostgresBackup::new(&names::manual_backup_name(&arguments.name, now), spec);
    order.labels_mut().insert(names::DATABASE_LABEL.to_owned(), arguments.name.clone());
    order
}

/// Tells each phase on standard error until the backup is over.
async fn follow(
    records: &Api<PostgresBackup>,
    namespace: &str,
    name: &str,
    limit: Duration,
) -> anyhow::Result<String> {
    let began = Instant::now();
    let tell = |line: &str| eprintln!("{:6.1}s  {line}", began.elapsed().as_secs_f64());
    let (mut shown, mut hinted) = (String::new(), false);
    loop {
        let attempt = format!("follow the backup {namespace}/{name}");
        // One answer that is lost is no reason to stop; a record that is gone is.
        let status = match call(attempt, records.get(name)).await {
            Ok(record) => Some(record.status.unwrap_or_default()),
            Err(error) if error.is_not_found() => {
                return Err(error).context("somebody deleted the record");
            }
            Err(error) => {
                tell(&error.to_string());
                None
            }
        };
        if let Some(status) = status {
            let line = progress(&status);
            if line != shown {
                tell(&line);
                shown = line;
            }
            if status.phase.is_terminal() {
                return end(namespace, name, &status);
            }
            if status.phase == Phase::Reserved && !hinted && began.elapsed() > UNNOTICED {
                tell(
                    "no scheduler has taken it up; another backup of the database may be under way, or see: \
                     kubectl get pods -n howdah-system",
                );
                hinted = true;
            }
        }
        if began.elapsed() > limit {
            let text = format!(
                "wait for the backup {namespace}/{name}: it is still in phase {shown} after {} s and goes on; \
                 follow it with: kubectl get pgb {name} -n {namespace} -w",
                limit.as_secs()
            );
            return Err(StillRunning(text).into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// One line for where the backup stands.
fn progress(status: &BackupStatus) -> String {
    let phase = status.phase.as_str();
    match (&status.failure, status.phase) {
        (Some(failure), Phase::Waiting | Phase::Undoing) => {
            let until = status.retry_at.map(|at| format!(", trying again at {at}")).unwrap_or_default();
            format!("{phase} (attempt {}{until}): {}; {}", status.attempt, failure.reason, failure.cure)
        }
        _ if status.attempt > 1 => format!("{phase} (attempt {})", status.attempt),
        _ => phase.to_owned(),
    }
}

/// What a backup that is over comes to.
fn end(namespace: &str, name: &str, status: &BackupStatus) -> anyhow::Result<String> {
    if !status.phase.is_success() {
        let why = status.failure.as_ref().map_or_else(
            || "its record gives no reason".to_owned(),
            |failure| format!("{}: {}; {}", failure.step.as_str(), failure.reason, failure.cure),
        );
        let verb = if status.phase == Phase::Stuck { "is stuck" } else { "failed" };
        bail!("the backup {namespace}/{name} {verb} in {why}");
    }
    let class = status.consistency.map_or("none", |class| class.as_str());
    let snapshot = match (&status.image, &status.snapshot) {
        (Some(image), Some(snapshot)) => format!("{}@{}", image.spec(), snapshot.name),
        _ => "unknown".to_owned(),
    };
    let mut text = format!("backup {namespace}/{name} is taken: {class}, snapshot {snapshot}\n");
    for condition in status.conditions.iter().filter(|condition| condition.status != "True") {
        text.push_str(&format!("  {} is {}: {}\n", condition.kind, condition.status, condition.message));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn status(status: Value) -> BackupStatus {
        serde_json::from_value(status).unwrap()
    }

    #[test]
    fn an_order_names_the_set_and_its_uid_and_nothing_of_a_schedule() {
        let database: StatefulSet =
            serde_json::from_value(json!({"metadata": {"name": "db", "uid": "u-1"}})).unwrap();
        let arguments = BackupArgs {
            name: "db".to_owned(),
            namespace: None,
            consistency: Some(annotations::Consistency::Crash),
            wait: false,
            timeout_seconds: 1,
        };
        let order = order(&arguments, &database, "2026-11-22T03:00:00Z".parse().unwrap());
        assert_eq!(order.name_any(), "db-m-20261122030000");
        assert_eq!(order.spec.stateful_set_uid.as_deref(), Some("u-1"));
        assert_eq!((order.spec.trigger, order.spec.slot), (Trigger::Manual, None));
        assert_eq!(order.spec.consistency, Some(annotations::Consistency::Crash));
    }

    #[test]
    fn progress_tells_why_it_waits() {
        let failure =
            json!({"step": "Preflight", "kind": "Transient", "reason": "the pod is gone", "cure": "wait"});
        let waiting = status(
            json!({"phase": "Waiting", "attempt": 2, "retryAt": "2026-11-22T03:00:20Z", "failure": failure}),
        );
        let line = progress(&waiting);
        for part in ["Waiting", "attempt 2", "03:00:20", "the pod is gone", "wait"] {
            assert!(line.contains(part), "{line}");
        }
        assert_eq!(progress(&status(json!({"phase": "Snapshotting", "attempt": 1}))), "Snapshotting");
    }

    #[test]
    fn a_backup_of_a_lower_class_says_why() {
        let taken = status(json!({
            "phase": "Taken", "consistency": "crash",
            "image": {"pool": "p", "name": "i", "id": "1"}, "snapshot": {"name": "s", "id": 4, "size": 1},
            "conditions": [
                {"type": "Online", "status": "False", "reason": "CredentialsMissing", "message": "no Secret; make one",
                 "lastTransitionTime": "2026-11-22T03:00:00Z"},
                {"type": "Pruned", "status": "True", "reason": "Pruned", "message": "done",
                 "lastTransitionTime": "2026-11-22T03:00:00Z"}]
        }));
        let text = end("shop", "db-m-1", &taken).unwrap();
        assert_eq!(
            text,
            "backup shop/db-m-1 is taken: crash, snapshot p/i@s\n  Online is False: no Secret; make one\n"
        );
    }

    #[test]
    fn a_failure_is_an_error_with_its_cure() {
        let failure =
            json!({"step": "Preflight", "kind": "Permanent", "reason": "fsync is off", "cure": "turn it on"});
        let failed = status(json!({"phase": "Failed", "failure": failure}));
        let error = end("shop", "db-m-1", &failed).unwrap_err().to_string();
        assert_eq!(error, "the backup shop/db-m-1 failed in Preflight: fsync is off; turn it on");
    }
}
