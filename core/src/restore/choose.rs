//! Which backup a restore goes to.

use jiff::Timestamp;

use super::Goal;
use crate::annotations::Consistency;
use crate::backup::{BackupStatus, FailureKind, ImageRecord, PartRecord, Phase, Problem, SnapshotRecord};

/// Names that a message lists at most.
const LISTED_MAX: usize = 5;

/// A recorded backup, as far as choosing needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The name of the record.
    pub name: String,
    /// The StatefulSet it is of.
    pub database: String,
    /// Where the backup stands.
    pub phase: Phase,
    /// By when its snapshot was there ([`taken_at`]); `None` while it is not.
    pub taken_at: Option<Timestamp>,
    /// Its class.
    pub consistency: Option<Consistency>,
    /// The image it lies in.
    pub image: Option<ImageRecord>,
    /// Its snapshot.
    pub snapshot: Option<SnapshotRecord>,
    /// The further images that hold parts of the database.
    pub parts: Vec<PartRecord>,
}

impl Candidate {
    /// Whether there is something to restore.
    fn is_good(&self) -> bool {
        let parts = self.parts.iter().all(|part| part.snapshot.is_some());
        let whole = self.image.is_some() && self.snapshot.is_some() && parts;
        self.phase.is_success() && whole && self.taken_at.is_some()
    }
}

/// By when the snapshot of a backup was there, from its journal: nothing committed after this is in it. A record without
/// a journal (made from the catalogue) has only its end or its slot to go by.
#[must_use]
pub fn taken_at(status: &BackupStatus) -> Option<Timestamp> {
    status.snapshot.as_ref()?;
    let taking =
        status.steps.iter().rev().find(|step| {
            matches!(step.phase, Phase::Snapshotting | Phase::Adopting) && step.took_ms.is_some()
        });
    let end = taking.and_then(|step| {
        let took = jiff::SignedDuration::from_millis(i64::try_from(step.took_ms?).ok()?);
        step.started_at.checked_add(took).ok()
    });
    end.or(status.finished_at).or(status.slot)
}

/// The backup of `database` that `goal` means, among all that are recorded in its namespace.
///
/// # Errors
/// Says that there is none, and which there are.
pub fn choose<'a>(
    goal: &Goal,
    database: &str,
    candidates: &'a [Candidate],
    now: Timestamp,
) -> Result<&'a Candidate, Problem> {
    let mut good: Vec<&Candidate> =
        candidates.iter().filter(|backup| backup.database == database && backup.is_good()).collect();
    good.sort_by_key(|backup| (backup.taken_at, &backup.name));
    let refuse = |reason: String, cure: String| Err(Problem::new(FailureKind::Permanent, reason, cure));
    let newest: Vec<&str> = good.iter().rev().take(LISTED_MAX).map(|backup| backup.name.as_str()).collect();
    let there_are = match newest.as_slice() {
        [] => format!("there is no good backup of {database}: see kubectl get pgb"),
        names => format!("name one that is good, such as {}", names.join(", ")),
    };
    match goal {
        Goal::Newest => match good.last() {
            Some(backup) => Ok(backup),
            None => refuse(format!("there is no good backup of {database}"), "take one first".to_owned()),
        },
        Goal::Backup(name) => match candidates.iter().find(|backup| backup.name == *name) {
            None => refuse(format!("there is no backup {name}"), there_are),
            Some(backup) if backup.database != database => {
                refuse(format!("the backup {name} is of {}, not of {database}", backup.database), there_are)
            }
            Some(backup) if !backup.is_good() => {
                refuse(format!("the backup {name} is not good: it is {}", backup.phase.as_str()), there_are)
            }
            Some(backup) => Ok(backup),
        },
        Goal::Before(instant) if *instant > now => refuse(
            format!("{instant} lies in the future (it is {now})"),
            "see the date and the zone; to restore the newest backup, say newest".to_owned(),
        ),
        Goal::Before(instant) => {
            let before =
                good.iter().rev().find(|backup| backup.taken_at.is_some_and(|taken| taken < *instant));
            match (before, good.first().and_then(|backup| backup.taken_at)) {
                (Some(backup), _) => Ok(backup),
                (None, Some(first)) => refuse(
                    format!(
                        "no good backup of {database} was taken before {instant}: the first is of {first}"
                    ),
                    format!("see the zone (instants are UTC here), or {there_are}"),
                ),
                (None, None) => {
                    refuse(format!("there is no good backup of {database}"), "take one first".to_owned())
                }
            }
        }
        Goal::Undo(name) => {
            refuse(format!("the restore {name} is not a backup"), "report this as a bug".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::{StepOutcome, StepRecord};

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn backup(name: &str, database: &str, phase: Phase, taken: Option<&str>) -> Candidate {
        Candidate {
            name: name.to_owned(),
            database: database.to_owned(),
            phase,
            taken_at: taken.map(at),
            consistency: Some(Consistency::Online),
            image: Some(ImageRecord {
                pool: "p".to_owned(),
                rados_namespace: String::new(),
                name: "i".to_owned(),
                id: "1".to_owned(),
            }),
            snapshot: Some(SnapshotRecord { name: "s".to_owned(), id: 1, size: 1 }),
            parts: Vec::new(),
        }
    }

    /// The newest is not the last by name, and not every one is good.
    fn some() -> Vec<Candidate> {
        vec![
            backup("z-first", "db", Phase::Taken, Some("2026-11-20T03:00:02Z")),
            backup("b-second", "db", Phase::Taken, Some("2026-11-21T03:00:02Z")),
            backup("a-newest", "db", Phase::Taken, Some("2026-11-22T03:00:02Z")),
            backup("failed", "db", Phase::Failed, Some("2026-11-23T03:00:02Z")),
            backup("open", "db", Phase::Recording, Some("2026-11-23T04:00:02Z")),
            backup("other", "shop", Phase::Taken, Some("2026-11-23T05:00:02Z")),
        ]
    }

    fn chosen(goal: Goal) -> Result<String, String> {
        let all = some();
        let found = choose(&goal, "db", &all, at("2026-11-24T00:00:00Z"));
        found.map(|backup| backup.name.clone()).map_err(|problem| {
            assert_eq!(problem.kind, FailureKind::Permanent);
            format!("{}; {}", problem.reason, problem.cure)
        })
    }

    #[test]
    fn the_newest_good_one_is_by_time_and_of_this_database() {
        assert_eq!(chosen(Goal::Newest).unwrap(), "a-newest");
    }

    #[test]
    fn a_named_one_must_exist_be_good_and_of_this_database() {
        assert_eq!(chosen(Goal::Backup("z-first".to_owned())).unwrap(), "z-first");
        let unknown = chosen(Goal::Backup("nothing".to_owned())).unwrap_err();
        assert!(unknown.contains("no backup nothing") && unknown.contains("a-newest"), "{unknown}");
        let failed = chosen(Goal::Backup("failed".to_owned())).unwrap_err();
        assert!(failed.contains("it is Failed"), "{failed}");
        assert!(chosen(Goal::Backup("open".to_owned())).unwrap_err().contains("it is Recording"));
        let other = chosen(Goal::Backup("other".to_owned())).unwrap_err();
        assert!(other.contains("is of shop, not of db"), "{other}");
    }

    #[test]
    fn before_an_instant_is_before_its_snapshot_was_there() {
        let before = |text: &str| chosen(Goal::Before(at(text)));
        assert_eq!(before("2026-11-21T12:00:00Z").unwrap(), "b-second");
        // The slot was before it, the snapshot was not.
        assert_eq!(before("2026-11-22T03:00:02Z").unwrap(), "b-second");
        assert_eq!(before("2026-11-22T03:00:03Z").unwrap(), "a-newest");
        let early = before("2026-11-20T03:00:00Z").unwrap_err();
        assert!(early.contains("the first is of 2026-11-20T03:00:02Z"), "{early}");
        let future = before("2026-12-01T00:00:00Z").unwrap_err();
        assert!(future.contains("lies in the future"), "{future}");
        // The same wall-clock time in another zone is another instant.
        assert_eq!(before("2026-11-22T03:00:03+09:00").unwrap(), "b-second");
    }

    #[test]
    fn without_a_good_backup_it_says_so() {
        let none = choose(&Goal::Newest, "db", &[], at("2026-11-24T00:00:00Z")).unwrap_err();
        assert!(none.reason.contains("no good backup of db"), "{}", none.reason);
    }

    #[test]
    fn the_instant_of_a_backup_is_the_end_of_its_snapshot() {
        let step = |phase, started: &str, took_ms| StepRecord {
            phase,
            attempt: 1,
            started_at: at(started),
            took_ms,
            outcome: Some(StepOutcome::Done),
            message: None,
        };
        let mut status = BackupStatus {
            slot: Some(at("2026-11-22T03:00:00Z")),
            finished_at: Some(at("2026-11-22T03:10:00Z")),
            ..BackupStatus::default()
        };
        assert_eq!(taken_at(&status), None);
        status.snapshot = Some(SnapshotRecord { name: "s".to_owned(), id: 1, size: 1 });
        assert_eq!(taken_at(&status), Some(at("2026-11-22T03:10:00Z")));
        status.steps = vec![
            step(Phase::Snapshotting, "2026-11-22T03:00:01Z", Some(1500)),
            step(Phase::Pruning, "2026-11-22T03:00:03Z", Some(9000)),
        ];
        assert_eq!(taken_at(&status), Some(at("2026-11-22T03:00:02.5Z")));
    }
}
