//! The lab's nodes: virtual machines with Debian's user-mode kernel and its own rbd client, a real kubelet and a real
//! containerd, and the switches that break them.

mod cut;
pub mod faults;
pub mod parts;
mod seed;
pub mod vm;

use std::fmt::Write;
use std::thread;

use anyhow::{Context, Result, anyhow, bail};

use crate::lab::Lab;
use crate::{netns, progress};
use parts::Parts;

/// A node by its number, from 1; it need not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Node {
    index: u8,
}

impl Node {
    /// Node number `index`, 1 to [`netns::NODES_MAX`].
    pub fn numbered(index: u8) -> Result<Self> {
        if !(1..=netns::NODES_MAX).contains(&index) {
            bail!("name a node from node-1 to node-{}: there is no node-{index}", netns::NODES_MAX);
        }
        Ok(Self { index })
    }

    /// The node called `name`, `node-1` for instance.
    pub fn named(name: &str) -> Result<Self> {
        let index = name.strip_prefix("node-").and_then(|digits| digits.parse().ok());
        let index = index.with_context(|| format!("name a node like node-1: {name:?} is no such name"))?;
        Self::numbered(index)
    }

    /// Its number, from 1.
    pub fn index(self) -> u8 {
        self.index
    }

    /// Its name in Kubernetes, and its VM's among the lab's processes.
    pub fn name(self) -> String {
        format!("node-{}", self.index)
    }

    /// Its end of the cable: the tap in the lab's namespace.
    fn tap(self) -> String {
        format!("hd-node-{}", self.index)
    }

    /// The nodes that have ever been started in this lab.
    pub fn all_of(lab: &Lab) -> Vec<Self> {
        (1..=netns::NODES_MAX)
            .map(|index| Self { index })
            .filter(|node| lab.path("nodes").join(node.name()).is_dir())
            .collect()
    }
}

/// Brings up the first `count` nodes and waits until each is Ready. A node that is frozen or cut off is made
/// whole; one that was killed is booted afresh.
pub fn up(lab: &Lab, count: u8, parts: &Parts) -> Result<()> {
    parts.remember(lab)?;
    let nodes: Vec<Node> = (1..=count).map(Node::numbered).collect::<Result<_>>()?;
    thread::scope(|scope| {
        let threads: Vec<_> = nodes
            .iter()
            .map(|node| {
                let what = format!("{} Ready", node.name());
                scope.spawn(move || progress::step(&what, || faults::start(lab, *node)))
            })
            .collect();
        let mut errors = Vec::new();
        for (node, thread) in nodes.iter().zip(threads) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => errors.push(format!("{error:#}")),
                Err(_) => errors.push(format!("start {}: its thread panicked", node.name())),
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(anyhow!("{}", errors.join("\nand: "))) }
    })
}

/// One line a node: what its VM does and what it is cut from.
pub fn describe(lab: &Lab) -> Result<String> {
    let mut text = String::new();
    for node in Node::all_of(lab) {
        let cuts = cut::of(lab, node)?;
        let cuts = if cuts.is_empty() { String::new() } else { format!(", cut from {}", cuts.join(" and ")) };
        writeln!(text, "{:<11} {}{cuts}", node.name(), vm::state(lab, node))?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::Node;

    #[test]
    fn a_node_is_named_as_kubernetes_names_it() {
        assert_eq!(Node::named("node-3").unwrap().name(), "node-3");
        for name in ["node-0", "node-4", "node-", "n1", "node-1 "] {
            assert!(Node::named(name).is_err(), "{name}");
        }
    }
}
