//! The scheduler's process: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser as _;
use howdah_adapters::{shutdown, telemetry};
use howdah_scheduler::args::Args;

fn main() -> ExitCode {
    let args = Args::parse();
    let prepared = shutdown::install_crypto_provider()
        .and_then(|()| telemetry::init_tracing(args.log_format, &args.log));
    if let Err(error) = prepared {
        eprintln!("howdah-scheduler: {error:#}");
        return ExitCode::FAILURE;
    }
    match howdah_scheduler::serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the scheduler ends");
            ExitCode::FAILURE
        }
    }
}
