//! The scheduler over many databases: a small crowd, a large one, and the large one with a long history of some, all idle;
//! then the large one all due at once.

mod crowd;
mod report;
mod watched;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use howdah_lab::lab::Lab;
use howdah_lab::repository;
use howdah_lab::testing::shared_name;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use self::watched::{Scheduler, more, requests};

/// How long the idle scheduler is looked at.
const IDLE: Duration = Duration::from_secs(60);
/// Between giving all the schedule and its slot: longer than giving it takes.
const BEFORE_SLOT: SignedDuration = SignedDuration::from_mins(3);
/// After the slot: the jitter of a daily schedule, and some ticks.
const AFTER_SLOT: SignedDuration = SignedDuration::from_secs(330);

/// Measures the scheduler over many databases.
#[derive(Debug, Parser)]
pub struct Plan {
    /// Databases of the large crowd.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=20_000))]
    pub databases: u32,
    /// Databases of the small crowd.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(10..=1_000))]
    pub few: u32,
    /// Backups of each database.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=10))]
    pub records: u32,
    /// Databases with a long history: the API server of two processors holds a hundred thousand backups, not a million.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(10..=1_000))]
    pub deep: u32,
    /// Backups of each of those.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(11..=1_000))]
    pub history: u32,
    /// The folder of the report.
    #[arg(long, default_value = "docs/benchmarks")]
    pub report: PathBuf,
}

/// What was measured of an idle scheduler over one crowd.
#[derive(Debug)]
pub struct Idle {
    /// How many databases.
    pub databases: u32,
    /// How many backups in all.
    pub backups: u32,
    /// From the start of the process to the end of its first tick.
    pub start_to_first_tick: Duration,
    /// Resident memory after the first lists, at the peak, in KiB.
    pub peak_kib: u64,
    /// Resident memory while idle, in KiB.
    pub memory_kib: u64,
    /// The mean length of an idle tick.
    pub tick: Duration,
    /// Ticks in that time.
    pub ticks: u64,
    /// Requests for StatefulSets and records in that time.
    pub requests: u64,
}

/// Everything that was measured.
#[derive(Debug)]
pub struct Results {
    /// Over the small crowd, the large one, and the large one with the long history of some.
    pub idle: Vec<Idle>,
    /// Over the large crowd, all due in one slot: how late each was found, sorted.
    pub lateness: Vec<Duration>,
    /// The peak of the memory after that, in KiB.
    pub peak_kib: u64,
}

impl Plan {
    /// Measures everything and writes the report.
    ///
    /// # Errors
    /// If the lab or the scheduler does not start, or not every database is found due.
    pub fn run(&self) -> Result<()> {
        ensure!(self.few < self.databases, "--few is {}, wanted less than --databases", self.few);
        ensure!(self.deep <= self.databases, "--deep is {}, wanted at most --databases", self.deep);
        let lab = Lab::open_or_up_without_ceph(&shared_name())?;
        install(&lab)?;
        let runtime = tokio::runtime::Runtime::new().context("start a runtime")?;
        let client = runtime.block_on(lab.client())?;
        let mut idle = Vec::new();
        let mut made = 0;
        for databases in [self.few, self.databases] {
            eprintln!("making {databases} databases with {} backups each", self.records);
            runtime.block_on(crowd::make(&lab, &client, made, databases, self.records))?;
            made = databases;
            idle.push(measure_idle(&lab, databases, databases * self.records)?);
            eprintln!("{:?}", idle.last());
        }
        let more = self.history - self.records;
        eprintln!("making {more} backups more for each of {} databases", self.deep);
        runtime.block_on(crowd::deepen(&client, self.deep, self.records, self.history))?;
        idle.push(measure_idle(&lab, made, made * self.records + self.deep * more)?);
        eprintln!("{:?}", idle.last());
        let scheduler = Scheduler::start(&lab)?;
        let slot = Timestamp::now() + BEFORE_SLOT;
        let utc = slot.to_zoned(TimeZone::UTC);
        eprintln!("giving all a schedule of {:02}:{:02} UTC", utc.hour(), utc.minute());
        runtime.block_on(crowd::schedule(
            &client,
            self.databases,
            &format!("{} {} * * *", utc.minute(), utc.hour()),
        ))?;
        let left = (slot + AFTER_SLOT).duration_since(Timestamp::now());
        std::thread::sleep(Duration::try_from(left).unwrap_or_default());
        let mut lateness = scheduler.lateness()?;
        lateness.sort_unstable();
        let peak_kib = scheduler.memory_kib(true)?;
        scheduler.stop()?;
        ensure!(
            lateness.len() == self.databases as usize,
            "{} of {} databases were found due",
            lateness.len(),
            self.databases
        );
        report::write(self, &Results { idle, lateness, peak_kib })
    }
}

/// Looks at an idle scheduler over what is there.
fn measure_idle(lab: &Lab, databases: u32, backups: u32) -> Result<Idle> {
    eprintln!("looking at an idle scheduler");
    let scheduler = Scheduler::start(lab)?;
    let (ticks_before, time_before) = scheduler.ticks()?;
    let before = requests(lab)?;
    std::thread::sleep(IDLE);
    let after = requests(lab)?;
    let (ticks, time) = scheduler.ticks()?;
    let idle = Idle {
        databases,
        backups,
        start_to_first_tick: scheduler.start_to_first_tick,
        peak_kib: scheduler.memory_kib(true)?,
        memory_kib: scheduler.memory_kib(false)?,
        tick: Duration::from_secs_f64((time - time_before) / (ticks - ticks_before).max(1.0)),
        ticks: (ticks - ticks_before) as u64,
        requests: more(&before, &after),
    };
    scheduler.stop()?;
    Ok(idle)
}

/// The definitions and the namespace, as they are installed.
fn install(lab: &Lab) -> Result<()> {
    let parts = ["deploy/base/namespace.yaml", "deploy/base/crds"];
    let parts = parts.map(|part| format!("--filename={}", repository::root().join(part).display()));
    let apply = ["apply", "--server-side", "--force-conflicts"];
    let arguments: Vec<&str> = apply.into_iter().chain(parts.iter().map(String::as_str)).collect();
    lab.kubectl_ok(&arguments).map(drop)
}
