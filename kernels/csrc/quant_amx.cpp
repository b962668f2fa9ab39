// AMX (Sapphire Rapids and later): linears with quantized weights, from five rows of x on.
//
// Weights are dequantized into tiles in the L1 cache, one panel and a piece of k at a time, and multiplied there by all
// rows of x. x is the left-hand side, row-major, so the sums come out as rows of y, 16 numbers of a row together. If x
// is a single panel, the sums never leave the tiles, and weights are dequantized two steps before they are multiplied,
// so that vector and matrix units work at the same time. See kernels_amx.cpp for the blocks.
//
// There are two kinds of tiles, both of 16 rows of 64 bytes: bf16, with 32 numbers of k, and int8, with 64 of them,
// where weights have one scale per row and x is quantized too. The int8 sums are exact.
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define YOKE_ISA isa_amx
#include "amx_strips.h"
#include "quant_amx_few.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

constexpr std::int64_t kRing = 8, kLead = 2;  // in `few`: steps of w in the buffer, and steps dequantized ahead

// bf16 tiles.
struct Rounded {
  static constexpr std::int64_t kNumbers = 32;
  static constexpr bool kMade = true;

  // 32 numbers of a row of x from k on.
  static __m512i line_of_x(const QuantArgs& a, std::int64_t m, std::int64_t k) { return line(a.x + m * a.k + k); }

  // Dequantizes steps [first, last) of a panel of w.
  static void make(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last, std::uint8_t* to) {
    dequantize(a, panel, first, last, reinterpret_cast<bf16*>(to));
  }

  static __m512 sums(const float* from) { return _mm512_load_ps(from); }
};

// int8 tiles: one scale per row of w and per row of x.
struct Whole {
  static constexpr std::int64_t kNumbers = 64;
  static constexpr bool kMade = true;

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

  // A line of 64 bytes has two pairs of k for 16 rows; it becomes four consecutive numbers of each row.
  static void make(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last, std::uint8_t* to) {
    const __m512i fours = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    constexpr std::int64_t kBytes = tile_bytes(Codes::i8);
    for (std::int64_t half = 2 * first; half < 2 * last; ++half) {
      const std::uint8_t* from = a.panel(panel) + half * 2 * kBytes;
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

// Packs panels [first, last) of x into tiles, with zeros past the end.
template <class T>
void pack_tiles(const QuantArgs& a, std::uint8_t* packed, std::int64_t first, std::int64_t last) {
  const std::int64_t steps = steps_of<T>(a);
  for (std::int64_t panel = first; panel < last; ++panel) {
    for (std::int64_t step = 0; step < steps; step += kPiece) {  // a piece stays in the L1 cache
      for (std::int64_t r = 0; r < kPanelRows; ++r) {
        const std::int64_t m = panel * kPanelRows + r;
        if (m >= parts(a.m, kTileRows) * kTileRows) break;  // the row is in a tile that is never read
        std::uint8_t* to = packed + place<T>(a, panel, step) + r / kTileRows * kTile + r % kTileRows * kLine;
        for (std::int64_t s = step; s < least(step + kPiece, steps); ++s, to += 2 * kTile) {
          _mm512_store_si512(to, m < a.m ? T::line_of_x(a, m, s * T::kNumbers) : _mm512_setzero_si512());
        }
      }
    }
  }
}

inline bool is_of_bytes(const QuantArgs& a) { return a.m <= kRowBlock && takes_bytes(a); }

enum AmxLayout : int { kBytesOfX = kPacked, kFewOfX, kWholeOfX, kTilesOfX };

int layout(const QuantArgs& a) {
  if (is_of_bytes(a)) return kBytesOfX;
  if (a.m <= kRowBlock) return avx512bf16_quant.layout(a);
  if (scales_sums(a)) return kFewOfX;
  return a.x_scale != nullptr ? kWholeOfX : kTilesOfX;
}

void pack(const QuantArgs& a, std::uint8_t* packed, std::int64_t first, std::int64_t last) {
  switch (layout(a)) {
    case kBytesOfX: return pack_bytes(a, packed, first, last);
    case kFewOfX: return pack_few(a, packed);
    case kWholeOfX: return pack_tiles<Whole>(a, packed, first, last);
    default: return pack_tiles<Rounded>(a, packed, first, last);
  }
}

// The linear for a single panel of x.
template <class T, int B>
void few(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  Scratch& own = scratch();
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
    keep<B>(own.sums);
    finish<T>(a, {own.sums, nullptr, 0, panel}, 0, kPanelRows, false);
  }
}

template <class T>
void matmul(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  if (a.m <= kTileRows) return few<T, 1>(a, first, last);
  if (a.m <= kPanelRows) return few<T, 2>(a, first, last);
  many<T>(a, first, last, scratch());
}

bool gates(const QuantArgs& a) {
  return a.m > kFewRows && a.n % (2 * kPanelRows) == 0;
}

void linear_quant(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  if (a.packed == nullptr) return avx512bf16_quant.linear(a, first, last);
  if (is_of_bytes(a)) return linear_bytes(a, first, last);
  const TileConfig of_few = few_config(a);
  // Read through a pointer that the compiler does not know: it does not see that the instruction reads all of it.
  const TileConfig* config = scales_sums(a) ? &of_few : &kConfig;
  __asm__ volatile("" : "+r"(config) : : "memory");
  _tile_loadconfig(config);
  if (a.codes == Codes::bf16) {
    linear_packed(a, first, last);
  } else if (scales_sums(a)) {
    few_scaled(a, first, last);
  } else if (a.x_scale != nullptr) {
    matmul<Whole>(a, first, last);
  } else {
    matmul<Rounded>(a, first, last);
  }
  _tile_release();
}

}  // namespace
}  // namespace isa_amx

const QuantKernels amx_quant{isa_amx::linear_quant, isa_amx::gate_rows, isa_amx::dequantize, isa_amx::layout, isa_amx::pack,
                             isa_amx::gates};

}  // namespace yoke::kernels

#endif
