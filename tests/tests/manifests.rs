//! `cluster/`: scripts, manifests and recipes of images say what the program understands, agree with each other, and hold what they promise.
//! There is no Kubernetes here and no Docker: manifests are rendered by kubectl and checked against schemas, the commands in them are
//! run by themselves.

mod common;
mod rig;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use common::{arg, command, incipit, root};
use rig::{Running, free_port, tools, until};

/// All files of a folder whose text people or machines run.
fn files(folder: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    Ok(found)
}

/// The commands of `incipit` in a text: the words that follow it, up to the end of the command. Variables that stand for the program and
/// `args:` of a container do as well.
fn commands(text: &str) -> Vec<Vec<String>> {
    let text = text.replace("\\\n", " ");
    let mut found = Vec::new();
    for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
        let line = line.replace(['[', ']', ',', '`'], " ");
        let mut words = line.split_whitespace().map(|word| word.trim_matches(['"', '\'', '(', ')']));
        let mut before = "";
        while let Some(word) = words.next() {
            let program = matches!(word, "incipit" | "$incipit" | "$INCIPIT" | "args:");
            // Not as in `kubectl --namespace incipit`.
            if !program || std::mem::replace(&mut before, word).starts_with("--") {
                before = word;
                continue;
            }
            let ends = |word: &&str| !matches!(*word, "&" | "|" | ";" | "#" | "&&" | "||");
            let command: Vec<String> = words.by_ref().take_while(ends).map(str::to_owned).collect();
            // A program's name has a command behind it; prose has not.
            if command.first().is_some_and(|word| word.chars().all(|c| c.is_ascii_lowercase())) {
                found.push(command);
            }
        }
    }
    found
}

/// What `--help` says of a command, or `None` if there is no such command.
fn help(words: &[String]) -> Result<Option<String>> {
    let ran = incipit(&[words, &["--help".to_owned()]].concat())?;
    Ok((ran.code == 0).then_some(ran.stdout))
}

/// The help of the command that these words begin with, asked for once.
fn help_of(words: &[String], known: &mut BTreeMap<Vec<String>, Option<String>>) -> Result<Option<String>> {
    let names = words.iter().take_while(|word| word.chars().all(|c| c.is_ascii_lowercase())).count().min(2);
    for length in (1..=names).rev() {
        let names = words[..length].to_vec();
        if !known.contains_key(&names) {
            known.insert(names.clone(), help(&names)?);
        }
        if let Some(text) = &known[&names] {
            return Ok(Some(text.clone()));
        }
    }
    Ok(None)
}

#[test]
fn every_command_and_flag_in_cluster_and_examples_is_one() -> Result<()> {
    let (mut known, mut seen, mut flags) = (BTreeMap::new(), 0, 0);
    for path in [files("cluster")?, files("examples")?].concat() {
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        for words in commands(&text) {
            let wanted = words
                .iter()
                .filter(|word| word.starts_with("--"))
                .map(|word| word.split('=').next().unwrap_or(word));
            let wanted: Vec<&str> = wanted.collect();
            let Some(help) = help_of(&words, &mut known)? else {
                ensure!(wanted.is_empty(), "{}: there is no incipit {words:?}", path.display());
                continue; // In a sentence.
            };
            let has: BTreeSet<&str> = help.split(|c: char| c.is_whitespace() || c == ',').collect();
            for flag in &wanted {
                ensure!(has.contains(flag), "{}: incipit {} has no {flag}", path.display(), words.join(" "));
            }
            (seen, flags) = (seen + 1, flags + wanted.len());
        }
    }
    println!("{seen} commands, {flags} flags");
    ensure!(seen >= 10 && flags >= 30, "the commands were not found");
    Ok(())
}

fn run(program: &Path, args: &[String]) -> Result<String> {
    let output = Command::new(program).args(args).output()?;
    let said = [&output.stdout[..], &output.stderr].concat();
    ensure!(output.status.success(), "{}:\n{}", program.display(), String::from_utf8_lossy(&said));
    Ok(String::from_utf8(output.stdout)?)
}

fn rendered(tools: &Path, variant: &str) -> Result<Vec<Value>> {
    let check = arg(root().join("tests/manifests/check.py"));
    let folder = arg(root().join("cluster/kubernetes").join(variant));
    Ok(serde_json::from_str(&run(&tools.join("python"), &[check, folder])?)?)
}

/// The one object of a kind.
fn only<'a>(objects: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let mut found =
        objects.iter().filter(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.next().with_context(|| format!("no {kind} {name}"))
}

const JOB: &str = "/spec/replicatedJobs/0/template/spec";

/// The pod of the coordinator, and that of a worker.
fn pods(objects: &[Value]) -> Result<[&Value; 2]> {
    let coordinator = only(objects, "StatefulSet", "incipit-coordinator")?.pointer("/spec/template/spec");
    let worker = only(objects, "JobSet", "incipit-workers")?.pointer(&format!("{JOB}/template/spec"));
    Ok([coordinator.context("a pod")?, worker.context("a pod")?])
}

#[test]
#[ignore = "long: needs kubectl and schemas, which scripts/test.sh fetches"]
fn manifests_fit_their_schemas_and_each_other() -> Result<()> {
    let Some(tools) = tools("kubectl")? else { return Ok(()) };
    for variant in ["base", "gpu"] {
        let objects = rendered(&tools, variant)?;
        for pod in pods(&objects)? {
            harmless(pod)?;
        }
        ports(&objects)?;
        secrets(&objects)?;
        let jobs = only(&objects, "JobSet", "incipit-workers")?;
        let replicas = jobs["spec"]["replicatedJobs"][0]["replicas"].as_u64();
        let budget =
            only(&objects, "PodDisruptionBudget", "incipit-workers")?["spec"]["minAvailable"].as_u64();
        ensure!(
            replicas == budget.map(|budget| budget + 1),
            "one worker at a time: {replicas:?}, {budget:?}"
        );
        let [coordinator, worker] = pods(&objects)?;
        let script = worker["containers"][0]["args"][0].as_str().context("a script")?;
        let drain = script.split_once("--drain-within ").and_then(|(_, rest)| rest.split(' ').next());
        let drain: u64 = drain.context("--drain-within")?.parse()?;
        let grace = worker["terminationGracePeriodSeconds"].as_u64();
        ensure!(grace > Some(drain), "a drain takes up to {drain} s, and there are {grace:?}");
        let gpus = worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"].as_u64();
        let slots = worker["containers"][0]["env"][1]["value"].as_str().context("SLOTS")?;
        ensure!(gpus.unwrap_or(1).to_string() == slots, "a rank for each GPU");
        ensure!(gpus.is_some() == (variant == "gpu"));
        let images =
            [coordinator, worker].map(|pod| pod["containers"][0]["image"].as_str().unwrap_or_default());
        ensure!(
            images[0].ends_with(":0.1.0") && images[1].ends_with("-cuda") == gpus.is_some(),
            "{images:?}"
        );
        println!("{variant}: {} objects", objects.len());
    }
    Ok(())
}

/// Not root, nothing of its own to write on, no capabilities, and the cluster's filter of system calls.
fn harmless(pod: &Value) -> Result<()> {
    let security = &pod["securityContext"];
    ensure!(security["runAsNonRoot"] == true && security["runAsUser"].as_u64() > Some(0), "root: {security}");
    ensure!(security["seccompProfile"]["type"] == "RuntimeDefault", "{security}");
    ensure!(pod["automountServiceAccountToken"] == false);
    for container in pod["containers"].as_array().context("containers")? {
        let security = &container["securityContext"];
        ensure!(
            security["readOnlyRootFilesystem"] == true && security["allowPrivilegeEscalation"] == false,
            "{security}"
        );
        ensure!(security["capabilities"]["drop"] == serde_json::json!(["ALL"]), "{security}");
        ensure!(
            !container["resources"]["limits"]["memory"].is_null()
                && container["resources"]["limits"]["cpu"].is_null()
        );
    }
    Ok(())
}

/// What listens, what is announced, what is let through and what is called are the same ports.
fn ports(objects: &[Value]) -> Result<()> {
    let [coordinator, worker] = pods(objects)?;
    let config = objects.iter().find(|object| object["kind"] == "ConfigMap").context("a ConfigMap")?;
    let config = config["data"]["coordinator.toml"].as_str().context("coordinator.toml")?;
    let listens = |key: &str| -> Result<u64> {
        let line = config.lines().find(|line| line.starts_with(&format!("{key} = "))).context("listens")?;
        Ok(line.trim_end_matches('"').rsplit(':').next().context("a port")?.parse()?)
    };
    let (grpc, http) = (listens("listen")?, listens("metrics_listen")?);
    let all = serde_json::json!({"grpc": grpc, "http": http});
    let named = |ports: &Value, field: &str| -> Value {
        let ports = ports.as_array().into_iter().flatten();
        ports
            .map(|port| (port["name"].as_str().unwrap_or_default().to_owned(), port[field].clone()))
            .collect()
    };
    let container = &coordinator["containers"][0];
    ensure!(named(&container["ports"], "containerPort") == all, "{}", container["ports"]);
    let service = only(objects, "Service", "incipit-coordinator")?;
    ensure!(named(&service["spec"]["ports"], "port") == all, "{service}");
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        let get = &container[probe]["httpGet"];
        ensure!(get["port"] == "http" && get["path"] == "/livez", "{probe}: {get}");
    }
    let set = only(objects, "StatefulSet", "incipit-coordinator")?;
    ensure!(set["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == http.to_string());
    let policy = only(objects, "NetworkPolicy", "incipit-coordinator")?;
    ensure!(
        policy["spec"]["ingress"][0]["ports"][0]["port"] == grpc
            && policy["spec"]["ingress"][1]["ports"][0]["port"] == http
    );
    let policy = only(objects, "NetworkPolicy", "incipit-workers")?;
    ensure!(policy["spec"]["egress"][1]["ports"][0]["port"] == grpc);
    let called = worker["containers"][0]["env"][0]["value"].as_str().context("COORDINATOR")?;
    ensure!(called == format!("https://incipit-coordinator:{grpc}"), "{called}");
    let help = help(&["coordinator".to_owned()])?.context("help")?;
    ensure!(help.contains(&format!("127.0.0.1:{grpc}")), "the default is another port");
    Ok(())
}

/// The README makes the secrets that the pods mount, with the files that the configuration and the commands name.
fn secrets(objects: &[Value]) -> Result<()> {
    let readme = std::fs::read_to_string(root().join("cluster/kubernetes/README.md"))?;
    let [coordinator, worker] = pods(objects)?;
    let config =
        objects.iter().find(|object| object["kind"] == "ConfigMap").context("a ConfigMap")?.to_string();
    for (pod, names) in [(coordinator, config), (worker, worker["containers"][0]["args"].to_string())] {
        let volumes = pod["volumes"].as_array().context("volumes")?;
        let secret =
            volumes.iter().find_map(|volume| volume["secret"]["secretName"].as_str()).context("a secret")?;
        let made = readme.replace("\\\n", " ");
        let made = made
            .lines()
            .find(|line| line.contains(&format!("create secret generic {secret} ")))
            .context(secret.to_owned())?;
        let files: BTreeSet<&str> = made
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("--from-file=")?.rsplit('/').next())
            .collect();
        let used: BTreeSet<&str> =
            names.split("/secrets/").skip(1).filter_map(|rest| rest.split(['"', ' ', '\\']).next()).collect();
        ensure!(files == used, "{secret}: {files:?} are made, {used:?} are used");
    }
    Ok(())
}

#[test]
#[ignore = "long: needs hadolint and shellcheck, which scripts/test.sh fetches"]
fn linters_have_nothing_to_say() -> Result<()> {
    let Some(tools) = tools("hadolint")? else { return Ok(()) };
    let (mut images, mut scripts) = (Vec::new(), vec!["--shell=bash".to_owned()]);
    for path in files("cluster")? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("Dockerfile") {
            images.push(arg(&path));
        } else if name.ends_with(".sh") || name.ends_with(".sbatch") {
            scripts.push(arg(&path));
        }
    }
    ensure!(images.len() == 2 && scripts.len() == 4, "{images:?} {scripts:?}");
    run(&tools.join("hadolint"), &images)?;
    run(&tools.join("shellcheck"), &scripts)?;
    Ok(())
}

#[test]
fn images_are_of_the_toolchain_that_is_tested_and_run_as_nobody() -> Result<()> {
    let toolchain = std::fs::read_to_string(root().join("rust-toolchain.toml"))?;
    let version = toolchain.split('"').nth(1).context("a version")?.to_owned();
    for name in ["Dockerfile", "Dockerfile.cuda"] {
        let text = std::fs::read_to_string(root().join("cluster/docker").join(name))?;
        ensure!(text.contains(&format!("FROM rust:{version}-")), "{name} is not built with {version}");
        let user = text.lines().rfind(|line| line.starts_with("USER ")).context("a user")?;
        ensure!(user == "USER 10001:10001", "{name}: {user}");
        ensure!(text.contains("\nEXPOSE 7420 7421\n") && text.contains(":7421/livez"), "{name}: ports");
    }
    Ok(())
}

/// What the program has built in, and the parts of the workspace, are sent to Docker.
#[test]
fn dockerignore_leaves_what_the_build_needs() -> Result<()> {
    let ignored = std::fs::read_to_string(root().join(".dockerignore"))?;
    let ignored: Vec<&str> =
        ignored.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let root = root().canonicalize()?;
    let mut needed = vec![
        root.join("Cargo.lock"),
        root.join("tests/Cargo.toml"),
        root.join("proto/incipit"),
        root.join("scripts/cuda-toolkit.sh"),
    ];
    for path in files("crates")?.into_iter().filter(|path| path.extension().is_some_and(|end| end == "rs")) {
        let text = std::fs::read_to_string(&path)?;
        for rest in text.split("include_bytes!(\"").chain(text.split("include_str!(\"")).skip(1) {
            let included =
                path.parent().context("a folder")?.join(rest.split('"').next().unwrap_or_default());
            needed.extend(included.canonicalize().ok());
        }
    }
    ensure!(
        needed.iter().any(|path| path.ends_with("demo/model/config.json")),
        "what is built in was not found"
    );
    for path in needed {
        let path = path.strip_prefix(&root)?;
        ensure!(!ignored.iter().any(|ignored| path.starts_with(ignored)), "{} is ignored", path.display());
    }
    Ok(())
}

/// The command of the worker's container, with other folders.
fn worker_command(folder: &Path) -> Result<String> {
    let text = std::fs::read_to_string(root().join("cluster/kubernetes/base/workers.yaml"))?;
    let lines = text.lines().skip_while(|line| line.trim() != "- |").skip(1);
    let lines = lines.take_while(|line| line.starts_with("                      "));
    let text: String = lines.map(|line| format!("{}\n", line.trim_start())).collect();
    ensure!(text.starts_with("incipit worker "), "{text}");
    Ok(text.replace("/state", &arg(folder.join("state"))).replace("/secrets", &arg(folder.join("secrets"))))
}

/// Runs the container's command with whatever `incipit` is in `bin`.
fn worker(folder: &Path, bin: &Path, coordinator: &str) -> Result<Running> {
    let path = format!("{}:{}", bin.display(), std::env::var("PATH")?);
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(worker_command(folder)?).env("PATH", path).stdin(Stdio::null());
    command.envs([("COORDINATOR", coordinator), ("INDEX", "0"), ("SLOTS", "1"), ("POD_IP", "127.0.0.1")]);
    Running::start(&mut command)
}

#[test]
fn a_worker_that_was_drained_ends_as_a_failure_so_that_its_job_replaces_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("incipit");
    for (does, code) in [
        ("trap 'exit 0' TERM; touch DIR/up; while :; do sleep 0.1; done", 75),
        ("touch DIR/up; sleep 1; exit 2", 2),
    ] {
        std::fs::write(&program, format!("#!/bin/sh\n{}\n", does.replace("DIR", &arg(dir.path()))))?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
        let mut running = worker(dir.path(), dir.path(), "-")?;
        until("it runs", 30, || Ok(dir.path().join("up").exists()))?;
        std::fs::remove_file(dir.path().join("up"))?;
        let ended = if code == 75 {
            running.terminate(Duration::from_secs(10))?
        } else {
            running.0.wait()?.code().unwrap_or(-1)
        };
        ensure!(ended == code, "{ended}");
    }
    Ok(())
}

fn get(port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn the_pods_commands_make_a_cluster_with_the_secrets_that_the_readme_makes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (data, secrets) = (dir.path().join("data"), dir.path().join("secrets"));
    let made =
        incipit(&["coordinator", "init", "--data", &arg(&data), "--host", "incipit-coordinator", "--json"])?
            .ok()?;
    let made: Value = serde_json::from_str(&made.stdout)?;
    common::copy(&data.join("tls"), &secrets)?;
    std::fs::rename(data.join("tokens.toml"), secrets.join("tokens.toml"))?;
    std::fs::remove_dir_all(data.join("tls"))?;

    let (grpc, http) = (free_port()?, free_port()?);
    let config = std::fs::read_to_string(root().join("cluster/kubernetes/base/coordinator.toml"))?;
    let config = config.replace("\"/data\"", &format!("{data:?}")).replace("/secrets", &arg(&secrets));
    let config = config.replace("7420", &grpc.to_string()).replace("7421", &http.to_string());
    let file = dir.path().join("coordinator.toml");
    std::fs::write(&file, config)?;
    let mut coordinator = Running::start(&mut command(&["coordinator", "--config", &arg(&file)])?)?;
    until("the coordinator answers /livez", 30, || {
        Ok(get(http, "/livez").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")))
    })?;

    let bin = common::program()?.parent().context("a folder")?;
    let mut worker = worker(dir.path(), bin, &format!("https://localhost:{grpc}"))?;
    until("the worker is online", 30, || {
        let url = format!("https://localhost:{grpc}");
        let mut list = command(&[
            "workers",
            "list",
            "--json",
            "--coordinator",
            &url,
            "--ca",
            &arg(secrets.join("ca.pem")),
        ])?;
        let list = list.env("INCIPIT_TOKEN", made["token"].as_str().context("a token")?).output()?;
        let said = String::from_utf8_lossy(&list.stdout).into_owned();
        Ok(said.contains("workers/worker-0") && said.contains("ONLINE"))
    })?;
    let (drained, ended) =
        (worker.terminate(Duration::from_secs(30))?, coordinator.terminate(Duration::from_secs(30))?);
    ensure!((drained, ended) == (75, 0), "{drained} {ended}");
    Ok(())
}

/// Executable files with these texts, in a folder of their own.
fn stand_ins(folder: &Path, programs: &[(&str, &str)]) -> Result<()> {
    for (name, text) in programs {
        let file = folder.join(name);
        std::fs::write(&file, format!("#!/bin/bash\n{text}\n"))?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

#[test]
fn slurms_workers_meet_by_the_interface_that_is_named_over_nccl_too() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stand_ins(
        dir.path(),
        &[
            ("srun", "while [ \"$1\" != bash ]; do shift; done; exec \"$@\""),
            (
                "ip",
                "[ \"${*: -1}\" = ib7 ] && echo '7: ib7    inet 10.1.2.3/16 brd 10.1.255.255 scope global ib7'",
            ),
            ("incipit", "echo \"by ${NCCL_SOCKET_IFNAME-nothing}: $*\""),
        ],
    )?;
    std::fs::write(dir.path().join("endpoint"), "https://node:7420\n")?;
    for (interface, set, expected, address) in [
        ("", None, "nothing", ""),
        ("ib7", None, "=ib7", "--address 10.1.2.3 "),
        ("ib7", Some("ib"), "ib", "--address 10.1.2.3 "),
    ] {
        let mut script = Command::new("bash");
        script.arg(root().join("cluster/slurm/workers.sbatch")).env_remove("NCCL_SOCKET_IFNAME");
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH")?);
        script.envs([
            ("PATH", &*path),
            ("SLURM_PROCID", "0"),
            ("SLURMD_NODENAME", "node"),
            ("SLURM_JOB_ID", "1"),
        ]);
        script.env("INCIPIT_HOME", dir.path()).env("INCIPIT_INTERFACE", interface);
        script.envs(set.map(|set| ("NCCL_SOCKET_IFNAME", set)));
        let ran = script.output()?;
        let said = String::from_utf8(ran.stdout)?;
        let errors = String::from_utf8_lossy(&ran.stderr);
        ensure!(ran.status.success(), "{said}\n{errors}");
        let told = format!("by {expected}: worker --coordinator https://node:7420");
        ensure!(
            said.contains(&told) && said.contains(&format!("--drain-within 50 {address}--ca")),
            "{said}\n{errors}"
        );
    }
    Ok(())
}
