//! The rules as a document.

use std::fmt::Write as _;

use super::{RULES, Refusal, Target, exemptions};

/// The rules as a Markdown document, for the reference.
#[must_use]
pub fn reference() -> String {
    let mut text = String::from(
        "# Rules\n\n\
         Generated from the table `RULES` in `core/src/policy.rs`. Every rule judges StatefulSets that carry the label\n\
         `howdah.dev/protect=true` and what belongs to them, and nothing else. 403 means against the policy, 429 not now:\n\
         both follow `howdah.dev/mode` (`enforce`, `warn`, `audit`) and can be exempted. 422 means not understandable:\n\
         it is refused in every mode. A change is never denied for a violation that was there before and that it does not\n\
         touch: it warns. A StatefulSet that an operator made (a controlling ownerReference) gets no defaults, and what is\n\
         wrong with it is warned of instead of denied. The group `howdah:break-glass` may do everything.\n",
    );
    let _ = write!(
        text,
        "An exemption holds through its last day (UTC). In the {} days before that it warns; after it nothing is exempt, and\n\
         the annotation itself is refused.\n\n\
         | rule | intent | fields | on | code |\n|---|---|---|---|---|\n",
        exemptions::ENDING_DAYS,
    );
    for rule in &RULES {
        let fields: Vec<String> = rule.fields.iter().map(|field| format!("`{field}`")).collect();
        let targets: Vec<&str> = rule.targets.iter().copied().map(Target::as_str).collect();
        let code = match rule.refusal {
            Refusal::Policy => "403",
            Refusal::Invalid => "422",
            Refusal::Held => "403, in every mode",
            Refusal::Advice => "none: it warns",
        };
        let _ = writeln!(
            text,
            "| [{id}](#{id}) | {} | {} | {} | {code} |",
            rule.intent,
            fields.join(", "),
            targets.join(", "),
            id = rule.id,
        );
    }
    for rule in &RULES {
        let exempt = match rule.exemption() {
            Some(annotation) => {
                format!("`{annotation}: \"until=YYYY-MM-DD reason=...\"`, both keys required")
            }
            None if rule.refusal == Refusal::Held => "not possible while the operation is open".to_owned(),
            None => "not possible; remove the annotation instead".to_owned(),
        };
        let _ = write!(text, "\n## {}\n\n{}\n\n- Fix: {}.\n", rule.id, rule.intent, rule.fix);
        if let Some(filling) = &rule.filling {
            let _ = writeln!(text, "- Filled in on creation: {}.", filling.says);
        }
        let _ = writeln!(text, "- Exempt: {exempt}.");
    }
    text
}
