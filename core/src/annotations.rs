//! The annotations of a protected StatefulSet, read into [`Settings`].
//!
//! One parser serves the webhook (at `kubectl apply`), the scheduler and the command line, so none of them can
//! understand an annotation differently.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::names;
use crate::retention::RetentionPolicy;
use crate::schedule::CronExpression;

/// Longest annotation value that is read; the longest useful one, an exemption's reason, is far below.
const VALUE_MAX: usize = 1024;
/// Longest name of a Secret (a DNS subdomain).
const SECRET_NAME_MAX: usize = 253;

/// What the annotations of one StatefulSet say, defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What a policy finding does. Default `enforce`.
    pub mode: Mode,
    /// Exemptions by the id of the rule; whether the rule exists is for the policy to say.
    pub exemptions: BTreeMap<String, Exemption>,
    /// When backups are taken; `None` means only by hand.
    pub schedule: Option<CronExpression>,
    /// The zone of the schedule and of the retention calendar. Default UTC.
    pub time_zone: TimeZone,
    /// Which backups are kept; `None` means nothing is ever pruned.
    pub retention: Option<RetentionPolicy>,
    /// The class of backup wanted.
    pub consistency: WantedConsistency,
    /// When backups are proven by a restore. Default never.
    pub verify: Verify,
    /// What a restore drill asks of the data.
    pub verify_query: VerifyQuery,
    /// Whether scheduled backups are stopped. Default false.
    pub suspend: bool,
    /// Secret with `username` and `password`; `None` means the pod's own POSTGRES_PASSWORD source.
    pub credentials: Option<String>,
    /// What howdah does when the node is lost. Default off.
    pub failover: Failover,
    /// The operation that holds the database, as `restore/NAME` or `failover/NAME`; `None` when none does.
    pub gate: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mode: Mode::Enforce,
            exemptions: BTreeMap::new(),
            schedule: None,
            time_zone: TimeZone::UTC,
            retention: None,
            consistency: WantedConsistency::Default,
            verify: Verify::Never,
            verify_query: VerifyQuery::default(),
            suspend: false,
            credentials: None,
            failover: Failover::Off,
            gate: None,
        }
    }
}

/// What a policy finding does, as in Pod Security Admission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// The request is denied.
    Enforce,
    /// The request passes with a warning.
    Warn,
    /// The request passes; the finding is logged and counted.
    Audit,
}

/// How consistent a backup is; the order is the ladder of the design, best last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// A snapshot of the running database: PostgreSQL starts from it by crash recovery.
    Crash,
    /// A snapshot inside backup mode: a fresh checkpoint and full-page writes, and the label is recorded.
    Online,
    /// A snapshot of the cleanly stopped database.
    Offline,
}

impl Consistency {
    /// The word users write.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Online => "online",
            Self::Offline => "offline",
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Consistency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        one_of(text, &[("online", Self::Online), ("crash", Self::Crash), ("offline", Self::Offline)])
    }
}

/// The class the user wants, and whether they wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedConsistency {
    /// Nothing annotated: online if it can be had, otherwise the best there is, with a condition that says why.
    Default,
    /// Annotated: exactly this class or a failure.
    Explicit(Consistency),
}

impl WantedConsistency {
    /// The class to try first.
    #[must_use]
    pub const fn class(self) -> Consistency {
        match self {
            Self::Default => Consistency::Online,
            Self::Explicit(class) => class,
        }
    }

    /// Whether a lower class may stand in for the wanted one.
    #[must_use]
    pub const fn may_downgrade(self) -> bool {
        matches!(self, Self::Default)
    }
}

/// When a backup is proven by restoring it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verify {
    /// Not at all.
    Never,
    /// Each one.
    Always,
    /// The newest one, at these times.
    At(CronExpression),
}

/// What a restore drill asks of the data, beside its own checks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifyQuery {
    /// The query; `None` asks nothing.
    pub query: Option<String>,
    /// What it has to answer; `None` only records the answer.
    pub expect: Option<String>,
    /// The database it is asked in; `None` is `postgres`.
    pub database: Option<String>,
}

/// What howdah does when a node is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failover {
    /// Fence and move on its own.
    Auto,
    /// Prepare, and wait for a human.
    Manual,
    /// Nothing.
    Off,
}

/// A rule that is not enforced for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exemption {
    /// The last day (UTC) on which the exemption holds.
    pub until: Date,
    /// Why.
    pub reason: String,
}

impl Exemption {
    /// Whether the exemption still holds on `today` (UTC).
    #[must_use]
    pub fn holds_on(&self, today: Date) -> bool {
        today <= self.until
    }
}

/// An annotation that does not parse, with what to write instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnnotationError {
    /// Full key of the annotation.
    pub annotation: String,
    /// The value found.
    pub value: String,
    /// What is wrong, as the end of a sentence that starts with the value.
    pub problem: String,
    /// What to write instead, as an imperative.
    pub fix: String,
}

impl fmt::Display for AnnotationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "annotation {}: {:?} {}; {}", self.annotation, self.value, self.problem, self.fix)
    }
}

impl std::error::Error for AnnotationError {}

/// Reads the annotations of a protected StatefulSet; annotations of others are ignored.
///
/// # Errors
/// Returns every annotation of ours that is unknown or does not parse, in the order of their keys.
pub fn parse(annotations: &BTreeMap<String, String>) -> Result<Settings, Vec<AnnotationError>> {
    let mut settings = Settings::default();
    let mut errors = Vec::new();
    let ours = |key: &str| key.starts_with(names::ANNOTATION_PREFIX) && key != names::WEBHOOK_ANSWERS;
    for (key, value) in annotations.iter().filter(|(key, _)| ours(key)) {
        if let Err((problem, fix)) = apply(&mut settings, key, value) {
            let value = value.chars().take(VALUE_MAX).collect();
            errors.push(AnnotationError { annotation: key.clone(), value, problem, fix });
        }
    }
    if errors.is_empty() { Ok(settings) } else { Err(errors) }
}

/// Reads one annotation into `settings`; the error is (problem, fix).
fn apply(settings: &mut Settings, key: &str, value: &str) -> Result<(), (String, String)> {
    const CRON: &str = "five fields (minute hour day month weekday), six with seconds first, or @hourly, @daily, \
                        @weekly, @monthly, @yearly";
    if value.len() > VALUE_MAX {
        return Err((format!("is longer than {VALUE_MAX} bytes"), "shorten it".to_owned()));
    }
    let text = value.trim();
    let write = |what: &str| format!("write {what}");
    match key {
        names::MODE => {
            let modes = [("enforce", Mode::Enforce), ("warn", Mode::Warn), ("audit", Mode::Audit)];
            settings.mode = one_of(text, &modes).map_err(|p| (p, write("enforce, warn or audit")))?;
        }
        names::SCHEDULE => {
            settings.schedule = Some(text.parse().map_err(|p| (p, write(CRON)))?);
        }
        names::TIME_ZONE => {
            // The bundled database alone decides, so that every replica and every machine agrees.
            settings.time_zone = jiff::tz::TimeZoneDatabase::bundled().get(text).map_err(|_| {
                ("is not a known time zone".to_owned(), write("an IANA name such as UTC or Asia/Tokyo"))
            })?;
        }
        names::RETENTION => {
            let fix =
                "keep rules such as \"last=3 hourly=24 daily=7 weekly=4 monthly=6 yearly=2 within=14d\"";
            settings.retention = Some(text.parse().map_err(|p| (p, write(fix)))?);
        }
        names::CONSISTENCY => {
            let class = text.parse().map_err(|p| (p, write("online, crash or offline")))?;
            settings.consistency = WantedConsistency::Explicit(class);
        }
        names::VERIFY => {
            settings.verify = match text {
                "never" => Verify::Never,
                "always" => Verify::Always,
                cron => Verify::At(
                    cron.parse().map_err(|p| (p, format!("write never, always, or a schedule: {CRON}")))?,
                ),
            };
        }
        names::VERIFY_QUERY | names::VERIFY_EXPECT | names::VERIFY_DATABASE => {
            if text.is_empty() || text.contains('\0') {
                return Err((
                    "is empty, or holds a zero byte".to_owned(),
                    write("some text, or leave it out"),
                ));
            }
            let part = match key {
                names::VERIFY_QUERY => &mut settings.verify_query.query,
                names::VERIFY_EXPECT => &mut settings.verify_query.expect,
                _ => &mut settings.verify_query.database,
            };
            *part = Some(text.to_owned());
        }
        names::SUSPEND => {
            settings.suspend = one_of(text, &[("true", true), ("false", false)])
                .map_err(|p| (p, write("\"true\" or \"false\"")))?;
        }
        names::CREDENTIALS => {
            if !is_dns_subdomain(text) {
                let fix =
                    write("the name of a Secret of the same namespace with the keys username and password");
                return Err(("is not the name of a Secret".to_owned(), fix));
            }
            settings.credentials = Some(text.to_owned());
        }
        names::FAILOVER => {
            let kinds = [("auto", Failover::Auto), ("manual", Failover::Manual), ("off", Failover::Off)];
            settings.failover = one_of(text, &kinds).map_err(|p| (p, write("auto, manual or off")))?;
        }
        names::GATE => {
            let name =
                [names::RESTORE_GATE, names::FAILOVER_GATE].iter().find_map(|kind| text.strip_prefix(kind));
            if !name.is_some_and(is_dns_subdomain) {
                let problem = "names no operation of howdah's".to_owned();
                return Err((problem, "leave it to howdah, which sets and removes it".to_owned()));
            }
            settings.gate = Some(text.to_owned());
        }
        _ => match key.strip_prefix(names::EXEMPT_PREFIX) {
            Some(rule) => {
                let exemption = exemption(rule, text)
                    .map_err(|p| (p, write("\"until=YYYY-MM-DD reason=why\", both of them")))?;
                settings.exemptions.insert(rule.to_owned(), exemption);
            }
            None => {
                let known = names::STATEFUL_SET_ANNOTATIONS.iter().copied().chain([names::EXEMPT_PREFIX]);
                let near = nearest(key, known).unwrap_or(names::SCHEDULE);
                let near = if near == names::EXEMPT_PREFIX { "howdah.dev/exempt.<rule>" } else { near };
                return Err((
                    "stands under a key howdah does not know".to_owned(),
                    format!("use {near} (the nearest known key) or remove the annotation"),
                ));
            }
        },
    }
    Ok(())
}

/// Picks the value of the word `text`.
fn one_of<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    let found = words.iter().find(|(word, _)| *word == text);
    found.map(|(_, value)| *value).ok_or_else(|| "is not one of the known words".to_owned())
}

/// Reads `until=YYYY-MM-DD reason=text`, in either order; the reason may hold spaces.
fn exemption(rule: &str, text: &str) -> Result<Exemption, String> {
    let kebab = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if rule.is_empty() || !rule.chars().all(kebab) {
        return Err(format!("exempts {rule:?}, which is not the id of a rule"));
    }
    let (until, reason) = if let Some(rest) = text.strip_prefix("until=") {
        let (until, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        (Some(until), rest.trim().strip_prefix("reason="))
    } else if let Some(rest) = text.strip_prefix("reason=") {
        match rest.rsplit_once("until=") {
            Some((reason, until)) => (Some(until.trim()), Some(reason)),
            None => (None, Some(rest)),
        }
    } else {
        (None, None)
    };
    let until = until.ok_or("names no until=")?;
    let reason = reason.map(str::trim).filter(|reason| !reason.is_empty()).ok_or("names no reason=")?;
    let until = Date::strptime("%Y-%m-%d", until).map_err(|_| format!("has {until:?} for a date"))?;
    Ok(Exemption { until, reason: reason.to_owned() })
}

/// Whether `name` may be the name of a Kubernetes object.
fn is_dns_subdomain(name: &str) -> bool {
    let label = |label: &str| {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        !label.is_empty() && label.chars().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= SECRET_NAME_MAX && name.split('.').all(label)
}

/// The candidate with the fewest single-letter edits to `word`; `None` without candidates.
#[must_use]
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates.into_iter().min_by_key(|candidate| edit_distance(word, candidate))
}

/// Levenshtein distance, one row at a time; `word` is cut at a length no key of ours reaches.
fn edit_distance(word: &str, candidate: &str) -> usize {
    const WORD_MAX: usize = 128;
    let candidate: Vec<char> = candidate.chars().collect();
    let mut row: Vec<usize> = (0..=candidate.len()).collect();
    for (i, a) in word.chars().take(WORD_MAX).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in candidate.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[candidate.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(key: &str, value: &str) -> Result<Settings, Vec<AnnotationError>> {
        parse(&BTreeMap::from([(key.to_owned(), value.to_owned())]))
    }

    fn refused(key: &str, value: &str) -> AnnotationError {
        let mut errors = one(key, value).unwrap_err();
        assert_eq!(errors.len(), 1, "{key}={value}");
        let error = errors.remove(0);
        assert_eq!((error.annotation.as_str(), error.value.as_str()), (key, value));
        assert!(!error.problem.is_empty() && !error.fix.is_empty());
        error
    }

    #[test]
    fn every_annotation_of_the_design_is_read() {
        let annotations = BTreeMap::from(
            [
                ("howdah.dev/mode", "warn"),
                ("howdah.dev/exempt.grace-period", "until=2027-01-31 reason=legacy image"),
                ("howdah.dev/schedule", "0 3 * * *"),
                ("howdah.dev/time-zone", "Asia/Tokyo"),
                ("howdah.dev/retention", "last=3 daily=7 weekly=4 monthly=6"),
                ("howdah.dev/consistency", "online"),
                ("howdah.dev/verify", "@weekly"),
                ("howdah.dev/suspend", "false"),
                ("howdah.dev/credentials", "pg-backup"),
                ("howdah.dev/failover", "auto"),
                ("example.com/schedule", "whenever"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        );
        let settings = parse(&annotations).unwrap();
        assert_eq!(settings.mode, Mode::Warn);
        let exemption = &settings.exemptions["grace-period"];
        assert_eq!(exemption.reason, "legacy image");
        assert!(exemption.holds_on(jiff::civil::date(2027, 1, 31)));
        assert!(!exemption.holds_on(jiff::civil::date(2027, 2, 1)));
        assert_eq!(settings.schedule.unwrap().as_str(), "0 3 * * *");
        assert_eq!(settings.time_zone.iana_name(), Some("Asia/Tokyo"));
        assert_eq!(settings.retention.unwrap().to_string(), "last=3 daily=7 weekly=4 monthly=6");
        assert_eq!(settings.consistency, WantedConsistency::Explicit(Consistency::Online));
        assert!(matches!(settings.verify, Verify::At(_)));
        assert!(!settings.suspend);
        assert_eq!(settings.credentials.as_deref(), Some("pg-backup"));
        assert_eq!(settings.failover, Failover::Auto);
    }

    #[test]
    fn nothing_annotated_gives_the_defaults() {
        let settings = parse(&BTreeMap::new()).unwrap();
        assert_eq!(settings, Settings::default());
        assert!(settings.consistency.may_downgrade());
        assert_eq!(settings.consistency.class(), Consistency::Online);
    }

    #[test]
    fn schedules_with_seconds_and_nicknames_are_read() {
        let good = [
            "*/5 * * * *",
            "*/20 * * * * *",
            "@daily",
            "@weekly",
            "@hourly",
            "@monthly",
            "@yearly",
            "0 0 29 2 *",
        ];
        for text in good {
            assert!(one(names::SCHEDULE, text).is_ok(), "{text}");
        }
    }

    #[test]
    fn bad_schedules_are_refused_with_the_reason() {
        assert!(refused(names::SCHEDULE, "0 0 30 2 *").problem.contains("never happens"));
        assert!(refused(names::SCHEDULE, "0 3 * *").problem.contains("4 fields"));
        assert!(refused(names::SCHEDULE, "0 3 * * * * 2027").problem.contains("7 fields"));
        assert!(refused(names::SCHEDULE, "@reboot").problem.contains("nickname"));
        assert!(refused(names::SCHEDULE, "").problem.contains("empty"));
        for two in ["0 3 * * *; 0 15 * * *", "0 3 * * *\n0 15 * * *", "0 3 * * * 0 15 * * *"] {
            assert!(refused(names::SCHEDULE, two).problem.contains("more than one schedule"), "{two}");
        }
        refused(names::SCHEDULE, "61 3 * * *");
        refused(names::SCHEDULE, "every day");
    }

    #[test]
    fn bad_values_are_refused() {
        for (key, value) in [
            (names::MODE, "Enforce"),
            (names::TIME_ZONE, "Middle/Earth"),
            (names::TIME_ZONE, ""),
            (names::RETENTION, ""),
            (names::RETENTION, "last=0"),
            (names::RETENTION, "last=3 last=4"),
            (names::RETENTION, "fortnightly=2"),
            (names::RETENTION, "within=1m"),
            (names::RETENTION, "within=99999999999d"),
            (names::RETENTION, "hourly=200"),
            (names::CONSISTENCY, "best"),
            (names::VERIFY, "sometimes"),
            (names::SUSPEND, "yes"),
            (names::CREDENTIALS, "Not_A_Secret"),
            (names::FAILOVER, "on"),
            ("howdah.dev/exempt.grace-period", "until=2027-01-31"),
            ("howdah.dev/exempt.grace-period", "reason=because"),
            ("howdah.dev/exempt.grace-period", "until=2027-02-30 reason=because"),
            ("howdah.dev/exempt.grace-period", "until=2027-01-31 reason="),
            ("howdah.dev/exempt.", "until=2027-01-31 reason=because"),
        ] {
            refused(key, value);
        }
        assert!(refused(names::RETENTION, "fortnightly=2").problem.contains("fortnightly"));
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        assert!(refused("howdah.dev/shedule", "@daily").fix.contains("howdah.dev/schedule"));
        assert!(refused("howdah.dev/timezone", "UTC").fix.contains("howdah.dev/time-zone"));
        assert!(refused("howdah.dev/exempt-autoscaler", "x").fix.contains("howdah.dev/exempt.<rule>"));
    }

    #[test]
    fn all_errors_are_reported_at_once() {
        let annotations = BTreeMap::from([
            (names::MODE.to_owned(), "x".to_owned()),
            (names::SUSPEND.to_owned(), "x".to_owned()),
        ]);
        assert_eq!(parse(&annotations).unwrap_err().len(), 2);
    }

    proptest! {
        #[test]
        fn no_value_makes_the_parser_panic(index in 0usize..10, value in "\\PC{0,60}") {
            let keys = names::STATEFUL_SET_ANNOTATIONS.iter().copied().chain(["howdah.dev/exempt.a"]);
            let key = keys.into_iter().nth(index).unwrap();
            let _ = one(key, &value);
        }

        #[test]
        fn no_cron_like_text_makes_the_parser_panic(value in "[0-9*/,#LW?+@ -]{0,24}") {
            let _ = one(names::SCHEDULE, &value);
        }

        #[test]
        fn no_retention_like_text_makes_the_parser_panic(
            value in "((last|daily|within|within-weekly|yearly)=[0-9hdwy]{0,22} ?){0,4}",
        ) {
            if let Ok(settings) = one(names::RETENTION, &value) {
                let policy = settings.retention.unwrap();
                prop_assert_eq!(policy.to_string().parse::<RetentionPolicy>().unwrap(), policy);
            }
        }
    }
}
