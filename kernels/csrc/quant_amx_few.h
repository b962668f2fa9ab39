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

constexpr std::int64_t kSlice = 8;      // steps of one tile before the next tile's
constexpr std::int64_t kStreams = 4;    // panels that are read alternately
constexpr std::int64_t kLag = 2, kLagRing = 4;

struct FewScratch {
  alignas(4096) std::uint8_t w[kLagRing][kTileRows * kLine];
  float sums[kLagRing][kTileRows * kTileRows];
  float totals[kStreams][2][kTileRows][kTileRows];
};
thread_local FewScratch few_scratch;

// Whether these loops take a linear.
inline bool scales_sums(const QuantArgs& a) {
  return a.m > kRowBlock && a.m <= kTileRows && a.format != Format::bf16 && !a.scaled_last();
}

// The number of rows of x in a tile; rows past m are zeros.
inline std::int64_t few_rows(std::int64_t m) { return m <= 8 ? 8 : 16; }

// Packs x as [step][few_rows(m)][32]; if there are offsets, the sums of these 32 follow as floats.
void pack_few(const QuantArgs& a, std::uint8_t* packed) {
  const std::int64_t rows = few_rows(a.m);
  float* sums = reinterpret_cast<float*>(packed + a.steps() * rows * kLine);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (std::int64_t step = 0; step < a.steps(); ++step) {
    for (std::int64_t m = 0; m < rows; ++m, packed += kLine) {
      const __m512i x = m < a.m ? line(a.x + m * a.k + step * kStep) : _mm512_setzero_si512();
      _mm512_store_si512(packed, x);
      if (a.offset == nullptr) continue;
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
      *sums++ = _mm512_reduce_add_ps(_mm512_add_ps(even, _mm512_castsi512_ps(_mm512_and_si512(x, upper))));
    }
  }
}

template <Format F>
inline void make_whole(const std::uint8_t* from, std::int64_t ahead, __m512i table, std::uint8_t* to) {
  for (int i = 0; i < tile_bytes(F); i += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(from + ahead + i), _MM_HINT_T0);
  }
  if constexpr (F == Format::i4) {
    expand_i4(from, table, reinterpret_cast<bf16*>(to));
  } else {
    expand_i8(from, reinterpret_cast<bf16*>(to));
  }
}

// Multiplies steps [step, step + count) of tile `t` of a panel, and prefetches `ahead` bytes beyond what it reads.
// Each: every step is a group.
template <Format F, int M, bool Each>
void multiply_slice(const QuantArgs& a, FewScratch& own, std::int64_t panel, std::int64_t t, std::int64_t step,
                    std::int64_t count, std::int64_t ahead, float (&totals)[kTileRows][kTileRows]) {
  constexpr std::int64_t kBytes = tile_bytes(F);
  const __m512i table = nibbles_bf16(a.offset != nullptr);
  const std::uint8_t* data = a.data + ((panel * a.steps() + step) * 2 + t) * kBytes;
  const std::uint8_t* x = a.packed + step * M * kLine;
  const float* of_x = reinterpret_cast<const float*>(a.packed + a.steps() * M * kLine) + step * M;
  const std::int64_t steps_of_group = a.group / kStep;
  std::int64_t at = (panel * a.groups() + step / steps_of_group) * kPanelRows + t * kTileRows;
  std::int64_t left = steps_of_group - step % steps_of_group, unsummed = left;  // steps to the end of the group
  bool fresh = true;  // the next multiplied step starts a new sum
  __m512 found[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) found[m] = step == 0 ? _mm512_setzero_ps() : _mm512_load_ps(totals[m]);
  for (std::int64_t i = 0; i < count + 2 * kLag; ++i) {
    if (i < count) make_whole<F>(data + i * 2 * kBytes, ahead, table, own.w[i % kLagRing]);
    __asm__ volatile("" ::: "memory");  // compilers do not see that tile instructions access memory
    if (i >= kLag && i < count + kLag) {
      if (Each || fresh) _tile_zero(0);
      _tile_loadd(4, x + (i - kLag) * M * kLine, kLine);
      _tile_loadd(6, own.w[(i - kLag) % kLagRing], kLine);
      _tile_dpbf16ps(0, 4, 6);
      fresh = --unsummed == 0 || i == count + kLag - 1;
      if (unsummed == 0) unsummed = steps_of_group;
      if (Each || fresh) _tile_stored(0, own.sums[i % kLagRing], kLine);
    }
    __asm__ volatile("" ::: "memory");
    if (i < 2 * kLag) continue;
    const float* sums = own.sums[(i - kLag) % kLagRing];
    if (Each || left == 1 || i == count + 2 * kLag - 1) {
      const __m512 scale = scales(a, a.scale, at);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) found[m] = _mm512_fmadd_ps(scale, _mm512_load_ps(sums + 16 * m), found[m]);
    }
    if (a.offset != nullptr) {
      const __m512 offset = scales(a, a.offset, at);
      const float* of_step = of_x + (i - 2 * kLag) * M;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) found[m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(of_step[m]), found[m]);
    }
    if (--left == 0) {
      left = steps_of_group;
      at += kPanelRows;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) _mm512_store_ps(totals[m], found[m]);
  if (step + count < a.steps()) return;
  for (int m = 0; m < a.m; ++m) finish(a, m, panel * kPanelRows + t * kTileRows, _mm512_load_ps(totals[m]));
}

template <Format F, int M, bool Each>
void few_slices(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  FewScratch& own = this_threads(few_scratch);
  for (std::int64_t panel = first; panel < last; panel += kStreams) {
    const std::int64_t end = panel + kStreams < last ? panel + kStreams : last;
    for (std::int64_t step = 0; step < a.steps(); step += kSlice) {
      const std::int64_t count = a.steps() - step < kSlice ? a.steps() - step : kSlice;
      for (std::int64_t p = panel; p < end; ++p) {
        const std::int64_t next = p + 1 < end ? a.panel_bytes() : (panel - p) * a.panel_bytes() + count * 2 * tile_bytes(F);
        for (std::int64_t t = 0; t < 2; ++t) {
          multiply_slice<F, M, Each>(a, own, p, t, step, count, next, own.totals[p - panel][t]);
        }
      }
    }
  }
}

template <Format F, int M>
void few_scaled(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  a.group == kStep ? few_slices<F, M, true>(a, first, last) : few_slices<F, M, false>(a, first, last);
}

template <Format F>
void few_scaled(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  few_rows(a.m) == 8 ? few_scaled<F, 8>(a, first, last) : few_scaled<F, 16>(a, first, last);
}

}  // namespace
}  // namespace isa_amx
}  // namespace yoke::kernels
