//! The lab's storage as howdah meets it in production: what Rook leaves in a cluster (users, Secrets,
//! StorageClasses, toolbox, `CephClient`) and a CSI driver that keeps volumes exactly as ceph-csi does.
//!
//! The driver's controller half and Kubernetes' own sidecars are processes in the lab's network namespace;
//! the node half runs on each node beside its kubelet.

pub mod claim;
mod driver;
pub mod glue;
mod objects;
pub(crate) mod users;

use std::thread;

use anyhow::{Result, anyhow};

use crate::ceph::MONITOR_PORT_V1;
use crate::lab::Lab;
use crate::netns::BRIDGE_ADDRESS;
use crate::progress;

pub use driver::driver_binary;

/// The driver's name: Rook's operator namespace and ceph-csi's own name.
pub const DRIVER: &str = "rook-ceph.rbd.csi.ceph.com";
/// Rook's namespace, which is its clusterID, too.
pub const NAMESPACE: &str = "rook-ceph";

/// Brings up whatever is missing. Needs the apiserver and Ceph; nodes may come later.
pub fn up(lab: &Lab) -> Result<()> {
    let binaries = driver::binaries()?;
    progress::step("storage ready", || {
        thread::scope(|scope| {
            let objects = scope.spawn(|| {
                objects::apply(lab, &users::keys(lab)?)?;
                // After the CephClient resource exists: a watch that fails is only tried again much later.
                glue::ensure(lab)
            });
            driver::up(lab, &binaries)?;
            objects.join().map_err(|_| anyhow!("create Rook's objects: the thread panicked"))?
        })
    })
}

/// The monitor, as the kernel's client of the nodes reaches it.
fn monitor() -> String {
    format!("{BRIDGE_ADDRESS}:{MONITOR_PORT_V1}")
}
