// AMX: five to 16 rows of x, times weights with scales per group of k. Part of quant_amx.cpp.
//
// Weights are only converted to integers in bf16; the scales are applied to the sums. Scaling the sums of a step costs
// one instruction per row of x; scaling its weights costs some ten for each 32 of them. So a row of y is exact but for
// float's rounding, and has the same bits whatever the other rows are.
//
// One tile of 16 rows is processed for a slice of kSlice steps with its totals in registers, then the panel's other
// tile, then three more panels (several streams: see quant_avx512.cpp). This is a pipeline, so that no stage waits: a
// step's weights are converted, multiplied two steps later, and their sums scaled and added two steps after that.
#pragma once

#include <immintrin.h>

#include "amx_tiles.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

constexpr std::int64_t kSlice = kFactorSteps;  // steps of one tile before the next tile's
constexpr std::int64_t kStreams = 4;    // panels that are read alternately
constexpr std::int64_t kLag = 2, kLagRing = 4;

struct FewScratch {
  alignas(4096) std::uint8_t w[kLagRing][kTileRows * kLine];
  alignas(64) float sums[kLagRing][2][kSums];
  alignas(64) float totals[kStreams][2][kTileRows][kTileRows];
  StepFactors factors;  // of the slice of a panel that is multiplied
};
thread_local FewScratch few_scratch;

// Whether these loops take a linear.
inline bool scales_sums(const QuantArgs& a) {
  return a.m > kRowBlock && a.m <= kTileRows && a.codes != Codes::bf16 && !a.scaled_last();
}

// The number of rows of x in a tile; rows past m are zeros.
inline std::int64_t few_rows(std::int64_t m) { return m <= 8 ? 8 : 16; }

// Packs x as [step][few_rows(m)][32]; the sums of both halves of each step follow as floats, [step][half][row].
void pack_few(const QuantArgs& a, std::uint8_t* packed) {
  const std::int64_t rows = few_rows(a.m);
  float* sums = reinterpret_cast<float*>(packed + a.steps() * rows * kLine);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (std::int64_t step = 0; step < a.steps(); ++step, sums += 2 * rows) {
    for (std::int64_t m = 0; m < rows; ++m, packed += kLine) {
      const __m512i x = m < a.m ? line(a.x + m * a.k + step * kStep) : _mm512_setzero_si512();
      _mm512_store_si512(packed, x);
      const __m512 pairs = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                         _mm512_castsi512_ps(_mm512_and_si512(x, upper)));
      sums[m] = _mm512_mask_reduce_add_ps(0x00ff, pairs);
      sums[rows + m] = _mm512_mask_reduce_add_ps(0xff00, pairs);
    }
  }
}

template <Codes C>
inline void make_whole(const std::uint8_t* from, std::int64_t ahead, const std::uint16_t* table, std::uint8_t* to) {
  for (int i = 0; i < tile_bytes(C); i += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(from + ahead + i), _MM_HINT_T0);
  }
  expand_tile<C>(from, table, reinterpret_cast<bf16*>(to));
}

// Multiplies steps [step, step + count) of tile `t` of a panel, and prefetches `ahead` bytes beyond what it reads.
// G: groups of a step with sums of their own. With two of them tiles 2 and 3 are sums of the halves, tiles 4 and 5 are
// x's, tiles 6 and 7 the weights'; all have half a step of 32 bytes or 8 rows.
template <Codes C, int M, int G>
void multiply_slice(const QuantArgs& a, FewScratch& own, std::int64_t panel, std::int64_t t, std::int64_t step,
                    std::int64_t count, std::int64_t ahead, float (&totals)[kTileRows][kTileRows]) {
  constexpr std::int64_t kBytes = tile_bytes(C);
  const std::uint16_t* const table = table_of(a.codes);
  const std::uint8_t* const start = a.panel(panel);
  const std::uint8_t* data = start + (step * 2 + t) * kBytes;
  const std::uint8_t* x = a.packed + step * M * kLine;
  const float* of_x = reinterpret_cast<const float*>(a.packed + a.steps() * M * kLine) + step * 2 * M;
  StepFactors& factors = own.factors;
  if (t == 0) make_factors(a, start, step, count, factors);
  __m512 found[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) found[m] = step == 0 ? _mm512_setzero_ps() : _mm512_load_ps(totals[m]);
  for (std::int64_t i = 0; i < count + 2 * kLag; ++i) {
    if (i < count) make_whole<C>(data + i * 2 * kBytes, ahead, table, own.w[i % kLagRing]);
    __asm__ volatile("" ::: "memory");  // compilers do not see that tile instructions access memory
    if (i >= kLag && i < count + kLag) {
      const std::uint8_t* const w = own.w[(i - kLag) % kLagRing];
      const std::uint8_t* const own_x = x + (i - kLag) * M * kLine;
      if constexpr (G == 2) {
        _tile_zero(2);
        _tile_loadd(4, own_x, kLine);
        _tile_loadd(6, w, kLine);
        _tile_dpbf16ps(2, 4, 6);
        _tile_stored(2, own.sums[i % kLagRing][0], kLine);
        _tile_zero(3);
        _tile_loadd(5, own_x + kLine / 2, kLine);
        _tile_loadd(7, w + kTile / 2, kLine);
        _tile_dpbf16ps(3, 5, 7);
        _tile_stored(3, own.sums[i % kLagRing][1], kLine);
      } else {
        _tile_zero(0);
        _tile_loadd(4, own_x, kLine);
        _tile_loadd(6, w, kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stored(0, own.sums[i % kLagRing][0], kLine);
      }
    }
    __asm__ volatile("" ::: "memory");
    if (i < 2 * kLag) continue;
    const float(*const sums)[kSums] = own.sums[(i - kLag) % kLagRing];
    const float* const of_step = of_x + (i - 2 * kLag) * 2 * M;
#pragma GCC unroll 2
    for (int group = 0; group < G; ++group) {
      const __m512 scale = _mm512_load_ps(factors.scale[i - 2 * kLag][t][group]);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) found[m] = _mm512_fmadd_ps(scale, _mm512_load_ps(sums[group] + 16 * m), found[m]);
      if (!a.offsets) continue;
      const __m512 offset = _mm512_load_ps(factors.offset[i - 2 * kLag][t][group]);
      const float* const first = of_step + group * M;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const float sum = G == 2 ? first[m] : first[m] + first[M + m];
        found[m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(sum), found[m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) _mm512_store_ps(totals[m], found[m]);
  if (step + count < a.steps()) return;
  for (int m = 0; m < a.m; ++m) finish(a, m, panel * kPanelRows + t * kTileRows, _mm512_load_ps(totals[m]));
}

template <Codes C, int M, int G>
void few_slices(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  FewScratch& own = this_threads(few_scratch);
  for (std::int64_t panel = first; panel < last; panel += kStreams) {
    const std::int64_t end = panel + kStreams < last ? panel + kStreams : last;
    for (std::int64_t step = 0; step < a.steps(); step += kSlice) {
      const std::int64_t count = a.steps() - step < kSlice ? a.steps() - step : kSlice;
      for (std::int64_t p = panel; p < end; ++p) {
        const std::int64_t next = p + 1 < end ? a.panel_bytes : (panel - p) * a.panel_bytes + count * 2 * tile_bytes(C);
        for (std::int64_t t = 0; t < 2; ++t) {
          multiply_slice<C, M, G>(a, own, p, t, step, count, next, own.totals[p - panel][t]);
        }
      }
    }
  }
}

template <Codes C, int G>
void few_groups(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  few_rows(a.m) == 8 ? few_slices<C, 8, G>(a, first, last) : few_slices<C, 16, G>(a, first, last);
}

template <Codes C>
void few_scaled(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  a.groups_of_step() == 2 ? few_groups<C, 2>(a, first, last) : few_groups<C, 1>(a, first, last);
}

inline void few_scaled(const QuantArgs& a, std::int64_t first, std::int64_t last) {
#define YOKE_CALL(C) few_scaled<C>(a, first, last)
  YOKE_BY_CODES(a.codes, YOKE_CALL)
#undef YOKE_CALL
}

// The configuration of the tiles for these loops.
inline TileConfig few_config(const QuantArgs& a) {
  TileConfig config = TileConfig::of(static_cast<std::uint8_t>(few_rows(a.m)));
  if (a.groups_of_step() == 2) {
    config.bytes_per_row[4] = config.bytes_per_row[5] = kLine / 2;
    config.rows[6] = config.rows[7] = kTileRows / 2;
  }
  return config;
}

}  // namespace
}  // namespace isa_amx
}  // namespace yoke::kernels
