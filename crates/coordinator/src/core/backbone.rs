//! A backbone, as it is stored.

use std::{collections::BTreeMap, fmt};

use incipit_proto::{
    Problem,
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
    /// How it makes do with fewer replicas.
    #[serde(default)]
    pub shortage: Shortage,
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

/// How a backbone makes do with fewer replicas than it is to have.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shortage {
    /// Since when it waits for room.
    pub since: Option<Time>,
    /// While it works with fewer: when it looks for room for more.
    pub look_at: Option<Time>,
    /// Whether its jobs leave it because there is room for more.
    pub growing: bool,
    /// While more are to load: how many there were before.
    pub grown_from: u32,
    /// How often in a row more were to come, and did not.
    pub failures: u32,
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
    /// Replicas that are enough while there is no room for more; 0 where it takes all of them.
    #[serde(default)]
    pub min_dp: u32,
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

    /// The same with so many replicas.
    #[must_use]
    pub fn with_dp(&self, dp: u32) -> Self {
        Self { dp, ..self.clone() }
    }

    /// Checks that so few replicas can be enough.
    ///
    /// # Errors
    /// If they are more than all, or threads of one process.
    pub fn check_min_dp(&self) -> Result<(), Problem> {
        if self.min_dp > self.dp {
            let what = format!("is {}, and there are {} replicas in all (dp)", self.min_dp, self.dp);
            return Err(Problem::field("backbone.min_dp", what));
        }
        if self.min_dp != 0 && self.collective == Collective::Local {
            let what = "is for replicas that are lost one by one, and local has all in one process; give gloo or nccl";
            return Err(Problem::field("backbone.min_dp", what));
        }
        Ok(())
    }

    /// Numbers of replicas that are enough, the largest first: that is all of them.
    pub fn enough(&self) -> impl Iterator<Item = u32> + use<> {
        let least = if self.min_dp == 0 { self.dp } else { self.min_dp };
        (least..=self.dp).rev()
    }
}

impl Backbone {
    /// Replicas that have a place, or had the last one.
    #[must_use]
    pub fn dp(&self) -> u32 {
        if self.ranks.is_empty() { self.spec.dp } else { self.ranks.len() as u32 / self.spec.tp }
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
