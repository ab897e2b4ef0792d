// RMSNorm, a block a row: `y = x r w` with `r = 1 / sqrt(mean(x^2) + epsilon)`, and the gradient
// `dx = r g - x r^3 mean(g x) + residual` with `g = dy w`, and the same rounded; and the gradient to the weight, the sum of `dy x r` over the rows.
#pragma once
#include "common.cuh"

struct NormParams {
  const float *x, *weight, *dy, *residual; // the last one may be null
  const float *scales;                     // `r` of each row
  void *out;
  bf16 *rounded; // of the gradient; null for none
  int rows, width;
  float epsilon;
  int aligned; // whether four numbers can be read and written at once
};

constexpr int NORM_THREADS = 256;

// Calls `f(i)` for the thread's columns `i ... i + SIZE - 1`.
template <int SIZE, typename F> __device__ inline void each_column(const NormParams &p, F f) {
  for (int i = static_cast<int>(threadIdx.x) * SIZE; i < p.width; i += static_cast<int>(blockDim.x) * SIZE) f(i);
}

__device__ inline float inverse_rms(const NormParams &p, float squares, float *scratch) {
  return 1.0f / sqrtf(block_sum(squares, scratch) / static_cast<float>(p.width) + p.epsilon);
}
template <int SIZE> __device__ inline float inverse_rms(const NormParams &p, const float *row, float *scratch) {
  float squares = 0.0f;
  each_column<SIZE>(p, [&](int i) {
    const auto x = load<SIZE>(row + i);
    for (int j = 0; j < SIZE; j++) squares += x.values[j] * x.values[j];
  });
  return inverse_rms(p, squares, scratch);
}

template <typename O, int SIZE> __device__ inline void rms_norm(const NormParams &p, float *scratch) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * p.width;
  const float r = inverse_rms<SIZE>(p, p.x + place, scratch);
  each_column<SIZE>(p, [&](int i) {
    const auto x = load<SIZE>(p.x + place + i), weight = load<SIZE>(p.weight + i);
    Several<O, SIZE> y;
    for (int j = 0; j < SIZE; j++) y.values[j] = narrow<O>(x.values[j] * r * weight.values[j]);
    store(static_cast<O *>(p.out) + place + i, y);
  });
}

template <int SIZE> __device__ inline void rms_norm_gradient_row(const NormParams &p, float *scratch) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * p.width;
  float squares = 0.0f, inner = 0.0f;
  each_column<SIZE>(p, [&](int i) {
    const auto x = load<SIZE>(p.x + place + i), dy = load<SIZE>(p.dy + place + i), weight = load<SIZE>(p.weight + i);
    for (int j = 0; j < SIZE; j++) {
      squares += x.values[j] * x.values[j];
      inner += dy.values[j] * weight.values[j] * x.values[j];
    }
  });
  const float r = inverse_rms(p, squares, scratch);
  const float c = r * r * r * (block_sum(inner, scratch) / static_cast<float>(p.width));
  each_column<SIZE>(p, [&](int i) {
    const auto x = load<SIZE>(p.x + place + i), dy = load<SIZE>(p.dy + place + i), weight = load<SIZE>(p.weight + i);
    Several<float, SIZE> dx;
    if (p.residual != nullptr) dx = load<SIZE>(p.residual + place + i);
    for (int j = 0; j < SIZE; j++) {
      const float g = r * (dy.values[j] * weight.values[j]) - x.values[j] * c;
      dx.values[j] = p.residual == nullptr ? g : g + dx.values[j];
    }
    store(static_cast<float *>(p.out) + place + i, dx);
    if (p.rounded == nullptr) return;
    Several<bf16, SIZE> rounded;
    for (int j = 0; j < SIZE; j++) rounded.values[j] = narrow<bf16>(dx.values[j]);
    store(p.rounded + place + i, rounded);
  });
}

template <typename O> __device__ inline void rms_norm(const NormParams &p) {
  __shared__ float scratch[32];
  if (p.aligned) rms_norm<O, 4>(p, scratch);
  else rms_norm<O, 1>(p, scratch);
}
KERNEL(rms_norm_bf16, NormParams, NORM_THREADS) { rms_norm<bf16>(p); }
KERNEL(rms_norm_f32, NormParams, NORM_THREADS) { rms_norm<float>(p); }

KERNEL(rms_norm_gradient, NormParams, NORM_THREADS) {
  __shared__ float scratch[32];
  if (p.aligned) rms_norm_gradient_row<4>(p, scratch);
  else rms_norm_gradient_row<1>(p, scratch);
}

KERNEL(rms_norm_scales, NormParams, NORM_THREADS) {
  __shared__ float scratch[32];
  const float r = inverse_rms<1>(p, p.x + static_cast<int64_t>(blockIdx.x) * p.width, scratch);
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
