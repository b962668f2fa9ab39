// AVX-512 with dot products of bf16 pairs (Cooper Lake, Sapphire Rapids, Zen 4 and later): packed weights times many
// rows of x. A few rows go to the loops of plain AVX-512, or of VNNI for int4.
//
// A piece of a panel is converted to integers in bf16, which stay in the L1 cache for all rows of x. The sums of a step
// are scaled in float.
#if defined(__x86_64__)
#include <string.h>

#define YOKE_ISA isa_avx512bf16
#include "gate.h"
#include "quant_tiles.h"

namespace yoke::kernels {
namespace isa_avx512bf16 {
namespace {

constexpr std::int64_t kFew = 15;    // up to so many rows of x, the loops for few rows take them four at a time
constexpr std::int64_t kPiece = kFactorSteps;  // steps: 16 KiB
constexpr std::int64_t kRows = 6;    // rows of x at a time: their sums and totals are 24 registers
constexpr std::int64_t kBlock = 120; // rows of x with totals in the L1 cache

// Some steps of a panel: the values, and their factors.
struct Piece {
  alignas(64) bf16 tiles[kPiece * kPanelRows * kStep];
  StepFactors factors;
};
struct Scratch {
  Piece piece;
  alignas(64) float totals[kBlock][2][kTileRows];
};
thread_local Scratch scratch;

// Converts steps [first, last) of a panel to values in bf16.
template <Codes C>
void expand_steps(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last, bf16* to) {
  constexpr std::int64_t bytes = tile_bytes(C), numbers = kTileRows * kStep;
  const std::uint8_t* from = a.panel(panel) + first * 2 * bytes;
  for (std::int64_t tile = 0; tile < 2 * (last - first); ++tile, from += bytes, to += numbers) {
    expand_tile<C>(from, table_of(a.codes), to);
  }
}

void expand_values(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last, bf16* to) {
  if (a.codes == Codes::bf16) {
    constexpr std::int64_t bytes = 2 * tile_bytes(Codes::bf16);
    memcpy(to, a.panel(panel) + first * bytes, static_cast<std::size_t>((last - first) * bytes));
    return;
  }
#define YOKE_CALL(C) expand_steps<C>(a, panel, first, last, to)
  YOKE_BY_CODES(a.codes, YOKE_CALL)
#undef YOKE_CALL
}

// Adds R rows of x from m on times steps [first, last) of a panel to `totals`.
template <int R>
void multiply(const QuantArgs& a, std::int64_t m, std::int64_t panel, std::int64_t first, std::int64_t last,
              const Piece& own, float (*totals)[2][kTileRows]) {
  const bf16* tiles = own.tiles;
  const StepFactors& factors = own.factors;
  __m512 found[2][R];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < 2; ++t) found[t][r] = _mm512_load_ps(totals[r][t]);
  const int groups = static_cast<int>(a.groups_of_step()), pairs = 16 / groups;
  for (std::int64_t step = first; step < last; ++step, tiles += kPanelRows * kStep) {
    const bf16* x = a.x + m * a.k + step * kStep;
    for (int group = 0; group < groups; ++group) {
      __m512 sums[2][R];
      for (int r = 0; r < R; ++r) sums[0][r] = sums[1][r] = _mm512_setzero_ps();
#pragma GCC unroll 2
      for (int pair = group * pairs; pair < (group + 1) * pairs; ++pair) {
        const __m512bh w0 = (__m512bh)line(tiles + 32 * pair);
        const __m512bh w1 = (__m512bh)line(tiles + kTileRows * kStep + 32 * pair);
        for (int r = 0; r < R; ++r) {
          int both;
          memcpy(&both, x + r * a.k + 2 * pair, sizeof both);
          const __m512bh each = (__m512bh)_mm512_set1_epi32(both);
          sums[0][r] = _mm512_dpbf16_ps(sums[0][r], w0, each);
          sums[1][r] = _mm512_dpbf16_ps(sums[1][r], w1, each);
        }
      }
      if (a.codes == Codes::bf16) {
        for (int r = 0; r < R; ++r)
          for (int t = 0; t < 2; ++t) found[t][r] = _mm512_add_ps(found[t][r], sums[t][r]);
        continue;
      }
      for (int t = 0; t < 2; ++t) {
        const __m512 scale = _mm512_load_ps(factors.scale[step - first][t][group]);
        for (int r = 0; r < R; ++r) found[t][r] = _mm512_fmadd_ps(sums[t][r], scale, found[t][r]);
        if (!a.offsets) continue;
        const __m512 offset = _mm512_load_ps(factors.offset[step - first][t][group]);
        for (int r = 0; r < R; ++r) {
          const float* both = a.x_sums + 2 * step_at(a, m + r, step);
          const float sum = groups == 2 ? both[group] : both[0] + both[1];
          found[t][r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(sum), found[t][r]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < 2; ++t) _mm512_store_ps(totals[r][t], found[t][r]);
}

void many(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  Scratch& own = this_threads(scratch);
  for (std::int64_t m0 = 0; m0 < a.m; m0 += kBlock) {
    const std::int64_t rows = a.m - m0 < kBlock ? a.m - m0 : kBlock;
    for (std::int64_t panel = first; panel < last; ++panel) {
      memset(own.totals, 0, sizeof own.totals);
      for (std::int64_t step = 0; step < a.steps(); step += kPiece) {
        const std::int64_t end = a.steps() - step < kPiece ? a.steps() : step + kPiece;
        expand_values(a, panel, step, end, own.piece.tiles);
        if (a.codes != Codes::bf16) make_factors(a, a.panel(panel), step, end - step, own.piece.factors);
        for (std::int64_t m = 0; m < rows; m += kRows) {
          const auto piece = [&]<int R>() {
            multiply<R>(a, m0 + m, panel, step, end, own.piece, own.totals + m);
          };
          switch (rows - m) {
            case 1: piece.template operator()<1>(); break;
            case 2: piece.template operator()<2>(); break;
            case 3: piece.template operator()<3>(); break;
            case 4: piece.template operator()<4>(); break;
            case 5: piece.template operator()<5>(); break;
            default: piece.template operator()<kRows>(); break;
          }
        }
      }
      for (std::int64_t m = 0; m < rows; ++m)
        for (std::int64_t t = 0; t < 2; ++t) {
          finish(a, m0 + m, panel * kPanelRows + t * kTileRows, _mm512_load_ps(own.totals[m][t]));
        }
    }
  }
}

int layout(const QuantArgs& a) {
  if (a.m <= kFew && takes_bytes(a)) return kPacked;
  if (a.m <= kFew) return kWide;
  return a.offsets ? kSums : kRowMajor;
}

void quant_linear(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  if (a.packed != nullptr) return linear_bytes(a, first, last);
  if (a.m <= kFew) return avx512_quant.linear(a, first, last);
  many(a, first, last);
}

}  // namespace
}  // namespace isa_avx512bf16

const QuantKernels avx512bf16_quant{isa_avx512bf16::quant_linear, isa_avx512bf16::gate_rows, isa_avx512bf16::dequantize,
                                    isa_avx512bf16::layout, pack_bytes};

}  // namespace yoke::kernels

#endif
