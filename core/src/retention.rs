//! Which backups are kept: restic's keep rules, OR-ed, and the list of what is never deleted.

use std::fmt;
use std::str::FromStr;

use jiff::SignedDuration;

/// Most snapshots of ours one image may carry.
///
/// ceph-csi begins to flatten clones at 250 snapshots of an image and counts ours too (field notes, backup 2.6);
/// krbd ends at 510. Under 200 leaves room for snapshots of others.
pub const SNAPSHOTS_PER_IMAGE_MAX: usize = 190;

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
