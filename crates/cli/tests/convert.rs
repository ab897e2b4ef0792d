//! Prompts from one kind of file to another.

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use common::{Ran, command, demo, incipit, path, refused, text, train};

#[test]
fn every_prompt_has_a_file_that_is_read_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| path(dir.path(), name);
    let more = ["--steps", "1", "--prompt-layers", "all", "--prompt-placement", "after"];
    let run = train(dir.path(), "run", &more).ok().json();
    let (source, file, again) = (at("run"), at("made/prompt.safetensors"), at("again.npy"));
    let made = incipit(&["convert", "prompt", &source, &file, "--json"]).ok().json();
    // The demo's model has three layers.
    assert_eq!((&made["kind"], &made["rows"]), (&"checkpoint".into(), &12.into()));
    let (model, few) = (demo("model"), at("few.jsonl"));
    let eval = ["eval", "--json", "--model", &model, "--prompt", &file, "--data", &few];
    let lengths = ["--max-input-length", "32", "--max-target-length", "6"];
    assert_eq!(incipit(&[&eval[..], &lengths].concat()).ok().json()["loss"], run["eval_loss"]);
    let init = format!("file:{file}");
    train(dir.path(), "further", &[&more[..], &["--prompt-init", &init]].concat()).ok();
    refused(&incipit(&["convert", "prompt", &file, &again]), &["--to checkpoint", ".safetensors"]);
    refused(&incipit(&["convert", "prompt", &file, &at("peft"), "--model", &model]), &["--to checkpoint"]);
    refused(&incipit(&["convert", "prompt", &source, &file]), &["is there already"]);
    for name in ["p.bin", "weights.safetensors", "adapter_model.safetensors"] {
        let ran = incipit(&["convert", "prompt", &source, &at(name), "--to", "checkpoint"]);
        refused(&ran, &[name, "prompt.safetensors"]);
    }
}

/// Answers a request for a part of `config`, as the Hub does, and returns what was asked for.
fn answer(stream: &mut TcpStream, config: &str) -> std::io::Result<String> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let asked = lines.next().transpose()?.unwrap_or_default();
    let (mut first, mut last) = (0, config.len() - 1);
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some((from, to)) =
            line.to_ascii_lowercase().strip_prefix("range: bytes=").and_then(|range| range.split_once('-'))
        {
            first = from.parse().unwrap_or(0);
            last = to.parse().unwrap_or(last);
        }
    }
    let (part, size) = (&config[first..=last], config.len());
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\netag: \"abc\"\r\nx-repo-commit: def\r\ncontent-range: bytes {first}-{last}/{size}\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{part}",
        part.len()
    )?;
    Ok(asked)
}

#[test]
fn of_a_model_on_the_hub_that_peft_is_to_name_the_configuration_alone_is_fetched() {
    let dir = tempfile::tempdir().expect("a directory");
    train(dir.path(), "run", &["--steps", "1"]).ok();
    let hub = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", hub.local_addr().expect("an address"));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (config, seen) = (text(demo("model/config.json")), asked.clone());
    std::thread::spawn(move || {
        for mut stream in hub.incoming().map_while(Result::ok) {
            let request = answer(&mut stream, &config).unwrap_or_else(|error| error.to_string());
            seen.lock().expect("no test panics with it").push(request);
        }
    });
    let convert = |to: &str, offline: &str| -> Ran {
        let (run, to) = (path(dir.path(), "run/prompt.npy"), path(dir.path(), to));
        let mut command = command(&["convert", "prompt", &run, &to, "--model", "test/demo"]);
        command.env("HF_HOME", dir.path().join("cache")).env("HF_ENDPOINT", &url);
        command.env("HF_HUB_OFFLINE", offline).output().expect("the program starts").into()
    };
    let offline = convert("offline", "1");
    assert!(offline.code == 1 && offline.stderr.contains("HF_HUB_OFFLINE is set"), "{}", offline.stderr);
    convert("fetched", "0").ok();
    let adapter = text(dir.path().join("fetched/adapter_config.json"));
    assert!(adapter.contains("test/demo") && adapter.contains("num_layers"), "{adapter}");
    let asked = asked.lock().expect("no test panics with it").clone();
    assert!(!asked.is_empty());
    assert!(
        asked.iter().all(|line| line.starts_with("GET /test/demo/resolve/main/config.json ")),
        "{asked:?}"
    );
    convert("cached", "1").ok();
}
