// AVX-512: linears with packed weights, a few rows of x at a time.
//
// Lanes are rows of w. A number costs a shift and a permutation (int4: the permutation looks up 16 numbers in a table
// of 16 and uses only the low bits of each index) or a widening and a conversion (int8), which use different ports,
// and then one multiply-add for each row of x. Multiplications are in float: the instruction for bf16 pairs has no
// higher throughput (Sapphire Rapids: 32 numbers in two cycles) and would need bf16 inputs. Several panels are read
// alternately, one stream each, with prefetching: a core cannot saturate memory with less.
#if defined(__x86_64__)
#include <string.h>

#define YOKE_ISA isa_avx512
#include "gate.h"
#include "quant_tiles.h"

namespace yoke::kernels {
namespace isa_avx512 {
namespace {

constexpr std::int64_t kStreams = 4;   // panels that are read alternately
constexpr std::int64_t kWideStreams = 6;  // the same for bf16, which leaves time for more streams
constexpr std::int64_t kAhead = 3072;  // the prefetch distance in each stream, in bytes

template <std::int64_t kBytes>
inline void prefetch(const std::uint8_t* from) {
#pragma GCC unroll 32
  for (std::int64_t i = 0; i < kBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

// The sums of one step of two tiles for M rows of x, each in C partial sums. C does not depend on M, so a row's bits do
// not depend on the number of rows.
template <int M, int C>
struct Sums {
  __m512 of[2][M][C];

  Sums() {
    for (auto& tile : of)
      for (auto& row : tile)
        for (__m512& sum : row) sum = _mm512_setzero_ps();
  }

  __m512 total(int t, int m) const { return C == 1 ? of[t][m][0] : _mm512_add_ps(of[t][m][0], of[t][m][C - 1]); }
};

// 16 codes of up to 6 bits as numbers: they are looked up in tables of 16 floats.
struct Tables {
  __m512 of[4];
};

inline Tables tables_of(const QuantArgs& a) {
  Tables tables;
  for (int i = 0; i < 4; ++i) {
    alignas(64) float values[16];
    for (int j = 0; j < 16; ++j) {
      values[j] = value_unit(a.codes) * integer_value(a.codes, (16 * i + j) & ((1 << bits_of(a.codes)) - 1));
    }
    tables.of[i] = _mm512_load_ps(values);
  }
  return tables;
}

template <int B>
inline __m512 looked_up(const Tables& tables, __m512i index) {
  if constexpr (B <= 4) return _mm512_permutexvar_ps(index, tables.of[0]);
  const __m512 low = _mm512_permutex2var_ps(tables.of[0], index, tables.of[1]);
  if constexpr (B == 5) return low;
  const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
  return _mm512_mask_mov_ps(low, upper, _mm512_permutex2var_ps(tables.of[2], index, tables.of[3]));
}

// One half of a step (eight pairs) of two tiles of codes of B bits times M rows of x.
template <int B, int M, int Half>
inline void multiply_codes(const std::uint8_t* tiles, const Tables& tables, const float* x, Sums<M, 1>& own) {
  const Planes<B> planes[2] = {Planes<B>(tiles), Planes<B>(tiles + tile_bytes(B))};
  const auto pair = [&]<int I, int J>() {
    for (int t = 0; t < 2; ++t) {
      const __m512i words = planes[t].template words<I, J>();
      const __m512 first = looked_up<B>(tables, words), second = looked_up<B>(tables, _mm512_srli_epi32(words, 16));
      for (int m = 0; m < M; ++m) {
        __m512& sum = own.of[t][m][0];
        sum = _mm512_fmadd_ps(first, _mm512_set1_ps(x[m * kStep + 8 * I + 2 * J]), sum);
        sum = _mm512_fmadd_ps(second, _mm512_set1_ps(x[m * kStep + 8 * I + 2 * J + 1]), sum);
      }
    }
  };
  const auto four = [&]<int I>() {
    pair.template operator()<I, 0>();
    pair.template operator()<I, 1>();
    pair.template operator()<I, 2>();
    pair.template operator()<I, 3>();
  };
  four.template operator()<2 * Half>();
  four.template operator()<2 * Half + 1>();
}

// The same for bf16. Prefetches are spread among the multiplications: many at once would wait for memory.
template <int M>
inline void multiply_bf16(const std::uint8_t* tiles, const float* x, __m512 (&sums)[2][M]) {
  Sums<M, 2> own;
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 16
  for (int pair = 0; pair < 16; ++pair) {
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const std::uint8_t* from = tiles + t * tile_bytes(Codes::bf16) + 64 * pair;
      _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
      const __m512i v = line(from);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(v, upper));
      for (int m = 0; m < M; ++m) {
        __m512& first = own.of[t][m][0];
        first = _mm512_fmadd_ps(even, _mm512_set1_ps(x[m * kStep + 2 * pair]), first);
        __m512& second = own.of[t][m][1];
        second = _mm512_fmadd_ps(odd, _mm512_set1_ps(x[m * kStep + 2 * pair + 1]), second);
      }
    }
  }
  for (int t = 0; t < 2; ++t)
    for (int m = 0; m < M; ++m) sums[t][m] = own.total(t, m);
}

// The values of 16 bytes: 8 rows by the two numbers of a pair, the order in which bytes are widened.
template <Codes C>
inline __m512 values_of(const std::uint8_t* from) {
  if constexpr (C == Codes::i8) return floats(from);
  // As a float16 of 2^-8 the value: the exponent's bias is 8 less. The scale makes up for it.
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i both = _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 1);  // the sign twice, exponent, mantissa
  return _mm512_cvtph_ps(_mm256_and_si256(both, _mm256_set1_epi16(static_cast<short>(0xbfff))));
}

// Pairs [First, First + Count) of a step of two tiles of codes of 8 bits times M rows of x.
template <Codes C, int M, int First, int Count>
inline void multiply_octets(const std::uint8_t* tiles, const float* x, __m512 (&sums)[2][M]) {
  Sums<M, 2> own;
#pragma GCC unroll 16
  for (int pair = First; pair < First + Count; ++pair) {
    __m512 both[M];
    for (int m = 0; m < M; ++m) {
      double bits;
      memcpy(&bits, x + m * kStep + 2 * pair, sizeof bits);
      both[m] = _mm512_castpd_ps(_mm512_set1_pd(bits));
    }
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const std::uint8_t* from = tiles + t * tile_bytes(8) + 32 * pair;
      const __m512 first = values_of<C>(from), second = values_of<C>(from + 16);
      for (int m = 0; m < M; ++m) {
        own.of[t][m][0] = _mm512_fmadd_ps(first, both[m], own.of[t][m][0]);
        own.of[t][m][1] = _mm512_fmadd_ps(second, both[m], own.of[t][m][1]);
      }
    }
  }
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int t = 0; t < 2; ++t) {
    for (int m = 0; m < M; ++m) {
      const __m512 low = own.of[t][m][0], high = own.of[t][m][1];
      const __m512 sum = _mm512_add_ps(_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high));
      sums[t][m] = C == Codes::e4m3 ? _mm512_mul_ps(sum, _mm512_set1_ps(256.0f)) : sum;
    }
  }
}

// Scales and offsets of a step: [tile][group][16 rows].
using Factors = const float (&)[2][2][kTileRows];

// Adds the sums of a group of M rows of x to the totals of two tiles: scaled, plus the offset times the sum of x.
template <int M>
inline void add_group(const QuantArgs& a, Factors scales, Factors offsets, int group, const float* x_sums,
                      const __m512 (&sums)[2][M], __m512 (&totals)[2][M]) {
  for (int t = 0; t < 2; ++t) {
    const __m512 scale = _mm512_load_ps(scales[t][group]);
    for (int m = 0; m < M; ++m) totals[t][m] = _mm512_fmadd_ps(sums[t][m], scale, totals[t][m]);
    if (!a.offsets) continue;
    const __m512 offset = _mm512_load_ps(offsets[t][group]);
    for (int m = 0; m < M; ++m) {
      const float sum = a.groups_of_step() == 2 ? x_sums[2 * m + group] : x_sums[2 * m] + x_sums[2 * m + 1];
      totals[t][m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(sum), totals[t][m]);
    }
  }
}

template <int M>
inline void take(const Sums<M, 1>& own, __m512 (&sums)[2][M]) {
  for (int t = 0; t < 2; ++t)
    for (int m = 0; m < M; ++m) sums[t][m] = own.total(t, m);
}

// One step of two tiles times M rows of x, added to the totals.
template <Codes C, int M>
inline void multiply_step(const QuantArgs& a, const Tables& tables, Factors scales, Factors offsets,
                          const std::uint8_t* tiles, const float* x, const float* x_sums, __m512 (&totals)[2][M]) {
  const bool two = a.groups_of_step() == 2;
  __m512 sums[2][M];
  if constexpr (bits_of(C) == 8) {
    if (two) {
      multiply_octets<C, M, 0, 8>(tiles, x, sums);
      add_group<M>(a, scales, offsets, 0, x_sums, sums, totals);
      multiply_octets<C, M, 8, 8>(tiles, x, sums);
      return add_group<M>(a, scales, offsets, 1, x_sums, sums, totals);
    }
    multiply_octets<C, M, 0, 16>(tiles, x, sums);
    add_group<M>(a, scales, offsets, 0, x_sums, sums, totals);
  } else {
    Sums<M, 1> own;
    multiply_codes<bits_of(C), M, 0>(tiles, tables, x, own);
    if (two) {
      take<M>(own, sums);
      add_group<M>(a, scales, offsets, 0, x_sums, sums, totals);
      own = Sums<M, 1>();
    }
    multiply_codes<bits_of(C), M, 1>(tiles, tables, x, own);
    take<M>(own, sums);
    add_group<M>(a, scales, offsets, two ? 1 : 0, x_sums, sums, totals);
  }
}

template <Codes C>
constexpr std::int64_t streams() {
  return C == Codes::bf16 ? kWideStreams : kStreams;
}

thread_local StepFactors made_factors[kStreams];

// M rows of x from m0 on times `count` panels of w from `panel` on, one step of each panel at a time.
template <Codes C, int M>
void few(const QuantArgs& a, std::int64_t m0, std::int64_t panel, std::int64_t count) {
  constexpr std::int64_t kBytes = 2 * tile_bytes(C);
  const std::int64_t steps = a.steps();
  const std::uint8_t* data = a.panel(panel);
  const Tables tables = tables_of(a);
  StepFactors(&factors)[kStreams] = this_threads(made_factors);
  __m512 totals[streams<C>()][2][M];
  for (auto& panels : totals)
    for (auto& tiles : panels)
      for (__m512& total : tiles) total = _mm512_setzero_ps();
  for (std::int64_t step = 0; step < steps; ++step, data += kBytes) {
    const float* x = a.x_float + m0 * a.k + step * M * kStep;
    const float* x_sums = a.x_sums + 2 * (m0 * steps + step * M);
    const std::int64_t at = step % kFactorSteps;
    for (std::int64_t p = 0; C != Codes::bf16 && at == 0 && p < count; ++p) {
      const std::int64_t some = steps - step < kFactorSteps ? steps - step : kFactorSteps;
      make_factors(a, a.panel(panel + p), step, some, factors[p]);
      prefetch_factors(a, a.panel(panel + p), step + kFactorSteps, kFactorSteps);
    }
    for (std::int64_t p = 0; p < count; ++p) {
      __asm__("" : "+r"(x));  // keeps compilers from holding x in registers, at the cost of copies: loads are free
      const std::uint8_t* tiles = data + p * a.panel_bytes;
      if constexpr (C == Codes::bf16) {
        __m512 sums[2][M];
        multiply_bf16<M>(tiles, x, sums);
        for (int t = 0; t < 2; ++t)
          for (int m = 0; m < M; ++m) totals[p][t][m] = _mm512_add_ps(totals[p][t][m], sums[t][m]);
      } else {
        prefetch<kBytes>(tiles + kAhead);
        multiply_step<C, M>(a, tables, factors[p].scale[at], factors[p].offset[at], tiles, x, x_sums, totals[p]);
      }
    }
  }
  for (std::int64_t p = 0; p < count; ++p)
    for (std::int64_t t = 0; t < 2; ++t)
      for (int m = 0; m < M && m0 + m < a.m; ++m) {
        finish(a, m0 + m, (panel + p) * kPanelRows + t * kTileRows, totals[p][t][m]);
      }
}

template <Codes C>
void panels(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t panel = first; panel < last; panel += streams<C>()) {
    const std::int64_t count = last - panel < streams<C>() ? last - panel : streams<C>();
    each_block(a.m, [&]<int M>(std::int64_t m) { few<C, M>(a, m, panel, count); });
  }
}

void quant_linear(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  if (a.codes == Codes::bf16) return panels<Codes::bf16>(a, first, last);
#define YOKE_CALL(C) panels<C>(a, first, last)
  YOKE_BY_CODES(a.codes, YOKE_CALL)
#undef YOKE_CALL
}

int layout(const QuantArgs&) { return kWide; }

}  // namespace
}  // namespace isa_avx512

const QuantKernels avx512_quant{isa_avx512::quant_linear, isa_avx512::gate_rows, nullptr, isa_avx512::layout};

}  // namespace yoke::kernels

#endif
