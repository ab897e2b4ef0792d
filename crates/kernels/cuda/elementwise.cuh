// Number by number: rounding, sums, activations. 16 bytes at a time where the operands are aligned.
#pragma once
#include "common.cuh"

struct ElementwiseParams {
  Rows a, b, c, out, second;
  int64_t rows, columns; // one row where no rows lie apart
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

// Calls `f(row, column)` for every N numbers of a row's columns `begin ...` before `end`, whose count N divides.
template <int N, typename F> __device__ inline void each_pack(int64_t rows, int64_t begin, int64_t end, F f) {
  const int64_t packs = (end - begin) / N, threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  if (packs == 0) return;
  // From one pack of the thread's to the next it is so many rows and packs; one row needs no division.
  int64_t row = 0, pack = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, rows_on = 0, packs_on = threads;
  if (rows > 1) {
    row = pack / packs, pack %= packs;
    rows_on = threads / packs, packs_on = threads % packs;
  }
  while (row < rows && pack < packs) {
    f(row, begin + pack * N);
    row += rows_on, pack += packs_on;
    if (rows > 1 && pack >= packs) row++, pack -= packs;
  }
}

// Writes `f(a, b, c)` for every number; `IN` operands are read and `OUT` results written.
template <typename A, typename O, int IN, int OUT, typename F> __device__ inline void each(const ElementwiseParams &p, F f) {
  // As many numbers as the wider of the two types has in 16 bytes.
  constexpr int SIZE = sizeof(A) > sizeof(O) ? Pack<A>::SIZE : Pack<O>::SIZE;
  const auto aligned = [&](const Rows &rows) { return is_aligned(rows.first) && (p.rows == 1 || rows.stride % SIZE == 0); };
  const bool packed = aligned(p.a) && (IN < 2 || aligned(p.b)) && (IN < 3 || aligned(p.c)) && aligned(p.out) && (OUT < 2 || aligned(p.second));
  const int64_t in_packs = packed ? p.columns / SIZE * SIZE : 0;
  each_pack<SIZE>(p.rows, 0, in_packs, [&](int64_t row, int64_t i) {
    Several<A, SIZE> x = load<SIZE>(p.a.row<const A>(row) + i), y = x, z = x;
    if constexpr (IN > 1) y = load<SIZE>(p.b.row<const A>(row) + i);
    if constexpr (IN > 2) z = load<SIZE>(p.c.row<const A>(row) + i);
    Several<O, SIZE> r, s;
#pragma unroll
    for (int j = 0; j < SIZE; j++) {
      const Results result = f(widen(x.values[j]), widen(y.values[j]), widen(z.values[j]));
      r.values[j] = narrow<O>(result.first);
      if constexpr (OUT > 1) s.values[j] = narrow<O>(result.second);
    }
    store(p.out.row<O>(row) + i, r);
    if constexpr (OUT > 1) store(p.second.row<O>(row) + i, s);
  });
  each_pack<1>(p.rows, in_packs, p.columns, [&](int64_t row, int64_t i) {
    const float a = widen(p.a.row<const A>(row)[i]);
    float b = 0.0f, c = 0.0f;
    if constexpr (IN > 1) b = widen(p.b.row<const A>(row)[i]);
    if constexpr (IN > 2) c = widen(p.c.row<const A>(row)[i]);
    const Results result = f(a, b, c);
    p.out.row<O>(row)[i] = narrow<O>(result.first);
    if constexpr (OUT > 1) p.second.row<O>(row)[i] = narrow<O>(result.second);
  });
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
