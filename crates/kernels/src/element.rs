//! The two types of numbers that operations read and write.

use candle_core::WithDType;
use half::bf16;

use crate::frozen::FrozenSlice;

/// f32 or bf16.
pub(crate) trait Element: WithDType + Copy + Default + Send + Sync + 'static {
    /// As f32; exact.
    fn widen(self) -> f32;
    /// The nearest number, ties to even.
    fn narrow(x: f32) -> Self;
    /// As the operand of a product.
    fn operand(values: &[Self]) -> FrozenSlice<'_>;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    fn operand(values: &[Self]) -> FrozenSlice<'_> {
        FrozenSlice::F32(values)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        to_bf16(x)
    }

    fn operand(values: &[Self]) -> FrozenSlice<'_> {
        FrozenSlice::Bf16(values)
    }
}

/// The nearest bf16, ties to even; written without branches, so that loops over it become vector code.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let quiet = bits | 0x0040_0000;
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    bf16::from_bits(((if is_nan { quiet } else { rounded }) >> 16) as u16)
}
