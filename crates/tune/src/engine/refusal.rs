//! Why a batch could not be gone through: whoever met it tells all the others.

use incipit_collective::{Ranks, gather_bytes};

use super::JobFault;
use crate::Result;

/// Why a batch could not be gone through.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct Refusal {
    /// What the model, or a sum, said.
    pub what: String,
    /// Whether memory ran out.
    pub out_of_memory: bool,
}

impl From<String> for Refusal {
    fn from(what: String) -> Self {
        Self { what, out_of_memory: false }
    }
}

impl From<JobFault> for Refusal {
    fn from(fault: JobFault) -> Self {
        match fault {
            JobFault::Refused(why) => why,
            fault => fault.to_string().into(),
        }
    }
}

impl Refusal {
    /// What the first replica says that refused the batch: the same on every rank. Each gives what it has to say.
    ///
    /// # Errors
    /// If the exchange fails.
    pub(super) fn agreed(ranks: &Ranks, own: Option<&Self>) -> Result<Self> {
        let told = own.map_or_else(Vec::new, Self::to_bytes);
        let all = gather_bytes(&**ranks.data(), &told)?;
        let first = all.iter().find_map(|told| told.split_first());
        Ok(first.map_or_else(Self::default, |(out_of_memory, what)| Self {
            what: String::from_utf8_lossy(what).into_owned(),
            out_of_memory: *out_of_memory == 1,
        }))
    }

    fn to_bytes(&self) -> Vec<u8> {
        [&[u8::from(self.out_of_memory)], self.what.as_bytes()].concat()
    }
}
