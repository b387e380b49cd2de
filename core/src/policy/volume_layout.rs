//! `volume-layout`: the whole database lies on volumes that outlive its pod, and that can be snapshotted together.
//!
//! **Intent.** Data on an emptyDir goes with the pod, and data on a hostPath stays behind on the node. Volumes in different
//! pools are not backed up and restored together, so that a backup of them would not be one. A volume that many nodes may
//! mount lets two of them write.
//!
//! **Fields.** What `PGDATA` (said, or the default of well-known images), the folder of the write-ahead log and the volumes
//! mounted inside the data lie on; pool and cluster of their classes; the access modes of their claims. Volumes that hold
//! no part of the database (`/dev/shm`, `/tmp`, scripts, scratch space of sidecars) are nobody's concern.
//!
//! **Fix.** One claim, mounted at or above `PGDATA`, or several of one storage class.

use super::claims::{DataClaim, Pool, database_claims_at, resolve};
use super::layout::{Ground, Place, places};
use super::{Check, Finding, Floor, Refusal, Rule, Subject, Target, Weight};
use crate::preflight::DEFAULT_DATA_DIRECTORY;

/// The rule.
pub const RULE: Rule = Rule {
    id: "volume-layout",
    intent: "The whole database lies on persistent volumes of one node at a time that can be snapshotted together.",
    fields: &[
        "spec.template.spec.containers[*].env[PGDATA]",
        "spec.template.spec.containers[*].env[POSTGRES_INITDB_WALDIR]",
        "spec.template.spec.containers[*].volumeMounts",
        "spec.template.spec.volumes",
        "spec.volumeClaimTemplates[*].spec.accessModes",
    ],
    fix: "mount a claim of Ceph RBD at or above PGDATA, and keep the whole database on it or on claims of the same class",
    targets: &[Target::StatefulSet],
    refusal: Refusal::Policy,
    check: Check::State(check),
    filling: None,
    floor: Floor::silent(
        "where a database lies takes more than CEL to read, and its classes have to be looked up",
    ),
};

/// The access mode by which several nodes may mount and write.
const MANY_WRITERS: &str = "ReadWriteMany";

fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let places = places(subject.object);
    let mut findings = lost_with_the_pod(&places);
    findings.extend(places.iter().filter(|place| place.shadowed && !place.init).map(|place| {
        let found = format!("{}, shadowed by the image's volume", place.path);
        Finding::new(place.field.clone(), found, "a folder on the claim itself")
            .fix(format!(
                "mount the claim at {DEFAULT_DATA_DIRECTORY}: up to version 17 the image declares a volume there, which \
                 containerd mounts empty over whatever is mounted further up"
            ))
            .warning()
    }));
    let claims = database_claims_at(subject.object, &places);
    findings.extend(in_several_pools(subject, &claims, &places));
    for claim in &claims {
        let modes = claim.access_modes(subject.facts);
        if modes.iter().any(|mode| mode == MANY_WRITERS) {
            let field = claim.field_of("accessModes");
            findings.push(
                Finding::new(field, modes.join(", "), "ReadWriteOnce")
                    .fix("make the claim ReadWriteOnce, or ReadWriteOncePod: only one node may write"),
            );
        }
    }
    findings
}

/// Parts of the database that lie on no claim.
fn lost_with_the_pod(places: &[Place<'_>]) -> Vec<Finding> {
    // A second server on a scratch volume beside a good one is a rehearsal, not the database.
    let database_is_safe = places.iter().any(|place| matches!(place.ground, Ground::Claim(_)));
    let is_part = |place: &Place<'_>| {
        place.field.contains("WAL") || place.field.ends_with(']') && place.field.contains("volumeMounts[")
    };
    let lost = places.iter().filter(|place| !place.init).filter_map(|place| {
        let found = match place.ground {
            Ground::Claim(_) => return None,
            Ground::Volume(name, kind) => format!("{}, which lies on the {kind} {name}", place.path),
            Ground::Container => format!("{}, which lies on no volume", place.path),
        };
        let finding = Finding::new(place.field.clone(), found, "a folder on a persistent volume claim");
        let by_image_alone = place.ground == Ground::Container && !place.named;
        let finding = match place.ground {
            Ground::Container => {
                finding.fix("mount a claim at or above this folder, or name a folder on one in PGDATA")
            }
            _ => finding,
        };
        Some(if by_image_alone || (database_is_safe && !is_part(place)) {
            finding.warning()
        } else {
            finding
        })
    });
    lost.collect()
}

/// The claims of a database that no single snapshot covers.
fn in_several_pools(
    subject: &Subject<'_>,
    claims: &[DataClaim<'_>],
    places: &[Place<'_>],
) -> Option<Finding> {
    let holding: Vec<&DataClaim<'_>> = claims.iter().filter(|claim| claim.holds(places)).collect();
    let pool = |claim: &DataClaim<'_>| resolve(claim, subject.request.namespace, subject.facts).ok()?.pool();
    let names: Vec<&str> = holding.iter().map(|claim| claim.volume).collect();
    let names = names.join(", ");
    let wanted = "one volume, or volumes of one pool";
    let fix = "use one storage class for all of them, or keep the database on one volume";
    let pools: Vec<Option<Pool>> = holding.iter().map(|claim| pool(claim)).collect();
    if holding.len() < 2 {
        return None;
    }
    let templated = holding.iter().all(|claim| claim.is_templated());
    let field = if templated { "spec.volumeClaimTemplates" } else { "spec.template.spec.volumes" };
    if pools.iter().all(|pool| pool.is_some() && *pool == pools[0]) {
        return None;
    }
    let known: Vec<String> = pools.iter().flatten().map(Pool::to_string).collect();
    if known.len() < pools.len() {
        let found = format!("the volumes {names} in pools that are not known");
        let weight = if subject.facts.offline { Weight::Open } else { Weight::Warning };
        return Some(Finding { weight, ..Finding::new(field, found, wanted).fix(fix) });
    }
    let found = format!("the volumes {names} in the pools {}", known.join(", "));
    Some(Finding::new(field, found, wanted).fix(fix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{ClusterFacts, StorageClass, testing};
    use serde_json::{Value, json};

    fn found(container: Value, volumes: Value, templates: &[(&str, &str, &str)]) -> Vec<(String, Weight)> {
        let templates: Vec<Value> = templates
            .iter()
            .map(|(name, class, mode)| {
                json!({"metadata": {"name": name}, "spec": {"storageClassName": class, "accessModes": [mode]}})
            })
            .collect();
        let object = json!({"metadata": {"name": "pg"}, "spec": {
            "template": {"spec": {"containers": [container], "volumes": volumes}},
            "volumeClaimTemplates": templates,
        }});
        let class = |pool: &str| StorageClass {
            provisioner: "rook-ceph.rbd.csi.ceph.com".to_owned(),
            parameters: [("clusterID", "rook-ceph"), ("pool", pool)]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            ..StorageClass::default()
        };
        let facts = ClusterFacts {
            storage_classes: [("rbd".to_owned(), class("a")), ("fast".to_owned(), class("b"))].into(),
            ..ClusterFacts::default()
        };
        let findings = testing::findings(&RULE, &object, &facts);
        findings.into_iter().map(|finding| (finding.found, finding.weight)).collect()
    }

    const DATA: &str = "/var/lib/postgresql/data";

    #[test]
    fn data_that_goes_with_the_pod_is_refused() {
        for (volume, kind) in [
            (json!({"name": "scratch", "emptyDir": {}}), "emptyDir"),
            (json!({"name": "scratch", "hostPath": {"path": "/pg"}}), "hostPath"),
            (json!({"name": "scratch", "ephemeral": {"volumeClaimTemplate": {}}}), "ephemeral"),
        ] {
            let container =
                json!({"image": "postgres:15", "volumeMounts": [{"name": "scratch", "mountPath": DATA}]});
            let wanted = (format!("{DATA}, which lies on the {kind} scratch"), Weight::Full);
            assert_eq!(found(container, json!([volume]), &[]), [wanted]);
        }
        let named = json!({"image": "any:1", "env": [{"name": "PGDATA", "value": "/pg"}]});
        assert_eq!(found(named, json!([]), &[]), [("/pg, which lies on no volume".to_owned(), Weight::Full)]);
        let unnamed = found(json!({"image": "postgres:15"}), json!([]), &[]);
        assert_eq!(unnamed[0].1, Weight::Warning, "that the image keeps it there is only known of the image");
    }

    #[test]
    fn scratch_volumes_beside_the_data_are_nobodys_concern() {
        let container = json!({"image": "postgres:15", "volumeMounts": [
            {"name": "data", "mountPath": DATA}, {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "run", "mountPath": "/var/run/postgresql"}, {"name": "run", "mountPath": format!("{DATA}/pg_stat_tmp")},
        ]});
        let volumes =
            json!([{"name": "shm", "emptyDir": {"medium": "Memory"}}, {"name": "run", "emptyDir": {}}]);
        assert!(found(container, volumes, &[("data", "rbd", "ReadWriteOnce")]).is_empty());
    }

    #[test]
    fn a_log_that_goes_with_the_pod_is_refused() {
        let container = json!({"image": "postgres:15", "env": [{"name": "POSTGRES_INITDB_WALDIR", "value": "/wal"}], "volumeMounts": [
            {"name": "data", "mountPath": DATA}, {"name": "wal", "mountPath": "/wal"},
        ]});
        let lost =
            found(container, json!([{"name": "wal", "emptyDir": {}}]), &[("data", "rbd", "ReadWriteOnce")]);
        assert_eq!(lost, [("/wal, which lies on the emptyDir wal".to_owned(), Weight::Full)]);
    }

    #[test]
    fn several_volumes_pass_in_one_pool() {
        let container = json!({"image": "postgres:15", "env": [{"name": "POSTGRES_INITDB_WALDIR", "value": "/wal"}], "volumeMounts": [
            {"name": "data", "mountPath": DATA}, {"name": "wal", "mountPath": "/wal"},
        ]});
        let of = |wal: &str| {
            let claims = [("data", "rbd", "ReadWriteOnce"), ("wal", wal, "ReadWriteOnce")];
            found(container.clone(), json!([]), &claims)
        };
        assert!(of("rbd").is_empty());
        let apart = of("fast");
        assert_eq!(apart[0].1, Weight::Full);
        assert!(apart[0].0.ends_with("data, wal in the pools rook-ceph/a, rook-ceph/b"), "{}", apart[0].0);
        assert_eq!(of("unheard-of")[0].1, Weight::Warning);
    }

    #[test]
    fn a_volume_for_many_writers_is_refused_for_data_only() {
        let container = json!({"image": "postgres:15", "volumeMounts": [
            {"name": "data", "mountPath": DATA}, {"name": "dumps", "mountPath": "/dumps"},
        ]});
        let of = |data: &str| {
            found(container.clone(), json!([]), &[("data", "rbd", data), ("dumps", "rbd", MANY_WRITERS)])
        };
        assert!(of("ReadWriteOnce").is_empty() && of("ReadWriteOncePod").is_empty());
        assert_eq!(of(MANY_WRITERS), [(MANY_WRITERS.to_owned(), Weight::Full)]);
    }
}
