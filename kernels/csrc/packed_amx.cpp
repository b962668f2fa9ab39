// AMX (Sapphire Rapids and later): products with weights of bfloat16 that lie packed, from five rows of x on.
//
// A tile of w is a right-hand side as it lies in memory, so nothing is copied or made: few rows of x stay on the left
// while panels of w pass by once, as fast as memory gives them; many rows go through the caches in blocks. See
// kernels_amx.cpp for the idea, quant_amx.cpp for weights that have to be made first.
#if defined(__x86_64__)
#include <immintrin.h>

#define YOKE_ISA isa_amx
#include "amx_tiles.h"
#include "gate.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

// Few rows of x have sums that stay in the first cache beside what is read.
constexpr std::int64_t kStreams = 4;   // for up to 32 of them so many panels are read in turn, else half as many,
constexpr std::int64_t kTurn = 2;      // a page of each: so many steps
constexpr std::int64_t kAhead = 3072;  // bytes of each between what is read and what is asked for
constexpr std::int64_t kRowsAStep = kPanelRows / kPiece;  // of a block that is finished beside the next one's products

struct Brains {
  static constexpr std::int64_t kNumbers = kStep;
};

struct Waiting {
  alignas(4096) float sums[kWaiting + 4 * kSums];
};
thread_local Waiting waiting;  // kept, so that it is in the caches already

// Sums of rows m to m + 32 of x and of a panel of w, [2 of x][2 of w] tiles. With `gate`, those of x and of the panel
// of the first half that goes with it.
struct Block {
  const float* sums;
  const float* gate;
  std::int64_t m, panel;
};

// Of a row and a panel, with the bias, as bf16.
inline __m512i row_of(const QuantArgs& a, const float* sums, std::int64_t j, std::int64_t n) {
  const float* row = sums + j / kTileRows * 2 * kSums + j % kTileRows * kTileRows;
  __m512 both[2] = {_mm512_load_ps(row), _mm512_load_ps(row + kSums)};
  for (int t = 0; t < 2 && a.bias != nullptr; ++t) {
    const auto mask = static_cast<__mmask16>(first_of(a.n - n) >> (16 * t));
    const __m256i bias = _mm256_maskz_loadu_epi16(mask, a.bias + n + t * kTileRows);
    both[t] = _mm512_add_ps(both[t], _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16)));
  }
  return rounded(both[0], both[1]);
}

// Rows [first, last) of a block to y. `past`: not into the caches, of which y would push out what is still needed.
inline void finish(const QuantArgs& a, const Block& block, std::int64_t first, std::int64_t last, bool past) {
  const std::int64_t n = block.panel * kPanelRows;
  for (std::int64_t j = first; j < least(last, a.m - block.m); ++j) {
    bf16* y = a.y + (block.m + j) * a.n + n;
    if (past) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(y), row_of(a, block.sums, j, n));
    } else {
      _mm512_mask_storeu_epi16(y, first_of(a.n - n), row_of(a, block.sums, j, n));
    }
  }
}

inline Lanes floats_of(__m512i both, int half) {
  const __m256i some = half == 0 ? _mm512_castsi512_si256(both) : _mm512_extracti64x4_epi64(both, 1);
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16);
}

// Rows of a block and its gate to the tiles of the next product, whose step is this panel. Those past x are zeros, or
// numbers that nobody looks at.
inline void finish_gated(const QuantArgs& a, const Block& block, std::int64_t first, std::int64_t last) {
  const std::int64_t half = a.n / kPanelRows / 2, step = block.panel - half, piece = step / kPiece * kPiece;
  std::uint8_t* to = a.gate->hidden + place(a.m, half, block.m / kPanelRows, piece) + (step - piece) * 2 * kTile;
  for (std::int64_t j = first; j < last; ++j) {
    const __m512i gate = row_of(a, block.gate, j, step * kPanelRows), up = row_of(a, block.sums, j, block.panel * kPanelRows);
    const auto part = [&](int i) { return (__m512)gated(a.gate->activation, floats_of(gate, i), floats_of(up, i)); };
    _mm512_store_si512(reinterpret_cast<__m512i*>(to + j / kTileRows * kTile + j % kTileRows * kLine), rounded(part(0), part(1)));
  }
}

inline void ask_for(const std::uint8_t* from) {
#pragma GCC unroll 32
  for (std::int64_t i = 0; i < 2 * kTile; i += kLine) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

// 16 B rows of x times a step of a panel. x shall not push w out of the first cache.
template <int B>
inline void multiply_step(const std::uint8_t* w, const std::uint8_t* x) {
  _tile_loadd(6, w, kLine);
  _tile_stream_loadd(4, x, kLine);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, w + kTile, kLine);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (B > 1) {
    _tile_stream_loadd(5, x + kTile, kLine);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The sums so far.
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

// 16 B rows of x times a turn of a panel, added to `sums`. `ask`: for what comes next of it, too.
template <int B>
inline void multiply_turn(const std::uint8_t* w, const std::uint8_t* x, std::int64_t steps, float* sums, bool resume,
                          bool ask) {
  begin<B>(sums, resume);
  for (const std::uint8_t* const end = w + steps * 2 * kTile; w != end; w += 2 * kTile, x += 2 * kTile) {
    if (ask) ask_for(w + kAhead);
    multiply_step<B>(w, x);
  }
  keep<B>(sums);
}

// All rows of x, and `count` panels of w from `panel` on, a page of each in turn.
void few(const QuantArgs& a, std::int64_t panel, std::int64_t count, float* all_sums) {
  const std::int64_t across = parts(a.m, kPanelRows);
  for (std::int64_t turn = 0; turn < a.steps(); turn += kTurn) {
    const std::int64_t steps = least(kTurn, a.steps() - turn), piece = turn / kPiece * kPiece;
    for (std::int64_t p = 0; p < count; ++p) {
      const std::uint8_t* w = a.data + (panel + p) * a.panel_bytes() + turn * 2 * kTile;
      for (std::int64_t j = 0; j < across; ++j) {
        const std::uint8_t* x = a.packed + place<Brains>(a, j, piece) + (turn - piece) * 2 * kTile;
        float* sums = all_sums + (p * across + j) * 4 * kSums;
        if (a.m - j * kPanelRows > kTileRows) {
          multiply_turn<2>(w, x, steps, sums, turn > 0, j == 0);
        } else {
          multiply_turn<1>(w, x, steps, sums, turn > 0, j == 0);
        }
      }
    }
  }
  for (std::int64_t p = 0; p < count; ++p)
    for (std::int64_t j = 0; j < across; ++j) {
      finish(a, {all_sums + (p * across + j) * 4 * kSums, nullptr, j * kPanelRows, panel + p}, 0, kPanelRows, false);
    }
}

// 16 B rows of x times a piece of a panel. The sums begin at zero or at what `sums` has, and end there; those that
// follow are asked for, being the next that are needed, and so are `lines` lines of `ahead` at each step. With F the
// block that was summed before is finished meanwhile, some rows at each step: vectors work while tiles do.
enum class Finish { none, rows, gated };
template <int B, Finish F>
__attribute__((noinline)) void multiply_piece(const std::uint8_t* w, const std::uint8_t* x, std::int64_t steps,
                                              float* sums, bool resume, const std::uint8_t* ahead, std::int64_t lines,
                                              const QuantArgs& a, const Block& before, bool past) {
  begin<B>(sums, resume);
  const float* next = sums + 4 * kSums;
  std::int64_t row = 0;
  for (const std::uint8_t* const end = w + steps * 2 * kTile; w != end; w += 2 * kTile, x += 2 * kTile) {
    multiply_step<B>(w, x);
    for (std::int64_t i = 0; i < lines; ++i, ahead += kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    }
    for (int i = 0; i < 4; ++i) __builtin_prefetch(next + i * 16, 1, 3);
    next += 4 * 16;
    if constexpr (F == Finish::rows) finish(a, before, row, row + kRowsAStep, past);
    if constexpr (F == Finish::gated) finish_gated(a, before, row, row + kRowsAStep);
    row += kRowsAStep;
  }
  if constexpr (F == Finish::rows) finish(a, before, row, kPanelRows, past);
  if constexpr (F == Finish::gated) finish_gated(a, before, row, kPanelRows);
  keep<B>(sums);
}

template <int B>
auto multiply_and(const QuantArgs& a, const Block& before) {
  if (before.sums == nullptr) return multiply_piece<B, Finish::none>;
  return a.gate == nullptr ? multiply_piece<B, Finish::rows> : multiply_piece<B, Finish::gated>;
}

// Panels [first, last) of w, of which the sums fit `waiting`, times rows [m0, m1) of x: all panels of w for a piece of
// k, then for the next. With a gate, panels are counted so that one of the first half goes before its other.
void strip_packed(const QuantArgs& a, std::int64_t m0, std::int64_t m1, std::int64_t first, std::int64_t last,
                  float* all_sums, bool past) {
  const std::int64_t across = parts(m1 - m0, kPanelRows), lines = parts(2 * kTile / kLine, across);
  const std::int64_t half = a.gate == nullptr ? 0 : a.n / kPanelRows / 2;
  const auto panel_at = [&](std::int64_t i) { return half == 0 ? i : i % 2 * half + i / 2; };
  Block before{};
  for (std::int64_t step = 0; step < a.steps(); step += kPiece) {
    const std::int64_t count = least(kPiece, a.steps() - step);
    const auto weights = [&](std::int64_t i, std::int64_t s) { return a.data + panel_at(i) * a.panel_bytes() + s * 2 * kTile; };
    for (std::int64_t i = first; i < last; ++i) {
      const std::uint8_t* w = weights(i, step);
      // Asked for while this piece is multiplied: the next panel's, or the first one's next. Past the last, what
      // follows may be no weight: asking for it is harmless.
      const std::uint8_t* next = i + 1 < last               ? weights(i + 1, step)
                                 : step + count < a.steps() ? weights(first, step + count)
                                                            : weights(last, 0);
      for (std::int64_t j = 0; j < across; ++j, next += count * lines * kLine) {
        const std::int64_t m = m0 + j * kPanelRows;
        float* sums = all_sums + ((i - first) * across + j) * 4 * kSums;
        const std::uint8_t* x = a.packed + place<Brains>(a, m / kPanelRows, step);
        const auto multiply = m1 - m > kTileRows ? multiply_and<2>(a, before) : multiply_and<1>(a, before);
        multiply(w, x, count, sums, step > 0, next, lines, a, before, past);
        before = {};
        if (step + count == a.steps() && (half == 0 || i % 2 == 1)) {
          before = {sums, half == 0 ? nullptr : sums - across * 4 * kSums, m, panel_at(i)};
        }
      }
    }
  }
  half == 0 ? finish(a, before, 0, kPanelRows, past) : finish_gated(a, before, 0, kPanelRows);
}

}  // namespace

void linear_packed(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  float* const sums = waiting.sums;  // compilers call for where a thread's memory is
  if (a.m <= kFewRows) {
    const std::int64_t streams = kStreams / parts(a.m, kPanelRows);
    for (std::int64_t panel = first; panel < last; panel += streams) {
      few(a, panel, least(streams, last - panel), sums);
    }
    return;
  }
  const bool past = a.n % kPanelRows == 0 && reinterpret_cast<std::uintptr_t>(a.y) % kLine == 0;
  for (std::int64_t m = 0; m < a.m; m += kBlock) {
    const std::int64_t end = least(m + kBlock, a.m);
    const std::int64_t pair = a.gate == nullptr ? 1 : 2;
    const std::int64_t length = kWaiting / (parts(end - m, kPanelRows) * 4 * kSums) / pair * pair;
    for (std::int64_t p = first * pair; p < last * pair; p += length) {
      strip_packed(a, m, end, p, least(p + length, last * pair), sums, past);
    }
  }
  _mm_sfence();
}

}  // namespace isa_amx
}  // namespace yoke::kernels

#endif
