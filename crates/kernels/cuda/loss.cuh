// Softmax and cross-entropy over the columns of a vocabulary that are here, a block a row.
#pragma once
#include "common.cuh"

struct LossParams {
  const float *logits; // [rows, columns]
  const int *targets;  // the target's column, or -1 where it is not here
  float *top, *total, *target;
  const float *normalisers, *scale;
  void *out; // [rows, columns]
  int columns;
  float z_loss;
};

constexpr int LOSS_THREADS = 512;

KERNEL(softmax, LossParams, LOSS_THREADS) {
  __shared__ float scratch[32];
  const int row = static_cast<int>(blockIdx.x);
  const float *const x = p.logits + static_cast<int64_t>(row) * p.columns;
  float top = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < p.columns; i += static_cast<int>(blockDim.x)) top = x[i] > top ? x[i] : top;
  top = block_max(top, scratch);
  float total = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < p.columns; i += static_cast<int>(blockDim.x)) total += expf(x[i] - top);
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) {
    p.top[row] = top;
    p.total[row] = total;
    p.target[row] = p.targets[row] < 0 ? 0.0f : x[p.targets[row]];
  }
}

struct BestParams {
  const float *logits; // [rows, columns]
  float *out;          // [rows, 2]: the column of the first of the largest, and its log-probability
  int columns;
};

KERNEL(best, BestParams, LOSS_THREADS) {
  __shared__ float scratch[32];
  const float *const x = p.logits + static_cast<int64_t>(blockIdx.x) * p.columns;
  const auto each = [&](auto f) {
    for (int i = static_cast<int>(threadIdx.x); i < p.columns; i += static_cast<int>(blockDim.x)) f(i);
  };
  const auto lower = [](float a, float b) { return a < b ? a : b; };
  float top = -INFINITY, total = 0.0f, column = INFINITY; // f32 counts to 2^24
  each([&](int i) { top = x[i] > top ? x[i] : top; });
  top = block_max(top, scratch);
  each([&](int i) {
    total += expf(x[i] - top);
    if (x[i] == top) column = lower(column, static_cast<float>(i));
  });
  total = block_sum(total, scratch);
  column = block_reduce(column, scratch, INFINITY, lower);
  if (threadIdx.x == 0) {
    p.out[2 * blockIdx.x] = column < INFINITY ? column : 0.0f; // of numbers that are none, the first
    p.out[2 * blockIdx.x + 1] = -logf(total);
  }
}

// d lse / dx = p = exp(x - lse);  d(lse - x_target + z lse^2) / dx = (1 + 2 z lse) p - [target].
template <typename O> __device__ inline void cross_entropy_gradient(const LossParams &p) {
  const int row = static_cast<int>(blockIdx.x);
  const int64_t place = static_cast<int64_t>(row) * p.columns;
  const float *const x = p.logits + place;
  O *const out = static_cast<O *>(p.out) + place;
  const float lse = p.normalisers[row], scale = p.scale[row];
  const float weight = scale * (1.0f + 2.0f * p.z_loss * lse);
  for (int i = static_cast<int>(threadIdx.x); i < p.columns; i += static_cast<int>(blockDim.x)) {
    const float g = weight * expf(x[i] - lse);
    out[i] = narrow<O>(i == p.targets[row] ? g - scale : g);
  }
}
KERNEL(cross_entropy_gradient_bf16, LossParams, LOSS_THREADS) { cross_entropy_gradient<bf16>(p); }
KERNEL(cross_entropy_gradient_f32, LossParams, LOSS_THREADS) { cross_entropy_gradient<float>(p); }
