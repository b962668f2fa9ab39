// AMX (Sapphire Rapids and later): tiles of 16 rows of w times up to 32 rows of x.
//
// A tile of w is 16 rows of 32 numbers as they lie in memory, so w needs no other layout: it is x, the smaller
// one, whose pairs are put where the tile instructions want the right-hand side. The product comes out
// transposed, 16 rows of w by 16 rows of x, and is turned as it is rounded.
// Source: Intel, Architecture Instruction Set Extensions Programming Reference, TDPBF16PS.
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define YOKE_ISA isa_amx
#include "impl.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

constexpr std::int64_t kRows = 16;              // of a tile
constexpr std::int64_t kDepth = 32;             // numbers of a tile's row
constexpr std::int64_t kPairs = kRows * kRows;  // of two numbers, in a packed tile

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline __mmask16 first_pairs(std::int64_t count) {
  return count >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
}

// x [m, k] -> tiles [k / 32][m / 16] of [pair][row of x], with zeros past the ends.
void pack(const LinearArgs& a, std::uint32_t* packed) {
  const std::int64_t tiles = (a.m + kRows - 1) / kRows;
  const __m512i down = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kRows));
  for (std::int64_t k = 0; k < a.k; k += kDepth) {
    const std::int64_t left = a.k - k;
    for (std::int64_t t = 0; t < tiles; ++t, packed += kPairs) {
      for (std::int64_t j = 0; j < kRows; ++j) {
        const std::int64_t m = t * kRows + j;
        const __mmask32 mask = left >= kDepth ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
        const __m512i row = m < a.m ? _mm512_maskz_loadu_epi16(mask, a.x + m * a.k + k) : _mm512_setzero_si512();
        _mm512_i32scatter_epi32(packed + j, down, row, 4);
      }
    }
  }
}

// A tile of w of which less than 32 columns are there.
inline void load_rest(const bf16* w, std::int64_t k, std::int64_t left, bf16* rest) {
  const __mmask32 mask = (__mmask32{1} << left) - 1;
  for (std::int64_t r = 0; r < kRows; ++r) {
    _mm512_storeu_si512(rest + r * kDepth, _mm512_maskz_loadu_epi16(mask, w + r * k));
  }
}

// 16 A rows of w from n on, times B tiles of x from tile t on.
template <int A, int B>
inline void block(const LinearArgs& a, std::int64_t n, std::int64_t t, std::int64_t tiles) {
  alignas(64) float sums[4][kPairs];
  alignas(64) bf16 rest[2][kRows * kDepth];
  const bf16* w = a.w + n * a.k;
  _tile_zero(0);
  if constexpr (A > 1) _tile_zero(1);
  if constexpr (B > 1) _tile_zero(2);
  if constexpr (A > 1 && B > 1) _tile_zero(3);
  const std::uint32_t* x = a.packed + t * kPairs;
  const auto multiply = [&](const bf16* first, const bf16* second, std::int64_t stride) {
    _tile_loadd(4, first, stride);
    if constexpr (A > 1) _tile_loadd(5, second, stride);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (A > 1) _tile_dpbf16ps(1, 5, 6);
    if constexpr (B > 1) {
      _tile_loadd(7, x + kPairs, 64);
      _tile_dpbf16ps(2, 4, 7);
      if constexpr (A > 1) _tile_dpbf16ps(3, 5, 7);
    }
    x += tiles * kPairs;
  };
  std::int64_t k = 0;
  for (; k + kDepth <= a.k; k += kDepth) multiply(w + k, w + kRows * a.k + k, a.k * 2);
  if (k < a.k) {
    load_rest(w + k, a.k, a.k - k, rest[0]);
    if constexpr (A > 1) load_rest(w + kRows * a.k + k, a.k, a.k - k, rest[1]);
    multiply(rest[0], rest[1], kDepth * 2);
  }
  _tile_stored(0, sums[0], 64);
  if constexpr (A > 1) _tile_stored(1, sums[1], 64);
  if constexpr (B > 1) _tile_stored(2, sums[2], 64);
  if constexpr (A > 1 && B > 1) _tile_stored(3, sums[3], 64);
  const __m512i down = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kRows));
  for (int i = 0; i < A; ++i) {
    const std::int64_t row = n + i * kRows;
    __m512 bias = _mm512_setzero_ps();
    if (a.bias != nullptr) {
      const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a.bias + row));
      bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
    }
    for (int j = 0; j < B; ++j) {
      for (std::int64_t m = (t + j) * kRows; m < a.m && m < (t + j + 1) * kRows; ++m) {
        const __m512 sum = _mm512_i32gather_ps(down, sums[j * 2 + i] + m % kRows, 4);
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sum, bias));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.y + m * a.n + row), (__m256i)rounded);
      }
    }
  }
}

template <int A>
inline void rows(const LinearArgs& a, std::int64_t n) {
  const std::int64_t tiles = (a.m + kRows - 1) / kRows;
  std::int64_t t = 0;
  for (; t + 2 <= tiles; t += 2) block<A, 2>(a, n, t, tiles);
  if (t < tiles) block<A, 1>(a, n, t, tiles);
}

void linear_tiles(const LinearArgs& a, std::int64_t first, std::int64_t last) {
  if (a.packed == nullptr) return avx512bf16_kernels.linear(a, first, last);
  const TileConfig config;
  _tile_loadconfig(&config);
  std::int64_t n = first;
  for (; n + 2 * kRows <= last; n += 2 * kRows) rows<2>(a, n);
  for (; n + kRows <= last; n += kRows) rows<1>(a, n);
  _tile_release();
  if (n < last) avx512bf16_kernels.linear(a, n, last);
}

}  // namespace
}  // namespace isa_amx

// From four rows of x on; up to 32, the weights are read once.
const Kernels amx_kernels{"amx", isa_amx::linear_tiles, isa_amx::pack, 4, 32};

}  // namespace yoke::kernels

#endif
