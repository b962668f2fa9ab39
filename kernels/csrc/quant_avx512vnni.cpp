// AVX-512 with byte dot products (VNNI: Cascade Lake and later, Zen 4 and later): codes of up to 6 bits times a few rows
// of x.
//
// A few shifts and masks unpack 64 codes to bytes, and an instruction multiplies and sums bytes in groups of four. So
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

// A quantized step of a row of x. Byte 8 i + 4 j + b of `upper` and `lower` is multiplied by byte b of each lane of
// register i of the weights, j = 0 or 1 (see `Planes::bytes`): so the first 16 numbers of x are the first 16 bytes.
struct Step {
  std::int8_t upper[kStep], lower[kStep];
  float scale;
  std::int32_t whole[2];  // the sums of both halves: for weights that are bytes from a zero on
  float sums[2];          // the same, scaled: for offsets
};

inline __m512 to_floats(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

void round_step(const bf16* x, Step& to) {
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
  for (int i = 0; i < 2; ++i) {
    to.whole[i] = _mm512_reduce_add_epi32(whole[i]);
    to.sums[i] = static_cast<float>(to.whole[i]) * to.scale;
  }
}

// Packs rows [first, last) of x, in units of 32 rows, in blocks of kRowBlock rows, [step][row].
void pack(const QuantArgs& a, std::uint8_t* packed, std::int64_t first, std::int64_t last) {
  Step* const to = reinterpret_cast<Step*>(packed);
  const std::int64_t end = last * kPanelRows < a.m ? last * kPanelRows : a.m;
  for (std::int64_t m = first * kPanelRows; m < end; ++m) {
    for (std::int64_t step = 0; step < a.steps(); ++step) {
      round_step(a.x + m * a.k + step * kStep, to[step_at(a, m, step)]);
    }
  }
}

inline __m512i broadcast(const std::int8_t* from) {
  std::int32_t four;
  memcpy(&four, from, sizeof four);
  return _mm512_set1_epi32(four);
}

// How codes of B bits become bytes from 0 on: as they are, or (T) through a table of 16. G: groups of a step with sums of
// their own.
template <int B, bool T, int G>
struct Form {
  static constexpr int kBits = B, kGroups = G;
  static constexpr bool kTable = T;
};
// Scales and offsets of a step: [tile][group][16 rows].
using Factors = const float (&)[2][2][kTileRows];

// What the bytes of one call are made with.
struct Bytes {
  __m512i table;      // the integers of codes plus `zero`, four times 16 bytes
  std::int32_t zero;  // the byte that stands for 0
  float unit;         // see value_unit; weights with offsets have 1
};

inline Bytes bytes_of(const QuantArgs& a) {
  alignas(16) std::uint8_t table[16];
  const bool is_table = a.codes == Codes::iq4 || a.codes == Codes::e2m1;
  const int zero = is_table ? 128 : -integer_value(a.codes, 0);
  for (int code = 0; code < 16; ++code) table[code] = static_cast<std::uint8_t>(integer_value(a.codes, code) + zero);
  return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), zero, value_unit(a.codes)};
}

// The exact sums of a step: integers of x times bytes of w, for one group of two tiles and M rows.
template <int M>
struct Products {
  __m512i upper[2][M], lower[2][M];
};

template <class F, int M, int I>
inline void multiply_four(const Planes<F::kBits> (&planes)[2], const Bytes& bytes, const Step* x, Products<M>& to) {
  const auto half = [&]<int J>() {
    __m512i q[2];
    for (int t = 0; t < 2; ++t) {
      q[t] = planes[t].template bytes<I, J>();
      if constexpr (F::kTable) q[t] = _mm512_shuffle_epi8(bytes.table, q[t]);
    }
    for (int m = 0; m < M; ++m) {
      const __m512i high = broadcast(x[m].upper + 8 * I + 4 * J), low = broadcast(x[m].lower + 8 * I + 4 * J);
      for (int t = 0; t < 2; ++t) {
        to.upper[t][m] = _mm512_dpbusd_epi32(to.upper[t][m], q[t], high);
        to.lower[t][m] = _mm512_dpbusd_epi32(to.lower[t][m], q[t], low);
      }
    }
  };
  half.template operator()<0>();
  half.template operator()<1>();
}

// Adds the products of a group, scaled, to the totals.
template <class F, int M>
inline void add_group(const QuantArgs& a, Factors scales, Factors offsets, int group, const Step* x,
                      const Products<M>& products, __m512 (&totals)[2][M]) {
  for (int t = 0; t < 2; ++t) {
    const __m512 scale = _mm512_load_ps(scales[t][group]);
    for (int m = 0; m < M; ++m) {
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(products.upper[t][m], 8), products.lower[t][m]);
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x[m].scale));
      totals[t][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, totals[t][m]);
    }
    if (!a.offsets) continue;
    const __m512 offset = _mm512_load_ps(offsets[t][group]);
    for (int m = 0; m < M; ++m) {
      const float sum = F::kGroups == 2 ? x[m].sums[group] : x[m].sums[0] + x[m].sums[1];
      totals[t][m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(sum), totals[t][m]);
    }
  }
}

template <class F, int M>
inline void start(const Bytes& bytes, int group, const Step* x, Products<M>& products) {
  for (int m = 0; m < M; ++m) {
    const std::int32_t sum = F::kGroups == 2 ? x[m].whole[group] : x[m].whole[0] + x[m].whole[1];
    for (int t = 0; t < 2; ++t) {
      products.upper[t][m] = _mm512_setzero_si512();
      products.lower[t][m] = _mm512_set1_epi32(-bytes.zero * sum);
    }
  }
}

// Adds one step of two tiles times M rows of x to the totals.
template <class F, int M>
inline void multiply(const QuantArgs& a, const Bytes& bytes, Factors scales, Factors offsets, const std::uint8_t* tiles,
                     const Step* x, __m512 (&totals)[2][M]) {
  const Planes<F::kBits> planes[2] = {Planes<F::kBits>(tiles), Planes<F::kBits>(tiles + tile_bytes(F::kBits))};
  Products<M> products;
  start<F, M>(bytes, 0, x, products);
  multiply_four<F, M, 0>(planes, bytes, x, products);
  multiply_four<F, M, 1>(planes, bytes, x, products);
  if constexpr (F::kGroups == 2) {
    add_group<F, M>(a, scales, offsets, 0, x, products, totals);
    start<F, M>(bytes, 1, x, products);
  }
  multiply_four<F, M, 2>(planes, bytes, x, products);
  multiply_four<F, M, 3>(planes, bytes, x, products);
  add_group<F, M>(a, scales, offsets, F::kGroups - 1, x, products, totals);
}

thread_local StepFactors made_factors[kStreams];

// M rows of x from m0 on times `count` panels of w from `panel` on, one step of each panel at a time.
template <class F, int M>
void few(const QuantArgs& a, std::int64_t m0, std::int64_t panel, std::int64_t count) {
  constexpr std::int64_t kBytes = 2 * tile_bytes(F::kBits);
  const std::int64_t steps = a.steps();
  const std::uint8_t* data = a.panel(panel);
  const Step* x = reinterpret_cast<const Step*>(a.packed) + m0 * steps;
  const Bytes bytes = bytes_of(a);
  StepFactors(&factors)[kStreams] = this_threads(made_factors);
  __m512 totals[kStreams][2][M];
  for (auto& panels : totals)
    for (auto& tiles : panels)
      for (__m512& total : tiles) total = _mm512_setzero_ps();
  for (std::int64_t step = 0; step < steps; step += kFactorSteps) {
    const std::int64_t some = steps - step < kFactorSteps ? steps - step : kFactorSteps;
    for (std::int64_t p = 0; p < count; ++p) {
      make_factors(a, data + p * a.panel_bytes, step, some, factors[p]);
      prefetch_factors(a, data + p * a.panel_bytes, step + kFactorSteps, kFactorSteps);
    }
    for (std::int64_t i = 0; i < some; ++i, x += M) {
      for (std::int64_t p = 0; p < count; ++p) {
        const std::uint8_t* tiles = data + p * a.panel_bytes + (step + i) * kBytes;
#pragma GCC unroll 12
        for (std::int64_t at = 0; at < kBytes; at += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(tiles + kAhead + at), _MM_HINT_T0);
        }
        multiply<F, M>(a, bytes, factors[p].scale[i], factors[p].offset[i], tiles, x, totals[p]);
      }
    }
  }
  for (std::int64_t p = 0; p < count; ++p)
    for (std::int64_t t = 0; t < 2; ++t)
      for (int m = 0; m < M && m0 + m < a.m; ++m) {
        const __m512 total = _mm512_mul_ps(totals[p][t][m], _mm512_set1_ps(bytes.unit));
        finish(a, m0 + m, (panel + p) * kPanelRows + t * kTileRows, total);
      }
}

template <class F>
void panels(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t panel = first; panel < last; panel += kStreams) {
    const std::int64_t count = last - panel < kStreams ? last - panel : kStreams;
    each_block(a.m, [&]<int M>(std::int64_t m) { few<F, M>(a, m, panel, count); });
  }
}

}  // namespace
}  // namespace isa_avx512vnni

bool takes_bytes(const QuantArgs& a) {
  switch (a.codes) {  // the groups that formats have
    case Codes::u2:
    case Codes::i3:
    case Codes::i6: return a.groups_of_step() == 2;
    case Codes::iq4:
    case Codes::e2m1: return true;
    default: return bits_of(a.codes) <= 6 && a.groups_of_step() == 1;
  }
}

void pack_bytes(const QuantArgs& a, std::uint8_t* packed, std::int64_t first, std::int64_t last) {
  isa_avx512vnni::pack(a, packed, first, last);
}

void linear_bytes(const QuantArgs& a, std::int64_t first, std::int64_t last) {
  using namespace isa_avx512vnni;
  switch (a.codes) {
    case Codes::u2: return panels<Form<2, false, 2>>(a, first, last);
    case Codes::i3: return panels<Form<3, false, 2>>(a, first, last);
    case Codes::i6: return panels<Form<6, false, 2>>(a, first, last);
    case Codes::i5:
    case Codes::u5: return panels<Form<5, false, 1>>(a, first, last);
    case Codes::iq4:
    case Codes::e2m1: return a.groups_of_step() == 2 ? panels<Form<4, true, 2>>(a, first, last)
                                                     : panels<Form<4, true, 1>>(a, first, last);
    default: return panels<Form<4, false, 1>>(a, first, last);
  }
}

}  // namespace yoke::kernels

#endif
