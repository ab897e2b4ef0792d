//! Products with AMX: one instruction adds, to 16 x 16 sums, the products of 16 rows and 16 columns of 32 bf16 numbers.
//!
//! Within an instruction the even and the odd products are added up apart, and then to the sum so far (Intel's manual, volume 2, on
//! `TDPBF16PS`). The cut into 32 numbers is that of the contracted dimension, so that a row's bits still depend on no other row.
//!
//! The intrinsics of the standard library are not stable yet: the instructions are written out.

use std::arch::asm;
use std::arch::x86_64::{__m512i, _mm512_maskz_loadu_epi16};
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use half::bf16;

use super::micro::{Micro, Rows, Tile};
use super::{pack, turn};

/// Rows of a tile, and sums in its row.
const SIDE: usize = 16;
/// Contracted numbers that an instruction takes.
const STEP: usize = 32;
/// Columns of a panel.
const WIDTH: usize = 64;
/// Columns that are computed at once: two tiles.
const COLUMNS: usize = 2 * SIDE;

/// Whether this machine has the instructions, and the system lets this process use them: Linux gives their registers, of 8 KiB, only to
/// processes that ask.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && may_use_tiles())
}

fn has_instructions() -> bool {
    // Leaf 7, EDX: AMX-BF16 is bit 22, AMX-TILE bit 24 (Intel's manual, volume 2, on `CPUID`).
    let wanted = 1 << 22 | 1 << 24;
    std::arch::x86_64::__cpuid_count(7, 0).edx & wanted == wanted
}

#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    // Linux, Documentation/arch/x86/xstate.rst.
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and changes nothing but this process's permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}

/// 32 x 64 with pairs of bf16 numbers, summed in f32.
pub(crate) struct AmxBf16;

impl Micro for AmxBf16 {
    type Left = bf16;
    type Unit = u32;
    const WIDTH: usize = WIDTH;
    const ROWS: usize = 2 * SIDE;
    const DEPTH: usize = 2;
    /// 32 KiB of a panel, which stay in the level-1 cache: tiles are multiplied faster than a panel comes from behind it.
    const DEPTH_BLOCK: usize = 128;

    fn units(k: usize) -> usize {
        k.next_multiple_of(STEP) / 2
    }

    fn pack(b: &pack::Right<'_>, from: usize, panel: &mut [u32]) {
        let (numbers, zeros) = panel.split_at_mut(b.k.div_ceil(2) * WIDTH);
        // SAFETY: this path is used only where the machine has its instructions, and no machine has AMX without AVX-512.
        unsafe { turn::pairs(b, from, numbers) }
        zeros.fill(0);
    }

    fn left(units: &[u32]) -> &[bf16] {
        super::x86::Avx512Bf16::left(units)
    }

    fn transpose<W: pack::Word>(from: (&[W], usize), dims: (usize, usize), to: (&mut [W], usize)) {
        super::x86::Avx512Bf16::transpose(from, dims, to);
    }

    unsafe fn multiply_add(a: Rows<bf16>, k: usize, panel: *const u32, c: Tile) {
        let whole = k - k % STEP;
        // SAFETY: the caller's promise on the ranges of `a`, the panel and the tile.
        unsafe {
            tiles_for(a.rows);
            if whole > 0 {
                product(a, whole, panel, c);
            }
            if whole < k {
                let a = Rows { data: a.data.add(whole), ..a };
                let fresh = c.fresh && whole == 0;
                short_product(a, k - whole, panel.add(whole / 2 * WIDTH), Tile { fresh, ..c });
            }
        }
    }
}

/// What `LDTILECFG` reads (Intel's manual, volume 1, 18.2): the sizes of the tiles.
#[repr(C, align(64))]
struct Sizes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Gives the thread's tiles the sizes for `rows` rows, if they have others: it takes 50 ns, a quarter of the
/// products of 32 rows, 32 columns and 64 numbers.
///
/// Tiles 0 to 3 hold sums, 4 and 5 rows of the left operand, 6 and 7 columns of the panel. With at most 16 rows the second row of
/// tiles has the size of the first.
unsafe fn tiles_for(rows: usize) {
    thread_local! {
        /// The rows of the upper and of the lower tiles; 0 before the first product.
        static SIZES: Cell<(u8, u8)> = const { Cell::new((0, 0)) };
    }
    let upper = rows.min(SIDE) as u8;
    let lower = if rows > SIDE { (rows - SIDE) as u8 } else { upper };
    if SIZES.get() == (upper, lower) {
        return;
    }
    let side = SIDE as u8;
    let mut sizes = Sizes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    sizes.row_bytes[..8].fill(4 * SIDE as u16);
    sizes.rows[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, side, side]);
    // SAFETY: 64 bytes are read, which describe tiles that palette 1 has.
    unsafe {
        asm!(
            "ldtilecfg [{}]", in(reg) &raw const sizes,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly)
        );
    }
    SIZES.set((upper, lower));
}

/// As [`Micro::multiply_add`], for `k` numbers that fill tiles, which have the sizes for the rows.
unsafe fn product(a: Rows<bf16>, k: usize, panel: *const u32, c: Tile) {
    for first in (0..c.cols).step_by(COLUMNS) {
        // SAFETY: the caller's promise; a panel and a row of sums have 64 columns.
        unsafe {
            let (panel, c) = (panel.add(first), Tile { data: c.data.add(first), ..c });
            if a.rows > SIDE { two_by_two(a, k, panel, c) } else { one_by_two(a, k, panel, c) }
        }
    }
}

/// As [`product`], for `k` numbers that do not fill a tile: they are copied, and zeros put behind them, because in the rows there may be
/// anything behind them, or nothing.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn short_product(a: Rows<bf16>, k: usize, panel: *const u32, c: Tile) {
    let mut copy = [const { MaybeUninit::<__m512i>::uninit() }; 2 * SIDE];
    let there = (1 << k) - 1;
    // SAFETY: the caller's promise; of the copy those rows are read that were written.
    unsafe {
        for (row, to) in copy[..a.rows].iter_mut().enumerate() {
            to.write(_mm512_maskz_loadu_epi16(there, a.data.add(row * a.stride).cast()));
        }
        product(Rows { data: copy.as_ptr().cast(), stride: STEP, rows: a.rows }, STEP, panel, c);
    }
}

/// 17 to 32 rows with 32 columns.
unsafe fn two_by_two(a: Rows<bf16>, k: usize, panel: *const u32, c: Tile) {
    // SAFETY: the caller promises the ranges that are read and written here, and tiles of the rows' sizes.
    unsafe {
        asm!(
            "test {fresh}, {fresh}",
            "jnz 2f",
            "tileloadd tmm0, [{c0} + {c_step}]",
            "tileloadd tmm1, [{c0} + {c_step} + 64]",
            "tileloadd tmm2, [{c1} + {c_step}]",
            "tileloadd tmm3, [{c1} + {c_step} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm6, [{b} + {b_step}]",
            "tileloadd tmm4, [{a0} + {a_step}]",
            "tileloadd tmm7, [{b} + {b_step} + 64]",
            "tileloadd tmm5, [{a1} + {a_step}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 64",
            "add {a1}, 64",
            "add {b}, {b_next}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c0} + {c_step}], tmm0",
            "tilestored [{c0} + {c_step} + 64], tmm1",
            "tilestored [{c1} + {c_step}], tmm2",
            "tilestored [{c1} + {c_step} + 64], tmm3",
            fresh = in(reg) usize::from(c.fresh),
            a0 = inout(reg) a.data => _,
            a1 = inout(reg) a.data.add(SIDE * a.stride) => _,
            a_step = in(reg) 2 * a.stride,
            b = inout(reg) panel => _,
            b_step = in(reg) 4 * WIDTH,
            b_next = const 4 * WIDTH * SIDE,
            c0 = in(reg) c.data,
            c1 = in(reg) c.data.add(SIDE * c.stride),
            c_step = in(reg) 4 * c.stride,
            steps = inout(reg) k / STEP => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}

/// 1 to 16 rows with 32 columns.
unsafe fn one_by_two(a: Rows<bf16>, k: usize, panel: *const u32, c: Tile) {
    // SAFETY: as above.
    unsafe {
        asm!(
            "test {fresh}, {fresh}",
            "jnz 2f",
            "tileloadd tmm0, [{c} + {c_step}]",
            "tileloadd tmm1, [{c} + {c_step} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "3:",
            "tileloadd tmm6, [{b} + {b_step}]",
            "tileloadd tmm4, [{a} + {a_step}]",
            "tileloadd tmm7, [{b} + {b_step} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a}, 64",
            "add {b}, {b_next}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c} + {c_step}], tmm0",
            "tilestored [{c} + {c_step} + 64], tmm1",
            fresh = in(reg) usize::from(c.fresh),
            a = inout(reg) a.data => _,
            a_step = in(reg) 2 * a.stride,
            b = inout(reg) panel => _,
            b_step = in(reg) 4 * WIDTH,
            b_next = const 4 * WIDTH * SIDE,
            c = in(reg) c.data,
            c_step = in(reg) 4 * c.stride,
            steps = inout(reg) k / STEP => _,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}
