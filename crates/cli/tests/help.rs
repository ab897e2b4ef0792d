//! `docs/cli.md` is what `--help` says.

mod common;

use std::fmt::Write as _;
use std::path::Path;

const COMMANDS: &[&[&str]] = &[
    &[],
    &["demo"],
    &["train"],
    &["pretrain"],
    &["eval"],
    &["generate"],
    &["ensemble"],
    &["ensemble", "train"],
    &["ensemble", "eval"],
    &["multitask"],
    &["paper"],
    &["task"],
    &["task", "list"],
    &["task", "show"],
    &["task", "export"],
    &["task", "mix"],
    &["task", "average"],
    &["inspect"],
    &["inspect", "model"],
    &["inspect", "prompt"],
    &["inspect", "similarity"],
    &["convert"],
    &["convert", "model"],
    &["convert", "prompt"],
    &["bench"],
    &["bench", "step"],
    &["bench", "collective"],
    &["bench", "load"],
    &["launch"],
    &["up"],
    &["coordinator"],
    &["coordinator", "init"],
    &["coordinator", "token"],
    &["worker"],
    &["job"],
    &["job", "submit"],
    &["job", "continue"],
    &["job", "list"],
    &["job", "get"],
    &["job", "watch"],
    &["job", "logs"],
    &["job", "update"],
    &["job", "pause"],
    &["job", "resume"],
    &["job", "cancel"],
    &["job", "delete"],
    &["backbone"],
    &["backbone", "create"],
    &["backbone", "list"],
    &["backbone", "get"],
    &["backbone", "logs"],
    &["backbone", "update"],
    &["backbone", "retry"],
    &["backbone", "delete"],
    &["checkpoint"],
    &["checkpoint", "list"],
    &["checkpoint", "get"],
    &["checkpoint", "download"],
    &["checkpoint", "pin"],
    &["checkpoint", "unpin"],
    &["checkpoint", "delete"],
    &["checkpoint", "verify"],
    &["checkpoint", "gc"],
    &["prompt"],
    &["prompt", "promote"],
    &["prompt", "list"],
    &["prompt", "get"],
    &["prompt", "delete"],
    &["workers"],
    &["workers", "list"],
    &["workers", "get"],
    &["workers", "drain"],
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
| 5 | the job that was watched was cancelled |
| 130 | interrupted; `train` saved a checkpoint first, `--resume` goes on |

`INCIPIT_ISA` (`amxbf16`, `avx512bf16`, `avx512`, `avx2` or `portable`) chooses the kernels by hand; `INCIPIT_LOG` takes a filter for the log on
standard error, such as `incipit_tune=debug`. With `--log-format json`, or `INCIPIT_LOG_FORMAT=json`, everything on standard error is a JSON
object a line, but for refusals of the command line itself. `OTEL_EXPORTER_OTLP_ENDPOINT` names a collector of spans (docs/cluster.md).

With `--collective gloo` a process is one rank of several. `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` say which, as torchrun
sets them (`SLURM_PROCID` and `SLURM_NTASKS` where the first two are absent); `INCIPIT_STORE` (`tcp://HOST:PORT` or `file:/DIRECTORY`)
names another place to meet, and `INCIPIT_EPOCH` counts the starts at one place: ranks of an earlier start are refused.
`incipit launch` sets all of them itself.

`job`, `backbone`, `checkpoint`, `prompt` and `workers` ask a coordinator. `INCIPIT_COORDINATOR` says where it is, `INCIPIT_TOKEN` holds the
token to show, and `INCIPIT_CA` names the certificate of who signed the coordinator's; flags go before them. `job watch` ends with 0 for a job
that succeeded, 1 for one that failed, 2 for one that failed for its data or settings, 3 for one that failed at a loss that was not finite,
and 5 for one that was cancelled. What the coordinator refuses is told with its reason in brackets, and ends with 2 if another request is needed
and with 1 if the same one may succeed later. With `--json`, resources look as protocol buffers write them, and `job watch` and `job logs`
print an object a line.
";

#[test]
fn the_documented_help_is_the_programs() {
    let mut page = HEAD.to_owned();
    for command in COMMANDS {
        let mut args = command.to_vec();
        args.push("--help");
        let help = common::incipit(&args).ok().stdout;
        let lines: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
        let name = ["incipit"].iter().chain(*command).copied().collect::<Vec<_>>().join(" ");
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
fn every_command_of_the_help_is_documented() {
    for command in COMMANDS {
        let help = common::incipit(&[command, &["--help"][..]].concat()).ok().stdout;
        let listed =
            help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
        let names = listed.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
        for name in names.filter(|name| !name.is_empty() && *name != "help") {
            let named = [*command, &[name]].concat();
            assert!(COMMANDS.contains(&&*named), "{named:?} is in --help and not in docs/cli.md");
        }
    }
    let help = common::incipit(&["--help"]).ok().stdout;
    assert!(help.contains("  train ") && help.contains("  job "), "{help}");
}
