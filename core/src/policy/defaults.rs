//! What howdah writes into a StatefulSet: what its rules fill in on creation, and nothing of its own on a change.

use std::collections::BTreeMap;

use jiff::civil::Date;
use serde_json::{Value, json};

use super::json as raw;
use super::{ClusterFacts, RULES};
use crate::annotations::{Mode, Settings};
use crate::names;

const LABELS: [&str; 2] = ["metadata", "labels"];

/// Fills in whatever is left open. In audit mode howdah only watches; an exempted rule fills in nothing.
pub(super) fn on_create(object: &mut Value, settings: &Settings, facts: &ClusterFacts, today: Date) {
    if settings.mode == Mode::Audit {
        return;
    }
    stamp_label(object);
    for rule in &RULES {
        let exempt = matches!(super::exemptions::covering(rule.id, settings, today), Ok(Some(_)));
        if let Some(filling) = rule.filling.as_ref().filter(|_| !exempt) {
            (filling.fill)(object, facts);
        }
    }
}

/// Puts the label on the pod and the claims, which do not inherit it from the StatefulSet.
fn stamp_label(object: &mut Value) {
    raw::set(
        object,
        &["spec", "template", "metadata", "labels"],
        names::PROTECT_LABEL,
        json!(names::PROTECT_VALUE),
    );
    for claim in claim_templates(object) {
        raw::set(claim, &LABELS, names::PROTECT_LABEL, json!(names::PROTECT_VALUE));
    }
}

/// Copies back what howdah once filled into the claim templates and the new object leaves out (`kubectl replace` does):
/// they are immutable, so the API server would refuse the change. The pod template stays as it comes: changing it
/// restarts the database.
pub(super) fn on_update(object: &mut Value, old: &Value) {
    let name = |claim: &Value| raw::string(claim, &["metadata", "name"]).map(str::to_owned);
    // By name, because there may be very many; of several with one name the first counts.
    let old = raw::list(old, &["spec", "volumeClaimTemplates"]).iter().rev();
    let old: BTreeMap<String, &Value> = old.filter_map(|claim| Some((name(claim)?, claim))).collect();
    for claim in claim_templates(object) {
        let Some(before) = name(claim).and_then(|name| old.get(&name).copied()) else { continue };
        let label = raw::at(before, &["metadata", "labels", names::PROTECT_LABEL]);
        if let Some(label) =
            label.filter(|_| raw::at(claim, &["metadata", "labels", names::PROTECT_LABEL]).is_none())
        {
            raw::set(claim, &LABELS, names::PROTECT_LABEL, label.clone());
        }
        let class = raw::at(before, &["spec", "storageClassName"]);
        if let Some(class) = class.filter(|_| super::claims::class_named_by(claim).is_none()) {
            raw::set(claim, &["spec"], "storageClassName", class.clone());
        }
    }
}

fn claim_templates(object: &mut Value) -> impl Iterator<Item = &mut Value> {
    let templates = object.get_mut("spec").and_then(|spec| spec.get_mut("volumeClaimTemplates"));
    templates.and_then(Value::as_array_mut).into_iter().flatten()
}
