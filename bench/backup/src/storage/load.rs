//! pgbench on a database of the stage.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use howdah_lab::netns::BRIDGE_ADDRESS;
use howdah_lab::postgres::{DEBIAN_MAJOR, PASSWORD};
use howdah_lab::stage::Database;
use howdah_lab::testing::Process;
use tempfile::TempDir;

use super::{CLIENTS, Round};

/// For pgbench to end after its time: it waits for the transactions that are under way.
const END_LIMIT: Duration = Duration::from_secs(60);

/// Runs pgbench to its end.
///
/// # Errors
/// If it fails.
pub fn pgbench(database: &Database<'_>, arguments: &[&str]) -> Result<()> {
    let mut pgbench = command(database);
    let ran = database.stage.lab.output_inside(pgbench.args(arguments).arg("postgres"));
    ran.map(drop).context("run pgbench")
}

fn command(database: &Database<'_>) -> Command {
    let mut pgbench = database.stage.lab.command(format!("/usr/lib/postgresql/{DEBIAN_MAJOR}/bin/pgbench"));
    let (host, port) = (BRIDGE_ADDRESS.to_string(), database.server.place().port().to_string());
    pgbench.env("PGPASSWORD", PASSWORD).args(["-h", &host, "-p", &port, "-U", "postgres"]);
    pgbench
}

/// The usual transactions, one after the other, and what became of them in each second. It ends when this is dropped.
pub struct Load {
    process: Process,
    /// Where pgbench writes its log.
    directory: TempDir,
    /// It ends by itself before that.
    limit: Duration,
}

impl Load {
    /// Starts them, for so many seconds.
    ///
    /// # Errors
    /// If pgbench does not start.
    pub fn start(database: &Database<'_>, seconds: u64) -> Result<Self> {
        let directory = tempfile::tempdir().context("make a directory for the log of pgbench")?;
        let prefix = directory.path().join("log").display().to_string();
        let mut command = command(database);
        command.args(["--no-vacuum", "--client", CLIENTS, "--time", &seconds.to_string()]);
        command.args(["--log", "--aggregate-interval", "1", "--log-prefix", &prefix, "postgres"]);
        let process = database.stage.lab.spawn_inside("pgbench", &command)?;
        Ok(Self { process, directory, limit: Duration::from_secs(seconds) + END_LIMIT })
    }

    /// Waits for its end, and says what it did in each of these times: seconds of the epoch, the second one excluded.
    ///
    /// # Errors
    /// If it does not end, or did nothing in one of these times.
    pub fn rounds(mut self, times: &[(u64, u64)]) -> Result<Vec<Round>> {
        ensure!(self.process.wait_gone(self.limit), "wait for the end of pgbench");
        let mut log = String::new();
        for file in fs::read_dir(self.directory.path()).context("list the logs of pgbench")? {
            log += &fs::read_to_string(file?.path()).context("read a log of pgbench")?;
        }
        let all = seconds_of(&log);
        let round = |(from, to): &(u64, u64)| {
            let inside = || all.iter().filter(|second| (*from..*to).contains(&second.at));
            let transactions: u64 = inside().map(|second| second.transactions).sum();
            ensure!(transactions > 0, "run pgbench: it made no transaction from {from} to {to}");
            let stall = inside().map(|second| second.longest).max().unwrap_or_default();
            Ok(Round { tps: transactions as f64 / (to - from) as f64, stall })
        };
        times.iter().map(round).collect()
    }
}

/// What pgbench did in one second.
struct Second {
    /// Of the epoch.
    at: u64,
    transactions: u64,
    /// The longest transaction that ended in it.
    longest: Duration,
}

/// Reads lines of `interval_start num_transactions sum_latency sum_latency_2 min_latency max_latency`, latencies in
/// microseconds (PostgreSQL: pgbench, "Aggregated Logging").
fn seconds_of(log: &str) -> Vec<Second> {
    let second = |line: &str| {
        let mut fields = line.split(' ');
        let (at, transactions) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let longest = Duration::from_micros(fields.nth(3)?.parse().ok()?);
        Some(Second { at, transactions, longest })
    };
    log.lines().filter_map(second).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_found_in_what_pgbench_logs() {
        let all = seconds_of("1732824000 1817 2000000 3000000 900 45000\n1732824001 0 0 0 0 0\nnothing\n");
        let all: Vec<_> = all.iter().map(|second| (second.at, second.transactions, second.longest)).collect();
        assert_eq!(
            all,
            [(1_732_824_000, 1817, Duration::from_millis(45)), (1_732_824_001, 0, Duration::ZERO)]
        );
    }
}
