//! `verify`: asks for a restore drill of a backup, and follows it to its end.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use howdah_adapters::kubernetes::call;
use howdah_adapters::records::PostgresBackup;
use howdah_core::backup::{BackupStatus, Phase as BackupPhase};
use howdah_core::names;
use howdah_core::verify::{Phase, VerifyStatus};
use jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::time::Instant;

use crate::args::VerifyArgs;
use crate::backup::StillRunning;

/// Between two looks at the record.
const POLL: Duration = Duration::from_secs(1);

/// Annotates the record and, if asked to, waits for the drill's end; the answer is what to print.
pub async fn run(client: Client, arguments: VerifyArgs) -> anyhow::Result<String> {
    let namespace = arguments.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let (records, name) = (Api::<PostgresBackup>::namespaced(client, &namespace), &arguments.backup);
    let place = format!("{namespace}/{name}");
    let record = call(format!("get the PostgresBackup {place}"), records.get(name)).await?;
    let status = record.status.unwrap_or_default();
    let there = status.phase.is_success() || status.phase == BackupPhase::Damaged;
    ensure!(
        there,
        "try {place}: its phase is {}, and only a backup that was taken can be tried; see kubectl get pgb -n {namespace}",
        status.phase.as_str()
    );
    let token = Timestamp::now().to_string();
    let patch = Patch::Merge(json!({"metadata": {"annotations": {names::VERIFY_NOW: token}}}));
    call(format!("ask for a drill of {place}"), records.patch(name, &PatchParams::default(), &patch)).await?;
    if !arguments.wait {
        return Ok(format!(
            "a restore drill of {place} is asked for; follow it with: kubectl get pgb {name} -n {namespace} -w\n"
        ));
    }
    let limit = Duration::from_secs(arguments.timeout_seconds);
    let (began, mut shown) = (Instant::now(), String::new());
    loop {
        let record = call(format!("follow the drill of {place}"), records.get(name)).await;
        let record = record.context("the drill goes on, if the record is there")?;
        let drill = drill_of(record.status.unwrap_or_default(), &token);
        let line = drill.as_ref().map_or("Requested", |drill| drill.phase.as_str());
        if line != shown {
            eprintln!("{:6.1}s  {line}", began.elapsed().as_secs_f64());
            line.clone_into(&mut shown);
        }
        if let Some(drill) = drill.filter(|drill| drill.phase.is_terminal()) {
            return end(&place, &drill);
        }
        if began.elapsed() > limit {
            let text = format!(
                "wait for the drill of {place}: it is still in phase {shown} after {} s and goes on",
                limit.as_secs()
            );
            return Err(StillRunning(text).into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The drill that was begun for this request; an earlier one is none of it.
fn drill_of(status: BackupStatus, token: &str) -> Option<VerifyStatus> {
    status.verification.filter(|drill| drill.asked.as_deref() == Some(token))
}

/// What a drill that is over comes to.
fn end(place: &str, drill: &VerifyStatus) -> anyhow::Result<String> {
    let why = drill.failure.as_ref().map_or(String::new(), |f| format!("{}; {}", f.reason, f.cure));
    match drill.phase {
        Phase::Verified => {
            let report = drill.report.clone().unwrap_or_default();
            Ok(format!(
                "backup {place} is verified: PostgreSQL {} recovered in {} ms and read {} rows in {} databases\n",
                report.postgres_version.unwrap_or_default(),
                report.recovery_ms.unwrap_or_default(),
                report.rows.unwrap_or_default(),
                report.databases.unwrap_or_default(),
            ))
        }
        Phase::Damaged => bail!("backup {place} is damaged: {why}"),
        _ => bail!("backup {place} could not be tried: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drill(value: serde_json::Value) -> VerifyStatus {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn an_end_says_what_was_found_or_what_to_do() {
        let good = drill(json!({"phase": "Verified",
            "report": {"postgresVersion": "15.14", "recoveryMs": 812, "rows": 1000, "databases": 2}}));
        let text = end("shop/db-1", &good).unwrap();
        assert_eq!(
            text,
            "backup shop/db-1 is verified: PostgreSQL 15.14 recovered in 812 ms and read 1000 rows in 2 databases\n"
        );
        let bad = drill(json!({"phase": "Damaged",
            "failure": {"step": "Running", "reason": "invalid page", "cure": "do not restore it"}}));
        let error = end("shop/db-1", &bad).unwrap_err().to_string();
        assert_eq!(error, "backup shop/db-1 is damaged: invalid page; do not restore it");
    }

    #[test]
    fn an_earlier_drill_is_not_taken_for_this_one() {
        let status = |asked: &str| BackupStatus {
            verification: Some(VerifyStatus { asked: Some(asked.to_owned()), ..VerifyStatus::default() }),
            ..BackupStatus::default()
        };
        assert_eq!(drill_of(status("before"), "now"), None);
        assert!(drill_of(status("now"), "now").is_some());
    }
}
