//! The switches that break a node and mend it. Each says what is wrong when the node is not in a state in which
//! the switch means anything.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use nix::sys::signal::Signal;

pub use super::cut::From;
use super::parts::Parts;
use super::vm::State;
use super::{Node, cut, vm};
use crate::lab::Lab;
use crate::process::{self, Daemon};

/// A node is Ready 20 s after power-on, alone; three at once beside everything else on two busy cores took
/// four times that.
const READY_LIMIT: Duration = Duration::from_secs(300);
/// How often the apiserver is asked about a booting node; each time is a kubectl.
const READY_POLL: Duration = Duration::from_millis(700);
/// After SIGKILL only the kernel is between a VM and its end.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// Break a node, or mend it.
#[derive(Debug, Subcommand)]
pub enum Switch {
    /// Power off: the VM ends at once.
    Kill(Which),
    /// Boot a killed node again and wait until it is Ready; thaw and heal it if it is frozen or cut off.
    Start(Which),
    /// Stop the VM where it stands; it does not know.
    Freeze(Which),
    /// Let a frozen VM go on.
    Thaw(Which),
    /// Drop the packets between a node and the apiserver, or Ceph, or pull its cable.
    Cut(Link),
    /// Undo a cut, or all of them.
    Heal(Link),
}

/// A node. No field may be called `name`: that is the global option that names the lab.
#[derive(Debug, Args)]
pub struct Which {
    /// The node's name, node-1 for instance.
    node: String,
}

/// A node and what it is connected to.
#[derive(Debug, Args)]
pub struct Link {
    /// The node's name, node-1 for instance.
    node: String,
    /// What it is cut from.
    #[arg(long, value_enum, default_value = "both")]
    from: From,
}

impl Switch {
    /// Throws the switch.
    pub fn run(&self, lab: &Lab) -> Result<()> {
        if !lab.exists() {
            bail!("find lab {0}: bring it up first: howdah-lab --name {0} up --nodes 3", lab.name());
        }
        match self {
            Self::Kill(which) => kill(lab, Node::named(&which.node)?),
            Self::Start(which) => start(lab, Node::named(&which.node)?),
            Self::Freeze(which) => freeze(lab, Node::named(&which.node)?),
            Self::Thaw(which) => thaw(lab, Node::named(&which.node)?),
            Self::Cut(link) => cut(lab, Node::named(&link.node)?, link.from),
            Self::Heal(link) => heal(lab, Node::named(&link.node)?, link.from),
        }
    }
}

/// Ends the node's VM as a power failure does: nothing inside gets to know.
pub fn kill(lab: &Lab, node: Node) -> Result<()> {
    let identity = booted(lab, node)?.identity();
    identity.signal(Signal::SIGKILL)?;
    if !identity.wait_gone(KILL_LIMIT) {
        bail!("kill {}: process {} outlived SIGKILL", node.name(), identity.pid);
    }
    Ok(())
}

/// Stops the node's VM between two instructions of its kernel. Its clock goes on, as a real machine's does; and a process on it
/// that computes may do so until it wants anything of the kernel.
pub fn freeze(lab: &Lab, node: Node) -> Result<()> {
    booted(lab, node)?.identity().signal(Signal::SIGSTOP)?;
    wait_state(lab, node, State::Frozen)
}

/// Lets a frozen VM go on.
pub fn thaw(lab: &Lab, node: Node) -> Result<()> {
    booted(lab, node)?.identity().signal(Signal::SIGCONT)?;
    wait_state(lab, node, State::Running)
}

/// Cuts the node off, beside what it is cut from already.
pub fn cut(lab: &Lab, node: Node, from: From) -> Result<()> {
    known(lab, node)?;
    cut::cut(lab, node, from)
}

/// Undoes a cut; [`From::Both`] undoes all of them.
pub fn heal(lab: &Lab, node: Node, from: From) -> Result<()> {
    known(lab, node)?;
    cut::heal(lab, node, from)
}

/// Makes the node whole: thaws and heals it, boots it if it has no VM, and waits until it is Ready.
pub fn start(lab: &Lab, node: Node) -> Result<()> {
    let parts = Parts::remembered(lab)?;
    let dead = match vm::state(lab, node) {
        State::Running => false,
        State::Frozen => {
            thaw(lab, node)?;
            false
        }
        State::Dead => true,
    };
    // Until the new kernel has reported itself, the API may still show the dead one as Ready.
    let before = if dead { boot_id(lab, node) } else { None };
    let mut daemon = vm::ensure(lab, node, &parts)?;
    cut::heal(lab, node, From::Both)?;
    let mut asked = Instant::now();
    daemon
        .wait_ready(READY_LIMIT, || {
            thread::sleep(READY_POLL.saturating_sub(asked.elapsed()));
            asked = Instant::now();
            let now = ready_boot_id(lab, node);
            now.is_some() && now != before
        })
        .with_context(|| format!("wait for {}", node.name()))
}

/// The boot id of the kernel that the node last reported; it changes with every boot.
pub fn boot_id(lab: &Lab, node: Node) -> Option<String> {
    ask(lab, node, "{.status.nodeInfo.bootID}")
}

fn ready_boot_id(lab: &Lab, node: Node) -> Option<String> {
    let said = ask(lab, node, "{.status.nodeInfo.bootID} {.status.conditions[?(@.type=='Ready')].status}")?;
    said.strip_suffix(" True").map(str::to_owned)
}

fn ask(lab: &Lab, node: Node, path: &str) -> Option<String> {
    let mut kubectl: Command = lab.kubectl_command();
    kubectl.args(["--request-timeout=5s", "get", "node", &node.name(), "-o", &format!("jsonpath={path}")]);
    process::output_of(&mut kubectl).ok().filter(|said| !said.is_empty())
}

fn booted(lab: &Lab, node: Node) -> Result<Daemon> {
    process::running(lab, &node.name()).with_context(|| {
        format!(
            "find the VM of {0}: it does not run; boot it: howdah-lab --name {1} node start {0}",
            node.name(),
            lab.name()
        )
    })
}

fn known(lab: &Lab, node: Node) -> Result<()> {
    if !vm::folder(lab, node).is_dir() {
        bail!(
            "find {0}: lab {1} has no such node; howdah-lab --name {1} up --nodes {2}",
            node.name(),
            lab.name(),
            node.index()
        );
    }
    Ok(())
}

fn wait_state(lab: &Lab, node: Node, wanted: State) -> Result<()> {
    if !process::wait_until(KILL_LIMIT, || vm::state(lab, node) == wanted) {
        bail!("make {} {wanted}: it is {}", node.name(), vm::state(lab, node));
    }
    Ok(())
}
