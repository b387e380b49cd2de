//! The policy: what a protected StatefulSet has to look like, what may be done to it, and what howdah fills in.
//!
//! [`RULES`] is the whole policy in review order. A rule is one file in `policy/`: a doc block, one `const RULE`, one
//! pure function and its tests. [`mutate`] fills in defaults, [`validate`] judges; both read the raw JSON, because a
//! typed round trip drops the fields it does not know. Whatever has to be looked up in the cluster (for a StatefulSet
//! [`claims::needed`] names it) comes in as [`ClusterFacts`]; the clock comes in as `now`. The webhook is the shell
//! around it.

pub mod annotations;
mod answer;
pub mod anti_affinity;
pub mod autoscaler;
pub mod claim_delete;
pub mod claims;
mod defaults;
pub mod disruption_budget;
pub mod eviction;
pub mod exclusive_lock;
pub mod exemptions;
pub mod floor;
pub mod force_delete;
pub mod grace_period;
pub mod holding;
pub mod interlock;
pub mod json;
mod layout;
pub mod node_pinning;
pub mod opt_out;
pub mod parents;
mod patch;
mod reference;
pub mod retention_policy;
pub mod selector;
pub mod single_replica;
pub mod storage_class;
#[cfg(test)]
mod testing;
pub mod users;
pub mod volume_layout;

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::annotations::{AnnotationError, Mode, Settings};
use crate::names;

pub use answer::{WARNING_CHARS_MAX, WARNINGS_MAX};
pub use claims::{Claim, Needed, StorageClass, Volume, is_by_hand, needed};
pub use floor::Floor;
pub use holding::HoldingBackup;
pub use layout::data_volume;
pub use reference::reference;
pub use users::User;

/// Every rule, in review order. Adding a rule is one file and one line here.
pub static RULES: [Rule; 16] = [
    annotations::RULE,
    single_replica::RULE,
    autoscaler::RULE,
    grace_period::RULE,
    storage_class::RULE,
    volume_layout::RULE,
    exclusive_lock::RULE,
    retention_policy::RULE,
    anti_affinity::RULE,
    node_pinning::RULE,
    force_delete::RULE,
    eviction::RULE,
    interlock::RULE,
    claim_delete::RULE,
    opt_out::RULE,
    disruption_budget::RULE,
];

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
    /// Lists every violation.
    pub check: Check,
    /// What it fills in on creation, so that most users never meet the rule.
    pub filling: Option<Filling>,
    /// What of it the API server holds while no webhook serves.
    pub floor: Floor,
}

/// What a rule looks at. Both functions list every violation.
#[derive(Debug, Clone, Copy)]
pub enum Check {
    /// An object as it is going to be. The object as it is is judged as well: what stood there before only warns.
    State(fn(&Subject<'_>) -> Vec<Finding>),
    /// The request itself: a deletion, or the step from what is to what is going to be. An object that is only looked
    /// at, by the audit or the command line, is not judged by it.
    Step(fn(&Subject<'_>) -> Vec<Finding>),
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
            Refusal::Policy | Refusal::Advice => Some(format!("{}{}", names::EXEMPT_PREFIX, self.id)),
            Refusal::Invalid | Refusal::Held => None,
        }
    }
}

/// What kind of object a request is about. All but a StatefulSet are judged by the StatefulSet they belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A StatefulSet of apps/v1.
    StatefulSet,
    /// Its scale subresource: an autoscaling/v1 Scale, which carries no labels.
    Scale,
    /// A HorizontalPodAutoscaler of autoscaling/v2.
    HorizontalPodAutoscaler,
    /// A Pod that is deleted.
    Pod,
    /// A Pod that is evicted: a policy/v1 Eviction, which is what `kubectl drain` creates. No deletion follows it.
    Eviction,
    /// A PersistentVolumeClaim that is deleted.
    Claim,
    /// A PodDisruptionBudget of policy/v1.
    DisruptionBudget,
}

impl Target {
    /// The resource as kubectl calls it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::StatefulSet => "statefulsets",
            Self::Scale => "statefulsets/scale",
            Self::HorizontalPodAutoscaler => "horizontalpodautoscalers",
            Self::Pod => "pods",
            Self::Eviction => "pods/eviction",
            Self::Claim => "persistentvolumeclaims",
            Self::DisruptionBudget => "poddisruptionbudgets",
        }
    }
}

/// What a finding means for the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Against the policy: 403, or 429 where a finding is [`Weight::NotNow`]. Follows the mode of the StatefulSet and
    /// can be exempted.
    Policy,
    /// Not understandable: 422 in every mode, because howdah would otherwise act on a guess later.
    Invalid,
    /// An operation holds the database: 403 in every mode, because two writers could come of it.
    Held,
    /// Worth knowing: it warns and never denies.
    Advice,
}

/// What a request does to the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A new object.
    Create,
    /// A change to an existing one; PATCH and server-side apply arrive as this, too.
    Update,
    /// The end of one, also of each that `deletecollection` finds.
    Delete,
    /// Anything else; no rule judges it.
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
    /// Name of the object; empty when it is generated on creation, and in a `deletecollection`.
    pub name: &'a str,
    /// The object as it is going to be.
    pub object: Option<&'a Value>,
    /// The object as it is.
    pub old_object: Option<&'a Value>,
    /// Who asks; `None` when nobody does and an object is only looked at.
    pub user: Option<&'a User>,
    /// The seconds that a deletion grants; `None` where the request leaves it to the object. In the deletion of a single
    /// pod it is what the API server made of the request: 0 for a pod that is finished or was never scheduled, too.
    pub grace_s: Option<i64>,
}

impl<'a> Request<'a> {
    /// A StatefulSet that is looked at as it stands: by the audit, or by the command line in a file.
    #[must_use]
    pub fn look(namespace: &'a str, name: &'a str, object: &'a Value) -> Self {
        Self::look_at(Target::StatefulSet, namespace, name, object)
    }

    /// The same for what belongs to a StatefulSet; see [`parents::dependent`].
    #[must_use]
    pub fn look_at(target: Target, namespace: &'a str, name: &'a str, object: &'a Value) -> Self {
        Self {
            operation: Operation::Create,
            target,
            namespace,
            name,
            object: Some(object),
            old_object: None,
            user: None,
            grace_s: None,
        }
    }
}

/// What the operator of howdah has configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The class that claim templates without one get; `None` leaves them alone.
    pub storage_class: Option<String>,
    /// The shortest grace period that passes, in seconds.
    pub minimum_grace_s: i64,
    /// The namespace howdah runs in: its service accounts may do what holds others up.
    pub namespace: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            storage_class: None,
            minimum_grace_s: grace_period::MINIMUM_GRACE_S,
            namespace: names::NAMESPACE.to_owned(),
        }
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
    /// The StatefulSet that something else belongs to: a scale, a pod, a claim, what an autoscaler or a disruption budget
    /// selects. `None` when it is not protected or gone.
    pub parent: Option<Value>,
    /// The pod that an eviction names.
    pub pod: Option<Value>,
    /// The backups of the StatefulSet that were inside backup mode or taking their snapshot, when last seen.
    pub backups: Vec<HoldingBackup>,
    /// Whether the namespace of the request is being deleted, which takes everything in it along.
    pub namespace_terminating: bool,
    /// Whether the node of the pod is proven to be cut off from the storage. Nothing proves that yet: the failover
    /// controller will, and until then this stays false.
    pub node_fenced: bool,
    /// What the operator has configured.
    pub config: Config,
    /// Whether no cluster stands behind these facts: what is not among them is then unknown, not absent.
    pub offline: bool,
}

/// What a rule looks at.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The object whose state is judged, old or new; for a [`Check::Step`] the new one, or the old where there is no new.
    pub object: &'a Value,
    /// The request.
    pub request: &'a Request<'a>,
    /// What the annotations of the StatefulSet in question say.
    pub settings: &'a Settings,
    /// Those of them that cannot be read.
    pub unreadable: &'a [AnnotationError],
    /// What the cluster knows.
    pub facts: &'a ClusterFacts,
    /// When the review takes place.
    pub now: Timestamp,
}

impl Subject<'_> {
    /// The day of the review (UTC).
    #[must_use]
    pub fn today(&self) -> Date {
        today(self.now)
    }
}

/// How much a single finding weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Weight {
    /// As the rule says.
    Full,
    /// It denies now and would not later: 429, so that whoever asks tries again after so many seconds.
    NotNow {
        /// When it is worth another try.
        retry_after_s: u32,
    },
    /// It warns at most.
    Warning,
    /// It is a question that only the cluster can answer, because the facts are [`ClusterFacts::offline`].
    Open,
}

/// One violation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Finding {
    /// Path of the field, in the API server's notation.
    pub field: String,
    /// The value found.
    pub found: String,
    /// The value wanted.
    pub wanted: String,
    /// How to fix this one, as an imperative, when the fix of the rule is not precise enough.
    pub fix: Option<String>,
    /// How much it weighs.
    pub weight: Weight,
}

impl Finding {
    /// A violation that the fix of its rule cures.
    pub fn new(field: impl Into<String>, found: impl Into<String>, wanted: impl Into<String>) -> Self {
        let (field, found, wanted) = (field.into(), found.into(), wanted.into());
        Self { field, found, wanted, fix: None, weight: Weight::Full }
    }

    /// The same with a fix of its own.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// The same, but it warns at most.
    #[must_use]
    pub fn warning(mut self) -> Self {
        self.weight = Weight::Warning;
        self
    }

    /// The same, but it passes later.
    #[must_use]
    pub fn not_now(mut self, retry_after_s: u32) -> Self {
        self.weight = Weight::NotNow { retry_after_s };
        self
    }
}

/// What became of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// The request is denied.
    Deny,
    /// The request passes with a warning.
    Warn,
    /// The request passes; the API server's audit log has it.
    Audit,
    /// An exemption covers it; the audit log has that.
    Exempt,
    /// Only the cluster can tell, and none was asked.
    Open,
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
            Self::Open => "open",
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

impl Outcome {
    /// What was found and what is wanted, on one line: `spec.replicas is 3, wanted 1 or 0`.
    #[must_use]
    pub fn sentence(&self) -> String {
        let Finding { field, found, wanted, .. } = &self.finding;
        let because = self.because.as_deref().map(|clause| format!("; {clause}")).unwrap_or_default();
        format!("{field} is {}, wanted {wanted}{because}", answer::quoted(found))
    }

    /// How to fix it, as an imperative.
    #[must_use]
    pub fn fix(&self) -> &str {
        self.finding.fix.as_deref().unwrap_or(self.rule.fix)
    }

    /// How to be exempted from it, or that nothing exempts.
    #[must_use]
    pub fn exempt(&self) -> String {
        match self.rule.exemption() {
            Some(annotation) => {
                format!("annotate the StatefulSet with {annotation}=\"until=YYYY-MM-DD reason=...\"")
            }
            None if self.rule.refusal == Refusal::Held => {
                format!("not possible; in an emergency the group {} may", names::BREAK_GLASS_GROUP)
            }
            None => "not possible, remove the annotation instead".to_owned(),
        }
    }
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
    /// HTTP status for the client when it does not: 403 against the policy, 422 for a field that cannot be understood,
    /// 429 for what will pass later.
    pub code: u16,
    /// Seconds after which a request that was answered 429 is worth another try.
    pub retry_after_s: Option<u32>,
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
    // An operator compares what it made with what is there: it would undo the defaults, and restart the database.
    if !has_a_say(object) || made_by(object).is_some() {
        return verdict;
    }
    let annotations = Annotations::without_schedules(object);
    verdict.mode = Some(annotations.settings.mode);
    let mut edited = patch::copy(object);
    match (request.operation, request.old_object) {
        (Operation::Create, _) => {
            defaults::on_create(&mut edited, &annotations.settings, facts, today(now));
        }
        (Operation::Update, Some(old)) => defaults::on_update(&mut edited, old),
        _ => {}
    }
    // A mark for the API server alone: who only looks at an object is to see its defaults.
    let asked = Request { object: Some(&edited), ..*request };
    if request.user.is_some() && is_floored(&asked, annotations, facts, now) {
        floor::mark(&mut edited);
    }
    let patch = patch::to_fill_in(object, &edited);
    verdict.patch = (!patch.0.is_empty()).then_some(patch);
    verdict
}

/// Judges a request by every rule and reports everything found.
#[must_use]
pub fn validate(request: &Request<'_>, facts: &ClusterFacts, now: Timestamp) -> Verdict {
    let mut verdict = Verdict::allow();
    let Some(governing) = governing(request, facts) else { return verdict };
    if let Some(user) = request.user.filter(|user| user.breaks_the_glass()) {
        verdict.audit_annotations.insert("break-glass".to_owned(), user.name.clone());
        return verdict;
    }
    let hearing = Hearing::new(request, governing, Annotations::of(governing), facts, now);
    let rules = RULES.iter().filter(|rule| rule.targets.contains(&request.target));
    verdict.outcomes.extend(rules.flat_map(|rule| hearing.outcomes(rule)));
    if request.target == Target::StatefulSet && request.object.is_some_and(is_protected) {
        verdict.outcomes.extend(exemptions::warnings(&hearing.annotations.settings, today(now)));
    }
    verdict.mode = Some(hearing.annotations.settings.mode);
    answer::conclude(&mut verdict, governing, request);
    verdict
}

/// Whether the floor would refuse this change to a StatefulSet, whose annotations say this: what [`validate`] finds of it,
/// up to the first denial.
fn is_floored(request: &Request<'_>, annotations: Annotations, facts: &ClusterFacts, now: Timestamp) -> bool {
    if request.user.is_some_and(User::breaks_the_glass) {
        return false;
    }
    let Some(governing) = governing(request, facts) else { return false };
    let hearing = Hearing::new(request, governing, annotations, facts, now);
    let rules = RULES.iter().filter(|rule| rule.floor.has_twin(request.target));
    rules.flat_map(|rule| hearing.outcomes(rule)).any(|outcome| floor::refuses(&outcome))
}

/// What howdah's annotations on an object say. They are read once for all rules: a schedule alone takes as long as many of
/// the rules together.
struct Annotations {
    /// What those say that can be read.
    settings: Settings,
    /// The others.
    unreadable: Vec<AnnotationError>,
}

impl Annotations {
    fn of(object: &Value) -> Self {
        let (settings, unreadable) = readable_settings(object);
        Self { settings, unreadable }
    }

    /// Without those that take long to read, and on which no default and nothing that the floor holds depends.
    fn without_schedules(object: &Value) -> Self {
        const LONG: [&str; 4] = [names::SCHEDULE, names::VERIFY, names::TIME_ZONE, names::RETENTION];
        let (settings, unreadable) = read_settings(object, |key| !LONG.contains(&key));
        Self { settings, unreadable }
    }
}

/// One request before the rules: what they look at, and what their findings are weighed by.
struct Hearing<'a> {
    request: &'a Request<'a>,
    facts: &'a ClusterFacts,
    now: Timestamp,
    /// The new object, or the old where there is no new.
    object: &'a Value,
    /// Those of the governing object.
    annotations: Annotations,
    /// The object as it is, where its state is judged, and its own annotations where it has any: they are a part of the
    /// state, and what they ask for now may be what makes a violation of it.
    before: Option<(&'a Value, Option<Annotations>)>,
    made_by: Option<String>,
}

impl<'a> Hearing<'a> {
    fn new(
        request: &'a Request<'a>,
        governing: &'a Value,
        annotations: Annotations,
        facts: &'a ClusterFacts,
        now: Timestamp,
    ) -> Self {
        let old = request.old_object.filter(|_| request.operation == Operation::Update);
        let is_set = request.target == Target::StatefulSet;
        let before = old.map(|old| (old, is_set.then(|| Annotations::of(old))));
        let object = request.object.or(request.old_object).unwrap_or(governing);
        Self { request, facts, now, object, annotations, before, made_by: made_by(governing) }
    }

    fn subject<'b>(&'b self, object: &'b Value, annotations: &'b Annotations) -> Subject<'b> {
        let Annotations { settings, unreadable } = annotations;
        Subject { object, request: self.request, settings, unreadable, facts: self.facts, now: self.now }
    }

    /// Everything that `rule` finds, and what becomes of it.
    fn outcomes(&self, rule: &'static Rule) -> impl Iterator<Item = Outcome> {
        let (found, before) = match rule.check {
            Check::State(check) => match self.state() {
                None => (Vec::new(), HashSet::new()),
                Some(object) => {
                    let found = check(&self.subject(object, &self.annotations));
                    // Without a finding there is nothing that could have been there before.
                    let before = self.before.as_ref().filter(|_| !found.is_empty());
                    let before = before.map(|(old, annotations)| {
                        check(&self.subject(old, annotations.as_ref().unwrap_or(&self.annotations)))
                    });
                    (found, before.unwrap_or_default().into_iter().collect())
                }
            },
            Check::Step(check) if self.request.user.is_some() => {
                (check(&self.subject(self.object, &self.annotations)), HashSet::new())
            }
            Check::Step(_) => (Vec::new(), HashSet::new()),
        };
        let context = Context {
            settings: &self.annotations.settings,
            made_by: self.made_by.as_deref(),
            today: today(self.now),
        };
        found.into_iter().map(move |finding| {
            let (effect, because) = context.weigh(rule, &finding, before.contains(&finding));
            Outcome { rule, finding, effect, because }
        })
    }

    /// The object whose state is judged. One that ends, or whose label goes, has no state that would be worth judging.
    fn state(&self) -> Option<&'a Value> {
        let object = self.request.object.filter(|_| self.request.operation != Operation::Delete)?;
        (self.request.target != Target::StatefulSet || is_protected(object)).then_some(object)
    }
}

/// The object whose label and annotations decide about the request; `None` when howdah has no say in it.
fn governing<'a>(request: &Request<'a>, facts: &'a ClusterFacts) -> Option<&'a Value> {
    if request.operation == Operation::Other {
        return None;
    }
    let is_leaving = |object: &Value| json::at(object, &["metadata", "deletionTimestamp"]).is_some();
    let parent = facts.parent.as_ref().filter(|parent| is_protected(parent));
    match request.target {
        Target::StatefulSet => {
            // Without the label from now on, it is judged by what it was: that is how taking the label off is seen.
            let objects = [request.object, request.old_object];
            // On its way out, its finalizers must be removable.
            if objects.iter().flatten().any(|object| is_leaving(object)) {
                return None;
            }
            objects.into_iter().flatten().find(|object| is_protected(object))
        }
        // A pod that already ends can still be torn away from a kubelet that waits for it, and the set may be made anew.
        Target::Pod => parent.or_else(|| {
            request.old_object.filter(|pod| {
                is_protected(pod) && json::list(pod, &["metadata", "ownerReferences"]).is_empty()
            })
        }),
        Target::Scale
        | Target::HorizontalPodAutoscaler
        | Target::Eviction
        | Target::Claim
        | Target::DisruptionBudget => {
            let own = request.object.or(request.old_object)?;
            parent.filter(|parent| !is_leaving(parent) && !is_leaving(own))
        }
    }
}

/// Howdah fills in protected objects, except those on their way out.
fn has_a_say(object: &Value) -> bool {
    is_protected(object) && json::at(object, &["metadata", "deletionTimestamp"]).is_none()
}

/// Kind and name of what made `object` and keeps it as it wants it, such as a PostgreSQL operator's custom resource.
#[must_use]
pub fn made_by(object: &Value) -> Option<String> {
    let owners = json::list(object, &["metadata", "ownerReferences"]);
    let owner = owners.iter().find(|owner| json::at(owner, &["controller"]) == Some(&Value::Bool(true)))?;
    let text = |key: &str| json::string(owner, &[key]).unwrap_or("?");
    Some(format!("{}/{}", text("kind"), text("name")))
}

fn today(now: Timestamp) -> Date {
    now.to_zoned(TimeZone::UTC).date()
}

/// The settings of `object` from the annotations that can be read, and the errors of the others.
fn readable_settings(object: &Value) -> (Settings, Vec<AnnotationError>) {
    read_settings(object, |_| true)
}

/// The same from the annotations with these keys alone.
fn read_settings(object: &Value, wanted: impl Fn(&str) -> bool) -> (Settings, Vec<AnnotationError>) {
    let entries = json::at(object, &["metadata", "annotations"]).and_then(Value::as_object);
    // Those of others may be long, and are many.
    let ours = entries.into_iter().flatten();
    let ours = ours.filter(|(key, _)| key.starts_with(names::ANNOTATION_PREFIX) && wanted(key));
    let mut annotations: BTreeMap<String, String> =
        ours.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect();
    match crate::annotations::parse(&annotations) {
        Ok(settings) => (settings, Vec::new()),
        Err(errors) => {
            annotations.retain(|key, _| !errors.iter().any(|error| error.annotation == *key));
            (crate::annotations::parse(&annotations).unwrap_or_default(), errors)
        }
    }
}

/// What findings are weighed by.
struct Context<'a> {
    settings: &'a Settings,
    made_by: Option<&'a str>,
    today: Date,
}

impl Context<'_> {
    /// Decides what becomes of one finding: exemption first, then the ratchet, then the mode.
    fn weigh(&self, rule: &Rule, finding: &Finding, was_there: bool) -> (Effect, Option<String>) {
        let unchanged = || Some("was there before this change".to_owned());
        match rule.refusal {
            Refusal::Invalid if was_there => return (Effect::Warn, unchanged()),
            Refusal::Invalid | Refusal::Held => return (Effect::Deny, None),
            Refusal::Policy | Refusal::Advice => {}
        }
        let ended = match exemptions::covering(rule.id, self.settings, self.today) {
            Ok(Some(exemption)) => return (Effect::Exempt, Some(exemption)),
            Ok(None) => None,
            Err(ended) => Some(ended),
        };
        if finding.weight == Weight::Open {
            return (Effect::Open, None);
        }
        let warns = rule.refusal == Refusal::Advice || finding.weight == Weight::Warning;
        // Whoever wrote the StatefulSet would write it again: to refuse that would only break the operator.
        let operator = self.made_by.filter(|_| matches!(rule.check, Check::State(_)));
        match self.settings.mode {
            Mode::Audit => (Effect::Audit, ended),
            Mode::Warn => (Effect::Warn, ended),
            Mode::Enforce if was_there => (Effect::Warn, unchanged()),
            Mode::Enforce if warns => (Effect::Warn, ended),
            Mode::Enforce => match operator {
                Some(operator) => (Effect::Warn, Some(format!("only warned of: {operator} made the set"))),
                None => (Effect::Deny, ended),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{now, somebody};
    use super::*;
    use serde_json::json;

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
            user: Some(&somebody()),
            grace_s: None,
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
    fn what_the_floor_would_refuse_is_marked_so_that_the_webhook_explains_it() {
        let mutated = |object: &Value| {
            let request = Request {
                operation: Operation::Create,
                target: Target::StatefulSet,
                namespace: "shop",
                name: "orders",
                object: Some(object),
                old_object: None,
                user: Some(&somebody()),
                grace_s: None,
            };
            let mut mutated = object.clone();
            if let Some(patch) = mutate(&request, &ClusterFacts::default(), now()).patch {
                json_patch::patch(&mut mutated, &patch).unwrap();
            }
            mutated
        };
        let marked = |object: &Value| {
            let mutated = mutated(object);
            let mark = json::string(&mutated, &["metadata", "annotations", names::WEBHOOK_ANSWERS]);
            let judged = review(None, &mutated);
            assert_eq!(mark.is_some(), judged.outcomes.iter().any(floor::refuses));
            assert!(mark.is_none() || !judged.allowed, "a marked object is never stored");
            mark.is_some()
        };
        assert!(marked(&set(2, 300, &[])));
        assert!(marked(&set(1, 0, &[])));
        assert!(marked(&set(1, 300, &[("howdah.dev/mode", "strict")])));
        assert!(!marked(&set(1, 300, &[])));
        assert!(!marked(&set(1, 10, &[])), "the minimum is the webhook's, the floor does not know it");
        assert!(!marked(&set(2, 300, &[("howdah.dev/mode", "warn")])));
        assert!(
            !marked(&set(1, 300, &[("howdah.dev/schedule", "every day")])),
            "the floor reads no schedule"
        );
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
            user: Some(&somebody()),
            grace_s: None,
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
