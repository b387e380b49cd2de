//! The command line of `howdah-lab`.

use std::ffi::OsString;
use std::net::SocketAddrV4;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use crate::control_plane::Profile;
use crate::lab::Lab;
use crate::storage::glue;
use crate::up::Wanted;
use crate::{demo, down, forward, install, netns, node, process, status, up};

/// A real Kubernetes on real Ceph, on one machine, in its own network namespace.
#[derive(Debug, Parser)]
#[command(name = "howdah-lab", version)]
pub struct Args {
    /// Which lab; several can stand side by side.
    #[arg(long, env = "HOWDAH_LAB", default_value = "main", global = true)]
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring up whatever is missing: control plane, Ceph and nodes.
    Up {
        /// Virtual-machine nodes.
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=i64::from(netns::NODES_MAX)))]
        nodes: u8,
        /// How fast a dead node is noticed; fixed when the lab is first brought up (then: fast).
        #[arg(long, value_enum)]
        profile: Option<Profile>,
        /// Leave Ceph out: enough for what only talks to the apiserver.
        #[arg(long)]
        without_ceph: bool,
    },
    /// Take the lab down and leave nothing of it.
    Down,
    /// Show what runs.
    Status,
    /// Print the path of the admin's kubeconfig.
    Kubeconfig,
    /// Run a command inside the lab: its network, its kubectl, its Ceph configuration.
    Exec {
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Install howdah from deploy/overlays/lab, and wait until it serves.
    Install,
    /// Show howdah's main job on a real cluster, from nothing to a restored backup.
    Demo {
        /// Virtual-machine nodes.
        #[arg(long, default_value_t = netns::NODES_MAX, value_parser = clap::value_parser!(u8).range(1..=i64::from(netns::NODES_MAX)))]
        nodes: u8,
    },
    /// Build what nodes are made of (binaries, root tree, images) into the cache, without bringing up a lab.
    Build,
    /// Break a node, or mend it.
    #[command(subcommand)]
    Node(node::faults::Switch),
    /// Record this process, then become the command.
    #[command(name = "__run", hide = true)]
    Run {
        record: PathBuf,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Relay connections into the lab's network namespace.
    #[command(name = "__forward", hide = true)]
    Forward { listen: SocketAddrV4, target: SocketAddrV4, address_file: PathBuf },
    /// Serve CephClient objects as the Rook operator does.
    #[command(name = "__rook-glue", hide = true)]
    RookGlue,
}

impl Args {
    /// Does what the command line says.
    pub fn run(self) -> Result<()> {
        let Self { name, command } = self;
        let lab = Lab::named(&name)?;
        match command {
            Command::Up { nodes, profile, without_ceph } => {
                process::mark_self(&lab)?;
                up::run(&lab, Wanted { nodes, ceph: !without_ceph, profile })
            }
            Command::Down => down::run(&lab),
            Command::Status => {
                print!("{}", status::describe(&lab)?);
                Ok(())
            }
            Command::Kubeconfig => kubeconfig(&lab),
            Command::Exec { command } => exec(&lab, &command),
            Command::Install => install::install(&lab),
            Command::Demo { nodes } => {
                process::mark_self(&lab)?;
                demo::run(&lab, nodes)
            }
            Command::Build => node::parts::build().map(drop),
            Command::Node(switch) => {
                process::mark_self(&lab)?;
                switch.run(&lab)
            }
            Command::Run { record, command } => process::run_recorded(&record, &command),
            Command::Forward { listen, target, address_file } => {
                forward::run(&lab, listen, target, &address_file)
            }
            Command::RookGlue => glue::run(&lab),
        }
    }
}

fn kubeconfig(lab: &Lab) -> Result<()> {
    let path = lab.kubeconfig();
    if !path.is_file() {
        bail!("find {}: bring the lab up first: howdah-lab --name {} up", path.display(), lab.name());
    }
    println!("{}", path.display());
    Ok(())
}

fn exec(lab: &Lab, command: &[OsString]) -> Result<()> {
    let (program, args) = command.split_first().context("name a command to run")?;
    netns::enter(lab)?;
    let error = lab.command(program).args(args).env("KUBECONFIG", lab.inside_kubeconfig()).exec();
    Err(error).with_context(|| format!("run {}", program.display()))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    #[test]
    fn the_command_line_is_consistent() {
        super::Args::command().debug_assert();
    }

    #[test]
    fn a_switch_names_lab_and_node_apart() {
        let args =
            super::Args::try_parse_from(["howdah-lab", "--name", "a", "node", "heal", "node-1"]).unwrap();
        assert_eq!(args.name, "a");
    }
}
