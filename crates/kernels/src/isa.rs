//! Which instructions the kernels use, chosen once when the program runs.

use std::sync::OnceLock;

/// A set of instructions for which the kernels were written, from the fastest to the one that every machine has.
///
/// Each path gives the same bits wherever it runs; different paths may differ in the last bits of products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AMX: bf16 operands are multiplied as they are, a tile of rows with a tile of columns; all else as with AVX-512.
    AmxBf16,
    /// AVX-512 with bf16 dot products: bf16 operands are multiplied as they are.
    Avx512Bf16,
    /// AVX-512: bf16 operands are widened to f32.
    Avx512,
    /// AVX2 and FMA: bf16 operands are widened to f32.
    Avx2,
    /// Plain code: bf16 operands are widened to f32.
    Portable,
}

impl Isa {
    /// All of them, fastest first.
    pub const ALL: [Isa; 5] = [Isa::AmxBf16, Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Portable];

    /// Whether this machine has the instructions.
    #[must_use]
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        match self {
            Isa::AmxBf16 => Isa::Avx512Bf16.is_available() && crate::gemm::amx::is_available(),
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Isa::Portable => true,
        }
        #[cfg(not(target_arch = "x86_64"))]
        matches!(self, Isa::Portable)
    }

    /// Calls `f` compiled for these instructions, so that the loops in it become vectors of their width.
    ///
    /// The closure must be `#[inline(always)]` itself, and so must be all that it calls: what stays a call of its own is
    /// compiled for the oldest machine. Elementwise results do not depend on the path, because nothing is contracted.
    #[inline(always)]
    pub(crate) fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
            fn avx512<R>(f: impl FnOnce() -> R) -> R {
                f()
            }
            #[target_feature(enable = "avx2")]
            fn avx2<R>(f: impl FnOnce() -> R) -> R {
                f()
            }
            match self {
                // SAFETY: a path is used only where the machine has its instructions (`is_available`).
                Isa::AmxBf16 | Isa::Avx512Bf16 | Isa::Avx512 => return unsafe { avx512(f) },
                // SAFETY: as above.
                Isa::Avx2 => return unsafe { avx2(f) },
                Isa::Portable => {}
            }
        }
        f()
    }

    /// The name that `INCIPIT_ISA` takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Isa::AmxBf16 => "amxbf16",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        }
    }
}

/// The instructions in use: the fastest that the machine has, or those that the environment variable `INCIPIT_ISA` names.
///
/// # Panics
/// If `INCIPIT_ISA` names no path, or one that this machine lacks: going on with another would hide a wrong setting.
#[must_use]
pub fn isa() -> Isa {
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let Ok(name) = std::env::var("INCIPIT_ISA") else {
            return Isa::ALL.into_iter().find(|i| i.is_available()).unwrap_or(Isa::Portable);
        };
        let named = Isa::ALL.into_iter().find(|i| i.name() == name && i.is_available());
        named.unwrap_or_else(|| {
            let known: Vec<_> = Isa::ALL.into_iter().filter(|i| i.is_available()).map(Isa::name).collect();
            panic!("INCIPIT_ISA={name} is not one of this machine's: {}", known.join(", "))
        })
    })
}
