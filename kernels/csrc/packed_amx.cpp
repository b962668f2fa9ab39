// AMX (Sapphire Rapids and later): linears with packed bfloat16 weights, from five rows of x on.
//
// A packed tile of w can be loaded as a right-hand side directly, so nothing is copied or converted. With few rows of
// x, the panels of w are read once, at the speed of memory; many rows are processed in cache blocks. See
// kernels_amx.cpp for the idea, quant_amx.cpp for weights that must be dequantized first.
#if defined(__x86_64__)
#include <immintrin.h>

#define YOKE_ISA isa_amx
#include "amx_strips.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

// With few rows of x, the sums stay in the L1 cache beside what is read.
constexpr std::int64_t kStreams = 4;   // panels that are read alternately for up to 32 rows of x; else half as many
constexpr std::int64_t kSlice = 2;     // steps of a panel before the next panel's: a page
constexpr std::int64_t kAhead = 3072;  // the prefetch distance in each panel, in bytes

struct Brains {
  static constexpr std::int64_t kNumbers = kStep;
  static constexpr bool kMade = false;

  static __m512 sums(const float* from) { return _mm512_load_ps(from); }
};

inline void prefetch(const std::uint8_t* from) {
#pragma GCC unroll 32
  for (std::int64_t i = 0; i < 2 * kTile; i += kLine) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

// Adds 16 B rows of x times `steps` steps of a panel to `sums`. `prefetching`: also prefetch the panel's next steps.
template <int B>
inline void multiply_slice(const std::uint8_t* w, const std::uint8_t* x, std::int64_t steps, float* sums, bool resume,
                          bool prefetching) {
  begin<B>(sums, resume);
  for (const std::uint8_t* const end = w + steps * 2 * kTile; w != end; w += 2 * kTile, x += 2 * kTile) {
    if (prefetching) prefetch(w + kAhead);
    multiply_step<Brains, B>(w, x);
  }
  keep<B>(sums);
}

// All rows of x times `count` panels of w from `panel` on, one page of each panel at a time.
void few(const QuantArgs& a, std::int64_t panel, std::int64_t count, float* all_sums) {
  const std::int64_t across = parts(a.m, kPanelRows);
  for (std::int64_t slice = 0; slice < a.steps(); slice += kSlice) {
    const std::int64_t steps = least(kSlice, a.steps() - slice), piece = slice / kPiece * kPiece;
    for (std::int64_t p = 0; p < count; ++p) {
      const std::uint8_t* w = a.panel(panel + p) + slice * 2 * kTile;
      for (std::int64_t j = 0; j < across; ++j) {
        const std::uint8_t* x = a.packed + place<Brains>(a, j, piece) + (slice - piece) * 2 * kTile;
        float* sums = all_sums + (p * across + j) * 4 * kSums;
        if (a.m - j * kPanelRows > kTileRows) {
          multiply_slice<2>(w, x, steps, sums, slice > 0, j == 0);
        } else {
          multiply_slice<1>(w, x, steps, sums, slice > 0, j == 0);
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
