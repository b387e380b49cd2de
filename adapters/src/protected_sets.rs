//! `ProtectedSets`: the protected StatefulSets of one namespace, where the API server finds them without howdah.
//!
//! A ValidatingAdmissionPolicy sees one request and cannot look its parent up. The webhook therefore keeps this list,
//! and the policy reads it as its parameter: `kubectl scale --replicas=2` stays refused while no webhook serves.
//! A kind of its own, so that the webhook needs no right to anybody's ConfigMaps.

use howdah_core::policy::floor::ProtectedSet;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// Which StatefulSets are protected, and by which rules. Kept by howdah's webhook; what is written by hand is replaced.
#[derive(Clone, Debug, CustomResource, Deserialize, Serialize, KubeSchema, PartialEq, Eq)]
#[kube(
    group = "howdah.dev",
    version = "v1alpha1",
    kind = "ProtectedSets",
    plural = "protectedsets",
    singular = "protectedsets",
    category = "howdah",
    namespaced,
    derive = "PartialEq",
    doc = "The protected StatefulSets of a namespace, kept by howdah's webhook: the API server refuses by it what would harm them while no webhook serves.",
    printcolumn(name = "Sets", type_ = "string", json_path = ".spec.sets[*].name"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ProtectedSetsSpec {
    /// Those whose mode is enforce, in the order of their names.
    #[serde(default)]
    pub sets: Vec<ProtectedSet>,
}
