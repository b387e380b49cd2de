//! `exclusive-lock`: the class of the data can be fenced and snapshotted.
//!
//! **Intent.** Three properties of an RBD class decide what happens in the worst hour. Without the image feature
//! `exclusive-lock` nothing stops a writer on a node that is cut off (failover.md 0.4). With the map option `exclusive`
//! the lock is never given up, and every snapshot of the running database fails (lab.md K4). Without `noshare` all volumes
//! of a node share one kernel client, so that fencing one database fences every volume of its node (lab.md C7).
//!
//! **Fields.** `imageFeatures` and `mapOptions` of the class, or of the volume that exists already, behind the claims of
//! the database. A class that names no features takes those of the Ceph cluster, which include the lock by default.
//!
//! **Fix.** A class with `imageFeatures: layering,exclusive-lock,object-map,fast-diff,deep-flatten` and
//! `mapOptions: "krbd:noshare"`.

use super::claims::{Backing, database_claims, resolve};
use super::{Check, Finding, Floor, Refusal, Rule, Subject, Target};
use crate::annotations::Failover;
use crate::volume::{has_map_option, is_rbd_driver};

/// The rule.
pub const RULE: Rule = Rule {
    id: "exclusive-lock",
    intent: "The storage class lets a database be fenced on its own (needed for failover: auto) and snapshotted while it runs.",
    fields: &["StorageClass parameters.imageFeatures", "StorageClass parameters.mapOptions"],
    fix: "use a class with imageFeatures layering,exclusive-lock,object-map,fast-diff,deep-flatten and mapOptions krbd:noshare",
    targets: &[Target::StatefulSet],
    refusal: Refusal::Policy,
    check: Check::State(check),
    filling: None,
    floor: Floor::silent("the class has to be looked up"),
};

const LOCK: &str = "exclusive-lock";

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for claim in database_claims(subject.object) {
        let Ok(backing) = resolve(&claim, subject.request.namespace, subject.facts) else { continue };
        if !is_rbd_driver(&backing.provisioner) {
            continue;
        }
        let Backing { what, parameters, .. } = &backing;
        let parameter =
            |key: &str| parameters.get(key).map(|value| value.trim()).filter(|value| !value.is_empty());
        let mut add = |found: String, wanted: &str, denies: bool| {
            let finding = Finding::new(claim.field.clone(), found, wanted);
            findings.push(if denies { finding } else { finding.warning() });
        };
        if let Some(features) = parameter("imageFeatures")
            && !features.split(',').any(|feature| feature.trim() == LOCK)
        {
            let denies = subject.settings.failover == Failover::Auto;
            add(
                format!("{what} with imageFeatures {features}"),
                "exclusive-lock among them, to stop a cut-off writer",
                denies,
            );
        }
        let options = parameter("mapOptions").unwrap_or_default();
        if has_map_option(options, "exclusive") {
            let denies = subject.settings.schedule.is_some();
            add(
                format!("{what} with mapOptions {options}"),
                "no exclusive among them, or every backup fails",
                denies,
            );
        }
        let by_kernel = parameter("mounter").is_none_or(|mounter| mounter == "rbd");
        if by_kernel && !has_map_option(options, "noshare") {
            add(
                format!("{what} without krbd:noshare"),
                "it in its mapOptions, to fence one volume alone",
                false,
            );
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{ClusterFacts, StorageClass, Weight, testing};
    use serde_json::json;

    /// What is found for a class with these parameters, by the last word of what is wanted.
    fn found(parameters: &[(&str, &str)], annotation: (&str, &str)) -> Vec<(String, Weight)> {
        let object = json!({
            "metadata": {"name": "pg", "annotations": {annotation.0: annotation.1}},
            "spec": {"volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"storageClassName": "rbd"}}]},
        });
        let class = StorageClass {
            provisioner: "rook-ceph.rbd.csi.ceph.com".to_owned(),
            parameters: parameters
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..StorageClass::default()
        };
        let facts =
            ClusterFacts { storage_classes: [("rbd".to_owned(), class)].into(), ..ClusterFacts::default() };
        let findings = testing::findings(&RULE, &object, &facts);
        let word = |text: &str| text.rsplit(' ').next().unwrap_or_default().to_owned();
        findings.into_iter().map(|finding| (word(&finding.wanted), finding.weight)).collect()
    }

    const PLAIN: (&str, &str) = ("example.com/none", "");
    const AUTO: (&str, &str) = ("howdah.dev/failover", "auto");
    const DAILY: (&str, &str) = ("howdah.dev/schedule", "@daily");
    const NO_SHARE: (&str, &str) = ("mapOptions", "krbd:noshare");

    #[test]
    fn the_lock_is_needed_for_automatic_failover() {
        let without = [("imageFeatures", "layering"), NO_SHARE];
        assert_eq!(found(&without, PLAIN), [("writer".to_owned(), Weight::Warning)]);
        assert_eq!(
            found(&without, ("howdah.dev/failover", "manual")),
            [("writer".to_owned(), Weight::Warning)]
        );
        assert_eq!(found(&without, AUTO), [("writer".to_owned(), Weight::Full)]);
        assert!(found(&[("imageFeatures", "layering, exclusive-lock"), NO_SHARE], AUTO).is_empty());
        assert!(found(&[NO_SHARE], AUTO).is_empty(), "the cluster's own features hold the lock");
    }

    #[test]
    fn an_exclusive_mapping_stands_against_a_schedule() {
        let exclusive = [("mapOptions", "krbd:noshare,exclusive")];
        assert_eq!(found(&exclusive, PLAIN), [("fails".to_owned(), Weight::Warning)]);
        assert_eq!(found(&exclusive, DAILY), [("fails".to_owned(), Weight::Full)]);
        assert!(found(&[("mapOptions", "krbd:noshare;nbd:exclusive")], DAILY).is_empty());
    }

    #[test]
    fn a_shared_client_is_only_warned_of() {
        for parameters in [&[][..], &[("mapOptions", "krbd:lock_on_read")], &[("mapOptions", "nbd:noshare")]]
        {
            assert_eq!(found(parameters, AUTO), [("alone".to_owned(), Weight::Warning)]);
        }
        assert!(found(&[("mounter", "rbd-nbd")], AUTO).is_empty());
    }
}
