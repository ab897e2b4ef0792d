//! `incipit launch`: the ranks of a command, as processes of this machine.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::{Command as Process, Stdio};

use anyhow::{Context, Result};
use clap::{Args, Parser as _};
use incipit_collective::store::TcpServer;
use incipit_tune::spec::Backend;

use crate::args::{Cli, Command, Global};
use crate::commands::bench::BenchCommand;
use crate::exit::{BadInput, Exit, bad_input};
use crate::interrupt::signals;
use crate::progress::{self, note};
use crate::ranks::{self, environment};
use crate::supervisor::{How, Outcome, supervise};
use crate::telemetry::FORMAT_VARIABLE;

const AFTER_HELP: &str = "\
Every rank is a process of its own. Rank 0 prints and writes; what other ranks have to say goes to standard error, marked with their \
rank. If one fails, the others are ended within seconds, and the message says which failed first. Ctrl-C is passed on: `train` saves \
a checkpoint. --nproc must be --tp times --dp of the command.

Examples:
  incipit launch --nproc 2 -- train --tp 2 --model ./t5 --train train.jsonl --eval dev.jsonl --out runs/first
  incipit launch --nproc 4 -- eval --tp 2 --dp 2 --prompt runs/first --data test.jsonl
  incipit launch --nproc 2 -- bench collective

On several machines, torchrun or srun starts the ranks; pass --collective gloo (or nccl, with --device cuda) to the command:
  torchrun --no-python --nnodes 2 --nproc-per-node 2 ... incipit train --collective gloo --tp 2 --dp 2 ...
What ranks tell each other is neither encrypted nor authenticated: run them in a network that you trust.
They are found by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (Slurm's SLURM_PROCID and SLURM_NTASKS stand in for the first two), \
or at the store that INCIPIT_STORE names: tcp://HOST:PORT or file:/DIRECTORY.";

/// Flags of `launch`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct LaunchArgs {
    /// Processes to start
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    nproc: u16,
    /// What connects them: gloo, or nccl for ranks with a GPU each [default: gloo]
    #[arg(long, value_name = "gloo|nccl", value_parser = ranks::collective)]
    collective: Option<Backend>,
    /// What every rank does: train, eval, generate, ensemble train or eval, multitask, bench step or bench collective, with its flags
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Starts the ranks, waits for them, and tells how they ended.
///
/// # Errors
/// If the command is none that ranks can do, or they cannot be started.
pub(crate) fn run(args: &LaunchArgs, global: &Global) -> Result<Exit> {
    if args.collective == Some(Backend::Local) {
        return bad_input(
            "--collective local makes ranks of threads, which need no launcher: run the command without `launch`",
        );
    }
    let command = command(args, global)?;
    let server = TcpServer::new("127.0.0.1:0").context("cannot open a store for the ranks to meet")?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let port = server.address().port();
    let processes = (0..args.nproc).map(|rank| {
        let mut process = Process::new(&program);
        process.args(&command).envs(variables(rank, args.nproc, port));
        // What ranks say is read here, and passed on as this process writes.
        process.env(FORMAT_VARIABLE, "text");
        // Other ranks print nothing, and what they should know of the input rank 0 tells them.
        if rank > 0 {
            process.stdin(Stdio::null()).stdout(Stdio::null());
        } else if std::io::stdin().is_terminal() {
            // Ranks are no group of the terminal's foreground, so that it would stop whoever reads.
            process.stdin(Stdio::null());
        }
        process
    });
    let outcome = supervise(processes.collect(), &signals()?)?;
    Ok(tell(&outcome))
}

/// The command as each rank gets it. It is looked at here first, so that a slip in it is told once.
fn command(args: &LaunchArgs, global: &Global) -> Result<Vec<OsString>> {
    let words = std::iter::once(OsString::from("incipit")).chain(args.command.iter().cloned());
    let inner = Cli::try_parse_from(words).unwrap_or_else(|error| error.exit());
    let given = check(&inner.command)?;
    let backend = match (args.collective, given) {
        (Some(asked), Some(given)) if asked != given => {
            return bad_input(format!(
                "launch is to connect the ranks by {asked}, and the command asks for --collective {given}: leave one of them out"
            ));
        }
        (asked, given) => asked.or(given).unwrap_or(Backend::Gloo).to_string(),
    };
    ranks::collective(&backend).map_err(BadInput)?;
    let mut command = args.command.clone();
    let mut add = |wanted: bool, words: &[&str]| {
        if wanted {
            command.extend(words.iter().map(OsString::from));
        }
    };
    add(given.is_none(), &["--collective", &backend]);
    let Global { json, threads, verbose, quiet, log_format } = inner.global;
    if log_format.is_some() {
        return bad_input(
            "launch writes what all ranks say: give it --log-format, before --, and not the command",
        );
    }
    add(global.json && !json, &["--json"]);
    add(global.quiet && !quiet && verbose == 0, &["--quiet"]);
    if let (Some(n), None) = (global.threads, threads) {
        add(true, &["--threads", &n.to_string()]);
    }
    if verbose == 0 && !quiet {
        (0..global.verbose).for_each(|_| add(true, &["--verbose"]));
    }
    Ok(command)
}

/// The collective that the command names.
fn check(command: &Command) -> Result<Option<Backend>> {
    let given = match command {
        Command::Train(args) => args.ranks.collective,
        Command::Eval(args) => args.ranks.collective,
        Command::Generate(args) => {
            if args.reads_standard_input() && std::io::stdin().is_terminal() {
                return bad_input(
                    "ranks cannot read from a terminal: give the texts with --input, with --data or by a pipe",
                );
            }
            args.ranks.collective
        }
        Command::Ensemble(command) => command.collective(),
        Command::Multitask(args) => args.train.ranks.collective,
        Command::Bench(BenchCommand::Step(args)) => args.ranks.collective,
        Command::Bench(BenchCommand::Collective(args)) => args.collective,
        _ => {
            return bad_input(
                "launch starts the ranks of train, eval, generate, ensemble, multitask, bench step and bench collective; run other commands by themselves",
            );
        }
    };
    match given {
        None | Some(Backend::Gloo | Backend::Nccl) => Ok(given),
        Some(other) => bad_input(format!(
            "launch starts processes, and the command asks for --collective {other}: leave --collective out of the command"
        )),
    }
}

/// What tells a rank which one it is.
fn variables(rank: u16, world: u16, port: u16) -> Vec<(&'static str, String)> {
    vec![
        ("RANK", rank.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("WORLD_SIZE", world.to_string()),
        ("LOCAL_WORLD_SIZE", world.to_string()),
        ("MASTER_ADDR", "127.0.0.1".to_owned()),
        ("MASTER_PORT", port.to_string()),
        // The store is new: there is no earlier start to be told from.
        (environment::EPOCH, "0".to_owned()),
        (environment::STORE, format!("tcp://127.0.0.1:{port}")),
        (environment::LAUNCHER, std::process::id().to_string()),
    ]
}

/// Says who failed first and why, and what the exit code is.
fn tell(outcome: &Outcome) -> Exit {
    let Some(blamed) = outcome.blamed() else {
        let stopped = outcome.interrupted || outcome.ends.iter().any(|end| end.how != How::Code(0));
        if stopped && outcome.ends.iter().all(|end| end.how != How::Code(Exit::Interrupted as i32)) {
            note("interrupted");
        }
        return if stopped { Exit::Interrupted } else { Exit::Ok };
    };
    let exit = match blamed.how {
        How::Code(code) => Exit::from(code),
        How::Signal(_) => Exit::Failure,
    };
    let echo = How::Code(Exit::OtherRank as i32);
    if blamed.how == echo && outcome.ends.iter().any(|end| end.rank == 0 && end.how == How::Code(0)) {
        // Nobody failed: rank 0 was done before the others, since nobody read its output any more.
        return Exit::Ok;
    }
    let words = &outcome.last_words;
    let cause = words.get(blamed.rank).map_or("", String::as_str);
    if !cause.is_empty() && words.iter().all(|said| said == cause) {
        // A flag or a file that no rank could use.
        progress::last_words(None, cause);
        return exit;
    }
    let mut told: Vec<&str> = Vec::new();
    for end in std::iter::once(blamed).chain(outcome.ends.iter().filter(|end| end.how != echo)) {
        let said = words.get(end.rank).map_or("", String::as_str);
        if !said.is_empty() && !told.contains(&said) {
            progress::last_words(Some(end.rank), said);
            told.push(said);
        }
    }
    let others = if outcome.ends.len() > 1 { "; the other ranks were ended" } else { "" };
    progress::error(&format!("rank {} failed first: {}{others}", blamed.rank, blamed.how));
    exit
}
