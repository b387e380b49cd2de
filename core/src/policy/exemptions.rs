//! Exemptions from a rule: which one covers it on a day, and which are about to end.
//!
//! An exemption is a date and a reason. It holds through its last day, in UTC whatever the zone of the schedule is, and
//! it says in time that it will end: the day after it, the violation is denied and the annotation itself is refused.

use jiff::civil::Date;
use jiff::{Timestamp, ToSpan as _};
use serde_json::Value;

use super::{Effect, Finding, Outcome, RULES};
use crate::annotations::{Exemption, Settings};
use crate::names;

/// An exemption with no more days left than this warns: two working weeks to cure what it covers, or to decide again.
pub const ENDING_DAYS: i64 = 14;

/// Whether `rule` is exempted on `today`, or why it is not any more.
pub(super) fn covering(rule: &str, settings: &Settings, today: Date) -> Result<Option<String>, String> {
    match settings.exemptions.get(rule) {
        None => Ok(None),
        Some(exemption) if exemption.holds_on(today) => {
            Ok(Some(format!("exempt until {} ({})", exemption.until, exemption.reason)))
        }
        Some(exemption) => Err(format!("the exemption ended on {}", exemption.until)),
    }
}

/// The exemptions that still hold and end within [`ENDING_DAYS`], by the id of their rule.
pub fn ending(settings: &Settings, today: Date) -> impl Iterator<Item = (&str, &Exemption)> {
    let last = today.saturating_add(ENDING_DAYS.days());
    let soon = move |exemption: &Exemption| exemption.holds_on(today) && exemption.until <= last;
    settings.exemptions.iter().filter(move |(_, exemption)| soon(exemption)).map(|(id, e)| (id.as_str(), e))
}

/// How many exemptions of `object` are about to end.
#[must_use]
pub fn count_ending(object: &Value, now: Timestamp) -> usize {
    ending(&super::readable_settings(object).0, super::today(now)).count()
}

/// What to say about the exemptions that are about to end: in every mode, because in every mode the annotation is refused
/// once it has ended. One of a rule that does not exist is refused already.
pub(super) fn warnings(settings: &Settings, today: Date) -> impl Iterator<Item = Outcome> {
    let known = |id: &str| RULES.iter().any(|rule| rule.id == id && rule.exemption().is_some());
    ending(settings, today).filter(move |(id, _)| known(id)).map(|(id, exemption)| Outcome {
        rule: &super::annotations::RULE,
        finding: Finding::new(
            format!("metadata.annotations[{}{id}]", names::EXEMPT_PREFIX),
            format!("about to end on {}", exemption.until),
            "a later date, or the violation cured",
        )
        .fix("cure the violation and remove the annotation, or decide on a later date"),
        effect: Effect::Warn,
        because: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{ClusterFacts, Request, Verdict, WARNING_CHARS_MAX, validate};
    use serde_json::json;

    /// A set with two replicas that is exempt from `rule` until `until`, judged at this instant.
    fn judged(rule: &str, until: &str, mode: &str, now: &str) -> Verdict {
        let object = json!({
            "metadata": {
                "labels": {"howdah.dev/protect": "true"},
                "annotations": {
                    "howdah.dev/mode": mode,
                    // The zone of the schedule has no say in it.
                    "howdah.dev/time-zone": "Pacific/Kiritimati",
                    format!("howdah.dev/exempt.{rule}"): format!("until={until} reason=moving"),
                },
            },
            "spec": {"replicas": 2, "template": {
                "metadata": {"labels": {"howdah.dev/protect": "true"}},
                "spec": {"affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 1, "podAffinityTerm": super::super::anti_affinity::default_term()},
                ]}}},
            }},
        });
        let request = Request::look("shop", "orders", &object);
        validate(&request, &ClusterFacts::default(), now.parse::<Timestamp>().unwrap())
    }

    fn warned(until: &str, now: &str) -> bool {
        let verdict = judged("single-replica", until, "enforce", now);
        assert!(verdict.allowed, "{until} at {now}: {}", verdict.message);
        !verdict.warnings.is_empty()
    }

    #[test]
    fn it_warns_from_fourteen_days_before_its_last_day_on() {
        assert!(!warned("2026-12-07", "2026-11-22T23:59:59Z"), "fifteen days are left");
        assert!(warned("2026-12-07", "2026-11-23T00:00:00Z"), "fourteen days are left");
        assert!(warned("2026-12-07", "2026-12-07T00:00:00Z"), "its last day begins");
        assert!(warned("2026-12-07", "2026-12-07T23:59:59Z"), "its last second");
    }

    #[test]
    fn the_second_after_its_last_day_it_covers_nothing_in_utc() {
        let ended = judged("single-replica", "2026-12-07", "enforce", "2026-12-08T00:00:00Z");
        assert!(!ended.allowed);
        assert!(ended.message.contains("the exemption ended on 2026-12-07"), "{}", ended.message);
        // The same instant, written in a zone where it is still the day before, and in one where it is the day after.
        for now in ["2026-12-07T19:00:00-05:00", "2026-12-08T14:00:00+14:00"] {
            assert!(!judged("single-replica", "2026-12-07", "enforce", now).allowed, "{now}");
        }
        assert!(warned("2026-12-07", "2026-12-08T13:59:59+14:00"), "23:59:59 in UTC");
    }

    #[test]
    fn it_warns_in_every_mode_and_an_ended_one_is_refused_in_every_mode() {
        for mode in ["enforce", "warn", "audit"] {
            let verdict = judged("single-replica", "2026-11-30", mode, "2026-11-22T12:00:00Z");
            assert!(verdict.allowed && verdict.warnings.len() == 1, "{mode}: {verdict:?}");
            let ended = judged("single-replica", "2026-11-21", mode, "2026-11-22T12:00:00Z");
            assert!(!ended.allowed, "{mode}");
        }
    }

    #[test]
    fn the_warning_names_the_annotation_and_the_day_for_every_rule() {
        for rule in RULES.iter().filter(|rule| rule.exemption().is_some()) {
            let verdict = judged(rule.id, "2026-11-30", "warn", "2026-11-22T12:00:00Z");
            let warning = verdict.warnings.iter().find(|warning| warning.contains("about to end")).unwrap();
            let annotation = rule.exemption().unwrap();
            assert!(warning.contains(&annotation) && warning.ends_with("on 2026-11-30"), "{warning}");
            assert!(warning.chars().count() < WARNING_CHARS_MAX, "{warning}");
        }
    }

    #[test]
    fn one_of_no_rule_is_refused_and_not_warned_about() {
        let verdict = judged("gravity", "2026-11-30", "enforce", "2026-11-22T12:00:00Z");
        assert!(!verdict.warnings.iter().any(|warning| warning.contains("about to end")), "{verdict:?}");
        assert!(verdict.causes.iter().any(|cause| cause.field.ends_with("[howdah.dev/exempt.gravity]")));
    }

    #[test]
    fn the_far_end_of_the_calendar_is_no_trap() {
        let settings = Settings {
            exemptions: [("a".to_owned(), Exemption { until: Date::MAX, reason: "x".to_owned() })].into(),
            ..Settings::default()
        };
        assert_eq!(ending(&settings, Date::MAX).count(), 1);
        assert_eq!(ending(&settings, jiff::civil::date(2026, 11, 22)).count(), 0);
    }
}
