//! The GPUs of the machine.

use incipit_kernels::{CUDA_IS_BUILT, Error as KernelError};

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
    known(incipit_kernels::gpu_names())
}

fn known(listed: incipit_kernels::Result<Vec<String>>) -> Result<Vec<String>, Error> {
    match listed {
        Ok(names) => Ok(names),
        Err(KernelError::NoGpu { what }) => {
            tracing::warn!("this worker runs on CPUs alone: {what}");
            Ok(Vec::new())
        }
        Err(error) => Err(Error::Gpus(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_works_on_its_cpus() {
        let what = "the driver of NVIDIA's GPUs does not answer".to_owned();
        assert_eq!(known(Err(KernelError::NoGpu { what })).unwrap(), <[&str; 0]>::default());
    }

    #[test]
    fn a_gpu_that_is_lost_is_named_and_not_taken_for_none() {
        let (op, what) = ("looking at GPU 2".to_owned(), "CUDA_ERROR_UNKNOWN".to_owned());
        let error = known(Err(KernelError::Gpu { op, what })).unwrap_err().to_string();
        for part in ["looking at GPU 2: CUDA_ERROR_UNKNOWN", "nvidia-smi", "CUDA_VISIBLE_DEVICES"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
