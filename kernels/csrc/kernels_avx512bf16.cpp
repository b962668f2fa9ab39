// AVX-512 with dot products of bf16 pairs (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#if defined(__x86_64__)
#include <immintrin.h>

#define YOKE_ISA isa_avx512bf16
#include "impl.h"
#include "peak.h"

namespace yoke::kernels {
namespace isa_avx512bf16 {
namespace {

inline __m512bh load(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline __m512bh load(const bf16* from, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, from); }

inline __mmask32 first_of(std::int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// R rows of w at a time: several streams read memory faster than one does, and each piece of x is loaded once
// for all of them. The next R rows are prefetched, not later parts of these rows: short rows end before that
// would help.
template <int M, int R>
inline void rows(const LinearArgs& a, std::int64_t m0, std::int64_t n) {
  const bf16* x = a.x + m0 * a.k;
  const bf16* w = a.w + n * a.k;
  __m512 sums[M][R];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) sums[m][r] = _mm512_setzero_ps();
  std::int64_t k = 0;
  for (; k + 32 <= a.k; k += 32) {
    __m512bh xs[M];
    for (int m = 0; m < M; ++m) xs[m] = load(x + m * a.k + k);
    for (int r = 0; r < R; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(w + (r + R) * a.k + k), _MM_HINT_T0);
      const __m512bh row = load(w + r * a.k + k);
      for (int m = 0; m < M; ++m) sums[m][r] = _mm512_dpbf16_ps(sums[m][r], row, xs[m]);
    }
  }
  if (k < a.k) {
    const __mmask32 mask = first_of(a.k - k);
    for (int r = 0; r < R; ++r) {
      const __m512bh row = load(w + r * a.k + k, mask);
      for (int m = 0; m < M; ++m) sums[m][r] = _mm512_dpbf16_ps(sums[m][r], row, load(x + m * a.k + k, mask));
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      const float bias = a.bias == nullptr ? 0.0f : to_float(a.bias[n + r]);
      store(_mm512_reduce_add_ps(sums[m][r]) + bias, a.y + (m0 + m) * a.n + n + r);
    }
  }
}

template <int M, int R>
inline void block(const LinearArgs& a, std::int64_t m0, std::int64_t first, std::int64_t last) {
  std::int64_t n = first;
  for (; n + R <= last; n += R) rows<M, R>(a, m0, n);
  for (; n < last; ++n) rows<M, 1>(a, m0, n);
}

// About 24 sums fit the registers. With four or more rows of x, fewer rows of w are processed at a time.
void linear_bf16(const LinearArgs& a, std::int64_t first, std::int64_t last) {
  // In strips of w that stay in the caches for the following rows of x.
  const std::int64_t strip = a.m <= 4 ? last - first : 64;
  for (std::int64_t n = first; n < last; n += strip) {
    const std::int64_t stop = n + strip < last ? n + strip : last;
    for (std::int64_t m = 0; m < a.m; m += 4) {
      switch (a.m - m) {
        case 1: block<1, 8>(a, m, n, stop); break;
        case 2: block<2, 8>(a, m, n, stop); break;
        case 3: block<3, 6>(a, m, n, stop); break;
        default: block<4, 4>(a, m, n, stop); break;
      }
    }
  }
}

}  // namespace
}  // namespace isa_avx512bf16

const Kernels avx512bf16_kernels{"avx512bf16", isa_avx512bf16::linear_bf16, nullptr, 0, 3, isa_avx512bf16::vector_peak};

}  // namespace yoke::kernels

#endif
