// What all kernels share: number types, one parameter struct a kernel, sums over a block, and what a warp does as one.
//
// The kernels are compiled twice: by nvcc for GPUs, and by the host's C++ compiler for the emulator, which runs each thread as a
// fiber and so checks the kernels on machines without a GPU. Only this file and the emulator know of the difference.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>

using bf16 = __nv_bfloat16;

// A kernel `name` with the parameters `p`, one struct, in blocks of at most `threads`.
#define KERNEL(name, Params, threads) extern "C" __global__ void __launch_bounds__(threads) name(const Params p)
// One whose threads get so few registers that a multiprocessor holds `blocks` of them.
#define RESIDENT_KERNEL(name, Params, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Params p)
// The block's memory, as much as the launch asks for, aligned to 16 bytes.
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
// The same for tiles of groups, which begin at multiples of 1024 bytes; by another name than the former.
#define GROUP_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(float x) { return x; }
template <typename T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
__device__ inline long long nearest(double x) { return __double2ll_rn(x); }
__device__ inline uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }
// Alignment is checked by the emulator; the hardware traps.
template <int BYTES> __device__ inline void check_aligned(const void *) {}
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }

constexpr unsigned ALL_LANES = 0xffffffffu;
__device__ inline float from_lane_xor(float x, int mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
__device__ inline uint32_t from_lane_xor(uint32_t x, int mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane `l` gives the address of row `l % 8` of matrix `l / 8`, and
// gets the numbers (l / 4, 2 (l % 4)) and the next of each; transposed: (2 (l % 4), l / 4) and the one below it.
__device__ inline void load_matrices(uint32_t (&r)[4], const bf16 *row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const bf16 *row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
// The pair of numbers in one word, as the matrix instructions take them, the first one in the lower half.
__device__ inline uint32_t narrow_pair(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
// d += a b over the warp: a 16 x 16 by rows, b 16 x 8 by columns, d 16 x 8 in f32 (PTX ISA, mma.m16n8k16).
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 2^x to 2^-22 of it; nothing for what is below 2^-126.
__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Begins to copy `N` bytes, 4 or 16, into shared memory, or zeros if they are not `there`; they have come when the thread has waited.
template <int N> __device__ inline void copy_async(void *to, const void *from, bool there) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = there ? N : 0;
  if constexpr (N == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
#include "emulator/emulator.h"
#endif

using f32 = float;

// Numbers that are loaded and stored in one go.
template <typename T, int N> struct alignas(N * sizeof(T)) Several {
  static constexpr int SIZE = N;
  T values[N];
};
// 16 bytes of them.
template <typename T> using Pack = Several<T, 16 / sizeof(T)>;

template <int N, typename T> __device__ inline Several<T, N> load(const T *from) {
  check_aligned<N * sizeof(T)>(from);
  return *reinterpret_cast<const Several<T, N> *>(from);
}
template <typename T, int N> __device__ inline void store(T *to, const Several<T, N> &numbers) {
  check_aligned<N * sizeof(T)>(to);
  *reinterpret_cast<Several<T, N> *>(to) = numbers;
}
template <typename T> __device__ inline bool is_aligned(const T *p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// The rows of a matrix, or of some of its columns.
struct Rows {
  void *first;
  int64_t stride; // numbers from row to row

  template <typename T> __device__ T *row(int64_t row) const { return static_cast<T *>(first) + row * stride; }
};

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / 32; }

__device__ inline float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += from_lane_xor(x, mask);
  return x;
}
// NaN wins.
__device__ inline float larger(float a, float b) { return (a > b || a != a) ? a : b; }
__device__ inline float warp_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = larger(x, from_lane_xor(x, mask));
  return x;
}

// Combines one number a thread over the whole block, in a fixed order; every thread gets the result. `scratch` has 32 numbers.
template <typename Combine> __device__ inline float block_reduce(float x, float *scratch, float neutral, Combine combine) {
  for (int mask = 16; mask > 0; mask /= 2) x = combine(x, from_lane_xor(x, mask));
  __syncthreads(); // the scratch may still be read from the last time
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  const int warps = (static_cast<int>(blockDim.x) + 31) / 32;
  x = lane() < warps ? scratch[lane()] : neutral;
  for (int mask = 16; mask > 0; mask /= 2) x = combine(x, from_lane_xor(x, mask));
  return x;
}
__device__ inline float block_sum(float x, float *scratch) {
  return block_reduce(x, scratch, 0.0f, [](float a, float b) { return a + b; });
}
__device__ inline float block_max(float x, float *scratch) {
  return block_reduce(x, scratch, -INFINITY, [](float a, float b) { return larger(a, b); });
}

// Philox4x32-10 (Salmon et al. 2011), as the generator on the host has it.
struct Random {
  uint32_t key[2];
  uint32_t stream[2];
};
struct Words {
  uint32_t word[4];
};
__device__ inline Words random_block(const Random &random, uint64_t n) {
  uint32_t a = static_cast<uint32_t>(n), b = static_cast<uint32_t>(n >> 32), c = random.stream[0], d = random.stream[1];
  uint32_t key0 = random.key[0], key1 = random.key[1];
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t high0 = high_product(0xD2511F53u, a), low0 = 0xD2511F53u * a;
    const uint32_t high1 = high_product(0xCD9E8D57u, c), low1 = 0xCD9E8D57u * c;
    a = high1 ^ b ^ key0, b = low1;
    c = high0 ^ d ^ key1, d = low0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// Dropout's factor: 16 bits of the random words decide for each number; number `i` of a row has the bits `i % 8` of block
// `row * ceil(width / 8) + i / 8`.
struct Dropping {
  uint32_t threshold; // in steps of 2^-16; 0 drops nothing
  float kept;
};
// Of a block's numbers those that are kept, a bit each.
__device__ inline uint32_t kept_of(const Dropping &dropping, const Words &words) {
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t bits = (words.word[i / 2] >> (16 * (i % 2))) & 0xffff;
    kept |= bits < dropping.threshold ? 0 : 1u << i;
  }
  return kept;
}
__device__ inline float factor(const Dropping &dropping, uint32_t kept, int i) { return kept >> i & 1 ? dropping.kept : 0.0f; }
