//! Where a prompt's rows stand, and at how many layers, as people name it.

use incipit_model::Placement;

use crate::choice::choices;

choices! {
    /// Where a prompt's rows stand.
    PromptPlacement, "prompt placement" {
        /// Before the embedded input (Lester et al. 2021).
        Before => "before",
        /// Behind the embedded input, before its `</s>`.
        After => "after",
        /// Before the decoder's start token.
        Decoder => "decoder",
    }
}

choices! {
    /// At which of the encoder's layers a prompt has rows.
    PromptLayers, "prompt layers" {
        /// At the first: rows of the embedded input.
        First => "first",
        /// At all: each layer has rows of its own, in the place of what the one before it gave.
        All => "all",
    }
}

impl PromptPlacement {
    /// Whether it is what holds where nothing is said.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::Before
    }
}

impl PromptLayers {
    /// Whether it is what holds where nothing is said.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::First
    }

    /// Layers for which a prompt has rows, in an encoder of `num_layers`.
    #[must_use]
    pub fn of(self, num_layers: usize) -> usize {
        match self {
            Self::First => 1,
            Self::All => num_layers,
        }
    }
}

impl From<PromptPlacement> for Placement {
    fn from(placement: PromptPlacement) -> Self {
        match placement {
            PromptPlacement::Before => Self::Before,
            PromptPlacement::After => Self::After,
            PromptPlacement::Decoder => Self::Decoder,
        }
    }
}

/// What follows the name of a tensor that holds prompts of this place, so that a file of them tells it.
pub(crate) fn suffix(placement: Placement) -> &'static str {
    match placement {
        Placement::Before => "",
        Placement::After => ".after",
        Placement::Decoder => ".decoder",
    }
}

/// The place that the name of a tensor tells, if it is that of `prompts` at all.
pub(crate) fn of_name(name: &str, prompts: &str) -> Option<Placement> {
    let places = [Placement::Before, Placement::After, Placement::Decoder];
    let rest = name.strip_prefix(prompts)?;
    places.into_iter().find(|place| suffix(*place) == rest)
}
