//! Which backups are kept: restic's keep rules, OR-ed, and the list of what is never deleted.

use std::fmt;
use std::str::FromStr;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Zoned};

/// Most snapshots of ours one image may carry.
///
/// ceph-csi begins to flatten clones at 250 snapshots of an image and counts ours too (field notes, backup 2.6);
/// krbd ends at 510. Under 200 leaves room for snapshots of others.
pub const SNAPSHOTS_PER_IMAGE_MAX: usize = 190;

/// Most snapshots of everybody that an image may carry when howdah adds one: well below ceph-csi's 450, where its own
/// snapshots begin to fail, and krbd's 510, where the volume itself does.
pub const IMAGE_SNAPSHOTS_MAX: usize = 400;

/// Most snapshots deleted in one run: a deletion is paid by every OSD afterwards (snaptrim), and a policy written
/// by mistake is noticed before it is carried out in full.
pub const DELETIONS_PER_RUN_MAX: usize = 10;

/// The calendar units a rule counts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Period {
    /// Calendar hours.
    Hourly,
    /// Calendar days.
    Daily,
    /// ISO weeks, from Monday.
    Weekly,
    /// Calendar months.
    Monthly,
    /// Calendar years.
    Yearly,
}

impl Period {
    /// Every period, shortest first.
    pub const ALL: [Self; 5] = [Self::Hourly, Self::Daily, Self::Weekly, Self::Monthly, Self::Yearly];

    /// The key of the period in a policy.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
        }
    }
}

/// A keep policy: a backup is kept when any rule keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// The newest N.
    pub last: Option<u32>,
    /// The newest of each of the last N periods that have a backup.
    pub periods: Vec<(Period, u32)>,
    /// Everything younger than this.
    pub within: Option<SignedDuration>,
    /// The newest of each period, as far back as the duration.
    pub within_periods: Vec<(Period, SignedDuration)>,
}

impl fmt::Display for RetentionPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.last.map(|n| format!("last={n}")));
        parts.extend(self.periods.iter().map(|(period, n)| format!("{}={n}", period.key())));
        parts.extend(self.within.map(|age| format!("within={}h", age.as_hours())));
        parts.extend(
            self.within_periods
                .iter()
                .map(|(period, age)| format!("within-{}={}h", period.key(), age.as_hours())),
        );
        f.write_str(&parts.join(" "))
    }
}

impl FromStr for RetentionPolicy {
    type Err = String;

    /// Reads `last=3 hourly=24 daily=7 weekly=4 monthly=6 yearly=2 within=14d within-daily=8w`; every key is
    /// optional, one is needed.
    ///
    /// # Errors
    /// Names the key that is unknown, given twice or has no usable number, refuses an empty policy (it would
    /// delete everything) and one that counts more than [`SNAPSHOTS_PER_IMAGE_MAX`].
    fn from_str(text: &str) -> Result<Self, String> {
        let mut policy = Self { last: None, periods: Vec::new(), within: None, within_periods: Vec::new() };
        let mut seen = Vec::new();
        for token in text.split_whitespace() {
            let (key, value) =
                token.split_once('=').ok_or_else(|| format!("has {token:?} where key=number is wanted"))?;
            if seen.contains(&key) {
                return Err(format!("names {key:?} twice"));
            }
            seen.push(key);
            let period = |name: &str| Period::ALL.into_iter().find(|period| period.key() == name);
            if key == "last" {
                policy.last = Some(count(key, value)?);
            } else if key == "within" {
                policy.within = Some(age(key, value)?);
            } else if let Some(period) = period(key) {
                policy.periods.push((period, count(key, value)?));
            } else if let Some(period) = key.strip_prefix("within-").and_then(period) {
                policy.within_periods.push((period, age(key, value)?));
            } else {
                return Err(format!("has the unknown key {key:?}"));
            }
        }
        if seen.is_empty() {
            return Err("names no rule, which would keep nothing".to_owned());
        }
        let total = policy
            .periods
            .iter()
            .fold(policy.last.unwrap_or(0) as usize, |sum, (_, n)| sum.saturating_add(*n as usize));
        if total > SNAPSHOTS_PER_IMAGE_MAX {
            return Err(format!(
                "keeps up to {total} snapshots, more than the {SNAPSHOTS_PER_IMAGE_MAX} an image may carry"
            ));
        }
        policy.periods.sort_unstable();
        policy.within_periods.sort_unstable_by_key(|(period, _)| *period);
        Ok(policy)
    }
}

/// Reads a count of at least one: "keep 0" is a slip that would delete what the writer meant to keep.
fn count(key: &str, value: &str) -> Result<u32, String> {
    match value.parse::<u32>() {
        Ok(n) if n > 0 => Ok(n),
        Ok(_) => Err(format!("has {key}=0; leave the key out to not use the rule")),
        Err(_) => Err(format!("has {value:?} for {key:?} where a whole number is wanted")),
    }
}

/// Reads `36h`, `14d`, `8w`, `1y` or a sum such as `1y2w`; a month is no fixed length and is refused.
fn age(key: &str, value: &str) -> Result<SignedDuration, String> {
    let wrong = || format!("has {value:?} for {key:?} where an age such as 36h, 14d, 8w or 1y is wanted");
    let mut hours: i64 = 0;
    let mut digits = String::new();
    for c in value.chars() {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        let unit: i64 = match c {
            'h' => 1,
            'd' => 24,
            'w' => 7 * 24,
            'y' => 365 * 24,
            _ => return Err(wrong()),
        };
        let n: i64 = digits.parse().map_err(|_| wrong())?;
        digits.clear();
        hours = n.checked_mul(unit).and_then(|n| hours.checked_add(n)).ok_or_else(wrong)?;
    }
    // A century; larger numbers are slips, and they would overflow a time stamp.
    const AGE_MAX_HOURS: i64 = 100 * 365 * 24;
    if !digits.is_empty() || hours <= 0 || hours > AGE_MAX_HOURS {
        return Err(wrong());
    }
    Ok(SignedDuration::from_hours(hours))
}

/// One snapshot of the image, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The snapshot.
    pub snapshot: String,
    /// When the backup was due, by the clock of that time: it may have been wrong.
    pub taken_at: Timestamp,
    /// The id of the snapshot. Ceph counts up, whatever any clock says: of two snapshots of a pool the one with the higher
    /// id is the newer.
    pub sequence: u64,
    /// What is known of the backup.
    pub state: ItemState,
    /// Somebody put a hold on it.
    pub held: bool,
    /// Clones hang on it.
    pub has_clones: bool,
    /// An operation that is under way uses it.
    pub in_use: bool,
    /// An image that holds a part of it is not to be seen: it may be in the trash, from which it comes back.
    pub unclear: bool,
}

/// What is known of the backup behind a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ItemState {
    /// Not ours.
    Foreign,
    /// Ours by its name, but neither a record nor the catalogue says that it was completed.
    Unfinished,
    /// Completed.
    Taken,
    /// Completed, and proven by a restore.
    Verified,
    /// Completed, and found damaged by a restore drill. It is no good backup, and may still be all there is.
    Damaged,
}

/// What becomes of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It stays, for these reasons.
    Keep(Vec<KeepReason>),
    /// It goes, for this reason.
    Delete(DeleteReason),
}

/// Why a snapshot stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepReason {
    /// There is no policy, so nothing is pruned.
    NoPolicy,
    /// It is not ours.
    Foreign,
    /// A hold is on it.
    Held,
    /// Clones hang on it.
    HasClones,
    /// An operation uses it.
    InUse,
    /// An image of it is not to be seen.
    Unclear,
    /// It lies in the future: the clock was wrong then, or is wrong now.
    FutureDated,
    /// The newest verified one.
    NewestVerified,
    /// The newest good one.
    NewestGood,
    /// It was not completed or is damaged, and no newer one is good: nothing is deleted before there is something better.
    NothingNewer,
    /// Among the newest N.
    Last,
    /// The newest of its period.
    Period(Period),
    /// The oldest there is, while its rule is not filled yet.
    Oldest(Period),
    /// Young enough.
    Within,
    /// The newest of its period, and young enough.
    WithinPeriod(Period),
}

impl KeepReason {
    /// Whether no policy can overrule the reason.
    #[must_use]
    pub const fn is_absolute(self) -> bool {
        !matches!(self, Self::Last | Self::Period(_) | Self::Oldest(_) | Self::Within | Self::WithinPeriod(_))
    }
}

impl fmt::Display for KeepReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPolicy => f.write_str("no retention policy"),
            Self::Foreign => f.write_str("not taken by howdah"),
            Self::Held => f.write_str("held"),
            Self::HasClones => f.write_str("has clones"),
            Self::InUse => f.write_str("used by an open operation"),
            Self::Unclear => f.write_str("an image of it is not there, and may be in the trash"),
            Self::FutureDated => f.write_str("dated in the future"),
            Self::NewestVerified => f.write_str("newest verified"),
            Self::NewestGood => f.write_str("newest good"),
            Self::NothingNewer => f.write_str("not good, and nothing newer is"),
            Self::Last => f.write_str("last"),
            Self::Period(period) => f.write_str(period.key()),
            Self::Oldest(period) => write!(f, "oldest {}", period.key()),
            Self::Within => f.write_str("within"),
            Self::WithinPeriod(period) => write!(f, "within-{}", period.key()),
        }
    }
}

/// Why a snapshot goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeleteReason {
    /// No rule keeps it.
    NotKept,
    /// It was not completed, or a part of it is gone, and a newer one is good.
    Unfinished,
    /// A restore drill found it damaged, and a newer one is good.
    Damaged,
    /// Rules keep more than [`SNAPSHOTS_PER_IMAGE_MAX`], and it is among the oldest.
    OverLimit,
}

impl fmt::Display for DeleteReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotKept => f.write_str("no rule keeps it"),
            Self::Unfinished => f.write_str("incomplete, and a newer backup is good"),
            Self::Damaged => f.write_str("found damaged by a restore drill, and a newer backup is good"),
            Self::OverLimit => write!(f, "over the limit of {SNAPSHOTS_PER_IMAGE_MAX} snapshots per image"),
        }
    }
}

/// Judges every snapshot of an image; the answer is newest first.
///
/// The never-list goes by the order in which Ceph took the snapshots, which no clock can change; the newest by the clock
/// is kept, too. The rules go by the clock, as their calendar does.
///
/// `zone` gives the calendar. Ages are measured from the newest good backup, not from `now`, as restic does: a clock
/// that runs ahead, or backups that stopped long ago, delete nothing.
#[must_use]
pub fn plan(
    now: Timestamp,
    zone: &TimeZone,
    policy: Option<&RetentionPolicy>,
    items: &[Item],
) -> Vec<(Item, Verdict)> {
    let mut items = items.to_vec();
    items.sort_by(|a, b| (b.taken_at, &b.snapshot).cmp(&(a.taken_at, &a.snapshot)));
    let good = |item: &Item| matches!(item.state, ItemState::Taken | ItemState::Verified) && !item.unclear;
    let present = |item: &Item| item.taken_at <= now;
    let newest = |wanted: &dyn Fn(&Item) -> bool| -> [Option<usize>; 2] {
        let by_sequence = (0..items.len()).filter(|i| wanted(&items[*i])).max_by_key(|i| items[*i].sequence);
        [by_sequence, items.iter().position(|item| present(item) && wanted(item))]
    };
    let newest_good = newest(&good);
    let newest_verified = newest(&|item| item.state == ItemState::Verified && good(item));

    let mut reasons: Vec<Vec<KeepReason>> = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let mut keep = Vec::new();
        let mut keep_if = |condition: bool, reason: KeepReason| keep.extend(condition.then_some(reason));
        keep_if(item.state == ItemState::Foreign, KeepReason::Foreign);
        keep_if(policy.is_none(), KeepReason::NoPolicy);
        keep_if(item.held, KeepReason::Held);
        keep_if(item.has_clones, KeepReason::HasClones);
        keep_if(item.in_use, KeepReason::InUse);
        keep_if(item.unclear, KeepReason::Unclear);
        keep_if(!present(item), KeepReason::FutureDated);
        keep_if(newest_verified.contains(&Some(i)), KeepReason::NewestVerified);
        keep_if(newest_good.contains(&Some(i)), KeepReason::NewestGood);
        let successor = |other: &Item| present(other) && good(other) && other.sequence > item.sequence;
        let nothing_newer = !items.iter().any(successor);
        let not_good = matches!(item.state, ItemState::Unfinished | ItemState::Damaged);
        keep_if(not_good && nothing_newer, KeepReason::NothingNewer);
        reasons.push(keep);
    }
    if let Some(policy) = policy {
        let candidates: Vec<usize> =
            (0..items.len()).filter(|i| good(&items[*i]) && present(&items[*i])).collect();
        let times: Vec<Zoned> =
            candidates.iter().map(|i| items[*i].taken_at.to_zoned(zone.clone())).collect();
        for (candidate, reason) in apply_rules(policy, &times) {
            reasons[candidates[candidate]].push(reason);
        }
    }

    let mut verdicts: Vec<(Item, Verdict)> = items
        .into_iter()
        .zip(reasons)
        .map(|(item, reasons)| {
            let verdict = match (reasons.is_empty(), item.state) {
                (false, _) => Verdict::Keep(reasons),
                (true, ItemState::Unfinished) => Verdict::Delete(DeleteReason::Unfinished),
                (true, ItemState::Damaged) => Verdict::Delete(DeleteReason::Damaged),
                (true, _) => Verdict::Delete(DeleteReason::NotKept),
            };
            (item, verdict)
        })
        .collect();
    if policy.is_some() {
        enforce_limit(&mut verdicts);
    }
    verdicts
}

/// The deletions of a plan that one run may carry out: the oldest first, at most [`DELETIONS_PER_RUN_MAX`].
pub fn deletions(plan: &[(Item, Verdict)]) -> impl Iterator<Item = (&Item, DeleteReason)> {
    plan.iter()
        .rev()
        .filter_map(|(item, verdict)| match verdict {
            Verdict::Delete(reason) => Some((item, *reason)),
            Verdict::Keep(_) => None,
        })
        .take(DELETIONS_PER_RUN_MAX)
}

/// restic's algorithm (`internal/restic/snapshot_policy.go`) over times that are newest first; returns the reasons
/// by index.
fn apply_rules(policy: &RetentionPolicy, times: &[Zoned]) -> Vec<(usize, KeepReason)> {
    let mut kept = Vec::new();
    let last = policy.last.unwrap_or(0) as usize;
    kept.extend((0..times.len().min(last)).map(|i| (i, KeepReason::Last)));
    let Some(newest) = times.first() else { return kept };
    let young = |time: &Zoned, age: SignedDuration| newest.duration_since(time) < age;

    for (period, count) in &policy.periods {
        let mut left = *count;
        let mut previous = None;
        for (i, time) in times.iter().enumerate() {
            if left == 0 {
                break;
            }
            let bucket = bucket(*period, time);
            if previous.as_ref() != Some(&bucket) {
                kept.push((i, KeepReason::Period(*period)));
                left -= 1;
            } else if i == times.len() - 1 {
                kept.push((i, KeepReason::Oldest(*period)));
            }
            previous = Some(bucket);
        }
    }
    if let Some(age) = policy.within {
        kept.extend((0..times.len()).filter(|i| young(&times[*i], age)).map(|i| (i, KeepReason::Within)));
    }
    for (period, age) in &policy.within_periods {
        let mut previous = None;
        for (i, time) in times.iter().enumerate().filter(|(_, time)| young(time, *age)) {
            let bucket = bucket(*period, time);
            if previous.as_ref() != Some(&bucket) {
                kept.push((i, KeepReason::WithinPeriod(*period)));
            }
            previous = Some(bucket);
        }
    }
    kept
}

/// The calendar period a time falls into; equal values mean the same period.
fn bucket(period: Period, time: &Zoned) -> (i16, i16, i8, i64) {
    match period {
        // The hour of a fold happens twice: the offset tells the two apart.
        Period::Hourly => {
            let hour = time.timestamp().as_second() + i64::from(time.offset().seconds());
            (0, 0, 0, hour.div_euclid(3600) * 1_000_000 + i64::from(time.offset().seconds()))
        }
        Period::Daily => (time.year(), i16::from(time.month()), time.day(), 0),
        Period::Weekly => {
            let week = time.date().iso_week_date();
            (week.year(), i16::from(week.week()), 0, 0)
        }
        Period::Monthly => (time.year(), i16::from(time.month()), 0, 0),
        Period::Yearly => (time.year(), 0, 0, 0),
    }
}

/// Gives up the oldest that only rules keep, until the image is within its limit.
fn enforce_limit(verdicts: &mut [(Item, Verdict)]) {
    let ours = |(item, verdict): &&(Item, Verdict)| {
        item.state != ItemState::Foreign && matches!(verdict, Verdict::Keep(_))
    };
    let mut excess = verdicts.iter().filter(ours).count().saturating_sub(SNAPSHOTS_PER_IMAGE_MAX);
    for (_, verdict) in verdicts.iter_mut().rev() {
        let Verdict::Keep(reasons) = verdict else { continue };
        if excess == 0 {
            return;
        }
        if !reasons.iter().any(|reason| reason.is_absolute()) {
            *verdict = Verdict::Delete(DeleteReason::OverLimit);
            excess -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn item(taken_at: Timestamp, state: ItemState) -> Item {
        let snapshot = crate::names::snapshot_name(taken_at);
        // As long as no clock jumps, the order of the ids is that of the times.
        let sequence = taken_at.as_second().unsigned_abs();
        let [held, has_clones, in_use, unclear] = [false; 4];
        Item { snapshot, taken_at, sequence, state, held, has_clones, in_use, unclear }
    }

    fn taken(text: &str) -> Item {
        item(at(text), ItemState::Taken)
    }

    /// `n` good backups, an hour apart, the newest at noon.
    fn hourly(n: i64) -> Vec<Item> {
        (0..n)
            .map(|i| item(at("2026-11-22T12:00:00Z") - SignedDuration::from_hours(i), ItemState::Taken))
            .collect()
    }

    fn judged(policy: &str, items: &[Item]) -> Vec<(Item, Verdict)> {
        let policy: RetentionPolicy = policy.parse().unwrap();
        plan(at("2026-11-22T12:30:00Z"), &TimeZone::UTC, Some(&policy), items)
    }

    fn kept(policy: &str, items: &[Item]) -> Vec<String> {
        judged(policy, items)
            .into_iter()
            .filter(|(_, verdict)| matches!(verdict, Verdict::Keep(_)))
            .map(|(item, _)| item.taken_at.to_string())
            .collect()
    }

    #[test]
    fn last_keeps_the_newest() {
        assert_eq!(kept("last=2", &hourly(5)), ["2026-11-22T12:00:00Z", "2026-11-22T11:00:00Z"]);
    }

    #[test]
    fn periods_without_a_backup_do_not_count() {
        let items =
            [taken("2026-11-22T03:00:00Z"), taken("2026-11-20T03:00:00Z"), taken("2026-11-10T03:00:00Z")];
        assert_eq!(kept("daily=3", &items).len(), 3);
        assert_eq!(kept("daily=2", &items).len(), 2);
    }

    #[test]
    fn the_newest_of_a_day_is_kept_and_the_oldest_while_the_rule_is_not_filled() {
        let items = [
            taken("2026-11-22T09:00:00Z"),
            taken("2026-11-22T03:00:00Z"),
            taken("2026-11-21T09:00:00Z"),
            taken("2026-11-21T06:00:00Z"),
            taken("2026-11-21T03:00:00Z"),
        ];
        assert_eq!(
            kept("daily=7", &items),
            ["2026-11-22T09:00:00Z", "2026-11-21T09:00:00Z", "2026-11-21T03:00:00Z"]
        );
        let (_, verdict) = judged("daily=7", &items).pop().unwrap();
        assert_eq!(verdict, Verdict::Keep(vec![KeepReason::Oldest(Period::Daily)]));
    }

    #[test]
    fn the_calendar_is_that_of_the_zone() {
        // 16:00 UTC is the next day in Tokyo.
        let items =
            [taken("2026-11-21T16:00:00Z"), taken("2026-11-21T14:00:00Z"), taken("2026-11-20T12:00:00Z")];
        let policy: RetentionPolicy = "daily=2".parse().unwrap();
        let tokyo = jiff::tz::TimeZoneDatabase::bundled().get("Asia/Tokyo").unwrap();
        let plan = plan(at("2026-11-22T12:30:00Z"), &tokyo, Some(&policy), &items);
        let keep: Vec<bool> = plan.iter().map(|(_, verdict)| matches!(verdict, Verdict::Keep(_))).collect();
        assert_eq!(keep, [true, true, false]);
    }

    #[test]
    fn ages_are_measured_from_the_newest_good_backup() {
        let policy: RetentionPolicy = "within=3h".parse().unwrap();
        for now in ["2026-11-22T12:30:00Z", "2036-11-22T12:30:00Z"] {
            let plan = plan(at(now), &TimeZone::UTC, Some(&policy), &hourly(6));
            let keep = plan.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Keep(_))).count();
            assert_eq!(keep, 3, "{now}");
        }
    }

    #[test]
    fn all_rules_are_given_as_reasons() {
        let (_, verdict) = judged("last=1 hourly=1 within-weekly=8w", &hourly(2)).remove(0);
        let Verdict::Keep(reasons) = verdict else { panic!("the newest is kept") };
        let words: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        assert_eq!(words, ["newest good", "last", "hourly", "within-weekly"]);
    }

    #[test]
    fn the_never_list_outlives_the_policy() {
        let mut items = hourly(9);
        items[2].state = ItemState::Verified;
        items[3].held = true;
        items[4].has_clones = true;
        items[5].in_use = true;
        items[6].state = ItemState::Foreign;
        items.push(item(at("2027-01-01T00:00:00Z"), ItemState::Taken));
        let plan = judged("last=1", &items);
        let deleted: Vec<&str> = plan
            .iter()
            .filter(|(_, verdict)| matches!(verdict, Verdict::Delete(_)))
            .map(|(item, _)| item.snapshot.as_str())
            .collect();
        assert_eq!(deleted, [1, 7, 8].map(|i| items[i].snapshot.as_str()));
        // The future one is no successor: the newest good one is still of the present.
        let newest = plan.iter().find(|(item, _)| item.snapshot == items[0].snapshot).unwrap();
        assert!(matches!(&newest.1, Verdict::Keep(reasons) if reasons.contains(&KeepReason::NewestGood)));
    }

    #[test]
    fn the_newest_is_the_last_that_ceph_took_whatever_its_date() {
        // The clock was set back by a day before the last one was taken.
        let mut items = hourly(3);
        items.push(Item { sequence: u64::MAX, ..taken("2026-11-21T11:00:00Z") });
        let plan = judged("last=1", &items);
        let verdict = |date: &str| &plan.iter().find(|(item, _)| item.taken_at == at(date)).unwrap().1;
        assert_eq!(*verdict("2026-11-21T11:00:00Z"), Verdict::Keep(vec![KeepReason::NewestGood]));
        let by_clock = Verdict::Keep(vec![KeepReason::NewestGood, KeepReason::Last]);
        assert_eq!(*verdict("2026-11-22T12:00:00Z"), by_clock);
        assert_eq!(*verdict("2026-11-22T11:00:00Z"), Verdict::Delete(DeleteReason::NotKept));
    }

    #[test]
    fn an_unfinished_one_goes_only_when_a_newer_one_is_good() {
        let mut items = hourly(3);
        items[0].state = ItemState::Unfinished;
        items[2].state = ItemState::Unfinished;
        let plan = judged("last=1", &items);
        assert_eq!(plan[0].1, Verdict::Keep(vec![KeepReason::NothingNewer]));
        assert_eq!(plan[2].1, Verdict::Delete(DeleteReason::Unfinished));
    }

    #[test]
    fn without_a_policy_nothing_goes() {
        let plan = plan(at("2026-11-22T12:30:00Z"), &TimeZone::UTC, None, &hourly(250));
        assert!(plan.iter().all(|(_, verdict)| matches!(verdict, Verdict::Keep(_))));
    }

    #[test]
    fn the_limit_takes_the_oldest_that_only_rules_keep() {
        let mut items = hourly(SNAPSHOTS_PER_IMAGE_MAX as i64 + 3);
        let oldest = items.len() - 1;
        items[oldest].held = true;
        let plan = judged("within=9y", &items);
        let over: Vec<usize> =
            (0..plan.len()).filter(|i| plan[*i].1 == Verdict::Delete(DeleteReason::OverLimit)).collect();
        assert_eq!(over, [oldest - 3, oldest - 2, oldest - 1]);
    }

    #[test]
    fn a_run_deletes_a_few_of_the_oldest() {
        let plan = judged("last=1", &hourly(40));
        let names: Vec<&str> = deletions(&plan).map(|(item, _)| item.snapshot.as_str()).collect();
        assert_eq!(names.len(), DELETIONS_PER_RUN_MAX);
        assert_eq!(names[0], "howdah-20261120T210000Z");
    }

    #[test]
    fn a_backup_of_which_an_image_is_not_to_be_seen_is_kept_and_stands_in_for_none() {
        let mut items =
            vec![taken("2026-11-20T00:00:00Z"), taken("2026-11-21T00:00:00Z"), taken("2026-11-22T00:00:00Z")];
        items[1].state = ItemState::Verified;
        items[0].state = ItemState::Verified;
        items[1].unclear = true;
        let kept: Vec<bool> =
            judged("last=1", &items).iter().map(|(_, verdict)| matches!(verdict, Verdict::Keep(_))).collect();
        assert_eq!(
            kept,
            [true, true, true],
            "the newest, the one in the trash, and the newest verified one that is there"
        );
    }

    fn histories() -> impl Strategy<Value = Vec<Item>> {
        let state = prop::sample::select(vec![
            ItemState::Foreign,
            ItemState::Unfinished,
            ItemState::Taken,
            ItemState::Taken,
            ItemState::Verified,
        ]);
        let one = (0i64..5000, state, 0u8..30);
        proptest::collection::vec(one, 0..240).prop_map(|items| {
            let start = at("2026-06-01T00:00:00Z");
            let mut items: Vec<Item> = items
                .into_iter()
                .map(|(hours, state, flags)| Item {
                    held: flags == 1,
                    has_clones: flags == 2,
                    in_use: flags == 3,
                    unclear: flags == 4,
                    ..item(start + SignedDuration::from_hours(hours), state)
                })
                .collect();
            items.sort_by_key(|item| item.taken_at);
            items.dedup_by_key(|item| item.taken_at);
            items
        })
    }

    fn policies() -> impl Strategy<Value = RetentionPolicy> {
        let parts = prop::sample::subsequence(
            vec![
                "last=3",
                "hourly=5",
                "daily=7",
                "weekly=4",
                "monthly=6",
                "yearly=2",
                "within=5d",
                "within-daily=3w",
                "within-monthly=1y",
            ],
            1..6,
        );
        parts.prop_map(|parts| parts.join(" ").parse().unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn nothing_precious_is_ever_deleted(
            items in histories(),
            policy in policies(),
            now_hours in -100i64..6000,
            zone_name in prop::sample::select(vec!["UTC", "Asia/Tokyo", "America/New_York"]),
        ) {
            let now = at("2026-06-01T00:00:00Z") + SignedDuration::from_hours(now_hours);
            let zone = jiff::tz::TimeZoneDatabase::bundled().get(zone_name).unwrap();
            let plan = plan(now, &zone, Some(&policy), &items);
            prop_assert_eq!(plan.len(), items.len());
            let present = |item: &Item| item.taken_at <= now;
            let good =
                |item: &Item| matches!(item.state, ItemState::Taken | ItemState::Verified) && !item.unclear;
            let newest = |wanted: &dyn Fn(&Item) -> bool| {
                items.iter().filter(|item| present(item) && wanted(item)).max_by_key(|item| item.taken_at)
            };
            for (item, verdict) in &plan {
                let Verdict::Delete(_) = verdict else { continue };
                prop_assert!(item.state != ItemState::Foreign && !item.held && !item.has_clones && !item.in_use && !item.unclear);
                prop_assert!(present(item));
                prop_assert_ne!(Some(item), newest(&|item| item.state == ItemState::Verified));
                prop_assert_ne!(Some(item), newest(&good));
                prop_assert!(items.iter().any(|newer| good(newer) && present(newer) && newer.taken_at > item.taken_at));
            }

            // What was kept stays kept when the rest is gone.
            let left: Vec<Item> = plan
                .into_iter()
                .filter(|(_, verdict)| matches!(verdict, Verdict::Keep(_)))
                .map(|(item, _)| item)
                .collect();
            let again = super::plan(now, &zone, Some(&policy), &left);
            prop_assert!(again.iter().all(|(_, verdict)| matches!(verdict, Verdict::Keep(_))));
        }

        #[test]
        fn a_newer_backup_never_brings_the_deletion_of_all_others_in_one_run(items in histories(), policy in policies()) {
            let plan = plan(at("2027-06-01T00:00:00Z"), &TimeZone::UTC, Some(&policy), &items);
            prop_assert!(deletions(&plan).count() <= DELETIONS_PER_RUN_MAX);
        }
    }

    /// What happens to a database and its backups.
    #[derive(Debug, Clone)]
    enum Step {
        /// Hours go by.
        Pass(i64),
        /// Somebody sets the clock.
        SetClock(i64),
        Take(ItemState),
        /// A drill proves one of them; the number picks it.
        Verify(usize),
        Hold(usize),
        Release(usize),
        Clone(usize),
        Policy(RetentionPolicy),
        /// Pruning, while somebody puts a hold on one of them after the plan was made.
        Prune(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let taken = prop::sample::select(vec![ItemState::Taken, ItemState::Taken, ItemState::Unfinished]);
        let step = prop_oneof![
            6 => (0i64..40).prop_map(Step::Pass),
            1 => (-3000i64..3000).prop_map(Step::SetClock),
            8 => taken.prop_map(Step::Take),
            2 => any::<usize>().prop_map(Step::Verify),
            1 => any::<usize>().prop_map(Step::Hold),
            1 => any::<usize>().prop_map(Step::Release),
            1 => any::<usize>().prop_map(Step::Clone),
            1 => policies().prop_map(Step::Policy),
            6 => any::<usize>().prop_map(Step::Prune),
        ];
        proptest::collection::vec(step, 0..300)
    }

    /// An image, its snapshots in the order in which they were taken, and a clock that anybody may set.
    struct History {
        now: Timestamp,
        taken: u64,
        policy: RetentionPolicy,
        items: Vec<Item>,
    }

    impl History {
        fn pick(&mut self, number: usize) -> Option<&mut Item> {
            let count = self.items.len();
            (count > 0).then(|| &mut self.items[number % count])
        }

        /// The last that Ceph took of those that `wanted` picks.
        fn newest(&self, wanted: impl Fn(&Item) -> bool) -> Option<u64> {
            self.items.iter().filter(|item| wanted(item)).map(|item| item.sequence).max()
        }

        /// Prunes as the scheduler does: the plan first, and before each deletion another look at holds and clones.
        fn prune(&mut self, held_meanwhile: usize) {
            let plan = plan(self.now, &TimeZone::UTC, Some(&self.policy), &self.items);
            let doomed: Vec<u64> = deletions(&plan).map(|(item, _)| item.sequence).collect();
            assert!(doomed.len() <= DELETIONS_PER_RUN_MAX);
            if let Some(item) = self.pick(held_meanwhile) {
                item.held = true;
            }
            self.items.retain(|item| item.held || item.has_clones || !doomed.contains(&item.sequence));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        /// Whatever the clock does, and whoever holds, verifies or clones in between: the newest verified backup is there
        /// after each pruning, and so is the newest good one.
        #[test]
        fn the_newest_verified_backup_survives_everything(steps in steps()) {
            let mut history = History {
                now: at("2026-06-01T00:00:00Z"),
                taken: 0,
                policy: "last=1".parse().unwrap(),
                items: Vec::new(),
            };
            for step in steps {
                match step {
                    Step::Pass(hours) | Step::SetClock(hours) => history.now += SignedDuration::from_hours(hours),
                    Step::Take(state) => {
                        history.taken += 1;
                        // A second snapshot of the same name cannot be taken.
                        if history.items.iter().all(|item| item.taken_at != history.now) {
                            let sequence = history.taken;
                            history.items.push(Item { sequence, ..item(history.now, state) });
                        }
                    }
                    Step::Verify(number) => {
                        if let Some(item) = history.pick(number).filter(|item| item.state == ItemState::Taken) {
                            item.state = ItemState::Verified;
                        }
                    }
                    Step::Hold(number) => drop(history.pick(number).map(|item| item.held = true)),
                    Step::Release(number) => drop(history.pick(number).map(|item| item.held = false)),
                    Step::Clone(number) => drop(history.pick(number).map(|item| item.has_clones = true)),
                    Step::Policy(policy) => history.policy = policy,
                    Step::Prune(held_meanwhile) => {
                        let good = |item: &Item| matches!(item.state, ItemState::Taken | ItemState::Verified);
                        let verified = |item: &Item| item.state == ItemState::Verified;
                        let before = (history.newest(good), history.newest(verified));
                        let held: Vec<u64> =
                            history.items.iter().filter(|item| item.held).map(|item| item.sequence).collect();
                        history.prune(held_meanwhile);
                        prop_assert_eq!((history.newest(good), history.newest(verified)), before);
                        let left = |sequence: &u64| history.items.iter().any(|item| item.sequence == *sequence);
                        prop_assert!(held.iter().all(left), "a held backup was deleted");
                    }
                }
            }
        }
    }
}
