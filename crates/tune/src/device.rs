//! Where a backbone computes.

use std::{fmt, str::FromStr};

use candle_core::Device;
use incipit_collective::Ranks;

use crate::{Error, Result};

/// A value of `--device`: `cpu`, `cuda` (each rank of a machine has the GPU of its number there), or `cuda:1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum DeviceChoice {
    /// The CPU.
    #[default]
    Cpu,
    /// The GPU of this number; where none is given, of the rank's number on its machine.
    Cuda(Option<usize>),
}

impl DeviceChoice {
    /// The device of one of several ranks.
    ///
    /// # Errors
    /// If this build has no GPUs, the machine has no such GPU, or its driver does not answer.
    pub fn open(self, ranks: &Ranks) -> Result<Device> {
        self.open_for(ranks.local_rank())
    }

    /// The device of the rank that has this number on its machine. Who asks again gets the same device.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_for(self, local_rank: usize) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => Ok(incipit_kernels::open_gpu(ordinal.unwrap_or(local_rank))?),
        }
    }

    /// Whether it is a GPU.
    #[must_use]
    pub fn is_gpu(self) -> bool {
        self != Self::Cpu
    }
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refused = |what: String| Err(Error::spec("device", &what));
        let ordinal = match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => None,
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Some(ordinal),
                _ => return refused(format!("{text} is unknown; pass --device cpu, cuda or cuda:0")),
            },
        };
        if !incipit_kernels::CUDA_IS_BUILT {
            return refused(format!(
                "{text} is not built into this program; build it with `. scripts/cuda-toolkit.sh && cargo build --release --features \
                 cuda`, or pass --device cpu"
            ));
        }
        Ok(Self::Cuda(ordinal))
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(device: DeviceChoice) -> Self {
        device.to_string()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.pad("cpu"),
            Self::Cuda(None) => f.pad("cuda"),
            Self::Cuda(Some(ordinal)) => write!(f, "cuda:{ordinal}"),
        }
    }
}
