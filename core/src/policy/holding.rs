//! Backups that hold their database: while they last, its pod must stay where it is.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::json as raw;
use crate::backup::{DEADLINE, Phase};

/// How long after its deadline a backup is still believed to hold its database. The last attempt may begin at the
/// deadline, and a snapshot of a stalled writer takes 30 s; a record that is older was left behind by a scheduler that
/// is gone, and must not stand in the way of a drain for ever.
const GRACE: SignedDuration = SignedDuration::from_mins(10);

/// A `PostgresBackup` that was inside backup mode or taking its snapshot when it was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HoldingBackup {
    /// Its name.
    pub name: String,
    /// The StatefulSet it is of, in the same namespace.
    pub stateful_set: String,
    /// Where it stood.
    pub phase: Phase,
    /// Until when it is believed; `None` when nothing says when it began.
    until: Option<Timestamp>,
}

impl HoldingBackup {
    /// Reads a `PostgresBackup`; `None` unless it is inside backup mode or takes its snapshot.
    #[must_use]
    pub fn from_json(object: &Value) -> Option<Self> {
        let phase: Phase = serde_json::from_value(raw::at(object, &["status", "phase"])?.clone()).ok()?;
        if !phase.holds_the_database() {
            return None;
        }
        let instant = |path: &[&str]| raw::string(object, path)?.parse::<Timestamp>().ok();
        let deadline = instant(&["status", "deadline"])
            .or_else(|| instant(&["metadata", "creationTimestamp"])?.checked_add(DEADLINE).ok());
        Some(Self {
            name: raw::string(object, &["metadata", "name"])?.to_owned(),
            stateful_set: raw::string(object, &["spec", "statefulSet"])?.to_owned(),
            phase,
            until: deadline.and_then(|deadline| deadline.checked_add(GRACE).ok()),
        })
    }

    /// Whether it is still believed to hold its database.
    #[must_use]
    pub fn holds_at(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| now <= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn backup(phase: &str, status: Value) -> Option<HoldingBackup> {
        let mut object = json!({
            "metadata": {"name": "db-20261122030000", "creationTimestamp": "2026-11-22T03:00:00Z"},
            "spec": {"statefulSet": "db"},
            "status": status,
        });
        object["status"]["phase"] = json!(phase);
        HoldingBackup::from_json(&object)
    }

    #[test]
    fn only_what_needs_the_pod_holds_it() {
        for phase in ["StartingBackupMode", "Snapshotting", "Adopting", "StoppingBackupMode"] {
            assert!(backup(phase, json!({})).is_some(), "{phase}");
        }
        for phase in [
            "Reserved",
            "Preflight",
            "Waiting",
            "Recording",
            "Pruning",
            "Taken",
            "Failed",
            "Stuck",
            "Nonsense",
        ] {
            assert!(backup(phase, json!({})).is_none(), "{phase}");
        }
    }

    #[test]
    fn a_record_that_was_left_behind_holds_nothing() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let with_deadline = backup("Snapshotting", json!({"deadline": "2026-11-22T04:00:00Z"})).unwrap();
        assert!(with_deadline.holds_at(at("2026-11-22T04:10:00Z")));
        assert!(!with_deadline.holds_at(at("2026-11-22T04:10:01Z")));
        let without = backup("Snapshotting", json!({})).unwrap();
        assert!(
            without.holds_at(at("2026-11-22T03:40:00Z")) && !without.holds_at(at("2026-11-22T03:40:01Z"))
        );
    }
}
