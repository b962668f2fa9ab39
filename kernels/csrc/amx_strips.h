// AMX: matmuls with many rows of x, in cache blocks, and the processing of their sums.
//
// The template parameter T describes the weights:
//   kNumbers                        the numbers of k in a step of tiles
//   kMade                           whether they are dequantized into tiles (sums may need scaling), or stored as tiles
//   make(a, panel, first, last, to) dequantizes steps [first, last) of a panel into tiles
//   sums(from)                      16 sums as floats
#pragma once

#include "amx_tiles.h"
#include "gate.h"

namespace yoke::kernels::isa_amx {
namespace {

constexpr std::int64_t kRowsAStep = kPanelRows / kPiece;  // rows of a block to finish in each step of the next block

// Sums of rows [m, m + 32) of x times a panel of w, [2 of x][2 of w] tiles. `gate`: the sums of the same rows times the
// panel of the first half of w that belongs to this panel of the second half.
struct Block {
  const float* sums;
  const float* gate;
  std::int64_t m, panel;
};

// The scales of 16 rows of w that have a single one each.
inline __m512 last_scale(const QuantArgs& a, std::int64_t panel, std::int64_t t) {
  return super_factors(a, a.panel(panel) + a.super_scales_at, t * kTileRows);
}

// Row j of a block as bf16: scaled if the sums are not scaled yet, with the bias.
template <class T>
inline __m512i row_of(const QuantArgs& a, const float* sums, std::int64_t m, std::int64_t j, std::int64_t n) {
  const float* row = sums + j / kTileRows * 2 * kSums + j % kTileRows * kTileRows;
  __m512 both[2] = {T::sums(row), T::sums(row + kSums)};
  for (int t = 0; t < 2; ++t) {
    if (T::kMade && a.x_scale != nullptr) both[t] = _mm512_mul_ps(both[t], _mm512_set1_ps(a.x_scale[m + j]));
    const __m512 scale = T::kMade && a.scaled_last() ? last_scale(a, n / kPanelRows, t) : _mm512_set1_ps(1.0f);
    __m512 bias = _mm512_setzero_ps();
    if (a.bias != nullptr) {
      const auto mask = static_cast<__mmask16>(first_of(a.n - n) >> (16 * t));
      const __m256i some = _mm256_maskz_loadu_epi16(mask, a.bias + n + t * kTileRows);
      bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
    }
    both[t] = _mm512_fmadd_ps(both[t], scale, bias);
  }
  return rounded(both[0], both[1]);
}

// Writes rows [first, last) of a block to y. `past`: bypass the caches, from which y would evict data still needed.
template <class T>
inline void finish(const QuantArgs& a, const Block& block, std::int64_t first, std::int64_t last, bool past) {
  const std::int64_t n = block.panel * kPanelRows;
  for (std::int64_t j = first; j < least(last, a.m - block.m); ++j) {
    bf16* y = a.y + (block.m + j) * a.stride + n;
    if (past) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(y), row_of<T>(a, block.sums, block.m, j, n));
    } else {
      _mm512_mask_storeu_epi16(y, first_of(a.n - n), row_of<T>(a, block.sums, block.m, j, n));
    }
  }
}

inline Lanes floats_of(__m512i both, int half) {
  const __m256i some = half == 0 ? _mm512_castsi512_si256(both) : _mm512_extracti64x4_epi64(both, 1);
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16);
}

// Writes rows of a block with its gate to the tiles of the next matmul, as the step with this panel's number. Rows past
// x are zeros, or numbers that are never used.
template <class T>
inline void finish_gated(const QuantArgs& a, const Block& block, std::int64_t first, std::int64_t last) {
  const std::int64_t half = a.n / kPanelRows / 2, step = block.panel - half, piece = step / kPiece * kPiece;
  std::uint8_t* to = a.gate->hidden + place(a.m, half, block.m / kPanelRows, piece) + (step - piece) * 2 * kTile;
  for (std::int64_t j = first; j < last; ++j) {
    const __m512i gate = row_of<T>(a, block.gate, block.m, j, step * kPanelRows);
    const __m512i up = row_of<T>(a, block.sums, block.m, j, block.panel * kPanelRows);
    const auto part = [&](int i) { return (__m512)gated(a.gate->activation, floats_of(gate, i), floats_of(up, i)); };
    _mm512_store_si512(to + j / kTileRows * kTile + j % kTileRows * kLine, rounded(part(0), part(1)));
  }
}

// Tiles C += A B. A macro, because tile numbers are part of the instructions.
#define YOKE_MULTIPLY(c, a, b)          \
  do {                                  \
    if constexpr (T::kNumbers == 64) {  \
      _tile_dpbssd(c, a, b);            \
    } else {                            \
      _tile_dpbf16ps(c, a, b);          \
    }                                   \
  } while (false)

// One step: 16 B rows of x times a panel of w, added to the sums [B][2] in tiles 0 to 3.
template <class T, int B>
inline void multiply_step(const std::uint8_t* w, const std::uint8_t* x) {
  _tile_loadd(6, w, kLine);
  _tile_stream_loadd(4, x, kLine);  // a stream load, so that it does not evict w from the L1 cache
  YOKE_MULTIPLY(0, 4, 6);
  _tile_loadd(7, w + kTile, kLine);
  YOKE_MULTIPLY(1, 4, 7);
  if constexpr (B > 1) {
    _tile_stream_loadd(5, x + kTile, kLine);
    YOKE_MULTIPLY(2, 5, 6);
    YOKE_MULTIPLY(3, 5, 7);
  }
}

#undef YOKE_MULTIPLY

// Loads the sums so far into the tiles, or zeros.
template <int B>
inline void begin(const float* sums, bool resume) {
  if (!resume) return clear<B>();
  _tile_loadd(0, sums, kLine);
  _tile_loadd(1, sums + kSums, kLine);
  if constexpr (B > 1) {
    _tile_loadd(2, sums + 2 * kSums, kLine);
    _tile_loadd(3, sums + 3 * kSums, kLine);
  }
}

// How to finish the block that was summed before: not at all, as rows of y, or gated.
enum class Finish { none, rows, gated };

// 16 B rows of x times a piece of a panel. The sums start from zero or from `sums`, and are stored there. Each step
// prefetches some of the sums that follow, which are needed next, and some of the `lines` lines from `ahead` on. With F
// each step also finishes some rows of the block before, so that vector units work while the matrix unit does.
template <class T, int B, Finish F>
__attribute__((noinline)) void multiply_piece(const std::uint8_t* w, const std::uint8_t* x, std::int64_t steps,
                                              float* sums, bool resume, const std::uint8_t* ahead, std::int64_t lines,
                                              const QuantArgs& a, const Block& before, bool past) {
  if (T::kMade) __asm__ volatile("" ::: "memory");  // compilers do not see that tiles read `w`
  begin<B>(sums, resume);
  const float* next = sums + 4 * kSums;
  const std::uint8_t* const all = ahead + lines * kLine;
  const std::int64_t a_step = parts(lines, steps) * kLine;
  std::int64_t row = 0;
  for (const std::uint8_t* const end = w + steps * 2 * kTile; w != end; w += 2 * kTile, x += 2 * kTile) {
    multiply_step<T, B>(w, x);
    for (const std::uint8_t* const stop = ahead + a_step < all ? ahead + a_step : all; ahead < stop; ahead += kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    }
    for (int i = 0; i < 4; ++i) __builtin_prefetch(next + i * 16, 1, 3);
    next += 4 * 16;
    if constexpr (F == Finish::rows) finish<T>(a, before, row, row + kRowsAStep, past);
    if constexpr (F == Finish::gated) finish_gated<T>(a, before, row, row + kRowsAStep);
    row += kRowsAStep;
  }
  if constexpr (F == Finish::rows) finish<T>(a, before, row, kPanelRows, past);
  if constexpr (F == Finish::gated) finish_gated<T>(a, before, row, kPanelRows);
  keep<B>(sums);
}

template <class T, int B>
auto multiply_and(const QuantArgs& a, const Block& before) {
  if (before.sums == nullptr) return multiply_piece<T, B, Finish::none>;
  return a.gate == nullptr ? multiply_piece<T, B, Finish::rows> : multiply_piece<T, B, Finish::gated>;
}

// Panels [first, last) of w times rows [m0, m1) of x: all panels for one piece of k, then for the next. The sums must
// fit the thread's scratch. With a gate, panels are numbered so that each panel of the first half is followed by its
// counterpart in the second half.
template <class T>
void strip(const QuantArgs& a, std::int64_t m0, std::int64_t m1, std::int64_t first, std::int64_t last, Scratch& own,
           bool past) {
  const std::int64_t across = parts(m1 - m0, kPanelRows), steps = steps_of<T>(a);
  const std::int64_t bytes = 2 * tile_bytes(a.codes) * (T::kNumbers / kStep);  // of a step
  const std::int64_t half = a.gate == nullptr ? 0 : a.n / kPanelRows / 2;
  const auto panel_at = [&](std::int64_t i) { return half == 0 ? i : i % 2 * half + i / 2; };
  const auto weights = [&](std::int64_t i, std::int64_t at) {
    return a.panel(panel_at(i)) + at * bytes;
  };
  Block before{};
  for (std::int64_t step = 0; step < steps; step += kPiece) {
    const std::int64_t count = least(kPiece, steps - step), lines = count * bytes / kLine;
    for (std::int64_t i = first; i < last; ++i) {
      const std::uint8_t* w = weights(i, step);
      if constexpr (T::kMade) T::make(a, panel_at(i), step, step + count, own.w);
      // To prefetch while this piece is multiplied: the next panel's piece, or the first panel's next piece. What
      // follows the last one may not be a weight: prefetching it is harmless.
      const std::uint8_t* next = i + 1 < last           ? weights(i + 1, step)
                                 : step + count < steps ? weights(first, step + count)
                                                        : weights(last, 0);
      for (std::int64_t j = 0; j < across; ++j) {
        const std::int64_t m = m0 + j * kPanelRows, from = j * lines / across, to = (j + 1) * lines / across;
        float* sums = own.sums + ((i - first) * across + j) * 4 * kSums;
        const std::uint8_t* x = a.packed + place<T>(a, m / kPanelRows, step);
        const auto multiply = m1 - m > kTileRows ? multiply_and<T, 2>(a, before) : multiply_and<T, 1>(a, before);
        multiply(T::kMade ? own.w : w, x, count, sums, step > 0, next + from * kLine, to - from, a, before, past);
        before = {};
        if (step + count == steps && (half == 0 || i % 2 == 1)) {
          before = {sums, half == 0 ? nullptr : sums - across * 4 * kSums, m, panel_at(i)};
        }
      }
    }
  }
  half == 0 ? finish<T>(a, before, 0, kPanelRows, past) : finish_gated<T>(a, before, 0, kPanelRows);
}

// Panels [first, last) of w (with a gate, pairs of panels) times any number of rows of x.
template <class T>
void many(const QuantArgs& a, std::int64_t first, std::int64_t last, Scratch& own) {
  const bool past = a.n % kPanelRows == 0 && a.stride % kPanelRows == 0 && reinterpret_cast<std::uintptr_t>(a.y) % kLine == 0;
  const std::int64_t pair = a.gate == nullptr ? 1 : 2;
  for (std::int64_t m = 0; m < a.m; m += kBlock) {
    const std::int64_t end = least(m + kBlock, a.m);
    const std::int64_t length = kWaiting / (parts(end - m, kPanelRows) * 4 * kSums) / pair * pair;
    for (std::int64_t p = first * pair; p < last * pair; p += length) {
      strip<T>(a, m, end, p, least(p + length, last * pair), own, past);
    }
  }
  _mm_sfence();
}

}  // namespace
}  // namespace yoke::kernels::isa_amx
