//! The report for code scanning: SARIF 2.1.0.
//!
//! A denial is an error, a warning a warning, what only audits or is exempt a note, and an exempt one is also suppressed,
//! with its reason. What only a cluster can tell has the kind `open`, which by the standard carries no level. What could
//! not be read is a notification of the run.

use howdah_core::policy::{Effect, Outcome, RULES, Rule};
use serde_json::{Value, json};

use super::input::Trouble;
use super::{Finding, Report};

/// Where the standard says that its schema is.
const SCHEMA: &str =
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json";

/// Renders the report; `rules_url` is where the rule reference is published, if it is.
pub(super) fn render(report: &Report, rules_url: Option<&str>) -> String {
    let rules: Vec<Value> = RULES.iter().map(|rule| describe(rule, rules_url)).collect();
    let results: Vec<Value> = report.findings.iter().map(result).collect();
    let notifications: Vec<Value> = report
        .troubles
        .iter()
        .map(|trouble| notification("error", unreadable(trouble), &trouble.file, trouble.line))
        .chain(
            report
                .notes
                .iter()
                .map(|note| notification("note", note.text.clone(), &note.place.file, note.place.line)),
        )
        .collect();
    let mut log = json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {
                "name": "howdah",
                "version": env!("CARGO_PKG_VERSION"),
                "rules": rules,
            }},
            "invocations": [{
                "executionSuccessful": report.troubles.is_empty(),
                "exitCode": report.exit_code(),
                "toolExecutionNotifications": notifications,
            }],
            "columnKind": "unicodeCodePoints",
            "results": results,
        }],
    });
    if let Some(url) = rules_url {
        log["runs"][0]["tool"]["driver"]["informationUri"] = json!(url);
    }
    format!("{log:#}\n")
}

fn describe(rule: &Rule, rules_url: Option<&str>) -> Value {
    let exempt = match rule.exemption() {
        Some(annotation) => format!("{annotation}=\"until=YYYY-MM-DD reason=...\""),
        None => "not possible".to_owned(),
    };
    let mut description = json!({
        "id": rule.id,
        "shortDescription": {"text": rule.intent},
        "help": {"text": format!("Reads: {}. Fix: {}. Exempt: {exempt}.", rule.fields.join(", "), rule.fix)},
        "defaultConfiguration": {"level": "error"},
    });
    if let Some(url) = rules_url {
        description["helpUri"] = json!(format!("{url}#{}", rule.id));
    }
    description
}

fn result(finding: &Finding) -> Value {
    let Outcome { rule, effect, because, .. } = &finding.outcome;
    let (level, kind) = match effect {
        Effect::Deny => ("error", "fail"),
        Effect::Warn => ("warning", "fail"),
        Effect::Audit | Effect::Exempt => ("note", "fail"),
        Effect::Open => ("none", "open"),
    };
    let object = format!("{}/{}", finding.namespace, finding.name);
    let mut location = physical(&finding.place.file, finding.place.line);
    location["logicalLocations"] = json!([{
        "fullyQualifiedName": format!("{}/{object}/{}", finding.kind, finding.outcome.finding.field),
        "kind": "member",
    }]);
    let text =
        format!("{} {object}: {}. Fix: {}.", finding.kind, finding.outcome.sentence(), finding.outcome.fix());
    let mut result = json!({
        "ruleId": rule.id,
        "ruleIndex": RULES.iter().position(|known| known.id == rule.id),
        "level": level,
        "kind": kind,
        "message": {"text": text},
        "locations": [location],
    });
    if *effect == Effect::Exempt {
        result["suppressions"] = json!([{"kind": "inSource", "justification": because}]);
    }
    result
}

fn notification(level: &str, text: String, file: &str, line: Option<usize>) -> Value {
    json!({"level": level, "message": {"text": text}, "locations": [physical(file, line)]})
}

fn unreadable(trouble: &Trouble) -> String {
    let document = trouble.document.map(|number| format!("document {number}, ")).unwrap_or_default();
    let field = if trouble.field.is_empty() { "the text" } else { trouble.field.as_str() };
    format!("{document}{field}: {}", trouble.problem)
}

fn physical(file: &str, line: Option<usize>) -> Value {
    let mut physical = json!({"artifactLocation": {"uri": uri(file)}});
    if let Some(line) = line {
        physical["region"] = json!({"startLine": line});
    }
    json!({"physicalLocation": physical})
}

/// A path as a URI reference: absolute ones with their scheme, relative ones as they are.
fn uri(file: &str) -> String {
    let mut uri = if file.starts_with('/') { "file://".to_owned() } else { String::new() };
    for byte in file.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lint::{Note, Place};

    /// What the schema of SARIF 2.1.0 requires of the parts that are written here.
    fn check(log: &Value) {
        let has = |object: &Value, fields: &[&str]| {
            for field in fields {
                assert!(!object[field].is_null(), "{field} is absent in {object:#}");
            }
        };
        assert_eq!(log["version"], "2.1.0");
        let run = &log["runs"][0];
        has(run, &["tool"]);
        let driver = &run["tool"]["driver"];
        has(driver, &["name"]);
        let rules = driver["rules"].as_array().unwrap();
        for (i, rule) in rules.iter().enumerate() {
            has(rule, &["id"]);
            has(&rule["shortDescription"], &["text"]);
            assert!(rules[..i].iter().all(|earlier| earlier["id"] != rule["id"]));
            if let Some(uri) = rule.get("helpUri").map(|uri| uri.as_str().unwrap()) {
                let anchor = format!("#{}", rule["id"].as_str().unwrap());
                assert!(uri.starts_with("https://") && uri.ends_with(&anchor), "{uri}");
            }
        }
        for invocation in run["invocations"].as_array().unwrap() {
            assert!(invocation["executionSuccessful"].is_boolean());
            for notification in invocation["toolExecutionNotifications"].as_array().unwrap() {
                has(&notification["message"], &["text"]);
            }
        }
        for result in run["results"].as_array().unwrap() {
            has(&result["message"], &["text"]);
            let rule = result["ruleIndex"].as_u64().unwrap() as usize;
            assert_eq!(rules[rule]["id"], result["ruleId"]);
            let level = result["level"].as_str().unwrap();
            assert!(["none", "note", "warning", "error"].contains(&level));
            let kind = result["kind"].as_str().unwrap();
            assert!(["fail", "open"].contains(&kind));
            assert_eq!(level == "none", kind != "fail", "only a failure has a level");
            let physical = &result["locations"][0]["physicalLocation"];
            has(&physical["artifactLocation"], &["uri"]);
            assert!(physical["region"]["startLine"].as_u64().is_none_or(|line| line >= 1));
            for suppression in result["suppressions"].as_array().into_iter().flatten() {
                assert!(["inSource", "external"].contains(&suppression["kind"].as_str().unwrap()));
            }
        }
    }

    #[test]
    fn the_log_is_what_the_schema_requires() {
        let rule = &RULES[0];
        let effects = [Effect::Deny, Effect::Warn, Effect::Audit, Effect::Exempt, Effect::Open];
        let place = Place { file: "a b/ü.yaml".to_owned(), document: 1, line: Some(3) };
        let finding = |effect: Effect| Finding {
            place: place.clone(),
            kind: "StatefulSet".to_owned(),
            namespace: "shop".to_owned(),
            name: "orders".to_owned(),
            outcome: Outcome {
                rule,
                finding: howdah_core::policy::Finding::new("spec.replicas", "2", "1"),
                effect,
                because: Some("because".to_owned()),
            },
        };
        let trouble = Trouble {
            file: "-".to_owned(),
            document: Some(2),
            line: None,
            field: "spec".to_owned(),
            problem: "it is no YAML".to_owned(),
        };
        let report = Report {
            findings: effects.map(finding).into(),
            notes: vec![Note { place: place.clone(), text: "a note".to_owned() }],
            troubles: vec![trouble],
            ..Report::default()
        };
        let log: Value =
            serde_json::from_str(&render(&report, Some("https://example.com/rules.md"))).unwrap();
        check(&log);
        let run = &log["runs"][0];
        let levels: Vec<&Value> =
            run["results"].as_array().unwrap().iter().map(|result| &result["level"]).collect();
        assert_eq!(levels, ["error", "warning", "note", "note", "none"]);
        let uri = &run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"];
        assert_eq!(uri, "a%20b/%C3%BC.yaml");
        assert_eq!(run["invocations"][0]["executionSuccessful"], false);
        assert_eq!(run["tool"]["driver"]["informationUri"], "https://example.com/rules.md");
        let silent: Value = serde_json::from_str(&render(&Report::default(), None)).unwrap();
        check(&silent);
        let driver = &silent["runs"][0]["tool"]["driver"];
        assert!(driver.get("informationUri").is_none() && driver["rules"][0].get("helpUri").is_none());
    }

    #[test]
    fn every_link_leads_to_a_heading_of_the_reference() {
        let reference = howdah_core::policy::reference();
        for rule in &RULES {
            let uri =
                describe(rule, Some("https://example.com/rules.md"))["helpUri"].as_str().unwrap().to_owned();
            let (_, anchor) = uri.split_once('#').unwrap();
            assert!(reference.contains(&format!("\n## {anchor}\n")), "{uri}");
        }
    }

    #[test]
    fn absolute_paths_have_a_scheme() {
        assert_eq!(uri("/tmp/db.yaml"), "file:///tmp/db.yaml");
        assert_eq!(uri("-"), "-");
    }
}
