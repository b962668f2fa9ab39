// AMX: up to 16 rows of x, times weights that groups of k scale. Part of quant_amx.cpp.
//
// Weights become whole numbers in bf16 and nothing more: to scale the sums of a step costs an instruction for each row
// of x, to scale its weights some ten for each 32 of them. So a row of y is exact but for float's roundings, and has
// the same bits whatever other rows there are.
//
// Four panels are read in turn, a turn of a few steps each (see quant_avx512.cpp for why), in three stages that are a
// turn apart, so that none waits for another: whole numbers are made, multiplied, and the sums of the turn before
// scaled and added up.
#pragma once

#include <immintrin.h>

#include "quant_tiles.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

constexpr std::int64_t kLine = 64;      // bytes
constexpr std::int64_t kTurn = 4;       // steps
constexpr std::int64_t kStreams = 4;    // panels that are read in turn
constexpr std::int64_t kAhead = 3072;   // bytes of each between what is read and what is asked for

struct FewScratch {
  alignas(4096) std::uint8_t w[2][kTurn][2][1024];
  float sums[2][2][kTurn][kTileRows * kTileRows];  // by turn, tile and step
  float totals[kStreams][2][kTileRows][kTileRows];
};
thread_local FewScratch few_scratch;

// Steps of a panel; `stream` says where its totals are.
struct Turn {
  std::int64_t panel, stream, step, count;
};

// Whether a product is one of these.
inline bool scales_sums(const QuantArgs& a) {
  return a.m <= kTileRows && a.format != Format::bf16 && !a.scaled_last();
}

// Rows of x that are multiplied: more than m, if need be, of zeros.
inline int few_config(std::int64_t m) { return m <= 2 ? static_cast<int>(m) - 1 : m <= 4 ? 2 : m <= 8 ? 3 : 4; }

inline std::int64_t few_rows(std::int64_t m) { return std::int64_t{1} << few_config(m); }

// x as [step][few_rows(m)][32], and if there are offsets the sums of that, as floats.
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
inline void make_turn(const QuantArgs& a, const Turn& turn, __m512i table, std::uint8_t* w) {
  constexpr std::int64_t kBytes = tile_bytes(F);
  const std::uint8_t* from = a.data + (turn.panel * a.steps() + turn.step) * 2 * kBytes;
  for (std::int64_t i = 0; i < 2 * turn.count; ++i, from += kBytes, w += 1024) {
#pragma GCC unroll 8
    for (std::int64_t j = 0; j < kBytes; j += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(from + kAhead + j), _MM_HINT_T0);
    }
    if constexpr (F == Format::i4) {
      expand_i4(from, table, reinterpret_cast<bf16*>(w));
    } else {
      expand_i8(from, reinterpret_cast<bf16*>(w));
    }
  }
}

template <int M>
inline void multiply_turn(const std::uint8_t* w, const std::uint8_t* x, std::int64_t count,
                          float (&sums)[2][kTurn][kTileRows * kTileRows]) {
  for (std::int64_t i = 0; i < count; ++i, x += kLine * M, w += 2048) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 1024, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stored(0, sums[0][i], 64);
    _tile_stored(1, sums[1][i], 64);
  }
}

template <int M>
inline void add_turn(const QuantArgs& a, const Turn& turn, float (&sums)[2][kTurn][kTileRows * kTileRows],
                     float (&totals)[2][kTileRows][kTileRows]) {
  const std::int64_t steps_of_group = a.group / kStep;
  const auto* of_x = reinterpret_cast<const float*>(a.packed + a.steps() * M * kLine) + turn.step * M;
  for (std::int64_t t = 0; t < 2; ++t) {
    __m512 found[M];
    for (int m = 0; m < M; ++m) found[m] = turn.step == 0 ? _mm512_setzero_ps() : _mm512_load_ps(totals[t][m]);
    std::int64_t at = (turn.panel * a.groups() + turn.step / steps_of_group) * kPanelRows + t * kTileRows;
    std::int64_t left = steps_of_group - turn.step % steps_of_group;
    for (std::int64_t i = 0; i < turn.count; ++i) {
      const __m512 scale = scales(a, a.scale, at);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) found[m] = _mm512_fmadd_ps(scale, _mm512_load_ps(sums[t][i] + 16 * m), found[m]);
      if (a.offset != nullptr) {
        const __m512 offset = scales(a, a.offset, at);
        for (int m = 0; m < M; ++m) found[m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(of_x[m]), found[m]);
      }
      if (--left == 0) {
        left = steps_of_group;
        at += kPanelRows;
      }
    }
    if (turn.step + turn.count < a.steps()) {
      for (int m = 0; m < M; ++m) _mm512_store_ps(totals[t][m], found[m]);
    } else {
      for (int m = 0; m < M && m < a.m; ++m) finish(a, m, turn.panel * kPanelRows + t * kTileRows, found[m]);
    }
  }
}

template <Format F, int M>
void few_turns(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  FewScratch& own = few_scratch;
  const __m512i table = nibbles_bf16(a.offset != nullptr);
  const std::int64_t steps = a.steps();
  Turn turns[3] = {};  // that is added up, multiplied, made
  const auto next = [&](Turn turn) {
    const std::int64_t base = turn.panel - turn.stream, streams = last - base < kStreams ? last - base : kStreams;
    if (++turn.stream < streams) {
      turn.panel = base + turn.stream;
    } else {
      turn.stream = 0;
      turn.panel = base;
      turn.step += turn.count;
      if (turn.step == steps) {
        turn.panel = base + streams;
        turn.step = 0;
      }
    }
    turn.count = turn.panel == last ? 0 : steps - turn.step < kTurn ? steps - turn.step : kTurn;
    return turn;
  };
  turns[2] = {first, 0, 0, steps < kTurn ? steps : kTurn};
  for (int which = 0; turns[0].count > 0 || turns[1].count > 0 || turns[2].count > 0; which ^= 1) {
    if (turns[2].count > 0) make_turn<F>(a, turns[2], table, own.w[which][0][0]);
    __asm__ volatile("" ::: "memory");  // compilers do not see tiles read and write
    if (turns[1].count > 0) {
      multiply_turn<M>(own.w[which ^ 1][0][0], a.packed + turns[1].step * kLine * M, turns[1].count, own.sums[which]);
    }
    __asm__ volatile("" ::: "memory");
    if (turns[0].count > 0) add_turn<M>(a, turns[0], own.sums[which ^ 1], own.totals[turns[0].stream]);
    turns[0] = turns[1];
    turns[1] = turns[2];
    if (turns[2].count > 0) turns[2] = next(turns[2]);
  }
}

template <Format F>
void few_scaled(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  switch (few_rows(a.m)) {
    case 1: return few_turns<F, 1>(a, first, last);
    case 2: return few_turns<F, 2>(a, first, last);
    case 4: return few_turns<F, 4>(a, first, last);
    case 8: return few_turns<F, 8>(a, first, last);
    default: return few_turns<F, 16>(a, first, last);
  }
}

}  // namespace
}  // namespace isa_amx
}  // namespace yoke::kernels
