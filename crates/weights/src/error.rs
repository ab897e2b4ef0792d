//! What can be wrong with a model's files, where, and what to do about it.

use std::path::{Path, PathBuf};

use candle_core::DType;

/// Why a model's files were refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("could not {action} {}: {source}{}", .path.display(), mend(source))]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A directory was asked for and there is none.
    #[error("there is no directory {}; give the directory that holds the model's config.json and weights", .0.display())]
    NoDirectory(PathBuf),
    /// A model directory without a configuration.
    #[error("{} has no config.json; copy the one that was published with the weights into it", .0.display())]
    NoConfig(PathBuf),
    /// A configuration that is not what it should be.
    #[error("{} is not a model's configuration: {detail}", .file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A model directory without weights.
    #[error(
        "{} has no weights: expected model.safetensors, pytorch_model.bin, or one of their .index.json files with its shards, \
         and found {found}; download the weights again or give another directory",
        .dir.display()
    )]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// What lies there.
        found: String,
    },
    /// An index that cannot be used.
    #[error("{} is not an index of weights: {detail}; download it again", .file.display())]
    Index {
        /// The index.
        file: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// An index names a file that is not there.
    #[error("{} names {shard}, and there is no such file beside it; download the missing shard", .index.display())]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The missing file's name.
        shard: String,
    },
    /// An index promises a tensor that its shard does not have.
    #[error(
        "{} says that {name} is in {shard}, and it is not; download the index and the shards of one revision",
        .index.display()
    )]
    NotInShard {
        /// The index.
        index: PathBuf,
        /// The tensor.
        name: String,
        /// The shard's name.
        shard: String,
    },
    /// Two shards hold a tensor of one name.
    #[error(
        "{name} is both in {} and in {}; remove the shard that does not belong to this model",
        .first.display(), .second.display()
    )]
    DuplicateTensor {
        /// The tensor.
        name: String,
        /// One shard.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// A file that ends too early.
    #[error("{} is cut short: {detail}; download it again", .file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// What was expected and what was found.
        detail: String,
    },
    /// A file that is not in the format that its name claims.
    #[error("{} cannot be read: {detail}", .file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What is wrong and how to mend it.
        detail: String,
    },
    /// A tensor that the model needs and the weights do not have.
    #[error("there is no tensor {name} in {place}; {near}")]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The directory, or what else the weights come from.
        place: String,
        /// The most similar names there are, as a phrase.
        near: String,
    },
    /// A tensor of another shape than the configuration calls for.
    #[error(
        "{name} in {place} has the shape {found:?} where the configuration calls for {expected:?}; take \
         config.json and the weights from the same model"
    )]
    WrongShape {
        /// The tensor.
        name: String,
        /// The file it is in.
        place: String,
        /// What the model needs.
        expected: Vec<usize>,
        /// What the file holds.
        found: Vec<usize>,
    },
    /// Weights in f16.
    #[error(
        "{name} in {} is f16, in which the activations of a T5 overflow; write the model in bf16 once with \
         `incipit convert model`, and use that",
        .file.display()
    )]
    Float16 {
        /// The tensor.
        name: String,
        /// The file it is in.
        file: PathBuf,
    },
    /// Weights of a type that cannot be used.
    #[error(
        "{name} in {} is {dtype}, and frozen weights are bf16 or f32; take the unquantized weights of the model",
        .file.display()
    )]
    UnsupportedDType {
        /// The tensor.
        name: String,
        /// The file it is in.
        file: PathBuf,
        /// Its type.
        dtype: String,
    },
    /// A type of weights that cannot be asked for.
    #[error("weights cannot be kept as {0:?}; ask for bf16 or f32")]
    TargetDType(DType),
    /// A text that is not a fingerprint.
    #[error("{0:?} is not a fingerprint: 64 hexadecimal digits were expected")]
    NotAFingerprint(String),
    /// Digests of parts that are not those of the whole.
    #[error(
        "the digests of the ranks do not make up the fingerprint of a model: {0}; let all ranks open the same model and hash \
         every part of every tensor between them"
    )]
    Digests(String),
    /// Neither a directory nor a Hub id.
    #[error(
        "{0:?} is neither a directory nor the id of a model on the Hugging Face Hub (such as google/t5-v1_1-small); \
         check the spelling"
    )]
    NotAModel(String),
    /// The Hub could not be asked, or refused.
    #[error(
        "{model} is no directory here, and could not get {what} of it from the Hugging Face Hub: {detail}"
    )]
    Hub {
        /// The Hub id.
        model: String,
        /// What was asked for.
        what: String,
        /// What went wrong and how to mend it.
        detail: String,
    },
    /// A Hub repository without weights that can be used.
    #[error(
        "{model} on the Hugging Face Hub has no weights in safetensors or PyTorch format (its files: {found}); choose another \
         repository of the model, or convert the weights and give the directory"
    )]
    NoHubWeights {
        /// The Hub id.
        model: String,
        /// What the repository holds.
        found: String,
    },
    /// A model directory without a tokenizer.
    #[error(
        "{} has neither tokenizer.json nor spiece.model; copy the one that was published with the weights into it",
        .0.display()
    )]
    NoTokenizer(PathBuf),
    /// A tokenizer that cannot be used.
    #[error("{} is not a tokenizer for a T5: {detail}", .file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A place to write to that is taken.
    #[error("{} exists and is not empty; choose another directory, or remove it first", .0.display())]
    NotEmpty(PathBuf),
    /// A frozen weight was refused.
    #[error(transparent)]
    Frozen(#[from] incipit_kernels::Error),
}

/// `Result` with this crate's [`Error`](enum@Error).
pub type Result<T> = std::result::Result<T, Error>;

/// What a person can do about an error of the system, where that is known.
fn mend(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; free some space there or choose another directory"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "; choose a directory that you may use, or change its permissions"
        }
        ErrorKind::NotADirectory => "; a part of that path is a file, choose another directory",
        _ => "",
    }
}

/// Says what was attempted on which path, for `map_err`.
pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Error + 'a {
    move |source| Error::Io { action, path: path.to_owned(), source }
}
