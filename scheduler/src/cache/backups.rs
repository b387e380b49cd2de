//! What a tick needs of every backup, in some hundred bytes each: a cluster may hold a hundred for each of ten thousand
//! databases, and a tick looks at all of them. What an operation needs beyond that it reads from the API server.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroU64;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use howdah_adapters::records::PostgresBackup;
use howdah_core::backup::{Phase, Trigger};
use howdah_core::names;
use jiff::Timestamp;
use kube::ResourceExt as _;
use kube::runtime::watcher::Event;
use tokio::sync::watch;

use crate::verify;

/// Namespace and name of a StatefulSet.
pub type DatabaseKey = (String, String);

/// A time to the microsecond, in eight bytes. A `Timestamp` takes three times as many where it may be absent, and an entry
/// has three of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Moment(NonZeroU64);

/// Moves what is negative below what is not, and no time of a `Timestamp` to zero: none is so long ago.
const BIAS: u64 = 1 << 63;

impl Moment {
    fn new(at: Timestamp) -> Option<Self> {
        NonZeroU64::new(at.as_microsecond().cast_unsigned() ^ BIAS).map(Self)
    }

    fn timestamp(self) -> Timestamp {
        // It was one before.
        Timestamp::from_microsecond((self.0.get() ^ BIAS).cast_signed()).unwrap_or_default()
    }
}

/// One backup.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    name: Box<str>,
    /// The StatefulSet it is of, if the record says so. Entries of one database share the text.
    set_uid: Option<Arc<str>>,
    /// The slot, or when the record was created.
    since: Option<Moment>,
    finished: Option<Moment>,
    phase: Phase,
    scheduled: bool,
    /// Whether somebody has to run it.
    open: bool,
    drill: Drill,
    /// When its last restore drill began.
    drilled: Option<Moment>,
}

/// Where the restore drill of a backup stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drill {
    /// There was none.
    None,
    /// It is under way, or asked for.
    Wanted,
    /// It is over.
    Over,
}

impl Drill {
    fn of(record: &PostgresBackup) -> Self {
        let drill = record.status.as_ref().and_then(|status| status.verification.as_ref());
        match drill {
            _ if verify::request(record).is_some() => Self::Wanted,
            Some(drill) if drill.phase.is_terminal() => Self::Over,
            Some(_) => Self::Wanted,
            None => Self::None,
        }
    }
}

/// What is known of the good backups of one StatefulSet, and of their restore drills.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Drills {
    /// Name and end of the newest good backup, and whether there was a drill of it.
    pub newest: Option<(String, Timestamp, bool)>,
    /// When the oldest good backup ended.
    pub oldest: Option<Timestamp>,
    /// When the last drill began.
    pub last: Option<Timestamp>,
}

impl Entry {
    fn of(record: &PostgresBackup) -> Self {
        let status = record.status.as_ref();
        let phase = status.map(|status| status.phase).unwrap_or_default();
        // One that is being brought back from the catalogue has no status for a moment.
        let in_rebuilding = status.is_none() && record.annotations().contains_key(names::REBUILT);
        let since = record.spec.slot.or(record.metadata.creation_timestamp.as_ref().map(|time| time.0));
        let verification = status.and_then(|status| status.verification.as_ref());
        Self {
            name: record.name_any().into(),
            set_uid: record.spec.stateful_set_uid.as_deref().map(Arc::from),
            since: since.and_then(Moment::new),
            finished: status.and_then(|status| status.finished_at).and_then(Moment::new),
            phase,
            scheduled: record.spec.trigger == Trigger::Schedule && record.spec.slot.is_some(),
            open: !phase.is_terminal() && !in_rebuilding,
            drill: Drill::of(record),
            drilled: verification.and_then(|drill| drill.started_at).and_then(Moment::new),
        }
    }

    /// Whether it is of this StatefulSet, and not of an earlier one of the same name.
    fn is_of(&self, uid: &str) -> bool {
        self.set_uid.as_deref().is_none_or(|of| of == uid)
    }
}

/// A backup that somebody has to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Its database.
    pub database: DatabaseKey,
    /// Its name.
    pub name: String,
    /// Its slot, or when the record was created.
    pub since: Option<Timestamp>,
    /// Whether anything is under way: nothing was done yet for one that is new, and everything is undone of one that waits.
    pub begun: bool,
    /// When its next attempt begins, if it waits for that.
    pub retry_at: Option<Timestamp>,
}

/// The backups of one database.
#[derive(Debug, Default)]
struct OfDatabase {
    entries: Vec<Entry>,
    /// Grows with every change.
    version: u64,
}

/// What is kept of an open record beyond its entry.
#[derive(Debug)]
struct OpenRecord {
    database: DatabaseKey,
    retry_at: Option<Timestamp>,
}

#[derive(Debug, Default)]
struct Index {
    databases: HashMap<DatabaseKey, OfDatabase>,
    /// Namespace and name of each open record.
    open: HashMap<(String, String), OpenRecord>,
    /// Namespace and name of each record whose drill is under way or asked for.
    drills: BTreeSet<(String, String)>,
    stuck: usize,
    damaged: usize,
    /// Versions go on when a database was forgotten and comes back.
    last_version: u64,
}

impl Index {
    fn put(&mut self, record: &PostgresBackup) {
        let namespace = record.namespace().unwrap_or_default();
        let key = (namespace.clone(), record.spec.stateful_set.clone());
        let mut entry = Entry::of(record);
        self.take(record);
        self.last_version += 1;
        self.stuck += usize::from(entry.phase == Phase::Stuck);
        self.damaged += usize::from(entry.phase == Phase::Damaged);
        // A drill is of a backup that is there.
        if entry.drill == Drill::Wanted && (entry.phase.is_success() || entry.phase == Phase::Damaged) {
            self.drills.insert((namespace.clone(), entry.name.to_string()));
        }
        if entry.open {
            let waits = record.status.as_ref().filter(|status| status.phase == Phase::Waiting);
            let open =
                OpenRecord { database: key.clone(), retry_at: waits.and_then(|status| status.retry_at) };
            self.open.insert((namespace, entry.name.to_string()), open);
        }
        let database = self.databases.entry(key).or_default();
        database.version = self.last_version;
        // Entries are of one StatefulSet after another, so the last one's text is the one to share.
        if let Some(last) = database.entries.last()
            && last.set_uid == entry.set_uid
        {
            entry.set_uid.clone_from(&last.set_uid);
        }
        database.entries.push(entry);
    }

    fn take(&mut self, record: &PostgresBackup) {
        let namespace = record.namespace().unwrap_or_default();
        let name = record.name_any();
        let key = (namespace.clone(), record.spec.stateful_set.clone());
        let record = (namespace, name);
        self.open.remove(&record);
        self.drills.remove(&record);
        let (_, name) = record;
        let Some(database) = self.databases.get_mut(&key) else { return };
        let Some(at) = database.entries.iter().position(|entry| *entry.name == *name) else { return };
        let gone = database.entries.remove(at);
        self.stuck -= usize::from(gone.phase == Phase::Stuck);
        self.damaged -= usize::from(gone.phase == Phase::Damaged);
        self.last_version += 1;
        database.version = self.last_version;
        if database.entries.is_empty() {
            self.databases.remove(&key);
        }
    }
}

/// The backups of all namespaces; clones share them.
#[derive(Debug, Clone)]
pub struct Backups {
    index: Arc<RwLock<Index>>,
    filled: Arc<watch::Sender<bool>>,
}

impl Default for Backups {
    fn default() -> Self {
        Self { index: Arc::default(), filled: Arc::new(watch::Sender::new(false)) }
    }
}

/// Takes the events of one watch in.
#[derive(Debug)]
pub struct Feed {
    backups: Backups,
    /// The list that is being read; it takes the place of the index when it is whole.
    listed: Index,
}

impl Feed {
    /// Nothing is read yet.
    #[must_use]
    pub fn new(backups: Backups) -> Self {
        Self { backups, listed: Index::default() }
    }

    /// Takes one event in.
    pub fn take(&mut self, event: &Event<PostgresBackup>) {
        match event {
            Event::Init => {
                let last_version = self.backups.read().last_version;
                self.listed = Index { last_version, ..Index::default() };
            }
            Event::InitApply(record) => self.listed.put(record),
            Event::InitDone => {
                let mut listed = std::mem::take(&mut self.listed);
                // They were read in one go and stay for long.
                listed.databases.values_mut().for_each(|database| database.entries.shrink_to_fit());
                let mut index = self.backups.write();
                // What changed while the list was read would look unchanged otherwise.
                let grown = index.last_version.max(listed.last_version) + 1;
                listed.databases.values_mut().for_each(|database| database.version = grown);
                listed.last_version = grown;
                *index = listed;
                self.backups.filled.send_replace(true);
            }
            Event::Apply(record) => self.backups.write().put(record),
            Event::Delete(record) => self.backups.write().take(record),
        }
    }
}

impl Backups {
    fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the first whole list.
    pub async fn filled(&self) {
        // The sender is held by `self`, so this ends with the list.
        let _ = self.filled.subscribe().wait_for(|filled| *filled).await;
    }

    /// What grows whenever something of the backups of a database changes; 0 when there are none.
    #[must_use]
    pub fn version(&self, database: &DatabaseKey) -> u64 {
        self.read().databases.get(database).map_or(0, |database| database.version)
    }

    /// The slots of a StatefulSet that have a record, whatever became of them.
    #[must_use]
    pub fn slots(&self, database: &DatabaseKey, uid: &str) -> BTreeSet<Timestamp> {
        let index = self.read();
        let entries = index.databases.get(database).into_iter().flat_map(|database| &database.entries);
        let scheduled = entries.filter(|entry| entry.scheduled && entry.is_of(uid));
        scheduled.filter_map(|entry| entry.since).map(Moment::timestamp).collect()
    }

    /// Whether a backup of the StatefulSet is open.
    #[must_use]
    pub fn is_open(&self, database: &DatabaseKey, uid: &str) -> bool {
        let index = self.read();
        let found = index.databases.get(database);
        found.is_some_and(|database| database.entries.iter().any(|entry| entry.open && entry.is_of(uid)))
    }

    /// When the newest good backup of the StatefulSet ended.
    #[must_use]
    pub fn newest_good(&self, database: &DatabaseKey, uid: &str) -> Option<Timestamp> {
        let index = self.read();
        let entries = &index.databases.get(database)?.entries;
        let good = entries.iter().filter(|entry| entry.phase.is_success() && entry.is_of(uid));
        good.filter_map(|entry| entry.finished).max().map(Moment::timestamp)
    }

    /// What is known of the drills of a StatefulSet.
    #[must_use]
    pub fn drills(&self, database: &DatabaseKey, uid: &str) -> Drills {
        let index = self.read();
        let Some(database) = index.databases.get(database) else { return Drills::default() };
        let own = || database.entries.iter().filter(|entry| entry.is_of(uid));
        let good = || own().filter(|entry| entry.phase.is_success() && entry.finished.is_some());
        let newest = good().max_by_key(|entry| entry.finished);
        Drills {
            newest: newest.and_then(|entry| {
                Some((entry.name.to_string(), entry.finished?.timestamp(), entry.drill != Drill::None))
            }),
            oldest: good().filter_map(|entry| entry.finished).min().map(Moment::timestamp),
            last: own().filter_map(|entry| entry.drilled).max().map(Moment::timestamp),
        }
    }

    /// Namespace and name of the first record whose drill is under way or asked for.
    #[must_use]
    pub fn open_drill(&self) -> Option<(String, String)> {
        self.read().drills.first().cloned()
    }

    /// Those that somebody has to run.
    #[must_use]
    pub fn open(&self) -> Vec<Open> {
        let index = self.read();
        let found = index.open.iter().filter_map(|((_, name), open)| {
            let entries = &index.databases.get(&open.database)?.entries;
            let entry = entries.iter().find(|entry| *entry.name == **name)?;
            Some(Open {
                database: open.database.clone(),
                name: name.clone(),
                since: entry.since.map(Moment::timestamp),
                begun: !matches!(entry.phase, Phase::Reserved | Phase::Waiting),
                retry_at: open.retry_at,
            })
        });
        found.collect()
    }

    /// When the last drill of the StatefulSet began that found a backup good; before the first one, when its oldest good
    /// backup ended.
    #[must_use]
    pub fn unproven_since(&self, database: &DatabaseKey, uid: &str) -> Option<Timestamp> {
        let index = self.read();
        let entries = &index.databases.get(database)?.entries;
        let own = || entries.iter().filter(|entry| entry.is_of(uid));
        let proven =
            own().filter(|entry| entry.phase == Phase::Verified).filter_map(|entry| entry.drilled).max();
        let oldest = || own().filter(|e| e.phase.is_success()).filter_map(|entry| entry.finished).min();
        proven.or_else(oldest).map(Moment::timestamp)
    }

    /// How many a drill found damaged.
    #[must_use]
    pub fn damaged(&self) -> usize {
        self.read().damaged
    }

    /// How many ended stuck and wait for a human.
    #[must_use]
    pub fn stuck(&self) -> usize {
        self.read().stuck
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn record(name: &str, uid: &str, slot: Option<&str>, status: Value) -> PostgresBackup {
        serde_json::from_value(json!({
            "apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
            "metadata": {"name": name, "namespace": "shop", "creationTimestamp": "2026-11-22T09:00:00Z"},
            "spec": {"statefulSet": "db", "statefulSetUid": uid, "slot": slot,
                     "trigger": if slot.is_some() { "Schedule" } else { "Manual" }},
            "status": status,
        }))
        .unwrap()
    }

    fn key() -> DatabaseKey {
        ("shop".to_owned(), "db".to_owned())
    }

    fn filled(records: &[PostgresBackup]) -> (Feed, Backups) {
        let backups = Backups::default();
        let mut feed = Feed::new(backups.clone());
        feed.take(&Event::Init);
        for record in records {
            feed.take(&Event::InitApply(record.clone()));
        }
        feed.take(&Event::InitDone);
        (feed, backups)
    }

    #[test]
    fn a_tick_finds_what_it_asks_for() {
        let taken = json!({"phase": "Taken", "finishedAt": "2026-11-22T03:00:05Z"});
        let (_, backups) = filled(&[
            record("db-1", "u", Some("2026-11-22T03:00:00Z"), taken),
            record("db-2", "u", Some("2026-11-23T03:00:00Z"), json!({"phase": "Failed"})),
            record("db-old", "before", Some("2026-11-21T03:00:00Z"), json!({"phase": "Snapshotting"})),
            record("db-m-1", "u", None, json!(null)),
        ]);
        let slots: Vec<String> = backups.slots(&key(), "u").iter().map(ToString::to_string).collect();
        assert_eq!(slots, ["2026-11-22T03:00:00Z", "2026-11-23T03:00:00Z"]);
        assert!(backups.is_open(&key(), "u") && backups.is_open(&key(), "before"));
        assert_eq!(backups.newest_good(&key(), "u"), Some("2026-11-22T03:00:05Z".parse().unwrap()));
        assert_eq!(backups.newest_good(&key(), "before"), None);
        let mut open = backups.open();
        open.sort_by(|a, b| a.name.cmp(&b.name));
        let found: Vec<_> = open.iter().map(|open| (open.name.as_str(), open.begun)).collect();
        assert_eq!(found, [("db-m-1", false), ("db-old", true)]);
        assert_eq!(open[0].since, Some("2026-11-22T09:00:00Z".parse().unwrap()));
    }

    #[test]
    fn one_that_waits_says_until_when_and_has_nothing_under_way() {
        let retry = "2026-11-22T03:00:10Z";
        let (mut feed, backups) =
            filled(&[record("db-m-1", "u", None, json!({"phase": "Waiting", "retryAt": retry}))]);
        let open = backups.open().remove(0);
        assert_eq!((open.begun, open.retry_at), (false, Some(retry.parse().unwrap())));
        feed.take(&Event::Apply(record(
            "db-m-1",
            "u",
            None,
            json!({"phase": "Preflight", "retryAt": retry}),
        )));
        let open = backups.open().remove(0);
        assert_eq!((open.begun, open.retry_at), (true, None));
    }

    #[test]
    fn drills_are_known_by_where_they_stand() {
        let (day, later) = ("2026-11-22T03:00:05Z", "2026-11-23T03:00:05Z");
        let tried = json!({"phase": "Verified", "finishedAt": day,
            "verification": {"phase": "Verified", "startedAt": "2026-11-22T04:00:00Z"}});
        let (mut feed, backups) = filled(&[
            record("db-1", "u", Some("2026-11-22T03:00:00Z"), tried),
            record("db-2", "u", Some("2026-11-23T03:00:00Z"), json!({"phase": "Taken", "finishedAt": later})),
        ]);
        let drills = backups.drills(&key(), "u");
        assert_eq!(drills.newest, Some(("db-2".to_owned(), later.parse().unwrap(), false)));
        assert_eq!(drills.oldest, Some(day.parse().unwrap()));
        assert_eq!(drills.last, Some("2026-11-22T04:00:00Z".parse().unwrap()));
        assert_eq!(backups.open_drill(), None);
        let running = json!({"phase": "Taken", "finishedAt": later, "verification": {"phase": "Cloning"}});
        feed.take(&Event::Apply(record("db-2", "u", Some("2026-11-23T03:00:00Z"), running)));
        assert_eq!(backups.open_drill(), Some(("shop".to_owned(), "db-2".to_owned())));
    }

    #[test]
    fn it_follows_the_watch() {
        let (mut feed, backups) = filled(&[record("db-m-1", "u", None, json!(null))]);
        let version = backups.version(&key());
        feed.take(&Event::Apply(record("db-m-1", "u", None, json!({"phase": "Stuck"}))));
        assert!(backups.version(&key()) > version);
        assert_eq!((backups.open().len(), backups.stuck()), (0, 1));
        feed.take(&Event::Delete(record("db-m-1", "u", None, json!({"phase": "Stuck"}))));
        assert_eq!((backups.stuck(), backups.version(&key())), (0, 0));
        assert!(backups.newest_good(&key(), "u").is_none());
    }

    #[test]
    fn a_new_list_takes_the_place_of_the_old_one_when_it_is_whole() {
        let (mut feed, backups) = filled(&[record("db-m-1", "u", None, json!(null))]);
        let version = backups.version(&key());
        feed.take(&Event::Init);
        feed.take(&Event::InitApply(record("db-m-2", "u", None, json!(null))));
        assert_eq!(backups.open()[0].name, "db-m-1");
        feed.take(&Event::InitDone);
        let open: Vec<String> = backups.open().into_iter().map(|open| open.name).collect();
        assert_eq!(open, ["db-m-2"]);
        assert!(backups.version(&key()) > version);
    }

    #[test]
    fn one_that_is_brought_back_from_the_catalogue_is_not_run() {
        let mut rebuilt = record("db-m-1", "u", None, json!(null));
        rebuilt.annotations_mut().insert(names::REBUILT.to_owned(), "true".to_owned());
        assert!(filled(&[rebuilt]).1.open().is_empty());
    }

    #[test]
    fn a_moment_is_the_time_it_was_made_of_in_the_same_order() {
        let times = [
            "-009999-01-02T01:59:59Z",
            "1969-12-31T23:59:59.999999Z",
            "1970-01-01T00:00:00Z",
            "2026-11-22T03:00:05.123456Z",
            "9999-12-30T22:00:00Z",
        ];
        let times = times.map(|text| text.parse::<Timestamp>().unwrap());
        let moments = times.map(|at| Moment::new(at).unwrap());
        assert_eq!(moments.map(Moment::timestamp), times);
        assert!(moments.is_sorted());
    }

    #[test]
    fn a_million_backups_fit_into_memory() {
        // With its name an entry takes some 40 bytes more, so that a million stay below 110 MiB.
        assert!(size_of::<Entry>() <= 64, "{}", size_of::<Entry>());
    }
}
