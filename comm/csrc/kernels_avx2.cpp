// 8 lanes: x86 with AVX2, FMA and F16C. Compiled with those flags (comm/build.py), used where they run.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

namespace yoke {
namespace {

#include "kernels_scalar.h"

constexpr std::size_t kLanes = 8;
using V = __m256;

inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V broadcast(float x) { return _mm256_set1_ps(x); }
inline V zero() { return _mm256_setzero_ps(); }

inline float horizontal_sum(V v) {
  float lane[kLanes];
  _mm256_storeu_ps(lane, v);
  float total = 0.0f;
  for (std::size_t i = 0; i < kLanes; ++i) total += lane[i];
  return total;
}

template <DType type, class T>
inline V load(const T* from) {
  if constexpr (type == DType::kFloat32) {
    return _mm256_loadu_ps(from);
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (type == DType::kFloat16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

// To nearest even in the upper half of each lane; what is not a number becomes the quiet one.
inline __m256i round_bf16(V v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
}

template <DType type, class T>
inline void store(T* to, V v) {
  if constexpr (type == DType::kFloat32) {
    _mm256_storeu_ps(to, v);
  } else if constexpr (type == DType::kFloat16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else {
    const __m256i wide = round_bf16(v);
    const __m128i low = _mm256_castsi256_si128(wide), high = _mm256_extracti128_si256(wide, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
  }
}

template <DType type, class T>
inline void store_pair(T* to, V a, V b) {
  store<type>(to, a);
  store<type>(to + kLanes, b);
}

template <DType type>
inline V rounded(V v) {
  if constexpr (type == DType::kFloat32) {
    return v;
  } else if constexpr (type == DType::kFloat16) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else {
    return _mm256_castsi256_ps(_mm256_slli_epi32(round_bf16(v), 16));
  }
}

#include "kernels_impl.h"

}  // namespace

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = make_kernels("avx2");

}  // namespace yoke
#endif
