//! A test's own PersistentVolumeClaim and the RBD image behind it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::ceph::POOL;
use crate::lab::Lab;
use crate::process::poll;

/// Making a volume takes some ten Ceph commands, each most of a second on a busy machine.
const BIND_LIMIT: Duration = Duration::from_secs(120);
/// Deleting waits for the manager's background task, and for a pod that is still unmounting.
const DELETE_LIMIT: Duration = Duration::from_secs(300);

/// Between two looks that take a Ceph or kubectl command each, whose start-up is what a test mostly costs: at first.
const PAUSE: Duration = Duration::from_millis(500);
/// And at last: what a test has waited for this long lasts.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// A bound claim.
#[derive(Clone, Debug)]
pub struct Claim {
    lab: Lab,
    namespace: String,
    name: String,
    volume: Value,
}

impl Claim {
    /// Creates a claim of `size` (a Kubernetes quantity) in `class` and waits until it is bound.
    pub fn create(lab: &Lab, namespace: &str, name: &str, class: &str, size: &str) -> Result<Self> {
        let claim = json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": { "name": name, "namespace": namespace },
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": class,
                "resources": { "requests": { "storage": size } },
            },
        });
        let created = lab.kubectl_apply(&claim.to_string())?;
        if !created.status.success() {
            bail!("create claim {namespace}/{name}: {}", String::from_utf8_lossy(&created.stderr).trim());
        }
        Self::bound(lab, namespace, name)
    }

    /// The claim `name`, made by somebody else, for instance by a StatefulSet; waits until it is bound.
    pub fn bound(lab: &Lab, namespace: &str, name: &str) -> Result<Self> {
        let mut volume = String::new();
        wait_slowly(BIND_LIMIT, || {
            let wanted =
                ["get", "pvc", name, "-n", namespace, "-o", "jsonpath={.spec.volumeName} {.status.phase}"];
            let said = lab.kubectl_ok(&wanted).unwrap_or_default();
            volume = said.strip_suffix(" Bound").unwrap_or_default().to_owned();
            !volume.is_empty()
        });
        if volume.is_empty() {
            let events = lab.kubectl_ok(&["describe", "pvc", name, "-n", namespace])?;
            bail!("wait for claim {namespace}/{name} to be bound:\n{events}");
        }
        let volume = lab.kubectl_ok(&["get", "pv", &volume, "-o", "json"])?;
        let volume = serde_json::from_str(&volume).context("read the PersistentVolume")?;
        Ok(Self { lab: lab.clone(), namespace: namespace.to_owned(), name: name.to_owned(), volume })
    }

    /// Its name in its namespace.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The PersistentVolume as it was when the claim was bound.
    pub fn volume(&self) -> &Value {
        &self.volume
    }

    /// The image as POOL/NAME.
    pub fn image(&self) -> Result<String> {
        let attributes = &self.volume["spec"]["csi"]["volumeAttributes"];
        let name = attributes["imageName"].as_str().context("find imageName in the volume's attributes")?;
        let pool = attributes["pool"].as_str().context("find pool in the volume's attributes")?;
        Ok(format!("{pool}/{name}"))
    }

    /// The uuid that ends the volume's handle and names its journal.
    pub fn uuid(&self) -> Result<&str> {
        /// Characters of a uuid.
        const LENGTH: usize = 36;
        let handle =
            self.volume["spec"]["csi"]["volumeHandle"].as_str().context("find the volume's handle")?;
        handle
            .len()
            .checked_sub(LENGTH)
            .and_then(|start| handle.get(start..))
            .context("read the volume's handle")
    }

    /// Addresses (ip:port/nonce) of the clients that have the image open for writing.
    pub fn watchers(&self) -> Result<Vec<String>> {
        let status = self.lab.rbd(&["status", "--format", "json", &self.image()?])?;
        let status: Value = serde_json::from_str(&status).context("read the image's status")?;
        let watchers = status["watchers"].as_array().context("find the image's watchers")?;
        Ok(watchers.iter().filter_map(|watcher| watcher["address"].as_str()).map(str::to_owned).collect())
    }

    /// Value of `key` in the volume's journal.
    pub fn journal(&self, key: &str) -> Result<String> {
        let object = format!("csi.volume.{}", self.uuid()?);
        rados(&self.lab, &["getomapval", &object, key, "/dev/stdout"])
    }

    /// Deletes the claim and waits until volume, image, trash entry and journal are gone.
    pub fn delete(self) -> Result<()> {
        let image = self.image()?;
        self.delete_volume()?;
        let (_, image) = image.split_once('/').context("take the image's name apart")?;
        let gone = wait_slowly(DELETE_LIMIT, || self.traces(image).is_ok_and(|traces| traces.is_empty()));
        if !gone {
            bail!("wait for image {image} to be gone: {:?}", self.traces(image)?);
        }
        Ok(())
    }

    /// Deletes the claim and waits until its PersistentVolume is gone, whatever that leaves in the pool.
    pub fn delete_volume(&self) -> Result<()> {
        let volume = self.volume["metadata"]["name"].as_str().context("find the volume's name")?;
        self.lab.kubectl_ok(&["delete", "pvc", &self.name, "-n", &self.namespace, "--wait=false"])?;
        let left = ["get", "pv", volume, "--ignore-not-found", "-o", "name"];
        if !wait_slowly(DELETE_LIMIT, || self.lab.kubectl_ok(&left).is_ok_and(|left| left.is_empty())) {
            bail!(
                "wait for volume {volume} to be gone: {}",
                self.lab.kubectl_ok(&["describe", "pv", volume])?
            );
        }
        Ok(())
    }

    /// Where the volume is still known: image, trash, journal.
    fn traces(&self, image: &str) -> Result<Vec<String>> {
        let listings = [
            ("image", self.lab.rbd(&["ls", POOL])?, image.to_owned()),
            ("trash", self.lab.rbd(&["trash", "ls", POOL])?, image.to_owned()),
            ("journal", rados(&self.lab, &["ls"])?, format!("csi.volume.{}", self.uuid()?)),
        ];
        Ok(listings
            .into_iter()
            .filter(|(_, listed, name)| listed.contains(name.as_str()))
            .map(|(place, _, name)| format!("{place} {name}"))
            .collect())
    }
}

/// Polls a condition that is costly to look at; says whether it held within `limit`.
pub fn wait_slowly(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    poll(limit, PAUSE, PAUSE_MAX, || condition().then_some(())).is_some()
}

/// Runs the `rados` command on the pool and gives what it printed.
pub fn rados(lab: &Lab, arguments: &[&str]) -> Result<String> {
    lab.output_inside(lab.command("rados").args(["--pool", POOL]).args(arguments))
}
