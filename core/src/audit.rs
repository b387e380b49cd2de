//! The background audit: what protected StatefulSets violate that are there already.
//!
//! The webhook sees requests. What was there before the label, before howdah, or before an exemption ended, it does not
//! see; so from time to time every protected set is looked at as it stands. This module decides what the one report of a
//! namespace says, whether it has to be written at all, and of which findings an Event is due. Reading and writing is the
//! webhook's work.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::policy::parents::{belongs_to, dependent};
use crate::policy::{self, ClusterFacts, Effect, Outcome, exemptions, json as raw};

/// Findings in one report: more than anybody reads, and at most some 100 KiB in etcd. The report counts the others.
pub const REPORT_FINDINGS_MAX: usize = 100;
/// The same finding is an Event at most this often.
pub const EVENT_EVERY: SignedDuration = SignedDuration::from_hours(24);
/// Events of one round of the audit, over all namespaces; the others are due in the next round.
pub const EVENTS_PER_ROUND_MAX: usize = 50;
/// Findings spelled out in one Event; the report has the others.
const FINDINGS_PER_EVENT_MAX: usize = 3;
/// Longest sentence about one finding.
const MESSAGE_CHARS_MAX: usize = 500;

/// What the audit found in one namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// How many findings there are of each effect, those left out included.
    pub summary: Summary,
    /// The findings, the gravest first; at most 100.
    pub findings: Vec<ReportedFinding>,
    /// How many findings are not listed.
    #[serde(default)]
    pub left_out: u32,
}

/// Findings by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// The webhook would refuse to create such a set.
    pub deny: u32,
    /// It would warn.
    pub warn: u32,
    /// The mode of the set is audit: it is only recorded.
    pub audit: u32,
    /// An exemption covers it.
    pub exempt: u32,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReportedFinding {
    /// What the webhook would do: deny, warn, audit or exempt.
    pub effect: Effect,
    /// The name of the StatefulSet.
    pub stateful_set: String,
    /// The id of the rule.
    pub rule: String,
    /// The path of the field; after kind and name of the object where that is not the StatefulSet.
    pub field: String,
    /// What was found and what is wanted.
    pub message: String,
    /// How to fix it.
    pub fix: String,
    /// When this was last an Event on the StatefulSet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported_at: Option<Timestamp>,
}

impl ReportedFinding {
    /// What makes it the same finding as one of an earlier round.
    fn identity(&self) -> (&str, &str, &str, &str) {
        (&self.stateful_set, &self.rule, &self.field, &self.message)
    }

    fn is_worth_an_event(&self, now: Timestamp) -> bool {
        let speaks = matches!(self.effect, Effect::Deny | Effect::Warn);
        // One that is dated ahead of a clock that was set back must not keep quiet for ever.
        speaks && self.reported_at.is_none_or(|last| now.duration_since(last).abs() >= EVENT_EVERY)
    }
}

/// A protected StatefulSet that was looked at.
#[derive(Debug)]
pub struct Audited {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid, for Events.
    pub uid: String,
    /// What was found.
    pub outcomes: Vec<Outcome>,
    /// How many of its exemptions are about to end.
    pub ending: usize,
}

/// Looks at one protected StatefulSet as it stands, and at what belongs to it among the autoscalers and disruption budgets
/// of its namespace.
#[must_use]
pub fn look(object: &Value, dependents: &[Value], facts: &ClusterFacts, now: Timestamp) -> Audited {
    let text = |field: &str| raw::string(object, &["metadata", field]).unwrap_or_default();
    let (namespace, name) = (text("namespace"), text("name"));
    let verdict = policy::validate(&policy::Request::look(namespace, name, object), facts, now);
    let mut outcomes = verdict.outcomes;
    outcomes
        .extend(dependents.iter().flat_map(|dependent| look_at(dependent, object, namespace, facts, now)));
    Audited {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: text("uid").to_owned(),
        outcomes,
        ending: exemptions::count_ending(object, now),
    }
}

/// Looks at an autoscaler or a disruption budget by `set`; nothing is found where it does not belong to it.
fn look_at(
    object: &Value,
    set: &Value,
    namespace: &str,
    facts: &ClusterFacts,
    now: Timestamp,
) -> Vec<Outcome> {
    let text = |path: &[&str]| raw::string(object, path).unwrap_or_default();
    let (kind, name) = (text(&["kind"]), text(&["metadata", "name"]));
    let Some(target) = dependent(object) else { return Vec::new() };
    let request = policy::Request::look_at(target, namespace, name, object);
    if !belongs_to(&request, set) {
        return Vec::new();
    }
    let facts =
        ClusterFacts { parent: Some(set.clone()), config: facts.config.clone(), ..ClusterFacts::default() };
    let mut outcomes = policy::validate(&request, &facts, now).outcomes;
    for outcome in &mut outcomes {
        outcome.finding.field = format!("{kind}/{name} {}", outcome.finding.field);
    }
    outcomes
}

/// What to do about the report of one namespace, and which Events are due.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// The report.
    pub change: Change,
    /// The Events; they are counted as published once the report says so.
    pub notices: Vec<Notice>,
}

/// What to do about a report.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// It says what is the case, or there is none and nothing to say.
    Keep,
    /// Write this one.
    Write(Report),
    /// There is nothing to say any more.
    Delete,
}

/// An Event that is due.
#[derive(Debug, PartialEq, Eq)]
pub struct Notice {
    /// The StatefulSet.
    pub stateful_set: String,
    /// Its uid.
    pub uid: String,
    /// The rule.
    pub rule: String,
    /// What to say.
    pub note: String,
}

/// Decides about one namespace. `sets` are all protected StatefulSets of it, `before` is its report as it is, and
/// `events_left` is how many Events this round may still have.
#[must_use]
pub fn plan(sets: &[Audited], before: Option<&Report>, now: Timestamp, events_left: &mut usize) -> Plan {
    let mut report = compose(sets, before);
    let notices = notices(sets, &mut report, now, events_left);
    let change = match before {
        None if report.findings.is_empty() => Change::Keep,
        Some(_) if report.findings.is_empty() => Change::Delete,
        Some(before) if *before == report => Change::Keep,
        _ => Change::Write(report),
    };
    Plan { change, notices }
}

/// How many findings there are by rule and effect.
#[must_use]
pub fn tally<'a>(sets: impl IntoIterator<Item = &'a Audited>) -> BTreeMap<(&'static str, Effect), i64> {
    let mut counts = BTreeMap::new();
    for outcome in sets.into_iter().flat_map(|set| &set.outcomes) {
        *counts.entry((outcome.rule.id, outcome.effect)).or_default() += 1;
    }
    counts
}

/// The report, with the times of the Events that an earlier one remembers.
fn compose(sets: &[Audited], before: Option<&Report>) -> Report {
    let mut summary = Summary::default();
    let mut findings: Vec<ReportedFinding> = Vec::new();
    for set in sets {
        for outcome in &set.outcomes {
            match outcome.effect {
                Effect::Deny => summary.deny += 1,
                Effect::Warn => summary.warn += 1,
                Effect::Audit => summary.audit += 1,
                Effect::Exempt => summary.exempt += 1,
                // Facts of a cluster leave no question open.
                Effect::Open => continue,
            }
            findings.push(ReportedFinding {
                effect: outcome.effect,
                stateful_set: set.name.clone(),
                rule: outcome.rule.id.to_owned(),
                field: outcome.finding.field.clone(),
                message: outcome.sentence().chars().take(MESSAGE_CHARS_MAX).collect(),
                fix: outcome.fix().chars().take(MESSAGE_CHARS_MAX).collect(),
                reported_at: None,
            });
        }
    }
    findings.sort();
    let left_out = findings.len().saturating_sub(REPORT_FINDINGS_MAX);
    findings.truncate(REPORT_FINDINGS_MAX);
    for finding in &mut findings {
        let known = before
            .and_then(|before| before.findings.iter().find(|known| known.identity() == finding.identity()));
        finding.reported_at = known.and_then(|known| known.reported_at);
    }
    Report { summary, findings, left_out: u32::try_from(left_out).unwrap_or(u32::MAX) }
}

/// One Event for each StatefulSet and rule with findings that are due; they are marked as reported.
fn notices(sets: &[Audited], report: &mut Report, now: Timestamp, events_left: &mut usize) -> Vec<Notice> {
    // The API server keeps what is written here; parts of a second would only be noise.
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let mut due: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
    for (i, finding) in
        report.findings.iter().enumerate().filter(|(_, finding)| finding.is_worth_an_event(now))
    {
        due.entry((finding.stateful_set.clone(), finding.rule.clone())).or_default().push(i);
    }
    let mut notices = Vec::new();
    for ((stateful_set, rule), findings) in due.into_iter().take(*events_left) {
        let told = findings.iter().take(FINDINGS_PER_EVENT_MAX).map(|i| {
            let finding = &report.findings[*i];
            format!("[{rule}] {}; fix: {}", finding.message, finding.fix)
        });
        let mut note = told.collect::<Vec<_>>().join(". ");
        if let more @ 1.. = findings.len().saturating_sub(FINDINGS_PER_EVENT_MAX) {
            note.push_str(&format!(". And {more} more of this rule"));
        }
        for i in findings {
            report.findings[i].reported_at = Some(now);
        }
        let uid = sets.iter().find(|set| set.name == stateful_set).map(|set| set.uid.clone());
        notices.push(Notice { stateful_set, uid: uid.unwrap_or_default(), rule, note });
    }
    *events_left -= notices.len();
    notices
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Target;
    use serde_json::json;

    fn now() -> Timestamp {
        "2026-11-22T12:00:00.5Z".parse().unwrap()
    }

    /// A set that was there before the label: two replicas, nothing of what howdah fills in.
    fn careless(name: &str, annotations: Value) -> Audited {
        let object = json!({
            "metadata": {
                "namespace": "shop", "name": name, "uid": format!("uid-{name}"),
                "labels": {"howdah.dev/protect": "true"}, "annotations": annotations,
            },
            "spec": {"replicas": 2, "template": {"spec": {"terminationGracePeriodSeconds": 5}}},
        });
        look(&object, &[], &ClusterFacts::default(), now())
    }

    /// How many findings a careless set has: those that deny, and all, advice included.
    fn findings() -> usize {
        let set = careless("any", json!({}));
        set.outcomes.iter().filter(|outcome| outcome.effect == Effect::Deny).count()
    }

    fn all() -> usize {
        careless("any", json!({})).outcomes.len()
    }

    /// How many rules have something to say about it.
    fn rules() -> usize {
        let set = careless("any", json!({}));
        set.outcomes.iter().map(|outcome| outcome.rule.id).collect::<std::collections::BTreeSet<_>>().len()
    }

    fn written(plan: &Plan) -> &Report {
        match &plan.change {
            Change::Write(report) => report,
            other => panic!("nothing is written: {other:?}"),
        }
    }

    fn planned(sets: &[Audited], before: Option<&Report>, now: Timestamp) -> Plan {
        plan(sets, before, now, &mut EVENTS_PER_ROUND_MAX.clone())
    }

    #[test]
    fn what_belongs_to_a_set_is_looked_at_and_named() {
        let set = json!({
            "metadata": {"namespace": "shop", "name": "orders", "uid": "u", "labels": {"howdah.dev/protect": "true"}},
            "spec": {"template": {"metadata": {"labels": {"app": "orders"}}}},
        });
        let autoscaler = |target: &str| {
            json!({
                "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
                "metadata": {"name": format!("scale-{target}")},
                "spec": {"minReplicas": 0, "maxReplicas": 1, "scaleTargetRef": {"kind": "StatefulSet", "name": target}},
            })
        };
        let budget = json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "keep"},
            "spec": {"maxUnavailable": 0, "selector": {"matchLabels": {"app": "orders"}}},
        });
        let looked = |dependents: &[Value]| {
            let outcomes = look(&set, dependents, &ClusterFacts::default(), now()).outcomes;
            let of_dependents =
                outcomes.iter().filter(|outcome| outcome.rule.targets != [Target::StatefulSet]);
            of_dependents.map(Outcome::sentence).collect::<Vec<_>>()
        };
        assert!(looked(&[autoscaler("other")]).is_empty());
        assert_eq!(
            looked(&[autoscaler("orders"), budget]),
            [
                "HorizontalPodAutoscaler/scale-orders spec.minReplicas is 0, wanted 1",
                "PodDisruptionBudget/keep spec.maxUnavailable is 0, wanted maxUnavailable: 1",
            ]
        );
    }

    #[test]
    fn what_was_there_before_is_found_and_told_once() {
        let sets = [careless("orders", json!({}))];
        let first = planned(&sets, None, now());
        let report = written(&first);
        assert_eq!((report.summary.deny as usize, report.left_out), (findings(), 0), "{report:?}");
        let notice = first.notices.iter().find(|notice| notice.rule == "single-replica").unwrap();
        assert_eq!(notice.uid, "uid-orders");
        assert!(
            notice.note.starts_with("[single-replica] spec.replicas is 2, wanted 1 or 0; fix: "),
            "{notice:?}"
        );
        assert_eq!(first.notices.len(), rules());

        // Looked at again, nothing is written and nothing is told, for a day.
        let quiet = planned(&sets, Some(report), now() + SignedDuration::from_hours(23));
        assert_eq!(quiet, Plan { change: Change::Keep, notices: Vec::new() });
        let again = planned(&sets, Some(report), now() + SignedDuration::from_hours(24));
        assert_eq!((again.notices.len(), written(&again).findings.len()), (rules(), all()));
    }

    #[test]
    fn one_more_finding_is_told_without_the_old_ones() {
        let sets = [careless("orders", json!({}))];
        let first = planned(&sets, None, now());
        let sets =
            [careless("orders", json!({})), careless("stock", json!({"howdah.dev/suspend": "perhaps"}))];
        let second = planned(&sets, Some(written(&first)), now() + SignedDuration::from_hours(1));
        assert!(second.notices.iter().all(|notice| notice.stateful_set == "stock"), "{:?}", second.notices);
        assert_eq!(second.notices.len(), rules() + 1);
    }

    #[test]
    fn a_report_ends_with_its_last_finding() {
        let first = planned(&[careless("orders", json!({}))], None, now());
        assert_eq!(planned(&[], Some(written(&first)), now()).change, Change::Delete);
        assert_eq!(planned(&[], None, now()).change, Change::Keep);
    }

    #[test]
    fn modes_and_exemptions_count_as_in_the_webhook() {
        let audited = planned(&[careless("orders", json!({"howdah.dev/mode": "audit"}))], None, now());
        let counted = |count: u32| count as usize;
        assert_eq!(
            (counted(written(&audited).summary.audit), audited.notices.len()),
            (all(), 0),
            "it keeps quiet"
        );
        let warned = planned(&[careless("orders", json!({"howdah.dev/mode": "warn"}))], None, now());
        assert_eq!((counted(written(&warned).summary.warn), warned.notices.len()), (all(), rules()));
        let exempt =
            careless("orders", json!({"howdah.dev/exempt.single-replica": "until=2026-11-30 reason=moving"}));
        assert_eq!(exempt.ending, 1);
        let plan = planned(&[exempt], None, now());
        let Summary { deny, warn, exempt, .. } = written(&plan).summary;
        assert_eq!((counted(deny), exempt), (findings() - 1, 1));
        assert_eq!(counted(warn), all() - findings() + 1, "about to end: it warns");
        let ended =
            careless("orders", json!({"howdah.dev/exempt.single-replica": "until=2026-11-21 reason=moving"}));
        assert_eq!(ended.ending, 0);
        let ended = counted(written(&planned(&[ended], None, now())).summary.deny);
        assert_eq!(ended, findings() + 1, "the set and the annotation");
    }

    #[test]
    fn a_report_is_bounded_and_the_events_of_a_round_are() {
        let sets: Vec<Audited> = (0..200).map(|i| careless(&format!("db-{i:03}"), json!({}))).collect();
        let mut left = EVENTS_PER_ROUND_MAX;
        let first = plan(&sets, None, now(), &mut left);
        let report = written(&first);
        let all = 200 * all();
        assert_eq!(
            (report.findings.len(), report.left_out as usize),
            (REPORT_FINDINGS_MAX, all - REPORT_FINDINGS_MAX)
        );
        assert_eq!(report.summary.deny as usize, 200 * findings());
        assert_eq!((first.notices.len(), left), (EVENTS_PER_ROUND_MAX, 0));
        assert!(serde_json::to_string(report).unwrap().len() < 100 * 1024);
        // What was not told is due in the next round, what was told is not; another namespace gets nothing in between.
        assert!(plan(&sets, None, now(), &mut left).notices.is_empty());
        let mut report = report.clone();
        let mut told = first.notices;
        for minutes in [10, 20] {
            let next = planned(&sets, Some(&report), now() + SignedDuration::from_mins(minutes));
            assert!(next.notices.iter().all(|notice| !told.contains(notice)));
            told.extend(next.notices);
            if let Change::Write(written) = next.change {
                report = written;
            }
        }
        let quiet = planned(&sets, Some(&report), now() + SignedDuration::from_mins(30));
        assert_eq!(
            quiet,
            Plan { change: Change::Keep, notices: Vec::new() },
            "those left out are counted, not told"
        );
    }

    #[test]
    fn a_clock_that_was_set_back_silences_nothing_for_ever() {
        let sets = [careless("orders", json!({}))];
        let ahead = planned(&sets, None, now() + SignedDuration::from_hours(24 * 365));
        assert_eq!(planned(&sets, Some(written(&ahead)), now()).notices.len(), rules());
        let slightly = planned(&sets, None, now() + SignedDuration::from_secs(2));
        assert!(planned(&sets, Some(written(&slightly)), now()).notices.is_empty());
    }

    #[test]
    fn findings_are_counted_by_rule_and_effect() {
        let sets = [careless("a", json!({})), careless("b", json!({"howdah.dev/mode": "warn"}))];
        let counts = tally(&sets);
        assert_eq!(counts[&("single-replica", Effect::Deny)], 1);
        assert_eq!(counts[&("single-replica", Effect::Warn)], 1);
    }
}
