// AVX-512: shared by linears with packed weights, and the dequantization into bf16 tiles [16 pairs][16 rows][2].
// Compiled per instruction set (YOKE_ISA).
//
// One permutation of 16-bit words looks 32 numbers up in a table. It uses only the low five bits of an index, so
// nibbles must be shifted but not masked: the table of 16 is stored twice, once for each value of the fifth bit.
#pragma once

#include <immintrin.h>

// GCC 12 warns of its intrinsics' own undefined registers, which no instruction reads.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "lanes.h"
#include "quant.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

// Looks a thread_local up once. Otherwise compilers repeat that in loops, and the call spills all vector registers.
template <class T>
inline T& this_threads(T& own) {
  T* found = &own;
  __asm__("" : "+r"(found));
  return *found;
}

inline __m512i line(const void* from) { return _mm512_loadu_si512(from); }

// The table from nibbles q to bf16 integers: q - 8, or q if there are offsets.
[[maybe_unused]] inline __m512i nibbles_bf16(bool offset) {
  alignas(64) static constexpr std::uint16_t symmetric[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  alignas(64) static constexpr std::uint16_t from_zero[32] = {
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
  return line(offset ? from_zero : symmetric);
}

// 16 int8 as floats.
inline __m512 floats(const std::uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// 16 scales or offsets, from number `at` on.
inline __m512 scales(const QuantArgs& a, const void* from, std::int64_t at) {
  if (a.half) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const half*>(from) + at)));
  }
  return _mm512_loadu_ps(static_cast<const float*>(from) + at);
}

// Adds the bias to the sums of 16 rows of w from n on, rounds them, and writes them to row m of y.
inline void finish(const QuantArgs& a, std::int64_t m, std::int64_t n, __m512 sums) {
  if (n >= a.n) return;
  const std::int64_t count = a.n - n < kTileRows ? a.n - n : kTileRows;
  alignas(64) bf16 bias[kTileRows] = {}, y[kTileRows];
  if (a.bias != nullptr) {
    memcpy(bias, a.bias + n, sizeof(bf16) * static_cast<std::size_t>(count));
    sums = _mm512_add_ps(sums, (__m512)load(reinterpret_cast<const brain*>(bias)));
  }
  store((Lanes)sums, reinterpret_cast<brain*>(y));
  memcpy(a.y + m * a.n + n, y, sizeof(bf16) * static_cast<std::size_t>(count));
}

// Adds a step's sums of M rows of x to the totals: scaled, plus the offset times the sum of x. `at`: the first scale.
template <int M>
inline void add(const QuantArgs& a, std::int64_t at, const float* x_sums, const __m512 (&sums)[M], __m512 (&totals)[M]) {
  const __m512 scale = scales(a, a.scale, at);
  for (int m = 0; m < M; ++m) totals[m] = _mm512_fmadd_ps(sums[m], scale, totals[m]);
  if (a.offset == nullptr) return;
  const __m512 offset = scales(a, a.offset, at);
  for (int m = 0; m < M; ++m) totals[m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x_sums[m]), totals[m]);
}

#if defined(__AVX512BF16__)

// Two registers of floats, rounded to bf16, in memory order.
inline __m512i rounded(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// The integers of an int4 tile, as bf16.
[[maybe_unused]] inline void expand_i4(const std::uint8_t* from, __m512i table, bf16* to) {
  for (int i = 0; i < 4; ++i, from += 64) {
    const __m512i v = line(from);
    for (int j = 0; j < 4; ++j, to += 32) {
      _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_srli_epi32(v, 4 * j), table));
    }
  }
}

[[maybe_unused]] inline void expand_i8(const std::uint8_t* from, bf16* to) {
  for (int pair = 0; pair < 16; ++pair, from += 32, to += 32) {
    _mm512_store_si512(to, rounded(floats(from), floats(from + 16)));
  }
}

// Applies scale and offset to an int4 tile; lanes are rows.
inline void dequantize_i4(const std::uint8_t* from, __m512 scale, __m512 offset, bf16* to) {
  const __m512 table = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                       5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int i = 0; i < 4; ++i, from += 64) {
    const __m512i v = line(from);
    for (int j = 0; j < 4; ++j, to += 32) {
      const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * j), table);
      const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * j + 16), table);
      const __m512i both = rounded(_mm512_fmadd_ps(even, scale, offset), _mm512_fmadd_ps(odd, scale, offset));
      _mm512_store_si512(to, _mm512_permutexvar_epi16(zip, both));
    }
  }
}

// The same for int8; lanes are 8 rows by the two numbers of a pair.
inline void dequantize_i8(const std::uint8_t* from, __m512 scale, __m512 offset, bf16* to) {
  const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 scale0 = _mm512_permutexvar_ps(low, scale), scale1 = _mm512_permutexvar_ps(high, scale);
  const __m512 offset0 = _mm512_permutexvar_ps(low, offset), offset1 = _mm512_permutexvar_ps(high, offset);
  for (int pair = 0; pair < 16; ++pair, from += 32, to += 32) {
    const __m512 first = _mm512_fmadd_ps(floats(from), scale0, offset0);
    _mm512_store_si512(to, rounded(first, _mm512_fmadd_ps(floats(from + 16), scale1, offset1)));
  }
}

// See QuantKernels.
[[maybe_unused]] void dequantize(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last,
                                 bf16* tiles) {
  const std::int64_t bytes = tile_bytes(a.format), steps_of_group = a.group / kStep;
  const std::uint8_t* from = a.data + (panel * a.steps() + first) * 2 * bytes;
  for (std::int64_t step = first; step < last; ++step) {
    const std::int64_t at = (panel * a.groups() + step / steps_of_group) * kPanelRows;
    for (std::int64_t tile = 0; tile < 2; ++tile, from += bytes, tiles += kTileRows * kStep) {
      __builtin_prefetch(from + 4 * 2 * bytes);  // the next steps, which no other loop prefetches
      __builtin_prefetch(from + 4 * 2 * bytes + 64);
      __builtin_prefetch(from + 4 * 2 * bytes + 128);
      __builtin_prefetch(from + 4 * 2 * bytes + 192);
      if (a.scaled_last()) {
        expand_i8(from, tiles);
        continue;
      }
      const __m512 scale = scales(a, a.scale, at + tile * kTileRows);
      __m512 offset = _mm512_setzero_ps();
      if (a.offset != nullptr) {
        offset = scales(a, a.offset, at + tile * kTileRows);
      } else if (a.format == Format::i4) {
        offset = _mm512_mul_ps(scale, _mm512_set1_ps(-8.0f));
      }
      if (a.format == Format::i4) {
        dequantize_i4(from, scale, offset, tiles);
      } else {
        dequantize_i8(from, scale, offset, tiles);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
