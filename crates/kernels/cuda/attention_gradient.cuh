// The gradient of attention, by two kernels: one for the queries' and one for the keys' and values', so that no block adds to what
// another one writes. For the gradient to the bias's table, a block sums those to the scores of its tiles by their distances, and
// another kernel adds up the blocks' sums by buckets.
#pragma once
#include "attention.cuh"

// The sum of y dy over a head's row. Four lanes share a row, and all lanes of a warp call this.
template <typename T> __device__ inline float row_product(const Head<T> &h, int query) {
  constexpr int LANES = 4, SIZE = Pack<T>::SIZE;
  const int own = lane() % LANES, width = h.p.width;
  float sum = 0.0f;
  if (query < h.queries) {
    const T *const y = h.row(h.p.y, h.first_query + query), *const dy = h.row(h.p.dy, h.first_query + query);
    if (h.p.aligned) {
      for (int i = own * SIZE; i < width; i += LANES * SIZE) {
        const Pack<T> a = load<SIZE>(y + i), b = load<SIZE>(dy + i);
#pragma unroll
        for (int j = 0; j < SIZE; j++) sum += widen(a.values[j]) * widen(b.values[j]);
      }
    } else {
      for (int i = own; i < width; i += LANES) sum += widen(y[i]) * widen(dy[i]);
    }
  }
  return row_sum(sum);
}

// Adds the gradients to the scores of a tile of queries and one of keys, `[rows, rows + 1]`, to the sums of their distances: a thread
// has one of the 2 * rows - 1 diagonals, the last one none.
template <typename T> __device__ inline void add_diagonals(const AttentionParams &p, const float *scores, int first_key, int first_query) {
  constexpr int ROWS = Tiles<T>::ROWS;
  const int64_t distances = 2 * static_cast<int64_t>(p.bias_zero) + 1;
  float *const sums = p.by_distance + (static_cast<int64_t>(blockIdx.x) * p.heads + blockIdx.y) * distances;
  const int diagonal = static_cast<int>(threadIdx.x) - (ROWS - 1); // column - row
  const int64_t place = static_cast<int64_t>(p.bias_zero) + first_key - p.prefix - first_query + diagonal;
  // Beyond the longest example there are no scores.
  if (place < 0 || place >= distances) return;
  float sum = 0.0f;
  for (int row = diagonal < 0 ? -diagonal : 0; row < ROWS && row + diagonal < ROWS; row++)
    sum += scores[row * (ROWS + 1) + row + diagonal];
  sums[place] += sum;
}

// By halves the normalisers of the warp's queries, from `own` on, and their deltas, which are kept for the keys' kernel. Rows that are not
// there have no probabilities: the sums by distances take them in.
template <typename T> __device__ inline void load_rows(const Head<T> &h, int own, float (&shift)[2], float (&delta)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int query = own + row_of(half);
    shift[half] = INFINITY;
    delta[half] = row_product(h, query);
    if (query >= h.queries) continue;
    shift[half] = h.p.normalisers[h.of_row(query)];
    if (lane() % 4 == 0) h.p.delta[h.of_row(query)] = delta[half];
  }
}

// Adds a block's gradients to scores, of which a warp has 16 rows, to the sums of their distances. All warps call this.
template <typename T, int N>
__device__ inline void add_distances(const AttentionParams &p, float (&ds)[N][4], float *by_rows, int first_key, int first_query) {
  each_sum(ds, [&](float d, int half, int n) {
    // The prefix has no bias.
    const int column = column_of(n);
    by_rows[(16 * warp() + row_of(half)) * (8 * N + 1) + column] = first_key + column < p.prefix ? 0.0f : d;
  });
  __syncthreads(); // all warps' gradients are there
  add_diagonals<T>(p, by_rows, first_key, first_query);
}

// Begins to copy the normalisers and the deltas of `rows` queries: a thread copies one number, and a block has twice as many threads.
template <typename T> __device__ inline void copy_row_numbers(const Head<T> &h, float *to, int first, int rows) {
  const int own = static_cast<int>(threadIdx.x), query = first + own % rows;
  const float *const from = own < rows ? h.p.normalisers : h.p.delta;
  const bool there = query < h.queries;
  copy_async<4>(to + own, from + (there ? h.of_row(query) : 0), there);
}

// With probabilities `P`, dropout's factors `f` and `dP = (dy v^T) f`: dS = P (dP - delta), dq = dS k. With BIAS, dS is also summed
// by distances.
template <typename T, int WIDTH, bool BIAS> __device__ inline void attention_gradient_queries(const AttentionParams &p) {
  using L = AttentionLayout<T, WIDTH>;
  SHARED_MEMORY(memory);
  T *const q = reinterpret_cast<T *>(memory), *const dy = q + L::TILE, *const stages = dy + L::TILE;
  T *const scratch = stages + L::STAGED + warp() * L::SCRATCH;
  float *const by_rows = reinterpret_cast<float *>(stages + L::STAGED + L::ROWS / 16 * L::SCRATCH);
  uint32_t *const kept = reinterpret_cast<uint32_t *>(by_rows + (BIAS ? L::ROWS * (L::ROWS + 1) : 0)); // of each stage
  const Tile tile = p.tiles[blockIdx.x];
  const Head<T> h(p, tile.example, static_cast<int>(blockIdx.y));
  const int rows = h.queries - tile.first < L::ROWS ? h.queries - tile.first : L::ROWS;
  const int own = tile.first + 16 * warp();

  h.template copy_queries<WIDTH>(q, p.q, tile.first);
  h.template copy_queries<WIDTH>(dy, p.dy, tile.first);
  float shift[2], delta[2];
  load_rows(h, own, shift, delta);
  float dq[WIDTH / 8][4];
  clear(dq);
  const auto copy = [&](int first, int stage) {
    T *const to = stages + 2 * stage * L::TILE;
    h.template copy_keys<WIDTH>(to, p.k, first);
    h.template copy_keys<WIDTH>(to + L::TILE, p.v, first);
    draw_kept(h, kept + stage * KEPT<T>, tile.first, first);
  };
  each_tile<T, L::STAGES>(0, h.template seen<false>(tile.first + rows - 1).end, copy, [&](int first, int stage) {
    if (!BIAS && 16 * warp() >= rows) return; // the sums by distances take all warps
    const T *const k = stages + 2 * stage * L::TILE, *const v = k + L::TILE;
    float ds[L::ROWS / 8][4], dp[L::ROWS / 8][4];
    score<T, WIDTH, false>(h, ds, q + 16 * warp() * L::LD, k, own, first);
    clear(dp);
    multiply_rows<L::ROWS, WIDTH>(dp, dy + 16 * warp() * L::LD, L::LD, v, L::LD);
    drop<T, false>(h, dp, kept + stage * KEPT<T>);
    each_pair(ds, dp, [&](float &s, float dp, int half, int) { s = power_of_2(s - shift[half]) * (dp - delta[half]); });
    multiply_sums<WIDTH, L::ROWS, L::LDS>(dq, ds, scratch, k, L::LD);
    if constexpr (BIAS) add_distances<T>(p, ds, by_rows, first, tile.first);
  });
  store_rows(dq, h.row(p.dq, h.first_query + tile.first), p.dq.stride, rows, p.width, [](int) { return 1.0f; });
}

// The same with rows and columns exchanged: dk = dS^T q, dv = (P f)^T dy. A warp has 16 keys.
template <typename T, int WIDTH> __device__ inline void attention_gradient_keys(const AttentionParams &p) {
  using L = AttentionLayout<T, WIDTH>;
  SHARED_MEMORY(memory);
  T *const k = reinterpret_cast<T *>(memory), *const v = k + L::TILE, *const stages = v + L::TILE;
  T *const scratch = stages + L::STAGED + warp() * L::SCRATCH;
  // Of each stage the queries' normalisers and deltas, and what dropout keeps.
  float *const of_queries = reinterpret_cast<float *>(stages + L::STAGED + L::ROWS / 16 * L::SCRATCH);
  uint32_t *const kept = reinterpret_cast<uint32_t *>(of_queries + L::STAGES * 2 * L::ROWS);
  const Tile tile = p.tiles[blockIdx.x];
  const Head<T> h(p, tile.example, static_cast<int>(blockIdx.y));
  const int rows = h.keys - tile.first < L::ROWS ? h.keys - tile.first : L::ROWS;
  const int own = tile.first + 16 * warp(); // the warp's first key

  h.template copy_keys<WIDTH>(k, p.k, tile.first);
  h.template copy_keys<WIDTH>(v, p.v, tile.first);
  float dk[WIDTH / 8][4], dv[WIDTH / 8][4];
  clear(dk), clear(dv);
  const auto copy = [&](int first, int stage) {
    T *const to = stages + 2 * stage * L::TILE;
    h.template copy_queries<WIDTH>(to, p.q, first);
    h.template copy_queries<WIDTH>(to + L::TILE, p.dy, first);
    copy_row_numbers(h, of_queries + 2 * stage * L::ROWS, first, L::ROWS);
    draw_kept(h, kept + stage * KEPT<T>, first, tile.first);
  };
  const Span queries = h.template seen<true>(tile.first);
  each_tile<T, L::STAGES>(queries.begin, queries.end, copy, [&](int first, int stage) {
    if (16 * warp() >= rows) return;
    const T *const q = stages + 2 * stage * L::TILE, *const dy = q + L::TILE;
    const float *const shift = of_queries + 2 * stage * L::ROWS + column_of(0), *const delta = shift + L::ROWS;
    float ds[L::ROWS / 8][4], dp[L::ROWS / 8][4];
    score<T, WIDTH, true>(h, ds, k + 16 * warp() * L::LD, q, own, first);
    each_sum(ds, [&](float &s, int, int n) { s = power_of_2(s - shift[n]); });
    if (p.random == nullptr) {
      multiply_sums<WIDTH, L::ROWS, L::LDS>(dv, ds, scratch, dy, L::LD);
    } else {
      each_pair(dp, ds, [](float &probability, float s, int, int) { probability = s; });
      drop<T, true>(h, dp, kept + stage * KEPT<T>);
      multiply_sums<WIDTH, L::ROWS, L::LDS>(dv, dp, scratch, dy, L::LD);
    }
    clear(dp);
    multiply_rows<L::ROWS, WIDTH>(dp, v + 16 * warp() * L::LD, L::LD, dy, L::LD);
    drop<T, true>(h, dp, kept + stage * KEPT<T>);
    each_pair(ds, dp, [&](float &s, float dp, int, int n) { s *= dp - delta[n]; });
    multiply_sums<WIDTH, L::ROWS, L::LDS>(dk, ds, scratch, q, L::LD);
  });
  const int first = h.first_key + tile.first;
  store_rows(dk, h.row(p.dk, first), p.dk.stride, rows, p.width, [](int) { return 1.0f; });
  store_rows(dv, h.row(p.dv, first), p.dv.stride, rows, p.width, [](int) { return 1.0f; });
}

constexpr int BIAS_THREADS = 256;

// A block a head: its tiles' sums by distances are added up in the place of the first one's, and then by buckets.
KERNEL(attention_gradient_bias, AttentionParams, BIAS_THREADS) {
  const int distances = 2 * p.bias_zero + 1, head = static_cast<int>(blockIdx.x);
  float *const sums = p.by_distance + static_cast<int64_t>(head) * distances;
  for (int i = static_cast<int>(threadIdx.x); i < distances; i += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int tile = 0; tile < p.tile_count; tile++) sum += sums[static_cast<int64_t>(tile) * p.heads * distances + i];
    sums[i] = sum;
  }
  __syncthreads();
  for (int bucket = static_cast<int>(threadIdx.x); bucket < p.buckets; bucket += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int i = 0; i < distances; i++)
      if (p.bucket_of[i] == static_cast<uint32_t>(bucket)) sum += sums[i];
    p.table[bucket * p.heads + head] = sum;
  }
}

// With the blocks that a multiprocessor is to hold of attention and of the gradients to queries and to keys and values: as many as
// need no registers in memory, or few.
#define ATTENTION_KERNELS(T, WIDTH, FORWARD, QUERIES, KEYS)                                                                          \
  RESIDENT_KERNEL(attention_##T##_##WIDTH, AttentionParams, TILE_THREADS<T>, FORWARD) { attention<T, WIDTH>(p); }                    \
  RESIDENT_KERNEL(attention_gradient_queries_##T##_##WIDTH, AttentionParams, TILE_THREADS<T>, QUERIES) {                             \
    attention_gradient_queries<T, WIDTH, false>(p);                                                                                  \
  }                                                                                                                                  \
  RESIDENT_KERNEL(attention_gradient_queries_bias_##T##_##WIDTH, AttentionParams, TILE_THREADS<T>, QUERIES) {                        \
    attention_gradient_queries<T, WIDTH, true>(p);                                                                                   \
  }                                                                                                                                  \
  RESIDENT_KERNEL(attention_gradient_keys_##T##_##WIDTH, AttentionParams, TILE_THREADS<T>, KEYS) {                                   \
    attention_gradient_keys<T, WIDTH>(p);                                                                                            \
  }

ATTENTION_KERNELS(bf16, 64, 4, 3, 3)
ATTENTION_KERNELS(bf16, 128, 2, 2, 2)
ATTENTION_KERNELS(bf16, 256, 1, 1, 1)
ATTENTION_KERNELS(f32, 64, 6, 6, 6)
ATTENTION_KERNELS(f32, 128, 4, 4, 4)
ATTENTION_KERNELS(f32, 256, 1, 1, 1)
