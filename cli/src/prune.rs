//! `prune --dry-run`: the retention policy's verdict on each backup, with its reasons.

use anyhow::bail;
use howdah_adapters::kubernetes::call;
use howdah_adapters::records::PostgresBackup;
use howdah_core::annotations::{self, Settings};
use howdah_core::backup::Phase;
use howdah_core::names;
use howdah_core::retention::{self, DELETIONS_PER_RUN_MAX, Item, ItemState, KeepReason, Verdict};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

use crate::args::PruneArgs;
use crate::table;

/// Reads the cluster and renders the plan.
pub async fn run(client: Client, arguments: PruneArgs) -> anyhow::Result<String> {
    // clap requires the flag; there is no other way to prune by hand.
    let PruneArgs { name, namespace, dry_run: _ } = arguments;
    let namespace = namespace.unwrap_or_else(|| client.default_namespace().to_owned());
    let sets = Api::<StatefulSet>::namespaced(client.clone(), &namespace);
    let set = call(format!("get the StatefulSet {namespace}/{name}"), sets.get(&name)).await?;
    let settings = match annotations::parse(set.annotations()) {
        Ok(settings) => settings,
        Err(errors) => {
            let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
            bail!("read the annotations of {namespace}/{name}: {}", errors.join("; "));
        }
    };
    let backups = Api::<PostgresBackup>::namespaced(client, &namespace);
    let backups = call("list the PostgresBackups", backups.list(&ListParams::default())).await?.items;
    let own: Vec<&PostgresBackup> =
        backups.iter().filter(|backup| backup.spec.stateful_set == name).collect();
    Ok(render(&own, &settings, Timestamp::now()))
}

fn render(backups: &[&PostgresBackup], settings: &Settings, now: Timestamp) -> String {
    let items: Vec<Item> = backups.iter().filter_map(|backup| item(backup)).collect();
    if items.is_empty() {
        return "No backup with a snapshot is recorded: there is nothing to prune\n".to_owned();
    }
    let plan = retention::plan(now, &settings.time_zone, settings.retention.as_ref(), &items);
    let row = |(item, verdict): &(Item, Verdict)| {
        let (verdict, reason) = match verdict {
            Verdict::Keep(reasons) => {
                let reasons: Vec<String> = reasons.iter().map(KeepReason::to_string).collect();
                ("keep", reasons.join(", "))
            }
            Verdict::Delete(reason) => ("delete", reason.to_string()),
        };
        vec![item.snapshot.clone(), item.taken_at.to_string(), verdict.to_owned(), reason]
    };
    let rows: Vec<Vec<String>> = plan.iter().map(row).collect();
    let deletions = plan.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Delete(_))).count();
    let policy = settings.retention.as_ref().map_or_else(
        || format!("no policy (annotation {})", names::RETENTION),
        |policy| format!("policy {:?}", policy.to_string()),
    );
    let mut text = table::render(&["SNAPSHOT", "SLOT", "VERDICT", "REASON"], &rows);
    text.push_str(&format!("\n{policy}: {} kept, {deletions} to delete", plan.len() - deletions));
    if deletions > DELETIONS_PER_RUN_MAX {
        text.push_str(&format!(", at most {DELETIONS_PER_RUN_MAX} after each backup"));
    }
    text.push_str(
        ".\nDry run: nothing was deleted. Judged by the PostgresBackup records; the scheduler deletes after each good \
         backup,\nand keeps what only Ceph knows of, too: snapshots with clones and those that are not howdah's.\n",
    );
    text
}

/// The record as retention sees it; none if it never came to a snapshot.
fn item(backup: &PostgresBackup) -> Option<Item> {
    let status = backup.status.as_ref()?;
    let state = match status.phase {
        Phase::Verified => ItemState::Verified,
        Phase::Damaged => ItemState::Damaged,
        phase if phase.is_success() => ItemState::Taken,
        Phase::Failed => return None,
        _ => ItemState::Unfinished,
    };
    let snapshot = status.snapshot.as_ref()?;
    Some(Item {
        snapshot: snapshot.name.clone(),
        taken_at: status.slot?,
        sequence: snapshot.id,
        state,
        held: backup.annotations().contains_key(names::HOLD),
        // Only Ceph knows, as it does whether an image is there; the scheduler asks it before each deletion.
        has_clones: false,
        // One that is stuck waits for a human, who may want to look.
        in_use: !status.phase.is_terminal() || status.phase == Phase::Stuck,
        unclear: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn backup(day: u8, phase: &str, held: bool) -> PostgresBackup {
        let annotations = if held { json!({names::HOLD: "audit"}) } else { json!({}) };
        serde_json::from_value(json!({
            "apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
            "metadata": {"name": format!("db-{day}"), "annotations": annotations}, "spec": {"statefulSet": "db"},
            "status": {"phase": phase, "slot": format!("2026-11-{day:02}T03:00:00Z"),
                "snapshot": {"name": format!("howdah-202611{day:02}T030000Z"), "id": day, "size": 1}}
        }))
        .unwrap()
    }

    fn settings(retention: &str) -> Settings {
        annotations::parse(&BTreeMap::from([(names::RETENTION.to_owned(), retention.to_owned())])).unwrap()
    }

    #[test]
    fn each_backup_has_a_verdict_and_a_reason() {
        let backups = [backup(20, "Taken", false), backup(19, "Taken", true), backup(18, "Taken", false)];
        let backups: Vec<&PostgresBackup> = backups.iter().collect();
        let text = render(&backups, &settings("last=1"), "2026-11-20T04:00:00Z".parse().unwrap());
        let line = |day: u8| {
            text.lines().find(|line| line.contains(&format!("202611{day:02}T"))).unwrap().to_owned()
        };
        assert!(line(20).contains("keep") && line(20).contains("newest good"), "{text}");
        assert!(line(19).contains("keep") && line(19).contains("held"), "{text}");
        assert!(line(18).contains("delete") && line(18).contains("no rule keeps it"), "{text}");
        assert!(text.contains("2 kept, 1 to delete."), "{text}");
    }

    #[test]
    fn without_a_policy_nothing_would_go() {
        let (good, failed) = (backup(20, "Taken", false), backup(21, "Failed", false));
        let settings = annotations::parse(&BTreeMap::new()).unwrap();
        let text = render(&[&good, &failed], &settings, "2026-11-22T04:00:00Z".parse().unwrap());
        assert!(text.contains("no policy (annotation howdah.dev/retention): 1 kept, 0 to delete"), "{text}");
    }
}
