// AMX (Sapphire Rapids and later): products with weights of bfloat16 that lie packed, from five rows of x on.
//
// A tile of w is a right-hand side as it lies in memory, so nothing is copied or made: few rows of x stay on the left
// while panels of w pass by once, as fast as memory gives them; many rows go through the caches in blocks. See
// kernels_amx.cpp for the idea, quant_amx.cpp for weights that have to be made first.
#if defined(__x86_64__)
#include <immintrin.h>

#define YOKE_ISA isa_amx
#include "amx_strips.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

// Few rows of x have sums that stay in the first cache beside what is read:
constexpr std::int64_t kStreams = 4;   // for up to 32 of them so many panels are read in turn, else half as many,
constexpr std::int64_t kTurn = 2;      // a page of each: so many steps
constexpr std::int64_t kAhead = 3072;  // bytes of each between what is read and what is asked for

struct Brains {
  static constexpr std::int64_t kNumbers = kStep;
  static constexpr bool kMade = false;

  static __m512 sums(const float* from) { return _mm512_load_ps(from); }
};

inline void ask_for(const std::uint8_t* from) {
#pragma GCC unroll 32
  for (std::int64_t i = 0; i < 2 * kTile; i += kLine) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

// 16 B rows of x times a turn of a panel, added to `sums`. `ask`: for what comes next of it, too.
template <int B>
inline void multiply_turn(const std::uint8_t* w, const std::uint8_t* x, std::int64_t steps, float* sums, bool resume,
                          bool ask) {
  begin<B>(sums, resume);
  for (const std::uint8_t* const end = w + steps * 2 * kTile; w != end; w += 2 * kTile, x += 2 * kTile) {
    if (ask) ask_for(w + kAhead);
    multiply_step<Brains, B>(w, x);
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
      finish<Brains>(a, {all_sums + (p * across + j) * 4 * kSums, nullptr, j * kPanelRows, panel + p}, 0, kPanelRows, false);
    }
}

}  // namespace

Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

void linear_packed(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  Scratch& own = scratch();
  if (a.m <= kFewRows) {
    const std::int64_t streams = kStreams / parts(a.m, kPanelRows);
    for (std::int64_t panel = first; panel < last; panel += streams) {
      few(a, panel, least(streams, last - panel), own.sums);
    }
    return;
  }
  many<Brains>(a, first, last, own);
}

}  // namespace isa_amx
}  // namespace yoke::kernels

#endif
