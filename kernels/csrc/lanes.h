// A register of floats as a compiler vector type: written once, compiled per instruction set (YOKE_ISA). A vector
// wider than the machine's registers would be kept in memory. No standard library function may be instantiated
// here: see impl.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions of one file only

namespace yoke::kernels::YOKE_ISA {
namespace {

struct brain {  // bfloat16: the upper half of a float
  uint16_t bits;
};
struct half {  // float16
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <class To, class From>
inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// One number at a time.

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(brain x) { return as<float>(static_cast<uint32_t>(x.bits) << 16); }

// The multiplication moves the exponent, which is also right for subnormal numbers.
inline float to_float(half x) {
  const uint32_t rest = x.bits & 0x7fffu;
  const float value = as<float>(rest << 13) * 0x1p112f;
  const uint32_t bits = as<uint32_t>(value) | (rest >= 0x7c00u ? 0x7f800000u : 0u);
  return as<float>(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

// Rounds to nearest, ties to even; a NaN stays a NaN.
inline void store(float x, float* to) { *to = x; }

inline void store(float x, brain* to) {
  const uint32_t bits = as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

inline void store(float x, half* to) {
  const uint32_t bits = as<uint32_t>(x), rest = bits & 0x7fffffffu;
  const uint32_t normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const uint32_t small = as<uint32_t>(as<float>(rest) + 0.5f) - 0x3f000000u;  // the addition rounds to units of 2^-24
  uint32_t found = rest < 0x38800000u ? small : normal;
  found = rest >= 0x477ff000u ? 0x7c00u : found;  // from 65520 on
  found = rest > 0x7f800000u ? 0x7e00u : found;
  to->bits = static_cast<uint16_t>(found | ((bits >> 16) & 0x8000u));
}

// A register at a time.

inline Lanes all(float x) { return x - Lanes{}; }

inline Lanes load(const float* from) {
  Lanes x;
  memcpy(&x, from, sizeof x);
  return x;
}

// With intrinsics, because compilers convert such vectors number by number.

inline Lanes load(const brain* from) {
  Ints x;
#if defined(__AVX512F__)
  x = (Ints)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  x = (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = from[i].bits;
#endif
  return as<Lanes>(x << 16);
}

inline Lanes load(const int8_t* from) {
  Ints x;
#if defined(__AVX512F__)
  x = (Ints)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  x = (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = from[i];
#endif
  return __builtin_convertvector(x, Lanes);
}

inline Lanes load(const half* from) {
  Lanes x;
#if defined(__AVX512F__)
  x = (Lanes)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  x = (Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(from[i]);
#endif
  return x;
}

template <class T>
inline Lanes load(const T* from, int64_t count) {  // the other lanes are zeros
  T some[kLanes] = {};
  memcpy(some, from, sizeof(T) * static_cast<size_t>(count));
  return load(some);
}

inline void store(Lanes x, float* to) { memcpy(to, &x, sizeof x); }

template <class T>
inline void store(Lanes x, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(x[i], to + i);
}

inline void store(Lanes x, brain* to) {
  const Ints bits = as<Ints>(x);
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Ints found = x != x ? as<Ints>(all(NAN)) : rounded;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(found >> 16)));
#else
  for (int i = 0; i < kLanes; ++i) to[i].bits = static_cast<uint16_t>(found[i] >> 16);
#endif
}

inline void store(Lanes x, half* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  store(x, to, kLanes);
#endif
}

inline Lanes larger(Lanes a, Lanes b) {  // b if either is a NaN
#if defined(__AVX512F__)
  return (Lanes)_mm512_max_ps((__m512)a, (__m512)b);  // compilers would compare and blend
#else
  return a > b ? a : b;
#endif
}

typedef float Four __attribute__((vector_size(16)));

inline Four four(Lanes x) {  // number i is the sum of lanes i, i + 4, i + 8, ...
#if defined(__AVX512F__)
  typedef float Eight __attribute__((vector_size(32)));
  const Eight eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#elif defined(__AVX__)
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  return x;
#endif
}

// The sums of four registers at once, which is less work than one by one.
inline Four sums(const Lanes (&x)[4]) {
  const Four a = four(x[0]), b = four(x[1]), c = four(x[2]), d = four(x[3]);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

inline float sum(Lanes x) {
  const Four part = four(x);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

inline float largest_of(Lanes x) {
  float found = x[0];
  for (int i = 1; i < kLanes; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

// Splits x into an integer and a rest of at most 1/2; x below -127, or NaN, counts as -127. Adding 1.5 * 2^23 rounds
// and leaves the integer in the low bits. `of` adds it to the exponent of 2^rest, which gives 2^x: exactly 0 from -127
// down.
struct Power {
  Lanes shifted, rest;

  explicit Power(Lanes x) {
    x = larger(x, all(-127.0f));
    shifted = x + 0x1.8p23f;
    rest = x - (shifted - 0x1.8p23f);
  }
  Lanes of(Lanes power_of_rest) const { return as<Lanes>(as<Ints>(power_of_rest) + (as<Ints>(shifted) << 23)); }
};

// 2^x for x < 127, with an error of at most 2 units in the last place; exactly 0 from -127 down and for a NaN.
// Coefficients: Cephes' exp2f (Moshier).
inline Lanes exp2(Lanes x) {
  const Power power(x);
  const Lanes r = power.rest;
  Lanes p = r * 1.535336188e-4f + 1.339887440e-3f;
  p = p * r + 9.618437358e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  return power.of(p * r + 1.0f);
}

// 2^x with a relative error of at most 2^-18, and exactly 1 at 0, for results that are rounded to bfloat16 (2^-9).
// Coefficients: minimize the largest relative error among polynomials that are 1 at 0, by reweighted least squares.
inline Lanes rough_exp2(Lanes x) {
  const Power power(x);
  const Lanes r = power.rest;
  Lanes p = r * 9.582852945e-3f + 5.590642616e-2f;
  p = p * r + 2.402409911e-1f;
  p = p * r + 6.931241751e-1f;
  return power.of(p * r + 1.0f);
}

constexpr float kLog2E = 1.44269504f;

// e^x for x <= 0. The caller subtracts scores before they are multiplied by log2(e): differences are exact, products
// would be rounded.
inline Lanes exp(Lanes x) { return exp2(x * kLog2E); }

inline Lanes tanh(Lanes x) {
  x = larger(x, all(-16.0f));
  x = x < 16.0f ? x : all(16.0f);
  return 1.0f - 2.0f / (exp2(x * (2 * kLog2E)) + 1.0f);
}

// Transposes kLanes rows; 16 rows take four rounds that exchange halves, quarters, eighths and single numbers.
inline void transpose(Ints (&x)[kLanes]) {
#if defined(__AVX512F__)
  for (int i = 0; i < 8; ++i) {
    const Ints a = x[i], b = x[i + 8];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    x[i + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int j = 0; j < 8; ++j) {
    const int i = j / 4 * 8 + j % 4;
    const Ints a = x[i], b = x[i + 4];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    x[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  for (int j = 0; j < 8; ++j) {
    const int i = j / 2 * 4 + j % 2;
    const Ints a = x[i], b = x[i + 2];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < kLanes; i += 2) {
    const Ints a = x[i], b = x[i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    x[i + 1] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
#else
  for (int i = 1; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const int32_t kept = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = kept;
    }
  }
#endif
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
