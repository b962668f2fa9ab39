// The loops, written once and compiled per instruction set, each in a namespace of its own (YOKE_ISA): the
// compiler vectorises them for the flags of the file. No function of the standard library is instantiated
// here, or the linker would keep the copy of whichever instruction set came first.
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

// To the nearest, ties to even; a NaN stays one.
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

// exp for x <= 0, to within 2 units in the last place of a float: 2^i times a polynomial for 2^f.
// Coefficients: Cephes' expf (Moshier).
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float scaled = x * 1.44269504f;
  const float whole = static_cast<float>(static_cast<int>(scaled - 0.5f));
  const float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(whole) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

void linear(const LinearArgs& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t n = first; n < last; ++n) {
    const float bias = a.bias == nullptr ? 0.0f : to_float(a.bias[n]);
    for (std::int64_t m = 0; m < a.m; ++m) store(dot(a.x + m * a.k, a.w + n * a.k, a.k) + bias, a.y + m * a.n + n);
  }
}

// Scores to weights that add up to one, in place; the largest score is at most the first's exponent 0.
inline void softmax(float* scores, std::int64_t length, float scale, float cap) {
  float largest = -INFINITY;
  if (cap != 0) {
    for (std::int64_t t = 0; t < length; ++t) scores[t] = cap * tanhf(scores[t] * scale / cap);
    scale = 1;
  }
#pragma omp simd reduction(max : largest)
  for (std::int64_t t = 0; t < length; ++t) {
    scores[t] *= scale;
    largest = scores[t] > largest ? scores[t] : largest;
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t t = 0; t < length; ++t) {
    scores[t] = exp_negative(scores[t] - largest);
    sum += scores[t];
  }
  const float inverse = 1 / sum;
#pragma omp simd
  for (std::int64_t t = 0; t < length; ++t) scores[t] *= inverse;
}

// The cache is read once: each key and value serves all heads of the group while it is near.
template <typename T>
void attend(const AttendArgs<T>& a) {
  float* scores = a.scratch;                      // [group, length]
  float* sums = a.scratch + a.group * a.length;   // [group, h]
  for (std::int64_t t = 0; t < a.length; ++t) {
    for (std::int64_t g = 0; g < a.group; ++g) {
      scores[g * a.length + t] = dot(a.q + g * a.q_stride, a.k + t * a.h, a.h);
    }
  }
  for (std::int64_t g = 0; g < a.group; ++g) softmax(scores + g * a.length, a.length, a.scale, a.cap);
  memset(sums, 0, sizeof(float) * static_cast<std::size_t>(a.group * a.h));
  for (std::int64_t t = 0; t < a.length; ++t) {
    const T* value = a.v + t * a.h;
    for (std::int64_t g = 0; g < a.group; ++g) {
      const float weight = scores[g * a.length + t];
      float* sum = sums + g * a.h;
#pragma omp simd
      for (std::int64_t i = 0; i < a.h; ++i) sum[i] += weight * to_float(value[i]);
    }
  }
  for (std::int64_t i = 0; i < a.group * a.h; ++i) store(sums[i], a.out + i);
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
