// 8 lanes: x86 with AVX2, FMA and F16C. Compiled with those flags (comm/build.py), used on processors that support them.
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

// bfloat16, split into even and odd elements: an element in the upper half of a 32-bit lane is a float already.
template <DType type, class T>
inline void load_pair(const T* from, V& a, V& b) {
  if constexpr (type == DType::kFloat32) {
    a = _mm256_loadu_ps(from);
    b = _mm256_loadu_ps(from + kLanes);
  } else if constexpr (type == DType::kFloat16) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + kLanes)));
  } else {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(~0xffff)));
  }
}

// Rounds to nearest even; the lower halves are not cleared. A NaN whose lower half is zero, as in sums and
// products of bfloat16, stays a NaN: the rounding cannot carry it into infinity.
inline __m256i round_bf16(V v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

template <DType type>
inline V rounded(V v) {
  if constexpr (type == DType::kFloat32) {
    return v;
  } else if constexpr (type == DType::kFloat16) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else {
    return _mm256_castsi256_ps(_mm256_and_si256(round_bf16(v), _mm256_set1_epi32(~0xffff)));
  }
}

inline void store_upper(void* to, __m256i even, __m256i odd) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa));
}

template <DType type, class T>
inline void store_rounded(T* to, V a, V b) {
  if constexpr (type == DType::kFloat32) {
    _mm256_storeu_ps(to, a);
    _mm256_storeu_ps(to + kLanes, b);
  } else if constexpr (type == DType::kFloat16) {
    const auto halves = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(halves, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  } else {
    store_upper(to, _mm256_castps_si256(a), _mm256_castps_si256(b));
  }
}

// A NaN becomes the default quiet NaN.
template <DType type, class T>
inline void store_pair(T* to, V a, V b) {
  if constexpr (type == DType::kBFloat16) {
    const auto chosen = [](V v) {
      const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
      return _mm256_blendv_epi8(round_bf16(v), _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan));
    };
    store_upper(to, chosen(a), chosen(b));
  } else {
    store_rounded<type>(to, a, b);  // the conversion rounds
  }
}

#include "kernels_impl.h"

}  // namespace

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = make_kernels("avx2");

}  // namespace yoke
#endif
