//! `howdah-lab`: a real Kubernetes on real Ceph, on one machine.

use std::process::ExitCode;

use clap::Parser;
use howdah_lab::args::Args;

fn main() -> ExitCode {
    let args = Args::parse();
    match args.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("howdah-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}
