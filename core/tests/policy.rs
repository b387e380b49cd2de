//! The policy on its fixtures, and what holds for every input.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test panics on what it did not expect")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use howdah_core::lint;
use howdah_core::names;
use howdah_core::policy::parents::belongs_to;
use howdah_core::policy::{
    Claim, ClusterFacts, Config, Effect, HoldingBackup, Operation, RULES, Refusal, Request, StorageClass,
    Target, User, Verdict, Volume, Weight, mutate, validate,
};
use jiff::Timestamp;
use proptest::prelude::*;
use serde::Deserialize as _;
use serde_json::{Value, json};

const NAMESPACE: &str = "fixtures";
/// Somebody without special rights.
static EVE: User = User { name: String::new(), groups: Vec::new() };

fn now() -> Timestamp {
    "2026-11-22T12:00:00Z".parse().unwrap()
}

fn documents(text: &str) -> Vec<Value> {
    let text = text.replace("NAMESPACE", NAMESPACE);
    serde_yaml_ng::Deserializer::from_str(&text).map(|doc| Value::deserialize(doc).unwrap()).collect()
}

/// The value after `# key:` in the comments at the top.
fn header<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .take_while(|line| line.starts_with('#'))
        .find_map(|line| line.strip_prefix("# ")?.strip_prefix(key)?.strip_prefix(": "))
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

/// Who makes what comes before the last document: its gates, too.
fn scheduler() -> User {
    let name = format!("system:serviceaccount:{}:howdah-scheduler", Config::default().namespace);
    User { name, groups: Vec::new() }
}

/// What a fixture has made so far.
struct World {
    facts: ClusterFacts,
    set: Option<Value>,
    /// Pods, claims, autoscalers and disruption budgets, by kind and name.
    objects: BTreeMap<(String, String), Value>,
    user: User,
}

impl World {
    /// What the next document brings about; `None` for something that no rule judges by itself.
    fn play(&mut self, mut document: Value, fixture: &str) -> Option<(Value, Verdict)> {
        let kind = text(&document, "/kind").to_owned();
        let name = text(&document, "/metadata/name").to_owned();
        document = replaced(document, "CLAIM_UID", &format!("uid-of-{name}"));
        match kind.as_str() {
            "StorageClass" => {
                self.facts.storage_classes.insert(name, StorageClass::from_json(&document));
                None
            }
            "PersistentVolume" => {
                self.facts.volumes.insert(name, Volume::from_json(&document));
                None
            }
            "PersistentVolumeClaim" => {
                document["metadata"]["uid"] = json!(format!("uid-of-{name}"));
                self.facts.claims.insert(name.clone(), Claim::from_json(&document));
                self.objects.insert((kind, name), document);
                None
            }
            "Pod" => {
                let pod = self.pod_of_set(document);
                self.objects.insert((kind, name), pod);
                None
            }
            "PostgresBackup" => {
                self.facts.backups.extend(HoldingBackup::from_json(&document));
                None
            }
            "StatefulSet" => {
                let before = self.set.take();
                let merges = header(fixture, "then") != Some("replace");
                if let Some(before) = before.as_ref().filter(|_| merges) {
                    let change = std::mem::replace(&mut document, before.clone());
                    json_patch::merge(&mut document, &change);
                }
                document["metadata"]["uid"] = json!("uid-of-the-set");
                let operation = if before.is_some() { Operation::Update } else { Operation::Create };
                let (after, verdict) =
                    self.admit(operation, Target::StatefulSet, &name, Some(document), before);
                self.set = after.clone();
                Some((after.unwrap(), verdict))
            }
            "Scale" => {
                let replicas =
                    self.set.as_ref().and_then(|set| set["spec"]["replicas"].as_i64()).unwrap_or(1);
                document["metadata"]["uid"] = json!("uid-of-the-set");
                let mut before = document.clone();
                before["spec"]["replicas"] = json!(replicas);
                self.step(Operation::Update, Target::Scale, &name, Some(document), Some(before))
            }
            "Eviction" => self.step(Operation::Create, Target::Eviction, &name, Some(document), None),
            "HorizontalPodAutoscaler" | "PodDisruptionBudget" => {
                let target = if kind == "PodDisruptionBudget" {
                    Target::DisruptionBudget
                } else {
                    Target::HorizontalPodAutoscaler
                };
                let before = self.objects.get(&(kind.clone(), name.clone())).cloned();
                let mut after = before.clone().unwrap_or(json!({}));
                json_patch::merge(&mut after, &document);
                self.objects.insert((kind, name.clone()), after.clone());
                let operation = if before.is_some() { Operation::Update } else { Operation::Create };
                self.step(operation, target, &name, Some(after), before)
            }
            "Delete" => {
                let (kind, name) = (text(&document, "/of/kind"), text(&document, "/of/name"));
                let target = match kind {
                    "Pod" => Target::Pod,
                    "PersistentVolumeClaim" => Target::Claim,
                    "StatefulSet" => Target::StatefulSet,
                    other => panic!("{other} cannot be deleted"),
                };
                let object = match target {
                    Target::StatefulSet => self.set.clone(),
                    // Without a name it is a collection, of which each object is judged by itself.
                    _ => self
                        .objects
                        .iter()
                        .find(|(key, _)| key.0 == kind && (name.is_empty() || key.1 == name))
                        .map(|(_, object)| object.clone()),
                };
                let grace = document.pointer("/options/gracePeriodSeconds").and_then(Value::as_i64);
                let old = object.expect("what is deleted is in the fixture");
                // The API server resolves the grace of a single pod before it asks.
                let own = old.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64);
                let grace = if name.is_empty() { grace } else { grace.or(own) };
                let (_, verdict) =
                    self.admit_with(Operation::Delete, target, name, None, Some(old.clone()), grace);
                Some((old, verdict))
            }
            other => panic!("{other} cannot stand in a fixture"),
        }
    }

    fn step(
        &mut self,
        operation: Operation,
        target: Target,
        name: &str,
        new: Option<Value>,
        old: Option<Value>,
    ) -> Option<(Value, Verdict)> {
        let (after, verdict) = self.admit(operation, target, name, new, old);
        Some((after.unwrap(), verdict))
    }

    fn admit(
        &mut self,
        operation: Operation,
        target: Target,
        name: &str,
        new: Option<Value>,
        old: Option<Value>,
    ) -> (Option<Value>, Verdict) {
        self.admit_with(operation, target, name, new, old, None)
    }

    /// One request, mutated and then judged, as the API server does it.
    fn admit_with(
        &mut self,
        operation: Operation,
        target: Target,
        name: &str,
        new: Option<Value>,
        old: Option<Value>,
        grace_s: Option<i64>,
    ) -> (Option<Value>, Verdict) {
        let request = Request {
            operation,
            target,
            namespace: NAMESPACE,
            name,
            object: new.as_ref(),
            old_object: old.as_ref(),
            user: Some(&self.user),
            grace_s,
        };
        let mut facts = self.facts.clone();
        facts.parent = self.set.clone().filter(|set| belongs_to(&request, set));
        facts.pod = self.objects.get(&("Pod".to_owned(), name.to_owned())).cloned();
        let of_set = |backup: &HoldingBackup| {
            let set = facts.parent.as_ref().or(old.as_ref()).map(|set| text(set, "/metadata/name"));
            set == Some(backup.stateful_set.as_str())
        };
        facts.backups = self.facts.backups.iter().filter(|backup| of_set(backup)).cloned().collect();
        let mut mutated = new.clone();
        if let Some(patch) = mutate(&request, &facts, now()).patch {
            json_patch::patch(mutated.as_mut().expect("only what is there is patched"), &patch)
                .expect("a patch of ours applies");
        }
        let verdict = validate(&Request { object: mutated.as_ref(), ..request }, &facts, now());
        (mutated, verdict)
    }

    /// The pod as the StatefulSet's controller makes it, placed as the fixture says. One that names its owners itself is
    /// taken as it is.
    fn pod_of_set(&self, placed: Value) -> Value {
        if placed.pointer("/metadata/ownerReferences").is_some() {
            return placed;
        }
        let set = self.set.as_ref().expect("a pod belongs to a set");
        let owner = json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "controller": true,
                           "name": set["metadata"]["name"], "uid": set["metadata"]["uid"]});
        let mut pod = set["spec"]["template"].clone();
        pod["metadata"]["ownerReferences"] = json!([owner]);
        json_patch::merge(&mut pod, &placed);
        pod
    }
}

/// The document with every `mark` in its strings replaced.
fn replaced(document: Value, mark: &str, by: &str) -> Value {
    serde_json::from_str(&document.to_string().replace(mark, by)).unwrap()
}

/// Plays a fixture and returns the last object and the last verdict.
fn play(fixture: &str) -> (Value, Verdict) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut facts = ClusterFacts::default();
    facts.config =
        Config { storage_class: header(fixture, "configured-class").map(str::to_owned), ..facts.config };
    let mut world = World { facts, set: None, objects: BTreeMap::new(), user: scheduler() };
    for class in documents(&std::fs::read_to_string(root.join("classes.yaml")).unwrap()) {
        world.play(class, fixture);
    }
    let mut steps = documents(fixture);
    let last = steps.pop().expect("a fixture has a document");
    for step in steps {
        if let Some((_, verdict)) = world.play(step, fixture) {
            assert!(verdict.allowed, "a step before the last is denied: {}", verdict.message);
        }
    }
    world.user = User { name: "eve".to_owned(), groups: Vec::new() };
    if let Some(who) = header(fixture, "as") {
        let mut words =
            who.split_whitespace().map(|word| word.replace("HOWDAH", &Config::default().namespace));
        world.user = User { name: words.next().unwrap(), groups: words.collect() };
    }
    world.play(last, fixture).expect("the last document is judged")
}

/// Whether every field of `part` stands in `whole`; null means absent.
fn assert_part(whole: &Value, part: &Value, path: &str) {
    match part {
        Value::Object(fields) => {
            for (key, value) in fields {
                assert_part(&whole[key], value, &format!("{path}.{key}"));
            }
        }
        Value::Array(items) => {
            assert_eq!(whole.as_array().map(Vec::len), Some(items.len()), "{path}");
            for (i, item) in items.iter().enumerate() {
                assert_part(&whole[i], item, &format!("{path}[{i}]"));
            }
        }
        _ => assert_eq!(whole, part, "{path}"),
    }
}

fn fixtures(rule: &str) -> BTreeMap<String, PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(rule);
    std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{} needs a folder: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), path))
        .collect()
}

#[test]
fn fixtures_are_judged_as_their_names_say() {
    for rule in &RULES {
        let fixtures = fixtures(rule.id);
        let kinds = if rule.refusal == Refusal::Advice { &["allow-"][..] } else { &["allow-", "deny-"] };
        for kind in kinds {
            assert!(fixtures.keys().any(|name| name.starts_with(kind)), "{} has no {kind}fixture", rule.id);
        }
        for (name, path) in &fixtures {
            println!("{}/{name}", rule.id);
            if name.starts_with("mutate-") {
                let read = |file| std::fs::read_to_string(path.join(file)).unwrap();
                let (object, verdict) = play(&read("in.yaml"));
                assert!(verdict.allowed, "{}", verdict.message);
                assert_part(&object, &documents(&read("out.yaml"))[0], "");
                continue;
            }
            let text = std::fs::read_to_string(path).unwrap();
            let (_, verdict) = play(&text);
            assert_eq!(verdict.allowed, name.starts_with("allow-"), "{}", verdict.message);
            if let Some(said) = header(&text, "says") {
                assert!(verdict.message.contains(said), "{}", verdict.message);
            }
            if let Some(warned) = header(&text, "warns") {
                assert!(
                    verdict.warnings.iter().any(|warning| warning.contains(warned)),
                    "{:?}",
                    verdict.warnings
                );
            }
            if verdict.allowed {
                continue;
            }
            if let Some(code) = header(&text, "code") {
                assert_eq!(verdict.code.to_string(), code, "{}", verdict.message);
            }
            assert!(verdict.causes.iter().all(|cause| cause.rule == rule.id), "{}", verdict.message);
            for outcome in verdict.outcomes.iter().filter(|outcome| outcome.effect == Effect::Deny) {
                for part in
                    [outcome.rule.id, &outcome.finding.field, &outcome.finding.wanted, "fix: ", "exempt: "]
                {
                    assert!(verdict.message.contains(part), "{part:?} is missing in {}", verdict.message);
                }
            }
        }
    }
}

#[test]
fn every_fixture_folder_belongs_to_a_rule() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        assert!(entry.path().is_file() || RULES.iter().any(|rule| rule.id == name), "{name}");
    }
}

/// Something of an unexpected shape.
fn junk() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!([])),
        Just(json!({})),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z]{0,3}".prop_map(Value::from),
        Just(json!({"unknown": [1, {"a": null}]})),
    ]
}

/// Mostly one of `values`, sometimes junk.
fn mostly(values: Vec<Value>) -> impl Strategy<Value = Value> {
    prop_oneof![9 => proptest::sample::select(values), 1 => junk()]
}

/// The object with these fields, each of them sometimes left out.
fn object(fields: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let fields: Vec<_> = fields
        .into_iter()
        .map(|(key, value)| proptest::option::weighted(0.8, value).prop_map(move |value| (key, value)))
        .collect();
    fields
        .prop_map(|fields| {
            Value::Object(fields.into_iter().filter_map(|(k, v)| Some((k.to_owned(), v?))).collect())
        })
        .boxed()
}

fn labels() -> BoxedStrategy<Value> {
    mostly(vec![json!({"app": "pg"}), json!({"app": "pg", "howdah.dev/protect": "true"}), json!({})]).boxed()
}

fn anti_affinity() -> BoxedStrategy<Value> {
    let by_label = json!({"topologyKey": "kubernetes.io/hostname",
                          "labelSelector": {"matchLabels": {"howdah.dev/protect": "true"}}});
    let by_app =
        json!({"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "pg"}}});
    let preferred = |term: &Value| json!([{"weight": 1, "podAffinityTerm": term}]);
    let terms = mostly(vec![json!([]), json!([by_label]), json!([by_app])]).boxed();
    let weighted = mostly(vec![json!([]), preferred(&by_label), preferred(&by_app)]).boxed();
    object(vec![
        ("requiredDuringSchedulingIgnoredDuringExecution", terms),
        ("preferredDuringSchedulingIgnoredDuringExecution", weighted),
        ("unknown", junk().boxed()),
    ])
}

/// A StatefulSet, often a sensible one, with unknown fields everywhere.
fn stateful_set() -> BoxedStrategy<Value> {
    let grace = || mostly([0, 5, 29, 30, 31, 300].map(Value::from).to_vec()).boxed();
    let probe = object(vec![("terminationGracePeriodSeconds", grace())]);
    let container = object(vec![("name", Just(json!("pg")).boxed()), ("livenessProbe", probe)]);
    let pod = object(vec![
        ("terminationGracePeriodSeconds", grace()),
        ("affinity", object(vec![("podAntiAffinity", anti_affinity()), ("unknown", junk().boxed())])),
        ("containers", container.prop_map(|container| json!([container])).boxed()),
        (
            "volumes",
            mostly(vec![json!([{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}])]).boxed(),
        ),
        ("unknown", junk().boxed()),
    ]);
    let template_metadata = object(vec![("labels", labels()), ("unknown", junk().boxed())]);
    let claim = object(vec![
        ("metadata", object(vec![("name", Just(json!("data")).boxed()), ("labels", labels())])),
        (
            "spec",
            object(vec![
                (
                    "storageClassName",
                    mostly(vec![json!("rbd"), json!(""), json!("local"), Value::Null]).boxed(),
                ),
                ("unknown", junk().boxed()),
            ]),
        ),
    ]);
    let retention = object(vec![
        ("whenScaled", mostly(vec![json!("Retain"), json!("Delete")]).boxed()),
        ("whenDeleted", mostly(vec![json!("Retain"), json!("Delete")]).boxed()),
    ]);
    let annotations = mostly(vec![
        json!({}),
        json!({"howdah.dev/mode": "warn"}),
        json!({"howdah.dev/mode": "audit"}),
        json!({"howdah.dev/mode": "nonsense"}),
        json!({"howdah.dev/exempt.grace-period": "until=2027-01-31 reason=legacy image"}),
    ]);
    object(vec![
        (
            "metadata",
            object(vec![
                ("name", Just(json!("pg")).boxed()),
                ("labels", Just(json!({"howdah.dev/protect": "true"})).boxed()),
                ("annotations", annotations.boxed()),
            ]),
        ),
        (
            "spec",
            object(vec![
                ("replicas", mostly(vec![json!(0), json!(1), json!(2)]).boxed()),
                ("template", object(vec![("metadata", template_metadata), ("spec", pod)])),
                (
                    "volumeClaimTemplates",
                    proptest::collection::vec(claim, 0..3).prop_map(Value::from).boxed(),
                ),
                ("persistentVolumeClaimRetentionPolicy", retention),
                ("unknown", junk().boxed()),
            ]),
        ),
        ("unknown", junk().boxed()),
    ])
}

fn facts() -> ClusterFacts {
    let class = |provisioner: &str| StorageClass {
        provisioner: provisioner.to_owned(),
        reclaim_policy: "Delete".to_owned(),
        default: false,
        created: String::new(),
        ..StorageClass::default()
    };
    ClusterFacts {
        storage_classes: [
            ("rbd".to_owned(), class("rook-ceph.rbd.csi.ceph.com")),
            ("local".to_owned(), class("rancher.io/local-path")),
        ]
        .into(),
        config: Config { storage_class: Some("rbd".to_owned()), ..Config::default() },
        ..ClusterFacts::default()
    }
}

fn request<'a>(old: Option<&'a Value>, new: &'a Value) -> Request<'a> {
    let operation = if old.is_some() { Operation::Update } else { Operation::Create };
    Request {
        operation,
        target: Target::StatefulSet,
        namespace: "n",
        name: "pg",
        object: Some(new),
        old_object: old,
        user: Some(&EVE),
        grace_s: None,
    }
}

/// Checks that everything in `before` is still in `after`, apart from what `may_change`.
fn assert_survives(before: &Value, after: &Value, path: &str) -> Result<(), TestCaseError> {
    const MAY_CHANGE: [&str; 4] =
        ["terminationGracePeriodSeconds", "howdah.dev/protect", "storageClassName", "whenScaled"];
    match (before, after) {
        (Value::Null, _) => {}
        (Value::Object(fields), Value::Object(_)) => {
            for (key, value) in fields.iter().filter(|(key, _)| !MAY_CHANGE.contains(&key.as_str())) {
                assert_survives(value, &after[key], &format!("{path}/{key}"))?;
            }
        }
        (Value::Array(items), Value::Array(_)) => {
            for (i, item) in items.iter().enumerate() {
                assert_survives(item, &after[i], &format!("{path}/{i}"))?;
            }
        }
        _ => prop_assert_eq!(before, after, "{}", path),
    }
    Ok(())
}

#[test]
fn an_object_of_absurd_size_is_judged_at_once_and_explained_briefly() {
    // What the API server lets through, at 3 MiB. Comparing each finding with each would take hours.
    const MANY: usize = 20_000;
    let set = |prefix: &str| {
        let containers = (0..MANY).map(|i| {
            json!({"name": format!("{prefix}{i}"), "livenessProbe": {"terminationGracePeriodSeconds": 1}})
        });
        let claims = (0..MANY).map(|i| json!({"metadata": {"name": format!("{prefix}{i}")}, "spec": {}}));
        json!({
            "metadata": {"labels": {"howdah.dev/protect": "true"}},
            "spec": {
                "replicas": 1,
                "template": {"spec": {"containers": containers.collect::<Value>()}},
                "volumeClaimTemplates": claims.collect::<Value>(),
            },
        })
    };
    let (old, new) = (set("old"), set("new"));
    assert!(mutate(&request(Some(&old), &new), &facts(), now()).allowed);
    let verdict = validate(&request(Some(&old), &new), &facts(), now());
    assert!(!verdict.allowed && verdict.outcomes.len() >= MANY);
    assert!(verdict.message.len() < 32 * 1024, "{} bytes", verdict.message.len());
    assert!(verdict.message.ends_with(" more"), "the rest is counted");
    assert!(verdict.audit_annotations.values().all(|text| text.len() < 32 * 1024));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn defaults_are_idempotent_and_lose_nothing(object in stateful_set()) {
        let mut mutated = object.clone();
        if let Some(patch) = mutate(&request(None, &object), &facts(), now()).patch {
            json_patch::patch(&mut mutated, &patch).unwrap();
        }
        prop_assert!(mutate(&request(None, &mutated), &facts(), now()).patch.is_none());
        assert_survives(&object, &mutated, "")?;
    }

    #[test]
    fn printed_defaults_merge_into_the_manifest_and_leave_nothing_to_fill(object in stateful_set()) {
        let known = lint::Known::default();
        let mut object = object;
        object["apiVersion"] = json!("apps/v1");
        object["kind"] = json!("StatefulSet");
        let before = object.clone();
        if let Some(defaults) = lint::judge(&object, "n", &known, &facts().config, now()).defaults {
            json_patch::merge(&mut object, &defaults);
        }
        let mut filled = object.clone();
        if let Some(patch) = mutate(&request(None, &object), &facts(), now()).patch {
            json_patch::patch(&mut filled, &patch).unwrap();
        }
        // The mark on what is going to be refused is never stored, and no default.
        json_patch::merge(&mut filled, &json!({"metadata": {"annotations": {names::WEBHOOK_ANSWERS: null}}}));
        let mut expected = object.clone();
        json_patch::merge(&mut expected, &json!({"metadata": {"annotations": {names::WEBHOOK_ANSWERS: null}}}));
        prop_assert_eq!(filled, expected);
        prop_assert_eq!(lint::judge(&object, "n", &known, &facts().config, now()).defaults, None);
        assert_survives(&before, &object, "")?;
    }

    #[test]
    fn what_howdah_filled_in_is_never_denied(object in stateful_set()) {
        let mut mutated = object.clone();
        if let Some(patch) = mutate(&request(None, &object), &facts(), now()).patch {
            json_patch::patch(&mut mutated, &patch).unwrap();
        }
        let before = validate(&request(None, &object), &facts(), now());
        let after = validate(&request(None, &mutated), &facts(), now());
        // What only warns (a configured class that could be better) is the operator's choice.
        for outcome in after.outcomes.iter().filter(|outcome| outcome.finding.weight != Weight::Warning) {
            let known = before.outcomes.iter().any(|known| known.finding.field == outcome.finding.field
                && known.rule.id == outcome.rule.id);
            prop_assert!(known, "new after the defaults: {:?}", outcome.finding);
        }
    }

    #[test]
    fn a_change_never_gets_a_patch_of_the_pod_template(old in stateful_set(), new in stateful_set()) {
        let patch = mutate(&request(Some(&old), &new), &facts(), now()).patch.unwrap_or_default();
        let mut mutated = new.clone();
        json_patch::patch(&mut mutated, &patch).unwrap();
        let denied = !validate(&request(Some(&old), &mutated), &facts(), now()).allowed;
        for operation in &patch.0 {
            let path = operation.path().to_string();
            // The mark on what is going to be refused; it is never stored.
            let mark = denied && path.starts_with("/metadata/annotations");
            prop_assert!(mark || path.starts_with("/spec/volumeClaimTemplates/"), "{path}");
        }
        prop_assert!(mutate(&request(Some(&old), &mutated), &facts(), now()).patch.is_none());
        assert_survives(&new, &mutated, "")?;
    }

    #[test]
    fn an_unchanged_object_is_only_denied_for_nothing(object in stateful_set()) {
        let verdict = validate(&request(Some(&object), &object), &facts(), now());
        prop_assert!(verdict.allowed, "{}", verdict.message);
    }

    #[test]
    fn an_answer_is_short_and_complete(object in stateful_set()) {
        let verdict = validate(&request(None, &object), &facts(), now());
        prop_assert_eq!(verdict.allowed, verdict.causes.is_empty());
        prop_assert!(verdict.allowed || [403, 422].contains(&verdict.code));
        prop_assert!(verdict.warnings.iter().all(|warning| warning.chars().count() <= 120));
    }
}
