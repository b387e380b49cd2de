//! When a backup is due: cron, time zones, daylight saving, missed slots, jitter.
//!
//! A *slot* is one occurrence of the schedule, as an instant. It names everything the backup makes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};

use croner::Cron;
use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// Longest cron expression that is read; a real one is under 40 characters.
const EXPRESSION_MAX: usize = 256;

/// Minute, hour, day, month, weekday.
const FIELDS_MIN: usize = 5;

/// Expressions that are remembered: a cluster has few different ones, and with all of their longest this is 64 KiB of text.
const REMEMBERED_MAX: usize = 256;

/// What was read before, because to read an expression takes as long as to judge a whole StatefulSet. Whoever asks gets
/// what reading it again would give.
static REMEMBERED: RwLock<BTreeMap<String, Arc<Cron>>> = RwLock::new(BTreeMap::new());

/// A cron expression that has at least one occurrence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CronExpression {
    text: String,
    cron: Arc<Cron>,
}

impl CronExpression {
    /// The expression as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The latest occurrence at or before `now`.
    ///
    /// A time in a spring gap runs once, at the first instant after the gap; a time in an autumn fold runs once,
    /// at its first pass (croner 4.0.3, measured). `None` when the expression has none before `now`.
    #[must_use]
    pub fn latest(&self, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let found = self.cron.find_previous_occurrence(&now.to_zoned(zone.clone()), true).ok()?;
        Some(found.timestamp())
    }

    /// The first occurrence after `now`; `None` when there is none before the year 5000.
    #[must_use]
    pub fn next(&self, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let found = self.cron.find_next_occurrence(&now.to_zoned(zone.clone()), false).ok()?;
        Some(found.timestamp())
    }
}

impl fmt::Display for CronExpression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for CronExpression {
    type Err = String;

    /// Reads five fields, six (seconds first), or a nickname such as `@daily`.
    ///
    /// # Errors
    /// Says what is wrong with the expression, or that it never happens ("30 February").
    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > EXPRESSION_MAX {
            return Err(format!("is longer than {EXPRESSION_MAX} characters"));
        }
        let text = text.trim();
        let remembered = REMEMBERED.read().unwrap_or_else(PoisonError::into_inner).get(text).cloned();
        let cron = match remembered {
            Some(cron) => cron,
            None => {
                let cron = Arc::new(read(text)?);
                let mut all = REMEMBERED.write().unwrap_or_else(PoisonError::into_inner);
                if all.len() >= REMEMBERED_MAX {
                    all.clear();
                }
                all.insert(text.to_owned(), Arc::clone(&cron));
                cron
            }
        };
        Ok(Self { text: text.to_owned(), cron })
    }
}

/// Reads a trimmed expression.
fn read(text: &str) -> Result<Cron, String> {
    let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
    let cron = parser.parse(text).map_err(|error| match error {
        CronError::EmptyPattern => "is empty".to_owned(),
        CronError::InvalidPattern(_) if text.starts_with('@') => "is not a known nickname".to_owned(),
        // Two of the shortest make ten fields, and nothing else that is written by mistake does.
        _ if text.contains([';', '|', '\n']) || text.split_whitespace().count() >= 2 * FIELDS_MIN => {
            "holds more than one schedule; a StatefulSet has one".to_owned()
        }
        CronError::InvalidPattern(_) => {
            format!("has {} fields instead of 5 or 6", text.split_whitespace().count())
        }
        CronError::IllegalCharacters(why) | CronError::ComponentError(why) => {
            format!("is not a cron expression ({why})")
        }
        other => format!("is not a cron expression ({other})"),
    })?;
    // On a calendar without a zone the search says whether the days exist at all.
    let start = jiff::civil::date(2024, 1, 1).at(0, 0, 0, 0);
    cron.find_next_occurrence(&start, true)
        .map_err(|_| "never happens (no such day in any year)".to_owned())?;
    Ok(cron)
}

/// By how much the wall clock may run apart from the time that passes before it is called a jump; a clock that is slewed
/// or a process that was stopped for a moment stays below.
pub const CLOCK_JUMP_MIN: SignedDuration = SignedDuration::from_secs(30);

/// By how much the wall clock jumped while `passed` went by on a clock that cannot: ahead is positive. `None` when it did
/// not.
#[must_use]
pub fn clock_jump(passed: SignedDuration, before: Timestamp, now: Timestamp) -> Option<SignedDuration> {
    let jump = now.duration_since(before).saturating_sub(passed);
    (jump.abs() >= CLOCK_JUMP_MIN).then_some(jump)
}

/// How late a missed slot is still caught up; an older one is left out, and the next one runs.
pub const CATCH_UP_DEADLINE: SignedDuration = SignedDuration::from_hours(1);
/// Longest delay that spreads the databases of a cluster over time.
pub const JITTER_MAX: SignedDuration = SignedDuration::from_mins(5);
/// The delay is at most this part of the time between two slots.
const JITTER_PART: i32 = 10;

/// What is known of one database when the scheduler wakes.
#[derive(Debug)]
pub struct Known<'a> {
    /// The schedule.
    pub schedule: &'a CronExpression,
    /// The zone the schedule is read in.
    pub zone: &'a TimeZone,
    /// Whether scheduled backups are suspended.
    pub suspend: bool,
    /// When this schedule, in this zone, was first seen: what was due before is not made up for.
    pub first_seen: Timestamp,
    /// The slots that have a record, whatever became of them.
    pub slots: &'a BTreeSet<Timestamp>,
    /// Whether a backup of this database is under way.
    pub open_run: bool,
    /// The uid of the StatefulSet, from which the jitter derives.
    pub uid: &'a str,
}

/// What to do about one database now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Reserve this slot and back up.
    Start {
        /// The slot.
        slot: Timestamp,
        /// How long after the slot it starts.
        late: SignedDuration,
    },
    /// Nothing to do.
    Wait(Waiting),
}

/// Why nothing is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// The schedule is suspended.
    Suspended,
    /// No slot is due since the schedule was first seen, or the due one has its record.
    NotDue,
    /// The slot is due, and begins after its jitter.
    Jitter {
        /// When.
        until: Timestamp,
    },
    /// A backup of this database is still under way.
    Busy,
    /// The slot was missed by more than [`CATCH_UP_DEADLINE`].
    Missed {
        /// The slot.
        slot: Timestamp,
    },
}

/// How long an answer is relied upon at most: what was overlooked is found after this time.
const HOLDS_MAX: SignedDuration = SignedDuration::from_hours(1);

impl Decision {
    /// Until when this stays the answer if nothing changes but the time, so that nobody need ask again. `None` when that
    /// is not known.
    #[must_use]
    pub fn holds_until(&self, now: Timestamp, known: &Known<'_>) -> Option<Timestamp> {
        let latest = now.saturating_add(HOLDS_MAX).unwrap_or(now);
        match self {
            Self::Wait(Waiting::NotDue | Waiting::Missed { .. }) => {
                Some(known.schedule.next(now, known.zone).map_or(latest, |next| next.min(latest)))
            }
            Self::Wait(Waiting::Jitter { until }) => Some(*until),
            // What is started or busy ends, and what is suspended is not made up for: the time of the look counts.
            Self::Start { .. } | Self::Wait(Waiting::Busy | Waiting::Suspended) => None,
        }
    }
}

/// Decides whether a backup of one database starts at `now`.
///
/// Only the latest slot is looked at, so however many were missed, one is caught up. A wake-up that comes twice,
/// late or not at all does no harm: the slots that have records are the memory.
#[must_use]
pub fn decide(now: Timestamp, known: &Known<'_>) -> Decision {
    let Known { schedule, zone, suspend, first_seen, slots, open_run, uid } = known;
    if *suspend {
        return Decision::Wait(Waiting::Suspended);
    }
    let Some(slot) = schedule.latest(now, zone) else { return Decision::Wait(Waiting::NotDue) };
    // Records later than `now` were written by a clock that was ahead: they stand for no slot of the present.
    let newest = slots.range(..=now).next_back();
    if slot < *first_seen || newest.is_some_and(|newest| *newest >= slot) {
        return Decision::Wait(Waiting::NotDue);
    }
    let late = now.duration_since(slot);
    if late > CATCH_UP_DEADLINE {
        return Decision::Wait(Waiting::Missed { slot });
    }
    if *open_run {
        return Decision::Wait(Waiting::Busy);
    }
    let until = slot.saturating_add(jitter(schedule, zone, slot, uid)).unwrap_or(slot);
    if now < until {
        return Decision::Wait(Waiting::Jitter { until });
    }
    Decision::Start { slot, late }
}

/// The delay of one database: the same for each of its slots, different from other databases'.
fn jitter(schedule: &CronExpression, zone: &TimeZone, slot: Timestamp, uid: &str) -> SignedDuration {
    let interval = schedule.next(slot, zone).map_or(JITTER_MAX, |next| next.duration_since(slot));
    let longest = (interval / JITTER_PART).min(JITTER_MAX).as_secs().max(0).unsigned_abs();
    // FNV-1a: a hash that stays the same in every release, unlike the standard library's.
    let hash = uid.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    SignedDuration::from_secs(i64::try_from(hash % (longest + 1)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn zone(name: &str) -> TimeZone {
        jiff::tz::TimeZoneDatabase::bundled().get(name).unwrap()
    }

    #[test]
    fn what_is_remembered_is_bounded_and_means_what_reading_again_would() {
        for number in 0..REMEMBERED_MAX + 10 {
            let text = format!("{} {} * * *", number % 60, number / 60);
            let twice: [CronExpression; 2] = [text.parse().unwrap(), format!(" {text} ").parse().unwrap()];
            assert_eq!((twice[0].as_str(), &twice[1]), (text.as_str(), &twice[0]));
            assert_eq!(*twice[0].cron, read(&text).unwrap());
            assert!(REMEMBERED.read().unwrap().len() <= REMEMBERED_MAX);
        }
        assert_eq!(
            "61 * * * *".parse::<CronExpression>(),
            "61 * * * *".parse(),
            "an error is not remembered"
        );
        assert!(!REMEMBERED.read().unwrap().contains_key("61 * * * *"));
    }

    /// One database and what is remembered of it.
    struct Database {
        schedule: CronExpression,
        zone: TimeZone,
        suspend: bool,
        first_seen: Timestamp,
        slots: BTreeSet<Timestamp>,
        open_run: bool,
    }

    impl Database {
        fn new(schedule: &str, zone_name: &str, first_seen: &str) -> Self {
            Self {
                schedule: schedule.parse().unwrap(),
                zone: zone(zone_name),
                suspend: false,
                first_seen: at(first_seen),
                slots: BTreeSet::new(),
                open_run: false,
            }
        }

        fn decide(&self, now: Timestamp) -> Decision {
            decide(now, &self.known())
        }

        fn known(&self) -> Known<'_> {
            Known {
                schedule: &self.schedule,
                zone: &self.zone,
                suspend: self.suspend,
                first_seen: self.first_seen,
                slots: &self.slots,
                open_run: self.open_run,
                uid: "0b1e9c5e",
            }
        }

        /// Wakes every minute in `[from, to)`, records what starts, and returns it.
        fn live(&mut self, from: &str, to: &str) -> Vec<String> {
            let (mut now, to) = (at(from), at(to));
            let mut started = Vec::new();
            let mut quiet_until = now;
            while now < to {
                let decision = self.decide(now);
                quiet_until = quiet_until.max(decision.holds_until(now, &self.known()).unwrap_or(now));
                if let Decision::Start { slot, .. } = decision {
                    assert!(now >= quiet_until, "slot {slot} starts before {quiet_until}");
                    assert!(self.slots.insert(slot), "slot {slot} started twice");
                    started.push(slot.to_string());
                }
                now += SignedDuration::from_mins(1);
            }
            started
        }
    }

    #[test]
    fn a_slot_starts_once_and_not_before_it_was_seen() {
        let mut database = Database::new("0 3 * * *", "UTC", "2026-11-22T03:30:00Z");
        assert_eq!(database.live("2026-11-22T03:30:00Z", "2026-11-22T23:59:50Z"), [""; 0]);
        let started = database.live("2026-11-22T23:59:50Z", "2026-11-24T12:00:00Z");
        assert_eq!(started, ["2026-11-23T03:00:00Z", "2026-11-24T03:00:00Z"]);
    }

    #[test]
    fn the_zone_moves_the_slot() {
        let mut database = Database::new("0 3 * * *", "Asia/Tokyo", "2026-11-22T00:00:00Z");
        assert_eq!(database.live("2026-11-22T00:00:00Z", "2026-11-23T00:00:00Z"), ["2026-11-22T18:00:00Z"]);
    }

    #[test]
    fn of_several_missed_slots_one_is_caught_up() {
        let mut database = Database::new("*/10 * * * *", "UTC", "2026-11-22T00:00:00Z");
        database.slots.insert(at("2026-11-22T01:00:00Z"));
        // Down for two hours and five minutes.
        assert_eq!(database.live("2026-11-22T03:05:00Z", "2026-11-22T03:09:00Z"), ["2026-11-22T03:00:00Z"]);
    }

    #[test]
    fn a_slot_missed_by_more_than_the_deadline_is_left_out() {
        let mut database = Database::new("0 3 * * *", "UTC", "2026-11-20T00:00:00Z");
        let late = database.decide(at("2026-11-22T04:00:01Z"));
        assert_eq!(late, Decision::Wait(Waiting::Missed { slot: at("2026-11-22T03:00:00Z") }));
        assert_eq!(database.live("2026-11-22T04:00:01Z", "2026-11-23T03:30:00Z"), ["2026-11-23T03:00:00Z"]);
    }

    #[test]
    fn a_run_under_way_delays_the_next() {
        let mut database = Database::new("*/10 * * * *", "UTC", "2026-11-22T00:00:00Z");
        database.open_run = true;
        assert_eq!(database.decide(at("2026-11-22T00:12:00Z")), Decision::Wait(Waiting::Busy));
        database.open_run = false;
        assert!(matches!(database.decide(at("2026-11-22T00:18:00Z")), Decision::Start { .. }));
    }

    #[test]
    fn suspended_means_nothing_starts() {
        let mut database = Database::new("* * * * *", "UTC", "2026-11-22T00:00:00Z");
        database.suspend = true;
        assert_eq!(database.live("2026-11-22T00:00:00Z", "2026-11-22T01:00:00Z"), [""; 0]);
    }

    #[test]
    fn a_time_in_the_spring_gap_runs_once_after_it() {
        // Berlin, 29 March 2026: 02:00 becomes 03:00, so 02:30 does not exist; 03:00 is 01:00 UTC.
        let mut database = Database::new("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z");
        let started = database.live("2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
        assert_eq!(started, ["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]);
    }

    #[test]
    fn a_time_in_the_autumn_fold_runs_once_at_its_first_pass() {
        // Berlin, 25 October 2026: 03:00 becomes 02:00, so 02:30 happens at 00:30 and at 01:30 UTC.
        let mut database = Database::new("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z");
        let started = database.live("2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z");
        assert_eq!(started, ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]);
    }

    #[test]
    fn hourly_runs_every_hour_through_gap_and_fold() {
        for (from, to) in [
            ("2026-03-29T00:00:00Z", "2026-03-29T06:00:00Z"),
            ("2026-10-24T23:00:00Z", "2026-10-25T05:00:00Z"),
        ] {
            let mut database = Database::new("@hourly", "Europe/Berlin", from);
            // The last slot is an hour before `to`; each is late by its jitter alone.
            assert_eq!(database.live(from, to).len(), 6, "{from}");
        }
    }

    #[test]
    fn a_clock_set_back_repeats_no_slot() {
        let mut database = Database::new("*/10 * * * *", "UTC", "2026-11-22T00:00:00Z");
        let first = database.live("2026-11-22T00:05:00Z", "2026-11-22T01:05:00Z");
        let second = database.live("2026-11-22T00:25:00Z", "2026-11-22T01:05:00Z");
        assert_eq!((first.len(), second.len()), (7, 0));
    }

    #[test]
    fn a_clock_that_was_far_ahead_does_not_stop_the_schedule() {
        let mut database = Database::new("0 3 * * *", "UTC", "2026-11-20T00:00:00Z");
        // The clock said 2030 for a while, and a backup was taken.
        database.slots.insert(at("2030-01-01T03:00:00Z"));
        assert_eq!(database.live("2026-11-22T02:59:00Z", "2026-11-22T03:30:00Z"), ["2026-11-22T03:00:00Z"]);
    }

    #[test]
    fn a_jump_of_the_clock_is_told_in_both_directions() {
        let (before, passed) = (at("2026-11-22T03:00:00Z"), SignedDuration::from_secs(5));
        let jump = |now: &str| clock_jump(passed, before, at(now)).map(|jump| jump.as_secs());
        assert_eq!(jump("2026-11-22T03:00:05Z"), None);
        assert_eq!(jump("2026-11-22T03:00:20Z"), None, "a slow tick");
        assert_eq!(jump("2026-11-22T04:00:05Z"), Some(3600));
        assert_eq!(jump("2026-11-22T02:00:05Z"), Some(-3600));
    }

    #[test]
    fn jitter_is_steady_bounded_and_differs() {
        let schedule: CronExpression = "@hourly".parse().unwrap();
        let slot = at("2026-11-22T03:00:00Z");
        let of = |uid: &str| jitter(&schedule, &TimeZone::UTC, slot, uid);
        assert_eq!(of("a"), of("a"));
        let delays: BTreeSet<SignedDuration> = (0..50).map(|i| of(&format!("uid-{i}"))).collect();
        assert!(delays.len() > 20 && delays.iter().all(|delay| *delay <= JITTER_MAX));
        let seconds: CronExpression = "*/5 * * * * *".parse().unwrap();
        assert_eq!(jitter(&seconds, &TimeZone::UTC, slot, "a"), SignedDuration::ZERO);
    }

    proptest! {
        // croner walks wall-clock seconds through a gap, which is slow without optimisation.
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Whatever the clock does, a slot with a record never starts, and a start is of a slot in time.
        #[test]
        fn a_start_is_always_new_due_and_in_time(
            steps in proptest::collection::vec(-7200i64..7200, 1..60),
            expression in prop::sample::select(vec!["*/7 * * * *", "@hourly", "30 2 * * *", "*/20 * * * * *"]),
            zone_name in prop::sample::select(vec!["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Asia/Tokyo"]),
        ) {
            let mut database = Database::new(expression, zone_name, "2026-10-24T12:00:00Z");
            let mut now = at("2026-10-24T12:00:00Z");
            for step in steps {
                now += SignedDuration::from_secs(step);
                if let Decision::Start { slot, late } = database.decide(now) {
                    prop_assert!(slot <= now && slot >= database.first_seen && late <= CATCH_UP_DEADLINE);
                    prop_assert!(database.slots.insert(slot), "slot {} started twice", slot);
                }
            }
        }
    }
}
