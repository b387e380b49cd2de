//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Look after PostgreSQL StatefulSets that howdah protects.
#[derive(Debug, Parser)]
#[command(name = "kubectl howdah", bin_name = "kubectl howdah", version)]
pub struct Args {
    /// The kubeconfig file; else $KUBECONFIG, else ~/.kube/config.
    #[arg(long, global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be asked.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the protected databases and how their backups stand.
    Status(StatusArgs),
    /// Judge manifests as the webhook would, without a cluster.
    Lint(crate::lint::LintArgs),
    /// Let the scheduler read the credentials in a namespace, so that its backups are online ones.
    Protect(ProtectArgs),
    /// Show which backups of a database its retention policy keeps, and why.
    Prune(PruneArgs),
}

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// The namespace; else the one of the current context.
    #[arg(short, long, conflicts_with = "all_namespaces")]
    pub namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
}

/// Arguments of `protect`.
#[derive(Debug, clap::Args)]
pub struct ProtectArgs {
    /// The namespace whose Secrets the scheduler may read, one by one, by name.
    #[arg(value_name = "NAMESPACE")]
    pub target: String,
    /// Where howdah is installed.
    #[arg(long, default_value = "howdah-system")]
    pub howdah_namespace: String,
    /// Print the RoleBinding as YAML and change nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `prune`.
#[derive(Debug, clap::Args)]
pub struct PruneArgs {
    /// The StatefulSet.
    pub name: String,
    /// The namespace; else the one of the current context.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Only show the plan. The scheduler alone deletes, after each good backup.
    #[arg(long, required = true)]
    pub dry_run: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn pruning_by_hand_is_not_offered() {
        assert!(Args::try_parse_from(["x", "prune", "db"]).is_err());
        assert!(Args::try_parse_from(["x", "prune", "db", "--dry-run"]).is_ok());
    }
}
