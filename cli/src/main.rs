//! `kubectl howdah`: what howdah protects, and the few things a user asks of it by hand.

mod args;
mod backup;
mod catalog;
mod lint;
mod protect;
mod prune;
mod restore;
mod status;
mod table;
mod verify;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use howdah_adapters::kubernetes::connect;
use howdah_adapters::shutdown::install_crypto_provider;

use args::{Args, CatalogCommand, Command};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok((text, exit_code)) => {
            print!("{text}");
            exit_code
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            backup::exit_code(&error)
        }
    }
}

/// Does what was asked, and answers with what to print and how to end.
async fn run(Args { kubeconfig, command }: Args) -> anyhow::Result<(String, ExitCode)> {
    install_crypto_provider()?;
    let client = async || connect(kubeconfig.as_deref()).await.context("reach the cluster");
    let text = match command {
        // Its exit code says what was found.
        Command::Lint(arguments) => return lint::run(arguments, client).await,
        Command::Status(arguments) => status::run(client().await?, arguments).await,
        // The manifest can be printed where no cluster can be reached.
        Command::Protect(arguments) if arguments.dry_run => protect::manifest(&arguments),
        Command::Protect(arguments) => protect::run(client().await?, arguments).await,
        Command::Backup(arguments) => backup::run(client().await?, arguments).await,
        Command::Catalog(CatalogCommand::Rebuild(arguments)) => {
            catalog::rebuild(client().await?, arguments).await
        }
        Command::Prune(arguments) => prune::run(client().await?, arguments).await,
        Command::Verify(arguments) => verify::run(client().await?, arguments).await,
        Command::Restore(arguments) => restore::run(client().await?, arguments).await,
    }?;
    Ok((text, ExitCode::SUCCESS))
}
