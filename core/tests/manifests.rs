//! Manifests of others (`manifests/`: charts, tutorials, operators) with howdah's label and nothing else added, on a cluster
//! with Rook's usual class: exactly what is found, and in which words.

#![expect(clippy::unwrap_used, reason = "a test panics on what it did not expect")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use howdah_core::lint::{Judgement, Known, judge};
use howdah_core::names;
use howdah_core::policy::{Config, Effect, Outcome};
use serde::Deserialize as _;
use serde_json::{Value, json};

fn documents(text: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(text).map(|doc| Value::deserialize(doc).unwrap()).collect()
}

/// The texts of the manifests by their names.
fn manifests() -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files
        .map(|path| {
            (path.file_stem().unwrap().to_str().unwrap().to_owned(), std::fs::read_to_string(path).unwrap())
        })
        .collect()
}

fn judged(text: &str) -> Judgement {
    let classes = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/classes.yaml");
    let mut known = Known::default();
    known.complete = true;
    let mut set = None;
    for mut document in
        documents(&std::fs::read_to_string(classes).unwrap()).into_iter().chain(documents(text))
    {
        known.add(&document, "default");
        if document["kind"] == "StatefulSet" {
            document["metadata"]["labels"][names::PROTECT_LABEL] = json!(names::PROTECT_VALUE);
            set = Some(document);
        }
    }
    judge(&set.unwrap(), "default", &known, &Config::default(), "2026-11-22T12:00:00Z".parse().unwrap())
}

/// What a manifest says that is found in it: effect and rule of each, in review order.
fn expected(text: &str) -> Vec<&str> {
    let found = text.lines().filter_map(|line| line.strip_prefix("# finds: "));
    found.filter(|line| *line != "nothing").collect()
}

#[test]
fn nothing_is_found_but_what_is_wrong() {
    let manifests = manifests();
    assert!(manifests.len() >= 10, "{} manifests", manifests.len());
    let mut wrong = Vec::new();
    for (name, text) in &manifests {
        assert!(text.contains("# finds: "), "{name} does not say what is found in it");
        // That the class of the fixtures shares a kernel client is advice about the class.
        let mut outcomes = judged(text).outcomes;
        outcomes.retain(|outcome| outcome.rule.id != "exclusive-lock");
        let found: Vec<String> = outcomes
            .iter()
            .map(|outcome| format!("{} {}", outcome.effect.as_str(), outcome.rule.id))
            .collect();
        if found != expected(text) {
            let sentences: Vec<String> = outcomes.iter().map(Outcome::sentence).collect();
            wrong.push(format!("{name}: {found:?}\n{}", sentences.join("\n")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn every_denial_says_how_to_go_on() {
    let mut said = String::new();
    for (name, text) in manifests() {
        for outcome in judged(&text).outcomes {
            if outcome.effect == Effect::Deny {
                let (id, sentence, fix) = (outcome.rule.id, outcome.sentence(), outcome.fix().to_owned());
                let _ = writeln!(said, "{name}: [{id}] {sentence}\n    fix: {fix}");
            }
        }
    }
    insta::assert_snapshot!(said);
}
