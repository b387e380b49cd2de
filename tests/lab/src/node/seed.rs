//! What tells one node from the others: its name, addresses and credentials. They reach the VM as a plain tar
//! archive in the place of a disk, which the node unpacks over its root when it boots.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::Node;
use crate::lab::Lab;
use crate::netns::{self, BRIDGE_ADDRESS};
use crate::{control_plane, pki, process};

/// A disk's size is a multiple of this.
const SECTOR: u64 = 512;

/// Writes the archive for `node`; gives its path.
pub fn write(lab: &Lab, node: Node) -> Result<PathBuf> {
    let folder = lab.path("nodes").join(node.name());
    let tree = folder.join("seed");
    let archive = folder.join("seed.tar");
    let address = netns::node_address(node.index());
    let credentials = pki::node_credentials(lab, &node.name(), address)?;
    let url = control_plane::inside_url();
    let kubelet = pki::kubeconfig(lab, &url, &credentials)?;
    let proxy = pki::kubeconfig(lab, &url, &pki::client_credentials(lab, "proxy")?)?;
    let ca = fs::read_to_string(pki::file(lab, "ca.crt")).context("read the CA's certificate")?;

    let routes: Vec<String> = (1..=netns::NODES_MAX)
        .filter(|other| *other != node.index())
        .map(|other| format!("{}={}", netns::pod_range(other), netns::node_address(other)))
        .collect();
    let environment = format!(
        "NODE_NAME={}\nNODE_ADDRESS={address}\nBRIDGE_ADDRESS={BRIDGE_ADDRESS}\nPOD_ROUTES='{}'\n",
        node.name(),
        routes.join(" ")
    );
    put(&tree, "etc/howdah/node.env", &environment)?;
    put(&tree, "etc/hostname", &format!("{}\n", node.name()))?;
    put(&tree, "etc/hosts", &format!("127.0.0.1 localhost\n{address} {}\n", node.name()))?;
    put(&tree, "etc/kubernetes/ca.crt", &ca)?;
    put(&tree, "etc/kubernetes/kubelet.crt", &credentials.certificate)?;
    put(&tree, "etc/kubernetes/kubelet.key", &credentials.key)?;
    put(&tree, "etc/kubernetes/kubelet.kubeconfig", &kubelet)?;
    put(&tree, "etc/kubernetes/kube-proxy.kubeconfig", &proxy)?;
    put(&tree, "etc/cni/net.d/10-lab.conflist", &pod_network(node).to_string())?;

    let mut tar = Command::new("tar");
    tar.args(["--create", "--owner=0", "--group=0", "--numeric-owner", "--file"]).arg(&archive);
    process::output_of(tar.arg("--directory").arg(&tree).arg("."))?;
    pad(&archive)?;
    Ok(archive)
}

fn pod_network(node: Node) -> serde_json::Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "hairpinMode": true,
            // Pods are routed, not hidden: control plane and Ceph see who they really are.
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "ranges": [[{ "subnet": netns::pod_range(node.index()) }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
                // Gone after a reboot, as are the pods that had the addresses.
                "dataDir": "/run/cni/networks",
            },
        }],
    })
}

fn put(tree: &Path, relative: &str, text: &str) -> Result<()> {
    let path = tree.join(relative);
    let parent = path.parent().context("find a file's folder")?;
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    let mode = if relative.starts_with("etc/kubernetes") { 0o600 } else { 0o644 };
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("set mode of {}", path.display()))
}

fn pad(archive: &Path) -> Result<()> {
    let file =
        File::options().write(true).open(archive).with_context(|| format!("open {}", archive.display()))?;
    let length = file.metadata().with_context(|| format!("look at {}", archive.display()))?.len();
    file.set_len(length.next_multiple_of(SECTOR)).with_context(|| format!("pad {}", archive.display()))
}
