//! `restore`: orders a restore, an undo of one, or another try, and follows it to its end.

mod into;

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use howdah_adapters::kubernetes::call;
use howdah_adapters::records::{PostgresRestore, PostgresRestoreSpec};
use howdah_core::annotations;
use howdah_core::names;
use howdah_core::restore::{Phase, RestoreStatus};
use jiff::civil::DateTime;
use jiff::{Timestamp, Zoned};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use crate::args::{RestoreArgs, RestoreReference, RestoreVerb};

/// Between two looks at the record.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

/// Does what was asked, and answers with what to print at the end.
pub async fn run(client: Client, arguments: RestoreArgs) -> anyhow::Result<String> {
    match arguments.verb {
        Some(RestoreVerb::Undo(reference)) => undo(client, reference).await,
        Some(RestoreVerb::Retry(reference)) => retry(client, reference).await,
        None => order(client, arguments).await,
    }
}

/// Orders a restore from a backup, after making what it is to go into.
async fn order(client: Client, arguments: RestoreArgs) -> anyhow::Result<String> {
    let RestoreArgs { verb: _, name, to, before, into, dry_run, method, wait, namespace } = arguments;
    let name = name.context("name the StatefulSet to restore")?;
    let namespace = namespace.unwrap_or_else(|| client.default_namespace().to_owned());
    let sets = Api::<StatefulSet>::namespaced(client.clone(), &namespace);
    let set = call(format!("get the StatefulSet {namespace}/{name}"), sets.get(&name)).await?;
    let zone = annotations::parse(set.annotations()).unwrap_or_default().time_zone;
    let zone = zone.iana_name().unwrap_or("UTC").to_owned();
    let before = before.map(|text| instant(&text, &zone)).transpose()?;
    let mut spec = PostgresRestoreSpec {
        stateful_set: name,
        stateful_set_uid: set.uid(),
        into,
        to,
        before,
        undo: None,
        method: method.into(),
    };
    if spec.into.is_some() {
        let name = &spec.stateful_set;
        ensure!(
            spec.target() != name,
            "give --into another name than {name}; to restore in place, leave it out"
        );
        let copy = into::plan(&client, &namespace, &spec).await?;
        // Known when the StatefulSet is made.
        spec.stateful_set_uid = None;
        if dry_run {
            return manifests(&namespace, copy, spec);
        }
        spec.stateful_set_uid = into::create(&client, &namespace, copy).await?;
    }
    create(client, &namespace, spec, "restore", wait).await
}

/// What `--into` would create, as YAML that kubectl applies.
fn manifests(namespace: &str, copy: into::Copy, spec: PostgresRestoreSpec) -> anyhow::Result<String> {
    let record = PostgresRestore { status: None, ..record(namespace, spec, "restore") };
    let record = serde_json::to_value(record).context("write the PostgresRestore")?;
    let all = std::iter::once(copy.set).chain(copy.claims).chain([record]);
    let documents = all.map(|object| serde_yaml_ng::to_string(&object)).collect::<Result<Vec<_>, _>>();
    Ok(documents.context("write what would be created as YAML")?.join("---\n"))
}

/// Undoes a restore: one that is over by another restore, of its safety copy; one that is not by turning it round.
async fn undo(client: Client, reference: RestoreReference) -> anyhow::Result<String> {
    let RestoreReference { name, wait, namespace } = reference;
    let namespace = namespace.unwrap_or_else(|| client.default_namespace().to_owned());
    let restores = Api::<PostgresRestore>::namespaced(client.clone(), &namespace);
    let found = call(format!("get the restore {namespace}/{name}"), restores.get(&name)).await?;
    let phase = found.status.as_ref().map(|status| status.phase).unwrap_or_default();
    match phase {
        Phase::Completed => {
            let spec = PostgresRestoreSpec { undo: Some(name), to: None, before: None, ..found.spec.clone() };
            create(client, &namespace, spec, "undo", wait).await
        }
        Phase::Failed => bail!("undo the restore {name}: it failed, and everything is as it was before it"),
        _ => ask(&restores, &name, names::RESUME_UNDO, wait).await,
    }
}

/// Lets a restore that is stuck try its step again.
async fn retry(client: Client, reference: RestoreReference) -> anyhow::Result<String> {
    let RestoreReference { name, wait, namespace } = reference;
    let namespace = namespace.unwrap_or_else(|| client.default_namespace().to_owned());
    let restores = Api::<PostgresRestore>::namespaced(client, &namespace);
    let found = call(format!("get the restore {namespace}/{name}"), restores.get(&name)).await?;
    let phase = found.status.map(|status| status.phase).unwrap_or_default();
    if phase != Phase::Stuck {
        bail!("retry the restore {name}: it is {}, and only a stuck one waits for that", phase.as_str());
    }
    ask(&restores, &name, names::RESUME_RETRY, wait).await
}

/// The record of a restore that is ordered now; `verb` is a part of its name.
fn record(namespace: &str, spec: PostgresRestoreSpec, verb: &str) -> PostgresRestore {
    let name = names::restore_name(spec.target(), verb, Timestamp::now());
    let labels = [(names::DATABASE_LABEL.to_owned(), spec.target().to_owned())];
    let mut record = PostgresRestore::new(&name, spec);
    let namespace = Some(namespace.to_owned());
    record.metadata = ObjectMeta { namespace, labels: Some(labels.into()), ..record.metadata };
    record
}

async fn create(
    client: Client,
    namespace: &str,
    spec: PostgresRestoreSpec,
    verb: &str,
    wait: bool,
) -> anyhow::Result<String> {
    let restores = Api::<PostgresRestore>::namespaced(client, namespace);
    let record = record(namespace, spec, verb);
    let name = record.name_any();
    call(format!("create the restore {namespace}/{name}"), restores.create(&PostParams::default(), &record))
        .await?;
    println!("postgresrestore {namespace}/{name} created");
    if wait {
        return follow(&restores, &name).await;
    }
    Ok(format!("It is carried out by the scheduler: kubectl get pgr {name} -n {namespace} -w\n"))
}

/// Annotates a restore with a request that differs from the last one.
async fn ask(api: &Api<PostgresRestore>, name: &str, verb: &str, wait: bool) -> anyhow::Result<String> {
    let request = format!("{verb}/{}", Timestamp::now());
    let patch = json!({"metadata": {"annotations": {names::RESUME: &request}}});
    let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
    call(format!("ask the restore {name} to {verb}"), api.patch(name, &parameters, &patch)).await?;
    println!("postgresrestore {name} asked to {verb}");
    if !wait {
        return Ok(String::new());
    }
    // Until it is taken up the record still shows how it stood before.
    loop {
        let status = status_of(api, name).await?;
        if status.resumed.as_deref() == Some(&request) {
            return follow(api, name).await;
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

async fn status_of(api: &Api<PostgresRestore>, name: &str) -> anyhow::Result<RestoreStatus> {
    let found = call(format!("get the restore {name}"), api.get(name)).await?;
    Ok(found.status.unwrap_or_default())
}

/// Prints each step as it begins and ends, until the end.
async fn follow(api: &Api<PostgresRestore>, name: &str) -> anyhow::Result<String> {
    let mut progress = Progress::default();
    loop {
        let status = status_of(api, name).await?;
        for line in progress.lines(&status) {
            println!("{line}");
        }
        if status.phase.is_terminal() {
            return end(name, &status);
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

/// What was printed already.
#[derive(Debug, Default)]
struct Progress {
    /// Begin of the step that was printed last, and what was printed of it.
    last: Option<(Timestamp, String)>,
}

impl Progress {
    /// The lines that are new since the last look.
    fn lines(&mut self, status: &RestoreStatus) -> Vec<String> {
        let mut lines = Vec::new();
        for step in &status.steps {
            let took = step.took_ms.map(|ms| format!(" {:.1} s", ms as f64 / 1000.0)).unwrap_or_default();
            let message = step.message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
            let line = format!("  {}{took}{message}", step.phase.as_str());
            let new = match &self.last {
                None => true,
                Some((begun, printed)) => {
                    step.started_at > *begun || (step.started_at == *begun && *printed != line)
                }
            };
            if new {
                self.last = Some((step.started_at, line.clone()));
                lines.push(line);
            }
        }
        lines
    }
}

/// The last words: what is in place now, or what is wrong.
fn end(name: &str, status: &RestoreStatus) -> anyhow::Result<String> {
    if status.phase == Phase::Completed {
        let source = status.source.as_ref();
        let what = source.map_or("nothing", |source| source.name.as_str());
        let taken = source.and_then(|source| source.taken_at).map(|taken| format!(", as of {taken}"));
        let until = status.safety_until.map_or(String::new(), |until| format!(" (until {until} at least)"));
        return Ok(format!(
            "{what} is in place{}. To undo it: kubectl howdah restore undo {name}{until}\n",
            taken.unwrap_or_default()
        ));
    }
    let failure = status.failure.as_ref();
    let why = failure.map_or(String::new(), |f| format!(" in {}: {}; {}", f.step.as_str(), f.reason, f.cure));
    bail!("the restore {name} is {}{why}", status.phase.as_str())
}

/// Reads an instant. A time without a zone is refused: 03:00 is another instant in each, and a guess restores the wrong
/// backup.
fn instant(text: &str, zone: &str) -> anyhow::Result<Timestamp> {
    if let Ok(zoned) = text.parse::<Zoned>() {
        return Ok(zoned.timestamp());
    }
    if let Ok(timestamp) = text.parse::<Timestamp>() {
        return Ok(timestamp);
    }
    if text.parse::<DateTime>().is_ok() {
        let example = text.replace(' ', "T");
        bail!("read --before {text:?}: it has no zone; write {example}Z for UTC, or {example}[{zone}]");
    }
    let wrong = text.parse::<Zoned>().err().map_or(String::new(), |error| format!(": {error}"));
    bail!(
        "read --before {text:?}{wrong}; write an instant such as 2026-11-22T03:00:00+09:00 or 2026-11-22T03:00[{zone}]"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn status(value: Value) -> RestoreStatus {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn an_instant_needs_its_zone() {
        let at = |text: &str| instant(text, "Asia/Tokyo");
        let wanted: Timestamp = "2026-11-21T18:00:00Z".parse().unwrap();
        for good in [
            "2026-11-22T03:00:00+09:00",
            "2026-11-22 03:00[Asia/Tokyo]",
            "2026-11-21T18:00:00Z",
            "2026-11-21 18:00Z",
        ] {
            assert_eq!(at(good).unwrap(), wanted, "{good}");
        }
        let bare = at("2026-11-22 03:00").unwrap_err().to_string();
        assert!(bare.contains("no zone") && bare.contains("2026-11-22T03:00[Asia/Tokyo]"), "{bare}");
        let unknown = at("2026-11-22T03:00[Asia/Edo]").unwrap_err().to_string();
        assert!(unknown.contains("Asia/Edo"), "{unknown}");
        assert!(at("yesterday").is_err());
    }

    #[test]
    fn each_step_is_printed_when_it_begins_and_when_it_ends() {
        let mut progress = Progress::default();
        let begun = json!({"phase": "Stopping", "steps": [
            {"phase": "Gating", "startedAt": "2026-11-22T03:00:00Z", "tookMs": 120, "outcome": "Done"},
            {"phase": "Stopping", "startedAt": "2026-11-22T03:00:01Z"}]});
        assert_eq!(progress.lines(&status(begun.clone())), ["  Gating 0.1 s", "  Stopping"]);
        assert!(progress.lines(&status(begun.clone())).is_empty());
        let mut waiting = begun;
        waiting["steps"][1]["message"] = json!("the pod db-0 is still going");
        assert_eq!(progress.lines(&status(waiting)), ["  Stopping: the pod db-0 is still going"]);
    }

    #[test]
    fn a_dry_run_prints_every_claim_before_the_record() {
        let claim = |name: &str| json!({"kind": "PersistentVolumeClaim", "metadata": {"name": name}});
        let set = json!({"kind": "StatefulSet", "metadata": {"name": "db-copy"}});
        let copy = into::Copy { set, claims: vec![claim("data-db-copy-0"), claim("wal-db-copy-0")] };
        let text = manifests("shop", copy, PostgresRestoreSpec::default()).unwrap();
        let read = |document: &str| serde_yaml_ng::from_str::<Value>(document).unwrap();
        let documents: Vec<Value> = text.split("---\n").map(read).collect();
        let kinds: Vec<&Value> = documents.iter().map(|document| &document["kind"]).collect();
        assert_eq!(
            kinds,
            ["StatefulSet", "PersistentVolumeClaim", "PersistentVolumeClaim", "PostgresRestore"]
        );
        assert_eq!(documents[2]["metadata"]["name"], "wal-db-copy-0");
    }

    #[test]
    fn the_end_says_how_to_undo_or_what_is_wrong() {
        let good = json!({"phase": "Completed", "source": {"name": "db-1", "takenAt": "2026-11-22T03:00:02Z",
            "image": {"pool": "p", "name": "i", "id": "1"}}, "safetyUntil": "2026-11-29T03:00:00Z"});
        let text = end("r", &status(good)).unwrap();
        assert!(text.contains("db-1 is in place, as of 2026-11-22T03:00:02Z"), "{text}");
        assert!(text.contains("kubectl howdah restore undo r (until 2026-11-29T03:00:00Z"), "{text}");
        let bad = json!({"phase": "Stuck", "failure": {"step": "Proving", "kind": "Transient",
            "reason": "10.0.0.1 has it open", "cure": "fence it"}});
        let error = end("r", &status(bad)).unwrap_err().to_string();
        assert!(error.contains("Stuck in Proving: 10.0.0.1 has it open; fence it"), "{error}");
    }
}
