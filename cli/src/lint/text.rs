//! The report for people: `file:line: denied [rule] ...`, the cure below it, and a sum at the end.

use howdah_core::policy::Effect;

use super::{Place, Report};

/// Renders the report.
pub(super) fn render(report: &Report) -> String {
    let mut text = String::new();
    for trouble in &report.troubles {
        let document = trouble.document.map(|number| format!(", document {number}")).unwrap_or_default();
        let line = trouble.line.map(|line| format!(", line {line}")).unwrap_or_default();
        let field = if trouble.field.is_empty() { String::new() } else { format!(": {}", trouble.field) };
        text.push_str(&format!("{}{document}{line}{field}: unreadable: {}\n", trouble.file, trouble.problem));
    }
    for finding in &report.findings {
        let (outcome, place) = (&finding.outcome, at(&finding.place));
        let word = match outcome.effect {
            Effect::Deny => "denied",
            Effect::Warn => "warning",
            Effect::Audit => "audited",
            Effect::Exempt => "exempt",
            Effect::Open => "note",
        };
        let object = format!("{} {}/{}", finding.kind, finding.namespace, shown(&finding.name));
        text.push_str(&format!("{place}: {word} [{}] {object}: {}\n", outcome.rule.id, outcome.sentence()));
        if outcome.effect == Effect::Deny {
            text.push_str(&format!("    fix: {}\n    exempt: {}\n", outcome.fix(), outcome.exempt()));
        } else if outcome.effect != Effect::Open {
            text.push_str(&format!("    fix: {}\n", outcome.fix()));
        }
    }
    for note in &report.notes {
        text.push_str(&format!("{}: note: {}\n", at(&note.place), note.text));
    }
    text.push_str(&sum(report));
    text
}

/// The last line, and what would answer what is open.
fn sum(report: &Report) -> String {
    let mut sets = counted(report.judged, "StatefulSet");
    if report.dependents > 0 {
        sets.push_str(&format!(" and {} of theirs", counted(report.dependents, "object")));
    }
    let others = counted(report.others, "other object");
    let mut text = format!("{}: {sets} judged, {others}", counted(report.files, "file"));
    text.push_str(&match report.count(Effect::Deny) {
        0 => "; nothing would be denied".to_owned(),
        denied => format!("; {} would be denied", counted(denied, "finding")),
    });
    for (effect, words) in
        [(Effect::Warn, "warned about"), (Effect::Audit, "audited"), (Effect::Exempt, "exempt")]
    {
        match report.count(effect) {
            0 => {}
            count => text.push_str(&format!(", {count} {words}")),
        }
    }
    text.push('\n');
    if report.count(Effect::Open) > 0 {
        let open = counted(report.count(Effect::Open), "question");
        text.push_str(&format!(
            "{open} only a cluster can answer: add its StorageClasses and volumes, or use --cluster\n"
        ));
    }
    if !report.troubles.is_empty() {
        text.push_str(&format!(
            "{} could not be read: the answer is not whole\n",
            counted(report.troubles.len(), "thing")
        ));
    }
    text
}

fn at(place: &Place) -> String {
    match place.line {
        Some(line) => format!("{}:{line}", place.file),
        None => format!("{}, document {}", place.file, place.document),
    }
}

fn shown(name: &str) -> &str {
    if name.is_empty() { "(generated name)" } else { name }
}

fn counted(count: usize, what: &str) -> String {
    match count {
        0 => format!("no {what}"),
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
}
