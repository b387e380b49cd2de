//! The report for programs. Fields are added to it, never changed or removed.

use serde_json::{Value, json};

use super::{Place, Report};

/// Renders the report.
pub(super) fn render(report: &Report) -> String {
    let findings: Vec<Value> = report
        .findings
        .iter()
        .map(|finding| {
            let outcome = &finding.outcome;
            with_place(
                &finding.place,
                json!({
                    "kind": finding.kind,
                    "namespace": finding.namespace,
                    "name": finding.name,
                    "rule": outcome.rule.id,
                    "effect": outcome.effect.as_str(),
                    "field": outcome.finding.field,
                    "found": outcome.finding.found,
                    "wanted": outcome.finding.wanted,
                    "because": outcome.because,
                    "fix": outcome.fix(),
                    "exemption": outcome.rule.exemption(),
                }),
            )
        })
        .collect();
    let notes: Vec<Value> =
        report.notes.iter().map(|note| with_place(&note.place, json!({"text": note.text}))).collect();
    let unreadable: Vec<Value> = report
        .troubles
        .iter()
        .map(|trouble| {
            json!({
                "file": trouble.file,
                "document": trouble.document,
                "line": trouble.line,
                "field": trouble.field,
                "problem": trouble.problem,
            })
        })
        .collect();
    let report = json!({
        "files": report.files,
        "judged": report.judged,
        "dependents": report.dependents,
        "others": report.others,
        "findings": findings,
        "notes": notes,
        "unreadable": unreadable,
    });
    format!("{report:#}\n")
}

/// The fields of an entry, with its place in front.
fn with_place(place: &Place, fields: Value) -> Value {
    let mut entry = json!({"file": place.file, "document": place.document, "line": place.line});
    if let (Some(entry), Value::Object(fields)) = (entry.as_object_mut(), fields) {
        entry.extend(fields);
    }
    entry
}
