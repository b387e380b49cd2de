//! When a drill is due.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::annotations::Verify;

/// What is known of the backups of one database.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// What the StatefulSet asks for.
    pub verify: &'a Verify,
    /// The zone of a cron.
    pub zone: &'a TimeZone,
    /// When the newest good backup ended; none when there is none.
    pub newest: Option<Timestamp>,
    /// Whether a drill of that one was begun, however it ended.
    pub newest_tried: bool,
    /// When the last drill of any backup of the database began.
    pub last: Option<Timestamp>,
    /// When the oldest good backup ended: slots before that are not made up for.
    pub oldest: Option<Timestamp>,
}

/// Whether the newest good backup of a database is to be tried now. However many slots were missed, one drill makes up for
/// them.
#[must_use]
pub fn due(now: Timestamp, known: &Known<'_>) -> bool {
    if known.newest.is_none() || known.newest_tried {
        return false;
    }
    match known.verify {
        Verify::Never => false,
        Verify::Always => true,
        Verify::At(cron) => {
            let since = known.last.or(known.oldest);
            let slot = cron.latest(now, known.zone);
            slot.zip(since).is_some_and(|(slot, since)| slot > since)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Option<Timestamp> {
        Some(text.parse().unwrap())
    }

    fn is_due(now: &str, verify: &Verify, newest: &str, tried: bool, last: Option<Timestamp>) -> bool {
        let known = Known {
            verify,
            zone: &TimeZone::UTC,
            newest: at(newest),
            newest_tried: tried,
            last,
            oldest: at("2026-11-20T03:00:00Z"),
        };
        due(now.parse().unwrap(), &known)
    }

    #[test]
    fn always_tries_each_backup_once() {
        let (now, newest) = ("2026-11-22T04:00:00Z", "2026-11-22T03:00:00Z");
        assert!(is_due(now, &Verify::Always, newest, false, at("2026-11-22T02:00:00Z")));
        assert!(!is_due(now, &Verify::Always, newest, true, None));
        assert!(!is_due(now, &Verify::Never, newest, false, None));
    }

    #[test]
    fn a_slot_tries_the_newest_once_and_late_ones_are_made_up_for() {
        // Sundays at 04:00; 2026-11-22 is one.
        let weekly = Verify::At("0 4 * * 0".parse().unwrap());
        let tried = |now, newest, tried, last| is_due(now, &weekly, newest, tried, last);
        assert!(
            !tried("2026-11-21T05:00:00Z", "2026-11-21T03:00:00Z", false, None),
            "the first slot is to come"
        );
        assert!(tried("2026-11-22T04:00:00Z", "2026-11-22T03:00:00Z", false, None));
        assert!(!tried("2026-11-22T04:10:00Z", "2026-11-22T03:00:00Z", false, at("2026-11-22T04:00:05Z")));
        assert!(tried("2026-11-24T12:00:00Z", "2026-11-24T03:00:00Z", false, at("2026-11-15T04:00:05Z")));
    }

    #[test]
    fn without_a_good_backup_nothing_is_tried() {
        let known = Known {
            verify: &Verify::Always,
            zone: &TimeZone::UTC,
            newest: None,
            newest_tried: false,
            last: None,
            oldest: None,
        };
        assert!(!due("2026-11-22T04:00:00Z".parse().unwrap(), &known));
    }
}
