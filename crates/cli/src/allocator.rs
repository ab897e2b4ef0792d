//! The program's memory allocator, and how long it keeps what was freed.

/// Buffers of activations are freed and asked for again many times in a step, and come page-aligned from here, which tile loads profit
/// from: with buffers that lie across cache lines, AMX products take three times as long.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long freed pages stay with the process, in milliseconds: longer than most steps take. Pages that are given back within a step cost
/// a fault and the zeroing of each when they are asked for again, a tenth of a step's time.
const PURGE_DELAY: std::ffi::c_long = 60_000;

/// The option's place in `mi_option_e` of mimalloc.h, version 3.
const MI_OPTION_PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Sets the allocator up; what `MIMALLOC_PURGE_DELAY` in the environment says comes first.
pub(crate) fn set_up() {
    // SAFETY: the call takes two numbers, and an option that is none is ignored.
    #[allow(unsafe_code)]
    unsafe {
        libmimalloc_sys::mi_option_set_default(MI_OPTION_PURGE_DELAY, PURGE_DELAY);
    }
}
