//! The admission webhook of howdah.

use clap::Parser as _;
use howdah_adapters::{shutdown, telemetry};
use howdah_webhook::args::Args;
use mimalloc::MiMalloc;

/// A review makes some thousand small values and drops them all: with the allocator of the C library that is a third of
/// its time.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> anyhow::Result<()> {
    shutdown::install_crypto_provider()?;
    let args = Args::parse();
    telemetry::init_tracing(args.log_format, &args.log)?;
    args.run()
}
