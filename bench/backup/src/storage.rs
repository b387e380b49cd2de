//! What a backup and a restore cost, on a real Ceph: a backup beside the two commands that it cannot do without, the
//! database while backups are taken beside the database left alone, and a swap beside a rollback as images grow.

mod load;
mod report;

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use howdah_core::backup::{BackupStatus, Phase};
use howdah_core::restore;
use howdah_lab::postgres::DEBIAN_MAJOR;
use howdah_lab::process::wait_until;
use howdah_lab::stage::{Database, RESTORE_LIMIT, Stage};
use serde_json::json;

use self::load::{Load, pgbench};

/// Where the scheduler of the benchmark listens.
const PORT: u16 = 18098;
/// Clients of pgbench: what two processors keep busy.
const CLIENTS: &str = "4";
/// Scale of pgbench: 75 MB, which fits the volume, and takes checkpoints that are seen.
const SCALE: &str = "5";
/// Size of the volume of the database that is backed up.
const VOLUME: &str = "2Gi";
/// Size of the images that are written to, in GiB.
const WRITTEN_GIB: u32 = 2;
/// A database of the usual kind: the stage's own would write a checkpoint a second.
const SETTINGS: [&str; 3] =
    ["shared_buffers = '64MB'", "max_wal_size = '512MB'", "checkpoint_timeout = '5min'"];

/// pgbench runs so long before its first round.
const WARM_UP: Duration = Duration::from_secs(15);
/// A round begins with a full second, so that all together take up to a second each more than they last.
const SLACK: Duration = Duration::from_secs(200);

/// What is done in a round of pgbench.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Alone,
    Bare,
    Backup,
}

/// All orders of the three.
const ORDERS: [[Kind; 3]; 6] = {
    use Kind::{Alone, Backup, Bare};
    [
        [Alone, Bare, Backup],
        [Bare, Backup, Alone],
        [Backup, Alone, Bare],
        [Backup, Bare, Alone],
        [Alone, Backup, Bare],
        [Bare, Alone, Backup],
    ]
};

/// Measures backups and restores.
#[derive(Debug, Parser)]
pub struct Plan {
    /// Pairs of a backup and the bare commands.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=200))]
    pub backups: u16,
    /// Rounds of pgbench, each once with a backup, once with the bare commands, and once with neither.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(2..=60))]
    pub rounds: u16,
    /// Seconds of a pgbench round.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(15..=600))]
    pub seconds: u16,
    /// Sizes of the images that are restored, in GiB.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64, 1024])]
    pub sizes: Vec<u32>,
    /// MiB that are overwritten in an image of 2 GiB between its backup and its restore.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 256, 768])]
    pub written: Vec<u32>,
    /// The folder of the report.
    #[arg(long, default_value = "docs/benchmarks")]
    pub report: PathBuf,
}

/// One pgbench round.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// Transactions a second.
    pub tps: f64,
    /// The longest transaction.
    pub stall: Duration,
}

/// The restores of one image.
#[derive(Debug)]
pub struct Restored {
    /// Its size, in GiB.
    pub gib: u32,
    /// What was overwritten between the backup and the restore, in MiB, beside a few rows.
    pub written_mib: u32,
    /// What a swap does between the proofs and the start.
    pub swap: Duration,
    /// What a rollback does there.
    pub rollback: Duration,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Results {
    /// `CHECKPOINT` and `rbd snap create`, one after the other.
    pub bare: Vec<Duration>,
    /// The same backup by howdah, from its first attempt to its end, by its record.
    pub howdah: Vec<Duration>,
    /// Of each of these, the steps in backup mode.
    pub held: Vec<Duration>,
    /// Of each of these, all steps until it is recorded: all but the pruning of older ones.
    pub recorded: Vec<Duration>,
    /// The steps of the last backup: phase and milliseconds.
    pub steps: Vec<(&'static str, u64)>,
    /// Rounds without.
    pub alone: Vec<Round>,
    /// Rounds with the bare commands.
    pub snapped: Vec<Round>,
    /// Rounds with a backup.
    pub backed_up: Vec<Round>,
    /// By image size.
    pub restores: Vec<Restored>,
}

impl Plan {
    /// Measures everything and writes the report.
    ///
    /// # Errors
    /// If a part does not start, or a backup or restore fails.
    pub fn run(&self) -> Result<()> {
        let stage = Stage::alone();
        stage.grant();
        let scheduler = stage.scheduler("bench-scheduler", PORT);
        let mut results = Results::default();
        {
            let mut database = stage.database_on("pg", VOLUME, json!({"howdah.dev/retention": "last=2"}));
            for setting in SETTINGS {
                database.sql(&format!("ALTER SYSTEM SET {setting}"));
            }
            database.server.restart(DEBIAN_MAJOR);
            pgbench(&database, &["--initialize", "--quiet", "--scale", SCALE])?;
            for pair in 0..self.backups {
                eprintln!("backup {} of {}", pair + 1, self.backups);
                // Whoever comes first finds more to write in its checkpoint: they take turns.
                for turn in 0..2 {
                    pgbench(&database, &["--transactions", "200", "--client", CLIENTS])?;
                    if (turn + pair) % 2 == 0 {
                        results.bare.push(bare(&database)?);
                    } else {
                        let (took, status) = backup(&database, &format!("bench-{pair}"))?;
                        results.howdah.push(took);
                        use Phase::{Pruning, Snapshotting, StartingBackupMode, StoppingBackupMode};
                        results.held.push(time_in(&status, |phase| {
                            matches!(phase, StartingBackupMode | Snapshotting | StoppingBackupMode)
                        }));
                        results.recorded.push(time_in(&status, |phase| phase != Pruning));
                        results.steps = status
                            .steps
                            .iter()
                            .map(|step| (step.phase.as_str(), step.took_ms.unwrap_or_default()))
                            .collect();
                    }
                }
            }
            self.load(&database, &mut results)?;
        }
        let by_size = self.sizes.iter().map(|gib| (*gib, 0));
        for (gib, written_mib) in by_size.chain(self.written.iter().map(|mib| (WRITTEN_GIB, *mib))) {
            eprintln!("restores of {gib} GiB with {written_mib} MiB overwritten");
            results.restores.push(restores(&stage, gib, written_mib)?);
        }
        scheduler.stop()?;
        report::write(self, &results)
    }

    /// Rounds of one pgbench. What was before a round works on in it, so each kind comes after each other equally often.
    fn load(&self, database: &Database<'_>, results: &mut Results) -> Result<()> {
        let rounds = u64::from(self.rounds) * 3 * u64::from(self.seconds);
        let load = Load::start(database, WARM_UP.as_secs() + rounds + SLACK.as_secs())?;
        thread::sleep(WARM_UP);
        let mut kinds = Vec::new();
        let mut times = Vec::new();
        for (number, order) in (0..self.rounds).zip(ORDERS.iter().cycle()) {
            eprintln!("pgbench round {} of {}", number + 1, self.rounds);
            for kind in order {
                kinds.push(*kind);
                times.push(self.round(|| match kind {
                    Kind::Alone => Ok(()),
                    Kind::Bare => bare(database).map(drop),
                    Kind::Backup => backup(database, &format!("load-{number}")).map(drop),
                })?);
            }
        }
        for (kind, round) in kinds.into_iter().zip(load.rounds(&times)?) {
            match kind {
                Kind::Alone => results.alone.push(round),
                Kind::Bare => results.snapped.push(round),
                Kind::Backup => results.backed_up.push(round),
            }
        }
        Ok(())
    }

    /// One round, with something done a third into it; from which second of the epoch to which it was.
    fn round(&self, work: impl FnOnce() -> Result<()>) -> Result<(u64, u64)> {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).context("read the clock");
        let from = now()?.as_secs() + 1;
        let to = from + u64::from(self.seconds);
        let sleep_until = |second: u64| {
            thread::sleep(Duration::from_secs(second).saturating_sub(now()?));
            anyhow::Ok(())
        };
        sleep_until(from + u64::from(self.seconds / 3))?;
        work()?;
        ensure!(
            now()?.as_secs() < to,
            "measure a round of {} s: what is done in it takes longer",
            self.seconds
        );
        sleep_until(to)?;
        Ok((from, to))
    }
}

/// A rollback and a swap of one image.
fn restores(stage: &Stage, gib: u32, written_mib: u32) -> Result<Restored> {
    let name = format!("size-{gib}-{written_mib}");
    let mut database = stage.database_on(&name, &format!("{gib}Gi"), json!({}));
    // Twice to the same blocks: a rollback removes what is new, and brings back what was overwritten.
    write(&database, written_mib, 0)?;
    backup(&database, &format!("{name}-backup"))?;
    write(&database, written_mib, u32::MAX)?;
    database.stop();
    let restore = |method: &str| {
        let record = format!("{name}-{method}");
        stage.apply(&json!({"apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresRestore",
            "metadata": {"name": record},
            "spec": {"statefulSet": name, "to": format!("{name}-backup"), "method": method}}));
        let status = || stage.restore(&record).unwrap_or_default();
        let over = wait_until(RESTORE_LIMIT, || status().phase.is_terminal());
        let status = status();
        ensure!(over && status.phase == restore::Phase::Completed, "restore {name}: {status:?}");
        let work = status.steps.iter().filter(|step| {
            use restore::Phase::{Bookkeeping, Placing, Preparing, RollingBack, Safeguarding, SettingAside};
            matches!(
                step.phase,
                Preparing | SettingAside | Placing | Bookkeeping | Safeguarding | RollingBack
            )
        });
        anyhow::Ok(Duration::from_millis(work.filter_map(|step| step.took_ms).sum()))
    };
    let rollback = restore("rollback")?;
    Ok(Restored { gib, written_mib, swap: restore("swap")?, rollback })
}

/// Writes a file of so many MiB beside the database, in the place of what it held; no two blocks are alike, nor are those
/// of another `mask`.
fn write(database: &Database<'_>, mib: u32, mask: u32) -> Result<()> {
    let path = database.server.mapping().path().join("written");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .context("open a file beside the database")?;
    for number in 0..mib {
        let block: Vec<u8> =
            (0..1_u32 << 18).flat_map(|word| (word ^ number << 18 ^ mask).to_le_bytes()).collect();
        file.write_all(&block).context("write beside the database")?;
    }
    file.sync_all().context("sync what was written beside the database")
}

/// What no backup can do without.
fn bare(database: &Database<'_>) -> Result<Duration> {
    let snapshot = format!("{}@bare", database.image());
    let start = Instant::now();
    database.sql("CHECKPOINT");
    database.stage.lab.rbd(&["snap", "create", "--no-progress", &snapshot])?;
    let took = start.elapsed();
    database.stage.lab.rbd(&["snap", "rm", "--no-progress", &snapshot])?;
    Ok(took)
}

fn backup(database: &Database<'_>, name: &str) -> Result<(Duration, BackupStatus)> {
    database.order(name, Some("online"));
    let status = database.stage.wait_over(name);
    ensure!(status.phase == Phase::Taken, "take the backup {name}: {:?}", status.failure);
    let (Some(from), Some(to)) = (status.started_at, status.finished_at) else {
        anyhow::bail!("read when the backup {name} began and ended")
    };
    Ok((Duration::try_from(to.duration_since(from)).context("read a time")?, status))
}

/// The time of those steps of a backup.
fn time_in(status: &BackupStatus, phases: impl Fn(Phase) -> bool) -> Duration {
    let steps = status.steps.iter().filter(|step| phases(step.phase));
    Duration::from_millis(steps.filter_map(|step| step.took_ms).sum())
}
