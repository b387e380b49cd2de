//! A fixture of the policy, played on a real API server: see core/fixtures/README.md.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use howdah_core::policy::floor::{ProtectedSet, protected_sets};
use jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::floor::BY_POLICY;
use crate::webhook::{Answer, Webhook, Who, documents};

/// What the API server puts around a message of ours.
const DENIED: &str = "denied the request: ";
/// Longer than the API server takes to see a list that was written. Only what nothing can be asked about waits so long.
const SEEN: Duration = Duration::from_secs(2);
/// The part of the control plane that sweeps up after a scene.
const SWEEPER: &str = "system:serviceaccount:kube-system:namespace-controller";

/// One fixture.
pub struct Scene {
    text: String,
    expected: Value,
    /// Whether the last step is denied.
    pub denied: bool,
    /// Whether it wants a storage class configured.
    pub configured_class: bool,
}

/// What a fixture has made, its last step, and who takes it.
struct Stage {
    last: Value,
    made: Vec<Made>,
    scheduler: Who,
    who: Option<Who>,
}

/// What a scene has made: API path, name and uid.
struct Made {
    kind: String,
    path: String,
    name: String,
    uid: String,
}

impl Scene {
    /// Reads a fixture: a file, or a folder with what goes in and what comes out.
    pub fn read(path: &Path) -> Self {
        let name = path.file_name().unwrap().to_str().unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let (text, expected) = if name.starts_with("mutate-") {
            (read(&path.join("in.yaml")), documents(&read(&path.join("out.yaml"))).remove(0))
        } else {
            (read(path), json!({}))
        };
        // Nodes that do not exist have their pods collected, and the collector knows a name again after 40 s: each
        // fixture has a node of its own, so that it is over before.
        static NODE: AtomicU32 = AtomicU32::new(0);
        let node = format!("node-{}-{}", std::process::id(), NODE.fetch_add(1, Ordering::Relaxed));
        let text = text.replace("node-a", &node);
        let mut scene = Self { text, expected, denied: name.starts_with("deny-"), configured_class: false };
        scene.configured_class = scene.header("configured-class").is_some();
        scene
    }

    fn header(&self, key: &str) -> Option<&str> {
        let comments = self.text.lines().take_while(|line| line.starts_with('#'));
        comments.into_iter().find_map(|line| line.strip_prefix("# ")?.strip_prefix(key)?.strip_prefix(": "))
    }

    /// Everything but the last step is done, by howdah's scheduler, which may close a gate; the last is a dry run, and
    /// what was made is deleted.
    pub async fn play(&self, webhook: &Webhook) {
        let stage = self.prepare(webhook).await;
        // What was just made reaches the caches of the webhook a moment later.
        let problem = Mutex::new(String::new());
        webhook
            .eventually(&self.text, || async {
                let answer = self.last_step(webhook, &stage).await;
                let found = self.differs(&answer);
                if let Some(found) = &found {
                    let mut problem = problem.lock().unwrap();
                    if *problem != *found {
                        println!("not yet: {found}");
                        problem.clone_from(found);
                    }
                }
                found.is_none()
            })
            .await;
        sweep(webhook, &stage.scheduler, stage.made).await;
    }

    /// Plays where no webhook is asked, and returns what the API server makes of the last step by itself.
    pub async fn play_without_webhook(&self, webhook: &Webhook) -> Answer {
        let stage = self.prepare(webhook).await;
        // These are judged by the list of protected sets.
        if stage.last["kind"] == "Scale" || stage.last["of"]["kind"] == "Pod" {
            listed(webhook).await;
        }
        let answer = self.last_step(webhook, &stage).await;
        sweep(webhook, &stage.scheduler, stage.made).await;
        answer
    }

    async fn prepare(&self, webhook: &Webhook) -> Stage {
        let text = self.text.replace("NAMESPACE", webhook.namespace.name());
        let mut steps = documents(&text);
        let scheduler = Who::new([format!("system:serviceaccount:{}:howdah-scheduler", webhook.system())]);
        let who = self.header("as").map(|words| {
            Who::new(words.split_whitespace().map(|word| word.replace("HOWDAH", webhook.system())))
        });
        let mut stage = Stage { last: steps.pop().unwrap(), made: Vec::new(), scheduler, who };
        for object in &steps {
            make(webhook, &stage.scheduler, object, &mut stage.made).await;
        }
        stage
    }

    async fn last_step(&self, webhook: &Webhook, stage: &Stage) -> Answer {
        let Stage { last: object, made, who, .. } = stage;
        let administrator = Who::new(["administrator".to_owned()]);
        let who = who.as_ref().unwrap_or(&administrator);
        let kind = object["kind"].as_str().unwrap();
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let path = path_of(webhook, if kind == "Delete" { &object["of"] } else { object });
        let (dry, params) = (
            PostParams { dry_run: true, ..PostParams::default() },
            PatchParams { dry_run: true, ..PatchParams::default() },
        );
        match kind {
            "Delete" => {
                let mut options = DeleteParams { dry_run: true, ..DeleteParams::default() };
                options.grace_period_seconds =
                    object["options"]["gracePeriodSeconds"].as_u64().map(|grace| grace as u32);
                match object["of"]["name"].as_str() {
                    Some(name) => webhook.send_as(who, &path, |request| request.delete(name, &options)).await,
                    None => {
                        let all = ListParams::default().labels(object["of"]["labels"].as_str().unwrap());
                        webhook.send_as(who, &path, |request| request.delete_collection(&options, &all)).await
                    }
                }
            }
            "Eviction" => {
                let data = serde_json::to_vec(object).unwrap();
                webhook
                    .send_as(who, &path, |request| request.create_subresource("eviction", name, &dry, data))
                    .await
            }
            "Scale" => {
                let body = Patch::Merge(json!({"spec": object["spec"]}));
                webhook
                    .send_as(who, &path, |request| request.patch_subresource("scale", name, &params, &body))
                    .await
            }
            _ if !made.iter().any(|made| made.kind == kind && made.name == name) => {
                let data = serde_json::to_vec(object).unwrap();
                webhook.send_as(who, &path, |request| request.create(&dry, data)).await
            }
            _ if self.header("then") == Some("replace") => {
                let data = serde_json::to_vec(object).unwrap();
                webhook.send_as(who, &path, |request| request.replace(name, &dry, data)).await
            }
            _ => {
                webhook
                    .send_as(who, &path, |request| request.patch(name, &params, &Patch::Merge(object)))
                    .await
            }
        }
    }

    /// What is not as expected.
    fn differs(&self, answer: &Answer) -> Option<String> {
        if self.denied {
            let said = self.header("says").unwrap_or_default();
            let code = self.header("code").map(|code| code.parse::<u16>().unwrap());
            let denied = code.map_or([403, 422].contains(&answer.status), |code| answer.status == code)
                && answer.message().contains(DENIED)
                && answer.message().contains(said);
            return (!denied).then(|| {
                format!("{} {}, wanted a denial with {said:?} ({code:?})", answer.status, answer.message())
            });
        }
        if !answer.passed() {
            return Some(format!("{} {}", answer.status, answer.message()));
        }
        let warned =
            self.header("warns").is_none_or(|text| answer.warnings.iter().any(|line| line.contains(text)));
        if !warned {
            return Some(format!("warnings are {:?}", answer.warnings));
        }
        difference(&answer.body, &self.expected, "")
    }
}

/// Waits until the API server goes by what the list of protected sets has to say of the namespace.
async fn listed(webhook: &Webhook) {
    let path = path_of(webhook, &json!({"kind": "StatefulSet"}));
    let administrator = Who::new(["administrator".to_owned()]);
    let all = ListParams::default();
    let sets = webhook.send_as(&administrator, &path, |request| request.list(&all)).await;
    let sets = sets.body["items"].as_array().cloned().unwrap_or_default();
    let wanted = protected_sets(&sets, Timestamp::now()).remove(webhook.namespace.name()).unwrap_or_default();
    webhook
        .eventually("the list of protected sets says what it has to", || async {
            let list =
                webhook.send("protectedsets", |request| request.get("howdah", &Default::default())).await;
            let found = list.body["spec"].get("sets").cloned().unwrap_or(json!([]));
            serde_json::from_value::<Vec<ProtectedSet>>(found).unwrap() == wanted
        })
        .await;
    // It is written before the API server has read it back. What it says of most sets can be asked.
    let told = |set: &&ProtectedSet| set.refuses.iter().any(|rule| rule == "single-replica");
    for set in wanted.iter().filter(told) {
        webhook
            .eventually("the API server goes by the list", || async {
                let body = Patch::Merge(json!({"spec": {"replicas": 4711}}));
                let params = PatchParams { dry_run: true, ..PatchParams::default() };
                let scale = |request: kube::core::Request| {
                    request.patch_subresource("scale", &set.name, &params, &body)
                };
                let answer = webhook.send_as(&administrator, &path, scale).await;
                answer.message().contains(BY_POLICY)
            })
            .await;
    }
    if !wanted.iter().all(|set| told(&set)) {
        tokio::time::sleep(SEEN).await;
    }
}

/// Brings one document about.
async fn make(webhook: &Webhook, who: &Who, object: &Value, made: &mut Vec<Made>) {
    let (kind, name) = (object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap());
    let path = path_of(webhook, object);
    let earlier = made.iter().find(|made| made.kind == kind && made.name == name);
    let passed = |answer: Answer| {
        assert!(answer.passed(), "{kind} {name}: {} {}", answer.status, answer.message());
        answer.body
    };
    if let Some(earlier) = earlier {
        let change = object.to_string().replace("CLAIM_UID", &earlier.uid);
        let change = Patch::Merge(serde_json::from_str::<Value>(&change).unwrap());
        let params = PatchParams::default();
        passed(webhook.send_as(who, &path, |request| request.patch(name, &params, &change)).await);
        return;
    }
    let mut new = object.clone();
    let status = new.as_object_mut().unwrap().remove("status").unwrap_or_default();
    let created = if kind == "Pod" && new["metadata"].get("ownerReferences").is_none() {
        place(webhook, who, &path, name, new["spec"]["nodeName"].as_str()).await
    } else {
        let data = serde_json::to_vec(&new).unwrap();
        let answer = Mutex::new(None);
        // What an earlier scene made goes away a moment after it was deleted, and what this one just made reaches the
        // caches of the webhook a moment later.
        webhook
            .eventually(&format!("{kind} {name} is made"), || async {
                let data = data.clone();
                let params = PostParams::default();
                let made = webhook.send_as(who, &path, |request| request.create(&params, data)).await;
                let too_early = made.status == 409 || made.message().contains("which does not exist");
                *answer.lock().unwrap() = Some(made);
                !too_early
            })
            .await;
        passed(answer.into_inner().unwrap().unwrap())
    };
    if !status.is_null() {
        let change = Patch::Merge(json!({"status": status}));
        let params = PatchParams::default();
        passed(
            webhook
                .send_as(who, &path, |request| request.patch_subresource("status", name, &params, &change))
                .await,
        );
    }
    let uid = created["metadata"]["uid"].as_str().unwrap().to_owned();
    made.push(Made { kind: kind.to_owned(), path, name: name.to_owned(), uid });
}

/// Waits for the pod that the controller makes for a StatefulSet, and puts it on a node as the scheduler does.
pub async fn place(webhook: &Webhook, who: &Who, path: &str, name: &str, node: Option<&str>) -> Value {
    let find = || webhook.send_as(who, path, |request| request.get(name, &Default::default()));
    webhook.eventually(&format!("the pod {name} is made"), || async { find().await.passed() }).await;
    if let Some(node) = node {
        let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
                             "target": {"apiVersion": "v1", "kind": "Node", "name": node}});
        let data = serde_json::to_vec(&binding).unwrap();
        let params = PostParams::default();
        let bound = webhook
            .send_as(who, path, |request| request.create_subresource("binding", name, &params, data))
            .await;
        assert!(bound.passed(), "{}", bound.message());
    }
    find().await.body
}

/// Deletes what a scene has made, and what controllers have made of it.
async fn sweep(webhook: &Webhook, scheduler: &Who, made: Vec<Made>) {
    let sweeper = Who::new([SWEEPER.to_owned()]);
    let sets = made.iter().any(|made| made.kind == "StatefulSet");
    for Made { path, name, .. } in made.iter().rev() {
        webhook.send_as(scheduler, path, |request| request.delete(name, &DeleteParams::default())).await;
    }
    if !sets {
        return;
    }
    let force = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    webhook
        .eventually("pods and claims are gone", || async {
            let mut left = 0;
            for kind in ["Pod", "PersistentVolumeClaim"] {
                let path = path_of(webhook, &json!({"apiVersion": "v1", "kind": kind}));
                let all = ListParams::default();
                webhook.send_as(&sweeper, &path, |request| request.delete_collection(&force, &all)).await;
                let found = webhook.send_as(&sweeper, &path, |request| request.list(&all)).await;
                left += found.body["items"].as_array().map_or(0, Vec::len);
            }
            left == 0
        })
        .await;
}

/// The API path of the resource that an object is of.
pub fn path_of(webhook: &Webhook, object: &Value) -> String {
    let kind = object["kind"].as_str().unwrap_or_default();
    let (version, resource) = match kind {
        "StatefulSet" | "Scale" => ("apps/v1", "statefulsets"),
        "Pod" | "Eviction" => ("v1", "pods"),
        "PersistentVolumeClaim" => ("v1", "persistentvolumeclaims"),
        "PersistentVolume" => ("v1", "persistentvolumes"),
        "StorageClass" => ("storage.k8s.io/v1", "storageclasses"),
        "HorizontalPodAutoscaler" => (object["apiVersion"].as_str().unwrap(), "horizontalpodautoscalers"),
        "PodDisruptionBudget" => ("policy/v1", "poddisruptionbudgets"),
        "PostgresBackup" => ("howdah.dev/v1alpha1", "postgresbackups"),
        other => panic!("{other} cannot stand in a fixture"),
    };
    let root = if version == "v1" { "api" } else { "apis" };
    match resource {
        "persistentvolumes" | "storageclasses" => format!("/{root}/{version}/{resource}"),
        _ => format!("/{root}/{version}/namespaces/{}/{resource}", webhook.namespace.name()),
    }
}

/// The first field of `part` that `whole` does not have; null means absent.
fn difference(whole: &Value, part: &Value, path: &str) -> Option<String> {
    match part {
        Value::Object(fields) => {
            fields.iter().find_map(|(key, value)| difference(&whole[key], value, &format!("{path}.{key}")))
        }
        Value::Array(items) => {
            if whole.as_array().map(Vec::len) != Some(items.len()) {
                return Some(format!("{path} is {whole}, wanted {part}"));
            }
            items
                .iter()
                .enumerate()
                .find_map(|(i, item)| difference(&whole[i], item, &format!("{path}[{i}]")))
        }
        _ => (whole != part).then(|| format!("{path} is {whole}, wanted {part}")),
    }
}
