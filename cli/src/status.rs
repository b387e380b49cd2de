//! `status`: one line for each protected database.

use howdah_adapters::kubernetes::call;
use howdah_adapters::records::PostgresBackup;
use howdah_core::annotations::{self, Settings};
use howdah_core::backup::{BackupStatus, Phase};
use howdah_core::names;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt as _};

use crate::args::StatusArgs;
use crate::table;

/// Reads the cluster and renders the table.
pub async fn run(client: Client, arguments: StatusArgs) -> anyhow::Result<String> {
    let StatusArgs { namespace, all_namespaces } = arguments;
    let namespace = namespace.unwrap_or_else(|| client.default_namespace().to_owned());
    let (sets, backups) = if all_namespaces {
        (Api::<StatefulSet>::all(client.clone()), Api::<PostgresBackup>::all(client))
    } else {
        (
            Api::<StatefulSet>::namespaced(client.clone(), &namespace),
            Api::<PostgresBackup>::namespaced(client, &namespace),
        )
    };
    let protected = format!("{}={}", names::PROTECT_LABEL, names::PROTECT_VALUE);
    let sets = call("list the protected StatefulSets", sets.list(&ListParams::default().labels(&protected)))
        .await?
        .items;
    if sets.is_empty() {
        let place =
            if all_namespaces { "any namespace".to_owned() } else { format!("namespace {namespace}") };
        return Ok(format!("No protected StatefulSet in {place}: label one with {protected}\n"));
    }
    let backups = call("list the PostgresBackups", backups.list(&ListParams::default())).await?.items;
    Ok(render(&sets, &backups, Timestamp::now()))
}

fn render(sets: &[StatefulSet], backups: &[PostgresBackup], now: Timestamp) -> String {
    let header =
        ["NAMESPACE", "DATABASE", "SCHEDULE", "BACKUPS", "LAST GOOD", "CONSISTENCY", "NEXT", "STATE"];
    let mut rows: Vec<Vec<String>> = sets.iter().map(|set| row(set, backups, now)).collect();
    rows.sort();
    table::render(&header, &rows)
}

fn row(set: &StatefulSet, backups: &[PostgresBackup], now: Timestamp) -> Vec<String> {
    let (namespace, name) = (set.namespace().unwrap_or_default(), set.name_any());
    let mut own: Vec<&PostgresBackup> = backups
        .iter()
        .filter(|backup| {
            backup.namespace().as_deref() == Some(&namespace) && backup.spec.stateful_set == name
        })
        .collect();
    own.sort_by_key(|backup| slot_of(backup));
    let good: Vec<&BackupStatus> = own
        .iter()
        .filter_map(|backup| backup.status.as_ref())
        .filter(|status| status.phase.is_success())
        .collect();
    let dash = || "-".to_owned();
    let settings = annotations::parse(set.annotations());
    let (schedule, next) = match &settings {
        Ok(settings) => (
            settings.schedule.as_ref().map_or_else(dash, |schedule| schedule.as_str().to_owned()),
            next(settings, now).unwrap_or_else(dash),
        ),
        Err(_) => (dash(), dash()),
    };
    let last_good = good.last();
    vec![
        namespace,
        name,
        schedule,
        good.len().to_string(),
        last_good.and_then(|status| status.slot).map_or_else(dash, |slot| ago(slot, now)),
        last_good.and_then(|status| status.consistency).map_or_else(dash, |class| class.to_string()),
        next,
        state(&settings, own.last().copied()),
    ]
}

fn slot_of(backup: &PostgresBackup) -> Option<Timestamp> {
    let created = || backup.meta().creation_timestamp.as_ref().map(|time| time.0);
    backup.status.as_ref().and_then(|status| status.slot).or(backup.spec.slot).or_else(created)
}

fn next(settings: &Settings, now: Timestamp) -> Option<String> {
    if settings.suspend {
        return None;
    }
    let next = settings.schedule.as_ref()?.next(now, &settings.time_zone)?;
    Some(format!("in {}", span(next.duration_since(now).as_secs())))
}

/// What a user should know first.
fn state(
    settings: &Result<Settings, Vec<annotations::AnnotationError>>,
    newest: Option<&PostgresBackup>,
) -> String {
    let settings = match settings {
        Ok(settings) => settings,
        Err(errors) => {
            let first = errors.first().map(ToString::to_string).unwrap_or_default();
            return format!("annotation refused: {first}");
        }
    };
    if let Some(gate) = &settings.gate {
        return format!("held by {gate}: no backup begins; see kubectl get pgr");
    }
    let status = newest.map(|backup| backup.status.clone().unwrap_or_default());
    let reason = |status: &BackupStatus| {
        let failure = status.failure.as_ref();
        failure.map_or_else(String::new, |failure| format!(": {}; {}", failure.reason, failure.cure))
    };
    match status {
        None if settings.suspend => "suspended".to_owned(),
        None if settings.schedule.is_none() => "guarded; no schedule, no backups".to_owned(),
        None => "waiting for its first backup".to_owned(),
        Some(status) => match status.phase {
            phase if phase.is_success() && settings.suspend => "suspended".to_owned(),
            phase if phase.is_success() => "ok".to_owned(),
            Phase::Damaged => "last backup is damaged: see docs/runbooks/verification-failed.md".to_owned(),
            Phase::Failed => format!("last backup failed{}", reason(&status)),
            Phase::Stuck => format!("last backup is stuck, look at it{}", reason(&status)),
            Phase::Waiting => format!("trying again{}", reason(&status)),
            phase => format!("backup running ({})", phase.as_str()),
        },
    }
}

fn ago(then: Timestamp, now: Timestamp) -> String {
    format!("{} ago", span(now.duration_since(then).as_secs()))
}

/// Seconds as kubectl shows ages: the two largest units, or one.
fn span(seconds: i64) -> String {
    let seconds = seconds.max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn set(annotations: Value) -> StatefulSet {
        serde_json::from_value(
            json!({"metadata": {"namespace": "shop", "name": "db", "annotations": annotations}}),
        )
        .unwrap()
    }

    fn backup(name: &str, status: Value) -> PostgresBackup {
        serde_json::from_value(json!({
            "apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
            "metadata": {"namespace": "shop", "name": name}, "spec": {"statefulSet": "db"}, "status": status
        }))
        .unwrap()
    }

    fn shown(annotations: Value, backups: &[PostgresBackup]) -> String {
        render(&[set(annotations)], backups, "2026-11-22T04:00:00Z".parse().unwrap())
    }

    #[test]
    fn a_healthy_database_shows_its_last_good_and_next_backup() {
        let taken = json!({"phase": "Taken", "slot": "2026-11-22T03:00:00Z", "consistency": "online"});
        let other: PostgresBackup = {
            let mut other = backup("other", json!({"phase": "Failed", "slot": "2026-11-22T03:30:00Z"}));
            other.spec.stateful_set = "other".to_owned();
            other
        };
        let text = shown(json!({"howdah.dev/schedule": "0 3 * * *"}), &[other, backup("a", taken)]);
        let line = text.lines().nth(1).unwrap();
        for part in ["shop", "db", "0 3 * * *", " 1 ", "60m ago", "online", "in 23h0m", "ok"] {
            assert!(line.contains(part), "{part:?} is not in {line:?}");
        }
    }

    #[test]
    fn a_failure_after_a_good_backup_shows_both() {
        let taken = json!({"phase": "Taken", "slot": "2026-11-21T03:00:00Z", "consistency": "crash"});
        let failed = json!({"phase": "Failed", "slot": "2026-11-22T03:00:00Z",
            "failure": {"step": "Preflight", "kind": "Permanent", "reason": "fsync is off", "cure": "turn it on"}});
        let text =
            shown(json!({"howdah.dev/schedule": "0 3 * * *"}), &[backup("b", failed), backup("a", taken)]);
        assert!(text.contains("25h0m ago"), "{text}");
        assert!(text.contains("last backup failed: fsync is off; turn it on"), "{text}");
    }

    #[test]
    fn what_is_missing_is_said() {
        assert!(shown(json!({}), &[]).contains("guarded; no schedule, no backups"));
        let suspended = json!({"howdah.dev/schedule": "@daily", "howdah.dev/suspend": "true"});
        assert!(shown(suspended, &[]).contains("suspended"));
        let held = json!({"howdah.dev/schedule": "@daily", "howdah.dev/gate": "restore/r"});
        assert!(shown(held, &[]).contains("held by restore/r"));
        let wrong = shown(json!({"howdah.dev/schedule": "whenever"}), &[]);
        assert!(wrong.contains("annotation refused: annotation howdah.dev/schedule"), "{wrong}");
        assert!(
            shown(json!({"howdah.dev/schedule": "@daily"}), &[backup("new", json!(null))])
                .contains("Reserved")
        );
    }

    #[test]
    fn spans_keep_two_units() {
        let all = [(5, "5s"), (119, "119s"), (120, "2m"), (7200, "2h0m"), (200_000, "2d7h"), (-3, "0s")];
        for (seconds, text) in all {
            assert_eq!(span(seconds), text);
        }
    }
}
