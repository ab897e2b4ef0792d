//! The `incipit` command: tunes soft prompts on frozen T5 models.

mod args;
mod commands;
mod exit;
mod interrupt;
mod machine;
mod output;
mod progress;
mod report;
mod units;

use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command, Global};
use exit::{BadInput, Exit};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_tracing(&cli.global);
    if cli.global.quiet {
        progress::be_quiet();
    }
    run(cli).unwrap_or_else(|error| exit::report(&error)).into()
}

fn run(cli: Cli) -> anyhow::Result<Exit> {
    machine::check_isa()?;
    let global = cli.global;
    start_threads(global.threads)?;
    match cli.command {
        Command::Demo(args) => commands::demo::run(&args, &global),
        Command::Train(args) => commands::train::run(*args, &global),
        Command::Eval(args) => commands::eval::run(&args, &global),
        Command::Generate(args) => commands::generate::run(&args, &global),
        Command::Inspect(command) => commands::inspect::run(&command, &global),
        Command::Convert(command) => commands::convert::run(&command, &global),
        Command::Bench(command) => commands::bench::run(&command, &global),
        Command::Doctor(args) => commands::doctor::run(&args, &global),
    }
}

/// The libraries' own messages, on standard error. `INCIPIT_LOG` takes a filter (`incipit_tune=debug`) for those who look closer.
fn start_tracing(global: &Global) {
    let level = match global.verbose {
        // A run tells its warnings to whoever watches it, too.
        0 => "warn,incipit_tune::train=error",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("INCIPIT_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter);
    log.with_target(global.verbose > 1).without_time().init();
}

fn start_threads(threads: Option<u16>) -> anyhow::Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(usize::from(threads));
    pool.build_global().map_err(|error| BadInput(format!("--threads {threads}: {error}")).into())
}
