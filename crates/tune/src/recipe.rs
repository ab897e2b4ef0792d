//! The two readings of prompt tuning: what the paper prints, and what its released code does.

use crate::{choice::choices, init::PromptInit, spec::PartialSpec};

choices! {
    /// A named set of defaults. Whatever a file or a flag gives goes before it.
    Recipe, "recipe" {
        /// Lester, Al-Rfou and Constant 2021, as printed.
        Paper => "paper",
        /// The code that was released with the paper, as its configuration files run it.
        ReleasedCode => "released-code",
    }
}

choices! {
    /// What turns a gradient into an update.
    OptimizerName, "optimizer" {
        /// Shazeer and Stern 2018, in the form of T5X, without parameter scaling.
        Adafactor => "adafactor",
        /// Loshchilov and Hutter 2019.
        AdamW => "adamw",
        /// Plain gradient descent.
        Sgd => "sgd",
    }
}

choices! {
    /// How the losses of a batch's target tokens become one number to be made smaller.
    LossReduction, "loss" {
        /// Their mean over all target tokens of the batch.
        Mean => "mean",
        /// Their sum.
        Sum => "sum",
    }
}

impl Recipe {
    /// What the recipe says; the fields that it leaves open are empty.
    pub(crate) fn defaults(self) -> PartialSpec {
        let (dropout, z_loss, loss) = match self {
            Self::Paper => (0.0, 0.0, LossReduction::Mean),
            Self::ReleasedCode => (0.1, 1e-4, LossReduction::Sum),
        };
        PartialSpec {
            recipe: Some(self),
            dropout: Some(dropout),
            z_loss: Some(z_loss),
            loss: Some(loss),
            ..PartialSpec::default()
        }
    }

    /// The range of `--prompt-init uniform` where none is given.
    pub(crate) fn uniform_init(self) -> PromptInit {
        match self {
            Self::Paper => PromptInit::Uniform { low: -0.5, high: 0.5 },
            Self::ReleasedCode => PromptInit::Uniform { low: 0.0, high: 0.5 },
        }
    }

    /// What Adafactor adds to its count of steps. The released code's backbones carry on from step 1,100,000 of their
    /// pretraining, and Adafactor's memory is then so long that its second moment grows like a sum.
    pub(crate) fn step_offset(self) -> u64 {
        match self {
            Self::Paper => 0,
            Self::ReleasedCode => 1_100_000,
        }
    }
}
