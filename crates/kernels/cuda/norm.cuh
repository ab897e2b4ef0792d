// RMSNorm, a block a row: `y = x r w` with `r = 1 / sqrt(mean(x^2) + epsilon)`, and the gradient
// `dx = r g - x r^3 mean(g x) + residual` with `g = dy w`; and the gradient to the weight, the sum of `dy x r` over the rows.
#pragma once
#include "common.cuh"

struct NormParams {
  const float *x, *weight, *dy, *residual; // the last one may be null
  const float *scales;                     // `r` of each row
  void *out;
  int rows, width;
  float epsilon;
};

constexpr int NORM_THREADS = 256;

template <typename F> __device__ inline void each_column(const NormParams &p, F f) {
  for (int i = static_cast<int>(threadIdx.x); i < p.width; i += static_cast<int>(blockDim.x)) f(i);
}

__device__ inline float inverse_rms(const NormParams &p, const float *x, float *scratch) {
  float squares = 0.0f;
  each_column(p, [&](int i) { squares += x[i] * x[i]; });
  return 1.0f / sqrtf(block_sum(squares, scratch) / static_cast<float>(p.width) + p.epsilon);
}

template <typename O> __device__ inline void rms_norm(const NormParams &p) {
  __shared__ float scratch[32];
  const int64_t place = static_cast<int64_t>(blockIdx.x) * p.width;
  const float *const x = p.x + place;
  O *const out = static_cast<O *>(p.out) + place;
  const float r = inverse_rms(p, x, scratch);
  each_column(p, [&](int i) { out[i] = narrow<O>(x[i] * r * p.weight[i]); });
}

KERNEL(rms_norm_bf16, NormParams, NORM_THREADS) { rms_norm<bf16>(p); }
KERNEL(rms_norm_f32, NormParams, NORM_THREADS) { rms_norm<float>(p); }

KERNEL(rms_norm_gradient, NormParams, NORM_THREADS) {
  __shared__ float scratch[32];
  const int64_t place = static_cast<int64_t>(blockIdx.x) * p.width;
  const float *const x = p.x + place, *const dy = p.dy + place;
  const float *const residual = p.residual == nullptr ? nullptr : p.residual + place;
  float *const out = static_cast<float *>(p.out) + place;
  const float r = inverse_rms(p, x, scratch);
  float inner = 0.0f;
  each_column(p, [&](int i) { inner += dy[i] * p.weight[i] * x[i]; });
  const float c = r * r * r * (block_sum(inner, scratch) / static_cast<float>(p.width));
  each_column(p, [&](int i) {
    const float g = r * (dy[i] * p.weight[i]) - x[i] * c;
    out[i] = residual == nullptr ? g : g + residual[i];
  });
}

KERNEL(rms_norm_scales, NormParams, NORM_THREADS) {
  __shared__ float scratch[32];
  const float r = inverse_rms(p, p.x + static_cast<int64_t>(blockIdx.x) * p.width, scratch);
  if (threadIdx.x == 0) static_cast<float *>(p.out)[blockIdx.x] = r;
}

constexpr int COLUMN_THREADS = 512;

// A block has 32 columns, a lane one of them, and a warp every 16th row; then the first warp adds up what the warps have.
KERNEL(rms_norm_weight_gradient, NormParams, COLUMN_THREADS) {
  constexpr int WARPS = COLUMN_THREADS / 32;
  __shared__ float sums[WARPS][32];
  const int column = static_cast<int>(blockIdx.x) * 32 + lane();
  float sum = 0.0f;
  for (int row = warp(); row < p.rows && column < p.width; row += WARPS) {
    const int64_t place = static_cast<int64_t>(row) * p.width + column;
    sum += p.dy[place] * (p.x[place] * p.scales[row]);
  }
  sums[warp()][lane()] = sum;
  __syncthreads();
  if (warp() != 0 || column >= p.width) return;
  float total = 0.0f;
  for (int of = 0; of < WARPS; of++) total += sums[of][lane()];
  static_cast<float *>(p.out)[column] = total;
}
