//! Products by cuBLASLt.
//!
//! The algorithm of a product is chosen for the number of rows that its weight usually gets and then used for any number that it can take,
//! and none is taken that cuts the contracted dimension between blocks: so a row's sums should not depend on how many rows are beside it.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use candle_core::DType;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::cuda::{failed, lock};
use super::{Address, Product};
use crate::gemm::pack::Layout;
use crate::{Error, Result};

/// What NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// More than any algorithm asks for.
const ALIGNMENT: u64 = 256;

/// The library, its workspace, and the algorithms chosen so far.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    stream: Arc<CudaStream>,
    /// One product at a time has it: two threads may use one GPU, and a product may be several kernels.
    workspace: Mutex<CudaSlice<u8>>,
    choices: Mutex<HashMap<Kind, Choice>>,
}

/// The algorithms of one kind of product.
struct Choice {
    /// That of the usual number of rows, if it has one.
    usual: Option<sys::cublasLtMatmulAlgo_t>,
    /// Numbers of rows that it was found to take.
    served: HashSet<usize>,
    /// Those of other numbers of rows.
    own: HashMap<usize, sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: the library's handle may be used from any thread (cuBLAS documentation, 2.1.2), and the rest is Send and Sync itself.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// Products for which one algorithm serves.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    columns: usize,
    contracted: usize,
    usual_rows: usize,
    strides: [usize; 3],
    count: usize,
    steps: [usize; 3],
    transposed: bool,
    dtypes: [DType; 2],
    adds: bool,
    /// Of the operands, and of the result and what is added to it, in bytes.
    alignments: [u64; 3],
}

impl Kind {
    fn of(product: &Product) -> Self {
        let [_, columns, contracted] = product.dims;
        // Of the first matrix, and of all others.
        let alignment = |Address(address): Address, step: usize, dtype: DType| {
            let bits = address | (step * dtype.size_in_bytes()) as u64;
            (1 << bits.trailing_zeros().min(8)).min(ALIGNMENT)
        };
        let [a_step, w_step, out_step] = product.steps;
        let of_result = |address| alignment(address, out_step, product.out_dtype);
        // What is added is described as the result is. Where nothing is, the address 0 takes nothing away.
        let out = of_result(product.out).min(of_result(product.added));
        Self {
            columns,
            contracted,
            usual_rows: product.usual_rows,
            strides: [product.w_stride, product.a_stride, product.out_stride],
            count: product.count,
            steps: product.steps,
            transposed: product.layout == Layout::ColumnsAsRows,
            dtypes: [product.dtype, product.out_dtype],
            adds: product.added != Address::NONE,
            alignments: [
                alignment(product.w, w_step, product.dtype),
                alignment(product.a, a_step, product.dtype),
                out,
            ],
        }
    }
}

/// Descriptors of one product. cuBLASLt's matrices are column-major, so that it computes the transposed result
/// `out^T = w a^T`: its first operand is the weight.
struct Described {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    a: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
}

fn library(what: &str) -> impl FnOnce(result::CublasError) -> Error {
    let op = format!("cuBLASLt, {what}");
    move |error| Error::Gpu { op, what: format!("{:?}", error.0) }
}

fn type_of(dtype: DType) -> sys::cudaDataType {
    if dtype == DType::BF16 { sys::cudaDataType_t::CUDA_R_16BF } else { sys::cudaDataType_t::CUDA_R_32F }
}

impl Described {
    fn new(product: &Product, rows: usize) -> Result<Self> {
        let [_, columns, contracted] = product.dims;
        let (columns, contracted, rows) = (columns as u64, contracted as u64, rows as u64);
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let transposed = product.layout == Layout::ColumnsAsRows;
        let [height, width] = if transposed { [contracted, columns] } else { [columns, contracted] };
        let layout = |dtype, height, width, leading: usize, step| {
            let layout = result::create_matrix_layout(type_of(dtype), height, width, leading as i64);
            let layout = layout.map_err(library("a layout"))?;
            batched(layout, product.count, step).map(|()| layout)
        };
        let [a_step, w_step, out_step] = product.steps;
        let described = Self {
            operation: result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)
                .map_err(library("a product"))?,
            w: layout(product.dtype, height, width, product.w_stride, w_step)?,
            a: layout(product.dtype, contracted, rows, product.a_stride, a_step)?,
            out: layout(product.out_dtype, columns, rows, product.out_stride, out_step)?,
        };
        // `cublasOperation_t`: CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
        let operation = i32::from(transposed);
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the descriptor lives, and the value is of the attribute's type.
        let set = unsafe {
            result::set_matmul_desc_attribute(
                described.operation,
                attribute,
                std::ptr::from_ref(&operation).cast(),
                size_of_val(&operation),
            )
        };
        set.map_err(library("the operands' order"))?;
        Ok(described)
    }
}

/// Says that a layout is of so many matrices, each so many numbers behind the one before.
fn batched(layout: sys::cublasLtMatrixLayout_t, count: usize, step: usize) -> Result<()> {
    use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
    let (count, step) = (count as i32, step as i64);
    // SAFETY: the layout lives, and the values are of the attributes' types.
    let set = unsafe {
        let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
        let set = result::set_matrix_layout_attribute(
            layout,
            attribute,
            std::ptr::from_ref(&count).cast(),
            size_of_val(&count),
        );
        let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
        let step = std::ptr::from_ref(&step);
        set.and_then(|()| {
            result::set_matrix_layout_attribute(layout, attribute, step.cast(), size_of::<i64>())
        })
    };
    set.map_err(library("a layout of several matrices"))
}

impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: each was made once and is destroyed once. What fails here leaves a few bytes behind.
        unsafe {
            let _ = result::destroy_matrix_layout(self.w);
            let _ = result::destroy_matrix_layout(self.a);
            let _ = result::destroy_matrix_layout(self.out);
            let _ = result::destroy_matmul_desc(self.operation);
        }
    }
}

impl Blas {
    pub(super) fn new(stream: Arc<CudaStream>) -> Result<Self> {
        // SAFETY: a workspace is written before it is read.
        let workspace = unsafe { stream.alloc(WORKSPACE) }.map_err(failed("the workspace of products"))?;
        let handle = result::create_handle().map_err(library("starting"))?;
        Ok(Self { handle, stream, workspace: Mutex::new(workspace), choices: Mutex::default() })
    }

    /// # Safety
    /// As for `Gpu::multiply`.
    pub(super) unsafe fn multiply(&self, product: &Product) -> Result<()> {
        let described = Described::new(product, product.dims[0])?;
        let algorithm = self.algorithm(product, &described)?;
        // SAFETY: as for this.
        let mut started = unsafe { self.start(product, &described, &algorithm) };
        // What was found to serve this number of rows may not, after all.
        if started.is_err()
            && let Ok(own) = self.own(product, &described)
        {
            // SAFETY: as for this.
            started = unsafe { self.start(product, &described, &own) };
        }
        // Of a device that has failed the library does not say why.
        started.map_err(|error| match self.stream.synchronize() {
            Err(lost) => failed("a product")(lost),
            Ok(()) => library("a product")(error),
        })
    }

    /// # Safety
    /// As for `Gpu::multiply`.
    unsafe fn start(
        &self,
        product: &Product,
        described: &Described,
        algorithm: &sys::cublasLtMatmulAlgo_t,
    ) -> Result<(), result::CublasError> {
        let (alpha, beta) = (1f32, if product.added == Address::NONE { 0f32 } else { 1f32 });
        let added = if product.added == Address::NONE { product.out } else { product.added };
        let pointer = |Address(address): Address| address as *const c_void;
        let workspace = lock(&self.workspace);
        // SAFETY: the descriptors live; the addresses are the caller's promise, and all work follows on one stream.
        unsafe {
            result::matmul(
                self.handle,
                described.operation,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(product.w),
                described.w,
                pointer(product.a),
                described.a,
                pointer(added),
                described.out,
                pointer(product.out).cast_mut(),
                described.out,
                algorithm,
                workspace.device_ptr(&self.stream).0 as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        }
    }

    fn algorithm(&self, product: &Product, described: &Described) -> Result<sys::cublasLtMatmulAlgo_t> {
        let (kind, rows) = (Kind::of(product), product.dims[0]);
        let mut choices = lock(&self.choices);
        let choice = match choices.entry(kind) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let usual = self.best(product, &kind, &Described::new(product, product.usual_rows)?).ok();
                entry.insert(Choice { usual, served: HashSet::new(), own: HashMap::new() })
            }
        };
        if let Some(own) = choice.own.get(&rows) {
            return Ok(*own);
        }
        if let Some(usual) = choice.usual
            && (choice.served.contains(&rows) || self.serves(&usual, described) && choice.served.insert(rows))
        {
            return Ok(usual);
        }
        let own = self.best(product, &kind, described)?;
        choice.own.insert(rows, own);
        Ok(own)
    }

    /// The algorithm of just this number of rows, from now on.
    fn own(&self, product: &Product, described: &Described) -> Result<sys::cublasLtMatmulAlgo_t> {
        let kind = Kind::of(product);
        let own = self.best(product, &kind, described)?;
        if let Some(choice) = lock(&self.choices).get_mut(&kind) {
            choice.own.insert(product.dims[0], own);
        }
        Ok(own)
    }

    /// Whether an algorithm can make a product.
    fn serves(&self, algorithm: &sys::cublasLtMatmulAlgo_t, described: &Described) -> bool {
        let Described { operation, w, a, out } = *described;
        let mut answer = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit();
        // SAFETY: all descriptors live, and the answer is read only after it was given.
        unsafe {
            let status = sys::cublasLtMatmulAlgoCheck(
                self.handle,
                operation,
                w,
                a,
                out,
                out,
                algorithm,
                answer.as_mut_ptr(),
            );
            status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && answer.assume_init().workspaceSize <= WORKSPACE
        }
    }

    /// The library's first choice.
    fn best(
        &self,
        product: &Product,
        kind: &Kind,
        described: &Described,
    ) -> Result<sys::cublasLtMatmulAlgo_t> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref().map_err(library("a preference"))?;
        let [w, a, out] = kind.alignments.map(|alignment| alignment as u32);
        let words = [
            (Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, 0u32), // no sums over blocks
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, w),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ];
        // SAFETY: all descriptors live, and the values are of the attributes' types.
        let found = unsafe {
            let set = |attribute, value: *const c_void, size| {
                result::set_matmul_pref_attribute(preference, attribute, value, size)
            };
            let bytes = WORKSPACE as u64;
            let attribute = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let mut status = set(attribute, std::ptr::from_ref(&bytes).cast(), size_of::<u64>());
            for (attribute, word) in words {
                status =
                    status.and_then(|()| set(attribute, std::ptr::from_ref(&word).cast(), size_of::<u32>()));
            }
            let Described { operation, w, a, out } = *described;
            let found = status.and_then(|()| {
                result::get_matmul_algo_heuristic(self.handle, operation, w, a, out, out, preference)
            });
            let _ = result::destroy_matmul_pref(preference);
            found
        };
        let [rows, columns, contracted] = product.dims;
        Ok(found.map_err(library(&format!("a way to make {rows} x {contracted} x {columns}")))?.algo)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
