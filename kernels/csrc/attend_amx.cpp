// AMX (Sapphire Rapids and later): a chunk's matmuls in bfloat16 tiles, if its queries are bfloat16. Keys and values
// of other types are converted to bfloat16 block by block; for int8 that is exact.
//
// Keys are the left-hand side in their own layout, 16 keys by 32 numbers; queries are the right-hand side, transposed
// once. For the results (transposed, [number][query]) the values are the left-hand side, transposed per block.
// Source: Intel, Architecture Instruction Set Extensions Programming Reference, TDPBF16PS.
#if defined(__x86_64__)
#include <immintrin.h>

#define YOKE_ISA isa_amx
#include "attend_chunk.h"
#include "attend_rotate.h"

namespace yoke::kernels {
namespace isa_amx {
namespace {

constexpr int64_t kDepth = 32;  // numbers in a tile's row
constexpr int64_t kTile = 256;  // floats or pairs in a tile
constexpr int64_t kAlong = 64;  // numbers of each value that are summed during the softmax

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Finishes stores before tiles are loaded from them: compilers do not see that the instruction reads memory.
inline void settle() { asm volatile("" ::: "memory"); }

// Interleaves two rows of numbers as bfloat16 pairs (a, b).
inline Ints pairs(Lanes a, Lanes b) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  return (Ints)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)both);
}

// 32 numbers as bfloat16; if `count` is less than 32, the rest are zeros.
template <class T>
inline Ints brains(const T* from, int64_t count) {
  const auto part = [&](int64_t i) {
    const int64_t left = count - i;
    return left >= kLanes ? load(from + i) : left > 0 ? load(from + i, left) : Lanes{};
  };
  return (Ints)_mm512_cvtne2ps_pbh((__m512)part(kLanes), (__m512)part(0));
}

inline Ints brains(const brain* from, int64_t count) {
  return (Ints)_mm512_maskz_loadu_epi16(count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1, from);
}

struct Tiles {
  static constexpr int64_t kStep = 32, kParts = 4;

  // Writes tiles [tile][wide / 32] of [pair][query].
  static void queries(const ChunkArgs& a, const Room& room, int64_t row, int64_t wide) {
    const Places places(a, row, a.token_stride, a.q_stride);
    float* to = room.queries + row / kLanes * (wide / kDepth) * kTile;
    for (int64_t d = 0; d < wide; d += kDepth, to += kTile) {
      Ints x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        x[i] = brains(static_cast<const brain*>(a.q) + places.at[i] + d, a.h - d);
      }
      transpose(x);
      memcpy(to, x, sizeof x);
    }
  }

  // Returns the keys themselves if their layout is [key][wide] already; else a copy in that layout.
  template <class T>
  static const brain* keys(const T* k, int64_t count, int64_t h, int64_t wide, const Room& room) {
    if constexpr (sizeof(T) == 2 && __is_same(T, brain)) {
      if (count % kStep == 0 && h == wide) return k;
    }
    brain* const to = reinterpret_cast<brain*>(room.keys);
    for (int64_t t = 0; t < round_up(count, kStep); ++t) {
      for (int64_t d = 0; d < wide; d += kDepth) {
        const Ints x = t < count && d < h ? brains(k + t * h + d, h - d) : Ints{};
        memcpy(to + t * wide + d, &x, sizeof x);
      }
    }
    return to;
  }

  // Writes tiles [key / 32][wide / 16] of [number][key].
  template <class T>
  static void values(const T* v, int64_t unseen, int64_t count, int64_t h, int64_t wide, const Room& room) {
    float* to = room.values;
    constexpr int32_t kUpper = static_cast<int32_t>(0xffff0000u);
    for (int64_t t = 0; t < count; t += kStep) {
      for (int64_t d = 0; d < wide; d += kDepth, to += 2 * kTile) {
        Ints even[kLanes], odd[kLanes];  // pairs of keys, for even and for odd numbers
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t key = t + 2 * i;
          const Ints a = key >= unseen && key < count && d < h ? brains(v + key * h + d, h - d) : Ints{};
          const Ints b = key + 1 >= unseen && key + 1 < count && d < h ? brains(v + (key + 1) * h + d, h - d) : Ints{};
          even[i] = (a & 0xffff) | (b << 16);
          odd[i] = ((a >> 16) & 0xffff) | (b & kUpper);
        }
        transpose(even);
        transpose(odd);
        for (int64_t i = 0; i < kLanes; ++i) {
          memcpy(to + 2 * i * kLanes, &even[i], sizeof even[i]);
          memcpy(to + (2 * i + 1) * kLanes, &odd[i], sizeof odd[i]);
        }
      }
    }
  }

  // 2^(slope * (score - largest)) with a relative error of at most 2^-18, as it is rounded to bfloat16 (2^-9). slope *
  // score is not rounded before the subtraction. 2^x is 2^floor(x) times a polynomial of the rest, which is 1 at 0 and
  // minimizes the largest relative error (by reweighted least squares).
  static Lanes top(Lanes largest, float slope) {
    return larger(largest * slope, all(-0x1p127f));  // finite even if no key was attended to yet
  }

  static Lanes weight(Lanes score, Lanes top, float slope) {
    const __m512 x = _mm512_fmsub_ps((__m512)score, (__m512)all(slope), (__m512)top);
    const Lanes r = (Lanes)_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Lanes p = r * 1.342668441e-2f + 5.224247390e-2f;
    p = p * r + 2.412802050e-1f;
    p = p * r + 6.930448449e-1f;
    p = p * r + 1.0f;
    return (Lanes)_mm512_scalef_ps((__m512)p, x);
  }

  // Writes to tiles [j][key / 32] of [pair][query].
  static void put(const Room& room, int j, int64_t t, Lanes a, Lanes b) {
    const Ints x = pairs(a, b);
    memcpy(room.weights + (j * kKeyBlock + t) / 2 * kLanes, &x, sizeof x);
  }

  static void scores(const Room& room, const brain* k, int64_t, int64_t tile, int64_t num, int64_t from, int64_t to,
                     int64_t wide) {
    const float* q = room.queries + tile * wide / kDepth * kTile;
    if (num == 2) {
      multiply<2>(q, k, from, to, room.scores, wide);
    } else {
      multiply<1>(q, k, from, to, room.scores, wide);
    }
  }

  template <int W>
  static void multiply(const float* q, const brain* k, int64_t from, int64_t to, float* scores, int64_t wide) {
    const float* more = q + wide / kDepth * kTile;
    settle();
    for (int64_t t = from; t < to; t += kStep) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (W > 1) _tile_zero(2);
      if constexpr (W > 1) _tile_zero(3);
      for (int64_t d = 0; d < wide; d += kDepth) {
        _tile_loadd(4, k + t * wide + d, wide * 2);
        _tile_loadd(5, k + (t + 16) * wide + d, wide * 2);
        _tile_loadd(6, q + d / kDepth * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (W > 1) {
          _tile_loadd(7, more + d / kDepth * kTile, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, scores + t * kRow, kRow * 4);
      _tile_stored(1, scores + (t + 16) * kRow, kRow * 4);
      if constexpr (W > 1) {
        _tile_stored(2, scores + t * kRow + kLanes, kRow * 4);
        _tile_stored(3, scores + (t + 16) * kRow + kLanes, kRow * 4);
      }
    }
  }

  // The first kAlong numbers of a tile's sums stay in four tiles while its weights are computed: the matrix unit
  // multiplies the weights of one step while vector units compute the next step's.
  static void begin(const Room& room, int64_t tile, int64_t wide) {
    const float* const sums = room.sums + tile * wide * kLanes;
    settle();
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTile, 64);
    if (wide < kAlong) return;
    _tile_loadd(2, sums + 2 * kTile, 64);
    _tile_loadd(3, sums + 3 * kTile, 64);
  }

  static void weigh_along(const Room& room, int j, int64_t t, int64_t wide, int part) {
    if (part * kLanes >= wide) return;
    const float* const value = room.values + (t / kStep * wide / kLanes + part) * kTile;
    settle();
    if (part == 0) _tile_loadd(6, room.weights + (j * kKeyBlock + t) / 2 * kLanes, 64);
    switch (part) {
      case 0: _tile_loadd(4, value, 64); _tile_dpbf16ps(0, 4, 6); break;
      case 1: _tile_loadd(5, value, 64); _tile_dpbf16ps(1, 5, 6); break;
      case 2: _tile_loadd(4, value, 64); _tile_dpbf16ps(2, 4, 6); break;
      default: _tile_loadd(5, value, 64); _tile_dpbf16ps(3, 5, 6);
    }
  }

  static void end(const Room& room, int64_t tile, int64_t wide) {
    float* const sums = room.sums + tile * wide * kLanes;
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTile, 64);
    if (wide < kAlong) return;
    _tile_stored(2, sums + 2 * kTile, 64);
    _tile_stored(3, sums + 3 * kTile, 64);
  }

  // Adds the numbers of the values from kAlong on.
  static void add(const Room& room, int64_t tile, int64_t num, int64_t from, int64_t to, int64_t wide) {
    float* sums = room.sums + tile * wide * kLanes;
    if (num == 2) {
      weigh<2>(room, from, to, sums, wide);
    } else {
      weigh<1>(room, from, to, sums, wide);
    }
  }

  template <int W>
  static void weigh(const Room& room, int64_t from, int64_t to, float* into, int64_t wide) {
    for (int64_t d = kAlong; d < wide; d += kDepth) {
      float* const first = into + d * kLanes;
      float* const second = first + wide * kLanes;
      _tile_loadd(0, first, 64);
      _tile_loadd(1, first + kTile, 64);
      if constexpr (W > 1) _tile_loadd(2, second, 64);
      if constexpr (W > 1) _tile_loadd(3, second + kTile, 64);
      for (int64_t t = from; t < to; t += kStep) {
        const float* value = room.values + (t / kStep * wide + d) / kLanes * kTile;
        _tile_loadd(4, value, 64);
        _tile_loadd(5, value + kTile, 64);
        _tile_loadd(6, room.weights + t / 2 * kLanes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (W > 1) {
          _tile_loadd(7, room.weights + (kKeyBlock + t) / 2 * kLanes, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, first, 64);
      _tile_stored(1, first + kTile, 64);
      if constexpr (W > 1) _tile_stored(2, second, 64);
      if constexpr (W > 1) _tile_stored(3, second + kTile, 64);
    }
  }
};

void chunk_in_tiles(const ChunkArgs& a) {
  if (a.q_type != Type::bf16) return chunk(a);
  const TileConfig config;
  _tile_loadconfig(&config);
  switch (a.cache_type) {
    case Type::bf16: attend_chunk<Tiles, brain>(a); break;
    case Type::f16: attend_chunk<Tiles, half>(a); break;
    case Type::i8: attend_chunk<Tiles, int8_t>(a); break;
    case Type::f32: break;  // the operator refuses it
  }
  _tile_release();
}

}  // namespace
}  // namespace isa_amx

const Attention amx_attention{isa_amx::token, isa_amx::chunk_in_tiles, isa_amx::write, isa_amx::rotate};

}  // namespace yoke::kernels

#endif
