// AMX (Sapphire Rapids and later): products with quantised weights, from five rows of x on.
//
// Weights become tiles in the first cache, a panel and a piece of k at a time, and are multiplied there by all rows of
// x, which stand on the left as they lie: the sums come out as rows of y, 16 numbers of a row together. Where all rows
// of x are one panel the sums never leave the tiles, and weights are made two steps before they are multiplied, so
// that one unit works while the other does. See kernels_amx.cpp for the blocks.
//
// There are two kinds of tiles, both of 16 rows of 64 bytes: bf16, 32 numbers of k, and int8, 64 of them, where
// weights have one scale a row and x is quantised too. Those sums are exact.
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define YOKE_ISA isa_amx
#include "amx_tiles.h"
#include "gate.h"
#include "quant_amx_few.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

constexpr std::int64_t kRing = 8, kLead = 2;  // steps of w in `few`, and how far they are ahead

const TileConfig kConfigOf8 = TileConfig::of(8);  // in memory for good, as kConfig

struct Scratch {
  alignas(4096) float waiting[kWaiting + 4 * kSums];  // or int32
  alignas(4096) std::uint8_t w[kPiece * 2 * kTile];
};
thread_local Scratch scratch;  // kept, so that it is in the caches already

// Tiles of bf16.
struct Rounded {
  static constexpr std::int64_t kNumbers = 32;

  // 32 numbers of a row of x from k on.
  static __m512i line_of_x(const QuantArgs& a, std::int64_t m, std::int64_t k) { return line(a.x + m * a.k + k); }

  // Steps [first, last) of a panel of w.
  static void make(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last, std::uint8_t* to) {
    dequantise(a, panel, first, last, reinterpret_cast<bf16*>(to));
  }

  static __m512 sums(const float* from) { return _mm512_load_ps(from); }
};

// Tiles of int8: one scale for each row of w, and of x.
struct Whole {
  static constexpr std::int64_t kNumbers = 64;

  static __m512i line_of_x(const QuantArgs& a, std::int64_t m, std::int64_t k) {
    const __m512 inverse = _mm512_set1_ps(a.x_scale[m] > 0.0f ? 1.0f / a.x_scale[m] : 0.0f);
    __m128i quarters[4];
    for (int i = 0; i < 4; ++i) {
      quarters[i] = _mm_setzero_si128();
      if (k + 16 * i >= a.k) continue;
      const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a.x + m * a.k + k + 16 * i));
      const __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
      quarters[i] = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
    }
    const __m512i half = _mm512_inserti32x4(_mm512_castsi128_si512(quarters[0]), quarters[1], 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(half, quarters[2], 2), quarters[3], 3);
  }

  // A line of 64 bytes is two pairs of k of 16 rows, and becomes four numbers of each.
  static void make(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last, std::uint8_t* to) {
    const __m512i fours = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    constexpr std::int64_t kBytes = tile_bytes(Format::i8);
    for (std::int64_t half = 2 * first; half < 2 * last; ++half) {
      const std::uint8_t* from = a.data + (panel * a.steps() + half) * 2 * kBytes;
      std::uint8_t* place = to + (half / 2 - first) * 2 * kTile + half % 2 * kBytes;
      for (int tile = 0; tile < 2; ++tile, from += kBytes, place += kTile) {
        for (std::int64_t i = 0; i < kBytes; i += kLine) {
          const bool is_there = half < a.steps();
          const __m512i numbers = is_there ? _mm512_permutexvar_epi16(fours, line(from + i)) : _mm512_setzero_si512();
          _mm512_store_si512(place + i, numbers);
        }
      }
    }
  }

  static __m512 sums(const float* from) { return _mm512_cvtepi32_ps(_mm512_load_si512(from)); }
};

// Panels [first, last) of x -> tiles, zeros past the end.
template <class T>
void pack_tiles(const QuantArgs& a, std::uint8_t* packed, std::int64_t first, std::int64_t last) {
  const std::int64_t steps = steps_of<T>(a);
  for (std::int64_t panel = first; panel < last; ++panel) {
    for (std::int64_t step = 0; step < steps; step += kPiece) {  // a piece stays in the first cache
      for (std::int64_t r = 0; r < kPanelRows; ++r) {
        const std::int64_t m = panel * kPanelRows + r;
        if (m >= parts(a.m, kTileRows) * kTileRows) break;  // of a tile that nobody reads
        std::uint8_t* to = packed + place<T>(a, panel, step) + r / kTileRows * kTile + r % kTileRows * kLine;
        for (std::int64_t s = step; s < least(step + kPiece, steps); ++s, to += 2 * kTile) {
          _mm512_store_si512(to, m < a.m ? T::line_of_x(a, m, s * T::kNumbers) : _mm512_setzero_si512());
        }
      }
    }
  }
}

inline bool takes_bytes(const QuantArgs& a) { return a.m <= kRowBlock && a.format == Format::i4; }

void pack(const QuantArgs& a, std::uint8_t* packed, std::int64_t first, std::int64_t last) {
  if (takes_bytes(a)) return pack_bytes(a, packed, first, last);
  if (scales_sums(a)) return pack_few(a, packed);
  return a.x_scale != nullptr ? pack_tiles<Whole>(a, packed, first, last)
                              : pack_tiles<Rounded>(a, packed, first, last);
}

// Tiles C += A B: the numbers of tiles are part of the instructions.
#define YOKE_MULTIPLY(c, a, b)          \
  do {                                  \
    if constexpr (T::kNumbers == 64) {  \
      _tile_dpbssd(c, a, b);            \
    } else {                            \
      _tile_dpbf16ps(c, a, b);          \
    }                                   \
  } while (false)

// 16 B rows of x times a panel of w: sums [B][2], tiles 0 to 3.
template <class T, int B>
inline void multiply_step(const std::uint8_t* w, const std::uint8_t* x) {
  _tile_loadd(6, w, kLine);
  _tile_stream_loadd(4, x, kLine);  // shall not push w out of the first cache
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

// The sums begin at zero or at what `sums` has, and end there; those that follow it are asked for, being the next
// that are needed. Not inlined, or the loop's variables would lie on the stack.
template <class T, int B>
__attribute__((noinline)) void multiply(const std::uint8_t* w, const std::uint8_t* x, std::int64_t steps, float* sums,
                                        bool resume) {
  __asm__ volatile("" ::: "memory");  // what is made for the tiles is written: compilers do not see them read it
  clear<B>();
  if (resume) {
    _tile_loadd(0, sums, kLine);
    _tile_loadd(1, sums + kSums, kLine);
    if constexpr (B > 1) {
      _tile_loadd(2, sums + 2 * kSums, kLine);
      _tile_loadd(3, sums + 3 * kSums, kLine);
    }
  }
  const float* next = sums + 4 * kSums;
  for (const std::uint8_t* const end = w + steps * 2 * kTile; w != end; w += 2 * kTile, x += 2 * kTile) {
    multiply_step<T, B>(w, x);
    for (int i = 0; i < 4; ++i) __builtin_prefetch(next + i * 16, 1, 3);
    next += 4 * 16;
  }
  keep<B>(sums);
}

// Sums of rows m to m + 32 of x and of a panel of w, scaled if they are not yet, with the bias, rounded, to y.
// `past`: not by way of the caches, which y, on borders of 64 bytes, would only fill.
template <class T>
void finish(const QuantArgs& a, std::int64_t m, std::int64_t panel, const float* sums, bool past) {
  const std::int64_t n = panel * kPanelRows;
  const __mmask32 mask = first_of(a.n - n);
  __m512 scale[2] = {_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f)}, bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int t = 0; t < 2; ++t) {
    if (a.scaled_last()) scale[t] = scales(a, a.scale, n + t * kTileRows);
    if (a.bias != nullptr) {
      const __m256i some = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask >> (16 * t)), a.bias + n + t * 16);
      bias[t] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
    }
  }
  for (std::int64_t j = 0; j < kPanelRows && m + j < a.m; ++j) {
    const float* row = sums + j / kTileRows * 2 * kSums + j % kTileRows * kTileRows;
    __m512 first = T::sums(row), second = T::sums(row + kSums);
    if (a.x_scale != nullptr) {
      const __m512 own = _mm512_set1_ps(a.x_scale[m + j]);
      first = _mm512_mul_ps(first, own);
      second = _mm512_mul_ps(second, own);
    }
    first = _mm512_fmadd_ps(first, scale[0], bias[0]);
    second = _mm512_fmadd_ps(second, scale[1], bias[1]);
    bf16* y = a.y + (m + j) * a.n + n;
    if (past) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(y), rounded(first, second));
    } else if (mask == ~__mmask32{0}) {
      _mm512_storeu_si512(y, rounded(first, second));
    } else {
      _mm512_mask_storeu_epi16(y, mask, rounded(first, second));
    }
  }
}

// One panel of x.
template <class T, int B>
void few(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  Scratch& own = this_threads(scratch);
  std::uint8_t* const ring = own.w;
  const std::int64_t steps = steps_of<T>(a);
  for (std::int64_t panel = first; panel < last; ++panel) {
    clear<B>();
    T::make(a, panel, 0, least(kLead, steps), ring);
    for (std::int64_t step = 0; step < steps; ++step) {
      const std::int64_t soon = step + kLead;
      if (soon < steps) T::make(a, panel, soon, soon + 1, ring + soon % kRing * 2 * kTile);
      __asm__ volatile("" ::: "memory");
      const std::uint8_t* x = a.packed + place<T>(a, 0, step / kPiece * kPiece) + step % kPiece * 2 * kTile;
      multiply_step<T, B>(ring + step % kRing * 2 * kTile, x);
    }
    keep<B>(own.waiting);
    finish<T>(a, 0, panel, own.waiting, false);
  }
}

// Panels [first, last) of w, of which the sums fit `waiting`, times rows [m0, m1) of x: all panels of w for a piece of
// k, then for the next.
template <class T>
void strip(const QuantArgs& a, std::int64_t m0, std::int64_t m1, std::int64_t first, std::int64_t last) {
  Scratch& own = this_threads(scratch);
  const std::int64_t across = parts(m1 - m0, kPanelRows), steps = steps_of<T>(a);
  const std::int64_t bytes = 2 * tile_bytes(a.format) * (T::kNumbers / kStep);  // of a step
  const bool past = a.n % kPanelRows == 0 && reinterpret_cast<std::uintptr_t>(a.y) % kLine == 0;
  for (std::int64_t step = 0; step < steps; step += kPiece) {
    const std::int64_t end = least(step + kPiece, steps);
    for (std::int64_t panel = first; panel < last; ++panel) {
      T::make(a, panel, step, end, own.w);
      // Asked for while this piece is multiplied: the next panel's, or the first one's next.
      const std::uint8_t* next = panel + 1 < last ? a.data + (panel + 1) * a.panel_bytes() + step * bytes
                                                  : a.data + first * a.panel_bytes() + end * bytes;
      const std::int64_t lines = (end - step) * bytes / kLine;
      for (std::int64_t j = 0; j < across; ++j) {
        const std::int64_t m = m0 + j * kPanelRows;
        float* sums = own.waiting + ((panel - first) * across + j) * 4 * kSums;
        for (std::int64_t i = j * lines / across; i < (j + 1) * lines / across; ++i) {
          _mm_prefetch(reinterpret_cast<const char*>(next + i * kLine), _MM_HINT_T1);
        }
        const std::uint8_t* x = a.packed + place<T>(a, m / kPanelRows, step);
        if (m1 - m > kTileRows) {
          multiply<T, 2>(own.w, x, end - step, sums, step > 0);
        } else {
          multiply<T, 1>(own.w, x, end - step, sums, step > 0);
        }
        if (end == steps) finish<T>(a, m, panel, sums, past);
      }
    }
  }
}

template <class T>
void product(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  if (a.m <= kTileRows) return few<T, 1>(a, first, last);
  if (a.m <= kPanelRows) return few<T, 2>(a, first, last);
  for (std::int64_t m = 0; m < a.m; m += kBlock) {
    const std::int64_t end = least(m + kBlock, a.m);
    const std::int64_t length = kWaiting / (parts(end - m, kPanelRows) * 4 * kSums);
    for (std::int64_t p = first; p < last; p += length) strip<T>(a, m, end, p, least(p + length, last));
  }
  _mm_sfence();
}

bool packs(const QuantArgs& a) { return a.m > kRowBlock || takes_bytes(a); }

bool gates(const QuantArgs& a) {
  return a.format == Format::bf16 && packs(a) && a.m > kFewRows && a.n % (2 * kPanelRows) == 0;
}

void linear_quant(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  if (a.packed == nullptr) return avx512bf16_quant.linear(a, first, last);
  if (takes_bytes(a)) return linear_bytes(a, first, last);
  _tile_loadconfig(scales_sums(a) && few_rows(a.m) == 8 ? &kConfigOf8 : &kConfig);
  if (a.format == Format::bf16) {
    linear_packed(a, first, last);
  } else if (scales_sums(a)) {
    a.format == Format::i4 ? few_scaled<Format::i4>(a, first, last) : few_scaled<Format::i8>(a, first, last);
  } else if (a.x_scale != nullptr) {
    product<Whole>(a, first, last);
  } else {
    product<Rounded>(a, first, last);
  }
  _tile_release();
}

}  // namespace
}  // namespace isa_amx

// What vectors are given the 15 rows are theirs: a few by weights that have a scale a row.
const QuantKernels amx_quant{isa_amx::linear_quant, isa_amx::gate_rows, 15, isa_amx::dequantise, isa_amx::packs, isa_amx::pack,
                             isa_amx::gates};

}  // namespace yoke::kernels

#endif
