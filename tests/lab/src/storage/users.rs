//! Rook's Ceph users for ceph-csi, with the capabilities that Rook gives them. They are in Ceph from its
//! first moment (see [`crate::ceph`]), so that nobody has to ask the monitor for them.

use anyhow::Result;

use crate::ceph;
use crate::lab::Lab;

/// The user that maps images on nodes.
const NODE: &str = "csi-rbd-node";
/// The user that makes and deletes images.
const PROVISIONER: &str = "csi-rbd-provisioner";
/// Entity and capabilities of each (rook: pkg/operator/ceph/csi/secrets.go).
pub(crate) const ENTITIES: [(&str, &[(&str, &str)]); 2] = [
    ("client.csi-rbd-node", &[("mon", "profile rbd"), ("mgr", "allow rw"), ("osd", "profile rbd")]),
    (
        "client.csi-rbd-provisioner",
        &[("mon", "profile rbd, allow command 'osd blocklist'"), ("mgr", "allow rw"), ("osd", "profile rbd")],
    ),
];

/// What the cluster's Secrets are made of.
pub(super) struct Keys {
    /// The Ceph cluster's id.
    pub(super) fsid: String,
    /// Key of client.admin.
    pub(super) admin: String,
    /// Key of mon.
    pub(super) monitor: String,
    /// Name and key of the user that maps images on nodes.
    pub(super) node: (&'static str, String),
    /// Name and key of the user that makes and deletes images.
    pub(super) provisioner: (&'static str, String),
}

/// The keys of Rook's users and of the cluster itself.
pub(super) fn keys(lab: &Lab) -> Result<Keys> {
    let user =
        |name: &'static str| Ok::<_, anyhow::Error>((name, ceph::key(lab, &format!("client.{name}"))?));
    Ok(Keys {
        fsid: ceph::fsid(lab)?,
        admin: ceph::key(lab, "client.admin")?,
        monitor: ceph::key(lab, "mon.")?,
        node: user(NODE)?,
        provisioner: user(PROVISIONER)?,
    })
}
