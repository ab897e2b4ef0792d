//! A backbone, as it is stored.

use std::{collections::BTreeMap, fmt};

use incipit_proto::{
    names::{BackboneName, WorkerName},
    v1::{BackboneReason, BackboneState},
};
use serde::{Deserialize, Serialize};

use super::time::Time;

/// A backbone: a frozen model that workers hold for any number of jobs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Backbone {
    /// Its name.
    pub name: BackboneName,
    /// What was asked for.
    pub spec: BackboneSpec,
    /// Whatever helps to find it again.
    pub labels: BTreeMap<String, String>,
    /// Where it stands.
    pub state: BackboneState,
    /// Why.
    pub reason: BackboneReason,
    /// One readable line about that.
    pub message: String,
    /// Generation of the assignment of its ranks; 0 before the first.
    pub epoch: u64,
    /// When it may be placed next, if it has to be; nothing while all its ranks are placed under [`Self::epoch`], and once it has failed.
    pub place_at: Option<Time>,
    /// Who has which rank, by rank; while it waits for a place, who had.
    pub ranks: Vec<RankPlacement>,
    /// Names the model's numbers, once they are known. Stays the same for the backbone's life.
    pub fingerprint: String,
    /// How many numbers the model has.
    pub num_parameters: u64,
    /// Columns of a prompt.
    pub d_model: u32,
    /// Layers of its encoder; 0 where a version loaded it that did not say.
    #[serde(default)]
    pub num_layers: u32,
    /// Engines lost in a row, with no step between.
    pub num_losses: u32,
    /// How it was last lost, in one line.
    pub last_loss: String,
    /// When it was asked for.
    pub create_time: Time,
    /// When it last became ready.
    pub ready_time: Option<Time>,
    /// The revision that made it.
    pub created_revision: u64,
    /// The revision that changed it last: its etag.
    pub revision: u64,
}

/// A model, at a precision, on a mesh of ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackboneSpec {
    /// A directory, or a name on the Hub.
    pub model: String,
    /// Type of the weights.
    pub dtype: Dtype,
    /// Where it computes.
    pub device: Device,
    /// Ranks that share the model.
    pub tp: u32,
    /// Replicas of the model.
    pub dp: u32,
    /// What carries numbers between ranks.
    pub collective: Collective,
    /// Tokens that go through the model at once; 0 for a choice by the free memory.
    pub microbatch_tokens: u32,
    /// Jobs that are on it at once, at most.
    pub max_running_jobs: u32,
}

impl BackboneSpec {
    /// Ranks in all.
    #[must_use]
    pub fn num_ranks(&self) -> u32 {
        self.tp * self.dp
    }
}

/// Who has a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankPlacement {
    /// The rank.
    pub rank: u32,
    /// The worker.
    pub worker: WorkerName,
    /// The process, once it runs.
    pub pid: u32,
    /// Whether it has loaded under the backbone's epoch.
    pub ready: bool,
    /// Whether its process is gone: the worker is only where it was, and the first choice for its next place.
    pub lost: bool,
}

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ })+) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
            #[serde(rename_all = "lowercase")]
            pub enum $name { $($(#[$variant_doc])* $variant,)+ }

            impl $name {
                /// All of them, the default first.
                pub const ALL: &[Self] = &[$(Self::$variant,)+];

                /// Its word on the wire.
                #[must_use]
                pub fn as_str(self) -> &'static str {
                    match self { $(Self::$variant => $word,)+ }
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(self.as_str())
                }
            }
        )+
    };
}

words! {
    /// Type of weights.
    Dtype {
        /// 16 bits.
        Bf16 = "bf16",
        /// 32 bits.
        F32 = "f32",
    }
    /// Where a backbone computes.
    Device {
        /// On the CPU.
        Cpu = "cpu",
        /// On GPUs, one a rank.
        Cuda = "cuda",
    }
    /// What carries numbers between ranks.
    Collective {
        /// Memory: all ranks are threads of one process.
        Local = "local",
        /// Gloo.
        Gloo = "gloo",
        /// NCCL.
        Nccl = "nccl",
    }
}
