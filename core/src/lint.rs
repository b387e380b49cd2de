//! The policy on manifests, without a request: `kubectl howdah lint`.
//!
//! A manifest is judged as its creation would be: the defaults that the webhook sets are filled in first, and what is
//! left is what the webhook would say. Facts come from the manifests that are linted together; what is not among them is
//! unknown and stays open, it is never a denial. Reading files and writing reports is the command line's work.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::names;
use crate::policy::parents::{belongs_to, dependent};
use crate::policy::{
    self, Claim, ClusterFacts, Config, Effect, Outcome, Request, StorageClass, Target, Volume, json as raw,
};

/// The group of OpenShift's Templates.
const TEMPLATES: &str = "template.openshift.io";

/// A manifest, and where in its document it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Path of the item in the document, such as `items[2]`; empty for the document itself.
    pub path: String,
    /// The object.
    pub object: Value,
}

/// Something that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Path of the field in the document; empty for the document itself.
    pub field: String,
    /// What is wrong and what is wanted.
    pub problem: String,
}

/// The objects of a document: the items of a List, one by one, or the document itself. An empty document has none.
///
/// # Errors
/// If an object names a kind and no version of the API or the other way round, or an item is no object; and if a protected
/// set is in an OpenShift Template, of which nobody but OpenShift makes objects.
pub fn manifests(document: Value) -> Result<Vec<Manifest>, Unreadable> {
    let mut found = Vec::new();
    unfold(document, String::new(), &mut found)?;
    Ok(found)
}

fn unfold(object: Value, path: String, found: &mut Vec<Manifest>) -> Result<(), Unreadable> {
    if object.is_null() {
        return Ok(());
    }
    let kind = text_of(&object, "kind", &path)?;
    let version = text_of(&object, "apiVersion", &path)?;
    match (&kind, &version) {
        (Some(_), None) => return Err(absent("apiVersion", &path)),
        (None, Some(_)) => return Err(absent("kind", &path)),
        _ => {}
    }
    if kind.as_deref() == Some("Template") && group(&object) == Some(TEMPLATES) {
        template(&object, &path)?;
    }
    let Some(item_kind) = kind.as_deref().and_then(|kind| kind.strip_suffix("List")) else {
        found.push(Manifest { path, object });
        return Ok(());
    };
    let Value::Object(mut list) = object else { return Ok(()) };
    let items = match list.remove("items") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(Unreadable { field: join(&path, "items"), problem: wanted_a("list") }),
    };
    for (i, mut item) in items.into_iter().enumerate() {
        let path = join(&path, &format!("items[{i}]"));
        let Some(fields) = item.as_object_mut() else {
            return Err(Unreadable { field: path, problem: wanted_a("object") });
        };
        // The items of a list of one kind need not repeat it.
        if let (false, Some(version)) = (item_kind.is_empty(), &version) {
            fields.entry("apiVersion").or_insert(json!(version));
            fields.entry("kind").or_insert(json!(item_kind));
        }
        unfold(item, path, found)?;
    }
    Ok(())
}

/// Looks for what is to be protected in an OpenShift Template. Its parameters stand in the place of numbers and names until
/// `oc` fills them in, so nothing in it can be judged.
fn template(object: &Value, path: &str) -> Result<(), Unreadable> {
    let objects = raw::at(object, &["objects"]).and_then(Value::as_array);
    let protected = |object: &Value| matches!(sort(object), Sort::Protected | Sort::Mislabelled);
    match objects.into_iter().flatten().position(protected) {
        None => Ok(()),
        Some(i) => Err(Unreadable {
            field: join(path, &format!("objects[{i}]")),
            problem: "it is in an OpenShift Template, whose parameters are not filled in: lint what \
                `oc process --local -f FILE` prints"
                .to_owned(),
        }),
    }
}

/// The group of an object's API.
fn group(object: &Value) -> Option<&str> {
    raw::string(object, &["apiVersion"]).and_then(|version| version.split('/').next())
}

fn text_of(object: &Value, field: &str, path: &str) -> Result<Option<String>, Unreadable> {
    match raw::at(object, &[field]) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(Unreadable { field: join(path, field), problem: wanted_a("string") }),
    }
}

fn absent(field: &str, path: &str) -> Unreadable {
    Unreadable {
        field: join(path, field),
        problem: "it is absent; every Kubernetes object has it".to_owned(),
    }
}

fn wanted_a(what: &str) -> String {
    format!("wanted a {what}").replace("a object", "an object")
}

/// A field below a path.
#[must_use]
pub fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// What kind of object a manifest is, as far as howdah cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    /// A StatefulSet that carries the label: it is judged.
    Protected,
    /// A StatefulSet whose label is there and means nothing: neither `true` nor `false`.
    Mislabelled,
    /// Something that is judged where it belongs to a protected StatefulSet.
    Dependent(Target),
    /// Something else.
    Other,
}

/// Sorts one manifest.
#[must_use]
pub fn sort(object: &Value) -> Sort {
    if let Some(target) = dependent(object) {
        return Sort::Dependent(target);
    }
    if raw::string(object, &["kind"]) != Some("StatefulSet") || group(object) != Some("apps") {
        return Sort::Other;
    }
    match raw::at(object, &["metadata", "labels", names::PROTECT_LABEL]) {
        Some(Value::String(value)) if value == names::PROTECT_VALUE => Sort::Protected,
        None => Sort::Other,
        Some(Value::String(value)) if value == "false" => Sort::Other,
        Some(_) => Sort::Mislabelled,
    }
}

/// What is known of the cluster.
#[derive(Debug, Clone, Default)]
pub struct Known {
    storage_classes: BTreeMap<String, StorageClass>,
    volumes: BTreeMap<String, Volume>,
    /// By namespace and name.
    claims: BTreeMap<(String, String), Claim>,
    /// The protected StatefulSets, by namespace and name.
    sets: BTreeMap<(String, String), Value>,
    /// Whether this is all there is, because a cluster was asked.
    pub complete: bool,
}

impl Known {
    /// Takes in what an object tells of the cluster; one that tells nothing is passed over. `namespace` is that of objects
    /// that name none.
    pub fn add(&mut self, object: &Value, namespace: &str) {
        let Some(name) = raw::string(object, &["metadata", "name"]).map(str::to_owned) else { return };
        match raw::string(object, &["kind"]) {
            Some("StorageClass") => {
                self.storage_classes.insert(name, StorageClass::from_json(object));
            }
            Some("PersistentVolume") => {
                self.volumes.insert(name, Volume::from_json(object));
            }
            Some("PersistentVolumeClaim") => {
                let namespace = namespace_of(object, namespace).to_owned();
                self.claims.insert((namespace, name), Claim::from_json(object));
            }
            Some("StatefulSet") => {
                let key = (namespace_of(object, namespace).to_owned(), name);
                match sort(object) {
                    Sort::Protected => self.sets.insert(key, object.clone()),
                    // Of what is there and what will be, the latter counts.
                    _ => self.sets.remove(&key),
                };
            }
            _ => {}
        }
    }

    /// The facts for objects of one namespace.
    fn facts(&self, namespace: &str, config: &Config) -> ClusterFacts {
        let claims = self.claims.iter().filter(|((space, _), _)| space == namespace);
        ClusterFacts {
            storage_classes: self.storage_classes.clone(),
            volumes: self.volumes.clone(),
            claims: claims.map(|((_, name), claim)| (name.clone(), claim.clone())).collect(),
            config: config.clone(),
            offline: !self.complete,
            ..ClusterFacts::default()
        }
    }
}

/// The verdict on one manifest.
#[derive(Debug)]
pub struct Judgement {
    /// Its kind.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name; empty when it is generated.
    pub name: String,
    /// What was found after the defaults were filled in.
    pub outcomes: Vec<Outcome>,
    /// The defaults that the webhook would fill in, as a manifest that merges into the object; `None` when there are none.
    pub defaults: Option<Value>,
}

impl Judgement {
    /// Whether the webhook would refuse to create it.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        self.outcomes.iter().any(|outcome| outcome.effect == Effect::Deny)
    }
}

/// Judges a protected StatefulSet as the webhook would judge its creation.
#[must_use]
pub fn judge(object: &Value, namespace: &str, known: &Known, config: &Config, now: Timestamp) -> Judgement {
    let namespace = namespace_of(object, namespace);
    let name = raw::string(object, &["metadata", "name"]).unwrap_or_default();
    let facts = known.facts(namespace, config);
    let request = Request::look(namespace, name, object);
    let mut filled = object.clone();
    if let Some(patch) = policy::mutate(&request, &facts, now).patch {
        // A patch is computed from this very object, so it applies; if it ever did not, the object is judged as it is.
        let _ = json_patch::patch(&mut filled, &patch);
    }
    let verdict = policy::validate(&Request { object: Some(&filled), ..request }, &facts, now);
    let defaults = overlay(object, &filled).map(|defaults| {
        let mut manifest =
            json!({"apiVersion": object["apiVersion"], "kind": object["kind"], "metadata": {"name": name}});
        if let Some(own) = raw::at(object, &["metadata", "namespace"]) {
            manifest["metadata"]["namespace"] = own.clone();
        }
        json_patch::merge(&mut manifest, &defaults);
        manifest
    });
    judgement(object, namespace, verdict.outcomes, defaults)
}

/// Judges an autoscaler or a disruption budget by the protected StatefulSet that it belongs to, as the webhook would judge
/// its creation; `None` where no such set is known.
#[must_use]
pub fn judge_dependent(
    object: &Value,
    target: Target,
    namespace: &str,
    known: &Known,
    config: &Config,
    now: Timestamp,
) -> Option<Judgement> {
    let namespace = namespace_of(object, namespace);
    let name = raw::string(object, &["metadata", "name"]).unwrap_or_default();
    let request = Request::look_at(target, namespace, name, object);
    let here = known.sets.iter().filter(|((space, _), _)| space == namespace);
    let parent = here.map(|(_, set)| set).find(|set| belongs_to(&request, set))?;
    let facts =
        ClusterFacts { parent: Some(parent.clone()), config: config.clone(), ..ClusterFacts::default() };
    let verdict = policy::validate(&request, &facts, now);
    Some(judgement(object, namespace, verdict.outcomes, None))
}

fn judgement(object: &Value, namespace: &str, outcomes: Vec<Outcome>, defaults: Option<Value>) -> Judgement {
    let text = |path: &[&str]| raw::string(object, path).unwrap_or_default().to_owned();
    Judgement {
        kind: text(&["kind"]),
        namespace: namespace.to_owned(),
        name: text(&["metadata", "name"]),
        outcomes,
        defaults,
    }
}

fn namespace_of<'a>(object: &'a Value, fallback: &'a str) -> &'a str {
    raw::string(object, &["metadata", "namespace"]).filter(|name| !name.is_empty()).unwrap_or(fallback)
}

/// What `after` has and `before` has not: maps field by field, lists as a whole, because the lists that howdah fills are
/// atomic ones. So it is a strategic merge patch and a plain merge patch at once.
fn overlay(before: &Value, after: &Value) -> Option<Value> {
    match (before, after) {
        _ if before == after => None,
        (Value::Object(before), Value::Object(after)) => {
            let changed = after.iter().filter_map(|(key, value)| {
                Some((key.clone(), overlay(before.get(key).unwrap_or(&Value::Null), value)?))
            });
            Some(Value::Object(changed.collect()))
        }
        _ => Some(after.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2026-11-22T12:00:00Z".parse().unwrap()
    }

    /// A labelled StatefulSet as people write it: nothing of what the API server fills in.
    fn set() -> Value {
        json!({
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": "db", "labels": {"howdah.dev/protect": "true"}},
            "spec": {
                "selector": {"matchLabels": {"app": "db"}},
                "template": {
                    "metadata": {"labels": {"app": "db"}},
                    "spec": {"containers": [{
                        "name": "postgres",
                        "image": "postgres:17",
                        "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}],
                    }]},
                },
                "volumeClaimTemplates": [
                    {"metadata": {"name": "data"}, "spec": {"storageClassName": "fast", "accessModes": ["ReadWriteOnce"]}},
                ],
            },
        })
    }

    fn class(provisioner: &str) -> Value {
        json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "fast"},
               "provisioner": provisioner, "parameters": {"mapOptions": "krbd:noshare"}})
    }

    fn lint(object: &Value, known: &Known) -> Vec<(&'static str, &'static str)> {
        let judged = judge(object, "default", known, &Config::default(), now());
        judged.outcomes.iter().map(|outcome| (outcome.rule.id, outcome.effect.as_str())).collect()
    }

    #[test]
    fn a_protected_set_in_a_template_is_not_passed_over() {
        let template = |objects: Value| json!({"apiVersion": "template.openshift.io/v1", "kind": "Template", "objects": objects});
        let mut plain = set();
        plain["metadata"]["labels"] = json!({});
        assert_eq!(manifests(template(json!([plain]))).unwrap().len(), 1);
        let mut parametrised = set();
        parametrised["spec"]["replicas"] = json!("${{REPLICAS}}");
        let unreadable = manifests(template(json!([plain, parametrised]))).unwrap_err();
        assert_eq!(unreadable.field, "objects[1]");
        assert!(unreadable.problem.contains("oc process"), "{}", unreadable.problem);
    }

    #[test]
    fn a_list_is_unfolded_and_an_empty_document_is_nothing() {
        assert!(manifests(Value::Null).unwrap().is_empty());
        assert!(manifests(json!({"apiVersion": "v1", "kind": "List"})).unwrap().is_empty());
        let inner = json!({"apiVersion": "apps/v1", "kind": "StatefulSetList", "items": [{"metadata": {"name": "a"}}]});
        let outer = json!({"apiVersion": "v1", "kind": "List", "items": [set(), inner]});
        let found = manifests(outer).unwrap();
        let paths: Vec<&str> = found.iter().map(|manifest| manifest.path.as_str()).collect();
        assert_eq!(paths, ["items[0]", "items[1].items[0]"]);
        assert_eq!(found[1].object["kind"], "StatefulSet", "an item takes the kind from its list");
        // Not of Kubernetes at all: a values file, say.
        assert_eq!(manifests(json!({"replicas": 3})).unwrap().len(), 1);
        assert_eq!(sort(&json!([1])), Sort::Other);
    }

    #[test]
    fn what_is_half_an_object_is_named() {
        for (document, field) in [
            (json!({"kind": "StatefulSet"}), "apiVersion"),
            (json!({"apiVersion": "apps/v1"}), "kind"),
            (json!({"apiVersion": 1, "kind": "StatefulSet"}), "apiVersion"),
            (json!({"apiVersion": "v1", "kind": "List", "items": {}}), "items"),
            (json!({"apiVersion": "v1", "kind": "List", "items": ["x"]}), "items[0]"),
            (json!({"apiVersion": "v1", "kind": "List", "items": [{"kind": "Pod"}]}), "items[0].apiVersion"),
        ] {
            assert_eq!(manifests(document.clone()).unwrap_err().field, field, "{document}");
        }
    }

    #[test]
    fn only_labelled_sets_are_judged_and_a_label_that_means_nothing_is_told_apart() {
        let labelled = |value: Value| {
            let mut object = set();
            object["metadata"]["labels"]["howdah.dev/protect"] = value;
            sort(&object)
        };
        assert_eq!(labelled(json!("true")), Sort::Protected);
        assert_eq!(labelled(json!("false")), Sort::Other);
        assert_eq!(labelled(Value::Null), Sort::Other);
        assert_eq!(labelled(json!("yes")), Sort::Mislabelled);
        assert_eq!(labelled(json!(true)), Sort::Mislabelled, "not a string: the API server refuses it");
        let mut foreign = set();
        foreign["apiVersion"] = json!("apps.example.com/v1");
        assert_eq!(sort(&foreign), Sort::Other);
    }

    #[test]
    fn what_the_api_server_fills_in_is_not_missed() {
        let mut known = Known::default();
        known.add(&class("rook-ceph.rbd.csi.ceph.com"), "default");
        assert!(lint(&set(), &known).is_empty());
    }

    #[test]
    fn what_only_the_cluster_knows_is_open_and_with_a_cluster_it_is_denied() {
        assert_eq!(lint(&set(), &Known::default()), [("storage-class", "open")]);
        let complete = Known { complete: true, ..Known::default() };
        assert_eq!(lint(&set(), &complete), [("storage-class", "deny")]);
        let mut other = Known::default();
        other.add(&class("rancher.io/local-path"), "default");
        assert_eq!(lint(&set(), &other), [("storage-class", "deny")], "a fact of the files counts");
    }

    #[test]
    fn what_belongs_to_a_protected_set_is_judged_by_it() {
        let autoscaler = json!({
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "db"},
            "spec": {"maxReplicas": 3, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db"}},
        });
        let budget = json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "db"},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "db"}}},
        });
        let found = |object: &Value, known: &Known| {
            let Sort::Dependent(target) = sort(object) else { panic!("{object}") };
            let judged = judge_dependent(object, target, "default", known, &Config::default(), now())?;
            let outcomes = judged.outcomes.iter();
            Some(outcomes.map(|outcome| (outcome.rule.id, outcome.effect)).collect::<Vec<_>>())
        };
        let mut known = Known::default();
        assert_eq!(found(&autoscaler, &known), None, "no set is known");
        known.add(&set(), "elsewhere");
        assert_eq!(found(&autoscaler, &known), None, "it is of another namespace");
        known.add(&set(), "default");
        assert_eq!(found(&autoscaler, &known), Some(vec![("autoscaler", Effect::Deny)]));
        assert_eq!(found(&budget, &known), Some(vec![("disruption-budget", Effect::Warn)]));
        let mut warned = set();
        warned["metadata"]["annotations"] = json!({"howdah.dev/mode": "warn"});
        known.add(&warned, "default");
        assert_eq!(found(&autoscaler, &known), Some(vec![("autoscaler", Effect::Warn)]));
        warned["metadata"]["labels"] = json!({});
        known.add(&warned, "default");
        assert_eq!(found(&autoscaler, &known), None, "the label is taken off");
    }

    #[test]
    fn claims_are_those_of_the_namespace() {
        let mut object = set();
        object["spec"]["volumeClaimTemplates"] = json!([]);
        object["spec"]["template"]["spec"]["volumes"] =
            json!([{"name": "data", "persistentVolumeClaim": {"claimName": "by-hand"}}]);
        let claim = |namespace: Option<&str>| {
            json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
                   "metadata": {"name": "by-hand", "namespace": namespace}, "spec": {"storageClassName": "fast"}})
        };
        let mut known = Known::default();
        known.add(&class("rbd.csi.ceph.com"), "default");
        known.add(&claim(Some("elsewhere")), "default");
        assert_eq!(lint(&object, &known), [("storage-class", "open")]);
        known.add(&claim(None), "default");
        assert!(lint(&object, &known).is_empty());
    }

    #[test]
    fn exemptions_and_modes_count_as_in_the_webhook() {
        let mut object = set();
        object["spec"]["replicas"] = json!(2);
        let mut effect = |annotations: Value| {
            object["metadata"]["annotations"] = annotations;
            lint(&object, &Known::default())[0].1
        };
        assert_eq!(effect(json!({})), "deny");
        assert_eq!(effect(json!({"howdah.dev/mode": "warn"})), "warn");
        assert_eq!(effect(json!({"howdah.dev/mode": "audit"})), "audit");
        let key = "howdah.dev/exempt.single-replica";
        assert_eq!(effect(json!({key: "until=2027-01-31 reason=moving"})), "exempt");
        assert_eq!(effect(json!({key: "until=2026-11-21 reason=moving"})), "deny");
    }

    #[test]
    fn the_defaults_merge_into_the_manifest_and_then_nothing_is_left_to_fill() {
        let config = Config { storage_class: Some("fast".to_owned()), ..Config::default() };
        let mut object = set();
        object["metadata"]["namespace"] = json!("shop");
        raw::object_mut(&mut object, &["spec"]).unwrap()["volumeClaimTemplates"] =
            json!([{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}]);
        let defaults = judge(&object, "default", &Known::default(), &config, now()).defaults.unwrap();
        insta::assert_json_snapshot!(defaults);
        json_patch::merge(&mut object, &defaults);
        let again = judge(&object, "default", &Known::default(), &config, now());
        assert_eq!(again.defaults, None);
        let mut audited = set();
        audited["metadata"]["annotations"] = json!({"howdah.dev/mode": "audit"});
        assert_eq!(judge(&audited, "default", &Known::default(), &config, now()).defaults, None);
    }
}
