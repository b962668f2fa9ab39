// AVX-512 with byte dot products (VNNI: Cascade Lake and later, Zen 4 and later): int4 weights times a few rows of x.
//
// One shift and one mask unpack 64 nibbles to bytes, and an instruction multiplies and sums bytes in groups of four. So
// few rows cost a quarter of the instructions of floats. Each step of 32 numbers of x is quantized to 16-bit integers,
// in units of 1/32512 of its largest number; the upper and the lower bytes are multiplied separately. All sums of a
// step are exact, and then scaled in float. A row has the same bits whatever the other rows are.
#if defined(__x86_64__)
#include <math.h>
#include <string.h>

#define YOKE_ISA isa_avx512vnni
#include "quant_tiles.h"

namespace yoke::kernels {
namespace isa_avx512vnni {
namespace {

constexpr std::int64_t kStreams = 4;    // panels that are read alternately, as in quant_avx512.cpp
constexpr std::int64_t kAhead = 2048;   // the prefetch distance in each, in bytes
constexpr float kLargest = 32512.0f;    // 127 * 256

// A quantized step of a row of x. Byte 4 i + b of `upper` and `lower` is multiplied by byte b of each lane of register
// i / 2 of the weights, after a shift by 4 if i is odd, and a mask.
struct Step {
  std::int8_t upper[kStep], lower[kStep];
  float scale;
  std::int32_t less;  // the initial value of the dot product: -8 times the sum of x if weights are q - 8, else 0
  float sum;          // of the step, for offsets
};

inline __m512 to_floats(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

void round_step(const bf16* x, bool offset, Step& to) {
  // In the order of the nibbles in a lane: of each four pairs 0, 2 | 1, 3, first numbers before second ones.
  const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 23, 19, 22, 18, 21, 17, 20, 16, 15, 11, 14, 10,
                                         13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
  const __m512i numbers = _mm512_permutexvar_epi16(order, line(x));
  const __m512 first = to_floats(_mm512_castsi512_si256(numbers));
  const __m512 second = to_floats(_mm512_extracti64x4_epi64(numbers, 1));
  const __m512 sizes[2] = {_mm512_abs_ps(first), _mm512_abs_ps(second)}, infinite = _mm512_set1_ps(INFINITY);
  const bool is_finite = (_mm512_cmp_ps_mask(sizes[0], infinite, _CMP_LT_OQ) &
                          _mm512_cmp_ps_mask(sizes[1], infinite, _CMP_LT_OQ)) == 0xffff;
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(sizes[0], sizes[1]));
  // Numbers below 1e-34 count as zeros.
  const bool is_usual = is_finite && largest > 1e-34f;
  to.scale = is_usual ? largest / kLargest : is_finite ? 0.0f : NAN;
  const __m512 times = _mm512_set1_ps(is_usual ? kLargest / largest : 0.0f);
  const __m512i half = _mm512_set1_epi32(128);
  const __m512i whole[2] = {_mm512_cvtps_epi32(_mm512_mul_ps(first, times)),
                            _mm512_cvtps_epi32(_mm512_mul_ps(second, times))};
  for (int i = 0; i < 2; ++i) {
    const __m128i upper = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(whole[i], half), 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.upper + 16 * i), upper);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.lower + 16 * i), _mm512_cvtepi32_epi8(whole[i]));
  }
  const std::int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(whole[0], whole[1]));
  to.less = offset ? 0 : -8 * sum;
  to.sum = static_cast<float>(sum) * to.scale;
}

// Packs rows [first, last) of x, in units of 32 rows, in blocks of kRowBlock rows, [step][row].
void pack(const QuantArgs& a, std::uint8_t* packed, std::int64_t first, std::int64_t last) {
  Step* const to = reinterpret_cast<Step*>(packed);
  const std::int64_t end = last * kPanelRows < a.m ? last * kPanelRows : a.m;
  for (std::int64_t m = first * kPanelRows; m < end; ++m) {
    for (std::int64_t step = 0; step < a.steps(); ++step) {
      round_step(a.x + m * a.k + step * kStep, a.offset != nullptr, to[sums_at(a, m, step)]);
    }
  }
}

constexpr std::int64_t kScalesAhead = 64;

inline void prefetch_scales(const QuantArgs& a, std::int64_t at) {
  _mm_prefetch(static_cast<const char*>(a.scale) + at * 2, _MM_HINT_T0);
}

inline __m512i broadcast(const std::int8_t* from) {
  std::int32_t four;
  memcpy(&four, from, sizeof four);
  return _mm512_set1_epi32(four);
}

// Adds one step of two tiles times M rows of x, scaled, to the totals.
template <int M>
inline void multiply(const QuantArgs& a, const std::uint8_t* tiles, const Step* x, std::int64_t at,
                     __m512 (&totals)[2][M]) {
  const __m512i mask = _mm512_set1_epi8(15);
  __m512i upper[2][M], lower[2][M];
  for (int t = 0; t < 2; ++t) {
    for (int m = 0; m < M; ++m) {
      upper[t][m] = _mm512_setzero_si512();
      lower[t][m] = _mm512_set1_epi32(x[m].less);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i v[2] = {line(tiles + 64 * i), line(tiles + tile_bytes(Format::i4) + 64 * i)};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m512i q[2];
      for (int t = 0; t < 2; ++t) q[t] = _mm512_and_si512(j == 0 ? v[t] : _mm512_srli_epi32(v[t], 4), mask);
      for (int m = 0; m < M; ++m) {
        const __m512i high = broadcast(x[m].upper + 8 * i + 4 * j), low = broadcast(x[m].lower + 8 * i + 4 * j);
        for (int t = 0; t < 2; ++t) {
          upper[t][m] = _mm512_dpbusd_epi32(upper[t][m], q[t], high);
          lower[t][m] = _mm512_dpbusd_epi32(lower[t][m], q[t], low);
        }
      }
    }
  }
  for (int t = 0; t < 2; ++t) {
    const __m512 scale = scales(a, a.scale, at + t * kTileRows);
    for (int m = 0; m < M; ++m) {
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(upper[t][m], 8), lower[t][m]);
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x[m].scale));
      totals[t][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, totals[t][m]);
    }
    if (a.offset == nullptr) continue;
    const __m512 offset = scales(a, a.offset, at + t * kTileRows);
    for (int m = 0; m < M; ++m) totals[t][m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x[m].sum), totals[t][m]);
  }
}

// M rows of x from m0 on times `count` panels of w from `panel` on, one step of each panel at a time.
template <int M>
void few(const QuantArgs& a, std::int64_t m0, std::int64_t panel, std::int64_t count) {
  constexpr std::int64_t kBytes = 2 * tile_bytes(Format::i4);
  const std::int64_t steps = a.steps(), steps_of_group = a.group / kStep, scales_of_panel = a.groups() * kPanelRows;
  const std::uint8_t* data = a.data + panel * steps * kBytes;
  const Step* x = reinterpret_cast<const Step*>(a.packed) + m0 * steps;
  __m512 totals[kStreams][2][M];
  for (auto& panels : totals)
    for (auto& tiles : panels)
      for (__m512& total : tiles) total = _mm512_setzero_ps();
  std::int64_t group = panel * scales_of_panel, left = steps_of_group;
  for (std::int64_t step = 0; step < steps; ++step, data += kBytes, x += M) {
    for (std::int64_t p = 0; p < count; ++p) {
      const std::uint8_t* tiles = data + p * steps * kBytes;
#pragma GCC unroll 8
      for (std::int64_t i = 0; i < kBytes; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(tiles + kAhead + i), _MM_HINT_T0);
      }
      prefetch_scales(a, group + p * scales_of_panel + kScalesAhead);
      multiply<M>(a, tiles, x, group + p * scales_of_panel, totals[p]);
    }
    if (--left == 0) {
      left = steps_of_group;
      group += kPanelRows;
    }
  }
  for (std::int64_t p = 0; p < count; ++p)
    for (std::int64_t t = 0; t < 2; ++t)
      for (int m = 0; m < M; ++m) finish(a, m0 + m, (panel + p) * kPanelRows + t * kTileRows, totals[p][t][m]);
}

}  // namespace
}  // namespace isa_avx512vnni

void pack_bytes(const QuantArgs& a, std::uint8_t* packed, std::int64_t first, std::int64_t last) {
  isa_avx512vnni::pack(a, packed, first, last);
}

void linear_bytes(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  using namespace isa_avx512vnni;
  for (std::int64_t panel = first; panel < last; panel += kStreams) {
    const std::int64_t count = last - panel < kStreams ? last - panel : kStreams;
    for (std::int64_t m = 0; m < a.m; m += kRowBlock) {
      switch (a.m - m) {
        case 1: few<1>(a, m, panel, count); break;
        case 2: few<2>(a, m, panel, count); break;
        case 3: few<3>(a, m, panel, count); break;
        default: few<4>(a, m, panel, count); break;
      }
    }
  }
}

}  // namespace yoke::kernels

#endif
