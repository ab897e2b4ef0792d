// Attention over examples laid end to end, as in FlashAttention-2 (Dao 2023), with T5's relative bias: tiles of scores live in
// shared memory, and of a row only the logarithm of its normaliser is kept. Nothing of size T x T is stored, and every number is one
// chain of additions in a fixed order: the gradient is made by two kernels, one for the queries' and one for the keys' and values',
// so that no block adds to what another one writes. For the gradient to the bias's table, a block sums those to the scores of its
// tiles by their distances, and another kernel adds up the blocks' sums by buckets.
#pragma once
#include "common.cuh"
#include "tiles.cuh"

// Rows of an example that a block works on.
struct Tile {
  int example, first;
};

struct AttentionParams {
  const void *q, *k, *v, *y, *dy; // [rows, heads * width]
  void *out, *dq, *dk, *dv;
  float *normalisers, *delta; // [heads, queries]
  const int *query_offsets, *key_offsets;
  const Tile *tiles;   // of queries; for the gradients to keys and values, of keys
  const float *bias;   // [heads, bias_stride] by key - query + bias_zero; null for none
  float *by_distance;  // [tiles, heads, 2 * bias_zero + 1], 0 before: sums of gradients to scores, in the order of the bias
  const uint32_t *bucket_of; // the bucket of each place of the bias
  float *table;        // [buckets, heads]: the gradient to the table of which the bias was made
  const Random *random; // [examples, heads]; null for no dropout
  Dropping dropping;
  int bias_stride, bias_zero;
  int heads, width, queries;
  int prefix; // leading keys of every example that stand before the sequence
  int causal;
  int tile_count, buckets;
};

// One head of one example.
template <typename T> struct Head {
  const AttentionParams &p;
  int example, head, first_query, queries, first_key, keys;
  int64_t stride;

  __device__ Head(const AttentionParams &p, int example, int head)
      : p(p), example(example), head(head), first_query(p.query_offsets[example]),
        queries(p.query_offsets[example + 1] - first_query), first_key(p.key_offsets[example]),
        keys(p.key_offsets[example + 1] - first_key), stride(static_cast<int64_t>(p.heads) * p.width) {}

  __device__ int64_t place(int row) const { return row * stride + static_cast<int64_t>(head) * p.width; }
  __device__ const T *query(const void *all, int row) const { return static_cast<const T *>(all) + place(first_query + row); }
  __device__ const T *key(const void *all, int row) const { return static_cast<const T *>(all) + place(first_key + row); }
  __device__ int64_t of_row(int query) const { return static_cast<int64_t>(head) * p.queries + first_query + query; }

  __device__ bool sees(int query, int key) const {
    return query < queries && key < keys && !(p.causal && key - p.prefix > query);
  }
  __device__ float bias(int query, int key) const {
    if (p.bias == nullptr || key < p.prefix) return 0.0f;
    return p.bias[static_cast<int64_t>(head) * p.bias_stride + p.bias_zero + key - p.prefix - query];
  }
  // Keys that the query rows before `end` see.
  __device__ int visible(int end) const { return p.causal && end + p.prefix < keys ? end + p.prefix : keys; }
  __device__ float dropped(int query, int key) const {
    if (p.random == nullptr) return 1.0f;
    const uint64_t block = static_cast<uint64_t>(query) * static_cast<uint64_t>((keys + 7) / 8) + static_cast<uint64_t>(key / 8);
    return factor(p.dropping, random_block(p.random[example * p.heads + head], block), key % 8);
  }
};

template <typename T, int WIDTH> struct AttentionLayout {
  static constexpr int ROWS = Tiles<T>::ROWS, LD = LEADING<T, WIDTH>, LDP = LEADING<T, ROWS>;
  static constexpr int TILE = ROWS * LD, PROBABILITIES = ROWS * LDP;
};

// Writes the lane's sums times `scale(half)` to the rows of a head that are there.
template <typename T, int N, typename Scale>
__device__ inline void store_rows(float (&sums)[N][4], T *to, int64_t stride, int rows, int width, Scale scale) {
  each_sum(sums, [&](float sum, int half, int column) {
    const int row = 16 * warp() + row_of(half);
    if (row < rows && column < width) to[row * stride + column] = narrow<T>(sum * scale(half));
  });
}

template <typename T, int WIDTH> __device__ inline void attention(const AttentionParams &p) {
  using L = AttentionLayout<T, WIDTH>;
  SHARED_MEMORY(memory);
  T *const q = reinterpret_cast<T *>(memory), *const k = q + L::TILE, *const v = k + L::TILE;
  T *const probabilities = v + L::TILE + 16 * warp() * L::LDP;
  const Tile tile = p.tiles[blockIdx.x];
  const Head<T> h(p, tile.example, static_cast<int>(blockIdx.y));
  const int rows = h.queries - tile.first < L::ROWS ? h.queries - tile.first : L::ROWS;
  const int own = tile.first + 16 * warp(); // the warp's first query

  load_tile<T, WIDTH>(q, h.query(p.q, tile.first), rows, h.stride, p.width);
  float y[WIDTH / 8][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  clear(y);
  const int visible = h.visible(tile.first + rows);
  for (int first = 0; first < visible; first += L::ROWS) {
    __syncthreads(); // the tiles were read, or the queries are there
    load_tile<T, WIDTH>(k, h.key(p.k, first), h.keys - first, h.stride, p.width);
    load_tile<T, WIDTH>(v, h.key(p.v, first), h.keys - first, h.stride, p.width);
    __syncthreads();
    float scores[L::ROWS / 8][4];
    clear(scores);
    multiply_rows<L::ROWS, WIDTH>(scores, q + 16 * warp() * L::LD, L::LD, k, L::LD);
    float highest[2] = {top[0], top[1]};
    each_sum(scores, [&](float &s, int half, int column) {
      const int query = own + row_of(half), key = first + column;
      s = h.sees(query, key) ? s + h.bias(query, key) : -INFINITY;
      if (s > highest[half]) highest[half] = s;
    });
    float sums[2] = {0.0f, 0.0f}, shift[2], shrink[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      for (int mask = 1; mask < 4; mask *= 2) highest[half] = larger(highest[half], from_lane_xor(highest[half], mask));
      shift[half] = highest[half] == -INFINITY ? 0.0f : highest[half];
      shrink[half] = expf(top[half] - shift[half]);
      top[half] = highest[half];
    }
    each_sum(scores, [&](float &s, int half, int column) {
      const float probability = expf(s - shift[half]);
      sums[half] += probability;
      const float kept = p.random == nullptr ? probability : probability * h.dropped(own + row_of(half), first + column);
      probabilities[row_of(half) * L::LDP + column] = narrow<T>(kept);
    });
#pragma unroll
    for (int half = 0; half < 2; half++) {
      for (int mask = 1; mask < 4; mask *= 2) sums[half] += from_lane_xor(sums[half], mask);
      total[half] = total[half] * shrink[half] + sums[half];
    }
    each_sum(y, [&](float &sum, int half, int) { sum *= shrink[half]; });
    __syncwarp();
    multiply_columns<WIDTH, L::ROWS>(y, probabilities, L::LDP, v, L::LD);
    __syncwarp(); // the probabilities were read
  }
  // A query that sees no key gets 0.
  const float inverse[2] = {total[0] == 0.0f ? 0.0f : 1.0f / total[0], total[1] == 0.0f ? 0.0f : 1.0f / total[1]};
  T *const out = static_cast<T *>(p.out) + h.place(h.first_query + tile.first);
  store_rows(y, out, h.stride, rows, p.width, [&](int half) { return inverse[half]; });
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane() / 4 + 8 * half;
    if (lane() % 4 == 0 && own + row < h.queries) p.normalisers[h.of_row(own + row)] = top[half] + logf(total[half]);
  }
}

// delta = the row sums of y dy, a warp a row and head.
template <typename T> __device__ inline void attention_delta(const AttentionParams &p) {
  const int row = static_cast<int>(blockIdx.x * (blockDim.x / 32)) + warp(), head = static_cast<int>(blockIdx.y);
  if (row >= p.queries) return;
  const int64_t place = (static_cast<int64_t>(row) * p.heads + head) * p.width;
  const T *const y = static_cast<const T *>(p.y) + place, *const dy = static_cast<const T *>(p.dy) + place;
  float sum = 0.0f;
  for (int i = lane(); i < p.width; i += 32) sum += widen(y[i]) * widen(dy[i]);
  sum = warp_sum(sum);
  if (lane() == 0) p.delta[static_cast<int64_t>(head) * p.queries + row] = sum;
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

// With probabilities `P`, dropout's factors `f` and `dP = (dy v^T) f`: dS = P (dP - delta), dq = dS k. With BIAS, dS is also summed
// by distances.
template <typename T, int WIDTH, bool BIAS> __device__ inline void attention_gradient_queries(const AttentionParams &p) {
  using L = AttentionLayout<T, WIDTH>;
  SHARED_MEMORY(memory);
  T *const q = reinterpret_cast<T *>(memory), *const dy = q + L::TILE, *const k = dy + L::TILE, *const v = k + L::TILE;
  T *const ds = v + L::TILE + 16 * warp() * L::LDP;
  float *const by_rows = reinterpret_cast<float *>(v + L::TILE + L::PROBABILITIES);
  const Tile tile = p.tiles[blockIdx.x];
  const Head<T> h(p, tile.example, static_cast<int>(blockIdx.y));
  const int rows = h.queries - tile.first < L::ROWS ? h.queries - tile.first : L::ROWS;
  const int own = tile.first + 16 * warp();

  load_tile<T, WIDTH>(q, h.query(p.q, tile.first), rows, h.stride, p.width);
  load_tile<T, WIDTH>(dy, h.query(p.dy, tile.first), rows, h.stride, p.width);
  float shift[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int query = own + lane() / 4 + 8 * half;
    if (query < h.queries) shift[half] = p.normalisers[h.of_row(query)], delta[half] = p.delta[h.of_row(query)];
  }
  float dq[WIDTH / 8][4];
  clear(dq);
  const int visible = h.visible(tile.first + rows);
  for (int first = 0; first < visible; first += L::ROWS) {
    __syncthreads();
    load_tile<T, WIDTH>(k, h.key(p.k, first), h.keys - first, h.stride, p.width);
    load_tile<T, WIDTH>(v, h.key(p.v, first), h.keys - first, h.stride, p.width);
    __syncthreads();
    float scores[L::ROWS / 8][4], dp[L::ROWS / 8][4];
    clear(scores), clear(dp);
    multiply_rows<L::ROWS, WIDTH>(scores, q + 16 * warp() * L::LD, L::LD, k, L::LD);
    multiply_rows<L::ROWS, WIDTH>(dp, dy + 16 * warp() * L::LD, L::LD, v, L::LD);
    each_pair(scores, dp, [&](float s, float dp, int half, int column) {
      const int query = own + row_of(half), key = first + column;
      float d = 0.0f;
      if (h.sees(query, key)) {
        const float probability = expf(s + h.bias(query, key) - shift[half]);
        d = probability * (dp * h.dropped(query, key) - delta[half]);
      }
      ds[row_of(half) * L::LDP + column] = narrow<T>(d);
      // The prefix has no bias.
      if constexpr (BIAS) by_rows[(16 * warp() + row_of(half)) * (L::ROWS + 1) + column] = key < p.prefix ? 0.0f : d;
    });
    __syncwarp();
    multiply_columns<WIDTH, L::ROWS>(dq, ds, L::LDP, k, L::LD);
    __syncwarp();
    if constexpr (BIAS) {
      __syncthreads(); // all warps' gradients are there
      add_diagonals<T>(p, by_rows, first, tile.first);
    }
  }
  T *const out = static_cast<T *>(p.dq) + h.place(h.first_query + tile.first);
  store_rows(dq, out, h.stride, rows, p.width, [](int) { return 1.0f; });
}

// The same with rows and columns exchanged: dk = dS^T q, dv = (P f)^T dy. A warp has 16 keys.
template <typename T, int WIDTH> __device__ inline void attention_gradient_keys(const AttentionParams &p) {
  using L = AttentionLayout<T, WIDTH>;
  SHARED_MEMORY(memory);
  T *const k = reinterpret_cast<T *>(memory), *const v = k + L::TILE, *const q = v + L::TILE, *const dy = q + L::TILE;
  T *const operand = dy + L::TILE + 16 * warp() * L::LDP;
  float *const shift = reinterpret_cast<float *>(dy + L::TILE + L::PROBABILITIES), *const delta = shift + L::ROWS;
  const Tile tile = p.tiles[blockIdx.x];
  const Head<T> h(p, tile.example, static_cast<int>(blockIdx.y));
  const int rows = h.keys - tile.first < L::ROWS ? h.keys - tile.first : L::ROWS;
  const int own = tile.first + 16 * warp(); // the warp's first key

  load_tile<T, WIDTH>(k, h.key(p.k, tile.first), rows, h.stride, p.width);
  load_tile<T, WIDTH>(v, h.key(p.v, tile.first), rows, h.stride, p.width);
  float dk[WIDTH / 8][4], dv[WIDTH / 8][4];
  clear(dk), clear(dv);
  // Queries before the tile's keys do not see them.
  for (int first = p.causal && tile.first > p.prefix ? tile.first - p.prefix : 0; first < h.queries; first += L::ROWS) {
    __syncthreads();
    load_tile<T, WIDTH>(q, h.query(p.q, first), h.queries - first, h.stride, p.width);
    load_tile<T, WIDTH>(dy, h.query(p.dy, first), h.queries - first, h.stride, p.width);
    for (int i = static_cast<int>(threadIdx.x); i < L::ROWS; i += TILE_THREADS<T>) {
      shift[i] = first + i < h.queries ? p.normalisers[h.of_row(first + i)] : 0.0f;
      delta[i] = first + i < h.queries ? p.delta[h.of_row(first + i)] : 0.0f;
    }
    __syncthreads();
    float scores[L::ROWS / 8][4];
    clear(scores);
    multiply_rows<L::ROWS, WIDTH>(scores, k + 16 * warp() * L::LD, L::LD, q, L::LD);
    each_sum(scores, [&](float &s, int half, int column) {
      const int query = first + column, key = own + row_of(half);
      s = h.sees(query, key) ? expf(s + h.bias(query, key) - shift[column]) : 0.0f;
      operand[row_of(half) * L::LDP + column] = narrow<T>(s * h.dropped(query, key));
    });
    __syncwarp();
    multiply_columns<WIDTH, L::ROWS>(dv, operand, L::LDP, dy, L::LD);
    float dp[L::ROWS / 8][4];
    clear(dp);
    multiply_rows<L::ROWS, WIDTH>(dp, v + 16 * warp() * L::LD, L::LD, dy, L::LD);
    __syncwarp();
    each_pair(scores, dp, [&](float probability, float dp, int half, int column) {
      const int query = first + column, key = own + row_of(half);
      const float d = h.sees(query, key) ? probability * (dp * h.dropped(query, key) - delta[column]) : 0.0f;
      operand[row_of(half) * L::LDP + column] = narrow<T>(d);
    });
    __syncwarp();
    multiply_columns<WIDTH, L::ROWS>(dk, operand, L::LDP, q, L::LD);
    __syncwarp();
  }
  const int64_t place = h.place(h.first_key + tile.first);
  store_rows(dk, static_cast<T *>(p.dk) + place, h.stride, rows, p.width, [](int) { return 1.0f; });
  store_rows(dv, static_cast<T *>(p.dv) + place, h.stride, rows, p.width, [](int) { return 1.0f; });
}

constexpr int DELTA_THREADS = 256, BIAS_THREADS = 256;

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

#define ATTENTION_KERNELS(T, WIDTH)                                                                                                  \
  KERNEL(attention_##T##_##WIDTH, AttentionParams, TILE_THREADS<T>) { attention<T, WIDTH>(p); }                                      \
  KERNEL(attention_gradient_queries_##T##_##WIDTH, AttentionParams, TILE_THREADS<T>) {                                               \
    attention_gradient_queries<T, WIDTH, false>(p);                                                                                  \
  }                                                                                                                                  \
  KERNEL(attention_gradient_queries_bias_##T##_##WIDTH, AttentionParams, TILE_THREADS<T>) {                                          \
    attention_gradient_queries<T, WIDTH, true>(p);                                                                                   \
  }                                                                                                                                  \
  KERNEL(attention_gradient_keys_##T##_##WIDTH, AttentionParams, TILE_THREADS<T>) { attention_gradient_keys<T, WIDTH>(p); }

ATTENTION_KERNELS(bf16, 64)
ATTENTION_KERNELS(bf16, 128)
ATTENTION_KERNELS(bf16, 256)
ATTENTION_KERNELS(f32, 64)
ATTENTION_KERNELS(f32, 128)
ATTENTION_KERNELS(f32, 256)
KERNEL(attention_delta_bf16, AttentionParams, DELTA_THREADS) { attention_delta<bf16>(p); }
KERNEL(attention_delta_f32, AttentionParams, DELTA_THREADS) { attention_delta<float>(p); }
