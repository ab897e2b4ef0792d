//! Models by name: a directory, or a repository on the Hugging Face Hub.

use std::fs::{File, TryLockError};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::checkpoint::CONFIG_FILE;
use crate::error::{Error, Result, io};
use crate::{layout, tokenizer};

/// How often one looks whether another process has downloaded a model.
const LOOK: Duration = Duration::from_millis(200);

/// The directory of a model: `model` itself, or the cached files of that id on the Hugging Face Hub
/// (`google/t5-v1_1-xxl`, or `google/t5-v1_1-xxl@REVISION` for a branch, a tag or a commit), which are downloaded first if they
/// are not there yet.
///
/// Only the configuration, the tokenizer and one set of weights are downloaded, safetensors where there are any. The
/// cache is that of Hugging Face's own tools (`HF_HOME`); `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are respected.
/// What is in the cache is used without asking whether the Hub has a newer revision. Of several processes that want the same
/// model, one downloads it, and the others wait.
///
/// # Errors
/// If there is no such directory and no such model, or the Hub cannot be reached.
pub fn resolve(model: &str) -> Result<PathBuf> {
    resolve_watched(model, &|| {})
}

/// As [`resolve`]; `gets_on` is called for as long as a download does, or another process's is waited for.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_watched(model: &str, gets_on: &dyn Fn()) -> Result<PathBuf> {
    if Path::new(model).is_dir() {
        return Ok(PathBuf::from(model));
    }
    let id = HubId::parse(model).ok_or_else(|| Error::NotAModel(model.to_owned()))?;
    let cache = Cache::from_env();
    if let Some(dir) = cached(&cache, id) {
        return Ok(dir);
    }
    check_online(model, "the files", id)?;
    let _turn = turn(&cache, id, gets_on)?;
    // Somebody else may have had it meanwhile.
    cached(&cache, id).map_or_else(|| download(&cache, model, id, gets_on), Ok)
}

/// The `config.json` of a model that is named as [`resolve`] takes it. Of one on the Hub nothing else is downloaded.
///
/// # Errors
/// As [`resolve`]; that of a directory may be missing.
pub fn resolve_config(model: &str) -> Result<PathBuf> {
    if Path::new(model).is_dir() {
        return Ok(Path::new(model).join(CONFIG_FILE));
    }
    let id = HubId::parse(model).ok_or_else(|| Error::NotAModel(model.to_owned()))?;
    let cache = Cache::from_env();
    if let Some(config) = cached_config(&cache, id) {
        return Ok(config);
    }
    check_online(model, CONFIG_FILE, id)?;
    let _turn = turn(&cache, id, &|| {})?;
    let repo = api(model)?.repo(id.repo());
    cached_config(&cache, id)
        .map_or_else(|| repo.download(CONFIG_FILE).map_err(|error| api_error(model, CONFIG_FILE, &error)), Ok)
}

/// Checks that files may be downloaded.
fn check_online(model: &str, what: &str, id: HubId<'_>) -> Result<()> {
    if !std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| is_set(&value)) {
        return Ok(());
    }
    let detail = format!("HF_HUB_OFFLINE is set and the cache has no complete copy; {}", fetch_elsewhere(id));
    Err(hub_error(model, what, detail))
}

/// The id of a model on the Hub and the revision behind it, if `model` is such an id and no directory; else all of it.
#[must_use]
pub fn split_revision(model: &str) -> (&str, Option<&str>) {
    match HubId::parse(model).filter(|_| !Path::new(model).is_dir()) {
        Some(HubId { name, revision }) => (name, revision),
        None => (model, None),
    }
}

/// A model on the Hub.
#[derive(Clone, Copy)]
struct HubId<'a> {
    /// `name` or `owner/name`.
    name: &'a str,
    /// A branch, a tag or a commit; of the main branch where there is none.
    revision: Option<&'a str>,
}

impl<'a> HubId<'a> {
    /// `name`, `owner/name` or `owner/name@revision`, in the characters that the Hub allows.
    fn parse(text: &'a str) -> Option<Self> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let is_part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
                && !part.contains("..")
                && part.len() <= 96
        };
        let is_name = name.split('/').count() <= 2 && name.split('/').all(is_part);
        let is_revision = revision.is_none_or(|revision| revision.split('/').all(is_part));
        (is_name && is_revision).then_some(Self { name, revision })
    }

    fn repo(self) -> Repo {
        let revision = self.revision.unwrap_or("main").to_owned();
        Repo::with_revision(self.name.to_owned(), RepoType::Model, revision)
    }
}

/// Waits until no other process downloads the model, and keeps others waiting for as long as what is returned is there.
fn turn(cache: &Cache, id: HubId<'_>, gets_on: &dyn Fn()) -> Result<File> {
    let dir = cache.path().join(".locks").join(id.repo().folder_name());
    std::fs::create_dir_all(&dir).map_err(io("create", &dir))?;
    let path = dir.join("incipit.lock");
    let file = File::create(&path).map_err(io("create", &path))?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                gets_on();
                std::thread::sleep(LOOK);
            }
            Err(TryLockError::Error(error)) => return Err(io("lock", &path)(error)),
        }
    }
}

/// Hugging Face's tools take these for yes.
fn is_set(value: &str) -> bool {
    matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

/// The snapshot of a model in the cache, if it is complete.
fn cached(cache: &Cache, id: HubId<'_>) -> Option<PathBuf> {
    let config = cached_config(cache, id)?;
    let dir = config.parent()?;
    let complete = layout::find(dir).is_ok() && tokenizer::is_present(dir);
    complete.then(|| dir.to_owned())
}

/// The configuration of a model in the cache, whatever else there is of it.
fn cached_config(cache: &Cache, id: HubId<'_>) -> Option<PathBuf> {
    let repo = cache.repo(id.repo());
    // Hugging Face's own tools write down no name for what was asked for as a commit.
    let of_commit = || id.revision.map(|commit| repo.pointer_path(commit).join(CONFIG_FILE));
    repo.get(CONFIG_FILE).or_else(of_commit).filter(|config| config.is_file())
}

/// The Hub, as the environment says where it is and who asks.
fn api(model: &str) -> Result<Api> {
    let mut builder = ApiBuilder::from_env().with_progress(std::io::stderr().is_terminal()).with_retries(3);
    if let Ok(token) = std::env::var("HF_TOKEN") {
        builder = builder.with_token(Some(token));
    }
    builder.build().map_err(|error| api_error(model, "the files", &error))
}

fn download(cache: &Cache, model: &str, id: HubId<'_>, gets_on: &dyn Fn()) -> Result<PathBuf> {
    let repo = api(model)?.repo(id.repo());
    let info = repo.info().map_err(|error| api_error(model, "the list of files", &error))?;
    let names: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let wanted = choose_files(model, &names)?;
    // If an older revision was cached in part, the first pass moves the cache to the newer one as soon as it downloads a
    // file, and leaves the earlier files behind: the second pass gets those.
    for _ in 0..2 {
        let dirs = fetch(&cache.repo(id.repo()), &repo, model, &wanted, gets_on)?;
        if let Some(first) = dirs.first().filter(|first| dirs.iter().all(|dir| dir == *first)) {
            return Ok(first.clone());
        }
    }
    Err(hub_error(model, "the files", "the repository changed during the download; run again".to_owned()))
}

/// Passes on that a download gets on.
struct Watched<'a>(&'a dyn Fn());

impl Progress for Watched<'_> {
    fn init(&mut self, _: usize, _: &str) {
        (self.0)();
    }

    fn update(&mut self, _: usize) {
        (self.0)();
    }

    fn finish(&mut self) {}
}

/// The directory in which each file came to lie.
fn fetch(
    cache: &CacheRepo,
    repo: &ApiRepo,
    model: &str,
    wanted: &[String],
    gets_on: &dyn Fn(),
) -> Result<Vec<PathBuf>> {
    let mut dirs = Vec::with_capacity(wanted.len());
    for name in wanted {
        gets_on();
        let path = match cache.get(name) {
            Some(path) => Ok(path),
            // On a terminal a bar is drawn, and a person watches it.
            None if std::io::stderr().is_terminal() => repo.download(name),
            None => repo.download_with_progress(name, Watched(gets_on)),
        };
        let path = path.map_err(|error| api_error(model, name, &error))?;
        dirs.extend(path.parent().map(Path::to_owned));
    }
    Ok(dirs)
}

/// Of the files of a repository, those that are needed.
fn choose_files(model: &str, names: &[String]) -> Result<Vec<String>> {
    let has = |name: &str| names.iter().any(|n| n == name);
    if !has(CONFIG_FILE) {
        let detail = "the repository has none; choose the id of a T5 model".to_owned();
        return Err(hub_error(model, CONFIG_FILE, detail));
    }
    let mut wanted = vec![CONFIG_FILE.to_owned()];
    wanted.extend(tokenizer::FILES.iter().filter(|name| has(name)).map(|name| (*name).to_owned()));
    for (stem, extension) in [("model", "safetensors"), ("pytorch_model", "bin")] {
        let single = format!("{stem}.{extension}");
        if has(&single) {
            wanted.push(single);
            return Ok(wanted);
        }
        let index = format!("{stem}.{extension}.index.json");
        let is_shard = |name: &&String| is_shard(name, stem, extension);
        if has(&index) && names.iter().any(|name| is_shard(&name)) {
            wanted.push(index);
            wanted.extend(names.iter().filter(is_shard).cloned());
            return Ok(wanted);
        }
    }
    Err(Error::NoHubWeights { model: model.to_owned(), found: layout::summary(names) })
}

/// `model-00001-of-00003.safetensors`, in the repository's root.
fn is_shard(name: &str, stem: &str, extension: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    name.strip_prefix(stem)
        .and_then(|rest| rest.strip_prefix('-'))
        .and_then(|rest| rest.strip_suffix(extension))
        .and_then(|rest| rest.strip_suffix('.'))
        .and_then(|rest| rest.split_once("-of-"))
        .is_some_and(|(shard, of)| number(shard) && number(of))
}

fn hub_error(model: &str, what: &str, detail: String) -> Error {
    Error::Hub { model: model.to_owned(), what: what.to_owned(), detail }
}

fn api_error(model: &str, what: &str, error: &ApiError) -> Error {
    let text = error.to_string();
    hub_error(model, what, explain(model, &text))
}

/// What went wrong and what to do, from the words of the client (its errors do not tell the causes apart by type).
fn explain(model: &str, text: &str) -> String {
    let is_status = |status: &[&str]| status.iter().any(|code| text.contains(&format!("status: {code}")));
    if is_status(&["401", "403", "404"]) {
        format!(
            "there is no public model of that name ({text}); check the spelling, and for a \
             private or gated model set HF_TOKEN"
        )
    } else if text.starts_with("I/O error") || text.starts_with("Lock acquisition") {
        format!("{text}; see that HF_HOME is on a disk with room that you may write to")
    } else {
        let elsewhere = HubId::parse(model).map(fetch_elsewhere).unwrap_or_default();
        format!("{text}; if this machine has no network, {elsewhere}")
    }
}

fn fetch_elsewhere(HubId { name, revision }: HubId<'_>) -> String {
    let revision = revision.map(|revision| format!(" --revision {revision}")).unwrap_or_default();
    format!(
        "run `hf download {name}{revision}` where there is one, copy the files here, and give their directory"
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn chosen(names: &[&str]) -> Vec<String> {
        choose_files("owner/model", &strings(names)).expect("a model that can be used")
    }

    #[test]
    fn a_directory_is_itself() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().to_str().expect("a path in UTF-8");
        assert_eq!(resolve(path).expect("a directory"), dir.path());
    }

    #[test]
    fn ids_of_the_hub_are_told_from_paths() {
        fn split(id: &str) -> Option<(&str, Option<&str>)> {
            HubId::parse(id).map(|id| (id.name, id.revision))
        }
        for id in ["t5-small", "google/t5-v1_1-xxl", "google/flan-t5-small", "a.b/c_d"] {
            assert_eq!(split(id), Some((id, None)), "{id}");
            for revision in ["main", "v1.0", "refs/pr/3", "0123456789abcdef0123456789abcdef01234567"] {
                let with = format!("{id}@{revision}");
                assert_eq!(split(&with), Some((id, Some(revision))), "{with}");
                assert_eq!(split_revision(&with), (id, Some(revision)));
            }
        }
        for path in [
            "",
            "/models/t5",
            "./t5",
            "../t5",
            "a/b/c",
            "a/",
            "models/..",
            "a b",
            "~/t5",
            "C:\\t5",
            "a/é",
            "a/b@",
            "@main",
            "a/b@../x",
            "a/b@/x",
            "a/b@x@y",
            "a/b@x y",
        ] {
            assert!(split(path).is_none(), "{path}");
            assert_eq!(split_revision(path), (path, None));
            assert!(matches!(resolve(path), Err(Error::NotAModel(_))), "{path}");
        }
    }

    #[test]
    fn safetensors_are_chosen_and_other_weights_left() {
        let names = [
            ".gitattributes",
            "README.md",
            "config.json",
            "flax_model.msgpack",
            "generation_config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "spiece.model",
            "tf_model.h5",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        let expected =
            ["config.json", "tokenizer.json", "spiece.model", "tokenizer_config.json", "model.safetensors"];
        assert_eq!(chosen(&names), expected);
    }

    #[test]
    fn shards_are_chosen_with_their_index() {
        let names = [
            "config.json",
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin",
            "pytorch_model.bin.index.json",
            "spiece.model",
            "onnx/model-00001-of-00002.safetensors",
        ];
        let expected = [
            "config.json",
            "spiece.model",
            "pytorch_model.bin.index.json",
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin",
        ];
        assert_eq!(chosen(&names), expected);
        let both =
            [&names[..], &["model.safetensors.index.json", "model-00001-of-00001.safetensors"]].concat();
        let weights = ["model.safetensors.index.json", "model-00001-of-00001.safetensors"];
        assert_eq!(chosen(&both)[2..], weights);
    }

    #[test]
    fn only_shards_are_taken_for_shards() {
        assert!(is_shard("model-00001-of-00002.safetensors", "model", "safetensors"));
        for name in [
            "model.safetensors",
            "model-of-2.safetensors",
            "model-1-of-.safetensors",
            "model-1-of-2safetensors",
        ] {
            assert!(!is_shard(name, "model", "safetensors"), "{name}");
        }
    }

    #[test]
    fn a_repository_without_usable_weights_is_refused_with_its_files() {
        let refusal = |names: &[&str]| {
            choose_files("owner/model", &strings(names)).expect_err("no weights").to_string()
        };
        let text = refusal(&["config.json", "tf_model.h5", "flax_model.msgpack"]);
        assert!(
            text.contains("no weights in safetensors or PyTorch format") && text.contains("tf_model.h5"),
            "{text}"
        );
        let text = refusal(&["README.md", "model.safetensors"]);
        assert!(text.contains("owner/model is no directory here, and could not get config.json"), "{text}");
    }

    #[test]
    fn causes_are_told_apart() {
        let missing = explain("owner/model", "request error: http status: 404");
        assert!(missing.contains("check the spelling") && missing.contains("HF_TOKEN"), "{missing}");
        let offline = explain("owner/model", "request error: io: failed to lookup address information");
        assert!(offline.contains("hf download owner/model`"), "{offline}");
        let offline = explain("owner/model@v1", "request error: io: failed to lookup address information");
        assert!(offline.contains("hf download owner/model --revision v1`"), "{offline}");
        let disk = explain("owner/model", "I/O error No space left on device");
        assert!(disk.contains("HF_HOME"), "{disk}");
    }

    #[test]
    fn a_complete_snapshot_in_the_cache_is_used_and_a_partial_one_is_not() {
        fn of(id: &str) -> HubId<'_> {
            HubId::parse(id).expect("an id")
        }
        let home = tempfile::tempdir().expect("a temporary directory");
        let cache = Cache::new(home.path().to_owned());
        let repo = home.path().join("models--owner--model");
        let snapshot = repo.join("snapshots/abc");
        for dir in [&snapshot, &repo.join("refs")] {
            fs::create_dir_all(dir).expect("a writable directory");
        }
        fs::write(repo.join("refs/main"), "abc").expect("a writable directory");
        for (name, expected) in [
            ("spiece.model", None),
            ("config.json", None),
            ("model.safetensors.index.json", None),
            ("model-00001-of-00001.safetensors", Some(snapshot.clone())),
        ] {
            let content = r#"{"weight_map": {"a": "model-00001-of-00001.safetensors"}}"#;
            fs::write(snapshot.join(name), content).expect("a writable directory");
            assert_eq!(cached(&cache, of("owner/model")), expected, "with {name}");
        }
        assert_eq!(cached(&cache, of("owner/model@v1")), None);
        fs::write(repo.join("refs/v1"), "abc").expect("a writable directory");
        for revision in ["main", "v1", "abc"] {
            let id = format!("owner/model@{revision}");
            assert_eq!(cached(&cache, of(&id)), Some(snapshot.clone()), "{id}");
        }
    }
}
