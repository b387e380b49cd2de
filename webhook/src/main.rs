//! The admission webhook of howdah.

use clap::Parser as _;
use howdah_adapters::{shutdown, telemetry};
use howdah_webhook::args::Args;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    shutdown::install_crypto_provider()?;
    let args = Args::parse();
    telemetry::init_tracing(args.log_format, &args.log)?;
    args.run().await
}
