// Tiles of a few rows in shared memory, and a warp's products of them.
//
// A warp has 16 rows of the left operand. Its sums lie in the layout of the matrix instruction's result: of each 16 x 8 piece, lane
// `l` has the numbers (l / 4, 2 (l % 4)) and the next one, and the same two 8 rows below. bf16 is multiplied by the matrix units; f32
// by plain multiplications, each lane for its own sums, since the units would round f32 operands to 10 bits.
#pragma once
#include "common.cuh"

template <typename T> struct Tiles;
template <> struct Tiles<bf16> {
  static constexpr int ROWS = 64;
};
// Smaller, so that wide heads fit into shared memory.
template <> struct Tiles<float> {
  static constexpr int ROWS = 32;
};

// From row to row of a tile: 16 bytes more than it holds, so that a column's rows lie in different banks.
template <typename T, int WIDTH> constexpr int LEADING = WIDTH + Pack<T>::SIZE;
template <typename T> constexpr int TILE_THREADS = Tiles<T>::ROWS / 16 * 32;

// Begins to copy rows of a head into a tile of WIDTH columns; what is not there is 0. `aligned`: whether the rows of `width` numbers can
// be read 16 bytes at a time.
template <typename T, int WIDTH>
__device__ inline void copy_tile(T *to, const T *from, int rows, int64_t stride, int width, bool aligned) {
  constexpr int SIZE = Pack<T>::SIZE, PACKS = WIDTH / SIZE, STEP = TILE_THREADS<T> / PACKS, LD = LEADING<T, WIDTH>;
  if (aligned) {
    const int row = static_cast<int>(threadIdx.x) / PACKS, column = static_cast<int>(threadIdx.x) % PACKS * SIZE;
    const int left = column < width ? rows - row : 0;
    from += row * stride + column, to += row * LD + column;
#pragma unroll
    for (int n = 0; n < Tiles<T>::ROWS; n += STEP) copy_async<16>(to + n * LD, from + n * stride, n < left);
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Tiles<T>::ROWS * WIDTH; i += TILE_THREADS<T>) {
      const int row = i / WIDTH, column = i % WIDTH;
      to[row * LD + column] = row < rows && column < width ? from[row * stride + column] : narrow<T>(0.0f);
    }
  }
}

// Calls `f(first, stage)` for the tiles of rows `begin ...` before `end`, whose rows `copy(first, stage)` brings into shared memory. With
// two stages the next tile is copied while the block works on this one.
template <typename T, int STAGES, typename Copy, typename F> __device__ inline void each_tile(int begin, int end, Copy copy, F f) {
  int stage = 0;
  if (STAGES > 1 && begin < end) copy(begin, stage);
  for (int first = begin; first < end; first += Tiles<T>::ROWS) {
    if constexpr (STAGES == 1) {
      __syncthreads(); // the tile before was read
      copy(first, stage);
    }
    wait_for_copies();
    __syncthreads(); // all threads' copies are there and, with two stages, the tile before was read
    if (STAGES > 1 && first + Tiles<T>::ROWS < end) copy(first + Tiles<T>::ROWS, stage ^ 1);
    f(first, stage);
    stage ^= STAGES - 1;
  }
  wait_for_copies(); // of what was to be used with tiles, if there were none
}

// sums += a b^T: `a` the warp's 16 rows, `b` N rows, both of K numbers.
template <int N, int K> __device__ inline void multiply_rows(float (&sums)[N / 8][4], const bf16 *a, int lda, const bf16 *b, int ldb) {
  const int l = lane();
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t left[4];
    load_matrices(left, a + (l % 8 + l / 8 % 2 * 8) * lda + k + l / 16 * 8);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t right[4];
      load_matrices(right, b + (n + l % 8 + l / 16 * 8) * ldb + k + l / 8 % 2 * 8);
      multiply_add(sums[n / 8], left, right[0], right[1]);
      multiply_add(sums[n / 8 + 1], left, right[2], right[3]);
    }
  }
}
template <int N, int K>
__device__ inline void multiply_rows(float (&sums)[N / 8][4], const float *a, int lda, const float *b, int ldb) {
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (int k = 0; k < K; k++) {
    const float upper = a[row * lda + k], lower = a[(row + 8) * lda + k];
#pragma unroll
    for (int n = 0; n < N; n += 8) {
      const float left = b[(n + column) * ldb + k], right = b[(n + column + 1) * ldb + k];
      sums[n / 8][0] += upper * left, sums[n / 8][1] += upper * right;
      sums[n / 8][2] += lower * left, sums[n / 8][3] += lower * right;
    }
  }
}

// sums += left b: 16 columns of a left operand, and as many rows of N numbers; in f32 one column, of which the lane has two numbers.
template <int N> __device__ inline void add_rows(float (&sums)[N][4], const uint32_t (&left)[4], const bf16 *b, int ldb) {
  const int l = lane();
#pragma unroll
  for (int n = 0; n < 8 * N; n += 16) {
    uint32_t right[4];
    load_matrices_transposed(right, b + (l % 8 + l / 8 % 2 * 8) * ldb + n + l / 16 * 8);
    multiply_add(sums[n / 8], left, right[0], right[1]);
    multiply_add(sums[n / 8 + 1], left, right[2], right[3]);
  }
}
template <int N> __device__ inline void add_row(float (&sums)[N][4], float upper, float lower, const float *b) {
  const int column = lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float left = b[n * 8 + column], right = b[n * 8 + column + 1];
    sums[n][0] += upper * left, sums[n][1] += upper * right;
    sums[n][2] += lower * left, sums[n][3] += lower * right;
  }
}

// sums += a b: `a` the warp's own sums, narrowed, `b` K rows of N. The sums have the layout of the matrix instruction's left operand;
// those in f32 go through `scratch`, 16 rows.
template <int N, int K, int LDA>
__device__ inline void multiply_sums(float (&sums)[N / 8][4], const float (&a)[K / 8][4], bf16 *, const bf16 *b, int ldb) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    const float(&low)[4] = a[k / 8], (&high)[4] = a[k / 8 + 1];
    const uint32_t left[4] = {narrow_pair(low[0], low[1]), narrow_pair(low[2], low[3]), narrow_pair(high[0], high[1]),
                              narrow_pair(high[2], high[3])};
    add_rows(sums, left, b + k * ldb, ldb);
  }
}
template <int N, int K, int LDA>
__device__ inline void multiply_sums(float (&sums)[N / 8][4], const float (&a)[K / 8][4], float *scratch, const float *b, int ldb) {
  const int row = lane() / 4, column = lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < K / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) scratch[(row + i / 2 * 8) * LDA + n * 8 + column + i % 2] = a[n][i];
  }
  __syncwarp();
  for (int k = 0; k < K; k++) {
    const float upper = scratch[row * LDA + k], lower = scratch[(row + 8) * LDA + k];
    add_row(sums, upper, lower, b + k * ldb);
  }
  __syncwarp(); // the scratch was read
}

// sums += a b: `a` the warp's 16 rows of K numbers, `b` K rows of N.
template <int N, int K> __device__ inline void multiply_columns(float (&sums)[N / 8][4], const bf16 *a, int lda, const bf16 *b, int ldb) {
  const int l = lane();
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t left[4];
    load_matrices(left, a + (l % 8 + l / 8 % 2 * 8) * lda + k + l / 16 * 8);
    add_rows(sums, left, b + k * ldb, ldb);
  }
}
template <int N, int K>
__device__ inline void multiply_columns(float (&sums)[N / 8][4], const float *a, int lda, const float *b, int ldb) {
  const int row = lane() / 4;
  for (int k = 0; k < K; k++) {
    const float upper = a[row * lda + k], lower = a[(row + 8) * lda + k];
    add_row(sums, upper, lower, b + k * ldb);
  }
}

// sums += a^T b: of `a`, K rows, the warp's 16 columns; `b` K rows of N.
template <int N, int K> __device__ inline void multiply_turned(float (&sums)[N / 8][4], const bf16 *a, int lda, const bf16 *b, int ldb) {
  const int l = lane();
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t left[4];
    load_matrices_transposed(left, a + (k + l % 8 + l / 16 * 8) * lda + l / 8 % 2 * 8);
    add_rows(sums, left, b + k * ldb, ldb);
  }
}
template <int N, int K>
__device__ inline void multiply_turned(float (&sums)[N / 8][4], const float *a, int lda, const float *b, int ldb) {
  const int row = lane() / 4;
  for (int k = 0; k < K; k++) {
    const float upper = a[k * lda + row], lower = a[k * lda + row + 8];
    add_row(sums, upper, lower, b + k * ldb);
  }
}

// The row among the warp's of the lane's sums of a half, and the column of those that are `n` behind the lane's first.
__device__ inline int row_of(int half) { return lane() / 4 + 8 * half; }
__device__ inline int column_of(int n) { return lane() % 4 * 2 + n; }

// Calls `f(sum, half, n)` for the lane's sums: they are of row `row_of(half)` and column `column_of(n)`. (An index that the compiler
// does not know would put what is kept by halves into memory.)
template <int N, typename F> __device__ inline void each_sum(float (&sums)[N][4], F f) {
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) f(sums[n][i], i / 2, n * 8 + i % 2);
  }
}

// The same for two operands.
template <int N, typename F> __device__ inline void each_pair(float (&a)[N][4], const float (&b)[N][4], F f) {
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) f(a[n][i], b[n][i], i / 2, n * 8 + i % 2);
  }
}

template <int N> __device__ inline void clear(float (&sums)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
}

// Writes two numbers of a row, of which so many are there; at once if they are `paired`, aligned to that.
template <typename T> __device__ inline void store_two(T *to, T first, T second, int there, bool paired) {
  if (paired && there > 1) {
    store(to, Several<T, 2>{{first, second}});
  } else {
    if (there > 0) to[0] = first;
    if (there > 1) to[1] = second;
  }
}

// Writes the lane's sums times `scale(half)` to the rows that are there, of `width` numbers from `to` on.
template <typename T, int N, typename Scale>
__device__ inline void store_rows(const float (&sums)[N][4], T *to, int64_t stride, int rows, int width, Scale scale) {
  const bool paired = stride % 2 == 0 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = 16 * warp() + row_of(half), column = column_of(8 * n);
      const T first = narrow<T>(sums[n][2 * half] * scale(half)), second = narrow<T>(sums[n][2 * half + 1] * scale(half));
      if (row < rows) store_two(to + row * stride + column, first, second, width - column, paired);
    }
  }
}
