// Hopper's matrix instructions (PTX ISA, wgmma): a group of four warps multiplies 64 rows at once. Where both operands lie in shared
// memory they are read from there, so that a number is read once for 64 rows, where a warp alone reads it once for 16. What a lane gets
// is what the warp's own instruction would give it (tiles.cuh), of 16 rows a warp.
//
// A group's block has one group, and a tile 64 rows of 64 numbers: 128 bytes each, whose eight parts of 16 bytes are swapped by the
// row's number, so that eight rows' parts of one column lie in different banks.
#pragma once
#include "tiles.cuh"

constexpr int GROUP_THREADS = 128, GROUP_ROWS = 64, GROUP_TILE = GROUP_ROWS * 64;

// Where the part of 8 numbers `part` of a row lies in a tile.
__device__ inline int part_of_row(int row, int part) { return row * 64 + (part ^ row % 8) * 8; }

#ifdef __CUDACC__

// A tile as the instructions take it ("matrix descriptor"): its place, 1024 bytes from 8 rows to the next 8, parts swapped in 128 bytes.
// From one to the next 16 numbers of all rows it is 2 more; from one to the next 16 rows, 128 more.
__device__ inline uint64_t descriptor(const bf16 *tile) {
  const uint64_t place = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  return (place & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// What the thread copied into shared memory can be seen by the instructions of all who meet it at a barrier.
__device__ inline void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define SUMS_OF(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SUMS(d) SUMS_OF(d, 0), SUMS_OF(d, 1), SUMS_OF(d, 2), SUMS_OF(d, 3), SUMS_OF(d, 4), SUMS_OF(d, 5), SUMS_OF(d, 6), SUMS_OF(d, 7)
#define SUMS_LIST                                                                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "  \
  "%28, %29, %30, %31}"

// Before products of tiles, whose sums begin anew.
__device__ inline void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Before products that add to `sums`, of a left operand in registers: what makes these must not come behind the fence.
__device__ inline void before_products(float (&sums)[8][4], uint32_t (&left)[4][4]) {
#pragma unroll
  for (int n = 0; n < 8; n++) asm volatile("" : SUMS_OF(sums, n)::"memory");
#pragma unroll
  for (int k = 0; k < 4; k++) asm volatile("" : "+r"(left[k][0]), "+r"(left[k][1]), "+r"(left[k][2]), "+r"(left[k][3])::"memory");
  before_products();
}

// Waits until but the last PENDING products that were started are done; then `sums` can be read.
template <int PENDING> __device__ inline void await_products(float (&sums)[8][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  // The compiler takes them for known since the start.
#pragma unroll
  for (int n = 0; n < 8; n++) asm volatile("" : SUMS_OF(sums, n)::"memory");
}

// Starts `sums = a b^T` of two tiles.
__device__ inline void start_rows(float (&sums)[8][4], const bf16 *a, const bf16 *b) {
  const uint64_t left = descriptor(a), right = descriptor(b);
#pragma unroll
  for (int k = 0; k < 4; k++)
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SUMS_LIST ", %32, %33, add, 1, 1, 0, 0;\n}\n"
                 : SUMS(sums)
                 : "l"(left + 2 * k), "l"(right + 2 * k), "r"(k));
  commit_products();
}

// Starts `sums += a b`: `a` 64 columns of a left operand, narrowed, of `b` the rows.
__device__ inline void start_sums(float (&sums)[8][4], const uint32_t (&a)[4][4], const bf16 *b) {
  const uint64_t right = descriptor(b);
#pragma unroll
  for (int k = 0; k < 4; k++)
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SUMS_LIST ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : SUMS(sums)
                 : "r"(a[k][0]), "r"(a[k][1]), "r"(a[k][2]), "r"(a[k][3]), "l"(right + 128 * k));
  commit_products();
}

#undef SUMS_LIST
#undef SUMS
#undef SUMS_OF
#endif

// A warp's sums as left operand, narrowed.
__device__ inline void narrow_sums(uint32_t (&left)[4][4], const float (&sums)[8][4]) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const float(&low)[4] = sums[2 * k], (&high)[4] = sums[2 * k + 1];
    left[k][0] = narrow_pair(low[0], low[1]), left[k][1] = narrow_pair(low[2], low[3]);
    left[k][2] = narrow_pair(high[0], high[1]), left[k][3] = narrow_pair(high[2], high[3]);
  }
}

// Begins to copy rows into a tile of a group; what is not there is 0. `aligned`: as for copy_tile.
__device__ inline void copy_group_tile(bf16 *to, const bf16 *from, int rows, int64_t stride, int width, bool aligned) {
  constexpr int STEP = GROUP_THREADS / 8;
  if (aligned) {
    const int row = static_cast<int>(threadIdx.x) / 8, part = static_cast<int>(threadIdx.x) % 8;
    const int left = part * 8 < width ? rows - row : 0;
    from += row * stride + part * 8, to += part_of_row(row, part);
#pragma unroll
    for (int n = 0; n < GROUP_ROWS; n += STEP) copy_async<16>(to + n * 64, from + n * stride, n < left);
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < GROUP_TILE; i += GROUP_THREADS) {
      const int row = i / 64, column = i % 64;
      to[part_of_row(row, column / 8) + column % 8] = row < rows && column < width ? from[row * stride + column] : narrow<bf16>(0.0f);
    }
  }
}

// As each_tile, with two stages, for `f(first, stage, copy_next)`: it begins the next tile's copies once its first products go on.
template <typename Copy, typename F> __device__ inline void each_group_tile(int begin, int end, Copy copy, F f) {
  int stage = 0;
  if (begin < end) copy(begin, stage);
  for (int first = begin; first < end; first += GROUP_ROWS) {
    wait_for_copies();
    show_copies();
    __syncthreads(); // all threads' copies are there, and the tile before was read
    f(first, stage, [&] {
      if (first + GROUP_ROWS < end) copy(first + GROUP_ROWS, stage ^ 1);
    });
    stage ^= 1;
  }
  wait_for_copies(); // of what was to be used with tiles, if there were none
}

// Rows of a head that are there, `width` numbers of each. `aligned`: as for copy_tile.
struct GroupRows {
  bf16 *first;
  int64_t stride;
  int rows, width;
  bool aligned;
};

// Writes the lane's sums times `scale(half)` to a tile's rows, 16 bytes at a time where that can be: they go through the warp's own rows of
// a tile in shared memory, which nobody reads any more.
template <typename Scale> __device__ inline void store_group_rows(const float (&sums)[8][4], bf16 *tile, const GroupRows &to, Scale scale) {
  if (!to.aligned) return store_rows(sums, to.first, to.stride, to.rows, to.width, scale);
  const int first = 16 * warp();
#pragma unroll
  for (int n = 0; n < 8; n++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t pair = narrow_pair(sums[n][2 * half] * scale(half), sums[n][2 * half + 1] * scale(half));
      *reinterpret_cast<uint32_t *>(tile + part_of_row(first + row_of(half), n) + column_of(0)) = pair;
    }
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 16; n += 4) {
    const int row = first + n + lane() / 8, part = lane() % 8;
    if (row < to.rows && part * 8 < to.width) store(to.first + row * to.stride + part * 8, load<8>(tile + part_of_row(row, part)));
  }
}
