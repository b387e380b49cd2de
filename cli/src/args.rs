//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use howdah_adapters::ceph::CephRunner;
use howdah_core::annotations::Consistency;
use howdah_core::restore::Method;

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
    /// Take a backup now, whatever the schedule says.
    ///
    /// Exit codes: 0 the backup is taken (without --wait: ordered), 1 it was refused or failed, 3 it goes on but was not
    /// over within --timeout-seconds.
    Backup(BackupArgs),
    /// Prove a backup: start a PostgreSQL on a clone of it, apart from everything, and read it.
    ///
    /// Exit codes: 0 the backup is verified (without --wait: asked for), 1 it is damaged, could not be tried, or was
    /// refused, 3 the drill goes on but was not over within --timeout-seconds.
    Verify(VerifyArgs),
    /// The second copy of the records, in the metadata of the RBD images.
    #[command(subcommand)]
    Catalog(CatalogCommand),
    /// Show which backups of a database its retention policy keeps, and why.
    Prune(PruneArgs),
    /// Restore a database from a backup, in place or into a new one beside it; `restore undo` takes that back.
    Restore(RestoreArgs),
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

/// Arguments of `backup`.
#[derive(Debug, clap::Args)]
pub struct BackupArgs {
    /// The StatefulSet.
    pub name: String,
    /// The namespace; else the one of the current context.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// `online`, `crash` or `offline`: exactly this or a failure. Else what the StatefulSet is annotated with, or the
    /// best that is possible.
    #[arg(long, value_name = "CLASS")]
    pub consistency: Option<Consistency>,
    /// Wait until it is over and tell each step on standard error. Ctrl-C ends the waiting, not the backup.
    #[arg(long)]
    pub wait: bool,
    /// How long to wait; a backup tries for half an hour before it fails.
    #[arg(long, requires = "wait", default_value_t = 2400)]
    pub timeout_seconds: u64,
}

/// Arguments of `verify`.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// The PostgresBackup.
    pub backup: String,
    /// The namespace; else the one of the current context.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Wait until it is over and tell each step on standard error. Ctrl-C ends the waiting, not the drill.
    #[arg(long)]
    pub wait: bool,
    /// How long to wait; a drill reads the whole database, for two hours at most.
    #[arg(long, requires = "wait", default_value_t = 7800)]
    pub timeout_seconds: u64,
}

/// What can be done with the catalogue.
#[derive(Debug, Subcommand)]
pub enum CatalogCommand {
    /// Bring lost records of backups back; those that are there stay as they are, and no snapshot is touched.
    Rebuild(RebuildArgs),
}

/// Arguments of `catalog rebuild`.
#[derive(Debug, clap::Args)]
pub struct RebuildArgs {
    /// The StatefulSet whose backups are wanted; every image of its pool is looked at.
    #[arg(value_name = "NAMESPACE/NAME", required_unless_present = "pool", conflicts_with = "pool")]
    pub target: Option<String>,
    /// Bring back everything that is in this pool: POOL or POOL/RADOS-NAMESPACE.
    #[arg(long, value_name = "POOL")]
    pub pool: Option<String>,
    /// Where the rbd command runs: `toolbox`, in the pod of Rook's, or `local`, on this machine, which then has to reach
    /// Ceph.
    #[arg(long, default_value = "toolbox")]
    pub ceph_runner: CephRunner,
    /// Namespace of the Secret with the Ceph key, of the monitors' addresses, and of the toolbox.
    #[arg(long, default_value = "rook-ceph")]
    pub ceph_namespace: String,
    /// The Ceph user that snapshots.
    #[arg(long, default_value = "howdah-backup")]
    pub ceph_user: String,
    /// Only show what would be brought back.
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

/// Arguments of `restore`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct RestoreArgs {
    /// Instead of a restore.
    #[command(subcommand)]
    pub verb: Option<RestoreVerb>,
    /// The StatefulSet.
    #[arg(required = true)]
    pub name: Option<String>,
    /// `newest`, or the name of a backup (kubectl get pgb).
    #[arg(long, value_name = "newest|BACKUP", required_unless_present = "before", conflicts_with = "before")]
    pub to: Option<String>,
    /// The last backup before this instant, with its zone: 2026-11-22T03:00:00+09:00 or 2026-11-22T03:00[Asia/Tokyo].
    #[arg(long, value_name = "INSTANT")]
    pub before: Option<String>,
    /// Restore into a new StatefulSet of this name, made like the original, which is not touched and may run on.
    #[arg(long, value_name = "NEW-NAME")]
    pub into: Option<String>,
    /// With --into: print the StatefulSet, its claim and the PostgresRestore as YAML, and change nothing.
    #[arg(long, requires = "into", conflicts_with = "wait")]
    pub dry_run: bool,
    /// `swap` takes the same time whatever the size; `rollback` overwrites the image.
    #[arg(long, default_value = "swap")]
    pub method: MethodArg,
    /// Show each step, and end when the restore has ended.
    #[arg(long)]
    pub wait: bool,
    /// The namespace; else the one of the current context.
    #[arg(short, long)]
    pub namespace: Option<String>,
}

/// What can be asked of a restore.
#[derive(Debug, Subcommand)]
pub enum RestoreVerb {
    /// Put back what was there before a restore, also one that is under way or stuck.
    Undo(RestoreReference),
    /// Let a restore that is stuck try its step again.
    Retry(RestoreReference),
}

/// A restore.
#[derive(Debug, clap::Args)]
pub struct RestoreReference {
    /// The PostgresRestore (kubectl get pgr).
    pub name: String,
    /// Show each step, and end when it has ended.
    #[arg(long)]
    pub wait: bool,
    /// The namespace; else the one of the current context.
    #[arg(short, long)]
    pub namespace: Option<String>,
}

/// How the data comes to its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    /// Set the image aside and put a clone of the backup in its place.
    Swap,
    /// Overwrite the image with the snapshot, after a safety snapshot.
    Rollback,
}

impl From<MethodArg> for Method {
    fn from(method: MethodArg) -> Self {
        match method {
            MethodArg::Swap => Self::Swap,
            MethodArg::Rollback => Self::Rollback,
        }
    }
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
    fn a_class_that_does_not_exist_is_refused() {
        assert!(Args::try_parse_from(["x", "backup", "db", "--consistency", "online", "--wait"]).is_ok());
        assert!(Args::try_parse_from(["x", "backup", "db", "--consistency", "best"]).is_err());
    }

    #[test]
    fn a_rebuild_is_of_a_set_or_of_a_pool() {
        let parses = |arguments: &[&str]| {
            Args::try_parse_from([&["x", "catalog", "rebuild"], arguments].concat()).is_ok()
        };
        assert!(parses(&["shop/db"]) && parses(&["--pool", "p", "--ceph-runner", "local", "--dry-run"]));
        assert!(
            !parses(&[])
                && !parses(&["shop/db", "--pool", "p"])
                && !parses(&["shop/db", "--ceph-runner", "x"])
        );
    }

    #[test]
    fn pruning_by_hand_is_not_offered() {
        assert!(Args::try_parse_from(["x", "prune", "db"]).is_err());
        assert!(Args::try_parse_from(["x", "prune", "db", "--dry-run"]).is_ok());
    }

    #[test]
    fn a_restore_says_what_to_restore_and_undo_what_to_undo() {
        let parses =
            |arguments: &[&str]| Args::try_parse_from([&["x", "restore"], arguments].concat()).is_ok();
        assert!(
            parses(&["db", "--to", "newest"]) && parses(&["db", "--before", "2026-11-22T03:00Z", "--wait"])
        );
        assert!(parses(&["undo", "db-restore-1", "--wait", "-n", "shop"]) && parses(&["retry", "r"]));
        assert!(parses(&["db", "--to", "newest", "--into", "db-copy", "--dry-run"]));
        for wrong in [
            &["db"][..],
            &[],
            &["--to", "newest"],
            &["undo"],
            &["db", "--to", "a", "--before", "b"],
            &["db", "--into", "db-copy"],
            &["db", "--to", "newest", "--dry-run"],
        ] {
            assert!(!parses(wrong), "{wrong:?}");
        }
    }
}
