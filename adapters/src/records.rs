//! The custom resources: one object per operation, its status the journal. The fields are `core`'s types.

use anyhow::Context as _;
use howdah_core::annotations::Consistency;
use howdah_core::backup::{BackupStatus, Trigger};
use howdah_core::restore::{Candidate, Goal, Method, RestoreStatus, taken_at};
use jiff::Timestamp;
use kube::{CustomResource, CustomResourceExt as _, KubeSchema, ResourceExt as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::protected_sets::ProtectedSets;
use crate::reports::HowdahReport;

/// What is to be backed up. It cannot be changed once the object exists.
#[derive(Clone, Debug, CustomResource, Deserialize, Serialize, KubeSchema, PartialEq, Eq)]
#[kube(
    group = "howdah.dev",
    version = "v1alpha1",
    kind = "PostgresBackup",
    plural = "postgresbackups",
    shortname = "pgb",
    category = "howdah",
    namespaced,
    status = "BackupStatus",
    derive = "PartialEq",
    doc = "One backup of a protected PostgreSQL StatefulSet: a snapshot of its RBD image, and how it was taken.",
    validation = Rule::new("self.spec == oldSelf.spec").message("a backup's spec cannot be changed: create another PostgresBackup"),
    printcolumn(name = "Database", type_ = "string", json_path = ".spec.statefulSet"),
    printcolumn(name = "Consistency", type_ = "string", json_path = ".status.consistency"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Slot", type_ = "string", json_path = ".status.slot"),
    printcolumn(name = "Snapshot", type_ = "string", json_path = ".status.snapshot.name"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Trigger", type_ = "string", json_path = ".spec.trigger", priority = "1"),
    printcolumn(name = "Image", type_ = "string", json_path = ".status.image.name", priority = "1"),
    printcolumn(name = "Failure", type_ = "string", json_path = ".status.failure.reason", priority = "1")
)]
#[serde(rename_all = "camelCase")]
pub struct PostgresBackupSpec {
    /// The name of the StatefulSet, in the same namespace.
    #[x_kube(validation = Rule::new("self.size() > 0").message("name the StatefulSet to back up"))]
    pub stateful_set: String,
    /// The uid of the StatefulSet the slot belongs to; a set of the same name made later is another database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stateful_set_uid: Option<String>,
    /// The instant that the snapshot's name derives from. Absent: when the object was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Timestamp>,
    /// Who asked.
    #[serde(default)]
    pub trigger: Trigger,
    /// The class wanted; anything less is a failure. Absent: what the StatefulSet's annotation says, else the best
    /// that can be had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
}

impl PostgresBackup {
    /// What choosing among the backups needs to know of this one.
    #[must_use]
    pub fn candidate(&self) -> Candidate {
        let status = self.status.clone().unwrap_or_default();
        Candidate {
            name: self.name_any(),
            database: self.spec.stateful_set.clone(),
            phase: status.phase,
            taken_at: taken_at(&status),
            consistency: status.consistency,
            image: status.image,
            snapshot: status.snapshot,
            parts: status.parts,
        }
    }
}

/// What is to be restored. It cannot be changed once the object exists.
#[derive(Clone, Debug, Default, CustomResource, Deserialize, Serialize, KubeSchema, PartialEq, Eq)]
#[kube(
    group = "howdah.dev",
    version = "v1alpha1",
    kind = "PostgresRestore",
    plural = "postgresrestores",
    shortname = "pgr",
    category = "howdah",
    namespaced,
    status = "RestoreStatus",
    derive = "PartialEq",
    doc = "One restore of a protected PostgreSQL StatefulSet from a backup, in place or into another one; and what undoing it needs.",
    validation = Rule::new("self.spec == oldSelf.spec").message("a restore's spec cannot be changed: create another PostgresRestore"),
    validation = Rule::new("[has(self.spec.to), has(self.spec.before), has(self.spec.undo)].filter(given, given).size() == 1")
        .message("say exactly one of to (newest, or the name of a PostgresBackup), before (an instant) and undo (the name of a PostgresRestore)"),
    validation = Rule::new("!has(self.spec.into) || self.spec.into != self.spec.statefulSet")
        .message("name another StatefulSet in into than in statefulSet; to restore in place, leave into out"),
    validation = Rule::new("!has(self.spec.into) || !has(self.spec.method) || self.spec.method == 'swap'")
        .message("use the method swap with into: the other StatefulSet's image has no snapshot to be rolled back to"),
    printcolumn(name = "Database", type_ = "string", json_path = ".spec.statefulSet"),
    printcolumn(name = "Into", type_ = "string", json_path = ".spec.into"),
    printcolumn(name = "Source", type_ = "string", json_path = ".status.source.name"),
    printcolumn(name = "Taken", type_ = "string", json_path = ".status.source.takenAt"),
    printcolumn(name = "Method", type_ = "string", json_path = ".status.method"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Undo until", type_ = "string", json_path = ".status.safetyUntil", priority = "1"),
    printcolumn(name = "Failure", type_ = "string", json_path = ".status.failure.reason", priority = "1")
)]
#[serde(rename_all = "camelCase")]
pub struct PostgresRestoreSpec {
    /// The name of the StatefulSet, in the same namespace.
    #[x_kube(validation = Rule::new("self.size() > 0").message("name the StatefulSet to restore"))]
    pub stateful_set: String,
    /// The uid of the StatefulSet that gets the data, which is `into` where that is given; a set of the same name made
    /// later is another database, and is not restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stateful_set_uid: Option<String>,
    /// The name of another StatefulSet, in the same namespace, that gets the data of a backup of `statefulSet`, which is not
    /// touched. It must be protected, stand at zero replicas, and its claim must never have been mounted. Absent: in place.
    #[x_kube(validation = Rule::new("self.size() > 0").message("name the StatefulSet to restore into"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub into: Option<String>,
    /// `newest`, or the name of a PostgresBackup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The newest good backup whose snapshot was taken before this instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Timestamp>,
    /// The name of a PostgresRestore that is to be undone: its safety copy is put back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<String>,
    /// `swap` (constant time) or `rollback` (overwrites the image). An undo goes the way of what it undoes.
    #[serde(default)]
    pub method: Method,
}

/// What a record says in `spec.to` for the newest good backup.
const NEWEST: &str = "newest";

impl PostgresRestoreSpec {
    /// What is to be restored.
    #[must_use]
    pub fn goal(&self) -> Goal {
        match (&self.undo, self.before, self.to.as_deref()) {
            (Some(restore), _, _) => Goal::Undo(restore.clone()),
            (None, Some(instant), _) => Goal::Before(instant),
            (None, None, Some(NEWEST)) => Goal::Newest,
            // The definition demands one of the three; a name that is empty is refused by the preflight.
            (None, None, name) => Goal::Backup(name.unwrap_or_default().to_owned()),
        }
    }

    /// The StatefulSet that gets the data: everything but the choice of the backup is about it.
    #[must_use]
    pub fn target(&self) -> &str {
        self.into.as_deref().unwrap_or(&self.stateful_set)
    }
}

/// The CustomResourceDefinitions of howdah as file name and YAML, as committed in `deploy/base/crds/`.
///
/// # Errors
/// If a definition cannot be written as YAML.
pub fn crd_yaml() -> anyhow::Result<Vec<(&'static str, String)>> {
    [
        ("postgresbackups.yaml", "records", PostgresBackup::crd()),
        ("postgresrestores.yaml", "records", PostgresRestore::crd()),
        ("protectedsets.yaml", "protected_sets", ProtectedSets::crd()),
        ("howdahreports.yaml", "reports", HowdahReport::crd()),
    ]
    .into_iter()
    .map(|(file, source, definition)| {
        let mut definition = serde_json::to_value(definition)
            .with_context(|| format!("write the definition {file} as JSON"))?;
        drop_unsigned_formats(&mut definition);
        let yaml = serde_yaml_ng::to_string(&definition)
            .with_context(|| format!("write the definition {file} as YAML"))?;
        let head = format!("# Generated from adapters/src/{source}.rs by `make generate`; do not edit.\n");
        Ok((file, format!("{head}{yaml}")))
    })
    .collect()
}

/// Removes the formats of unsigned numbers, which the API server does not know and warns of at each `kubectl apply`;
/// `minimum: 0` stays and says the same.
fn drop_unsigned_formats(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
                fields.remove("format");
            }
            fields.values_mut().for_each(drop_unsigned_formats);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_unsigned_formats),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_restore_made_by_hand_swaps() {
        let spec: PostgresRestoreSpec =
            serde_json::from_str(r#"{"statefulSet": "db", "to": "newest"}"#).unwrap();
        assert_eq!(spec.method, Method::Swap);
        assert_eq!(
            serde_json::to_string(&spec).unwrap(),
            r#"{"statefulSet":"db","to":"newest","method":"swap"}"#
        );
    }

    #[test]
    fn the_goal_and_the_target_are_what_the_spec_says() {
        let spec = |spec: Value| serde_json::from_value::<PostgresRestoreSpec>(spec).unwrap();
        let goal = |value: Value| spec(value).goal();
        assert_eq!(goal(json!({"statefulSet": "db", "to": "newest"})), Goal::Newest);
        assert_eq!(goal(json!({"statefulSet": "db", "to": "db-1"})), Goal::Backup("db-1".to_owned()));
        assert_eq!(goal(json!({"statefulSet": "db", "undo": "r1"})), Goal::Undo("r1".to_owned()));
        let before = goal(json!({"statefulSet": "db", "before": "2026-11-22T03:00:00Z"}));
        assert!(matches!(before, Goal::Before(_)));
        assert_eq!(spec(json!({"statefulSet": "db", "to": "newest"})).target(), "db");
        assert_eq!(spec(json!({"statefulSet": "db", "to": "newest", "into": "db-copy"})).target(), "db-copy");
    }

    #[test]
    fn a_backup_made_by_hand_needs_only_the_name() {
        let spec: PostgresBackupSpec = serde_json::from_str(r#"{"statefulSet": "db"}"#).unwrap();
        assert_eq!(spec.trigger, Trigger::Manual);
        assert_eq!(serde_json::to_string(&spec).unwrap(), r#"{"statefulSet":"db","trigger":"Manual"}"#);
    }
}
