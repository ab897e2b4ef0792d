// Whole rows: embeddings, dropout, and the exact sums of prompt gradients.
#pragma once
#include "common.cuh"

struct EmbedParams {
  const void *table;    // [n, width]
  const float *prompts; // all prompts' rows, one after the other
  const int *rows;      // a row each: of the table from 0 on, of the prompts -1, -2, ..., or nothing
  float *out;           // [rows, width]
  int64_t stride;       // from row to row of the table
  int width;
};

constexpr int NO_ROW = INT32_MIN;
constexpr int ROW_THREADS = 256;

template <typename T> __device__ inline void embed(const EmbedParams &p) {
  const int row = p.rows[blockIdx.x];
  float *const out = p.out + static_cast<int64_t>(blockIdx.x) * p.width;
  for (int i = static_cast<int>(threadIdx.x); i < p.width; i += static_cast<int>(blockDim.x)) {
    if (row >= 0) {
      out[i] = widen(static_cast<const T *>(p.table)[row * p.stride + i]);
    } else {
      out[i] = row == NO_ROW ? 0.0f : p.prompts[static_cast<int64_t>(-1 - row) * p.width + i];
    }
  }
}
KERNEL(embed_bf16, EmbedParams, ROW_THREADS) { embed<bf16>(p); }
KERNEL(embed_f32, EmbedParams, ROW_THREADS) { embed<float>(p); }

struct EmbedGradientParams {
  const float *dx; // [tokens, width]
  const uint32_t *ends, *order; // the tokens of row `r`: order[ends[r]] to order[ends[r + 1] - 1]
  float *out; // [rows, width]
  int width;
};
// A block sums a row of the table in the order of the tokens.
KERNEL(embed_gradient, EmbedGradientParams, ROW_THREADS) {
  const uint32_t first = p.ends[blockIdx.x], end = p.ends[blockIdx.x + 1];
  for (int column = static_cast<int>(threadIdx.x); column < p.width; column += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (uint32_t i = first; i < end; i++) sum += p.dx[static_cast<int64_t>(p.order[i]) * p.width + column];
    p.out[static_cast<int64_t>(blockIdx.x) * p.width + column] = sum;
  }
}

struct DropoutParams {
  const void *x;
  void *out;
  const int *offsets;  // [examples + 1]: first row of each example
  const Random *random; // one an example
  Dropping dropping;
  int examples, width;
  int first, total; // the first column that is here, and columns in all
};

// The example to whom a row belongs: the last one that does not begin behind it.
__device__ inline int example_of(const int *offsets, int examples, int row) {
  int low = 0, high = examples;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (offsets[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}

template <typename T> __device__ inline void dropout(const DropoutParams &p) {
  const int row = static_cast<int>(blockIdx.x);
  const int example = example_of(p.offsets, p.examples, row);
  const int64_t place = static_cast<int64_t>(row) * p.width;
  const T *const x = static_cast<const T *>(p.x) + place;
  T *const out = static_cast<T *>(p.out) + place;
  const Random random = p.random[example];
  const uint64_t blocks = static_cast<uint64_t>(p.total + 7) / 8;
  const uint64_t first_block = static_cast<uint64_t>(row - p.offsets[example]) * blocks;
  // A thread takes the numbers of one block of random words.
  const int end = p.first + p.width;
  for (int block = p.first / 8 + static_cast<int>(threadIdx.x); block * 8 < end; block += static_cast<int>(blockDim.x)) {
    const uint32_t kept = kept_of(p.dropping, random_block(random, first_block + static_cast<uint64_t>(block)));
    for (int i = 0; i < 8; i++) {
      const int column = block * 8 + i - p.first;
      if (column >= 0 && column < p.width) out[column] = narrow<T>(widen(x[column]) * factor(p.dropping, kept, i));
    }
  }
}
KERNEL(dropout_bf16, DropoutParams, ROW_THREADS) { dropout<bf16>(p); }
KERNEL(dropout_f32, DropoutParams, ROW_THREADS) { dropout<float>(p); }

struct LargestParams {
  const float *x;
  unsigned *largest; // bits of the largest absolute value; 0 before
  int64_t count;
};
// The bits of absolute values are in the order of the values, infinite ones and NaN above all.
KERNEL(largest_bits, LargestParams, ROW_THREADS) {
  uint32_t mine = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += stride) {
    const uint32_t bits = bits_of(p.x[i]) & 0x7fffffffu;
    mine = bits > mine ? bits : mine;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = from_lane_xor(mine, mask);
    mine = other > mine ? other : mine;
  }
  if (lane() == 0) atomicMax(p.largest, mine);
}

struct SumParams {
  const float *x;
  long long *sum;
  float *values;
  int64_t count;
  double scale;
};
// sum += x * scale, rounded to the nearest integer, halves to the even one.
KERNEL(quantize_add, SumParams, ROW_THREADS) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += stride)
    p.sum[i] += nearest(static_cast<double>(p.x[i]) * p.scale);
}
KERNEL(dequantize, SumParams, ROW_THREADS) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += stride)
    p.values[i] = static_cast<float>(static_cast<double>(p.sum[i]) * p.scale);
}
