//! `lint`: the policy on manifests, before they meet a cluster. [`input`] reads them, `howdah_core::lint` judges, and
//! [`text`], [`json`] and [`sarif`] say what it found.

mod input;
mod json;
mod lines;
mod sarif;
mod text;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use howdah_adapters::kubernetes::call;
use howdah_core::lint::{Judgement, Known, Sort, judge, judge_dependent, sort};
use howdah_core::names;
use howdah_core::policy::{Config, Effect, Outcome, json as raw};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::ListParams;
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use input::{Document, Input, Trouble};

/// Where objects without a namespace are looked at, when no cluster's context names one.
const DEFAULT_NAMESPACE: &str = "default";
/// Something would be denied.
const EXIT_DENIED: u8 = 1;
/// Something could not be read, so the answer is not whole. clap ends with it, too, when the call is wrong.
const EXIT_UNREADABLE: u8 = 2;

/// Arguments of `lint`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 0 nothing would be denied; 1 something would be; 2 something could not be read, or the \
                        call is wrong."
)]
pub struct LintArgs {
    /// Files and folders of YAML or JSON manifests; - is standard input. Of a folder, every .yaml, .yml and .json is read,
    /// at any depth, except hidden ones.
    #[arg(required = true, value_name = "FILE|DIR|-")]
    pub paths: Vec<PathBuf>,
    /// How to say it: text, json, or sarif (2.1.0).
    #[arg(short, long, default_value = "text")]
    pub output: Output,
    /// Print only the defaults that the webhook would set, as patches to keep in Git; findings go to standard error.
    #[arg(long, conflicts_with = "output")]
    pub print_patch: bool,
    /// Ask the cluster of the current context about its classes, volumes and claims; without it they are taken from the
    /// manifests alone, and what is not among them stays open.
    #[arg(long)]
    pub cluster: bool,
    /// The namespace of objects that name none; else that of the current context with --cluster, else "default".
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// The StorageClass that the webhook is configured with, for claim templates that name none.
    #[arg(long)]
    pub storage_class: Option<String>,
    /// The shortest grace period that the webhook is configured with.
    #[arg(long, default_value_t = Config::default().minimum_grace_s, value_parser = clap::value_parser!(i64).range(1..))]
    pub minimum_grace_seconds: i64,
    /// Where the rule reference (docs/reference/rules.md) is published, such as in your copy of the repository; each rule in
    /// SARIF links to its section there. Without it there are no links.
    #[arg(long, value_name = "URL")]
    pub rules_url: Option<String>,
}

/// The shape of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
    /// For code scanning.
    Sarif,
}

/// What was found in everything that was read.
#[derive(Debug, Default)]
struct Report {
    files: usize,
    /// Protected StatefulSets.
    judged: usize,
    /// Autoscalers and disruption budgets that belong to them.
    dependents: usize,
    /// Everything else.
    others: usize,
    findings: Vec<Finding>,
    notes: Vec<Note>,
    troubles: Vec<Trouble>,
    patches: Vec<Patch>,
}

/// A finding and where it stands.
#[derive(Debug)]
struct Finding {
    place: Place,
    /// Kind, namespace and name of the object.
    kind: String,
    namespace: String,
    name: String,
    outcome: Outcome,
}

/// Something worth saying that is no finding of a rule.
#[derive(Debug)]
struct Note {
    place: Place,
    text: String,
}

/// The defaults of one StatefulSet.
#[derive(Debug)]
struct Patch {
    place: Place,
    manifest: Value,
}

#[derive(Debug, Clone)]
struct Place {
    file: String,
    document: usize,
    line: Option<usize>,
}

/// What is printed, and how the command ends.
pub async fn run(
    arguments: LintArgs,
    client: impl AsyncFnOnce() -> anyhow::Result<Client>,
) -> anyhow::Result<(String, ExitCode)> {
    let linted = lint(&arguments, client).await;
    let report = match linted {
        Ok(report) => report,
        Err(error) => {
            // Not through main: its exit code for an error would say that something is denied.
            eprintln!("error: {error:#}");
            return Ok((String::new(), ExitCode::from(EXIT_UNREADABLE)));
        }
    };
    let printed = match arguments.output {
        _ if arguments.print_patch => {
            eprint!("{}", text::render(&report));
            patches(&report)?
        }
        Output::Text => text::render(&report),
        Output::Json => json::render(&report),
        Output::Sarif => sarif::render(&report, arguments.rules_url.as_deref()),
    };
    Ok((printed, ExitCode::from(report.exit_code())))
}

async fn lint(
    arguments: &LintArgs,
    client: impl AsyncFnOnce() -> anyhow::Result<Client>,
) -> anyhow::Result<Report> {
    let client = if arguments.cluster { Some(client().await?) } else { None };
    let namespace = arguments
        .namespace
        .clone()
        .unwrap_or_else(|| client.as_ref().map_or(DEFAULT_NAMESPACE, Client::default_namespace).to_owned());
    let input = Input::read(&arguments.paths);
    let mut known = Known::default();
    if let Some(client) = client {
        ask(&client, &input, &namespace, &mut known).await?;
    }
    // What the manifests say counts more than what the cluster has: they are what will be.
    for (_, manifest) in objects(&input) {
        known.add(manifest, &namespace);
    }
    let config = Config {
        storage_class: arguments.storage_class.clone(),
        minimum_grace_s: arguments.minimum_grace_seconds,
        ..Config::default()
    };
    Ok(Report::of(input, &namespace, &known, &config, Timestamp::now()))
}

fn objects(input: &Input) -> impl Iterator<Item = (&Document, &Value)> {
    let all = input.documents.iter();
    all.flat_map(|document| document.manifests.iter().map(move |manifest| (document, &manifest.object)))
}

/// Reads from the cluster what the policy may ask about the manifests.
async fn ask(client: &Client, input: &Input, namespace: &str, known: &mut Known) -> anyhow::Result<()> {
    let judged =
        objects(input).filter(|(_, object)| matches!(sort(object), Sort::Protected | Sort::Dependent(_)));
    let namespaces: BTreeSet<&str> = judged
        .map(|(_, object)| raw::string(object, &["metadata", "namespace"]).unwrap_or(namespace))
        .collect();
    read(Api::<StorageClass>::all(client.clone()), namespace, known).await?;
    read(Api::<PersistentVolume>::all(client.clone()), namespace, known).await?;
    for namespace in namespaces {
        let claims = Api::<PersistentVolumeClaim>::namespaced(client.clone(), namespace);
        read(claims, namespace, known).await?;
        // What belongs to a set may be written without it.
        read(Api::<StatefulSet>::namespaced(client.clone(), namespace), namespace, known).await?;
    }
    known.complete = true;
    Ok(())
}

async fn read<K>(api: Api<K>, namespace: &str, known: &mut Known) -> anyhow::Result<()>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Serialize,
{
    let attempt = format!("list each {}", K::kind(&()));
    for object in call(attempt, api.list(&ListParams::default())).await?.items {
        let mut object = serde_json::to_value(object).context("write an object of the cluster as JSON")?;
        // The items of a list do not say what they are.
        object["apiVersion"] = K::api_version(&()).into();
        object["kind"] = K::kind(&()).into();
        known.add(&object, namespace);
    }
    Ok(())
}

impl Report {
    fn of(input: Input, namespace: &str, known: &Known, config: &Config, now: Timestamp) -> Self {
        let Input { files, documents, troubles } = input;
        let mut report = Self { files, troubles, ..Self::default() };
        for document in &documents {
            for manifest in &document.manifests {
                let place = |field: &str| Place {
                    file: document.file.clone(),
                    document: document.number,
                    line: document.line_of(&manifest.path, field),
                };
                match sort(&manifest.object) {
                    Sort::Other => report.others += 1,
                    Sort::Mislabelled => {
                        report.others += 1;
                        let field = format!("metadata.labels[{}]", names::PROTECT_LABEL);
                        let text = format!(
                            "{field} is neither \"true\" nor \"false\": howdah does not protect this StatefulSet"
                        );
                        report.notes.push(Note { place: place(&field), text });
                    }
                    Sort::Protected => {
                        report.judged += 1;
                        let judgement = judge(&manifest.object, namespace, known, config, now);
                        report.take(judgement, place);
                    }
                    Sort::Dependent(target) => {
                        let judged = judge_dependent(&manifest.object, target, namespace, known, config, now);
                        match judged {
                            Some(judgement) => {
                                report.dependents += 1;
                                report.take(judgement, place);
                            }
                            None => report.others += 1,
                        }
                    }
                }
            }
        }
        report
    }

    fn take(&mut self, judgement: Judgement, place: impl Fn(&str) -> Place) {
        let Judgement { kind, namespace, name, outcomes, defaults } = judgement;
        self.findings.extend(outcomes.into_iter().map(|outcome| Finding {
            place: place(&outcome.finding.field),
            kind: kind.clone(),
            namespace: namespace.clone(),
            name: name.clone(),
            outcome,
        }));
        self.patches.extend(defaults.map(|manifest| Patch { place: place(""), manifest }));
    }

    fn count(&self, effect: Effect) -> usize {
        self.findings.iter().filter(|finding| finding.outcome.effect == effect).count()
    }

    fn exit_code(&self) -> u8 {
        if !self.troubles.is_empty() {
            EXIT_UNREADABLE
        } else if self.count(Effect::Deny) > 0 {
            EXIT_DENIED
        } else {
            0
        }
    }
}

/// The defaults as YAML: each document merges into the StatefulSet it names, with kustomize or by hand.
fn patches(report: &Report) -> anyhow::Result<String> {
    let mut yaml = String::new();
    for Patch { place, manifest } in &report.patches {
        let manifest = serde_yaml_ng::to_string(manifest).context("write the defaults as YAML")?;
        yaml.push_str(&format!("---\n# {}, document {}\n{manifest}", place.file, place.document));
    }
    if yaml.is_empty() {
        yaml.push_str("# The webhook would set nothing.\n");
    }
    Ok(yaml)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        lint: LintArgs,
    }

    /// Lints one file with this text; what is printed, and the exit code.
    fn lint(text: &str, flags: &[&str]) -> (String, Report) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("db.yaml");
        std::fs::write(&file, text).unwrap();
        let line = ["lint", file.to_str().unwrap()].into_iter().chain(flags.iter().copied());
        let arguments = Line::parse_from(line).lint;
        let input = Input::read(&arguments.paths);
        let mut known = Known::default();
        for (_, object) in objects(&input) {
            known.add(object, DEFAULT_NAMESPACE);
        }
        let config = Config { storage_class: arguments.storage_class.clone(), ..Config::default() };
        let now = "2026-11-22T12:00:00Z".parse().unwrap();
        let mut report = Report::of(input, DEFAULT_NAMESPACE, &known, &config, now);
        if text == TEXT {
            // Rules that are added later would have more to say about it.
            let rules = ["annotations", "single-replica", "grace-period", "storage-class"];
            report.findings.retain(|finding| rules.contains(&finding.outcome.rule.id));
        }
        let printed = match arguments.output {
            Output::Text => text::render(&report),
            Output::Json => json::render(&report),
            Output::Sarif => sarif::render(&report, arguments.rules_url.as_deref()),
        };
        (printed.replace(folder.path().to_str().unwrap(), "shop"), report)
    }

    const TEXT: &str = r#"{apiVersion: storage.k8s.io/v1, kind: StorageClass,
metadata: {name: fast},
provisioner: rook-ceph.rbd.csi.ceph.com,
parameters: {mapOptions: "krbd:noshare"}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: orders
  namespace: shop
  labels: {howdah.dev/protect: "true"}
  annotations:
    howdah.dev/schedule: every day
    howdah.dev/exempt.grace-period: until=2026-11-30 reason=legacy image
spec:
  replicas: 3
  template:
    spec:
      terminationGracePeriodSeconds: 10
  volumeClaimTemplates:
    - metadata: {name: data}
      spec: {storageClassName: fast}
    - metadata: {name: wal}
      spec: {storageClassName: slow}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: web, labels: {howdah.dev/protect: "yes please"}}
---
apiVersion: v1
kind: Service
metadata: {name: orders}
"#;

    #[test]
    fn every_shape_says_the_same() {
        let (text, report) = lint(TEXT, &[]);
        insta::assert_snapshot!("text", text);
        assert_eq!((report.judged, report.others, report.exit_code()), (1, 3, EXIT_DENIED));
        let wanted = [
            ("annotations", "deny", "error", 13),
            ("single-replica", "deny", "error", 16),
            ("grace-period", "exempt", "note", 19),
            ("storage-class", "open", "none", 24),
            ("annotations", "warn", "warning", 14),
        ];
        let json: Value = serde_json::from_str(&lint(TEXT, &["-o", "json"]).0).unwrap();
        let sarif: Value = serde_json::from_str(&lint(TEXT, &["-o", "sarif"]).0).unwrap();
        let (findings, results) = (&json["findings"], &sarif["runs"][0]["results"]);
        assert_eq!(findings.as_array().map(Vec::len), Some(wanted.len()));
        assert_eq!(results.as_array().map(Vec::len), Some(wanted.len()));
        for (i, (rule, effect, level, line)) in wanted.into_iter().enumerate() {
            let (finding, result) = (&findings[i], &results[i]);
            assert_eq!((&finding["rule"], &finding["effect"]), (&rule.into(), &effect.into()), "{finding}");
            assert_eq!((&finding["line"], &finding["document"]), (&line.into(), &2.into()), "{finding}");
            assert_eq!((&result["ruleId"], &result["level"]), (&rule.into(), &level.into()), "{result}");
            let region = &result["locations"][0]["physicalLocation"]["region"];
            assert_eq!(region["startLine"], line, "{result}");
        }
    }

    #[test]
    fn what_belongs_to_a_set_is_judged_with_it() {
        let both = r#"apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop, labels: {howdah.dev/protect: "true"}}
spec:
  selector: {matchLabels: {app: db}}
  template: {metadata: {labels: {app: db}}}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: db, namespace: shop}
spec:
  maxReplicas: 4
  scaleTargetRef: {apiVersion: apps/v1, kind: StatefulSet, name: db}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: db, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  minAvailable: 1
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: web, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, minAvailable: 1}
"#;
        let (text, report) = lint(both, &[]);
        let found: Vec<_> = report.findings.iter().map(|f| (f.outcome.rule.id, f.place.line)).collect();
        assert_eq!(found, [("autoscaler", Some(12)), ("disruption-budget", Some(20))], "{text}");
        assert_eq!((report.judged, report.dependents, report.others), (1, 2, 1));
        assert_eq!(report.exit_code(), EXIT_DENIED);
        for part in [
            "db.yaml:12: denied [autoscaler] HorizontalPodAutoscaler shop/db: spec.maxReplicas is 4, wanted 1",
            "db.yaml:20: warning [disruption-budget] PodDisruptionBudget shop/db: spec.minAvailable is 1",
            "1 StatefulSet and 2 objects of theirs judged, 1 other object",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        let json: Value = serde_json::from_str(&lint(both, &["-o", "json"]).0).unwrap();
        assert_eq!(json["findings"][0]["kind"], "HorizontalPodAutoscaler");
    }

    #[test]
    fn the_examples_are_what_their_names_say() {
        let code = |name: &str| {
            let file = format!("{}/../deploy/examples/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
            lint(&std::fs::read_to_string(file).unwrap(), &[]).1
        };
        let example = code("postgres");
        assert_eq!((example.exit_code(), example.judged), (0, 1), "{:?}", example.findings);
        assert_eq!(code("refused").exit_code(), EXIT_DENIED);
        assert_eq!((code("unlabelled").exit_code(), code("unlabelled").judged), (0, 0));
    }

    #[test]
    fn nothing_to_say_is_said() {
        let clean = "apiVersion: v1\nkind: Service\nmetadata: {name: db}\n";
        let (text, report) = lint(clean, &[]);
        assert_eq!(text, "1 file: no StatefulSet judged, 1 other object; nothing would be denied\n");
        assert_eq!(report.exit_code(), 0);
    }

    #[test]
    fn exit_codes_tell_denied_from_unreadable() {
        let set = |spec: &str| {
            format!(
                "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {{name: db, labels: {{howdah.dev/protect: \"true\"}}}}\nspec: {spec}\n"
            )
        };
        let code = |text: &str| lint(text, &[]).1.exit_code();
        assert_eq!(code(&set("{}")), 0);
        assert_eq!(
            code(&set("{volumeClaimTemplates: [{spec: {storageClassName: fast}}]}")),
            0,
            "open is not denied"
        );
        assert_eq!(code(&set("{replicas: 2}")), EXIT_DENIED);
        assert_eq!(code(&format!("{}---\n[", set("{replicas: 2}"))), EXIT_UNREADABLE);
        let warned = set("{replicas: 2}").replace("labels", "annotations: {howdah.dev/mode: warn}, labels");
        assert_eq!(code(&warned), 0);
        for line in
            [&["lint"][..], &["lint", "-", "--print-patch", "-o", "json"], &["lint", "-", "-o", "xml"]]
        {
            assert_eq!(
                Line::try_parse_from(line).err().unwrap().exit_code(),
                i32::from(EXIT_UNREADABLE),
                "{line:?}"
            );
        }
    }

    #[test]
    fn patches_name_their_place_and_are_yaml() {
        let (_, report) = lint(TEXT, &[]);
        let yaml = patches(&report).unwrap();
        assert!(
            yaml.starts_with("---\n# ") && yaml.contains("db.yaml, document 2\napiVersion: apps/v1\n"),
            "{yaml}"
        );
        assert!(
            yaml.contains("whenScaled: Retain") && !yaml.contains("terminationGracePeriodSeconds"),
            "{yaml}"
        );
        assert_eq!(patches(&Report::default()).unwrap(), "# The webhook would set nothing.\n");
    }
}
