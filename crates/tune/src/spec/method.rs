//! What is trained, and what that says of all else.

use super::PartialSpec;
use crate::{choice::choices, init::PromptInit, recipe::OptimizerName};

choices! {
    /// What is trained.
    Method, "method" {
        /// Rows before the embedded encoder input (Lester et al. 2021).
        Prompt => "prompt",
        /// All weights of the model.
        Model => "model",
        /// Keys and values before those of every attention (Li and Liang 2021).
        Prefix => "prefix",
        /// Bottleneck layers behind every sub-layer (Houlsby et al. 2019).
        Adapter => "adapter",
        /// Nothing: examples with their answers stand before the input (Brown et al. 2020).
        Text => "text",
        /// Tokens before the input, found by the gradient (Shin et al. 2020).
        Search => "search",
    }
}

choices! {
    /// Which attentions a prefix stands before.
    PrefixPart, "prefix part" {
        /// Every one: in the encoder, in the decoder, and from the decoder to the encoder. Its keys have no place in the sequence.
        All => "all",
        /// Those of the decoder to itself. Its keys have the places before the first token's, as PEFT's have.
        Decoder => "decoder",
    }
}

impl Method {
    /// What the method says, where it says something else than the recipe, which is prompt tuning's.
    pub(super) fn defaults(self) -> PartialSpec {
        let none = PartialSpec::default();
        match self {
            Self::Prompt => none,
            // T5's recipe for fine-tuning (Raffel et al. 2020, section 3.1.3).
            Self::Model => PartialSpec {
                lr: Some(1e-3),
                parameter_scaling: Some(true),
                weight_decay: Some(0.0),
                dropout: Some(0.1),
                ..none
            },
            Self::Prefix => PartialSpec { lr: Some(0.01), weight_decay: Some(0.0), ..Self::adam() },
            Self::Text => PartialSpec { shots: Some(4), steps: Some(1), ..none },
            Self::Search => {
                PartialSpec { candidates: Some(32), prompt_init: Some(PromptInit::Vocab.to_string()), ..none }
            }
            Self::Adapter => PartialSpec {
                lr: Some(1e-3),
                weight_decay: Some(0.0),
                adapter_width: Some(64),
                ..Self::adam()
            },
        }
    }

    /// With Adam, as the methods' authors train small layers.
    fn adam() -> PartialSpec {
        PartialSpec { optimizer: Some(OptimizerName::AdamW), ..PartialSpec::default() }
    }
}
