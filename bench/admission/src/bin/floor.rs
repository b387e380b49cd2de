//! Runs the floor of the admission benchmark.

use clap::Parser as _;
use howdah_bench_admission::floor::{Args, serve};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    serve(Args::parse()).await
}
