//! The demo's writer, and the book that is kept of it: how many transactions had ended at which LSN.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::lab::Lab;
use crate::netns;

/// The password of deploy/examples/postgres.yaml.
const PASSWORD: &str = "change-me";
/// The load ends by itself after this time, whatever becomes of the demo.
const LOAD_SECONDS: &str = "3000";
/// Transactions per second: enough to be seen, few enough for two cores that are also the nodes.
const LOAD_RATE: &str = "20";
/// How often the transactions are counted, and how often at most: longer than the load lasts.
const COUNT_PAUSE: Duration = Duration::from_secs(1);
const COUNTS_MAX: usize = 3000;

/// A bounded pgbench and the book of its transactions. Dropping it ends both.
pub struct Load {
    pgbench: Child,
    done: Arc<AtomicBool>,
    book: Arc<Mutex<Vec<Count>>>,
    counting: Option<JoinHandle<()>>,
    lab: Lab,
    address: String,
}

/// So many transactions had ended when the write-ahead log had reached `lsn`.
#[derive(Clone, Copy)]
struct Count {
    lsn: u64,
    transactions: u64,
}

impl Load {
    /// Makes pgbench's tables in the database at `address`, and starts to write and to count.
    pub fn start(lab: &Lab, address: &str) -> Result<Self> {
        let mut initialise = client(lab, "pgbench", address);
        initialise.args(["--initialize", "--quiet"]);
        run(lab, initialise).context("make pgbench's tables")?;
        let mut writing = client(lab, "pgbench", address);
        writing
            .args(["--no-vacuum", "--client", "2", "--rate", LOAD_RATE, "--time", LOAD_SECONDS])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let pgbench = netns::within(lab, || writing.spawn())?.context("start pgbench")?;
        let (done, book) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let counting = {
            let (done, book) = (Arc::clone(&done), Arc::clone(&book));
            let (lab, address) = (lab.clone(), address.to_owned());
            thread::spawn(move || {
                for _ in 0..COUNTS_MAX {
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                    // A count that fails is a count not taken: the book then knows less, and never wrongly.
                    if let Ok(count) = count(&lab, &address) {
                        book.lock().unwrap_or_else(PoisonError::into_inner).push(count);
                    }
                    thread::sleep(COUNT_PAUSE);
                }
            })
        };
        let (lab, address) = (lab.clone(), address.to_owned());
        Ok(Self { pgbench, done, book, counting: Some(counting), lab, address })
    }

    /// How many transactions had certainly ended before the write-ahead log reached `lsn`.
    ///
    /// A count's LSN is read after its snapshot of the table was taken, so each transaction counted had
    /// committed before it; no clock is compared.
    pub fn committed_before(&self, lsn: u64) -> Option<u64> {
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        book.iter().filter(|count| count.lsn <= lsn).map(|count| count.transactions).max()
    }

    /// Ends the writing; how many transactions there were in all.
    pub fn stop(mut self) -> Result<u64> {
        self.end()?;
        count_transactions(&self.lab, &self.address)
    }

    fn end(&mut self) -> Result<()> {
        self.done.store(true, Ordering::Relaxed);
        let ended = self.pgbench.try_wait().context("look after pgbench")?;
        if let Some(status) = ended {
            bail!("keep pgbench writing: it ended early, {status}");
        }
        self.pgbench.kill().context("end pgbench")?;
        self.pgbench.wait().context("wait for pgbench's end")?;
        if let Some(counting) = self.counting.take() {
            // A panic there has been printed, and the book holds what was counted.
            let _ = counting.join();
        }
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        // It may have ended before; there is nobody to tell.
        let _ = self.pgbench.kill();
        let _ = self.pgbench.wait();
    }
}

/// Asks the database at `address` one question; the answer's fields are separated by `|`.
pub fn ask(lab: &Lab, address: &str, question: &str) -> Result<String> {
    let mut psql = client(lab, "psql", address);
    psql.args(["--no-psqlrc", "--tuples-only", "--no-align", "--command", question]);
    run(lab, psql)
}

/// How many pgbench transactions the database at `address` holds.
pub fn count_transactions(lab: &Lab, address: &str) -> Result<u64> {
    count(lab, address).map(|count| count.transactions)
}

/// Reads an LSN as PostgreSQL prints it, `16/B374D848`.
pub fn parse_lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    let (high, low) = (u32::from_str_radix(high, 16).ok()?, u32::from_str_radix(low, 16).ok()?);
    Some(u64::from(high) << 32 | u64::from(low))
}

fn count(lab: &Lab, address: &str) -> Result<Count> {
    let answer = ask(lab, address, "select pg_current_wal_lsn(), count(*) from pgbench_history")?;
    let (lsn, transactions) =
        answer.trim().split_once('|').context("read the count: it has no two fields")?;
    Ok(Count {
        lsn: parse_lsn(lsn).with_context(|| format!("read the LSN {lsn:?}"))?,
        transactions: transactions.parse().with_context(|| format!("read the count {transactions:?}"))?,
    })
}

fn client(lab: &Lab, program: &str, address: &str) -> Command {
    let mut command = lab.command(program);
    command
        .env("PGHOST", address)
        .env("PGUSER", "postgres")
        .env("PGDATABASE", "postgres")
        .env("PGPASSWORD", PASSWORD)
        .env("PGCONNECT_TIMEOUT", "10");
    command
}

fn run(lab: &Lab, mut command: Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = netns::within(lab, || command.output())?.with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        bail!("run {program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("read the answer of {program}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_is_read_as_postgresql_prints_it() {
        assert_eq!(parse_lsn("0/0"), Some(0));
        assert_eq!(parse_lsn("16/B374D848"), Some(0x16_B374_D848));
        for wrong in ["", "16", "16/", "x/1", "1/123456789"] {
            assert_eq!(parse_lsn(wrong), None, "{wrong}");
        }
    }
}
