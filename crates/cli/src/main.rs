//! The `incipit` command: tunes soft prompts on frozen T5 models.

mod allocator;
mod args;
mod cluster;
mod commands;
mod examples;
mod exit;
mod interrupt;
mod loading;
mod machine;
mod output;
mod progress;
mod ranks;
mod report;
mod supervisor;
mod telemetry;
mod units;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

use args::{Cli, Command};
use exit::{BadInput, Exit};

fn main() -> ExitCode {
    allocator::set_up();
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    take_rank(&cli.command);
    if cli.global.quiet {
        progress::be_quiet();
    }
    let exporter = match telemetry::start(&cli) {
        Ok(exporter) => exporter,
        Err(error) => return exit::report(&error).into(),
    };
    let span = telemetry::command_span(&matches, &cli.command);
    let exit = span.in_scope(|| {
        let exit = run(cli).unwrap_or_else(|error| exit::report(&error));
        telemetry::ended(&span, exit);
        exit
    });
    drop(span);
    exporter.end();
    exit.into()
}

fn run(cli: Cli) -> anyhow::Result<Exit> {
    ranks::end_with_launcher()?;
    machine::check_isa()?;
    let global = cli.global;
    start_threads(global.threads.or_else(|| ranks::share_of_cores().filter(|_| can_be_ranks(&cli.command))))?;
    match cli.command {
        Command::Demo(args) => commands::demo::run(&args, &global),
        Command::Train(args) => commands::train::run(*args, &global),
        Command::Multitask(args) => commands::multitask::run(*args, &global),
        Command::Paper(args) => commands::paper::run(&args, &global),
        Command::Pretrain(args) => commands::pretrain::run(&args, &global),
        Command::Eval(args) => commands::eval::run(&args, &global),
        Command::Generate(args) => commands::generate::run(&args, &global),
        Command::Ensemble(command) => commands::ensemble::run(command, &global),
        Command::Task(command) => commands::task::run(&command, &global),
        Command::Inspect(command) => commands::inspect::run(&command, &global),
        Command::Convert(command) => commands::convert::run(&command, &global),
        Command::Bench(command) => commands::bench::run(&command, &global),
        Command::Launch(args) => commands::launch::run(&args, &global),
        Command::Up(args) => commands::up::run(&args),
        Command::Coordinator(args) => commands::coordinator::run(args, &global),
        Command::Worker(args) => commands::worker::run(args),
        Command::Job(args) => commands::job::run(args, &global),
        Command::Backbone(args) => commands::backbones::run(args, &global),
        Command::Checkpoint(args) => commands::checkpoint::run(args, &global),
        Command::Prompt(args) => commands::prompt::run(args, &global),
        Command::Workers(args) => commands::workers::run(args, &global),
        Command::Engine(args) => commands::engine::run(&args),
        Command::Doctor(args) => commands::doctor::run(&args, &global),
    }
}

/// Whether several processes can do the command together.
fn can_be_ranks(command: &Command) -> bool {
    matches!(
        command,
        Command::Train(_)
            | Command::Pretrain(_)
            | Command::Eval(_)
            | Command::Generate(_)
            | Command::Ensemble(_)
            | Command::Multitask(_)
            | Command::Bench(_)
    )
}

/// Of several ranks, rank 0 alone prints results and notes.
fn take_rank(command: &Command) {
    let Some(rank) = ranks::rank_of_process().filter(|rank| *rank > 0 && can_be_ranks(command)) else {
        return;
    };
    output::be_silent();
    progress::be_quiet();
    if !ranks::launched() {
        progress::speak_as(rank);
    }
}

fn start_threads(threads: Option<u16>) -> anyhow::Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(usize::from(threads));
    pool.build_global().map_err(|error| BadInput(format!("--threads {threads}: {error}")).into())
}
