//! pgbench on a database of the stage.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use howdah_lab::netns::BRIDGE_ADDRESS;
use howdah_lab::postgres::{DEBIAN_MAJOR, PASSWORD};
use howdah_lab::stage::Database;

use super::{CLIENTS, Round};

/// Runs pgbench, and says what it prints.
///
/// # Errors
/// If it fails.
pub fn pgbench(database: &Database<'_>, arguments: &[&str]) -> Result<String> {
    let lab = &database.stage.lab;
    let mut pgbench = lab.command(format!("/usr/lib/postgresql/{DEBIAN_MAJOR}/bin/pgbench"));
    let port = database.server.place().port().to_string();
    pgbench.env("PGPASSWORD", PASSWORD).args([
        "-h",
        &BRIDGE_ADDRESS.to_string(),
        "-p",
        &port,
        "-U",
        "postgres",
    ]);
    lab.output_inside(pgbench.args(arguments).arg("postgres")).context("run pgbench")
}

/// Runs the usual transactions for so long.
///
/// # Errors
/// If pgbench fails, or none was made.
pub fn measured_pgbench(database: &Database<'_>, seconds: u64) -> Result<Round> {
    // Each of its threads writes a line a transaction.
    let directory = tempfile::tempdir().context("make a directory for the log of pgbench")?;
    let prefix = directory.path().join("log").display().to_string();
    let seconds = seconds.to_string();
    let run = ["--no-vacuum", "--client", CLIENTS, "--time", &seconds, "--log", "--log-prefix", &prefix];
    let said = pgbench(database, &run)?;
    let mut longest = 0;
    for log in fs::read_dir(directory.path()).context("list the logs of pgbench")? {
        let text = fs::read_to_string(log?.path()).context("read a log of pgbench")?;
        // client_id transaction_no time script_no time_epoch time_us; the times in microseconds.
        let times = text.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok());
        longest = times.fold(longest, u64::max);
    }
    ensure!(longest > 0, "run pgbench: no transaction was made");
    Ok(Round { tps: tps(&said)?, stall: Duration::from_micros(longest) })
}

fn tps(said: &str) -> Result<f64> {
    let line = said.lines().find_map(|line| line.strip_prefix("tps = "));
    let figure = line.and_then(|rest| rest.split(' ').next()?.parse().ok());
    figure.with_context(|| format!("find the transactions a second in {said:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_found_in_what_pgbench_says() {
        let said = "number of clients: 4\nlatency average = 2.2 ms\ntps = 1817.302845 (without initial connection time)\n";
        assert!((tps(said).unwrap() - 1817.302845).abs() < 1e-9);
        assert!(tps("nothing").is_err());
    }
}
