//! The report of the background audit: one object per namespace, its content is `core`'s.
//!
//! A resource of our own, and not a PolicyReport: that one has two groups that compete (`wgpolicyk8s.io`, then
//! `openreports.io`), neither is part of Kubernetes, and to bring either along would fight whoever installed it first.
//! Ours has the same parts (a summary, results with rule, effect and message), is written by one replica, only when its
//! content changes, and is bounded, so that it can never flood etcd.

use howdah_core::audit::Report;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// The name of the one report of a namespace.
pub const NAME: &str = "howdah";

/// What the last audit of the namespace found. Written by howdah; what others write into it is overwritten.
#[derive(Clone, Debug, CustomResource, Deserialize, Serialize, KubeSchema, PartialEq, Eq)]
#[kube(
    group = "howdah.dev",
    version = "v1alpha1",
    kind = "HowdahReport",
    plural = "howdahreports",
    shortname = "hwr",
    category = "howdah",
    namespaced,
    derive = "PartialEq",
    doc = "What the protected StatefulSets of a namespace violate; written by howdah, gone when there is nothing to say.",
    printcolumn = r#"{"name": "Deny", "type": "integer", "jsonPath": ".spec.summary.deny"}"#,
    printcolumn = r#"{"name": "Warn", "type": "integer", "jsonPath": ".spec.summary.warn"}"#,
    printcolumn = r#"{"name": "Audit", "type": "integer", "jsonPath": ".spec.summary.audit"}"#,
    printcolumn = r#"{"name": "Exempt", "type": "integer", "jsonPath": ".spec.summary.exempt"}"#,
    printcolumn = r#"{"name": "Left-out", "type": "integer", "jsonPath": ".spec.leftOut"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct HowdahReportSpec {
    /// What was found.
    #[serde(flatten)]
    pub report: Report,
}
