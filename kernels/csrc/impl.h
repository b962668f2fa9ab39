// The loops, written once and compiled per instruction set, each in its own namespace (YOKE_ISA). The compiler
// vectorizes them for the flags of the file. No standard library function may be instantiated here: the linker
// would keep only one copy, of whichever instruction set comes first.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float x, float* to) { *to = x; }

// Rounds to nearest, ties to even; a NaN stays a NaN.
inline void store(float x, bf16* to) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *to = static_cast<bf16>(x != x ? 0x7fc0 : rounded);
}

template <typename T>
float dot(const T* a, const T* b, std::int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < size; ++i) sum += to_float(a[i]) * to_float(b[i]);
  return sum;
}

void linear(const LinearArgs& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t n = first; n < last; ++n) {
    const float bias = a.bias == nullptr ? 0.0f : to_float(a.bias[n]);
    for (std::int64_t m = 0; m < a.m; ++m) store(dot(a.x + m * a.k, a.w + n * a.k, a.k) + bias, a.y + m * a.n + n);
  }
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
