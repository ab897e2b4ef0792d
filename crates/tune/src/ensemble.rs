//! Ensembles: prompts of one task that differ in their seed alone, trained together (Lester et al. 2021, section 6).
//!
//! A member's directory `out/member-0` is one of a training run, and ends in the bytes of a run that had the backbone for itself:
//! the steps of all members go through the backbone together, and no number of one depends on the others. Beside the members lie
//! `ensemble.json`, which lists them, and `ensemble.safetensors` with the prompts of all.

use std::path::Path;

use crate::{
    Error, Result, atomic,
    group::{self, Kind},
    optimizer::NamedTensor,
    placement,
    prompt::Prompt,
    spec::{Method, PartialSpec, TrainSpec, validate::MAX_SEED},
    tensors,
};

pub use crate::group::Member;

/// The file in an ensemble's directory that lists its members.
pub const FILE: &str = "ensemble.json";
/// The file with the prompts of all members: the tensor `prompts` `[N, P, D]` f32, in the order of the members; `[N, L, P, D]` with rows
/// for each layer, and named `prompts.after` or `prompts.decoder` where they do not stand before the input.
pub const PROMPTS: &str = "ensemble.safetensors";
/// How many members there are where nobody says: as many as in the paper.
pub const DEFAULT_MEMBERS: usize = 5;
const TENSOR: &str = "prompts";

/// An ensemble as a group of runs. A loss or gradient that is not finite ends its member; the others go on, and end as if it had never been
/// there.
pub const ENSEMBLE: Kind = Kind { file: FILE, what: "ensemble", close: write_prompts };

/// The specifications of an ensemble's members: what `flags`, `config` and, with `resume`, the directory say, with a directory and a
/// seed for each. The first has the seed that is given, and each of the others the next one. `flags.out` is the ensemble's directory.
///
/// # Errors
/// As [`TrainSpec::resolve`]; also if no member or another number of members than the ensemble has is asked for.
pub fn resolve(
    flags: PartialSpec,
    config: Option<&Path>,
    resume: bool,
    members: Option<usize>,
) -> Result<Vec<TrainSpec>> {
    let Some(out) = flags.out.clone().filter(|out| !out.as_os_str().is_empty()) else {
        return Err(Error::spec("out", &"is missing; pass a directory for the ensemble"));
    };
    let listed = if resume && out.join(FILE).exists() { Some(list(&out)?.len()) } else { None };
    let count = match (members, listed) {
        (Some(0), _) => return Err(Error::spec("members", &"is 0; pass at least 1, or leave it out")),
        (Some(now), Some(was)) if now != was => {
            return Err(Error::OtherSpec {
                flag: "members".into(),
                was: was.to_string(),
                now: now.to_string(),
            });
        }
        (now, was) => now.or(was).unwrap_or(DEFAULT_MEMBERS),
    };
    let flags = PartialSpec { out: Some(out.join(name(0))), ..flags };
    let first = TrainSpec::resolve(flags, config, resume)?;
    if first.method != Method::Prompt {
        let what = format!("is {}, and the members of an ensemble are prompts; leave it out", first.method);
        return Err(Error::spec("method", &what));
    }
    if first.shared_length.is_some() {
        let what = "is of several tasks, and the members of an ensemble are of one; leave it out";
        return Err(Error::spec("shared-length", &what));
    }
    if MAX_SEED - first.seed < count as u64 {
        let what = format!("{} leaves no seeds for {count} members; pass a smaller one", first.seed);
        return Err(Error::spec("seed", &what));
    }
    let member = |i: usize| TrainSpec {
        out: first.out.with_file_name(name(i)),
        seed: first.seed + i as u64,
        ..first.clone()
    };
    Ok((0..count).map(member).collect())
}

/// The directory of a member.
fn name(member: usize) -> String {
    format!("member-{member}")
}

/// The members of the ensemble in `dir`.
///
/// # Errors
/// If `dir` holds none, or its list is damaged.
pub fn list(dir: &Path) -> Result<Vec<Member>> {
    let mend = "give a directory that `incipit ensemble train` has written, or prompts with --prompt";
    group::list(dir, FILE, mend)
}

/// The prompts in a file such as `ensemble.safetensors`.
///
/// # Errors
/// If it cannot be read, or holds anything but finite numbers of such a name and shape.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let refuse = |what| Error::Ensemble { path: path.to_owned(), what };
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let tensors = tensors::decode(&bytes).map_err(refuse)?;
    let placed = |tensor: NamedTensor| Some((placement::of_name(&tensor.name, TENSOR)?, tensor));
    let Some((place, tensor)) = tensors.into_iter().find_map(placed) else {
        return Err(refuse(format!("it has no tensor {TENSOR:?}; give the {PROMPTS} of an ensemble")));
    };
    let [_, shape @ ..] = &tensor.shape[..] else {
        return Err(refuse("its prompts have no shape; give the file that was written".to_owned()));
    };
    let parts = tensor.data.chunks(shape.iter().product::<usize>().max(1));
    let prompt = |values: &[f32]| Ok(Prompt::of_shape(shape, values.to_vec()).map_err(refuse)?.placed(place));
    let prompts = parts.map(prompt).collect::<Result<Vec<_>>>()?;
    if prompts.is_empty() {
        return Err(refuse("it holds no prompt; train the ensemble anew".to_owned()));
    }
    Ok(prompts)
}

/// Writes the best prompt of each member where others find all of them.
fn write_prompts(dir: &Path, members: &[TrainSpec]) -> Result<()> {
    let prompts = members.iter().map(|spec| Prompt::read(&spec.out)).collect::<Result<Vec<_>>>()?;
    let Some(first) = prompts.first() else { return Ok(()) };
    let shape = [vec![prompts.len()], first.shape()].concat();
    let name = format!("{TENSOR}{}", placement::suffix(first.placement()));
    let values: Vec<f32> = prompts.iter().flat_map(Prompt::values).copied().collect();
    let path = dir.join(PROMPTS);
    let bytes = tensors::encode(&[(&name, &shape, &values)])
        .map_err(|what| Error::Ensemble { path: path.clone(), what })?;
    atomic::write_file(&path, &bytes)
}
