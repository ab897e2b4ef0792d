// Attention of few queries to rows of which no keys and values are made: a head's queries are as wide as the rows, too wide for a block's
// registers. So scores and probabilities go through memory, an example's queries by its rows, and the rest is products of tiles, which
// examples have of their own. Every number is one chain of additions in a fixed order.
#pragma once
#include "attention.cuh"
#include "common.cuh"
#include "tiles.cuh"

// A part of the gradient to rows: weights, of each query to each row as `scores` has them, and the wide queries' numbers.
struct AbsorbedTerm {
  void *weights;
  const void *of_queries;
};

struct AbsorbedParams {
  const void *queries, *gradients; // wide queries, and the gradients to what they get: [queries, width]
  const void *rows;                // [rows, width]
  void *out;                       // as the queries
  const float *sum;                // [rows, width]; null for none
  float *row_gradients;            // as the sum
  // Of each example its queries by its rows, at its place; from query to query it is the next multiple of 8.
  float *scores;
  void *probabilities, *score_gradients;
  const int *query_offsets, *row_offsets;
  const int64_t *places;
  const Tile *tiles; // of queries; for the gradients to rows, of rows
  const AbsorbedTerm *terms; // of the gradients to rows
  int term_count;
  int width;
  int aligned; // whether rows can be read 16 bytes at a time
};

// One example.
struct Absorbing {
  int first_query, queries, first_row, rows, leading;
  int64_t place;

  __device__ Absorbing(const AbsorbedParams &p, int example)
      : first_query(p.query_offsets[example]), queries(p.query_offsets[example + 1] - first_query), first_row(p.row_offsets[example]),
        rows(p.row_offsets[example + 1] - first_row), leading((rows + 7) / 8 * 8), place(p.places[example]) {}

  template <typename T> __device__ T *scores_of(void *all, int query) const {
    return static_cast<T *>(all) + place + static_cast<int64_t>(query) * leading;
  }
};

template <typename T> constexpr int SIDE = Tiles<T>::ROWS;
template <typename T> constexpr int SQUARE = SIDE<T> * LEADING<T, SIDE<T>>;

// The scores of a tile of queries and one of rows; with `left` the gradients, those to the probabilities.
template <typename T> __device__ inline void absorbed_scores(const AbsorbedParams &p, const void *left) {
  constexpr int LD = LEADING<T, SIDE<T>>;
  SHARED_MEMORY(memory);
  T *const stages = reinterpret_cast<T *>(memory);
  const Tile tile = p.tiles[blockIdx.x];
  const Absorbing e(p, tile.example);
  const int first_row = static_cast<int>(blockIdx.y) * SIDE<T>, queries = e.queries - tile.first, rows = e.rows - first_row;
  if (rows <= 0) return;
  const T *const a = static_cast<const T *>(left) + static_cast<int64_t>(e.first_query + tile.first) * p.width;
  const T *const b = static_cast<const T *>(p.rows) + static_cast<int64_t>(e.first_row + first_row) * p.width;
  float sums[SIDE<T> / 8][4];
  clear(sums);
  const auto copy = [&](int first, int stage) {
    T *const to = stages + 2 * stage * SQUARE<T>;
    copy_tile<T, SIDE<T>>(to, a + first, queries, p.width, p.width - first, p.aligned);
    copy_tile<T, SIDE<T>>(to + SQUARE<T>, b + first, rows, p.width, p.width - first, p.aligned);
  };
  each_tile<T, 2>(0, p.width, copy, [&](int, int stage) {
    const T *const tiles = stages + 2 * stage * SQUARE<T>;
    multiply_rows<SIDE<T>, SIDE<T>>(sums, tiles + 16 * warp() * LD, LD, tiles + SQUARE<T>, LD);
  });
  store_rows(sums, e.scores_of<float>(p.scores, tile.first) + first_row, e.leading, queries, rows, [](int) { return 1.0f; });
}

// What the queries of a tile get, a tile of its columns: the rows' sum with the weights, the probabilities or the gradients to scores.
template <typename T> __device__ inline void absorbed_output(const AbsorbedParams &p, void *weights) {
  constexpr int LD = LEADING<T, SIDE<T>>;
  SHARED_MEMORY(memory);
  T *const stages = reinterpret_cast<T *>(memory);
  const Tile tile = p.tiles[blockIdx.x];
  const Absorbing e(p, tile.example);
  const int column = static_cast<int>(blockIdx.y) * SIDE<T>, queries = e.queries - tile.first, columns = p.width - column;
  const T *const a = e.scores_of<T>(weights, tile.first);
  const T *const b = static_cast<const T *>(p.rows) + static_cast<int64_t>(e.first_row) * p.width + column;
  float sums[SIDE<T> / 8][4];
  clear(sums);
  const auto copy = [&](int first, int stage) {
    T *const to = stages + 2 * stage * SQUARE<T>;
    copy_tile<T, SIDE<T>>(to, a + first, queries, e.leading, e.leading - first, true);
    copy_tile<T, SIDE<T>>(to + SQUARE<T>, b + static_cast<int64_t>(first) * p.width, e.rows - first, p.width, columns, p.aligned);
  };
  each_tile<T, 2>(0, e.rows, copy, [&](int, int stage) {
    const T *const left = stages + 2 * stage * SQUARE<T>;
    multiply_columns<SIDE<T>, SIDE<T>>(sums, left + 16 * warp() * LD, LD, left + SQUARE<T>, LD);
  });
  T *const out = static_cast<T *>(p.out) + static_cast<int64_t>(e.first_query + tile.first) * p.width + column;
  store_rows(sums, out, p.width, queries, columns, [](int) { return 1.0f; });
}

// Loads the lane's sums from rows, 0 for what is not there; two at once where that is aligned.
template <int N> __device__ inline void load_rows_of(float (&sums)[N][4], const float *from, int width, int rows, int columns) {
  const bool paired = width % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 8 == 0;
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = 16 * warp() + row_of(half), there = columns - column_of(8 * n);
      const float *const place = from + static_cast<int64_t>(row) * width + column_of(8 * n);
      Several<float, 2> two{{0.0f, 0.0f}};
      if (row < rows && paired && there > 1) {
        two = load<2>(place);
      } else if (row < rows) {
        if (there > 0) two.values[0] = place[0];
        if (there > 1) two.values[1] = place[1];
      }
      sums[n][2 * half] = two.values[0], sums[n][2 * half + 1] = two.values[1];
    }
  }
}

// The gradient to a tile of rows, a tile of its columns: to the sum are added the terms of some layers, P^T dY and dS^T Q of each. The
// chain of additions goes through all layers, so that numbers do not depend on how many of them are added at once.
template <typename T> __device__ inline void absorbed_row_gradients(const AbsorbedParams &p) {
  constexpr int LD = LEADING<T, SIDE<T>>;
  SHARED_MEMORY(memory);
  T *const stages = reinterpret_cast<T *>(memory);
  const Tile tile = p.tiles[blockIdx.x];
  const Absorbing e(p, tile.example);
  const int column = static_cast<int>(blockIdx.y) * SIDE<T>, rows = e.rows - tile.first, columns = p.width - column;
  const int64_t own = static_cast<int64_t>(e.first_row + tile.first) * p.width + column;
  float sums[SIDE<T> / 8][4];
  clear(sums);
  if (p.sum != nullptr) load_rows_of(sums, p.sum + own, p.width, rows, columns);
  // Tiles of one term after those of another.
  const int of_term = (e.queries + SIDE<T> - 1) / SIDE<T> * SIDE<T>;
  const auto copy = [&](int place, int stage) {
    const AbsorbedTerm term = p.terms[place / of_term];
    const int first = place % of_term, queries = e.queries - first;
    const T *const a = e.scores_of<T>(term.weights, first) + tile.first;
    const T *const b = static_cast<const T *>(term.of_queries) + static_cast<int64_t>(e.first_query + first) * p.width + column;
    T *const to = stages + 2 * stage * SQUARE<T>;
    copy_tile<T, SIDE<T>>(to, a, queries, e.leading, e.leading - tile.first, true);
    copy_tile<T, SIDE<T>>(to + SQUARE<T>, b, queries, p.width, columns, p.aligned);
  };
  each_tile<T, 2>(0, p.term_count * of_term, copy, [&](int, int stage) {
    const T *const left = stages + 2 * stage * SQUARE<T>;
    multiply_turned<SIDE<T>, SIDE<T>>(sums, left + 16 * warp(), LD, left + SQUARE<T>, LD);
  });
  store_rows(sums, p.row_gradients + own, p.width, rows, columns, [](int) { return 1.0f; });
}

constexpr int SOFTMAX_THREADS = 128;

// Calls `f(scores, probabilities, example, query)` for a few queries of a tile, a warp a query.
template <typename T, typename F> __device__ inline void each_query(const AbsorbedParams &p, F f) {
  const Tile tile = p.tiles[blockIdx.x];
  const Absorbing e(p, tile.example);
  const int query = tile.first + static_cast<int>(blockIdx.y) * (SOFTMAX_THREADS / 32) + warp();
  if (query < e.queries) f(e.scores_of<float>(p.scores, query), e.scores_of<T>(p.probabilities, query), e, query);
}

// Probabilities of the scores, and zeros behind a row's end.
template <typename T> __device__ inline void absorbed_softmax(const AbsorbedParams &p) {
  each_query<T>(p, [&](const float *scores, T *probabilities, const Absorbing &e, int) {
    float top = -INFINITY, total = 0.0f;
    for (int i = lane(); i < e.rows; i += 32) top = larger(top, scores[i]);
    top = warp_max(top);
    for (int i = lane(); i < e.rows; i += 32) total += power_of_2((scores[i] - top) * LOG2_E);
    const float inverse = 1.0f / warp_sum(total);
    for (int i = lane(); i < e.leading; i += 32)
      probabilities[i] = narrow<T>(i < e.rows ? power_of_2((scores[i] - top) * LOG2_E) * inverse : 0.0f);
  });
}

// dS = P (dP - the row sum of P dP), where the scores are dP.
template <typename T> __device__ inline void absorbed_score_gradients(const AbsorbedParams &p) {
  each_query<T>(p, [&](const float *gradients, const T *probabilities, const Absorbing &e, int query) {
    float delta = 0.0f;
    for (int i = lane(); i < e.rows; i += 32) delta += widen(probabilities[i]) * gradients[i];
    delta = warp_sum(delta);
    T *const out = e.scores_of<T>(p.score_gradients, query);
    for (int i = lane(); i < e.leading; i += 32)
      out[i] = narrow<T>(i < e.rows ? widen(probabilities[i]) * (gradients[i] - delta) : 0.0f);
  });
}

#define ABSORBED_KERNELS(T)                                                                                                          \
  KERNEL(absorbed_scores_##T, AbsorbedParams, TILE_THREADS<T>) { absorbed_scores<T>(p, p.queries); }                                 \
  KERNEL(absorbed_probability_gradients_##T, AbsorbedParams, TILE_THREADS<T>) { absorbed_scores<T>(p, p.gradients); }                \
  KERNEL(absorbed_softmax_##T, AbsorbedParams, SOFTMAX_THREADS) { absorbed_softmax<T>(p); }                                          \
  KERNEL(absorbed_score_gradients_##T, AbsorbedParams, SOFTMAX_THREADS) { absorbed_score_gradients<T>(p); }                          \
  KERNEL(absorbed_output_##T, AbsorbedParams, TILE_THREADS<T>) { absorbed_output<T>(p, p.probabilities); }                           \
  KERNEL(absorbed_query_gradients_##T, AbsorbedParams, TILE_THREADS<T>) { absorbed_output<T>(p, p.score_gradients); }                \
  KERNEL(absorbed_row_gradients_##T, AbsorbedParams, TILE_THREADS<T>) { absorbed_row_gradients<T>(p); }

ABSORBED_KERNELS(bf16)
ABSORBED_KERNELS(f32)
