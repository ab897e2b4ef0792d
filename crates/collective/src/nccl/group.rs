//! The group: tensors in main memory go through the protocol that all backends share, and tensors on the group's device
//! stay there.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::lane::{Lane, Step};
use super::line::Line;
use super::watchdog::Watched;
use crate::host::HostGroup;
use crate::numbers::{self, REDUCED};
use crate::ranks::Member;
use crate::transport::Transport;
use crate::wire::{Header, Operation};
use crate::{Collective, Reduce, Result};

/// A group over NCCL.
#[derive(Debug)]
pub(super) struct Group<L: Lane> {
    host: HostGroup<Line<L>>,
}

/// What an operation on a tensor of the device is.
struct Act {
    operation: Operation,
    root: usize,
    step: Step,
    refusal: Option<String>,
}

impl<L: Lane> Group<L> {
    pub(super) fn new(host: HostGroup<Line<L>>) -> Self {
        Self { host }
    }

    #[cfg(test)]
    pub(super) fn line(&self) -> &Line<L> {
        self.host.transport()
    }

    fn lane(&self) -> &L {
        self.host.transport().lane()
    }

    /// Whether `x` passes through main memory, for it is there.
    fn is_host(&self, x: &Tensor) -> bool {
        x.device().is_cpu() && !self.lane().owns(x)
    }

    /// Why `x`, which is not in main memory, is none of this group's.
    fn refuse_elsewhere(&self, x: &Tensor) -> Option<String> {
        (!self.lane().owns(x)).then(|| {
            format!(
                "the tensor is on {:?}, and this group works on {}; move it there or to main memory",
                x.device().location(),
                self.lane().place()
            )
        })
    }

    /// Tells the others what is to be done with `x` and puts it into the device's queue; waits for neither.
    fn on_device(&self, x: &Tensor, act: Act) -> Result<Tensor> {
        let Act { operation, root, step, refusal } = act;
        self.host.operate(|turn| {
            turn.refuse(self.refuse_elsewhere(x).or(refusal))?;
            let header = Header { on_device: true, ..turn.header(operation, root, Some(x)) };
            let frame = header.frame(&[]);
            let part = |frame, step, x: &Tensor| turn.moved(|to| to.run(frame, turn.until, step, x));
            let run = |step, x: &Tensor| part(Some(&*frame), step, x);
            if x.elem_count() == 0 {
                // There is nothing to do, but to find out whether all think so.
                run(step, &Tensor::zeros(1, x.dtype(), x.device())?)?;
                let mut dims = x.dims().to_vec();
                if step == Step::Gather {
                    dims[0] *= self.size();
                }
                return Ok(Tensor::zeros(dims, x.dtype(), x.device())?);
            }
            match step {
                Step::Max if x.dtype() != DType::I64 => largest(x, run),
                Step::Sum if !any_order(x.dtype(), self.size()) => {
                    let pieces = run(Step::Exchange, &pieces(x, self.size())?)?;
                    let whole = part(None, Step::Gather, &sum_by_rank(&pieces)?)?;
                    Ok(whole.narrow(0, 0, x.elem_count())?.reshape(x.dims())?)
                }
                _ => run(step, &x.contiguous()?),
            }
        })
    }
}

/// Whether a sum over so many ranks has the same bits in any order.
fn any_order(dtype: DType, size: usize) -> bool {
    dtype == DType::I64 || dtype == DType::F32 && size == 2
}

/// The numbers of `x` as a row for each rank, with zeros at the end where they are too few.
fn pieces(x: &Tensor, size: usize) -> Result<Tensor> {
    let (x, length) = (x.flatten_all()?, x.elem_count().div_ceil(size));
    let x = x.pad_with_zeros(0, 0, size * length - x.elem_count())?;
    Ok(x.reshape((size, length))?.contiguous()?)
}

/// The sum of the rows by ascending rank, as in main memory (ADR 5): bf16 in f32, rounded once. In NCCL's own sum the order depends on
/// where in the tensor a number lies, and so on what else is in a batch; each rank adds up a piece, which moves as many bytes.
fn sum_by_rank(rows: &Tensor) -> Result<Tensor> {
    let wide = rows.to_dtype(DType::F32)?;
    let rest = (1..rows.dims()[0]).map(|rank| wide.get(rank));
    let sum = rest.fold(wide.get(0), |sum, row| sum? + row?);
    Ok(sum?.to_dtype(rows.dtype())?)
}

/// The largest number of all ranks, by `run`, which passes NaN over: whether there was one is told beside it.
fn largest(x: &Tensor, run: impl FnOnce(Step, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (dims, dtype, device) = (x.dims(), x.dtype(), x.device());
    let x = x.flatten_all()?;
    let like = |value: f32| Tensor::full(value, x.dims(), device)?.to_dtype(dtype);
    let is_nan = x.ne(&x)?;
    let numbers = is_nan.where_cond(&like(f32::NEG_INFINITY)?, &x)?;
    let both = run(Step::Max, &Tensor::cat(&[&numbers, &is_nan.to_dtype(dtype)?], 0)?)?;
    let (max, was_nan) =
        (both.narrow(0, 0, x.elem_count())?, both.narrow(0, x.elem_count(), x.elem_count())?);
    let max = was_nan.ne(&like(0.0)?)?.where_cond(&like(f32::NAN)?, &max)?;
    Ok(max.reshape(dims)?)
}

impl<L: Lane> Collective for Group<L> {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn all_reduce(&self, x: &Tensor, reduce: Reduce) -> Result<Tensor> {
        if self.is_host(x) {
            return self.host.all_reduce(x, reduce);
        }
        let step = match reduce {
            Reduce::Sum => Step::Sum,
            Reduce::Max => Step::Max,
        };
        let refusal = numbers::refuse(x, &REDUCED);
        self.on_device(x, Act { operation: Operation::of(reduce), root: 0, step, refusal })
    }

    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        if self.is_host(x) {
            return self.host.all_gather(x);
        }
        let (operation, refusal) = (Operation::AllGather, numbers::refuse_gather(x));
        self.on_device(x, Act { operation, root: 0, step: Step::Gather, refusal })
    }

    fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor> {
        if self.is_host(x) {
            return self.host.broadcast(x, root);
        }
        let (operation, refusal) = (Operation::Broadcast, numbers::refuse_broadcast(x, root, self.size()));
        self.on_device(x, Act { operation, root, step: Step::From(root), refusal })
    }

    fn barrier(&self) -> Result<()> {
        self.host.barrier()
    }

    fn abort(&self, reason: &str) {
        self.host.abort(reason);
    }
}

impl<L: Lane> Member for Group<L> {
    fn leave(&self) {
        self.host.transport().leave();
    }

    fn seconds(&self) -> f64 {
        self.host.seconds()
    }

    fn waits(&self) -> bool {
        self.host.transport().awaits()
    }
}

impl<L: Lane> Watched for Group<L> {
    fn watch(&self) {
        if self.host.has_failed() || self.host.transport().is_closed() {
            return;
        }
        if let Err((sequence, broken)) = self.host.transport().look_over()
            && !self.host.transport().is_closed()
        {
            self.host.fail_aside(sequence, broken);
        }
    }
}

impl<L: Lane> Group<L> {
    /// What the watchdog sees of it.
    pub(super) fn watched(self: &Arc<Self>) -> std::sync::Weak<dyn Watched> {
        let weak: std::sync::Weak<Self> = Arc::downgrade(self);
        weak
    }
}
