//! What is measured, in which order. Rounds of the two servers alternate, and each pair begins with the other one, so that
//! whatever else the machine does meets both alike.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use howdah_lab::lab::Lab;
use howdah_lab::testing::shared_name;

use crate::load::{closed_loop, open_loop};
use crate::server::{Cluster, Server, floor};
use crate::{body, report};

/// Reviews a second of the latency rounds.
pub const RATE: u32 = 1000;
/// How often the memory is looked at in the long run.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Measures howdah's webhook beside a minimal admission server of the same stack.
#[derive(Debug, Parser)]
pub struct Plan {
    /// Rounds of each kind for each server.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub rounds: u16,
    /// Reviews of a latency round, at 1,000 a second.
    #[arg(long, default_value_t = 15_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub paced: u32,
    /// Reviews of a throughput round, as fast as they are answered.
    #[arg(long, default_value_t = 40_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub flood: u32,
    /// Reviews of the long run, for howdah alone.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(100..=10_000_000))]
    pub long: u32,
    /// Starts whose time is taken, for each server.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub starts: u16,
    /// The folder of the report.
    #[arg(long, default_value = "docs/benchmarks")]
    pub report: PathBuf,
}

/// What was measured of one server.
#[derive(Debug, Default)]
pub struct Measured {
    /// From start to ready.
    pub starts: Vec<Duration>,
    /// Of each latency round: every time from due to answered, sorted.
    pub latencies: Vec<Vec<Duration>>,
    /// Of each throughput round: reviews a second.
    pub throughputs: Vec<f64>,
    /// Of each throughput round: processor time of the server per review.
    pub costs: Vec<Duration>,
    /// Resident memory at the peak, after all rounds, in KiB.
    pub memory_peak_kib: u64,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Results {
    /// Howdah's webhook.
    pub howdah: Measured,
    /// The minimal server.
    pub floor: Measured,
    /// Resident memory of howdah's webhook in the long run: reviews so far and KiB.
    pub memory: Vec<(usize, u64)>,
    /// How long the long run took.
    pub long: Duration,
}

impl Plan {
    /// Measures everything.
    ///
    /// # Errors
    /// If a server does not start, or answers one review in another way than by allowing it.
    pub fn run(&self) -> Result<Results> {
        let lab = Lab::open_or_up_without_ceph(&shared_name())?;
        let cluster = Cluster::prepare(&lab)?;
        let requests = body::requests();
        let mut results = Results::default();
        // The first start makes the authority; those of every day find it.
        cluster.howdah()?.stop()?;
        for round in 0..self.starts {
            eprintln!("start {} of {}", round + 1, self.starts);
            let server = cluster.howdah()?;
            results.howdah.starts.push(server.start_to_ready);
            server.stop()?;
            let server = floor(&lab)?;
            results.floor.starts.push(server.start_to_ready);
            server.stop()?;
        }
        let (howdah, floor) = (cluster.howdah()?, floor(&lab)?);
        // Neither is measured cold.
        for server in [&howdah, &floor] {
            closed_loop(&server.target, &requests, self.flood as usize / 4, LOOK_EVERY, |_| ())?;
        }
        for round in 0..self.rounds {
            eprintln!("round {} of {}", round + 1, self.rounds);
            let mut pair = [(&howdah, &mut results.howdah), (&floor, &mut results.floor)];
            if round % 2 == 1 {
                pair.reverse();
            }
            for (server, measured) in &mut pair {
                measured.latencies.push(open_loop(&server.target, &requests, RATE, self.paced as usize)?);
            }
            for (server, measured) in &mut pair {
                self.flood(server, &requests, measured)?;
            }
        }
        results.howdah.memory_peak_kib = howdah.memory_kib(true)?;
        results.floor.memory_peak_kib = floor.memory_kib(true)?;
        floor.stop()?;
        eprintln!("{} reviews", self.long);
        let mut memory = Vec::new();
        results.long = closed_loop(&howdah.target, &requests, self.long as usize, LOOK_EVERY, |reviews| {
            memory.extend(howdah.memory_kib(false).ok().map(|kib| (reviews, kib)));
        })?;
        memory.push((self.long as usize, howdah.memory_kib(false)?));
        results.memory = memory;
        howdah.stop()?;
        Ok(results)
    }

    fn flood(&self, server: &Server, requests: &[Vec<u8>; 2], measured: &mut Measured) -> Result<()> {
        let before = server.processor_time()?;
        let took = closed_loop(&server.target, requests, self.flood as usize, LOOK_EVERY, |_| ())?;
        measured.throughputs.push(f64::from(self.flood) / took.as_secs_f64());
        measured.costs.push((server.processor_time()? - before) / self.flood);
        Ok(())
    }

    /// Writes the report.
    ///
    /// # Errors
    /// If its files cannot be written.
    pub fn report(&self, results: &Results) -> Result<()> {
        report::write(self, results)
    }
}
