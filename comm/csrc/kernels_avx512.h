// 16 lanes, for kernels_avx512.cpp and kernels_avx512bf16.cpp; to be included inside an unnamed
// namespace. YOKE_BF16: the processor has instructions that convert to bfloat16.

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

constexpr __mmask32 kOdd = 0xaaaaaaaa;  // of 16-bit elements

// bfloat16, split into even and odd elements: an element in the upper half of a 32-bit lane is a float already.
template <DType type, class T>
inline void load_pair(const T* from, V& a, V& b) {
  if constexpr (type == DType::kFloat32) {
    a = _mm512_loadu_ps(from);
    b = _mm512_loadu_ps(from + kLanes);
  } else if constexpr (type == DType::kFloat16) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + kLanes)));
  } else {
    const __m512i both = _mm512_loadu_si512(from);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_maskz_mov_epi16(kOdd, both));
  }
}

// To nearest even; the lower halves are left as they come. A NaN stays one where its lower half is zero, as
// it is in sums and products of bfloat16: it cannot be carried into infinity.
inline __m512i round_bf16(V v) {
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000));
  const __mmask16 is_tie = _mm512_testn_epi32_mask(up, _mm512_set1_epi32(0xffff));
  return _mm512_mask_and_epi32(up, is_tie, up, _mm512_set1_epi32(~0x10000));
}

template <DType type>
inline V rounded(V v) {
  if constexpr (type == DType::kFloat32) {
    return v;
  } else if constexpr (type == DType::kFloat16) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else {
    return _mm512_castsi512_ps(_mm512_and_si512(round_bf16(v), _mm512_set1_epi32(~0xffff)));
  }
}

inline void store_upper(void* to, __m512i even, __m512i odd) {
  _mm512_storeu_si512(to, _mm512_mask_mov_epi16(_mm512_srli_epi32(even, 16), kOdd, odd));
}

template <DType type, class T>
inline void store_rounded(T* to, V a, V b) {
  if constexpr (type == DType::kFloat32) {
    _mm512_storeu_ps(to, a);
    _mm512_storeu_ps(to + kLanes, b);
  } else if constexpr (type == DType::kFloat16) {
    const auto halves = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(halves, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(halves + 1, _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  } else {
    store_upper(to, _mm512_castps_si512(a), _mm512_castps_si512(b));
  }
}

// Rounded, and a NaN in some form: of sums and products only, see round_bf16.
template <DType type, class T>
inline void store_nearest(T* to, V a, V b) {
  if constexpr (type == DType::kBFloat16) {
    store_upper(to, round_bf16(a), round_bf16(b));
  } else {
    store_rounded<type>(to, a, b);  // the conversion rounds
  }
}

#if defined(YOKE_BF16)
// The processor's conversion flushes denormal numbers to zero and keeps the payload of a NaN. So vectors
// with such lanes take the slower path.
inline __mmask16 is_rare(V v) { return _mm512_fpclass_ps_mask(v, 0x01 | 0x20 | 0x80); }
#endif

// A NaN becomes the default quiet NaN.
template <DType type, class T>
inline void store_pair(T* to, V a, V b) {
  if constexpr (type == DType::kBFloat16) {
#if defined(YOKE_BF16)
    if (!(is_rare(a) | is_rare(b))) {
      alignas(64) static constexpr std::uint16_t kInterleaved[32] = {
          0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      const __m512bh narrow = _mm512_cvtne2ps_pbh(b, a);
      __m512i bits;
      __builtin_memcpy(&bits, &narrow, sizeof bits);
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), bits));
      return;
    }
#endif
    const auto chosen = [](V v) {
      const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      return _mm512_mask_mov_epi32(round_bf16(v), is_nan, _mm512_set1_epi32(0x7fc00000));
    };
    store_upper(to, chosen(a), chosen(b));
  } else {
    store_rounded<type>(to, a, b);  // the conversion rounds
  }
}
