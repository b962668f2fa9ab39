// AVX-512: shared by linears with packed weights: factors of 16 rows, and codes as bf16 tiles [16 pairs][16 rows][2].
// Compiled per instruction set (YOKE_ISA).
//
// Codes of up to 6 bits become numbers by looking them up: one permutation of 16-bit words looks 32 up in a table of 32
// (of 64 with two registers). It uses only the low bits of an index, so the bits above need not be cleared: tables of
// shorter codes are repeated. An index is a shift of each plane, and one operation that joins them.
#pragma once

#include <immintrin.h>

// GCC 12 warns of its intrinsics' own undefined registers, which no instruction reads.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

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

// The values of all codes as bf16, repeated to 64: exact, because they are integers of 8 bits, or halves of some.
struct ValueTables {
  std::uint16_t words[kCodes][64];
};
constexpr ValueTables make_value_tables() {
  ValueTables tables{};
  for (int codes = static_cast<int>(Codes::i4); codes < kCodes; ++codes) {
    const Codes own = static_cast<Codes>(codes);
    for (int i = 0; i < 64; ++i) {
      const float value = value_unit(own) * integer_value(own, i & ((1 << bits_of(own)) - 1));
      tables.words[codes][i] = static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, value) >> 16);
    }
  }
  return tables;
}
alignas(64) [[maybe_unused]] constexpr ValueTables kValueTables = make_value_tables();

// Lanes shifted to the right by N bits, or to the left if N is negative.
template <int N>
inline __m512i shifted(__m512i x) {
  if constexpr (N > 0) return _mm512_srli_epi32(x, N);
  if constexpr (N < 0) return _mm512_slli_epi32(x, -N);
  return x;
}

// The bits of x that are set in `mask`, the others of y.
inline __m512i joined(__m512i x, __m512i y, __m512i mask) { return _mm512_ternarylogic_epi32(x, y, mask, 0xe4); }

// The planes of a tile of codes of B bits.
template <int B>
struct Planes {
  static constexpr int kLow = B < 4 ? 2 : 4, kHigh = B - kLow;
  const std::uint8_t* low;

  explicit Planes(const std::uint8_t* tile) : low(tile) {}

  // The register of a plane of P bits that has four pairs I, shifted so that nibble N is at bit `To` of its 16 bits.
  template <int P, int I, int N, int To>
  static __m512i at(const std::uint8_t* plane) {
    constexpr int fours = 4 / P;
    return shifted<8 * (N / 2) + P * (2 * (I % fours) + N % 2) - To>(line(plane + kLineBytes * (I / fours)));
  }

  // The codes of pair 4 I + J of each row, in the lowest bits of 16-bit words; the bits above are garbage.
  template <int I, int J>
  __m512i words() const {
    const __m512i lower = at<kLow, I, J, 0>(low);
    if constexpr (kHigh == 0) {
      return lower;
    } else {
      return joined(lower, at<kHigh, I, J, kLow>(low + kLineBytes * kLow), _mm512_set1_epi16((1 << kLow) - 1));
    }
  }

  // The codes of nibbles 2 B + J of four pairs I, B = 0 .. 3, in byte B of each row: clean.
  template <int I, int J>
  __m512i bytes() const {
    const __m512i lower = at<kLow, I, J, 0>(low), mask = _mm512_set1_epi8((1 << kLow) - 1);
    if constexpr (kHigh == 0) {
      return _mm512_and_si512(lower, mask);
    } else {
      const __m512i upper = at<kHigh, I, J, kLow>(low + kLineBytes * kLow);
      return _mm512_and_si512(joined(lower, upper, mask), _mm512_set1_epi8((1 << B) - 1));
    }
  }
};

// 32 floats of 8 bits (E4M3) as bf16: exponent and mantissa move, 120 is added to the exponent; subnormal ones are
// looked up. What is not a number becomes 480.
inline __m512i bf16_of_e4m3(__m256i bytes) {
  // 0, 1/512 .. 7/512 as bf16, at the indexes that have only mantissa bits
  const __m512i table = _mm512_set_epi16(
      0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0, 0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0,
      0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0, 0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0);
  const __m512i words = _mm512_cvtepu8_epi16(bytes);
  const __m512i size = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x7f)), 4);
  const __mmask32 small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(0x80));
  const __m512i value = _mm512_mask_permutexvar_epi16(_mm512_add_epi16(size, _mm512_set1_epi16(0x3c00)), small, words, table);
  return joined(value, _mm512_slli_epi16(words, 8), _mm512_set1_epi16(0x7fff));
}

// 16 int8 as floats.
inline __m512 floats(const std::uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// 16 factors as floats. `upper`: the upper halves of bytes that have two.
template <Kind K>
inline __m512 factors(const std::uint8_t* from, bool upper) {
  if constexpr (K == Kind::none) return _mm512_set1_ps(1.0f);
  if constexpr (K == Kind::f16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  if constexpr (K == Kind::f32) return _mm512_loadu_ps(from);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if constexpr (K == Kind::i8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  const __m512i numbers = _mm512_cvtepu8_epi32(bytes);
  if constexpr (K == Kind::u8) return _mm512_cvtepi32_ps(numbers);
  if constexpr (K == Kind::u4) {
    return _mm512_cvtepi32_ps(upper ? _mm512_srli_epi32(numbers, 4) : _mm512_and_si512(numbers, _mm512_set1_epi32(15)));
  }
  if constexpr (K == Kind::e8m0) {  // 2^-127 is not a normal number
    const __mmask16 tiny = _mm512_testn_epi32_mask(numbers, numbers);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_slli_epi32(numbers, 23), tiny, _mm512_set1_epi32(0x00400000)));
  }
  // E4M3: a float16 of 2^-8 the value has the same bits, moved, for subnormal numbers, too.
  const __m256i words = _mm256_cvtepu8_epi16(bytes);
  const __m256i both = _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 1);  // the sign twice, exponent, mantissa
  const __m512 small = _mm512_cvtph_ps(_mm256_and_si256(both, _mm256_set1_epi16(static_cast<short>(0xbfff))));
  return _mm512_mul_ps(small, _mm512_set1_ps(256.0f));
}

// 16 factors of super-groups from number `at` of a section on.
inline __m512 super_factors(const QuantArgs& a, const std::uint8_t* section, std::int64_t at) {
  if (a.super_kind == Kind::none) return _mm512_set1_ps(1.0f);
  return a.super_kind == Kind::f16 ? factors<Kind::f16>(section + 2 * at, false) : factors<Kind::f32>(section + 4 * at, false);
}

constexpr std::int64_t kFactorSteps = 8;  // steps whose factors are made at once

// The factors of some steps of a panel, both levels multiplied: [step][tile][group][16 rows]. They are made for some
// steps at once, so that the loops that use them need not know kinds.
struct StepFactors {
  alignas(64) float scale[kFactorSteps][2][2][kTileRows], offset[kFactorSteps][2][2][kTileRows];
};

template <Kind K>
inline void make_factors(const QuantArgs& a, const std::uint8_t* panel, std::int64_t step, std::int64_t count, bool upper,
                         float (*to)[2][2][kTileRows]) {
  constexpr std::int64_t kBytes = kTileRows * kind_bytes(K);
  const int groups = static_cast<int>(a.groups_of_step());
  const std::uint8_t* from = panel + (upper ? a.offsets_at : a.scales_at) + step * 2 * groups * kBytes;
  const std::uint8_t* above = panel + (upper ? a.super_offsets_at : a.super_scales_at);
  std::int64_t super = a.super_of(step);
  std::int64_t left = a.super_size == 0 ? INT64_MAX : (super + 1) * a.super_size - a.super_skip - step * kStep;
  __m512 of_super[2];
  for (std::int64_t s = 0, first = 1; s < count; ++s, first = 0) {
    if (first != 0 || left <= 0) {
      if (left <= 0) {
        ++super;
        left += a.super_size;
      }
      for (int t = 0; t < 2; ++t) of_super[t] = super_factors(a, above, (super * 2 + t) * kTileRows);
    }
    left -= kStep;
    for (int t = 0; t < 2; ++t) {
      for (int group = 0; group < groups; ++group, from += kBytes) {
        const __m512 own = K == Kind::none ? of_super[t] : _mm512_mul_ps(factors<K>(from, upper), of_super[t]);
        _mm512_store_ps(to[s][t][group], own);
      }
    }
  }
}

inline void make_factors(const QuantArgs& a, const std::uint8_t* panel, std::int64_t step, std::int64_t count, bool upper,
                         float (*to)[2][2][kTileRows]) {
  switch (a.group_kind) {
    case Kind::none: return make_factors<Kind::none>(a, panel, step, count, upper, to);
    case Kind::f16: return make_factors<Kind::f16>(a, panel, step, count, upper, to);
    case Kind::f32: return make_factors<Kind::f32>(a, panel, step, count, upper, to);
    case Kind::i8: return make_factors<Kind::i8>(a, panel, step, count, upper, to);
    case Kind::u8: return make_factors<Kind::u8>(a, panel, step, count, upper, to);
    case Kind::e8m0: return make_factors<Kind::e8m0>(a, panel, step, count, upper, to);
    case Kind::e4m3: return make_factors<Kind::e4m3>(a, panel, step, count, upper, to);
    case Kind::u4: return make_factors<Kind::u4>(a, panel, step, count, upper, to);
  }
}

// Those of steps [step, step + count).
[[gnu::noinline]] [[maybe_unused]] void make_factors(const QuantArgs& a, const std::uint8_t* panel, std::int64_t step,
                                                     std::int64_t count, StepFactors& to) {
  make_factors(a, panel, step, count, false, to.scale);
  if (a.offsets) make_factors(a, panel, step, count, true, to.offset);
}

// Prefetches the factors of `count` steps from `step` on.
inline void prefetch_factors(const QuantArgs& a, const std::uint8_t* panel, std::int64_t step, std::int64_t count) {
  const std::int64_t size = 2 * a.groups_of_step() * kTileRows * kind_bytes(a.group_kind);
  for (std::int64_t i = 0; i < count * size; i += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(panel + a.scales_at + step * size + i), _MM_HINT_T0);
    if (a.offsets) _mm_prefetch(reinterpret_cast<const char*>(panel + a.offsets_at + step * size + i), _MM_HINT_T0);
  }
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
  memcpy(a.y + m * a.stride + n, y, sizeof(bf16) * static_cast<std::size_t>(count));
}

// Codes with the same planes differ only by their table: one of them stands for all.
#define YOKE_BY_CODES(codes, call)              \
  switch (codes) {                              \
    case Codes::bf16: break;                    \
    case Codes::i8: call(Codes::i8); break;     \
    case Codes::e4m3: call(Codes::e4m3); break; \
    case Codes::i4:                             \
    case Codes::u4:                             \
    case Codes::iq4:                            \
    case Codes::e2m1: call(Codes::u4); break;   \
    case Codes::u2: call(Codes::u2); break;     \
    case Codes::i3: call(Codes::i3); break;     \
    case Codes::i5:                             \
    case Codes::u5: call(Codes::u5); break;     \
    case Codes::i6: call(Codes::i6); break;     \
  }

#if defined(__AVX512BF16__)

// Two registers of floats, rounded to bf16, in memory order.
inline __m512i rounded(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// Calls put(pair, words) for each pair of a tile: its 32 values as bf16.
template <int B, class Put>
inline void expand_codes(const std::uint8_t* tile, const std::uint16_t* table, const Put& put) {
  const Planes<B> planes(tile);
  const __m512i first = line(table), second = line(table + 32);
  const auto pair = [&]<int I, int J>() {
    const __m512i index = planes.template words<I, J>();
    put(4 * I + J, B == 6 ? _mm512_permutex2var_epi16(first, index, second) : _mm512_permutexvar_epi16(index, first));
  };
  const auto four = [&]<int I>() {
    pair.template operator()<I, 0>();
    pair.template operator()<I, 1>();
    pair.template operator()<I, 2>();
    pair.template operator()<I, 3>();
  };
  four.template operator()<0>();
  four.template operator()<1>();
  four.template operator()<2>();
  four.template operator()<3>();
}

// The same for all codes that are not bf16 already.
template <Codes C, class Put>
inline void expand(const std::uint8_t* tile, const std::uint16_t* table, const Put& put) {
  if constexpr (C == Codes::i8) {
#pragma GCC unroll 4
    for (int pair = 0; pair < 16; ++pair) put(pair, rounded(floats(tile + 32 * pair), floats(tile + 32 * pair + 16)));
  } else if constexpr (C == Codes::e4m3) {
#pragma GCC unroll 4
    for (int pair = 0; pair < 16; ++pair) {
      put(pair, bf16_of_e4m3(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32 * pair))));
    }
  } else {
    expand_codes<bits_of(C)>(tile, table, put);
  }
}

inline const std::uint16_t* table_of(Codes codes) { return kValueTables.words[static_cast<int>(codes)]; }

// The values of a tile, as bf16.
template <Codes C>
inline void expand_tile(const std::uint8_t* tile, const std::uint16_t* table, bf16* to) {
  expand<C>(tile, table, [&](int pair, __m512i words) { _mm512_store_si512(to + 32 * pair, words); });
}

// Scaled int8; lanes are 8 rows by the two numbers of a pair.
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

// The tile of a step with scale and offset applied.
template <Codes C>
inline void dequantize_tile(const QuantArgs& a, const std::uint8_t* tile, const float (&scales)[2][kTileRows],
                            const float (&offsets)[2][kTileRows], bf16* to) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 scale = _mm512_load_ps(scales[0]), offset = a.offsets ? _mm512_load_ps(offsets[0]) : zero;
  if constexpr (C == Codes::i8) {
    if (a.groups_of_step() == 1) return dequantize_i8(tile, scale, offset, to);
  }
  const bool two = a.groups_of_step() == 2;
  const __m512 scale1 = two ? _mm512_load_ps(scales[1]) : scale;
  const __m512 offset1 = two && a.offsets ? _mm512_load_ps(offsets[1]) : offset;
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                       5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  expand<C>(tile, table_of(a.codes), [&](int pair, __m512i words) {
    const __m512 s = pair < 8 ? scale : scale1, o = pair < 8 ? offset : offset1;
    const __m512 even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), s, o);
    const __m512 odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(words, upper)), s, o);
    _mm512_store_si512(to + 32 * pair, _mm512_permutexvar_epi16(zip, rounded(even, odd)));
  });
}

template <Codes C>
void dequantize_steps(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last, bf16* tiles) {
  constexpr std::int64_t kBytes = tile_bytes(C);
  const std::uint8_t* const start = a.panel(panel);
  const std::uint8_t* from = start + first * 2 * kBytes;
  const bool unscaled = a.scaled_last();
  StepFactors own;
  for (std::int64_t step = first, at = 0; step < last; ++step, at = (at + 1) % kFactorSteps) {
    if (at == 0 && !unscaled) {
      make_factors(a, start, step, last - step < kFactorSteps ? last - step : kFactorSteps, own);
    }
    for (std::int64_t t = 0; t < 2; ++t, from += kBytes, tiles += kTileRows * kStep) {
#pragma GCC unroll 8
      for (std::int64_t i = 0; i < kBytes; i += 64) {  // the next steps, which no other loop prefetches
        _mm_prefetch(reinterpret_cast<const char*>(from + 4 * 2 * kBytes + i), _MM_HINT_T0);
      }
      if (unscaled) {
        expand_tile<C>(from, table_of(a.codes), tiles);
      } else {
        dequantize_tile<C>(a, from, own.scale[at][t], own.offset[at][t], tiles);
      }
    }
  }
}

// See QuantKernels.
[[maybe_unused]] void dequantize(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last,
                                 bf16* tiles) {
#define YOKE_CALL(C) dequantize_steps<C>(a, panel, first, last, tiles)
  YOKE_BY_CODES(a.codes, YOKE_CALL)
#undef YOKE_CALL
}

#endif

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
