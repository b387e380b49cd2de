//! `make bench-scale`: the scheduler over ten thousand databases, on a real API server.

use clap::Parser as _;
use howdah_bench_backup::scale::Plan;

fn main() -> anyhow::Result<()> {
    Plan::parse().run()
}
