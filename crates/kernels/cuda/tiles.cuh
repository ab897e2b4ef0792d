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

// Rows `first ...` of a head into a tile of WIDTH columns; what is not there is 0.
template <typename T, int WIDTH> __device__ inline void load_tile(T *to, const T *from, int rows, int64_t stride, int width) {
  constexpr int SIZE = Pack<T>::SIZE, PACKS = WIDTH / SIZE;
  const bool aligned = is_aligned(from) && stride % SIZE == 0 && width % SIZE == 0;
  for (int i = static_cast<int>(threadIdx.x); i < Tiles<T>::ROWS * PACKS; i += TILE_THREADS<T>) {
    const int row = i / PACKS, column = i % PACKS * SIZE;
    const T *const source = from + row * stride + column;
    Pack<T> pack;
    if (row < rows && aligned && column < width) {
      pack = load_pack(source);
    } else {
#pragma unroll
      for (int j = 0; j < SIZE; j++) pack.values[j] = row < rows && column + j < width ? source[j] : narrow<T>(0.0f);
    }
    store_pack(to + row * LEADING<T, WIDTH> + column, pack);
  }
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

// sums += a b: `a` the warp's 16 rows of K numbers, `b` K rows of N.
template <int N, int K>
__device__ inline void multiply_columns(float (&sums)[N / 8][4], const bf16 *a, int lda, const bf16 *b, int ldb) {
  const int l = lane();
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t left[4];
    load_matrices(left, a + (l % 8 + l / 8 % 2 * 8) * lda + k + l / 16 * 8);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t right[4];
      load_matrices_transposed(right, b + (k + l % 8 + l / 8 % 2 * 8) * ldb + n + l / 16 * 8);
      multiply_add(sums[n / 8], left, right[0], right[1]);
      multiply_add(sums[n / 8 + 1], left, right[2], right[3]);
    }
  }
}
template <int N, int K>
__device__ inline void multiply_columns(float (&sums)[N / 8][4], const float *a, int lda, const float *b, int ldb) {
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (int k = 0; k < K; k++) {
    const float upper = a[row * lda + k], lower = a[(row + 8) * lda + k];
#pragma unroll
    for (int n = 0; n < N; n += 8) {
      const float left = b[k * ldb + n + column], right = b[k * ldb + n + column + 1];
      sums[n / 8][0] += upper * left, sums[n / 8][1] += upper * right;
      sums[n / 8][2] += lower * left, sums[n / 8][3] += lower * right;
    }
  }
}

__device__ inline int row_of(int half) { return lane() / 4 + 8 * half; }

// Calls `f(sum, half, column)` for the lane's sums: they are of the warp's row `lane() / 4 + 8 * half`. (An index that the compiler
// does not know would put what is kept by halves into memory.)
template <int N, typename F> __device__ inline void each_sum(float (&sums)[N][4], F f) {
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) f(sums[n][i], i / 2, n * 8 + lane() % 4 * 2 + i % 2);
  }
}

// The same for two operands.
template <int N, typename F> __device__ inline void each_pair(const float (&a)[N][4], const float (&b)[N][4], F f) {
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) f(a[n][i], b[n][i], i / 2, n * 8 + lane() % 4 * 2 + i % 2);
  }
}

template <int N> __device__ inline void clear(float (&sums)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
}
