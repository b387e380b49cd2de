//! `storage-class`: the data is on Ceph RBD.
//!
//! **Intent.** Snapshots, fencing and restore work on RBD images. On any other storage howdah could not keep its
//! promises, and would find that out during the first backup.
//!
//! **Fields.** The class of every claim template, and every claim the pod names, followed to the provisioner: through
//! the default class, the legacy annotation, and volumes that exist already (by their CSI driver). Where it is known on
//! which of them the database lies, the others (dumps on a file share, say) are nobody's concern.
//!
//! **Fix.** Name a class whose provisioner is `rbd.csi.ceph.com` or `<operator namespace>.rbd.csi.ceph.com`.

use serde_json::{Value, json};

use super::claims::{class_named_by, database_claims, resolve};
use super::{Check, ClusterFacts, Filling, Finding, Floor, Refusal, Rule, Subject, Target, json as raw};
use crate::volume::is_rbd_driver;

/// The rule.
pub const RULE: Rule = Rule {
    id: "storage-class",
    intent: "The database is on Ceph RBD, where it can be snapshotted, fenced and restored.",
    fields: &[
        "spec.volumeClaimTemplates[*].spec.storageClassName",
        "spec.template.spec.volumes[*].persistentVolumeClaim.claimName",
    ],
    fix: "name a storage class of Ceph RBD, such as Rook's rook-ceph-block",
    targets: &[Target::StatefulSet],
    refusal: Refusal::Policy,
    check: Check::State(check),
    filling: Some(Filling {
        says: "the class that howdah is configured with, in claim templates that name none",
        fill,
    }),
    floor: Floor::silent("the class has to be looked up"),
};

const WANTED: &str = "a class of Ceph RBD (provisioner rbd.csi.ceph.com or *.rbd.csi.ceph.com)";

/// A claim that the pod names has its class already.
const FIX_OF_CLAIM: &str =
    "make a claim of a storage class of Ceph RBD, copy the data into it, and name that one here";

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for claim in database_claims(subject.object) {
        match resolve(&claim, subject.request.namespace, subject.facts) {
            Ok(backing) if is_rbd_driver(&backing.provisioner) => {}
            Ok(backing) => {
                let found = format!("{} of {}", backing.what, backing.provisioner);
                let templated = claim.is_templated();
                let finding = Finding::new(claim.field, found, WANTED);
                findings.push(if templated { finding } else { finding.fix(FIX_OF_CLAIM) });
            }
            Err(unresolved) => findings.push(unresolved.finding(claim.field, WANTED)),
        }
    }
    findings
}

fn fill(object: &mut Value, facts: &ClusterFacts) {
    let Some(class) = &facts.config.storage_class else { return };
    let Some(spec) = raw::object_mut(object, &["spec"]) else { return };
    let templates = spec.get_mut("volumeClaimTemplates").and_then(Value::as_array_mut);
    for template in templates.into_iter().flatten() {
        if class_named_by(template).is_none() {
            raw::set(template, &["spec"], "storageClassName", json!(class));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Claim, StorageClass, Volume, Weight, testing};

    fn facts() -> ClusterFacts {
        let class = |provisioner: &str, default: bool, created: &str| StorageClass {
            provisioner: provisioner.to_owned(),
            reclaim_policy: "Delete".to_owned(),
            default,
            created: created.to_owned(),
            ..StorageClass::default()
        };
        let volume = |driver: Option<&str>, claim: Option<(&str, &str)>| Volume {
            driver: driver.map(str::to_owned),
            reclaim_policy: "Retain".to_owned(),
            claim: claim.map(|(space, name)| (space.to_owned(), name.to_owned())),
            ..Volume::default()
        };
        let claim = |storage_class: Option<&str>, volume: Option<&str>| Claim {
            storage_class: storage_class.map(str::to_owned),
            volume: volume.map(str::to_owned),
            ..Claim::default()
        };
        ClusterFacts {
            storage_classes: [
                ("rbd".to_owned(), class("rook-ceph.rbd.csi.ceph.com", false, "2026-01-01T00:00:00Z")),
                ("local".to_owned(), class("rancher.io/local-path", true, "2026-01-01T00:00:00Z")),
            ]
            .into(),
            claims: [
                ("on-rbd".to_owned(), claim(Some("local"), Some("pv-rbd"))),
                ("on-nfs".to_owned(), claim(Some("rbd"), Some("pv-nfs"))),
                ("pending".to_owned(), claim(Some("rbd"), None)),
                ("floating".to_owned(), claim(Some(""), None)),
            ]
            .into(),
            volumes: [
                ("pv-rbd".to_owned(), volume(Some("rbd.csi.ceph.com"), None)),
                ("pv-nfs".to_owned(), volume(None, None)),
                ("pv-reserved".to_owned(), volume(Some("rbd.csi.ceph.com"), Some(("shop", "data-pg-0")))),
                ("pv-other".to_owned(), volume(None, Some(("other", "data-pg-0")))),
            ]
            .into(),
            ..ClusterFacts::default()
        }
    }

    fn found(spec: Value, facts: &ClusterFacts) -> Vec<String> {
        let object = json!({"metadata": {"name": "pg"}, "spec": spec});
        let findings = testing::findings(&RULE, &object, facts);
        findings.into_iter().map(|finding| finding.found).collect()
    }

    fn of_template(spec: Value, facts: &ClusterFacts) -> Vec<String> {
        found(json!({"volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": spec}]}), facts)
    }

    fn of_claim(name: &str) -> Vec<String> {
        let volumes = json!([{"name": "data", "persistentVolumeClaim": {"claimName": name}}]);
        found(json!({"template": {"spec": {"volumes": volumes}}}), &facts())
    }

    #[test]
    fn a_class_is_followed_to_its_provisioner() {
        assert!(of_template(json!({"storageClassName": "rbd"}), &facts()).is_empty());
        let local = ["class local of rancher.io/local-path"];
        assert_eq!(of_template(json!({"storageClassName": "local"}), &facts()), local);
        assert_eq!(of_template(json!({}), &facts()), local, "the default class");
        assert_eq!(
            of_template(json!({"storageClassName": "none"}), &facts()),
            ["none, which does not exist"]
        );
    }

    #[test]
    fn volumes_made_by_hand_offer_themselves_in_a_class_that_is_only_a_name() {
        let found = |volumes: &[(&str, Option<&str>)]| {
            let mut facts = facts();
            facts.volumes = volumes
                .iter()
                .map(|(name, driver)| {
                    let (driver, class) = (driver.map(str::to_owned), "by-hand".to_owned());
                    ((*name).to_owned(), Volume { driver, class, ..Volume::default() })
                })
                .collect();
            of_template(json!({"storageClassName": "by-hand"}), &facts)
        };
        let rbd = Some("rook-ceph.rbd.csi.ceph.com");
        assert!(found(&[("a", rbd), ("b", rbd)]).is_empty());
        assert_eq!(found(&[("a", rbd), ("b", None)]), ["volume b of no CSI driver"], "it may be either");
        assert_eq!(found(&[]), ["by-hand, which does not exist"]);
    }

    #[test]
    fn no_class_at_all_is_refused() {
        let mut facts = facts();
        facts.storage_classes.remove("local");
        assert_eq!(of_template(json!({}), &facts), ["absent, and the cluster has no default class"]);
    }

    #[test]
    fn a_volume_that_exists_already_is_known_by_its_driver() {
        assert!(of_template(json!({"storageClassName": "", "volumeName": "pv-rbd"}), &facts()).is_empty());
        let nfs = ["volume pv-nfs of no CSI driver"];
        assert_eq!(of_template(json!({"storageClassName": "rbd", "volumeName": "pv-nfs"}), &facts()), nfs);
        assert!(of_template(json!({"storageClassName": ""}), &facts()).is_empty(), "the reserved one");
        let mut unreserved = facts();
        unreserved.volumes.remove("pv-reserved");
        assert_eq!(of_template(json!({"storageClassName": ""}), &unreserved).len(), 1);
    }

    #[test]
    fn a_claim_the_pod_names_is_followed() {
        assert!(of_claim("on-rbd").is_empty(), "what it is bound to counts, not what it once asked for");
        assert!(of_claim("pending").is_empty());
        assert_eq!(of_claim("on-nfs"), ["volume pv-nfs of no CSI driver"]);
        assert_eq!(of_claim("floating").len(), 1);
        assert_eq!(of_claim("missing"), ["missing, which does not exist"]);
    }

    #[test]
    fn without_a_cluster_what_is_not_known_stays_open() {
        let facts = ClusterFacts { offline: true, ..facts() };
        let open = |spec: Value| {
            let object = json!({"metadata": {"name": "pg"}, "spec": spec});
            let findings = testing::findings(&RULE, &object, &facts);
            let open = |finding: Finding| (finding.found, finding.weight == Weight::Open);
            findings.into_iter().map(open).collect::<Vec<_>>()
        };
        let template = |spec: Value| {
            open(json!({"volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": spec}]}))
        };
        let only = |what: &str| [(format!("{what}, which only the cluster knows"), true)];
        assert_eq!(template(json!({"storageClassName": "none"})), only("none"));
        assert_eq!(template(json!({"volumeName": "pv-none"})), only("volume pv-none"));
        let claim = json!([{"name": "data", "persistentVolumeClaim": {"claimName": "missing"}}]);
        assert_eq!(open(json!({"template": {"spec": {"volumes": claim}}})), only("missing"));
        // What is known is judged as ever.
        assert!(template(json!({"storageClassName": "rbd"})).is_empty());
        let local = ("class local of rancher.io/local-path".to_owned(), false);
        assert_eq!(template(json!({"storageClassName": "local"})), [local]);
    }

    #[test]
    fn the_configured_class_goes_where_none_is_named() {
        let mut facts = facts();
        facts.config.storage_class = Some("rbd".to_owned());
        let mut object = json!({"spec": {"volumeClaimTemplates": [
            {"spec": {}}, {"spec": {"storageClassName": ""}}, {"spec": {"storageClassName": "local"}},
        ]}});
        fill(&mut object, &facts);
        let classes: Vec<&Value> = raw::list(&object, &["spec", "volumeClaimTemplates"])
            .iter()
            .map(|template| &template["spec"]["storageClassName"])
            .collect();
        assert_eq!(classes, ["rbd", "", "local"]);
    }
}
