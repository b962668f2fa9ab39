// Linears with packed weights in the compiler's vectors, compiled per instruction set. Lanes are rows of w, and each
// number of x is multiplied by all lanes. The sums of a step are scaled and added to the row's total.
#pragma once

#include "lanes.h"
#include "quant.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

inline float float_of_e4m3(uint8_t bits) {
  const float value = as<float>(static_cast<uint32_t>(bits & 0x7f) << 20) * 0x1p120f;
  return (bits & 0x7f) == 0x7f ? as<float>(0x7fc00000u) : (bits & 0x80) != 0 ? -value : value;
}

// kLanes factors, from number `at` of a section on, as floats. `upper`: the upper halves of bytes that have two.
inline Lanes factors(Kind kind, const uint8_t* section, int64_t at, bool upper) {
  switch (kind) {
    case Kind::none: return all(1);
    case Kind::f16: return load(reinterpret_cast<const half*>(section) + at);
    case Kind::f32: return load(reinterpret_cast<const float*>(section) + at);
    case Kind::i8: return load(reinterpret_cast<const int8_t*>(section) + at);
    default: break;
  }
  Ints bytes;
  for (int64_t i = 0; i < kLanes; ++i) bytes[i] = section[at + i];
  switch (kind) {
    case Kind::e8m0: {
      Ints powers = bytes << 23;  // 2^-127 is below the smallest normal number; 255 is not a number
      for (int64_t i = 0; i < kLanes; ++i) {
        powers[i] = bytes[i] == 0 ? 0x00400000 : bytes[i] == 255 ? 0x7fc00000 : powers[i];
      }
      return as<Lanes>(powers);
    }
    case Kind::e4m3: {
      Lanes values;
      for (int64_t i = 0; i < kLanes; ++i) values[i] = float_of_e4m3(static_cast<uint8_t>(bytes[i]));
      return values;
    }
    case Kind::u4: return __builtin_convertvector(upper ? bytes >> 4 : bytes & 15, Lanes);
    default: return __builtin_convertvector(bytes, Lanes);
  }
}

struct Scaling {
  Lanes scale, offset;
};

// Scale and offset of rows [row, row + kLanes) of a tile, for group `group` of a step.
inline Scaling scaling(const QuantArgs& a, const uint8_t* panel, int64_t step, int64_t tile, int64_t group, int64_t row) {
  const int64_t at = ((step * 2 + tile) * a.groups_of_step() + group) * kTileRows + row;
  const int64_t super = (a.super_of(step) * 2 + tile) * kTileRows + row;
  Scaling found;
  found.scale = factors(a.group_kind, panel + a.scales_at, at, false);
  if (a.super_kind != Kind::none) found.scale *= factors(a.super_kind, panel + a.super_scales_at, super, false);
  if (!a.offsets) return found;
  found.offset = factors(a.group_kind, panel + a.offsets_at, at, true);
  if (a.super_kind != Kind::none) found.offset *= factors(a.super_kind, panel + a.super_offsets_at, super, false);
  return found;
}

struct Pair {
  Lanes even, odd;
};

// The bits of pair `pair` in a plane of B bits, for the rows whose words begin at `words`: the first numbers in the
// lowest bits of each lane, the second ones 16 bits higher; other bits are garbage.
template <int B>
inline Ints plane(const uint8_t* words, int64_t pair) {
  constexpr int64_t kFours = 4 / B;  // four pairs at a time that a word has
  const int64_t four = pair / 4, nibble = pair % 4;
  Ints lanes;
  memcpy(&lanes, words + four / kFours * kTileRows * 4, sizeof lanes);
  return lanes >> static_cast<int32_t>(8 * (nibble / 2) + B * (2 * (four % kFours) + nibble % 2));
}

// Pair `pair` of rows [row, row + kLanes) of a tile as codes, the first number in the lower half of a lane.
template <int B>
inline Ints codes_of(const uint8_t* tile, int64_t pair, int64_t row) {
  const uint8_t* words = tile + row * 4;
  constexpr int64_t kPlane = kTileRows * 4;  // bytes of a plane of one bit
  if constexpr (B == 4) return plane<4>(words, pair) & 0x000f000f;
  if constexpr (B == 2) return plane<2>(words, pair) & 0x00030003;
  if constexpr (B == 3) return (plane<2>(words, pair) & 0x00030003) | (plane<1>(words + 2 * kPlane, pair) & 0x00010001) << 2;
  if constexpr (B == 5) return (plane<4>(words, pair) & 0x000f000f) | (plane<1>(words + 4 * kPlane, pair) & 0x00010001) << 4;
  if constexpr (B == 6) return (plane<4>(words, pair) & 0x000f000f) | (plane<2>(words + 4 * kPlane, pair) & 0x00030003) << 4;
}

// What the values of codes are made of, once for each call.
struct Values {
  Ints zero;            // subtracted from codes that are integers
  const float* table;   // or the values of codes that are not, with 16 of them
};

inline Lanes look_up(const float* table, Ints codes) {
  Lanes values;
#if defined(__AVX512F__)
  values = (Lanes)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)codes);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)codes);
  values = (Lanes)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
#else
  for (int64_t i = 0; i < kLanes; ++i) values[i] = table[codes[i]];
#endif
  return values;
}

enum class Form { bf16, i8, e4m3, integers, table };  // how codes become values

constexpr Form form_of(Codes codes) {
  switch (codes) {
    case Codes::bf16: return Form::bf16;
    case Codes::i8: return Form::i8;
    case Codes::e4m3: return Form::e4m3;
    case Codes::iq4:
    case Codes::e2m1: return Form::table;
    default: return Form::integers;
  }
}

// Exponent and mantissa move, and 120 is added to the exponent. Numbers without an exponent are made from their integer:
// arithmetic with subnormal floats is a hundred times slower.
inline Lanes floats_of_e4m3(Ints bytes) {
  const Ints size = (bytes & 0x7f) << 20;
  const Lanes normal = as<Lanes>(size + (120 << 23)), small = __builtin_convertvector(bytes & 7, Lanes) * 0x1p-9f;
  const Lanes value = size < (1 << 23) ? small : normal;
  return as<Lanes>(as<Ints>(value) | (bytes & 0x80) << 24);
}

// Pair `pair` of rows [row, row + kLanes) of a tile, as unscaled numbers.
template <Form F, int B>
inline Pair numbers(const uint8_t* tile, int64_t pair, int64_t row, const Values& values) {
  Ints lanes;
  if constexpr (F == Form::bf16) {
    memcpy(&lanes, tile + (pair * kTileRows + row) * 4, sizeof lanes);
    return {as<Lanes>(lanes << 16), as<Lanes>(lanes >> 16 << 16)};
  } else if constexpr (B == 8) {
    typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
    Shorts both;
    memcpy(&both, tile + (pair * kTileRows + row) * 2, sizeof both);
    lanes = __builtin_convertvector(both, Ints);
    if constexpr (F == Form::e4m3) return {floats_of_e4m3(lanes & 0xff), floats_of_e4m3(lanes >> 8 & 0xff)};
    return {__builtin_convertvector(lanes << 24 >> 24, Lanes), __builtin_convertvector(lanes >> 8, Lanes)};
  } else {
    lanes = codes_of<B>(tile, pair, row);
    const Ints first = lanes & 63, second = lanes >> 16;
    if constexpr (F == Form::table) return {look_up(values.table, first), look_up(values.table, second)};
    return {__builtin_convertvector(first - values.zero, Lanes), __builtin_convertvector(second - values.zero, Lanes)};
  }
}

// M rows of x from m0 on, rows [row, row + kLanes) of a tile of w.
template <Form F, int B, int M>
void lanes_of_tile(const QuantArgs& a, const Values& values, int64_t m0, int64_t panel, int64_t tile, int64_t row) {
  constexpr int64_t kBytes = tile_bytes(B);
  const uint8_t* const start = a.panel(panel);
  const uint8_t* data = start + tile * kBytes;
  const int64_t groups = a.groups_of_step(), pairs = kStep / 2 / groups;
  Lanes totals[M] = {};
  for (int64_t step = 0; step < a.steps(); ++step, data += 2 * kBytes) {
    const float* x = a.x_float + m0 * a.k + step * M * kStep;
    for (int64_t group = 0; group < groups; ++group) {
      Lanes sums[M] = {};
      for (int64_t pair = group * pairs; pair < (group + 1) * pairs; ++pair) {
        const Pair w = numbers<F, B>(data, pair, row, values);
        for (int m = 0; m < M; ++m) {
          sums[m] += w.even * x[m * kStep + 2 * pair];
          sums[m] += w.odd * x[m * kStep + 2 * pair + 1];
        }
      }
      if constexpr (F == Form::bf16) {
        for (int m = 0; m < M; ++m) totals[m] += sums[m];
      } else {
        const Scaling own = scaling(a, start, step, tile, group, row);
        for (int m = 0; m < M; ++m) totals[m] += sums[m] * own.scale;
        if (!a.offsets) continue;
        for (int m = 0; m < M; ++m) {
          const float* both = a.x_sums + 2 * (m0 * a.steps() + step * M + m);
          totals[m] += own.offset * (groups == 2 ? both[group] : both[0] + both[1]);
        }
      }
    }
  }
  const int64_t n = panel * kPanelRows + tile * kTileRows + row;
  for (int m = 0; m < M && m0 + m < a.m; ++m) {
    for (int64_t lane = 0; lane < kLanes && n + lane < a.n; ++lane) {
      const float bias = a.bias == nullptr ? 0.0f : to_float(brain{a.bias[n + lane]});
      brain rounded;
      store(totals[m][lane] + bias, &rounded);
      a.y[(m0 + m) * a.stride + n + lane] = rounded.bits;
    }
  }
}

template <Form F, int B, int M>
void rows_of_panel(const QuantArgs& a, const Values& values, int64_t m0, int64_t panel) {
  for (int64_t tile = 0; tile < 2; ++tile) {
    for (int64_t row = 0; row < kTileRows; row += kLanes) lanes_of_tile<F, B, M>(a, values, m0, panel, tile, row);
  }
}

template <Form F, int B>
void panels(const QuantArgs& a, int64_t first, int64_t last) {
  float table[16];
  for (int code = 0; code < 16; ++code) table[code] = value_unit(a.codes) * integer_value(a.codes, code);
  const Values values{Ints{} - integer_value(a.codes, 0), table};
  for (int64_t panel = first; panel < last; ++panel) {
    each_block(a.m, [&]<int M>(std::int64_t m) { rows_of_panel<F, B, M>(a, values, m, panel); });
  }
}

void quant_linear(const QuantArgs& a, int64_t first, int64_t last) {
  switch (a.codes) {
    case Codes::bf16: return panels<Form::bf16, 16>(a, first, last);
    case Codes::i8: return panels<Form::i8, 8>(a, first, last);
    case Codes::e4m3: return panels<Form::e4m3, 8>(a, first, last);
    case Codes::iq4:
    case Codes::e2m1: return panels<Form::table, 4>(a, first, last);
    case Codes::i4:
    case Codes::u4: return panels<Form::integers, 4>(a, first, last);
    case Codes::u2: return panels<Form::integers, 2>(a, first, last);
    case Codes::i3: return panels<Form::integers, 3>(a, first, last);
    case Codes::i5:
    case Codes::u5: return panels<Form::integers, 5>(a, first, last);
    case Codes::i6: return panels<Form::integers, 6>(a, first, last);
  }
}

int layout(const QuantArgs&) { return kWide; }

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
