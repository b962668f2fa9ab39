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

// One step of two int4 tiles times M rows of x.
template <int M>
inline void multiply_i4(const std::uint8_t* tiles, __m512 table,
                        const float* x, __m512 (&sums)[2][M]) {
  Sums<M, 1> own;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i v0 = line(tiles + 64 * i), v1 = line(tiles + tile_bytes(Format::i4) + 64 * i);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512 w0 = _mm512_permutexvar_ps(_mm512_srli_epi32(v0, 4 * j), table);
      const __m512 w1 = _mm512_permutexvar_ps(_mm512_srli_epi32(v1, 4 * j), table);
      for (int m = 0; m < M; ++m) {
        const __m512 each = _mm512_set1_ps(x[m * kStep + 8 * i + j % 4 * 2 + j / 4]);
        own.of[0][m][0] = _mm512_fmadd_ps(w0, each, own.of[0][m][0]);
        own.of[1][m][0] = _mm512_fmadd_ps(w1, each, own.of[1][m][0]);
      }
    }
  }
  for (int t = 0; t < 2; ++t)
    for (int m = 0; m < M; ++m) sums[t][m] = own.total(t, m);
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
      const std::uint8_t* from = tiles + t * tile_bytes(Format::bf16) + 64 * pair;
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

// The same for int8. Lanes are 8 rows by the two numbers of a pair, the order in which bytes are widened.
template <int M>
inline void multiply_i8(const std::uint8_t* tiles, const float* x, __m512 (&sums)[2][M]) {
  Sums<M, 2> own;
#pragma GCC unroll 16
  for (int pair = 0; pair < 16; ++pair) {
    __m512 both[M];
    for (int m = 0; m < M; ++m) {
      double bits;
      memcpy(&bits, x + m * kStep + 2 * pair, sizeof bits);
      both[m] = _mm512_castpd_ps(_mm512_set1_pd(bits));
    }
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const std::uint8_t* from = tiles + t * tile_bytes(Format::i8) + 32 * pair;
      const __m512 first = floats(from), second = floats(from + 16);
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
      sums[t][m] = _mm512_add_ps(_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high));
    }
  }
}

template <Format F>
constexpr std::int64_t streams() {
  return F == Format::bf16 ? kWideStreams : kStreams;
}

// M rows of x from m0 on times `count` panels of w from `panel` on, one step of each panel at a time.
template <Format F, int M>
void few(const QuantArgs& a, std::int64_t m0, std::int64_t panel, std::int64_t count) {
  constexpr std::int64_t kBytes = 2 * tile_bytes(F);
  const std::int64_t steps = a.steps(), steps_of_group = F == Format::bf16 ? steps : a.group / kStep;
  const std::int64_t scales_of_panel = F == Format::bf16 ? 0 : a.groups() * kPanelRows;
  const std::uint8_t* data = a.data + panel * steps * kBytes;
  const __m512 zero = _mm512_set1_ps(a.offset == nullptr ? 8 : 0);
  const __m512 table =
      _mm512_sub_ps(_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), zero);
  __m512 totals[streams<F>()][2][M];
  for (auto& panels : totals)
    for (auto& tiles : panels)
      for (__m512& total : tiles) total = _mm512_setzero_ps();
  std::int64_t group = panel * scales_of_panel, left = steps_of_group;
  for (std::int64_t step = 0; step < steps; ++step, data += kBytes) {
    const float* x = a.x_float + m0 * a.k + step * M * kStep;
    for (std::int64_t p = 0; p < count; ++p) {
      __asm__("" : "+r"(x));  // keeps compilers from holding x in registers, at the cost of copies: loads are free
      const std::uint8_t* tiles = data + p * steps * kBytes;
      if constexpr (F != Format::bf16) prefetch<kBytes>(tiles + kAhead);
      __m512 sums[2][M];
      if constexpr (F == Format::i4) multiply_i4<M>(tiles, table, x, sums);
      if constexpr (F == Format::i8) multiply_i8<M>(tiles, x, sums);
      if constexpr (F == Format::bf16) multiply_bf16<M>(tiles, x, sums);
      for (std::int64_t t = 0; t < 2; ++t) {
        const std::int64_t at = group + p * scales_of_panel + t * kTileRows;
        if constexpr (F == Format::bf16) {
          for (int m = 0; m < M; ++m) totals[p][t][m] = _mm512_add_ps(totals[p][t][m], sums[t][m]);
        } else {
          add<M>(a, at, a.x_sums + m0 * steps + step * M, sums[t], totals[p][t]);
        }
      }
    }
    if (--left == 0) {
      left = steps_of_group;
      group += kPanelRows;
    }
  }
  for (std::int64_t p = 0; p < count; ++p)
    for (std::int64_t t = 0; t < 2; ++t)
      for (int m = 0; m < M; ++m) finish(a, m0 + m, (panel + p) * kPanelRows + t * kTileRows, totals[p][t][m]);
}

template <Format F>
void panels(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t panel = first; panel < last; panel += streams<F>()) {
    const std::int64_t count = last - panel < streams<F>() ? last - panel : streams<F>();
    for (std::int64_t m = 0; m < a.m; m += kRowBlock) {
      switch (a.m - m) {
        case 1: few<F, 1>(a, m, panel, count); break;
        case 2: few<F, 2>(a, m, panel, count); break;
        case 3: few<F, 3>(a, m, panel, count); break;
        default: few<F, 4>(a, m, panel, count); break;
      }
    }
  }
}

void quant_linear(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  switch (a.format) {
    case Format::bf16: return panels<Format::bf16>(a, first, last);
    case Format::i8: return panels<Format::i8>(a, first, last);
    case Format::i4: return panels<Format::i4>(a, first, last);
  }
}

}  // namespace
}  // namespace isa_avx512

const QuantKernels avx512_quant{isa_avx512::quant_linear, isa_avx512::gate_rows, INT64_MAX, nullptr};

}  // namespace yoke::kernels

#endif
