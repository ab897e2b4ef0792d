// CUDA's words for the host's compiler: what kernels use of the language, with each thread of a block as a fiber.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

struct bf16 {
  uint16_t bits;
};

namespace emulator {

struct Index {
  unsigned x, y, z;
};

// The running thread's place.
extern Index thread_index, block_index, block_size, grid_size;
extern unsigned char *shared_memory;

void block_barrier();
// Waits for all lanes of the warp; `mine` is seen by the others until the next wait.
void exchange(const void *mine, size_t size);
// What lane `lane` of this warp gave.
const void *of_lane(int lane);
[[noreturn]] void fail(const char *what);
// A copy of `size` bytes from somewhere, or of zeros.
struct Copy {
  void *to;
  const void *from; // null for zeros
  size_t size;
};
void begin_copy(const Copy &copy);
// The sums of a lane of a group of four warps, and what is added to them: `left b^T` or, with `left` in registers, `left b`.
struct GroupProduct {
  float (*sums)[4];
  const bf16 *a; // null for those in registers
  uint32_t left[4][4];
  const bf16 *b;
};
void start(const GroupProduct &product);
// Until so many are left.
void await(size_t left);

using Body = void (*)(const void *params);
struct Registration {
  Registration(const char *name, Body body, unsigned threads);
};

} // namespace emulator

#define __device__
#define __restrict__
#define __shared__ static
#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define blockDim ::emulator::block_size
#define gridDim ::emulator::grid_size
#define __syncthreads ::emulator::block_barrier

#define KERNEL(name, Params, threads)                                                                                                \
  static void name(const Params &p);                                                                                                 \
  static const ::emulator::Registration register_##name(                                                                             \
      #name, [](const void *params) { name(*static_cast<const Params *>(params)); }, threads);                                       \
  static void name(const Params &p)
#define RESIDENT_KERNEL(name, Params, threads, blocks) KERNEL(name, Params, threads)
#define SHARED_MEMORY(name) unsigned char *const name = ::emulator::shared_memory
#define GROUP_SHARED_MEMORY(name) SHARED_MEMORY(name)

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float widen(bf16 x) { return of_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(float x) { return x; }
template <typename T> inline T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
// To the nearest, ties to even.
template <> inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline long long nearest(double x) { return std::llrint(x); }
inline uint32_t high_product(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline uint32_t narrow_pair(float first, float second) {
  return narrow<bf16>(first).bits | static_cast<uint32_t>(narrow<bf16>(second).bits) << 16;
}
inline float power_of_2(float x) { return std::exp2(x); }

template <int BYTES> inline void check_aligned(const void *p) {
  if (reinterpret_cast<uintptr_t>(p) % BYTES != 0) ::emulator::fail("an access of several numbers is not aligned");
}
template <int N> inline void copy_async(void *to, const void *from, bool there) {
  static_assert(N == 4 || N == 16);
  check_aligned<N>(to), check_aligned<N>(from);
  ::emulator::begin_copy({to, there ? from : nullptr, N});
}
void wait_for_copies();

inline void __syncwarp() { ::emulator::exchange(nullptr, 0); }
template <typename T> inline T from_lane(T x, int lane) {
  ::emulator::exchange(&x, sizeof(T));
  T other;
  std::memcpy(&other, ::emulator::of_lane(lane), sizeof(T));
  return other;
}
inline float from_lane_xor(float x, int mask) { return from_lane(x, static_cast<int>(threadIdx.x % 32) ^ mask); }
inline uint32_t from_lane_xor(uint32_t x, int mask) { return from_lane(x, static_cast<int>(threadIdx.x % 32) ^ mask); }
inline unsigned atomicMax(unsigned *place, unsigned x) {
  const unsigned old = *place;
  if (x > old) *place = x;
  return old;
}

// The matrix instructions, by their definition in the PTX ISA.
void load_matrices(uint32_t (&r)[4], const bf16 *row);
void load_matrices_transposed(uint32_t (&r)[4], const bf16 *row);
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// Those of groups, see groups.cuh.
inline void before_products() {}
inline void before_products(float (&)[8][4], uint32_t (&)[4][4]) {}
void show_copies();
template <int PENDING> inline void await_products(float (&)[8][4]) { ::emulator::await(PENDING); }
inline void start_rows(float (&sums)[8][4], const bf16 *a, const bf16 *b) { ::emulator::start({sums, a, {}, b}); }
inline void start_sums(float (&sums)[8][4], const uint32_t (&a)[4][4], const bf16 *b) {
  ::emulator::GroupProduct product{sums, nullptr, {}, b};
  std::memcpy(product.left, a, sizeof a);
  ::emulator::start(product);
}
