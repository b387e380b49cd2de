//! `make bench-scale` and `make bench-backup`: the scheduler over ten thousand databases, and what a backup and a restore
//! cost.

use clap::Parser;
use howdah_bench_backup::{scale, storage};

/// Measures the scheduler.
#[derive(Debug, Parser)]
enum Benchmark {
    Scale(scale::Plan),
    Storage(storage::Plan),
}

fn main() -> anyhow::Result<()> {
    match Benchmark::parse() {
        Benchmark::Scale(plan) => plan.run(),
        Benchmark::Storage(plan) => plan.run(),
    }
}
