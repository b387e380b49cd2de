//! Rook's Ceph users for ceph-csi, with the capabilities that Rook gives them.

use std::thread;

use anyhow::{Result, anyhow};

use crate::lab::Lab;

/// A user of Rook's: name without `client.`, and capabilities as `ceph auth` takes them
/// (rook: pkg/operator/ceph/csi/secrets.go).
struct User {
    name: &'static str,
    capabilities: [&'static str; 6],
}

const NODE: User = User {
    name: "csi-rbd-node",
    capabilities: ["mon", "profile rbd", "mgr", "allow rw", "osd", "profile rbd"],
};
const PROVISIONER: User = User {
    name: "csi-rbd-provisioner",
    capabilities: [
        "mon",
        "profile rbd, allow command 'osd blocklist'",
        "mgr",
        "allow rw",
        "osd",
        "profile rbd",
    ],
};

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

/// Creates the users that are missing and gives all keys.
pub(super) fn create(lab: &Lab) -> Result<Keys> {
    let ask = |arguments: &[&str]| lab.ceph(arguments).map(|said| said.trim().to_owned());
    let ensure = |user: &User| -> Result<(&'static str, String)> {
        let entity = format!("client.{}", user.name);
        let arguments = [&["auth", "get-or-create-key", entity.as_str()], &user.capabilities[..]].concat();
        Ok((user.name, ask(&arguments)?))
    };
    // At the same time, because each command takes most of a second to start.
    thread::scope(|scope| {
        let fsid = scope.spawn(|| ask(&["fsid"]));
        let admin = scope.spawn(|| ask(&["auth", "get-key", "client.admin"]));
        let monitor = scope.spawn(|| ask(&["auth", "get-key", "mon."]));
        let node = scope.spawn(|| ensure(&NODE));
        let provisioner = scope.spawn(|| ensure(&PROVISIONER));
        Ok(Keys {
            fsid: joined(fsid)?,
            admin: joined(admin)?,
            monitor: joined(monitor)?,
            node: joined(node)?,
            provisioner: joined(provisioner)?,
        })
    })
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("ask for Ceph's keys: the thread panicked"))?
}
