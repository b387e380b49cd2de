//! Where a field stands in its file. The values are read by serde; this reads the same text once more for its lines, so a
//! document that the two parsers see differently has no lines rather than wrong ones.

use granit_parser::{Event, Parser, ScalarStyle, Span};
use serde_json::Value;

/// Words that Kubernetes' YAML (1.1) takes for a boolean where they are not quoted, and YAML 1.2 does not.
const OLD_BOOLEANS: [&str; 16] =
    ["y", "Y", "yes", "Yes", "YES", "n", "N", "no", "No", "NO", "on", "On", "ON", "off", "Off", "OFF"];

/// A value and the line it begins in, counted from 1.
#[derive(Debug)]
pub struct Node {
    line: usize,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// A text, and whether it is written without quotes.
    Scalar(String, bool),
    /// Keys with the lines they stand in.
    Map(Vec<(String, usize, Node)>),
    List(Vec<Node>),
    /// Stands somewhere else.
    Alias,
}

/// The documents of a text in their order; ends where the text cannot be understood.
pub fn documents(text: &str) -> Vec<Node> {
    let mut parser = Parser::new_from_str(text);
    let mut found = Vec::new();
    while let Some(event) = next(&mut parser) {
        if matches!(event.0, Event::DocumentStart(..)) {
            let Some(node) = next(&mut parser).and_then(|event| node(event, &mut parser)) else { break };
            found.push(node);
        }
    }
    found
}

/// The next event that is of the document and no comment.
fn next<'a>(parser: &mut impl Iterator<Item = Parsed<'a>>) -> Option<(Event<'a>, Span)> {
    loop {
        match parser.next()?.ok()? {
            (Event::Comment(..), _) => {}
            event => return Some(event),
        }
    }
}

type Parsed<'a> = Result<(Event<'a>, Span), granit_parser::ScanError>;

/// The value that begins with `event`. The parser itself limits how deep it may be.
fn node<'a>((event, span): (Event<'a>, Span), parser: &mut impl Iterator<Item = Parsed<'a>>) -> Option<Node> {
    let content = match event {
        Event::Scalar(text, style, ..) => Content::Scalar(text.into_owned(), style == ScalarStyle::Plain),
        Event::Alias(_) => Content::Alias,
        Event::SequenceStart(..) => {
            let mut items = Vec::new();
            loop {
                match next(parser)? {
                    (Event::SequenceEnd, _) => break Content::List(items),
                    event => items.push(node(event, parser)?),
                }
            }
        }
        Event::MappingStart(..) => {
            let mut fields = Vec::new();
            loop {
                match next(parser)? {
                    (Event::MappingEnd, _) => break Content::Map(fields),
                    event => {
                        let key = node(event, parser)?;
                        let value = next(parser).and_then(|event| node(event, parser))?;
                        let Content::Scalar(name, _) = key.content else { return None };
                        fields.push((name, key.line, value));
                    }
                }
            }
        }
        _ => return None,
    };
    Some(Node { line: span.start.line(), content })
}

impl Node {
    /// Whether this is `value`, as far as its outermost keys tell.
    pub fn agrees_with(&self, value: &Value) -> bool {
        match (&self.content, value) {
            (Content::Map(fields), Value::Object(object)) => {
                let merged = |key: &str| key == "<<";
                fields.iter().all(|(key, ..)| merged(key) || object.contains_key(key))
            }
            (Content::List(items), Value::Array(array)) => items.len() == array.len(),
            (Content::Scalar(..), value) => !value.is_object() && !value.is_array(),
            _ => false,
        }
    }

    /// The line of a field, or of the nearest thing around it that is written: what a default stands for is nowhere.
    pub fn line_of(&self, field: &str) -> usize {
        let mut line = self.line;
        let mut node = self;
        for segment in segments(field) {
            let found = match &node.content {
                Content::Map(fields) => {
                    fields.iter().find(|(key, ..)| key == segment).map(|(_, line, node)| (*line, node))
                }
                Content::List(items) => item(items, segment).map(|node| (node.line, node)),
                _ => None,
            };
            let Some(found) = found else { break };
            (line, node) = found;
        }
        line
    }

    /// Labels and annotations of the object at `path` that Kubernetes reads as a boolean, as (field, word).
    pub fn old_booleans(&self, path: &str) -> Vec<(String, &str)> {
        let mut found = Vec::new();
        for map in ["metadata.labels", "metadata.annotations"] {
            let map_path = howdah_core::lint::join(path, map);
            let Some(Content::Map(fields)) = self.at(&map_path).map(|node| &node.content) else { continue };
            for (key, _, value) in fields {
                match &value.content {
                    Content::Scalar(word, true) if OLD_BOOLEANS.contains(&word.as_str()) => {
                        found.push((format!("{map_path}[{key}]"), word.as_str()));
                    }
                    _ => {}
                }
            }
        }
        found
    }

    fn at(&self, path: &str) -> Option<&Node> {
        segments(path).into_iter().try_fold(self, |node, segment| match &node.content {
            Content::Map(fields) => fields.iter().find(|(key, ..)| key == segment).map(|(.., node)| node),
            Content::List(items) => item(items, segment),
            _ => None,
        })
    }
}

/// An item of a list, by its name or by its number.
fn item<'a>(items: &'a [Node], segment: &str) -> Option<&'a Node> {
    let named = |node: &&Node| {
        ["name", "metadata.name"].iter().any(|path| {
            node.at(path)
                .is_some_and(|node| matches!(&node.content, Content::Scalar(text, _) if text == segment))
        })
    };
    items.iter().find(named).or_else(|| items.get(segment.parse::<usize>().ok()?))
}

/// The parts of a path such as `spec.volumes[data].items[0].key`; what is in brackets may hold dots.
fn segments(path: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        let (segment, after) = match rest.strip_prefix('[') {
            Some(inner) => inner.split_once(']').unwrap_or((inner, "")),
            None => rest.split_at(rest.find(['.', '[']).unwrap_or(rest.len())),
        };
        if !segment.is_empty() {
            found.push(segment);
        }
        rest = after.strip_prefix('.').unwrap_or(after);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# a comment
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: db
  annotations:
    howdah.dev/schedule: every day
    howdah.dev/failover: off
    howdah.dev/suspend: "no"
spec:
  replicas: 3
  template: &pod
    spec:
      containers:
        - image: a
          name: first
        - {name: second, livenessProbe: {
            terminationGracePeriodSeconds: 1}}
---
kind: List
items:
- metadata: {labels: {howdah.dev/protect: yes}}
- *nothing
"#;

    #[test]
    fn a_field_is_found_and_an_absent_one_is_near_its_parent() {
        let documents = documents(TEXT);
        for (field, line) in [
            ("spec.replicas", 11),
            ("metadata.annotations[howdah.dev/schedule]", 7),
            ("spec.template.spec.containers[first]", 15),
            ("spec.template.spec.containers[second].livenessProbe.terminationGracePeriodSeconds", 18),
            ("spec.template.spec.containers[1].livenessProbe", 17),
            ("spec.template.spec.affinity.podAntiAffinity", 13),
            ("spec.volumeClaimTemplates[data].spec", 10),
            ("status", 2),
        ] {
            assert_eq!(documents[0].line_of(field), line, "{field}");
        }
    }

    #[test]
    fn what_comes_after_something_unreadable_has_no_lines() {
        // The alias of the second document names nothing.
        assert_eq!(documents(TEXT).len(), 1);
        assert_eq!(documents("a: 1\n---\nb: [\n").len(), 1);
        assert_eq!(documents("").len(), 0);
    }

    #[test]
    fn words_that_kubernetes_takes_for_booleans_are_found() {
        let text = TEXT.replace("- *nothing\n", "");
        let documents = documents(&text);
        let found = documents[0].old_booleans("");
        assert_eq!(found, [("metadata.annotations[howdah.dev/failover]".to_owned(), "off")]);
        let found = documents[1].old_booleans("items[0]");
        assert_eq!(found, [("items[0].metadata.labels[howdah.dev/protect]".to_owned(), "yes")]);
    }

    #[test]
    fn json_has_lines_too() {
        let documents = documents("{\n  \"spec\": {\n    \"replicas\": 2\n  }\n}\n");
        assert_eq!(documents[0].line_of("spec.replicas"), 3);
        assert!(documents[0].agrees_with(&serde_json::json!({"spec": {"replicas": 2}})));
        assert!(!documents[0].agrees_with(&serde_json::json!({"other": 2})));
    }

    #[test]
    fn paths_are_split_outside_of_brackets() {
        assert_eq!(segments("a.b[c.d/e].f[0][x]"), ["a", "b", "c.d/e", "f", "0", "x"]);
        assert!(segments("").is_empty());
        assert_eq!(segments("[a"), ["a"]);
    }
}
