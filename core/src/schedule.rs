//! When a backup is due: cron, time zones, daylight saving, missed slots, jitter.
//!
//! A *slot* is one occurrence of the schedule, as an instant. It names everything the backup makes.

use std::fmt;
use std::str::FromStr;

use croner::Cron;
use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// Longest cron expression that is read; a real one is under 40 characters.
const EXPRESSION_MAX: usize = 256;

/// A cron expression that has at least one occurrence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CronExpression {
    text: String,
    cron: Box<Cron>,
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
        let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
        let cron = parser.parse(text).map_err(|error| match error {
            CronError::EmptyPattern => "is empty".to_owned(),
            CronError::InvalidPattern(_) if text.starts_with('@') => "is not a known nickname".to_owned(),
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
        Ok(Self { text: text.to_owned(), cron: Box::new(cron) })
    }
}
