//! Names howdah and its users share: the API group, labels, annotations, and the names of what it makes.
//!
//! Everything a backup creates is named after its slot, never after the clock at retry: a retry finds what an
//! earlier attempt made instead of making it twice.

use jiff::Timestamp;

/// API group of the records, and the prefix of every label and annotation.
pub const GROUP: &str = "howdah.dev";
/// Version of the records.
pub const VERSION: &str = "v1alpha1";

/// The namespace howdah is installed in unless its operator chooses another.
pub const NAMESPACE: &str = "howdah-system";
/// Group whose members nothing of howdah's holds up: the way out when it stands in the way.
pub const BREAK_GLASS_GROUP: &str = "howdah:break-glass";

/// Label that puts a StatefulSet under howdah's care; its value is [`PROTECT_VALUE`].
pub const PROTECT_LABEL: &str = "howdah.dev/protect";
/// The one value of [`PROTECT_LABEL`] that means "protected".
pub const PROTECT_VALUE: &str = "true";

/// Prefix of every annotation of ours.
pub const ANNOTATION_PREFIX: &str = "howdah.dev/";
/// `enforce`, `warn` or `audit`.
pub const MODE: &str = "howdah.dev/mode";
/// Prefix of the exemption annotations; the id of a policy rule follows.
pub const EXEMPT_PREFIX: &str = "howdah.dev/exempt.";
/// Cron expression of the scheduled backups.
pub const SCHEDULE: &str = "howdah.dev/schedule";
/// IANA time zone that the schedule and the retention calendar are read in.
pub const TIME_ZONE: &str = "howdah.dev/time-zone";
/// Which backups are kept.
pub const RETENTION: &str = "howdah.dev/retention";
/// `online`, `crash` or `offline`.
pub const CONSISTENCY: &str = "howdah.dev/consistency";
/// When a backup is proven by a restore: `always`, `never` or a cron expression.
pub const VERIFY: &str = "howdah.dev/verify";
/// A query that a restore drill asks, in the database [`VERIFY_DATABASE`].
pub const VERIFY_QUERY: &str = "howdah.dev/verify-query";
/// What [`VERIFY_QUERY`] has to answer, as `psql -At` prints it.
pub const VERIFY_EXPECT: &str = "howdah.dev/verify-expect";
/// The database that [`VERIFY_QUERY`] is asked in.
pub const VERIFY_DATABASE: &str = "howdah.dev/verify-database";
/// `true` stops scheduled backups.
pub const SUSPEND: &str = "howdah.dev/suspend";
/// Name of a Secret with `username` and `password`.
pub const CREDENTIALS: &str = "howdah.dev/credentials";
/// `auto`, `manual` or `off`.
pub const FAILOVER: &str = "howdah.dev/failover";
/// The operation that holds the database, set and removed by howdah alone: [`RESTORE_GATE`] or [`FAILOVER_GATE`] and
/// the name of its record. While it stands, nothing but the operation may start, change or delete the database.
pub const GATE: &str = "howdah.dev/gate";
/// Beginning of a [`GATE`] that a `PostgresRestore` has closed; its name follows.
pub const RESTORE_GATE: &str = "restore/";
/// Beginning of a [`GATE`] that a `PostgresFailover` has closed; its name follows.
pub const FAILOVER_GATE: &str = "failover/";
/// Every annotation a protected StatefulSet may carry, apart from the exemptions.
pub const STATEFUL_SET_ANNOTATIONS: [&str; 13] = [
    MODE,
    SCHEDULE,
    TIME_ZONE,
    RETENTION,
    CONSISTENCY,
    VERIFY,
    VERIFY_QUERY,
    VERIFY_EXPECT,
    VERIFY_DATABASE,
    SUSPEND,
    CREDENTIALS,
    FAILOVER,
    GATE,
];
/// Annotation on a `PostgresBackup`: a request for a restore drill of it; a drill acts once on each value.
pub const VERIFY_NOW: &str = "howdah.dev/verify-now";
/// The namespace that restore drills run in.
pub const VERIFY_NAMESPACE: &str = "howdah-verify";
/// Beginning of the name of everything that a restore drill makes; the uid of the backup's record follows.
pub const DRILL_PREFIX: &str = "howdah-verify-";
/// Label on what a restore drill makes; its value is the uid of the backup's record.
pub const DRILL_LABEL: &str = "howdah.dev/drill";

/// Annotation on a claim: whose value is the uid of the claim, that one may be deleted.
pub const ALLOW_DELETE: &str = "howdah.dev/allow-delete";

/// Annotation that the webhook sets on a StatefulSet which it is going to refuse, and which is therefore never stored with
/// it: the policies of the API server, which are asked in between, leave the explanation to the webhook.
pub const WEBHOOK_ANSWERS: &str = "howdah.dev/webhook-answers";
/// Name of the `ProtectedSets` of every namespace that has one.
pub const PROTECTED_SETS: &str = "howdah";
/// Annotation on a webhook configuration: the names of its webhooks that are to fail closed, separated by commas. It is
/// the one place that says so; the manifests ship every webhook with `failurePolicy: Ignore`.
pub const FAIL_CLOSED: &str = "howdah.dev/fail-closed";
/// Namespaces that howdah has no say in: what the cluster, the storage and howdah itself stand on.
pub const EXCLUDED_NAMESPACES: [&str; 5] =
    ["kube-system", "kube-public", "kube-node-lease", "rook-ceph", NAMESPACE];

/// Annotation on a `PostgresBackup`: never prune it, whatever its value (it may say why).
pub const HOLD: &str = "howdah.dev/hold";
/// Annotation on a `PostgresRestore` that is stuck: a request to go on, [`RESUME_RETRY`] or [`RESUME_UNDO`], followed by
/// anything that makes it differ from the last one.
pub const RESUME: &str = "howdah.dev/resume";
/// Begins a request to try the step again that failed.
pub const RESUME_RETRY: &str = "retry";
/// Begins a request to give the restore up and to put everything back.
pub const RESUME_UNDO: &str = "undo";
/// Finalizer on a `PostgresRestore` while its gate is closed: a record that is deleted then is a request to put
/// everything back first.
pub const RESTORE_FINALIZER: &str = "howdah.dev/restore";
/// Annotation on a `PostgresBackup`: the record was brought back from the catalogue. Without a status it is not yet whole,
/// and no order for a backup.
pub const REBUILT: &str = "howdah.dev/rebuilt";
/// Label on a `PostgresBackup` or `PostgresRestore`: the StatefulSet it belongs to.
pub const DATABASE_LABEL: &str = "howdah.dev/database";

/// Prefix of every snapshot howdah takes. A snapshot without it is foreign and is never touched.
pub const SNAPSHOT_PREFIX: &str = "howdah-";
/// Prefix of the snapshots of backups made by hand.
pub const MANUAL_SNAPSHOT_PREFIX: &str = "howdah-m-";
/// Prefix of the snapshots that are taken before a rollback.
pub const SAFETY_SNAPSHOT_PREFIX: &str = "howdah-pre-restore-";
/// Prefix of the keys under which the catalogue stands in the metadata of an RBD image.
pub const IMAGE_META_PREFIX: &str = "howdah.dev/backup/";

/// Prefix of the keys under which holds stand there a second time.
pub const HOLD_META_PREFIX: &str = "howdah.dev/hold/";

/// Longest name of a Kubernetes object (a DNS subdomain).
const OBJECT_NAME_MAX: usize = 253;
/// `-m-` and fourteen digits: the most that is added to the name of the StatefulSet.
const SLOT_SUFFIX_LEN: usize = 17;

/// Name of the `PostgresBackup` of `slot`; creating it is what reserves the slot.
#[must_use]
pub fn backup_name(stateful_set: &str, slot: Timestamp) -> String {
    format!("{}-{}", beginning(stateful_set), slot.strftime("%Y%m%d%H%M%S"))
}

/// Name of a `PostgresBackup` that the command line asks for at `now`; no slot of a schedule has it.
#[must_use]
pub fn manual_backup_name(stateful_set: &str, now: Timestamp) -> String {
    format!("{}-m-{}", beginning(stateful_set), now.strftime("%Y%m%d%H%M%S"))
}

/// As much of a StatefulSet's name as leaves room for a slot.
fn beginning(stateful_set: &str) -> &str {
    let limit = OBJECT_NAME_MAX - SLOT_SUFFIX_LEN;
    stateful_set.get(..limit.min(stateful_set.len())).unwrap_or(stateful_set)
}

/// Name of a `PostgresRestore` that is ordered at `now`; `verb` is `restore` or `undo`.
#[must_use]
pub fn restore_name(stateful_set: &str, verb: &str, now: Timestamp) -> String {
    let suffix = format!("-{verb}-{}", now.strftime("%Y%m%d%H%M%S"));
    let limit = OBJECT_NAME_MAX.saturating_sub(suffix.len());
    let name = stateful_set.get(..limit.min(stateful_set.len())).unwrap_or(stateful_set);
    format!("{name}{suffix}")
}

/// Name of the snapshot of a scheduled backup.
#[must_use]
pub fn snapshot_name(slot: Timestamp) -> String {
    format!("{SNAPSHOT_PREFIX}{}", slot.strftime("%Y%m%dT%H%M%SZ"))
}

/// Name of the snapshot of a backup made by hand.
#[must_use]
pub fn manual_snapshot_name(slot: Timestamp) -> String {
    format!("{MANUAL_SNAPSHOT_PREFIX}{}", slot.strftime("%Y%m%dT%H%M%SZ"))
}

/// The slot a snapshot of ours was taken for, or `None` when the snapshot is foreign.
#[must_use]
pub fn slot_of_snapshot(name: &str) -> Option<Timestamp> {
    let rest = name.strip_prefix(SNAPSHOT_PREFIX)?;
    let stamp = rest.strip_prefix("m-").unwrap_or(rest);
    // Parsing alone would also accept other spellings, which howdah never writes.
    let slot = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", stamp).ok()?;
    let slot = slot.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
    (name == snapshot_name(slot) || name == manual_snapshot_name(slot)).then_some(slot)
}

/// The value of [`GATE`] that a restore closes with.
#[must_use]
pub fn gate_of_restore(restore: &str) -> String {
    format!("{RESTORE_GATE}{restore}")
}

/// Key of the catalogue entry of `snapshot` in the metadata of its image.
#[must_use]
pub fn image_meta_key(snapshot: &str) -> String {
    format!("{IMAGE_META_PREFIX}{snapshot}")
}

/// Key of the second copy of the hold on `snapshot` in the metadata of its image.
#[must_use]
pub fn hold_meta_key(snapshot: &str) -> String {
    format!("{HOLD_META_PREFIX}{snapshot}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> Timestamp {
        "2026-11-22T03:00:00Z".parse().unwrap()
    }

    #[test]
    fn names_derive_from_the_slot() {
        assert_eq!(backup_name("pg", slot()), "pg-20261122030000");
        assert_eq!(manual_backup_name("pg", slot()), "pg-m-20261122030000");
        assert_eq!(snapshot_name(slot()), "howdah-20261122T030000Z");
        assert_eq!(manual_snapshot_name(slot()), "howdah-m-20261122T030000Z");
        assert_eq!(image_meta_key("howdah-20261122T030000Z"), "howdah.dev/backup/howdah-20261122T030000Z");
    }

    #[test]
    fn a_long_name_still_fits_an_object_name() {
        assert!(backup_name(&"a".repeat(253), slot()).len() <= OBJECT_NAME_MAX);
        assert_eq!(manual_backup_name(&"a".repeat(253), slot()).len(), OBJECT_NAME_MAX);
        assert_eq!(restore_name("pg", "undo", slot()), "pg-undo-20261122030000");
        assert_eq!(restore_name(&"a".repeat(253), "restore", slot()).len(), OBJECT_NAME_MAX);
    }

    #[test]
    fn only_our_snapshots_have_a_slot() {
        assert_eq!(slot_of_snapshot("howdah-20261122T030000Z"), Some(slot()));
        assert_eq!(slot_of_snapshot("howdah-m-20261122T030000Z"), Some(slot()));
        for foreign in
            ["before-upgrade", "howdah-", "howdah-20261122", "howdah-20261322T030000Z", "howdah-x-1"]
        {
            assert_eq!(slot_of_snapshot(foreign), None, "{foreign}");
        }
    }
}
