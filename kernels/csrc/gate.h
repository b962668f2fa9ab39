// The step between the two matmuls of a gated MLP: act(gate) * up, compiled per instruction set.
#pragma once

#include "lanes.h"
#include "quant.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

inline Lanes reciprocal(Lanes x) {
#if defined(__AVX512F__)
  const __m512 rough = _mm512_rcp14_ps((__m512)x);  // accurate to 2^-14; then one step of Newton's method
  return (Lanes)_mm512_mul_ps(rough, _mm512_fnmadd_ps((__m512)x, rough, _mm512_set1_ps(2.0f)));
#else
  return 1.0f / x;
#endif
}

// act(gate) * up, with a relative error of at most 2^-17. Both activations are the gate times a sigmoid. For silu that
// is sigmoid(gate); for gelu (Hendrycks and Gimpel, 2016), as tanh(x) = 2 sigmoid(2 x) - 1, the sigmoid of twice the
// argument of its tanh.
inline Lanes gated(Activation activation, Lanes gate, Lanes up) {
  constexpr float kTwice = 1.59576912f;  // 2 sqrt(2 / pi)
  const Lanes x = activation == Activation::silu ? gate : (gate * gate * 0.044715f + 1.0f) * gate * kTwice;
  const Lanes power = x * -kLog2E, sigmoid = reciprocal(rough_exp2(power) + 1.0f);
  return gate * up * (power < 126.0f ? sigmoid : all(0.0f));  // rough_exp2 is not valid beyond, nor for a NaN
}

// act(gate) * up of rows [first, last): gate and up side by side, [m, 2 width] -> y [m, width].
[[maybe_unused]] void gate_rows(Activation activation, const bf16* both, std::int64_t width, bf16* y, std::int64_t first,
                                std::int64_t last) {
  for (std::int64_t row = first; row < last; ++row) {
    const brain* gate = reinterpret_cast<const brain*>(both + row * 2 * width);
    brain* to = reinterpret_cast<brain*>(y + row * width);
    std::int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(gated(activation, load(gate + i), load(gate + width + i)), to + i);
    if (i < width) {
      store(gated(activation, load(gate + i, width - i), load(gate + width + i, width - i)), to + i, width - i);
    }
  }
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
