//! `kubectl howdah`: what howdah protects, and the few things a user asks of it by hand.

mod args;
mod protect;
mod prune;
mod status;
mod table;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use howdah_adapters::kubernetes::connect;
use howdah_adapters::shutdown::install_crypto_provider;

use args::{Args, Command};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what was asked, and answers with what to print.
async fn run(Args { kubeconfig, command }: Args) -> anyhow::Result<String> {
    install_crypto_provider()?;
    let client = async || connect(kubeconfig.as_deref()).await.context("reach the cluster");
    match command {
        Command::Status(arguments) => status::run(client().await?, arguments).await,
        // The manifest can be printed where no cluster can be reached.
        Command::Protect(arguments) if arguments.dry_run => protect::manifest(&arguments),
        Command::Protect(arguments) => protect::run(client().await?, arguments).await,
        Command::Prune(arguments) => prune::run(client().await?, arguments).await,
    }
}
