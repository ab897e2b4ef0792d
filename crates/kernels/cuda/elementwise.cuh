// Number by number: rounding, sums, activations. 16 bytes at a time where the operands are aligned.
#pragma once
#include "common.cuh"

struct ElementwiseParams {
  const void *a, *b, *c;
  void *out, *second;
  int64_t count;
};

enum class Activation { Relu, GeluNew, Silu };

struct ValueAndSlope {
  float value, slope;
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <Activation ACT> __device__ inline ValueAndSlope activation(float x) {
  if constexpr (ACT == Activation::Relu) {
    return x <= 0.0f ? ValueAndSlope{0.0f, 0.0f} : ValueAndSlope{x, 1.0f}; // NaN goes through
  } else if constexpr (ACT == Activation::GeluNew) {
    constexpr float TWICE_SQRT_2_OVER_PI = 1.595769f, CUBIC = 0.044715f;
    const float s = sigmoid(TWICE_SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
    return {x * s, s + x * s * (1.0f - s) * (TWICE_SQRT_2_OVER_PI * (1.0f + 3.0f * CUBIC * x * x))};
  } else {
    const float s = sigmoid(x);
    return {x * s, s + x * s * (1.0f - s)};
  }
}

struct Results {
  float first, second;
};

// Calls `f(a, b, c)` for every number; `IN` operands are read and `OUT` results written.
template <typename A, typename O, int IN, int OUT, typename F> __device__ inline void each(const ElementwiseParams &p, F f) {
  const A *const a = static_cast<const A *>(p.a), *const b = static_cast<const A *>(p.b), *const c = static_cast<const A *>(p.c);
  O *const out = static_cast<O *>(p.out), *const second = static_cast<O *>(p.second);
  // As many numbers as the wider of the two types has in 16 bytes.
  constexpr int SIZE = sizeof(A) > sizeof(O) ? Pack<A>::SIZE : Pack<O>::SIZE;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool aligned = is_aligned(a) && (IN < 2 || is_aligned(b)) && (IN < 3 || is_aligned(c)) && is_aligned(out) &&
                       (OUT < 2 || is_aligned(second));
  const int64_t packs = aligned ? p.count / SIZE : 0;
  for (int64_t pack = first; pack < packs; pack += stride) {
    Several<A, SIZE> x = load<SIZE>(a + pack * SIZE), y = x, z = x;
    if constexpr (IN > 1) y = load<SIZE>(b + pack * SIZE);
    if constexpr (IN > 2) z = load<SIZE>(c + pack * SIZE);
    Several<O, SIZE> r, s;
#pragma unroll
    for (int i = 0; i < SIZE; i++) {
      const Results result = f(widen(x.values[i]), widen(y.values[i]), widen(z.values[i]));
      r.values[i] = narrow<O>(result.first);
      if constexpr (OUT > 1) s.values[i] = narrow<O>(result.second);
    }
    store(out + pack * SIZE, r);
    if constexpr (OUT > 1) store(second + pack * SIZE, s);
  }
  for (int64_t i = packs * SIZE + first; i < p.count; i += stride) {
    const Results result = f(widen(a[i]), IN > 1 ? widen(b[i]) : 0.0f, IN > 2 ? widen(c[i]) : 0.0f);
    out[i] = narrow<O>(result.first);
    if constexpr (OUT > 1) second[i] = narrow<O>(result.second);
  }
}

constexpr int ELEMENTWISE_THREADS = 256;

KERNEL(round_bf16, ElementwiseParams, ELEMENTWISE_THREADS) {
  each<float, bf16, 1, 1>(p, [](float a, float, float) { return Results{a, 0.0f}; });
}
KERNEL(add_f32, ElementwiseParams, ELEMENTWISE_THREADS) {
  each<float, float, 2, 1>(p, [](float a, float b, float) { return Results{a + b, 0.0f}; });
}

#define ACTIVATION_KERNELS(ACT, act, T)                                                                                              \
  KERNEL(activate_##act##_##T, ElementwiseParams, ELEMENTWISE_THREADS) {                                                             \
    each<T, T, 1, 1>(p, [](float x, float, float) { return Results{activation<ACT>(x).value, 0.0f}; });                              \
  }                                                                                                                                  \
  KERNEL(activate_gradient_##act##_##T, ElementwiseParams, ELEMENTWISE_THREADS) {                                                    \
    each<T, T, 2, 1>(p, [](float x, float dy, float) { return Results{dy * activation<ACT>(x).slope, 0.0f}; });                      \
  }                                                                                                                                  \
  KERNEL(gated_##act##_##T, ElementwiseParams, ELEMENTWISE_THREADS) {                                                                \
    each<T, T, 2, 1>(p, [](float gate, float up, float) { return Results{activation<ACT>(gate).value * up, 0.0f}; });                \
  }                                                                                                                                  \
  KERNEL(gated_gradient_##act##_##T, ElementwiseParams, ELEMENTWISE_THREADS) {                                                       \
    each<T, T, 3, 2>(p, [](float gate, float up, float dy) {                                                                         \
      const ValueAndSlope f = activation<ACT>(gate);                                                                                 \
      return Results{dy * up * f.slope, dy * f.value};                                                                               \
    });                                                                                                                              \
  }

ACTIVATION_KERNELS(Activation::Relu, relu, bf16)
ACTIVATION_KERNELS(Activation::Relu, relu, f32)
ACTIVATION_KERNELS(Activation::GeluNew, gelu_new, bf16)
ACTIVATION_KERNELS(Activation::GeluNew, gelu_new, f32)
ACTIVATION_KERNELS(Activation::Silu, silu, bf16)
ACTIVATION_KERNELS(Activation::Silu, silu, f32)
