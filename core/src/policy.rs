//! The policy: what a protected StatefulSet has to look like, and what howdah fills in.
//!
//! [`RULES`] is the whole policy in review order. A rule is one file in `policy/`: a doc block, one `const RULE`, one
//! pure function and its tests. [`mutate`] fills in defaults, [`validate`] judges; both read the raw JSON, because a
//! typed round trip drops the fields it does not know. Whatever has to be looked up in the cluster is named by
//! [`claims::needed`] and comes in as [`ClusterFacts`]; the clock comes in as `now`. The webhook is the shell around it.

pub mod annotations;
pub mod anti_affinity;
pub mod claims;
mod defaults;
pub mod grace_period;
pub mod json;
pub mod retention_policy;
pub mod single_replica;
pub mod storage_class;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde_json::Value;

use crate::annotations::{Mode, Settings};
use crate::names;

pub use claims::{Claim, Needed, StorageClass, Volume, needed};

/// Every rule, in review order. Adding a rule is one file and one line here.
pub static RULES: [Rule; 6] = [
    annotations::RULE,
    single_replica::RULE,
    grace_period::RULE,
    storage_class::RULE,
    retention_policy::RULE,
    anti_affinity::RULE,
];

/// Longest warning: kubectl prints each on one line, and the API server cuts all of them at 4096 characters.
pub const WARNING_CHARS_MAX: usize = 120;
/// Most warnings in one answer; with [`WARNING_CHARS_MAX`] they stay below the API server's limit for all of them.
pub const WARNINGS_MAX: usize = 20;
/// Longest value quoted in a message: a denial has to stay readable on a terminal.
const QUOTED_CHARS_MAX: usize = 200;

/// One rule of the policy.
#[derive(Debug)]
pub struct Rule {
    /// Kebab-case name: the same in the denial, the metric, the documentation, the fixtures and the exemption.
    pub id: &'static str,
    /// What the rule is for, one sentence.
    pub intent: &'static str,
    /// The fields it reads.
    pub fields: &'static [&'static str],
    /// How to satisfy it, as an imperative.
    pub fix: &'static str,
    /// Which requests it judges.
    pub targets: &'static [Target],
    /// What a finding of it means for the request.
    pub refusal: Refusal,
    /// Lists every violation in one object.
    pub check: fn(&Subject<'_>) -> Vec<Finding>,
    /// What it fills in on creation, so that most users never meet the rule.
    pub filling: Option<Filling>,
}

/// What a rule fills in where the user left it open.
#[derive(Debug)]
pub struct Filling {
    /// What is filled in, and where.
    pub says: &'static str,
    /// Fills it in; a second time changes nothing.
    pub fill: fn(&mut Value, &ClusterFacts),
}

impl Rule {
    /// The annotation that exempts a StatefulSet from this rule, `None` when nothing does.
    #[must_use]
    pub fn exemption(&self) -> Option<String> {
        match self.refusal {
            Refusal::Policy => Some(format!("{}{}", names::EXEMPT_PREFIX, self.id)),
            Refusal::Invalid => None,
        }
    }
}

/// What kind of object a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A StatefulSet of apps/v1.
    StatefulSet,
    /// Its scale subresource: an autoscaling/v1 Scale, which carries no labels, so that its parent decides.
    Scale,
}

/// What a finding means for the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Against the policy: 403. Follows the mode of the StatefulSet and can be exempted.
    Policy,
    /// Not understandable: 422 in every mode, because howdah would otherwise act on a guess later.
    Invalid,
}

/// What a request does to the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A new object.
    Create,
    /// A change to an existing one; PATCH and server-side apply arrive as this, too.
    Update,
    /// Anything else; no rule judges it yet.
    Other,
}

/// One request as the API server describes it.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// What is done.
    pub operation: Operation,
    /// What it is done to.
    pub target: Target,
    /// Namespace of the object.
    pub namespace: &'a str,
    /// Name of the object; empty when it is generated on creation.
    pub name: &'a str,
    /// The object as it is going to be.
    pub object: Option<&'a Value>,
    /// The object as it is.
    pub old_object: Option<&'a Value>,
}

/// What the operator of howdah has configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The class that claim templates without one get; `None` leaves them alone.
    pub storage_class: Option<String>,
    /// The shortest grace period that passes, in seconds.
    pub minimum_grace_s: i64,
}

impl Default for Config {
    fn default() -> Self {
        Self { storage_class: None, minimum_grace_s: grace_period::MINIMUM_GRACE_S }
    }
}

/// What the cluster knows and the request does not say, looked up before the review.
#[derive(Debug, Clone, Default)]
pub struct ClusterFacts {
    /// Every StorageClass by name.
    pub storage_classes: BTreeMap<String, StorageClass>,
    /// The claims that [`needed`] named and that exist, by name, all in the namespace of the request.
    pub claims: BTreeMap<String, Claim>,
    /// The volumes these claims are bound to or reserved for, by name.
    pub volumes: BTreeMap<String, Volume>,
    /// The StatefulSet behind a Scale; `None` when it is not protected or gone.
    pub parent: Option<Value>,
    /// What the operator has configured.
    pub config: Config,
}

/// What a rule looks at.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The object, old or new.
    pub object: &'a Value,
    /// Its namespace.
    pub namespace: &'a str,
    /// What the cluster knows.
    pub facts: &'a ClusterFacts,
    /// The day of the review (UTC).
    pub today: Date,
}

/// One violation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Path of the field, in the API server's notation.
    pub field: String,
    /// The value found.
    pub found: String,
    /// The value wanted.
    pub wanted: String,
    /// How to fix this one, as an imperative, when the fix of the rule is not precise enough.
    pub fix: Option<String>,
}

impl Finding {
    /// A violation that the fix of its rule cures.
    pub fn new(field: impl Into<String>, found: impl Into<String>, wanted: impl Into<String>) -> Self {
        Self { field: field.into(), found: found.into(), wanted: wanted.into(), fix: None }
    }

    /// The same with a fix of its own.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

/// What became of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effect {
    /// The request is denied.
    Deny,
    /// The request passes with a warning.
    Warn,
    /// The request passes; the API server's audit log has it.
    Audit,
    /// An exemption covers it; the audit log has that.
    Exempt,
}

impl Effect {
    /// The word in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Warn => "warn",
            Self::Audit => "audit",
            Self::Exempt => "exempt",
        }
    }
}

/// A finding, the rule it is of, and what became of it.
#[derive(Debug)]
pub struct Outcome {
    /// The rule.
    pub rule: &'static Rule,
    /// The violation.
    pub finding: Finding,
    /// What became of it.
    pub effect: Effect,
    /// Why it is not denied (or why an exemption does not help), as a clause.
    pub because: Option<String>,
}

/// A field that a denial is about, for the `details.causes` of the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Id of the rule.
    pub rule: &'static str,
    /// Path of the field.
    pub field: String,
    /// What was found and what is wanted.
    pub message: String,
}

/// The answer to one request.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Whether the request passes.
    pub allowed: bool,
    /// HTTP status for the client when it does not: 403 against the policy, 422 for a field that cannot be understood.
    pub code: u16,
    /// The whole explanation, on several lines.
    pub message: String,
    /// One line of at most [`WARNING_CHARS_MAX`] characters each.
    pub warnings: Vec<String>,
    /// What the denial is about.
    pub causes: Vec<Cause>,
    /// What to change; `None` when nothing.
    pub patch: Option<json_patch::Patch>,
    /// For the API server's audit log.
    pub audit_annotations: BTreeMap<String, String>,
    /// Everything that was found.
    pub outcomes: Vec<Outcome>,
    /// The mode the object is judged in; `None` when howdah has no say in it.
    pub mode: Option<Mode>,
}

impl Verdict {
    fn allow() -> Self {
        Self { allowed: true, code: 200, ..Self::default() }
    }
}

/// Whether the label says that `object` is under howdah's care.
#[must_use]
pub fn is_protected(object: &Value) -> bool {
    json::string(object, &["metadata", "labels", names::PROTECT_LABEL]) == Some(names::PROTECT_VALUE)
}

/// Fills in defaults: on creation into whatever is left open, on a change only what the API server would refuse to see
/// removed. Never denies. The patch is stable: applied to its own result it is empty.
#[must_use]
pub fn mutate(request: &Request<'_>, facts: &ClusterFacts, now: Timestamp) -> Verdict {
    let mut verdict = Verdict::allow();
    let (Target::StatefulSet, Some(object)) = (request.target, request.object) else { return verdict };
    if !has_a_say(object) {
        return verdict;
    }
    let settings = readable_settings(object).0;
    verdict.mode = Some(settings.mode);
    let mut edited = object.clone();
    match (request.operation, request.old_object) {
        (Operation::Create, _) => defaults::on_create(&mut edited, &settings, facts, today(now)),
        (Operation::Update, Some(old)) => defaults::on_update(&mut edited, old),
        _ => {}
    }
    let patch = json_patch::diff(object, &edited);
    verdict.patch = (!patch.0.is_empty()).then_some(patch);
    verdict
}

/// Judges a request by every rule and reports everything found.
#[must_use]
pub fn validate(request: &Request<'_>, facts: &ClusterFacts, now: Timestamp) -> Verdict {
    let mut verdict = Verdict::allow();
    let governing = match request.target {
        Target::StatefulSet => request.object,
        Target::Scale => facts.parent.as_ref(),
    };
    let (Some(governing), Some(object)) = (governing, request.object) else { return verdict };
    if request.operation == Operation::Other || !has_a_say(governing) {
        return verdict;
    }
    let settings = readable_settings(governing).0;
    let today = today(now);
    let subject = Subject { object, namespace: request.namespace, facts, today };
    for rule in RULES.iter().filter(|rule| rule.targets.contains(&request.target)) {
        let before = match (request.operation, request.old_object) {
            (Operation::Update, Some(old)) => (rule.check)(&Subject { object: old, ..subject }),
            _ => Vec::new(),
        };
        verdict.outcomes.extend((rule.check)(&subject).into_iter().map(|finding| {
            let (effect, because) = weigh(rule, &settings, before.contains(&finding), today);
            Outcome { rule, finding, effect, because }
        }));
    }
    verdict.mode = Some(settings.mode);
    conclude(&mut verdict, request);
    verdict
}

/// Howdah judges protected objects, except those on their way out: their finalizers must be removable.
fn has_a_say(object: &Value) -> bool {
    is_protected(object) && json::at(object, &["metadata", "deletionTimestamp"]).is_none()
}

fn today(now: Timestamp) -> Date {
    now.to_zoned(TimeZone::UTC).date()
}

/// The settings of `object` from the annotations that can be read, and the errors of the others.
fn readable_settings(object: &Value) -> (Settings, Vec<crate::annotations::AnnotationError>) {
    let mut annotations = json::strings(object, &["metadata", "annotations"]);
    match crate::annotations::parse(&annotations) {
        Ok(settings) => (settings, Vec::new()),
        Err(errors) => {
            annotations.retain(|key, _| !errors.iter().any(|error| error.annotation == *key));
            (crate::annotations::parse(&annotations).unwrap_or_default(), errors)
        }
    }
}

/// Whether `rule` is exempted on `today`, or why it is not any more.
fn exempted(rule: &str, settings: &Settings, today: Date) -> Result<Option<String>, String> {
    match settings.exemptions.get(rule) {
        None => Ok(None),
        Some(exemption) if exemption.holds_on(today) => {
            Ok(Some(format!("exempt until {} ({})", exemption.until, exemption.reason)))
        }
        Some(exemption) => Err(format!("the exemption ended on {}", exemption.until)),
    }
}

/// Decides what becomes of one finding: exemption first, then the ratchet, then the mode.
fn weigh(rule: &Rule, settings: &Settings, was_there: bool, today: Date) -> (Effect, Option<String>) {
    let unchanged = || Some("was there before this change".to_owned());
    if rule.refusal == Refusal::Invalid {
        return if was_there { (Effect::Warn, unchanged()) } else { (Effect::Deny, None) };
    }
    let ended = match exempted(rule.id, settings, today) {
        Ok(Some(exemption)) => return (Effect::Exempt, Some(exemption)),
        Ok(None) => None,
        Err(ended) => Some(ended),
    };
    match settings.mode {
        Mode::Audit => (Effect::Audit, ended),
        Mode::Warn => (Effect::Warn, ended),
        Mode::Enforce if was_there => (Effect::Warn, unchanged()),
        Mode::Enforce => (Effect::Deny, ended),
    }
}

/// Turns the outcomes into message, code, warnings, causes and audit annotations.
fn conclude(verdict: &mut Verdict, request: &Request<'_>) {
    let mut denials = Vec::new();
    let mut audit: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    for outcome in &verdict.outcomes {
        let (rule, finding) = (outcome.rule, &outcome.finding);
        let found = quoted(&finding.found);
        let because = outcome.because.as_deref().map(|clause| format!(" ({clause})")).unwrap_or_default();
        match outcome.effect {
            Effect::Deny => {
                denials.push(explain(outcome));
                let message = format!("{}: found {found}, wanted {}", rule.id, finding.wanted);
                verdict.causes.push(Cause { rule: rule.id, field: finding.field.clone(), message });
            }
            Effect::Warn if verdict.warnings.len() < WARNINGS_MAX => {
                let text = format!("howdah {}: {} is {found}{because}", rule.id, finding.field);
                verdict.warnings.push(shortened(&text, WARNING_CHARS_MAX));
            }
            Effect::Warn | Effect::Audit | Effect::Exempt => {}
        }
        let key = if outcome.effect == Effect::Exempt { "exempt" } else { "violations" };
        audit.entry(key).or_default().push(format!("{}: {} is {found}{because}", rule.id, finding.field));
    }
    verdict.audit_annotations =
        audit.into_iter().map(|(key, lines)| (key.to_owned(), lines.join("; "))).collect();
    if denials.is_empty() {
        return;
    }
    let invalid =
        |outcome: &&Outcome| outcome.effect == Effect::Deny && outcome.rule.refusal == Refusal::Policy;
    verdict.allowed = false;
    // A mixture is a matter of policy: 422 would tell clients that only the syntax is wrong.
    verdict.code = if verdict.outcomes.iter().any(|outcome| invalid(&outcome)) { 403 } else { 422 };
    let name = if request.name.is_empty() { "(generated name)" } else { request.name };
    let count = denials.len();
    let findings = if count == 1 { "finding" } else { "findings" };
    verdict.message = format!("howdah protects StatefulSet {}/{name}: {count} {findings}", request.namespace);
    for denial in denials {
        let _ = write!(verdict.message, "\n{denial}");
    }
}

/// One denial in full: rule, field, found, wanted, fix, exemption.
fn explain(outcome: &Outcome) -> String {
    let (rule, finding) = (outcome.rule, &outcome.finding);
    let ended = outcome.because.as_deref().map(|clause| format!("; {clause}")).unwrap_or_default();
    let exempt = match rule.exemption() {
        Some(annotation) => {
            format!("annotate the StatefulSet with {annotation}=\"until=YYYY-MM-DD reason=...\"")
        }
        None => "not possible, remove the annotation instead".to_owned(),
    };
    format!(
        "[{}] {} is {}, wanted {}{ended}\n    fix: {}\n    exempt: {exempt}",
        rule.id,
        finding.field,
        quoted(&finding.found),
        finding.wanted,
        finding.fix.as_deref().unwrap_or(rule.fix),
    )
}

/// A value for a message: on one line and not too long.
fn quoted(value: &str) -> String {
    let line: String = value.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    shortened(&line, QUOTED_CHARS_MAX)
}

/// At most `limit` characters of `text`, with an ellipsis where it was cut.
fn shortened(text: &str, limit: usize) -> String {
    if text.chars().count() <= limit {
        return text.to_owned();
    }
    text.chars().take(limit.saturating_sub(3)).chain("...".chars()).collect()
}

/// The rules as a Markdown document, for the reference.
#[must_use]
pub fn reference() -> String {
    let mut text = String::from(
        "# Rules\n\n\
         Generated from the table `RULES` in `core/src/policy.rs`. Every rule judges StatefulSets that carry the label\n\
         `howdah.dev/protect=true`, and nothing else. 403 means against the policy: it follows `howdah.dev/mode`\n\
         (`enforce`, `warn`, `audit`) and can be exempted. 422 means not understandable: it is refused in every mode.\n\
         A change is never denied for a violation that was there before and that it does not touch: it warns.\n\n\
         | rule | intent | fields | on | code |\n|---|---|---|---|---|\n",
    );
    for rule in &RULES {
        let fields: Vec<String> = rule.fields.iter().map(|field| format!("`{field}`")).collect();
        let targets: Vec<&str> = rule
            .targets
            .iter()
            .map(|target| match target {
                Target::StatefulSet => "StatefulSet",
                Target::Scale => "statefulsets/scale",
            })
            .collect();
        let code = if rule.refusal == Refusal::Invalid { 422 } else { 403 };
        let _ = writeln!(
            text,
            "| [{id}](#{id}) | {} | {} | {} | {code} |",
            rule.intent,
            fields.join(", "),
            targets.join(", "),
            id = rule.id,
        );
    }
    for rule in &RULES {
        let exempt = match rule.exemption() {
            Some(annotation) => {
                format!("`{annotation}: \"until=YYYY-MM-DD reason=...\"`, both keys required")
            }
            None => "not possible; remove the annotation instead".to_owned(),
        };
        let _ = write!(text, "\n## {}\n\n{}\n\n- Fix: {}.\n", rule.id, rule.intent, rule.fix);
        if let Some(filling) = &rule.filling {
            let _ = writeln!(text, "- Filled in on creation: {}.", filling.says);
        }
        let _ = writeln!(text, "- Exempt: {exempt}.");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn now() -> Timestamp {
        "2026-11-22T12:00:00Z".parse().unwrap()
    }

    /// A protected StatefulSet with this many replicas and this grace period, and these annotations.
    fn set(replicas: i64, grace_s: i64, annotations: &[(&str, &str)]) -> Value {
        let annotations: BTreeMap<&str, &str> = annotations.iter().copied().collect();
        json!({
            "metadata": {"labels": {"howdah.dev/protect": "true"}, "annotations": annotations},
            "spec": {
                "replicas": replicas,
                "template": {
                    "metadata": {"labels": {"app": "pg", "howdah.dev/protect": "true"}},
                    "spec": {
                        "terminationGracePeriodSeconds": grace_s,
                        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                            {"weight": 100, "podAffinityTerm": anti_affinity::default_term()},
                        ]}},
                    },
                },
            },
        })
    }

    fn review(old: Option<&Value>, new: &Value) -> Verdict {
        let operation = if old.is_some() { Operation::Update } else { Operation::Create };
        let request = Request {
            operation,
            target: Target::StatefulSet,
            namespace: "shop",
            name: "orders",
            object: Some(new),
            old_object: old,
        };
        validate(&request, &ClusterFacts::default(), now())
    }

    #[test]
    fn the_table_is_well_formed() {
        for (i, rule) in RULES.iter().enumerate() {
            assert!(rule.id.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{}", rule.id);
            assert!(!rule.fields.is_empty() && !rule.targets.is_empty(), "{}", rule.id);
            assert!(!rule.intent.contains('|') && !rule.fix.ends_with('.'), "{}", rule.id);
            assert!(RULES[..i].iter().all(|earlier| earlier.id != rule.id), "{} stands twice", rule.id);
        }
    }

    #[test]
    fn every_rule_file_is_in_the_table() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/policy");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if !std::fs::read_to_string(&path).unwrap().contains("pub const RULE: Rule") {
                continue;
            }
            let id = path.file_stem().unwrap().to_str().unwrap().replace('_', "-");
            assert!(RULES.iter().any(|rule| rule.id == id), "{id} is not in RULES");
        }
    }

    #[test]
    fn a_denial_names_rule_field_found_wanted_fix_and_exemption() {
        let verdict = review(None, &set(2, 0, &[]));
        assert!(!verdict.allowed);
        assert_eq!(verdict.code, 403);
        insta::assert_snapshot!(verdict.message);
        let fields: Vec<&str> = verdict.causes.iter().map(|cause| cause.field.as_str()).collect();
        assert_eq!(fields, ["spec.replicas", "spec.template.spec.terminationGracePeriodSeconds"]);
    }

    #[test]
    fn an_unprotected_or_leaving_object_is_left_alone() {
        let mut object = set(2, 0, &[("howdah.dev/mode", "nonsense")]);
        object["metadata"]["labels"]["howdah.dev/protect"] = json!("false");
        assert!(review(None, &object).outcomes.is_empty());
        let mut object = set(2, 0, &[]);
        object["metadata"]["deletionTimestamp"] = json!("2026-11-22T00:00:00Z");
        assert!(review(None, &object).outcomes.is_empty());
    }

    #[test]
    fn modes_decide_what_a_finding_does() {
        let warned = review(None, &set(2, 300, &[("howdah.dev/mode", "warn")]));
        assert!(warned.allowed);
        assert_eq!(warned.warnings, ["howdah single-replica: spec.replicas is 2"]);
        let audited = review(None, &set(2, 300, &[("howdah.dev/mode", "audit")]));
        assert!(audited.allowed && audited.warnings.is_empty());
        assert_eq!(audited.audit_annotations["violations"], "single-replica: spec.replicas is 2");
    }

    #[test]
    fn an_exemption_holds_through_its_last_day_and_not_longer() {
        let key = "howdah.dev/exempt.single-replica";
        let exempt = review(None, &set(2, 300, &[(key, "until=2026-11-22 reason=moving")]));
        assert!(exempt.allowed, "{}", exempt.message);
        assert_eq!(
            exempt.audit_annotations["exempt"],
            "single-replica: spec.replicas is 2 (exempt until 2026-11-22 (moving))"
        );
        let ended = review(None, &set(2, 300, &[(key, "until=2026-11-21 reason=moving")]));
        assert!(!ended.allowed);
        assert!(ended.message.contains("the exemption ended on 2026-11-21"), "{}", ended.message);
    }

    #[test]
    fn an_unreadable_annotation_is_denied_in_every_mode_and_spares_the_others() {
        let exempt = ("howdah.dev/exempt.single-replica", "until=2027-01-31 reason=moving");
        let verdict = review(
            None,
            &set(2, 300, &[("howdah.dev/mode", "audit"), ("howdah.dev/suspend", "perhaps"), exempt]),
        );
        assert_eq!((verdict.allowed, verdict.code), (false, 422));
        assert_eq!(verdict.causes.len(), 1, "{}", verdict.message);
        assert_eq!(verdict.causes[0].rule, "annotations");
    }

    #[test]
    fn findings_of_both_kinds_are_a_matter_of_policy() {
        assert_eq!(review(None, &set(2, 300, &[("howdah.dev/suspend", "perhaps")])).code, 403);
    }

    #[test]
    fn a_change_is_not_denied_for_what_was_there_before() {
        let old = set(1, 10, &[]);
        let mut new = old.clone();
        new["spec"]["template"]["metadata"]["annotations"] = json!({"restarted": "now"});
        let verdict = review(Some(&old), &new);
        assert!(verdict.allowed, "{}", verdict.message);
        assert_eq!(verdict.warnings.len(), 1);
        assert!(verdict.warnings[0].contains("was there before"), "{}", verdict.warnings[0]);
        // Touching the violation without curing it is denied, and so is a new one beside it.
        assert!(!review(Some(&old), &set(1, 11, &[])).allowed);
        assert!(!review(Some(&old), &set(2, 10, &[])).allowed);
    }

    #[test]
    fn opting_in_warns_about_the_past_but_refuses_unreadable_annotations() {
        let mut old = set(1, 10, &[("howdah.dev/suspend", "perhaps")]);
        let new = old.clone();
        old["metadata"]["labels"] = json!({});
        let verdict = review(Some(&old), &new);
        assert_eq!((verdict.allowed, verdict.code), (false, 422));
        assert_eq!(verdict.warnings.len(), 1);
    }

    #[test]
    fn warnings_stay_short() {
        let name = "a".repeat(250);
        let mut object = set(1, 300, &[("howdah.dev/mode", "warn")]);
        object["spec"]["template"]["spec"]["containers"] =
            json!([{"name": name, "livenessProbe": {"terminationGracePeriodSeconds": 1}}]);
        let verdict = review(None, &object);
        assert_eq!(verdict.warnings[0].chars().count(), WARNING_CHARS_MAX);
    }

    #[test]
    fn a_scale_is_judged_by_its_parent() {
        let scale = json!({"spec": {"replicas": 3}});
        let request = Request {
            operation: Operation::Update,
            target: Target::Scale,
            namespace: "shop",
            name: "orders",
            object: Some(&scale),
            old_object: Some(&json!({"spec": {"replicas": 1}})),
        };
        let judged = |parent| validate(&request, &ClusterFacts { parent, ..ClusterFacts::default() }, now());
        assert!(judged(None).allowed);
        assert!(!judged(Some(set(1, 300, &[]))).allowed);
        assert!(judged(Some(set(1, 300, &[("howdah.dev/mode", "warn")]))).allowed);
    }

    #[test]
    fn the_reference_lists_every_rule() {
        let text = reference();
        for rule in &RULES {
            assert!(text.contains(&format!("\n## {}\n", rule.id)), "{}", rule.id);
        }
    }
}
