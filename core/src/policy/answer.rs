//! From outcomes to an answer: message, code, warnings, causes and audit annotations.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use super::json as raw;
use super::{Cause, Effect, Outcome, Refusal, Request, Target, Verdict, Weight};

/// Longest warning: kubectl prints each on one line, and the API server cuts all of them at 4096 characters.
pub const WARNING_CHARS_MAX: usize = 120;
/// Most warnings in one answer; with [`WARNING_CHARS_MAX`] they stay below the API server's limit for all of them.
pub const WARNINGS_MAX: usize = 20;
/// Most findings that one answer explains: nobody reads more at a time, and a made-up object can have tens of thousands.
const EXPLAINED_MAX: usize = 20;
/// Longest value quoted in a message: a denial has to stay readable on a terminal.
const QUOTED_CHARS_MAX: usize = 200;

/// Turns the outcomes into message, code, warnings, causes and audit annotations.
pub(super) fn conclude(verdict: &mut Verdict, governing: &Value, request: &Request<'_>) {
    let mut denials = Vec::new();
    let mut unexplained = 0;
    let mut audit: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    for outcome in &verdict.outcomes {
        let (rule, finding) = (outcome.rule, &outcome.finding);
        let found = quoted(&finding.found);
        let because = outcome.because.as_deref().map(|clause| format!(" ({clause})")).unwrap_or_default();
        match outcome.effect {
            Effect::Deny if denials.len() >= EXPLAINED_MAX => unexplained += 1,
            Effect::Deny => {
                denials.push(explain(outcome));
                let message = format!("{}: found {found}, wanted {}", rule.id, finding.wanted);
                verdict.causes.push(Cause { rule: rule.id, field: finding.field.clone(), message });
            }
            Effect::Warn if verdict.warnings.len() < WARNINGS_MAX => {
                let field = &finding.field;
                let mut text = format!("howdah {}: {field} is {found}{because}", rule.id);
                if text.chars().count() > WARNING_CHARS_MAX {
                    // Where it does not fit, what was found says more than the beginning of the path to it.
                    let prefixes = ["spec.template.spec.", "spec."];
                    let rest = prefixes.iter().find_map(|prefix| field.strip_prefix(prefix)).unwrap_or(field);
                    text = format!("howdah {}: {rest} is {found}{because}", rule.id);
                }
                verdict.warnings.push(shortened(&text, WARNING_CHARS_MAX));
            }
            Effect::Warn | Effect::Audit | Effect::Exempt | Effect::Open => {}
        }
        let key = if outcome.effect == Effect::Exempt { "exempt" } else { "violations" };
        let lines = audit.entry(key).or_default();
        match lines.len() {
            ..EXPLAINED_MAX => lines.push(format!("{}: {} is {found}{because}", rule.id, finding.field)),
            EXPLAINED_MAX => lines.push("and more".to_owned()),
            _ => {}
        }
    }
    verdict.audit_annotations =
        audit.into_iter().map(|(key, lines)| (key.to_owned(), lines.join("; "))).collect();
    if denials.is_empty() {
        return;
    }
    verdict.allowed = false;
    (verdict.code, verdict.retry_after_s) = code(&verdict.outcomes);
    let kind = raw::string(governing, &["kind"]).unwrap_or("StatefulSet");
    let asked = Some(request.name).filter(|name| !name.is_empty() && request.target == Target::StatefulSet);
    let name = raw::string(governing, &["metadata", "name"]).or(asked).unwrap_or("(generated name)");
    let namespace = request.namespace;
    let count = denials.len() + unexplained;
    let findings = if count == 1 { "finding" } else { "findings" };
    verdict.message = format!("howdah protects {kind} {namespace}/{name}: {count} {findings}");
    for denial in denials {
        let _ = write!(verdict.message, "\n{denial}");
    }
    if unexplained > 0 {
        let _ = write!(verdict.message, "\nand {unexplained} more");
    }
}

/// The status of a denial, and when to try again. A mixture is a matter of policy: 422 would tell clients that only the
/// syntax is wrong, and 429 that waiting is enough.
fn code(outcomes: &[Outcome]) -> (u16, Option<u32>) {
    let denials = outcomes.iter().filter(|outcome| outcome.effect == Effect::Deny);
    let codes = denials.map(|outcome| match (outcome.rule.refusal, outcome.finding.weight) {
        (Refusal::Invalid, _) => (422, None),
        (_, Weight::NotNow { retry_after_s }) => (429, Some(retry_after_s)),
        _ => (403, None),
    });
    let all_the_same = codes.reduce(|one, other| if one.0 == other.0 { one.max(other) } else { (403, None) });
    all_the_same.unwrap_or((403, None))
}

/// One denial in full: rule, field, found, wanted, fix, exemption.
fn explain(outcome: &Outcome) -> String {
    format!(
        "[{}] {}\n    fix: {}\n    exempt: {}",
        outcome.rule.id,
        outcome.sentence(),
        outcome.fix(),
        outcome.exempt()
    )
}

/// A value for a message: on one line and not too long.
pub(super) fn quoted(value: &str) -> String {
    let line: String = value.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    shortened(&line, QUOTED_CHARS_MAX)
}

/// At most `limit` characters of `text`, with an ellipsis where it was cut.
fn shortened(text: &str, limit: usize) -> String {
    if text.chars().count() <= limit {
        return text.to_owned();
    }
    text.chars().take(limit.saturating_sub(3)).chain("...".chars()).collect()
}
