//! The claims of a StatefulSet and what stands behind them: which provisioner, and what it does on deletion.
//!
//! Kubernetes' own order is followed: the legacy annotation before the field, no class means the newest default class,
//! the empty class means a volume that exists already, and a claim that is bound has the driver of its volume.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::Value;

use super::layout::{Ground, Place, places};
use super::{ClusterFacts, Finding, Request, Target, Weight, json};
use crate::volume::is_rbd_driver;

/// Marks the class that claims without one get.
const DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";
/// Its older spelling, which the API server still honours.
const DEFAULT_CLASS_BETA: &str = "storageclass.beta.kubernetes.io/is-default-class";
/// Names the class in the way that came before `storageClassName`; it still wins over it.
const LEGACY_CLASS: &str = "volume.beta.kubernetes.io/storage-class";
/// What a class without a reclaim policy does.
const DEFAULT_RECLAIM_POLICY: &str = "Delete";

/// What howdah needs to know of a StorageClass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StorageClass {
    /// Who makes the volumes.
    pub provisioner: String,
    /// What happens to a volume whose claim is deleted.
    pub reclaim_policy: String,
    /// Whether claims without a class get this one.
    pub default: bool,
    /// When it was made, in the API server's notation, which sorts by time.
    pub created: String,
    /// What it tells the provisioner.
    pub parameters: BTreeMap<String, String>,
}

impl StorageClass {
    /// Reads a storage.k8s.io/v1 StorageClass.
    #[must_use]
    pub fn from_json(object: &Value) -> Self {
        let annotations = json::strings(object, &["metadata", "annotations"]);
        let text = |path: &[&str]| json::string(object, path).unwrap_or_default().to_owned();
        Self {
            provisioner: text(&["provisioner"]),
            reclaim_policy: json::string(object, &["reclaimPolicy"])
                .unwrap_or(DEFAULT_RECLAIM_POLICY)
                .to_owned(),
            default: [DEFAULT_CLASS, DEFAULT_CLASS_BETA]
                .iter()
                .any(|key| annotations.get(*key).is_some_and(|value| value == "true")),
            created: text(&["metadata", "creationTimestamp"]),
            parameters: json::strings(object, &["parameters"]),
        }
    }
}

/// What howdah needs to know of a PersistentVolumeClaim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// The class it names; `Some("")` asks for a volume that exists already.
    pub storage_class: Option<String>,
    /// The volume it is bound to.
    pub volume: Option<String>,
    /// How it may be mounted.
    pub access_modes: Vec<String>,
}

impl Claim {
    /// Reads a v1 PersistentVolumeClaim.
    #[must_use]
    pub fn from_json(object: &Value) -> Self {
        Self {
            storage_class: class_named_by(object),
            volume: volume_named_by(object),
            access_modes: access_modes_of(object),
        }
    }
}

/// What howdah needs to know of a PersistentVolume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Volume {
    /// The CSI driver; `None` for the kinds of volume that have none.
    pub driver: Option<String>,
    /// What happens to it when its claim is deleted.
    pub reclaim_policy: String,
    /// The class that it offers itself to; empty where it names none.
    pub class: String,
    /// Namespace and name of the claim it is bound to or reserved for.
    pub claim: Option<(String, String)>,
    /// What the CSI driver is told about it: for one that was provisioned, the parameters of its class at that time.
    pub attributes: BTreeMap<String, String>,
    /// The node it can be mounted on, where that is only one.
    pub node: Option<String>,
}

impl Volume {
    /// Reads a v1 PersistentVolume.
    #[must_use]
    pub fn from_json(object: &Value) -> Self {
        let text = |path: &[&str]| json::string(object, path).map(str::to_owned);
        let claim = text(&["spec", "claimRef", "namespace"]).zip(text(&["spec", "claimRef", "name"]));
        Self {
            driver: text(&["spec", "csi", "driver"]),
            // A volume made by hand keeps its data unless it says otherwise.
            reclaim_policy: text(&["spec", "persistentVolumeReclaimPolicy"])
                .unwrap_or_else(|| "Retain".to_owned()),
            class: class_named_by(object).unwrap_or_default(),
            claim,
            attributes: json::strings(object, &["spec", "csi", "volumeAttributes"]),
            node: only_node_of(object),
        }
    }

    /// Whether a claim of this namespace and name, which asks for this class, may be bound to it: it is reserved for the
    /// claim, or for nobody in a class that is only a name.
    #[must_use]
    pub fn suits(&self, namespace: &str, claim: &str, class: &str) -> bool {
        self.class == class
            && match &self.claim {
                Some((space, name)) => space == namespace && name == claim,
                None => !class.is_empty(),
            }
    }
}

/// The one node a volume can be mounted on: the one it is bound to, or whose disk it is.
fn only_node_of(volume: &Value) -> Option<String> {
    let terms = json::list(volume, &["spec", "nodeAffinity", "required", "nodeSelectorTerms"]);
    let bound = super::node_pinning::only_node(terms).map(str::to_owned);
    let on_a_disk =
        || json::at(volume, &["spec", "hostPath"]).or_else(|| json::at(volume, &["spec", "local"]));
    bound.or_else(|| on_a_disk().map(|_| "the node whose disk it is".to_owned()))
}

/// What has to be looked up before a request can be judged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needed {
    /// Claims in the namespace of the request; the volumes they are bound to are needed, too.
    pub claims: BTreeSet<String>,
    /// Volumes.
    pub volumes: BTreeSet<String>,
    /// Claims whose volume nobody provisions, with their class: the volumes that suit them are needed, unless they turn out
    /// to be bound.
    pub by_hand: BTreeMap<String, String>,
}

/// Names what [`super::validate`] has to know about the claims of `request`; [`super::mutate`] needs none of it.
#[must_use]
pub fn needed(request: &Request<'_>, classes: &BTreeMap<String, StorageClass>) -> Needed {
    let mut needed = Needed::default();
    let objects = [request.object, request.old_object];
    let protected = objects.iter().flatten().any(|object| super::is_protected(object));
    if request.target != Target::StatefulSet || request.object.is_none() || !protected {
        return needed;
    }
    // The old object is judged, too: its inline claims may be others.
    for object in objects.into_iter().flatten() {
        for claim in data_claims(object) {
            match claim.template {
                None => {
                    needed.claims.insert(claim.name);
                }
                Some(template) => {
                    if let Some(volume) = volume_named_by(template) {
                        needed.volumes.insert(volume);
                    } else if let Some(class) = class_named_by(template)
                        && is_by_hand(&class, classes)
                    {
                        needed.claims.insert(claim.name.clone());
                        needed.by_hand.insert(claim.name, class);
                    }
                }
            }
        }
    }
    needed
}

/// A claim of a StatefulSet: made from a template, or named by the pod.
#[derive(Debug)]
pub(super) struct DataClaim<'a> {
    /// Where the class or the claim is named.
    pub field: String,
    /// Name of the claim of the first pod.
    pub name: String,
    /// Name of the volume in the pod.
    pub volume: &'a str,
    /// The template it is made from; `None` for a claim the pod names.
    template: Option<&'a Value>,
}

impl DataClaim<'_> {
    /// Whether one of these folders of the database lies on it.
    pub fn holds(&self, places: &[Place<'_>]) -> bool {
        places.iter().any(|place| place.ground == Ground::Claim(self.volume))
    }

    /// Whether the claim is made from a template, and with it belongs to the StatefulSet.
    pub fn is_templated(&self) -> bool {
        self.template.is_some()
    }

    /// How it may be mounted; empty when that is not known.
    pub fn access_modes(&self, facts: &ClusterFacts) -> Vec<String> {
        match self.template {
            Some(template) => access_modes_of(template),
            None => facts.claims.get(&self.name).map(|claim| claim.access_modes.clone()).unwrap_or_default(),
        }
    }

    /// A field of its spec where it is made from a template; else where the pod names it.
    pub fn field_of(&self, name: &str) -> String {
        match self.template {
            Some(_) => format!("spec.volumeClaimTemplates[{}].spec.{name}", self.volume),
            None => self.field.clone(),
        }
    }
}

/// What stands behind a claim.
#[derive(Debug)]
pub(super) struct Backing {
    /// The class or volume, as a user would call it.
    pub what: String,
    /// The provisioner, or the driver of a volume that exists already.
    pub provisioner: String,
    /// Whether the data is deleted with the claim.
    pub reclaimed: bool,
    /// What the provisioner or the driver is told.
    pub parameters: BTreeMap<String, String>,
    /// The node it can be mounted on, where that is only one.
    pub node: Option<String>,
}

impl Backing {
    /// Where the images lie; `None` when that is not known.
    pub fn pool(&self) -> Option<Pool> {
        let parameter = |key: &str| self.parameters.get(key).filter(|value| !value.is_empty()).cloned();
        Some(Pool { cluster: parameter("clusterID")?, pool: parameter("pool")? })
    }
}

/// A pool of a Ceph cluster: images of one can be snapshotted at the same instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pool {
    cluster: String,
    pool: String,
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.pool)
    }
}

/// Why nothing is known to stand behind a claim.
#[derive(Debug)]
pub(super) struct Unresolved {
    /// What was found.
    pub found: String,
    /// How to fix it, as an imperative.
    pub fix: String,
    /// What a finding of it weighs: it may well exist where the facts are [`ClusterFacts::offline`] and do not have it.
    pub weight: Weight,
}

impl Unresolved {
    /// Something that does not exist, or that only the cluster knows.
    fn missing(name: &str, fix: impl Into<String>, facts: &ClusterFacts) -> Self {
        let what = if facts.offline { "which only the cluster knows" } else { "which does not exist" };
        Self { found: format!("{name}, {what}"), fix: fix.into(), weight: Self::weight(facts) }
    }

    fn weight(facts: &ClusterFacts) -> Weight {
        if facts.offline { Weight::Open } else { Weight::Full }
    }

    /// The finding of a rule that wants something of what stands behind the claim.
    pub fn finding(self, field: impl Into<String>, wanted: &str) -> Finding {
        Finding { weight: self.weight, ..Finding::new(field, self.found, wanted).fix(self.fix) }
    }
}

/// The claims that hold the database; all of them where it is not known on which it lies.
pub(super) fn database_claims(object: &Value) -> Vec<DataClaim<'_>> {
    database_claims_at(object, &places(object))
}

/// The same where it is known already which folders it has.
pub(super) fn database_claims_at<'a>(object: &'a Value, places: &[Place<'_>]) -> Vec<DataClaim<'a>> {
    let mut claims = data_claims(object);
    if claims.iter().any(|claim| claim.holds(places)) {
        claims.retain(|claim| claim.holds(places));
    }
    claims
}

/// Every claim of a StatefulSet.
pub(super) fn data_claims(object: &Value) -> Vec<DataClaim<'_>> {
    let set = json::string(object, &["metadata", "name"]).unwrap_or_default();
    let ordinal = json::integer(object, &["spec", "ordinals", "start"]).unwrap_or(0);
    let name_of = |value| json::string(value, &["name"]).unwrap_or("?");
    let templates = json::list(object, &["spec", "volumeClaimTemplates"]);
    let template_name = |template| json::string(template, &["metadata", "name"]).unwrap_or("?");
    let mut claims: Vec<DataClaim<'_>> = templates
        .iter()
        .map(|template| DataClaim {
            field: format!("spec.volumeClaimTemplates[{}].spec.storageClassName", template_name(template)),
            name: format!("{}-{set}-{ordinal}", template_name(template)),
            volume: template_name(template),
            template: Some(template),
        })
        .collect();
    for volume in json::list(object, &["spec", "template", "spec", "volumes"]) {
        // A template of the same name replaces the volume of the pod.
        if templates.iter().any(|template| template_name(template) == name_of(volume)) {
            continue;
        }
        if let Some(claim) = json::string(volume, &["persistentVolumeClaim", "claimName"]) {
            let path = "spec.template.spec.volumes";
            claims.push(DataClaim {
                field: format!("{path}[{}].persistentVolumeClaim.claimName", name_of(volume)),
                name: claim.to_owned(),
                volume: name_of(volume),
                template: None,
            });
        }
    }
    claims
}

/// Follows a claim to its provisioner.
pub(super) fn resolve(
    claim: &DataClaim<'_>,
    namespace: &str,
    facts: &ClusterFacts,
) -> Result<Backing, Unresolved> {
    let existing = facts.claims.get(&claim.name);
    let Some(template) = claim.template else {
        let Some(existing) = existing else {
            let fix = "create the claim before the StatefulSet, or use volumeClaimTemplates";
            return Err(Unresolved::missing(&claim.name, fix, facts));
        };
        let class = existing.storage_class.as_deref();
        return match existing.volume.as_deref().or_else(|| suiting(claim, class, namespace, facts)) {
            Some(volume) => resolve_volume(volume, facts),
            None if class == Some("") => Err(Unresolved {
                found: format!("{}, which has no class and no volume yet", claim.name),
                fix: "name its volume in spec.volumeName of the claim".to_owned(),
                weight: Unresolved::weight(facts),
            }),
            None => resolve_class(class, facts),
        };
    };
    if let Some(volume) = volume_named_by(template) {
        return resolve_volume(&volume, facts);
    }
    let class = class_named_by(template);
    let bound = existing.and_then(|existing| existing.volume.as_deref());
    let by_hand = class.as_deref().is_some_and(|class| is_by_hand(class, &facts.storage_classes));
    match bound.filter(|_| by_hand).or_else(|| suiting(claim, class.as_deref(), namespace, facts)) {
        Some(volume) => resolve_volume(volume, facts),
        None if class.as_deref() == Some("") => Err(Unresolved {
            found: "\"\" (no class) and no volume is reserved for the claim".to_owned(),
            fix: format!("name a class, or reserve a volume with claimRef {namespace}/{}", claim.name),
            weight: Unresolved::weight(facts),
        }),
        None => resolve_class(class.as_deref(), facts),
    }
}

/// Whether nobody provisions volumes of this class: it is none, or only a name by which volumes are bound that somebody
/// made.
#[must_use]
pub fn is_by_hand(class: &str, classes: &BTreeMap<String, StorageClass>) -> bool {
    class.is_empty() || !classes.contains_key(class)
}

/// The volume that a claim without one gets where nobody provisions it. Of several it may be any, so the first that is no
/// image of Ceph counts.
fn suiting<'a>(
    claim: &DataClaim<'_>,
    class: Option<&str>,
    namespace: &str,
    facts: &'a ClusterFacts,
) -> Option<&'a str> {
    let class = class.filter(|class| is_by_hand(class, &facts.storage_classes))?;
    let suiting = facts.volumes.iter().filter(|(_, volume)| volume.suits(namespace, &claim.name, class));
    let is_reserved = |volume: &Volume| volume.claim.is_some();
    let is_rbd = |volume: &Volume| volume.driver.as_deref().is_some_and(is_rbd_driver);
    suiting.min_by_key(|(_, volume)| (!is_reserved(volume), is_rbd(volume))).map(|(name, _)| name.as_str())
}

fn resolve_class(name: Option<&str>, facts: &ClusterFacts) -> Result<Backing, Unresolved> {
    let default = || default_class(&facts.storage_classes);
    let Some(name) = name.or_else(default) else {
        let what = if facts.offline { "only the cluster knows its" } else { "the cluster has no" };
        return Err(Unresolved {
            found: format!("absent, and {what} default class"),
            fix: "name a storage class of Ceph RBD".to_owned(),
            weight: Unresolved::weight(facts),
        });
    };
    match facts.storage_classes.get(name) {
        Some(class) => Ok(Backing {
            what: format!("class {name}"),
            provisioner: class.provisioner.clone(),
            reclaimed: class.reclaim_policy == "Delete",
            parameters: class.parameters.clone(),
            node: None,
        }),
        None => {
            let fix = "name a storage class of Ceph RBD that exists (kubectl get storageclass)";
            Err(Unresolved::missing(name, fix, facts))
        }
    }
}

fn resolve_volume(name: &str, facts: &ClusterFacts) -> Result<Backing, Unresolved> {
    match facts.volumes.get(name) {
        Some(volume) => Ok(Backing {
            what: format!("volume {name}"),
            provisioner: volume.driver.clone().unwrap_or_else(|| "no CSI driver".to_owned()),
            reclaimed: volume.reclaim_policy == "Delete",
            parameters: volume.attributes.clone(),
            node: volume.node.clone(),
        }),
        None => {
            let fix = "create the volume before the StatefulSet";
            Err(Unresolved::missing(&format!("volume {name}"), fix, facts))
        }
    }
}

/// The class that claims without one get: of several defaults the newest, and of equally new ones the first by name.
fn default_class(classes: &BTreeMap<String, StorageClass>) -> Option<&str> {
    let defaults = classes.iter().filter(|(_, class)| class.default);
    defaults.rev().max_by(|a, b| a.1.created.cmp(&b.1.created)).map(|(name, _)| name.as_str())
}

/// The class that a claim or a template names.
pub(super) fn class_named_by(claim: &Value) -> Option<String> {
    let annotation = json::string(claim, &["metadata", "annotations", LEGACY_CLASS]);
    annotation.or_else(|| json::string(claim, &["spec", "storageClassName"])).map(str::to_owned)
}

fn access_modes_of(claim: &Value) -> Vec<String> {
    let modes = json::list(claim, &["spec", "accessModes"]);
    modes.iter().filter_map(|mode| mode.as_str().map(str::to_owned)).collect()
}

fn volume_named_by(claim: &Value) -> Option<String> {
    json::string(claim, &["spec", "volumeName"]).filter(|name| !name.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn class(provisioner: &str, default: bool, created: &str) -> StorageClass {
        StorageClass {
            provisioner: provisioner.to_owned(),
            reclaim_policy: "Delete".to_owned(),
            default,
            created: created.to_owned(),
            ..StorageClass::default()
        }
    }

    #[test]
    fn the_newest_default_class_wins_and_then_the_name() {
        let mut classes = BTreeMap::from([
            ("a".to_owned(), class("a", true, "2026-01-01T00:00:00Z")),
            ("b".to_owned(), class("b", true, "2026-02-01T00:00:00Z")),
            ("c".to_owned(), class("c", true, "2026-02-01T00:00:00Z")),
            ("d".to_owned(), class("d", false, "2026-03-01T00:00:00Z")),
        ]);
        assert_eq!(default_class(&classes), Some("b"));
        classes.retain(|_, class| !class.default);
        assert_eq!(default_class(&classes), None);
    }

    #[test]
    fn the_legacy_annotation_wins_over_the_field() {
        let claim =
            json!({"metadata": {"annotations": {LEGACY_CLASS: "old"}}, "spec": {"storageClassName": "new"}});
        assert_eq!(class_named_by(&claim).as_deref(), Some("old"));
        assert_eq!(class_named_by(&json!({"spec": {"storageClassName": null}})), None);
    }

    #[test]
    fn objects_of_the_api_server_are_read() {
        let read = StorageClass::from_json(&json!({
            "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z", "annotations": {DEFAULT_CLASS_BETA: "true"}},
            "provisioner": "rook-ceph.rbd.csi.ceph.com",
        }));
        assert_eq!(read, class("rook-ceph.rbd.csi.ceph.com", true, "2026-01-01T00:00:00Z"));
        let volume = Volume::from_json(&json!({"spec": {
            "csi": {"driver": "rbd.csi.ceph.com"},
            "claimRef": {"namespace": "shop", "name": "data-pg-0"},
        }}));
        assert_eq!(volume.driver.as_deref(), Some("rbd.csi.ceph.com"));
        assert_eq!(volume.reclaim_policy, "Retain");
        assert_eq!(volume.claim, Some(("shop".to_owned(), "data-pg-0".to_owned())));
    }

    #[test]
    fn only_what_has_to_be_looked_up_is_needed() {
        let object = json!({
            "metadata": {"name": "pg", "labels": {"howdah.dev/protect": "true"}},
            "spec": {
                "ordinals": {"start": 3},
                "template": {"spec": {"volumes": [
                    {"name": "inline", "persistentVolumeClaim": {"claimName": "by-hand"}},
                    {"name": "data", "persistentVolumeClaim": {"claimName": "replaced by the template"}},
                    {"name": "tmp", "emptyDir": {}},
                ]}},
                "volumeClaimTemplates": [
                    {"metadata": {"name": "data"}, "spec": {"storageClassName": ""}},
                    {"metadata": {"name": "wal"}, "spec": {"storageClassName": "", "volumeName": "pv-wal"}},
                    {"metadata": {"name": "log"}, "spec": {"storageClassName": "rook-ceph-block"}},
                    {"metadata": {"name": "old"}, "spec": {"storageClassName": "manual"}},
                ],
            },
        });
        let request = |object| Request::look("shop", "pg", object);
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let classes = BTreeMap::from([("rook-ceph-block".to_owned(), class("rbd", false, ""))]);
        assert_eq!(
            needed(&request(&object), &classes),
            Needed {
                claims: set(&["by-hand", "data-pg-3", "old-pg-3"]),
                volumes: set(&["pv-wal"]),
                by_hand: [("data-pg-3", ""), ("old-pg-3", "manual")]
                    .map(|(claim, class)| (claim.to_owned(), class.to_owned()))
                    .into(),
            }
        );
        assert_eq!(needed(&request(&json!({"spec": object["spec"]})), &classes), Needed::default());
    }
}
