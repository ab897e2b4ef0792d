// Attention over examples laid end to end, as in FlashAttention-2 (Dao 2023), with T5's relative bias: scores live in registers, and of
// a row only the logarithm of its normaliser is kept. Nothing of size T x T is stored, and every number is one chain of additions in a
// fixed order. Exponentials are powers of 2, of scores times log2(e).
#pragma once
#include "common.cuh"
#include "tiles.cuh"

// Rows of an example that a block works on.
struct Tile {
  int example, first;
};

struct AttentionParams {
  Rows q, k, v, y, dy, out, dq, dk, dv; // [rows, heads * width]
  float *normalisers, *delta; // [heads, queries]; the former as logarithms to the base 2, infinite for a query that sees no key
  const int *query_offsets, *key_offsets;
  const Tile *tiles;   // of queries; for the gradients to keys and values, of keys
  const float *bias;   // [heads, bias_stride] by key - query + bias_zero, times log2(e), with room on both sides for what a tile has
                       // behind an example's end; null for none
  float *by_distance;  // [tiles, heads, 2 * bias_zero + 1], 0 before: sums of gradients to scores, in the order of the bias
  const uint32_t *bucket_of; // the bucket of each place of the bias
  float *table;        // [buckets, heads]: the gradient to the table of which the bias was made
  const Random *random; // [examples, heads]; null for no dropout
  Dropping dropping;
  int bias_stride, bias_zero;
  int heads, width, queries;
  int prefix; // leading keys of every example that stand before the sequence
  int causal;
  int aligned; // whether a head's rows can be read 16 bytes at a time
  int tile_count, buckets;
};

constexpr float LOG2_E = 1.4426950408889634f;

struct Span {
  int begin, end;
};

// One head of one example.
template <typename T> struct Head {
  const AttentionParams &p;
  int example, head, first_query, queries, first_key, keys;

  __device__ Head(const AttentionParams &p, int example, int head)
      : p(p), example(example), head(head), first_query(p.query_offsets[example]),
        queries(p.query_offsets[example + 1] - first_query), first_key(p.key_offsets[example]),
        keys(p.key_offsets[example + 1] - first_key) {}

  // What the head has of a row.
  __device__ T *row(const Rows &all, int row) const { return all.row<T>(row) + static_cast<int64_t>(head) * p.width; }
  __device__ int64_t of_row(int query) const { return static_cast<int64_t>(head) * p.queries + first_query + query; }

  // Begin to copy a tile of an operand's rows, from `first` on.
  template <int WIDTH> __device__ void copy_queries(T *to, const Rows &all, int first) const {
    copy_tile<T, WIDTH>(to, row(all, first_query + first), queries - first, all.stride, p.width, p.aligned);
  }
  template <int WIDTH> __device__ void copy_keys(T *to, const Rows &all, int first) const {
    copy_tile<T, WIDTH>(to, row(all, first_key + first), keys - first, all.stride, p.width, p.aligned);
  }
  // The bias of a query and a key of the sequence; others' stand by their distance from it.
  __device__ const float *bias(int query, int key) const {
    return p.bias + static_cast<int64_t>(head) * p.bias_stride + p.bias_zero + key - p.prefix - query;
  }
  // The keys that a query sees or, turned, the queries that see a key. Both ends grow with the row.
  template <bool TURNED> __device__ Span seen(int row) const {
    if (TURNED) return {p.causal && row > p.prefix ? row - p.prefix : 0, queries};
    return {0, p.causal && row + p.prefix + 1 < keys ? row + p.prefix + 1 : keys};
  }
};

template <typename T, int WIDTH> struct AttentionLayout {
  static constexpr int ROWS = Tiles<T>::ROWS, LD = LEADING<T, WIDTH>, LDS = LEADING<T, ROWS>;
  static constexpr int TILE = ROWS * LD;
  // Stages of two tiles. Wide heads have one, so that those of 128 numbers fit into the 99 KB of smaller GPUs, too.
  static constexpr int STAGES = WIDTH == 64 ? 2 : 1, STAGED = STAGES * 2 * TILE;
  // A warp's scratch, which its sums go through on their way to a product; bf16 needs none.
  static constexpr int SCRATCH = sizeof(T) == 2 ? 0 : 16 * LDS;
};

// What is whose row and column: a warp has rows of queries and looks at columns of keys, or, turned, the other way round.
template <bool TURNED> __device__ inline int query_of(int row, int column) { return TURNED ? column : row; }
template <bool TURNED> __device__ inline int key_of(int row, int column) { return TURNED ? row : column; }

// Times log2(e), with the bias of the sequence's keys. `bias` is that of the lane's first row and column.
template <bool TURNED, typename T, int N>
__device__ inline void add_bias(const Head<T> &h, float (&scores)[N][4], const float *bias, int row, int column) {
  if (key_of<TURNED>(row, column) >= h.p.prefix) {
    each_sum(scores, [&](float &s, int half, int n) { s = s * LOG2_E + bias[TURNED ? 8 * half - n : n - 8 * half]; });
  } else {
    each_sum(scores, [&](float &s, int half, int n) {
      const bool before = key_of<TURNED>(row + row_of(half), column + column_of(n)) < h.p.prefix;
      s = s * LOG2_E + (before ? 0.0f : bias[TURNED ? 8 * half - n : n - 8 * half]);
    });
  }
}

// -infinity where a row that is there does not see a column.
template <bool TURNED, typename T, int N>
__device__ inline void hide_unseen(const Head<T> &h, float (&scores)[N][4], int row, int column) {
  if (h.template seen<TURNED>(row + 15).begin <= column && h.template seen<TURNED>(row).end >= column + 8 * N) return;
  const Span seen[2] = {h.template seen<TURNED>(row + row_of(0)), h.template seen<TURNED>(row + row_of(1))};
  each_sum(scores, [&](float &s, int half, int n) {
    const int c = column + column_of(n);
    if (c < seen[half].begin || c >= seen[half].end) s = -INFINITY;
  });
}

// The scores of a warp's 16 rows, from `row` on, and of a tile's columns, from `column` on, with the bias and times log2(e);
// -infinity where a row that is there does not see a column.
template <typename T, int WIDTH, bool TURNED>
__device__ inline void score(const Head<T> &h, float (&scores)[Tiles<T>::ROWS / 8][4], const T *rows, const T *columns, int row,
                             int column) {
  using L = AttentionLayout<T, WIDTH>;
  clear(scores);
  multiply_rows<L::ROWS, WIDTH>(scores, rows, L::LD, columns, L::LD);
  const int query = query_of<TURNED>(row, column), key = key_of<TURNED>(row, column);
  if (h.p.bias == nullptr) {
    each_sum(scores, [&](float &s, int, int) { s *= LOG2_E; });
  } else {
    const int distance = TURNED ? row_of(0) - column_of(0) : column_of(0) - row_of(0);
    add_bias<TURNED>(h, scores, h.bias(query, key) + distance, row, column);
  }
  hide_unseen<TURNED>(h, scores, row, column);
}

// Words of what dropout keeps of a tile of queries and keys, a bit each, in the order of a query's keys.
template <typename T> constexpr int KEPT = Tiles<T>::ROWS * Tiles<T>::ROWS / 32;

// Draws for a tile of queries, from `query` on, and of keys, from `key` on, a multiple of 8, what is kept, if there is dropout: a block of
// random words serves 8 keys of a query, and is drawn once. The tile's next barrier shows it to the others.
template <typename T> __device__ inline void draw_kept(const Head<T> &h, uint32_t *kept, int query, int key) {
  if (h.p.random == nullptr) return;
  constexpr int BLOCKS = Tiles<T>::ROWS / 8;
  const Random random = h.p.random[h.example * h.p.heads + h.head];
  const uint64_t of_query = static_cast<uint64_t>(h.keys + 7) / 8;
  const int queries = h.queries - query < Tiles<T>::ROWS ? h.queries - query : Tiles<T>::ROWS;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < queries * BLOCKS; i += TILE_THREADS<T>) {
    const uint64_t block = static_cast<uint64_t>(query + i / BLOCKS) * of_query + static_cast<uint64_t>(key / 8 + i % BLOCKS);
    reinterpret_cast<uint8_t *>(kept)[i] = static_cast<uint8_t>(kept_of(h.p.dropping, random_block(random, block)));
  }
  __syncwarp(); // lanes that drew more or less are together for the group's next instruction
}

// Times dropout's factors, if there is any: those of a tile, of whose rows the warp has 16.
template <typename T, bool TURNED>
__device__ inline void drop(const Head<T> &h, float (&sums)[Tiles<T>::ROWS / 8][4], const uint32_t *kept) {
  if (h.p.random == nullptr) return;
  constexpr int ROWS = Tiles<T>::ROWS;
  if (TURNED) {
    // The lane's two keys are 8 apart: their bits lie in a half of a word, of which a warp has one.
    const uint16_t *const own = reinterpret_cast<const uint16_t *>(kept) + column_of(0) * (ROWS / 16) + warp();
    each_sum(sums, [&](float &sum, int half, int n) { sum *= factor(h.p.dropping, own[n * (ROWS / 16)], row_of(half)); });
  } else {
    const uint32_t *const own = kept + (16 * warp() + row_of(0)) * (ROWS / 32);
    each_sum(sums, [&](float &sum, int half, int n) {
      sum *= factor(h.p.dropping, own[(8 * half * ROWS + n) / 32] >> column_of(0), n % 32);
    });
  }
}

// The largest of what the four lanes of a row have, and their sum.
__device__ inline float row_max(float x) {
  for (int mask = 1; mask < 4; mask *= 2) x = fmaxf(x, from_lane_xor(x, mask));
  return x;
}
__device__ inline float row_sum(float x) {
  for (int mask = 1; mask < 4; mask *= 2) x += from_lane_xor(x, mask);
  return x;
}

// The rows' softmax so far: the largest score, and the lane's part of the sum of powers, less that score.
struct RowSoftmax {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  // Turns scores into such powers. Returns by halves what the powers before are to be multiplied by.
  template <int N> __device__ void soften(float (&scores)[N][4], float (&shrink)[2]) {
    float highest[2] = {top[0], top[1]};
    each_sum(scores, [&](float s, int half, int) { highest[half] = fmaxf(highest[half], s); });
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      highest[half] = row_max(highest[half]);
      shift[half] = highest[half] == -INFINITY ? 0.0f : highest[half];
      shrink[half] = power_of_2(top[half] - shift[half]);
      top[half] = highest[half];
      total[half] *= shrink[half];
    }
    each_sum(scores, [&](float &s, int half, int) {
      s = power_of_2(s - shift[half]);
      total[half] += s;
    });
  }
};

// Ends attention of the warp's queries, from `own` on: `store` gets by halves what rows are to be multiplied by. A query that sees no key
// gets 0.
template <typename T, typename Store>
__device__ inline void store_attended(const Head<T> &h, const RowSoftmax &softmax, const float (&total)[2], int own, Store store) {
  const float inverse[2] = {total[0] == 0.0f ? 0.0f : 1.0f / total[0], total[1] == 0.0f ? 0.0f : 1.0f / total[1]};
  store(inverse);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int query = own + row_of(half);
    if (lane() % 4 == 0 && query < h.queries)
      h.p.normalisers[h.of_row(query)] = total[half] == 0.0f ? INFINITY : softmax.top[half] + log2f(total[half]);
  }
}

template <typename T, int WIDTH> __device__ inline void attention(const AttentionParams &p) {
  using L = AttentionLayout<T, WIDTH>;
  SHARED_MEMORY(memory);
  T *const q = reinterpret_cast<T *>(memory), *const stages = q + L::TILE, *const scratch = stages + L::STAGED + warp() * L::SCRATCH;
  uint32_t *const kept = reinterpret_cast<uint32_t *>(stages + L::STAGED + L::ROWS / 16 * L::SCRATCH); // of each stage
  const Tile tile = p.tiles[blockIdx.x];
  const Head<T> h(p, tile.example, static_cast<int>(blockIdx.y));
  const int rows = h.queries - tile.first < L::ROWS ? h.queries - tile.first : L::ROWS;
  const int own = tile.first + 16 * warp(); // the warp's first query

  h.template copy_queries<WIDTH>(q, p.q, tile.first);
  float y[WIDTH / 8][4];
  clear(y);
  RowSoftmax softmax;
  const auto copy = [&](int first, int stage) {
    T *const to = stages + 2 * stage * L::TILE;
    h.template copy_keys<WIDTH>(to, p.k, first);
    h.template copy_keys<WIDTH>(to + L::TILE, p.v, first);
    draw_kept(h, kept + stage * KEPT<T>, tile.first, first);
  };
  each_tile<T, L::STAGES>(0, h.template seen<false>(tile.first + rows - 1).end, copy, [&](int first, int stage) {
    if (16 * warp() >= rows) return;
    const T *const k = stages + 2 * stage * L::TILE, *const v = k + L::TILE;
    float scores[L::ROWS / 8][4], shrink[2];
    score<T, WIDTH, false>(h, scores, q + 16 * warp() * L::LD, k, own, first);
    softmax.soften(scores, shrink);
    drop<T, false>(h, scores, kept + stage * KEPT<T>);
    each_sum(y, [&](float &sum, int half, int) { sum *= shrink[half]; });
    multiply_sums<WIDTH, L::ROWS, L::LDS>(y, scores, scratch, v, L::LD);
  });
  const float total[2] = {row_sum(softmax.total[0]), row_sum(softmax.total[1])};
  store_attended(h, softmax, total, own, [&](const float(&inverse)[2]) {
    store_rows(y, h.row(p.out, h.first_query + tile.first), p.out.stride, rows, p.width, [&](int half) { return inverse[half]; });
  });
}
