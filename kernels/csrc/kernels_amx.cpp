// AMX (Sapphire Rapids and later): linears with plain row-major weights, from four rows of x on, in cache blocks.
//
// Most weights are packed instead (see packed_amx.cpp); those of engine=hf and routers are not. A tile of w is 16 rows
// of 32 numbers in row-major order, so w needs no other layout. Instead x, the smaller operand, is packed in pairs as
// tile instructions read the right-hand side. The result is transposed, 16 rows of w by 16 rows of x, and is
// transposed back when it is rounded.
//
// Four tiles of sums, 32 rows of w by 32 of x, need four tile loads for four tile multiplications. The L2 cache can
// deliver half of that, so the tiles of w must come from L1. Therefore k is cut into pieces such that 32 rows of w fit
// in L1, and these are copied, because rows a power of two apart would map to the same few cache sets. x is loaded with
// stream loads, which do not evict them. The sums of a piece are kept in the L2 and L3 caches in tile layout. So each
// number of y is one sum in one order, whatever the blocks and the number of rows of x.
// Sources: Intel, Architecture Instruction Set Extensions Programming Reference, TDPBF16PS; Goto and van de
// Geijn, Anatomy of High-Performance Matrix Multiplication (2008), for which operand belongs in which cache.
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define YOKE_ISA isa_amx
#include "impl.h"
#include "peak.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

constexpr std::int64_t kRows = 16;             // rows of a tile
constexpr std::int64_t kDepth = 32;            // numbers in a tile's row
constexpr std::int64_t kTile = kRows * kRows;  // floats, or pairs of numbers, in a tile
constexpr std::int64_t kPanel = 2 * kRows;     // rows of w, and of x, that are multiplied at a time

constexpr std::int64_t kPiece = 512;        // numbers of k: a panel of w is 32 KiB of the 48 KiB L1 cache
constexpr std::int64_t kBlock = 512;        // rows of x: a piece of them is 512 KiB of the 2 MiB L2 cache
constexpr std::int64_t kPitch = kPiece + kDepth;  // numbers from row to row of the copied panel: an odd number of lines
constexpr std::int64_t kWaiting = 1 << 19;  // sums: 2 MiB, prefetched in time. With fewer, x is read more often
constexpr std::int64_t kResident = 1 << 20; // bytes of x that stay whole in the L2 cache

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// A global constant, because compilers do not see that the instruction reads all of it.
const TileConfig kConfig;

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline std::int64_t parts(std::int64_t a, std::int64_t size) { return (a + size - 1) / size; }

inline __mmask32 first_of(std::int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << (count < 0 ? 0 : count)) - 1;
}

// Transposes 16 rows of 16 pairs, `stride` numbers apart. Quarters of rows are combined as they are loaded, which
// halves the number of shuffles compared with a transposition in registers.
inline void transpose(const bf16* from, std::int64_t stride, __m512i (&columns)[16]) {
  const auto quarter = [&](int row, int q) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + row * stride + q * 8));
  };
  for (int q = 0; q < 4; ++q) {
    __m512i rows[4];  // quarter i of rows[r] is from row 4 i + r
    for (int r = 0; r < 4; ++r) {
      rows[r] = _mm512_broadcast_i32x4(quarter(r, q));
      rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x00f0, quarter(4 + r, q));
      rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x0f00, quarter(8 + r, q));
      rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0xf000, quarter(12 + r, q));
    }
    const __m512i low = _mm512_unpacklo_epi32(rows[0], rows[1]), low2 = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i high = _mm512_unpackhi_epi32(rows[0], rows[1]), high2 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    columns[4 * q] = _mm512_unpacklo_epi64(low, low2);
    columns[4 * q + 1] = _mm512_unpackhi_epi64(low, low2);
    columns[4 * q + 2] = _mm512_unpacklo_epi64(high, high2);
    columns[4 * q + 3] = _mm512_unpackhi_epi64(high, high2);
  }
}

// Copies 32 columns of `rows` rows, `stride` numbers apart, to contiguous rows, with zeros past `columns` and for rows
// up to `all`.
inline void copy(const bf16* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, std::int64_t all,
                 bf16* to) {
  const __mmask32 mask = first_of(columns);
  for (std::int64_t r = 0; r < all; ++r) {
    const __m512i row = r < rows ? _mm512_maskz_loadu_epi16(mask, from + r * stride) : _mm512_setzero_si512();
    _mm512_store_si512(to + r * kDepth, row);
  }
}

// Copies a row of `columns` numbers and pads it with zeros to `steps` steps.
inline void copy_row(const bf16* from, std::int64_t columns, std::int64_t steps, bf16* to) {
  const std::int64_t whole = columns / kDepth;
  for (std::int64_t s = 0; s < whole; ++s) {
    _mm512_store_si512(to + s * kDepth, _mm512_loadu_si512(from + s * kDepth));
  }
  for (std::int64_t s = whole; s < steps; ++s) {
    const __mmask32 mask = first_of(columns - s * kDepth);
    _mm512_store_si512(to + s * kDepth, _mm512_maskz_loadu_epi16(mask, from + s * kDepth));
  }
}

// The length of a piece of k in steps of 32 numbers; only the last piece may be shorter.
inline std::int64_t steps_of_piece(std::int64_t k) { return parts(parts(k, kDepth), parts(k, kPiece)); }

// The offset of a panel of x's tiles from `step` on, which is the first step of a piece. The layout is
// [piece][panel][step][2], so that data that is used together is stored together.
inline std::int64_t place(const LinearArgs& a, std::int64_t panel, std::int64_t step) {
  const std::int64_t length = least(steps_of_piece(a.k), parts(a.k, kDepth) - step);
  return (step * parts(a.m, kPanel) + panel * length) * 2 * kTile;
}

// Packs panels [first, last) of x into tiles of [pair][row of x], with zeros past the ends.
void pack(const LinearArgs& a, std::uint32_t* packed, std::int64_t first, std::int64_t last) {
  const std::int64_t steps = parts(a.k, kDepth), piece = steps_of_piece(a.k);
  alignas(64) bf16 rest[kRows * kDepth];
  for (std::int64_t panel = first; panel < last; ++panel) {
    std::uint32_t* to = packed;
    for (std::int64_t step = 0; step < steps; ++step) {
      if (step % piece == 0) to = packed + place(a, panel, step);
      for (std::int64_t t = 0; t < 2; ++t, to += kTile) {
        const std::int64_t m = panel * kPanel + t * kRows, columns = a.k - step * kDepth;
        const bf16* from = a.x + m * a.k + step * kDepth;
        std::int64_t stride = a.k;
        if (m + kRows > a.m || columns < kDepth) {
          copy(from, stride, a.m - m, columns, kRows, rest);
          from = rest;
          stride = kDepth;
        }
        __m512i pairs[16];
        transpose(from, stride, pairs);
        for (std::int64_t i = 0; i < kRows; ++i) _mm512_store_si512(to + i * kRows, pairs[i]);
      }
    }
  }
}

// A panel of w for one piece of k.
struct Weights {
  const bf16* tiles;               // the first 16 rows
  std::int64_t row, step, second;  // numbers from row to row, from step to step, and to the other 16 rows
  std::int64_t steps;
};

// Rows of w of which each step of a matmul prefetches the next 32 numbers.
struct Ahead {
  const bf16* from;
  std::int64_t row, count;
};

// 16 A rows of w times 16 B rows of x. The sums start from zero or from `sums`, [2 of x][2 of w] tiles, and are stored
// there. The sums that follow are prefetched, because they are needed next.
template <int A, int B>
inline void multiply(const Weights& p, const std::uint32_t* x, float* sums, bool resume, Ahead ahead) {
  __asm__ volatile("" ::: "memory");  // finishes the copies: compilers do not see that tiles read them
  _tile_zero(0);
  if constexpr (A > 1) _tile_zero(1);
  if constexpr (B > 1) _tile_zero(2);
  if constexpr (A > 1 && B > 1) _tile_zero(3);
  if (resume) {
    _tile_loadd(0, sums, 64);
    if constexpr (A > 1) _tile_loadd(1, sums + kTile, 64);
    if constexpr (B > 1) _tile_loadd(2, sums + 2 * kTile, 64);
    if constexpr (A > 1 && B > 1) _tile_loadd(3, sums + 3 * kTile, 64);
  }
  const bf16* w = p.tiles;
  const std::int64_t stride = p.row * 2;
  const float* next = sums + 4 * kTile;
  for (std::int64_t i = 0; i < p.steps; ++i) {
    _tile_loadd(4, w, stride);
    _tile_stream_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (A > 1) {
      _tile_loadd(5, w + p.second, stride);
      _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (B > 1) {
      _tile_stream_loadd(7, x + kTile, 64);
      _tile_dpbf16ps(2, 4, 7);
      if constexpr (A > 1) _tile_dpbf16ps(3, 5, 7);
    }
    for (std::int64_t r = 0; r < ahead.count; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead.from + r * ahead.row), _MM_HINT_T1);
    }
    for (int line = 0; line < 4; ++line) __builtin_prefetch(next + line * 16, 1, 3);
    next += 4 * 16;
    ahead.from += kDepth;
    w += p.step;
    x += 2 * kTile;
  }
  _tile_stored(0, sums, 64);
  if constexpr (A > 1) _tile_stored(1, sums + kTile, 64);
  if constexpr (B > 1) _tile_stored(2, sums + 2 * kTile, 64);
  if constexpr (A > 1 && B > 1) _tile_stored(3, sums + 3 * kTile, 64);
}

inline void multiply(std::int64_t n, std::int64_t m, const Weights& p, const std::uint32_t* x, float* sums,
                     bool resume, const Ahead& ahead) {
  if (n > kRows) {
    if (m > kRows) return multiply<2, 2>(p, x, sums, resume, ahead);
    return multiply<2, 1>(p, x, sums, resume, ahead);
  }
  if (m > kRows) return multiply<1, 2>(p, x, sums, resume, ahead);
  return multiply<1, 1>(p, x, sums, resume, ahead);
}

// Adds the bias to the sums of rows [n, n + 32) of w and [m, m + 32) of x, rounds them, and writes them to y.
void finish(const LinearArgs& a, std::int64_t n, std::int64_t m, const float* sums) {
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                       5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const std::int64_t count = least(kPanel, a.n - n);
  alignas(64) float bias[kPanel] = {};
  for (std::int64_t i = 0; a.bias != nullptr && i < count; ++i) bias[i] = to_float(a.bias[n + i]);
  alignas(64) bf16 rounded[kRows * kDepth];
  for (std::int64_t j = 0; j < kPanel && m + j < a.m; j += kRows, sums += 2 * kTile) {
    bf16* y = a.y + (m + j) * a.n + n;
    for (int i = 0; i < 16; ++i) {  // two adjacent numbers of each row of y
      __builtin_prefetch(y + i * a.n + kPanel, 1, 3);
      const __m512 even = _mm512_add_ps(_mm512_load_ps(sums + 32 * i), _mm512_set1_ps(bias[2 * i]));
      const __m512 odd = _mm512_add_ps(_mm512_load_ps(sums + 32 * i + 16), _mm512_set1_ps(bias[2 * i + 1]));
      const __m512i pairs = _mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
      _mm512_store_si512(rounded + i * kDepth, pairs);
    }
    __m512i rows[16];
    transpose(rounded, kDepth, rows);
    for (std::int64_t i = 0; i < kRows && m + j + i < a.m; ++i) {
      _mm512_mask_storeu_epi16(y + i * a.n, first_of(count), rows[i]);
    }
  }
}

struct Scratch {
  alignas(4096) float waiting[kWaiting + 4 * kTile];
  alignas(4096) bf16 w[kPanel * kPitch];
};
thread_local Scratch scratch;  // kept between calls, so that it is in the caches already

// Rows [n0, n1) of w times rows [m0, m1) of x: all panels of w for one piece of k, then for the next. The sums must fit
// in `waiting`.
void multiply_strip(const LinearArgs& a, std::int64_t m0, std::int64_t m1, std::int64_t n0, std::int64_t n1) {
  Scratch& own = scratch;
  const std::int64_t steps = parts(a.k, kDepth), piece = steps_of_piece(a.k);
  const std::int64_t across = parts(m1 - m0, kPanel), down = parts(n1 - n0, kPanel);
  for (std::int64_t step = 0; step < steps; step += piece) {
    const std::int64_t count = least(piece, steps - step), columns = least(count * kDepth, a.k - step * kDepth);
    const bf16* begin = a.w + n0 * a.k + step * kDepth;
    for (std::int64_t i = 0; i < down; ++i) {
      const bf16* w = begin + i * kPanel * a.k;
      const std::int64_t rows = least(kPanel, n1 - n0 - i * kPanel);
      // Past the last strip, the rows that follow may not be weights: prefetching them is harmless.
      const bf16* next = i + 1 < down           ? w + kPanel * a.k
                         : step + count < steps ? begin + count * kDepth
                                                : a.w + n1 * a.k;
      Weights weights{w, a.k, kDepth, kRows * a.k, count};
      if (across > 1 || rows % kRows != 0 || columns % kDepth != 0) {
        for (std::int64_t r = 0; r < kPanel; ++r) {  // row by row, which reads memory fastest
          copy_row(w + r * a.k, r < rows ? columns : 0, count, own.w + r * kPitch);
        }
        weights = {own.w, kPitch, kDepth, kRows * kPitch, count};
      }
      for (std::int64_t j = 0; j < across; ++j) {
        const std::int64_t m = m0 + j * kPanel;
        const std::int64_t first = j * kPanel / across, end = (j + 1) * kPanel / across;
        multiply(rows, m1 - m, weights, a.packed + place(a, m / kPanel, step),
                 own.waiting + (i * across + j) * 4 * kTile, step > 0, {next + first * a.k, a.k, end - first});
      }
    }
  }
  for (std::int64_t j = 0; j < across; ++j) {  // along the rows of y
    for (std::int64_t i = 0; i < down; ++i) {
      finish(a, n0 + i * kPanel, m0 + j * kPanel, own.waiting + (i * across + j) * 4 * kTile);
    }
  }
}

void linear_tiles(const LinearArgs& a, std::int64_t first, std::int64_t last) {
  if (a.packed == nullptr) return avx512bf16_kernels.linear(a, first, last);
  _tile_loadconfig(&kConfig);
  for (std::int64_t m = 0; m < a.m; m += kBlock) {
    const std::int64_t end = least(m + kBlock, a.m), across = parts(end - m, kPanel);
    // If all of x stays in the L2 cache, w is read row by row; else x is read once per strip.
    const bool stays = (end - m) * a.k * 2 <= kResident;
    const std::int64_t strip = stays ? kPanel : kWaiting / (across * kPanel) / kPanel * kPanel;
    for (std::int64_t n = first; n < last; n += strip) multiply_strip(a, m, end, n, least(n + strip, last));
  }
  _tile_release();
}

struct Numbers {
  alignas(64) std::uint32_t pairs[4 * kTile];
  Numbers() {  // of either sign, from 2^-15 to 2: with zeros the core clocks higher than in any real matmul
    std::uint32_t state = 1;
    for (std::uint32_t& pair : pairs) {
      state = state * 1664525 + 1013904223;
      pair = (state & 0x87ff87ffu) | 0x38003800u;
    }
  }
};

// The best case of `multiply`: four tiles loaded from the L1 cache for four tile multiplications.
double peak(std::int64_t rounds) {
  static const Numbers numbers;
  const std::uint32_t* tiles = numbers.pairs;
  _tile_loadconfig(&kConfig);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t i = 0; i < rounds; ++i) {
    _tile_loadd(4, tiles, 64);
    _tile_loadd(6, tiles + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, tiles + 2 * kTile, 64);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, tiles + 3 * kTile, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(rounds) * 4 * 2 * kRows * kRows * kDepth;
}

}  // namespace
}  // namespace isa_amx

// For any number of rows of x from four on.
const Kernels amx_kernels{"amx", isa_amx::linear_tiles, isa_amx::pack, 4, INT64_MAX, isa_amx::peak};

}  // namespace yoke::kernels

#endif
