// 16 lanes, for kernels_avx512.cpp and kernels_avx512bf16.cpp; to be included inside an unnamed
// namespace. YOKE_BF16 says that the processor converts to bfloat16 itself.

constexpr std::size_t kLanes = 16;
using V = __m512;

inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V broadcast(float x) { return _mm512_set1_ps(x); }
inline V zero() { return _mm512_setzero_ps(); }

inline float horizontal_sum(V v) {
  float lane[kLanes];
  _mm512_storeu_ps(lane, v);
  float total = 0.0f;
  for (std::size_t i = 0; i < kLanes; ++i) total += lane[i];
  return total;
}

template <DType type, class T>
inline V load(const T* from) {
  if constexpr (type == DType::kFloat32) {
    return _mm512_loadu_ps(from);
  } else {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (type == DType::kFloat16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

#if defined(YOKE_BF16)
// The processor's conversion takes denormal numbers for zero, and keeps the bits of what is not a
// number: vectors with such lanes go the long way.
inline __mmask16 is_rare(V v) { return _mm512_fpclass_ps_mask(v, 0x01 | 0x20 | 0x80); }
#endif

// To nearest even; what is not a number becomes the quiet one.
inline __m256i round_bf16(V v) {
#if defined(YOKE_BF16)
  if (is_rare(v) == 0) {
    const __m256bh narrow = _mm512_cvtneps_pbh(v);
    __m256i bits;
    __builtin_memcpy(&bits, &narrow, sizeof bits);
    return bits;
  }
#endif
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}

template <DType type, class T>
inline void store(T* to, V v) {
  if constexpr (type == DType::kFloat32) {
    _mm512_storeu_ps(to, v);
  } else if constexpr (type == DType::kFloat16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round_bf16(v));
  }
}

template <DType type, class T>
inline void store_pair(T* to, V a, V b) {
#if defined(YOKE_BF16)
  if constexpr (type == DType::kBFloat16) {
    if (!(is_rare(a) | is_rare(b))) {  // both at once, one branch for both
      const __m512bh narrow = _mm512_cvtne2ps_pbh(b, a);
      __builtin_memcpy(to, &narrow, sizeof narrow);
      return;
    }
  }
#endif
  store<type>(to, a);
  store<type>(to + kLanes, b);
}

template <DType type>
inline V rounded(V v) {
  if constexpr (type == DType::kFloat32) {
    return v;
  } else if constexpr (type == DType::kFloat16) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_bf16(v)), 16));
  }
}
