//! `howdah-lab status`: what of a lab runs, for a human.

use std::fmt::Write;
use std::time::Duration;

use anyhow::Result;

use crate::lab::Lab;
use crate::netns::BRIDGE_ADDRESS;
use crate::{ceph, control_plane, forward, netns, node, process};

/// How long a status waits for the apiserver: a human is waiting for it.
const NODES_LIMIT: Duration = Duration::from_secs(5);

/// A table of the lab's processes, its nodes, and where to reach it.
pub fn describe(lab: &Lab) -> Result<String> {
    let mut text = String::new();
    if !lab.exists() {
        writeln!(text, "lab {} is down; bring it up: howdah-lab --name {0} up", lab.name())?;
        return Ok(text);
    }
    let namespace = if netns::exists(lab) { "" } else { " (missing)" };
    writeln!(text, "lab         {}", lab.name())?;
    writeln!(text, "directory   {}", lab.dir().display())?;
    writeln!(text, "namespace   {}{namespace}", lab.netns())?;
    writeln!(text, "kubeconfig  {}\n", lab.kubeconfig().display())?;
    writeln!(text, "{:<26} {:>8}  {:<8} ADDRESS", "PROCESS", "PID", "STATE")?;
    let mut api_runs = false;
    for (name, identity) in process::records(lab)? {
        let alive = identity.is_alive();
        api_runs |= alive && name == control_plane::API_SERVER;
        let state = if alive { "running" } else { "dead" };
        let address = address(lab, &name).unwrap_or_default();
        writeln!(text, "{name:<26} {:>8}  {state:<8} {address}", identity.pid)?;
    }
    if api_runs {
        let mut kubectl = lab.kubectl_command();
        kubectl.args(["get", "nodes", "--output=wide"]);
        match process::output_within(&mut kubectl, NODES_LIMIT) {
            Ok(nodes) if nodes.is_empty() => writeln!(text, "\nno nodes")?,
            Ok(nodes) => write!(text, "\n{nodes}")?,
            Err(error) => writeln!(text, "\nnodes unknown: {error:#}")?,
        }
    }
    write!(text, "\n{}", node::describe(lab)?)?;
    Ok(text)
}

fn address(lab: &Lab, process: &str) -> Option<String> {
    let inside = |port: u16| Some(format!("{BRIDGE_ADDRESS}:{port} inside"));
    match process {
        control_plane::API_SERVER => inside(control_plane::API_PORT),
        control_plane::API_FORWARD => forward::address(lab, process).map(|address| address.to_string()),
        "ceph-mon.a" => inside(ceph::MONITOR_PORT_V1),
        _ => None,
    }
}
