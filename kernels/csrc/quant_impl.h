// Linears with packed weights in the compiler's vectors, compiled per instruction set. Lanes are rows of w, and each
// number of x is multiplied by all lanes. The sums of a step are scaled and added to the row's total.
#pragma once

#include "lanes.h"
#include "quant.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

// The kLanes scales or offsets from number `at` on, as floats.
inline Lanes scales(const QuantArgs& a, const void* from, int64_t at) {
  if (a.half) return load(static_cast<const half*>(from) + at);
  return load(static_cast<const float*>(from) + at);
}

struct Pair {
  Lanes even, odd;
};

// Pair `pair` of rows [row, row + kLanes) of a tile, as unscaled numbers.
template <Format F>
inline Pair numbers(const uint8_t* tile, int64_t pair, int64_t row, Ints zero) {
  Ints lanes;
  if constexpr (F == Format::i4) {
    memcpy(&lanes, tile + (pair / 4 * kTileRows + row) * 4, sizeof lanes);
    lanes >>= static_cast<int32_t>(pair % 4 * 4);
    return {__builtin_convertvector((lanes & 15) - zero, Lanes), __builtin_convertvector((lanes >> 16 & 15) - zero, Lanes)};
  } else if constexpr (F == Format::i8) {
    typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
    Shorts both;
    memcpy(&both, tile + (pair * kTileRows + row) * 2, sizeof both);
    lanes = __builtin_convertvector(both, Ints);
    return {__builtin_convertvector(lanes << 24 >> 24, Lanes), __builtin_convertvector(lanes >> 8, Lanes)};
  } else {
    memcpy(&lanes, tile + (pair * kTileRows + row) * 4, sizeof lanes);
    return {as<Lanes>(lanes << 16), as<Lanes>(lanes >> 16 << 16)};
  }
}

// M rows of x from m0 on, rows [row, row + kLanes) of a tile of w.
template <Format F, int M>
void lanes_of_tile(const QuantArgs& a, int64_t m0, int64_t panel, int64_t tile, int64_t row) {
  constexpr int64_t kBytes = tile_bytes(F);
  const Ints zero = Ints{} + (F == Format::i4 && a.offset == nullptr ? 8 : 0);
  const uint8_t* data = a.data + (panel * a.steps() * 2 + tile) * kBytes;
  Lanes totals[M] = {};
  for (int64_t step = 0; step < a.steps(); ++step, data += 2 * kBytes) {
    const float* x = a.x_float + m0 * a.k + step * M * kStep;
    Lanes sums[M] = {};
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < kStep / 2; ++pair) {
      const Pair w = numbers<F>(data, pair, row, zero);
      for (int m = 0; m < M; ++m) {
        sums[m] += w.even * x[m * kStep + 2 * pair];
        sums[m] += w.odd * x[m * kStep + 2 * pair + 1];
      }
    }
    if constexpr (F == Format::bf16) {
      for (int m = 0; m < M; ++m) totals[m] += sums[m];
    } else {
      const int64_t at = ((panel * a.groups() + step * kStep / a.group) * 2 + tile) * kTileRows + row;
      const Lanes scale = scales(a, a.scale, at);
      for (int m = 0; m < M; ++m) totals[m] += sums[m] * scale;
      if (a.offset == nullptr) continue;
      const Lanes offset = scales(a, a.offset, at);
      for (int m = 0; m < M; ++m) totals[m] += offset * a.x_sums[m0 * a.steps() + step * M + m];
    }
  }
  const int64_t n = panel * kPanelRows + tile * kTileRows + row;
  for (int m = 0; m < M; ++m) {
    for (int64_t lane = 0; lane < kLanes && n + lane < a.n; ++lane) {
      const float bias = a.bias == nullptr ? 0.0f : to_float(brain{a.bias[n + lane]});
      brain rounded;
      store(totals[m][lane] + bias, &rounded);
      a.y[(m0 + m) * a.n + n + lane] = rounded.bits;
    }
  }
}

template <Format F, int M>
void rows_of_panel(const QuantArgs& a, int64_t m0, int64_t panel) {
  for (int64_t tile = 0; tile < 2; ++tile) {
    for (int64_t row = 0; row < kTileRows; row += kLanes) lanes_of_tile<F, M>(a, m0, panel, tile, row);
  }
}

template <Format F>
void panels(const QuantArgs& a, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t m = 0; m < a.m; m += kRowBlock) {
      switch (a.m - m) {
        case 1: rows_of_panel<F, 1>(a, m, panel); break;
        case 2: rows_of_panel<F, 2>(a, m, panel); break;
        case 3: rows_of_panel<F, 3>(a, m, panel); break;
        default: rows_of_panel<F, 4>(a, m, panel); break;
      }
    }
  }
}

void quant_linear(const QuantArgs& a, int64_t first, int64_t last) {
  switch (a.format) {
    case Format::bf16: return panels<Format::bf16>(a, first, last);
    case Format::i8: return panels<Format::i8>(a, first, last);
    case Format::i4: return panels<Format::i4>(a, first, last);
  }
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
