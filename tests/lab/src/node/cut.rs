//! Partitions of one node: packets between it and the apiserver, or Ceph, are dropped on the host's side of the
//! cable, silently, as a broken network does; or the cable is pulled out of the bridge.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::Node;
use crate::control_plane::API_PORT;
use crate::lab::Lab;
use crate::netns::BRIDGE;
use crate::{netns, process};

/// The kubelet's port, which the apiserver dials for exec and logs.
const KUBELET_PORT: u16 = 10250;
/// Monitors (both protocols), then the range in which OSDs and the manager choose theirs.
const CEPH_PORTS: &str = "3300, 6789, 6800-7568";

/// What a node is cut from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum From {
    /// The apiserver; and it from the node's kubelet.
    Api,
    /// Ceph.
    Ceph,
    /// Everything: its cable leads nowhere.
    Both,
}

/// Cuts `node` off, beside what it is cut from already.
pub fn cut(lab: &Lab, node: Node, from: From) -> Result<()> {
    match from {
        From::Both => link(lab, node, &["nomaster"]),
        From::Api => drop_packets(
            lab,
            node,
            "api",
            &format!("tcp dport {API_PORT} drop"),
            &[format!("tcp sport {API_PORT} drop"), format!("tcp dport {KUBELET_PORT} drop")],
        ),
        From::Ceph => drop_packets(
            lab,
            node,
            "ceph",
            &format!("tcp dport {{ {CEPH_PORTS} }} drop"),
            &[format!("tcp sport {{ {CEPH_PORTS} }} drop")],
        ),
    }
}

/// Undoes a cut; [`From::Both`] undoes all of them.
pub fn heal(lab: &Lab, node: Node, from: From) -> Result<()> {
    if matches!(from, From::Api | From::Both) {
        pass_packets(lab, node, "api")?;
    }
    if matches!(from, From::Ceph | From::Both) {
        pass_packets(lab, node, "ceph")?;
    }
    if from == From::Both {
        link(lab, node, &["master", BRIDGE])?;
    }
    Ok(())
}

/// What `node` is cut from, in words.
pub fn of(lab: &Lab, node: Node) -> Result<Vec<&'static str>> {
    let mut found = Vec::new();
    if !netns::exists(lab) {
        return Ok(found);
    }
    let mut ip = Command::new("ip");
    let links = process::output_of(ip.args(["-n", &lab.netns(), "-o", "link", "show", "master", BRIDGE]))?;
    if !links.contains(&format!(" {}: ", node.tap())) {
        found.push("everything");
    }
    let tables = nft(lab, &["list", "tables"])?;
    let tables: BTreeSet<&str> = tables.lines().collect();
    for what in ["api", "ceph"] {
        if tables.contains(format!("table ip {}", table(node, what)).as_str()) {
            found.push(what);
        }
    }
    Ok(found)
}

/// The node's end stays up: a user-mode kernel gets an error from a tap that is down, and resets the device.
fn link(lab: &Lab, node: Node, state: &[&str]) -> Result<()> {
    let mut ip = Command::new("ip");
    process::output_of(ip.args(["-n", &lab.netns(), "link", "set", &node.tap()]).args(state)).map(drop)
}

fn table(node: Node, what: &str) -> String {
    format!("cut_node_{}_{what}", node.index())
}

fn drop_packets(lab: &Lab, node: Node, what: &str, incoming: &str, outgoing: &[String]) -> Result<()> {
    let table = table(node, what);
    // Its pods too: their packets carry their own addresses.
    let whose = format!("{{ {}, {} }}", netns::node_address(node.index()), netns::pod_range(node.index()));
    let outgoing: String =
        outgoing.iter().map(|rule| format!("ip daddr {whose} {rule}\n")).collect::<Vec<_>>().concat();
    // Added first, so that deleting it cannot fail; then made anew: cutting twice is cutting once.
    let rules = format!(
        "add table ip {table}\n\
         delete table ip {table}\n\
         table ip {table} {{\n\
         chain input {{\ntype filter hook input priority 0;\nip saddr {whose} {incoming}\n}}\n\
         chain output {{\ntype filter hook output priority 0;\n{outgoing}}}\n\
         }}\n"
    );
    nft(lab, &[&rules]).with_context(|| format!("cut {} from {what}", node.name())).map(drop)
}

fn pass_packets(lab: &Lab, node: Node, what: &str) -> Result<()> {
    let table = table(node, what);
    let rules = format!("add table ip {table}\ndelete table ip {table}\n");
    nft(lab, &[&rules]).with_context(|| format!("heal {}", node.name())).map(drop)
}

fn nft(lab: &Lab, args: &[&str]) -> Result<String> {
    netns::within(lab, || {
        let mut nft = lab.command("nft");
        process::output_of(nft.args(args))
    })?
}
