//! The GPUs of the machine.

use incipit_kernels::{CUDA_IS_BUILT, Error as KernelError, GpuInfo};

use crate::agent::Error;

/// Names of this machine's GPUs, in the order of their numbers. Where there is no driver, or none that can be used, that is said in the
/// log, and the machine is one without GPUs.
///
/// # Errors
/// If the driver knows of GPUs of which one cannot be looked at. Ranks are given GPUs by their numbers, so that none can be left out.
pub fn gpus() -> Result<Vec<String>, Error> {
    if !CUDA_IS_BUILT {
        return Ok(Vec::new());
    }
    names(incipit_kernels::gpus())
}

fn names(listed: incipit_kernels::Result<Vec<GpuInfo>>) -> Result<Vec<String>, Error> {
    match listed {
        Ok(gpus) => Ok(gpus.into_iter().map(|gpu| gpu.name).collect()),
        Err(KernelError::NoGpu { what }) => {
            tracing::warn!("this worker runs on CPUs alone: {what}");
            Ok(Vec::new())
        }
        Err(error) => Err(Error::Gpus(error)),
    }
}

#[cfg(test)]
mod tests {
    use incipit_kernels::DeviceMemory;

    use super::*;

    #[test]
    fn a_machine_has_the_gpus_that_its_driver_lists() {
        let memory = DeviceMemory { free: 1, total: 2, peak: None };
        let gpu = |ordinal| GpuInfo { ordinal, name: format!("H100 {ordinal}"), capability: (9, 0), memory };
        assert_eq!(names(Ok(vec![gpu(0), gpu(1)])).unwrap(), ["H100 0", "H100 1"]);
    }

    #[test]
    fn a_machine_without_a_driver_works_on_its_cpus() {
        let what = "the driver of NVIDIA's GPUs does not answer".to_owned();
        assert_eq!(names(Err(KernelError::NoGpu { what })).unwrap(), <[&str; 0]>::default());
    }

    #[test]
    fn a_gpu_that_is_lost_is_named_and_not_taken_for_none() {
        let (op, what) = ("looking at GPU 2".to_owned(), "CUDA_ERROR_UNKNOWN".to_owned());
        let error = names(Err(KernelError::Gpu { op, what })).unwrap_err().to_string();
        for part in ["looking at GPU 2: CUDA_ERROR_UNKNOWN", "nvidia-smi", "CUDA_VISIBLE_DEVICES"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
