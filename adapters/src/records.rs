//! The custom resources: one object per operation, its status the journal. The fields are `core`'s types.

use anyhow::Context as _;
use howdah_core::annotations::Consistency;
use howdah_core::backup::{BackupStatus, Trigger};
use howdah_core::restore::{Method, RestoreStatus};
use jiff::Timestamp;
use kube::{CustomResource, CustomResourceExt as _, KubeSchema};
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
    doc = "One restore of a protected PostgreSQL StatefulSet from a backup, in place; and what undoing it needs.",
    validation = Rule::new("self.spec == oldSelf.spec").message("a restore's spec cannot be changed: create another PostgresRestore"),
    validation = Rule::new("[has(self.spec.to), has(self.spec.before), has(self.spec.undo)].filter(given, given).size() == 1")
        .message("say exactly one of to (newest, or the name of a PostgresBackup), before (an instant) and undo (the name of a PostgresRestore)"),
    printcolumn(name = "Database", type_ = "string", json_path = ".spec.statefulSet"),
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
    /// The uid of the StatefulSet; a set of the same name made later is another database, and is not restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stateful_set_uid: Option<String>,
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
    fn a_backup_made_by_hand_needs_only_the_name() {
        let spec: PostgresBackupSpec = serde_json::from_str(r#"{"statefulSet": "db"}"#).unwrap();
        assert_eq!(spec.trigger, Trigger::Manual);
        assert_eq!(serde_json::to_string(&spec).unwrap(), r#"{"statefulSet":"db","trigger":"Manual"}"#);
    }
}
