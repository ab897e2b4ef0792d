// Attention and its gradient in bf16, of heads of up to 64 numbers, by the instructions of groups: the same steps as in attention.cuh and
// attention_gradient.cuh, where a group has a tile's rows and its products go on while the group works on other numbers. The bias of a
// tile's rows and columns depends on their distance alone, so that it is copied with the tile.
//
// Without dropout a thread needs so few registers that a multiprocessor holds one block more, hence DROP.
#pragma once
#include "attention_gradient.cuh"
#include "groups.cuh"

// Distances between the rows and columns of two tiles.
constexpr int DISTANCES = 2 * GROUP_ROWS - 1;

// What a block has in shared memory: its own tiles, stages of two tiles each with the bias between them, and what else there is.
template <int OWN> struct GroupMemory {
  static constexpr int STAGES = 2, WINDOW = GROUP_ROWS * 2;
  bf16 *const tiles;

  __device__ explicit GroupMemory(unsigned char *memory) : tiles(reinterpret_cast<bf16 *>(memory)) {}
  __device__ bf16 *own(int i) const { return tiles + i * GROUP_TILE; }
  __device__ bf16 *stage(int stage) const { return tiles + (OWN + 2 * stage) * GROUP_TILE; }
  __device__ float *window(int stage) const {
    return reinterpret_cast<float *>(tiles + (OWN + 2 * STAGES) * GROUP_TILE) + stage * WINDOW;
  }
  __device__ float *rest() const { return window(STAGES); }
  // What dropout keeps of a stage, behind so many numbers of the rest.
  __device__ uint32_t *kept(int stage, int behind) const {
    return reinterpret_cast<uint32_t *>(rest() + behind) + stage * KEPT<bf16>;
  }
};

// Begin to copy a tile of an operand's rows, from `first` on.
__device__ inline void copy_queries(const Head<bf16> &h, bf16 *to, const Rows &all, int first) {
  copy_group_tile(to, h.row(all, h.first_query + first), h.queries - first, all.stride, h.p.width, h.p.aligned);
}
__device__ inline void copy_keys(const Head<bf16> &h, bf16 *to, const Rows &all, int first) {
  copy_group_tile(to, h.row(all, h.first_key + first), h.keys - first, all.stride, h.p.width, h.p.aligned);
}
// A tile's rows of a result, of which the example's first is `first`.
__device__ inline GroupRows result_rows(const Head<bf16> &h, const Rows &all, int first, int rows) {
  return {h.row(all, first), all.stride, rows, h.p.width, h.p.aligned != 0};
}

// Begins to copy the bias of a tile's rows, from `row` on, and columns: that of column - row, turned row - column, at
// GROUP_ROWS - 1 more.
template <bool TURNED> __device__ inline void copy_window(const Head<bf16> &h, float *window, int row, int column) {
  if (h.p.bias == nullptr) return;
  const int i = static_cast<int>(threadIdx.x), distance = key_of<TURNED>(row, column) - h.p.prefix - query_of<TURNED>(row, column);
  // Before the prefix's end and behind a head's room there is no bias.
  const int place = h.p.bias_zero + distance - (GROUP_ROWS - 1) + i;
  const bool there = i < DISTANCES && place >= -GROUP_ROWS && place < h.p.bias_stride - GROUP_ROWS;
  copy_async<4>(window + i, h.p.bias + (there ? static_cast<int64_t>(h.head) * h.p.bias_stride + place : 0), there);
}

// Begins to copy what queries from `query` on meet in a stage: keys from `key` on, their values, and the bias between them.
template <int OWN>
__device__ inline void copy_keys_and_values(const Head<bf16> &h, const GroupMemory<OWN> &memory, int stage, int query, int key) {
  copy_keys(h, memory.stage(stage), h.p.k, key);
  copy_keys(h, memory.stage(stage) + GROUP_TILE, h.p.v, key);
  copy_window<false>(h, memory.window(stage), query, key);
}

// Makes scores of a tile's products, as `score` does: of rows from `row` on, of which the warp has 16, and of columns from `column` on.
template <bool TURNED>
__device__ inline void finish_scores(const Head<bf16> &h, float (&scores)[8][4], const float *window, int row, int column) {
  const int own = 16 * warp();
  if (h.p.bias == nullptr) {
    each_sum(scores, [&](float &s, int, int) { s *= LOG2_E; });
  } else {
    const int distance = TURNED ? own + row_of(0) - column_of(0) : column_of(0) - own - row_of(0);
    add_bias<TURNED>(h, scores, window + GROUP_ROWS - 1 + distance, row + own, column);
  }
  hide_unseen<TURNED>(h, scores, row + own, column);
}

template <bool DROP> __device__ inline void group_attention(const AttentionParams &p) {
  GROUP_SHARED_MEMORY(group_memory);
  const GroupMemory<1> memory(group_memory);
  bf16 *const q = memory.own(0);
  const Tile tile = p.tiles[blockIdx.x];
  const Head<bf16> h(p, tile.example, static_cast<int>(blockIdx.y));
  const int rows = h.queries - tile.first < GROUP_ROWS ? h.queries - tile.first : GROUP_ROWS;
  const int own = tile.first + 16 * warp();

  copy_queries(h, q, p.q, tile.first);
  float y[8][4];
  clear(y);
  RowSoftmax softmax;
  const auto copy = [&](int first, int stage) {
    copy_keys_and_values(h, memory, stage, tile.first, first);
    if (DROP) draw_kept(h, memory.kept(stage, 0), tile.first, first);
  };
  each_group_tile(0, h.template seen<false>(tile.first + rows - 1).end, copy, [&](int first, int stage, auto copy_next) {
    const bf16 *const k = memory.stage(stage), *const v = k + GROUP_TILE;
    float scores[8][4], shrink[2];
    before_products();
    start_rows(scores, q, k);
    copy_next();
    await_products<0>(scores);
    finish_scores<false>(h, scores, memory.window(stage), tile.first, first);
    softmax.soften(scores, shrink);
    if (DROP) drop<bf16, false>(h, scores, memory.kept(stage, 0));
    if (shrink[0] != 1.0f || shrink[1] != 1.0f) each_sum(y, [&](float &sum, int half, int) { sum *= shrink[half]; });
    uint32_t left[4][4];
    narrow_sums(left, scores);
    before_products(y, left);
    start_sums(y, left, v);
    await_products<0>(y);
  });
  const float total[2] = {row_sum(softmax.total[0]), row_sum(softmax.total[1])};
  __syncthreads(); // the queries were read
  store_attended(h, softmax, total, own, [&](const float(&inverse)[2]) {
    store_group_rows(y, q, result_rows(h, p.out, h.first_query + tile.first, rows), [&](int half) { return inverse[half]; });
  });
}

template <bool DROP, bool BIAS> __device__ inline void group_gradient_queries(const AttentionParams &p) {
  GROUP_SHARED_MEMORY(group_memory);
  const GroupMemory<2> memory(group_memory);
  bf16 *const q = memory.own(0), *const dy = memory.own(1);
  const Tile tile = p.tiles[blockIdx.x];
  const Head<bf16> h(p, tile.example, static_cast<int>(blockIdx.y));
  const int rows = h.queries - tile.first < GROUP_ROWS ? h.queries - tile.first : GROUP_ROWS;
  const int own = tile.first + 16 * warp();

  copy_queries(h, q, p.q, tile.first);
  copy_queries(h, dy, p.dy, tile.first);
  float shift[2], delta[2];
  load_rows(h, own, shift, delta);
  float dq[8][4];
  clear(dq);
  constexpr int SCORES = BIAS ? GROUP_ROWS * (GROUP_ROWS + 1) : 0; // for the sums by distances
  const auto copy = [&](int first, int stage) {
    copy_keys_and_values(h, memory, stage, tile.first, first);
    if (DROP) draw_kept(h, memory.kept(stage, SCORES), tile.first, first);
  };
  each_group_tile(0, h.template seen<false>(tile.first + rows - 1).end, copy, [&](int first, int stage, auto copy_next) {
    const bf16 *const k = memory.stage(stage), *const v = k + GROUP_TILE;
    float ds[8][4], dp[8][4];
    before_products();
    start_rows(ds, q, k);
    start_rows(dp, dy, v);
    copy_next();
    await_products<1>(ds);
    finish_scores<false>(h, ds, memory.window(stage), tile.first, first);
    each_sum(ds, [&](float &s, int half, int) { s = power_of_2(s - shift[half]); });
    await_products<0>(dp);
    if (DROP) drop<bf16, false>(h, dp, memory.kept(stage, SCORES));
    each_pair(ds, dp, [&](float &s, float dp, int half, int) { s *= dp - delta[half]; });
    uint32_t left[4][4];
    narrow_sums(left, ds);
    before_products(dq, left);
    start_sums(dq, left, k);
    if constexpr (BIAS) add_distances<bf16>(p, ds, memory.rest(), first, tile.first);
    await_products<0>(dq);
  });
  __syncthreads(); // the queries were read
  store_group_rows(dq, q, result_rows(h, p.dq, h.first_query + tile.first, rows), [](int) { return 1.0f; });
}

template <bool DROP> __device__ inline void group_gradient_keys(const AttentionParams &p) {
  GROUP_SHARED_MEMORY(group_memory);
  const GroupMemory<2> memory(group_memory);
  bf16 *const k = memory.own(0), *const v = memory.own(1);
  float *const of_queries = memory.rest(); // of each stage the queries' normalisers and deltas
  const Tile tile = p.tiles[blockIdx.x];
  const Head<bf16> h(p, tile.example, static_cast<int>(blockIdx.y));
  const int rows = h.keys - tile.first < GROUP_ROWS ? h.keys - tile.first : GROUP_ROWS;
  constexpr int NUMBERS = memory.STAGES * 2 * GROUP_ROWS; // of the stages' queries

  copy_keys(h, k, p.k, tile.first);
  copy_keys(h, v, p.v, tile.first);
  float dk[8][4], dv[8][4];
  clear(dk), clear(dv);
  const auto copy = [&](int first, int stage) {
    copy_queries(h, memory.stage(stage), p.q, first);
    copy_queries(h, memory.stage(stage) + GROUP_TILE, p.dy, first);
    copy_window<true>(h, memory.window(stage), tile.first, first);
    copy_row_numbers(h, of_queries + 2 * stage * GROUP_ROWS, first, GROUP_ROWS);
    if (DROP) draw_kept(h, memory.kept(stage, NUMBERS), first, tile.first);
  };
  const Span queries = h.template seen<true>(tile.first);
  each_group_tile(queries.begin, queries.end, copy, [&](int first, int stage, auto copy_next) {
    const bf16 *const q = memory.stage(stage), *const dy = q + GROUP_TILE;
    const float *const shift = of_queries + 2 * stage * GROUP_ROWS + column_of(0), *const delta = shift + GROUP_ROWS;
    float ds[8][4], dp[8][4];
    uint32_t left[4][4];
    before_products();
    start_rows(ds, k, q);
    copy_next(); // with less under way, since registers are few
    before_products();
    start_rows(dp, v, dy);
    await_products<1>(ds);
    finish_scores<true>(h, ds, memory.window(stage), tile.first, first);
    each_sum(ds, [&](float &s, int, int n) { s = power_of_2(s - shift[n]); });
    if (DROP) {
      float dropped[8][4];
      each_pair(dropped, ds, [](float &probability, float s, int, int) { probability = s; });
      drop<bf16, true>(h, dropped, memory.kept(stage, NUMBERS));
      narrow_sums(left, dropped);
    } else {
      narrow_sums(left, ds);
    }
    before_products(dv, left);
    start_sums(dv, left, dy);
    await_products<1>(dp);
    if (DROP) drop<bf16, true>(h, dp, memory.kept(stage, NUMBERS));
    each_pair(ds, dp, [&](float &s, float dp, int, int n) { s *= dp - delta[n]; });
    uint32_t right[4][4];
    narrow_sums(right, ds);
    before_products(dk, right);
    start_sums(dk, right, q);
    await_products<0>(dv);
    await_products<0>(dk);
  });
  __syncthreads(); // the keys and values were read
  const int first = h.first_key + tile.first;
  store_group_rows(dk, k, result_rows(h, p.dk, first, rows), [](int) { return 1.0f; });
  store_group_rows(dv, v, result_rows(h, p.dv, first, rows), [](int) { return 1.0f; });
}

// These exist for the one architecture that has the instructions, and on the emulator.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// With the blocks that a multiprocessor is to hold.
RESIDENT_KERNEL(group_attention, AttentionParams, GROUP_THREADS, 5) { group_attention<false>(p); }
RESIDENT_KERNEL(group_attention_dropped, AttentionParams, GROUP_THREADS, 4) { group_attention<true>(p); }
RESIDENT_KERNEL(group_attention_gradient_queries, AttentionParams, GROUP_THREADS, 4) { group_gradient_queries<false, false>(p); }
RESIDENT_KERNEL(group_attention_gradient_queries_dropped, AttentionParams, GROUP_THREADS, 3) { group_gradient_queries<true, false>(p); }
RESIDENT_KERNEL(group_attention_gradient_queries_bias, AttentionParams, GROUP_THREADS, 3) { group_gradient_queries<true, true>(p); }
RESIDENT_KERNEL(group_attention_gradient_keys, AttentionParams, GROUP_THREADS, 3) { group_gradient_keys<false>(p); }
RESIDENT_KERNEL(group_attention_gradient_keys_dropped, AttentionParams, GROUP_THREADS, 2) { group_gradient_keys<true>(p); }
#endif
