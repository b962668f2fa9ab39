// torch.ops.yoke_kernels.quant_linear: checks, and the division among threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

#include "ops_quant.h"

namespace yoke::kernels {

const QuantKernels& chosen_quant() {
  [[maybe_unused]] const std::string_view name = current().name;
#if defined(__x86_64__) && YOKE_LEVEL >= 4
  if (name == "amx") return amx_quant;
#endif
#if defined(__x86_64__) && YOKE_LEVEL >= 3
  if (name == "avx512bf16") return avx512bf16_quant;
#endif
#if defined(__x86_64__) && YOKE_LEVEL >= 2
  if (name == "avx512") return avx512_quant;
#endif
#if defined(__x86_64__) && YOKE_LEVEL >= 1
  if (name == "avx2") return avx2_quant;
#endif
  return base_quant;
}

QuantArgs weights(const Tensor& data, const OptionalTensor& scale, const OptionalTensor& offset,
                  std::int64_t bits, std::int64_t group, std::int64_t n) {
  YOKE_CHECK(bits == 4 || bits == 8 || bits == 16, "quant_linear: weights have 4, 8 or 16 bits, not ", bits);
  const Format format = bits == 4 ? Format::i4 : bits == 8 ? Format::i8 : Format::bf16;
  YOKE_CHECK(data.scalar_type() == Scalar::u8 && data.dim() == 4 && data.size(2) == 2 &&
                  data.size(3) == tile_bytes(format) && data.is_contiguous(),
              "quant_linear: weights of ", bits, " bits must be uint8 and contiguous [panels, steps, 2, ",
              tile_bytes(format), "], not ", data.scalar_type(), " ", data.sizes());
  const std::int64_t panels = data.size(0), k = data.size(1) * kStep;
  YOKE_CHECK(n >= 0 && n <= panels * kPanelRows && n > (panels - 1) * kPanelRows, "quant_linear: ", n,
              " rows do not match ", panels, " panels of ", kPanelRows);
  QuantArgs a{};
  a.data = data.const_data_ptr<std::uint8_t>();
  a.format = format;
  a.n = n;
  a.k = k;
  a.group = group;
  YOKE_CHECK(scale.has_value() == (bits != 16), "quant_linear: weights of 4 or 8 bits have scales, and no others do");
  YOKE_CHECK(!offset.has_value() || scale.has_value(), "quant_linear: offsets without scales");
  if (!scale.has_value()) return a;
  YOKE_CHECK(group >= kStep && group % kStep == 0 && k % group == 0, "quant_linear: groups of ", group,
              " numbers: must be a multiple of ", kStep, " that divides ", k);
  a.half = scale->scalar_type() == Scalar::f16;
  for (const OptionalTensor* each : {&scale, &offset}) {
    if (!each->has_value()) continue;
    const Tensor& x = **each;
    YOKE_CHECK((a.half || x.scalar_type() == Scalar::f32) && x.scalar_type() == scale->scalar_type(),
                "quant_linear: scales and offsets must be all float16 or all float32, not ", x.scalar_type());
    YOKE_CHECK(x.is_contiguous() && x.dim() == 4 && x.size(0) == panels && x.size(1) == k / group && x.size(2) == 2 &&
                    x.size(3) == kTileRows,
                "quant_linear: scales and offsets must be contiguous [", panels, ", ", k / group, ", 2, ", kTileRows,
                "], not ", x.sizes());
  }
  a.scale = scale->const_data_ptr();
  a.offset = offset.has_value() ? offset->const_data_ptr() : nullptr;
  return a;
}

namespace {

float to_float(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The scale of each row of x for rounding it to int8.
void scale_rows(const QuantArgs& a, float* scale) {
  for (std::int64_t i = 0; i < a.m; ++i) {
    float largest = 0;
    for (std::int64_t j = 0; j < a.k; ++j) largest = std::max(largest, std::abs(to_float(a.x[i * a.k + j])));
    scale[i] = largest / 127;
  }
}

// The sum of each step of x, and x as floats if `to` is not null.
void widen(const QuantArgs& a, float* to, float* sums) {
  for (std::int64_t row = 0; row < a.m; ++row) {
    for (std::int64_t step = 0; step < a.steps(); ++step) {
      const bf16* from = a.x + row * a.k + step * kStep;
      float some[kStep], sum = 0;
      for (std::int64_t j = 0; j < kStep; ++j) some[j] = to_float(from[j]);
      for (const float each : some) sum += each;
      const std::int64_t at = sums_at(a, row, step);
      if (to != nullptr) std::memcpy(to + at * kStep, some, sizeof some);
      sums[at] = sum;
    }
  }
}

}  // namespace

Tensor rows_of(const Tensor& bias, const std::vector<std::int64_t>& shape) {
  Tensor y = zeros(shape, Scalar::bf16);
  if (!bias.defined() || y.numel() == 0) return y;
  for (std::int64_t at = 0; at < y.numel(); at += bias.numel()) {
    std::memcpy(numbers(y) + at, bias.const_data_ptr(), bias.nbytes());
  }
  return y;
}

Tensor set_bias(QuantArgs& a, const OptionalTensor& bias) {
  if (!bias.has_value()) return {};
  YOKE_CHECK(bias->scalar_type() == Scalar::bf16 && bias->dim() == 1 && bias->size(0) == a.n,
              "quant_linear: the bias must be bfloat16 [", a.n, "]");
  Tensor own = bias->contiguous();
  a.bias = numbers(own);
  return own;
}

Tensor set_x(QuantArgs& a, const Tensor& x) {
  YOKE_CHECK(x.scalar_type() == Scalar::bf16, "quant_linear: takes bfloat16, not ", x.scalar_type());
  // bfloat16 weights may end within a step and are padded with zeros; so is x.
  const std::int64_t missing = x.dim() == 0 ? 0 : a.k - x.size(-1);
  YOKE_CHECK(x.dim() >= 1 && missing >= 0 && missing < (a.format == Format::bf16 ? kStep : 1), "quant_linear: x ",
              x.sizes(), " does not fit a weight of [", a.n, ", ", a.k, "]");
  Tensor rows = missing == 0 ? x.contiguous() : pad_last(x, missing);
  a.m = a.k == 0 ? 0 : rows.numel() / a.k;
  a.x = numbers(rows);
  return rows;
}

void multiply(QuantArgs& a, bool round_x) {
  const QuantKernels& kernels = chosen_quant();
  Tensor held, x_scale;
  if (a.packed == nullptr && kernels.packs != nullptr && kernels.packs(a)) {
    if (rounds_x(a, round_x)) {
      x_scale = empty({a.m}, Scalar::f32);
      scale_rows(a, x_scale.mutable_data_ptr<float>());
      a.x_scale = x_scale.const_data_ptr<float>();
    }
    static thread_local Room room;
    std::uint8_t* packed = room.of(packed_bytes(a));
    parallel_for(0, panels_of(a.m), 1, [&](std::int64_t first, std::int64_t last) {
      kernels.pack(a, packed, first, last);
    });
    a.packed = packed;
  } else if (a.packed == nullptr) {
    const bool wide = a.m <= kernels.wide_rows;
    held = empty({a.m * (a.steps() + (wide ? a.k : 0))}, Scalar::f32);
    float* sums = held.mutable_data_ptr<float>();
    a.x_sums = sums;
    a.x_float = wide ? sums + a.m * a.steps() : nullptr;
    if (wide || a.offset != nullptr) widen(a, wide ? sums + a.m * a.steps() : nullptr, sums);
  }
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / (kPanelRows * a.k));
  const std::int64_t panels = panels_of(a.n) / (a.gate == nullptr ? 1 : 2);
  parallel_for(0, panels, grain, [&](std::int64_t first, std::int64_t last) { kernels.linear(a, first, last); });
}

namespace {

Tensor quant_linear(const Tensor& x, const Tensor& data, const OptionalTensor& scale,
                        const OptionalTensor& offset, std::int64_t bits, std::int64_t group, std::int64_t n,
                        const OptionalTensor& bias, bool round_x) {
  QuantArgs a = weights(data, scale, offset, bits, group, n);
  const Tensor rows = set_x(a, x), own_bias = set_bias(a, bias);
  std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  if (a.m == 0 || n == 0) {
    return rows_of(own_bias, shape);
  }
  Tensor y = empty(shape, x.scalar_type());
  a.y = numbers(y);
  multiply(a, round_x);
  return y;
}

// For tests and measurements: the dequantized tiles of matmuls with many rows, [panels, k / 32, 2, 16, 16, 2].
Tensor quant_tiles(const Tensor& data, const Tensor& scale, const OptionalTensor& offset,
                       std::int64_t bits, std::int64_t group, std::int64_t n) {
  const QuantArgs a = weights(data, scale, offset, bits, group, n);
  YOKE_CHECK(a.format != Format::bf16 && chosen_quant().dequantize != nullptr, "quant_tiles: not available on ",
              current().name);
  Tensor tiles = empty({data.size(0), a.steps(), 2, 16, 16, 2}, Scalar::bf16);
  auto* to = tiles.mutable_data_ptr<bf16>();
  parallel_for(0, data.size(0), 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) chosen_quant().dequantize(a, i, 0, a.steps(), to + i * a.k * kPanelRows);
  });
  return tiles;
}

const Operators operators(
    "yoke_kernels",
    {
        op<quant_linear>(
            "quant_linear(Tensor x, Tensor data, Tensor? scale, Tensor? offset, int bits, int group_size, int "
            "num_rows, Tensor? bias, bool round_x=False) -> Tensor"),
        op<quant_tiles>(
            "quant_tiles(Tensor data, Tensor scale, Tensor? offset, int bits, int group_size, int num_rows) -> "
            "Tensor"),
    });

}  // namespace
}  // namespace yoke::kernels
