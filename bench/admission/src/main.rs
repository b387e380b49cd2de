//! `make bench-admission`: howdah's webhook and a minimal admission server beside it, the same reviews through both.

use clap::Parser as _;
use howdah_bench_admission::plan::Plan;

fn main() -> anyhow::Result<()> {
    let plan = Plan::parse();
    let results = plan.run()?;
    plan.report(&results)
}
