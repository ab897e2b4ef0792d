//! `docs/cli.md` is what `--help` says.

mod common;

use std::fmt::Write as _;
use std::path::Path;

const COMMANDS: [&[&str]; 15] = [
    &[],
    &["demo"],
    &["train"],
    &["eval"],
    &["generate"],
    &["inspect"],
    &["inspect", "model"],
    &["inspect", "prompt"],
    &["convert"],
    &["convert", "model"],
    &["convert", "prompt"],
    &["bench", "step"],
    &["bench", "collective"],
    &["launch"],
    &["doctor"],
];

const HEAD: &str = "\
# The command line

This is what `incipit COMMAND --help` prints. It is made by `INCIPIT_UPDATE=1 cargo test -p incipit-cli --test help`.

Results go to standard output, all else to standard error. Where a command prints a table, `--json` makes it JSON.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | something failed: a file could not be written, memory ran out |
| 2 | what was given cannot be used: flags, files, data |
| 3 | training stopped at a loss or gradient that was not finite; nothing was updated by it |
| 4 | another rank failed first: its message tells why |
| 130 | interrupted; `train` saved a checkpoint first, `--resume` goes on |

`INCIPIT_ISA` (`avx512bf16`, `avx512`, `avx2` or `portable`) chooses the kernels by hand; `INCIPIT_LOG` takes a filter for the log on
standard error, such as `incipit_tune=debug`.

With `--collective gloo` a process is one rank of several. `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` say which, as torchrun
sets them (`SLURM_PROCID` and `SLURM_NTASKS` where the first two are absent); `INCIPIT_STORE` (`tcp://HOST:PORT` or `file:/DIRECTORY`)
names another place to meet, and `INCIPIT_EPOCH` counts the starts at one place: ranks of an earlier start are refused.
`incipit launch` sets all of them itself.
";

#[test]
fn the_documented_help_is_the_programs() {
    let mut page = HEAD.to_owned();
    for command in COMMANDS {
        let mut args = command.to_vec();
        args.push("--help");
        let help = common::incipit(&args).ok().stdout;
        let lines: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
        let name = ["incipit"].iter().chain(command).copied().collect::<Vec<_>>().join(" ");
        write!(page, "\n## {name}\n\n```text\n{}\n```\n", lines.join("\n")).expect("a string");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cli.md");
    if std::env::var_os("INCIPIT_UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().expect("docs")).expect("docs can be made");
        std::fs::write(&path, &page).expect("docs/cli.md can be written");
    }
    let documented = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        documented == page,
        "docs/cli.md is not what --help says: run INCIPIT_UPDATE=1 cargo test -p incipit-cli --test help"
    );
}

#[test]
fn help_names_no_command_that_is_not_there() {
    let help = common::incipit(&["--help"]).ok().stdout;
    for absent in ["coordinator", "worker"] {
        assert!(!help.contains(absent), "{absent}");
    }
}
