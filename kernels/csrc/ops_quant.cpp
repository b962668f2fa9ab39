// torch.ops.yoke_kernels.quant_linear: checks, and the division among threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <utility>
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

namespace {

constexpr std::size_t kFields = 9;  // of a part

std::int64_t lines(std::int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }

Kind kind_of(const char* name, std::int64_t number) {
  YOKE_CHECK(number >= 0 && number < kKinds, name, ": no kind of factors ", number);
  return static_cast<Kind>(number);
}

// One part, whose bytes begin at `start` of `size` bytes.
QuantArgs part_of(const char* name, const std::int64_t* field, const std::uint8_t* data, std::int64_t start,
                  std::int64_t size) {
  YOKE_CHECK(field[0] >= 0 && field[0] < kCodes, name, ": no codes ", field[0]);
  QuantArgs a{};
  a.codes = static_cast<Codes>(field[0]);
  a.n = field[1];
  const std::int64_t k = field[2];
  YOKE_CHECK(a.n >= 0 && k >= 0, name, ": a weight of [", a.n, ", ", k, "]");
  a.k = (k + kStep - 1) / kStep * kStep;
  a.group_kind = kind_of(name, field[3]);
  a.group = field[4];
  a.super_kind = kind_of(name, field[5]);
  a.super_size = field[6];
  a.super_skip = field[7];
  a.offsets = field[8] != 0;
  YOKE_CHECK(a.group_kind == Kind::none ? a.group == 0 : a.group == kStep || a.group == kStep / 2, name,
              ": groups of ", a.group, " numbers: must be 16 or 32");
  YOKE_CHECK(a.super_kind == Kind::none ? a.super_size == 0 : a.super_kind == Kind::f16 || a.super_kind == Kind::f32,
              name, ": factors of super-groups must be float16 or float32");
  YOKE_CHECK(a.super_size >= 0 && a.super_skip >= 0, name, ": super-groups of ", a.super_size, " numbers");
  if (a.super_size > 0 && a.super_skip + k > a.super_size) {
    YOKE_CHECK(a.super_size % kStep == 0 && a.super_skip % kStep == 0 && a.super_skip < a.super_size, name,
                ": super-groups of ", a.super_size, " numbers after ", a.super_skip, ": must be multiples of ", kStep);
  }
  const bool scaled = a.group_kind != Kind::none || a.super_kind != Kind::none;
  YOKE_CHECK(a.codes == Codes::bf16 ? !scaled && !a.offsets : scaled, name, ": weights of codes ", field[0],
              scaled ? " have no scales" : " need scales");
  YOKE_CHECK(a.codes == Codes::bf16 || k % (a.group == 0 ? kStep : a.group) == 0, name, ": rows of ", k,
              " numbers are not whole groups");
  const std::int64_t groups = a.group == 0 ? 0 : a.k / a.group;
  const std::int64_t supers = a.super_size == 0 ? 0 : (a.super_skip + k + a.super_size - 1) / a.super_size;
  const std::int64_t own = lines(groups * kPanelRows * kind_bytes(a.group_kind));
  const std::int64_t above = lines(supers * kPanelRows * kind_bytes(a.super_kind));
  a.scales_at = a.steps() * 2 * tile_bytes(a.codes);
  // Where a byte has both, offsets are read from the same bytes as scales.
  a.offsets_at = a.scales_at + (a.group_kind == Kind::u4 ? 0 : own);
  a.super_scales_at = a.scales_at + own * (a.offsets && a.group_kind != Kind::u4 ? 2 : 1);
  a.super_offsets_at = a.super_scales_at + above;
  a.panel_bytes = a.super_scales_at + above * (a.offsets ? 2 : 1);
  YOKE_CHECK(start + panels_of(a.n) * a.panel_bytes <= size, name, ": a weight of [", a.n, ", ", k, "] needs ",
              panels_of(a.n) * a.panel_bytes, " bytes after the first ", start, ", but there are ", size);
  a.data = data + start;
  return a;
}

}  // namespace

Weight weight_of(const char* name, const Tensor& data, Sizes numbers) {
  YOKE_CHECK(data.scalar_type() == Scalar::u8 && data.is_contiguous(), name,
              ": packed weights must be uint8 and contiguous, not ", data.scalar_type(), " ", data.sizes());
  YOKE_CHECK(!numbers.empty() && numbers.size() % kFields == 0, name, ": a part has ", kFields, " numbers, not ",
              numbers.size());
  Weight w;
  w.k = numbers[2];
  std::int64_t start = 0;
  for (std::size_t i = 0; i < numbers.size(); i += kFields) {
    YOKE_CHECK(numbers[i + 2] == w.k, name, ": parts of ", w.k, " and ", numbers[i + 2], " columns");
    w.parts.push_back(part_of(name, numbers.data + i, data.const_data_ptr<std::uint8_t>(), start, data.numel()));
    start += panels_of(w.parts.back().n) * w.parts.back().panel_bytes;
    w.n += w.parts.back().n;
  }
  YOKE_CHECK(start == data.numel(), name, ": the parts have ", start, " bytes, but there are ", data.numel());
  return w;
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

// The sums of both halves of each step of x, and x as floats if `to` is not null.
void widen(const QuantArgs& a, float* to, float* sums) {
  for (std::int64_t row = 0; row < a.m; ++row) {
    for (std::int64_t step = 0; step < a.steps(); ++step) {
      const bf16* from = a.x + row * a.k + step * kStep;
      float some[kStep], sum[2] = {};
      for (std::int64_t j = 0; j < kStep; ++j) some[j] = to_float(from[j]);
      for (std::int64_t j = 0; j < kStep; ++j) sum[j / (kStep / 2)] += some[j];
      const std::int64_t at = step_at(a, row, step);
      if (to != nullptr) std::memcpy(to + at * kStep, some, sizeof some);
      std::memcpy(sums + 2 * at, sum, sizeof sum);
    }
  }
}

// x in the layouts that the parts of a weight need. Parts of one kind share it.
class Inputs {
 public:
  explicit Inputs(bool round_x) : round_x_(round_x) {}

  void set(QuantArgs& a) {
    if (a.packed != nullptr) return;
    const QuantKernels& kernels = chosen_quant();
    if (rounds_x(a, round_x_)) a.x_scale = scales(a);
    const int layout = kernels.layout(a);
    if (layout == kRowMajor) return;
    if (layout == kWide || layout == kSums) {
      if (sums_ == nullptr || (layout == kWide && floats_ == nullptr)) {
        const std::int64_t rows = padded_rows(a.m);
        held_.push_back(empty({rows * (2 * a.steps() + (layout == kWide ? a.k : 0))}, Scalar::f32));
        float* const sums = held_.back().mutable_data_ptr<float>();
        sums_ = sums;
        float* const floats = layout == kWide ? sums + 2 * rows * a.steps() : nullptr;
        floats_ = floats;
        widen(a, floats, sums);
      }
      a.x_sums = sums_;
      a.x_float = floats_;
      return;
    }
    for (const auto& [known, packed] : packed_) {
      if (known == layout) a.packed = packed;
    }
    if (a.packed != nullptr) return;
    const std::int64_t bytes = packed_bytes(a.m, a.k);
    std::uint8_t* to;
    if (packed_.empty()) {
      static thread_local Room room;
      to = room.of(bytes);
    } else {
      held_.push_back(empty({bytes}, Scalar::u8));
      to = held_.back().mutable_data_ptr<std::uint8_t>();
    }
    parallel_for(0, panels_of(a.m), 1, [&](std::int64_t first, std::int64_t last) { kernels.pack(a, to, first, last); });
    packed_.emplace_back(layout, to);
    a.packed = to;
  }

 private:
  const float* scales(const QuantArgs& a) {
    if (scales_ == nullptr) {
      held_.push_back(empty({a.m}, Scalar::f32));
      scale_rows(a, held_.back().mutable_data_ptr<float>());
      scales_ = held_.back().const_data_ptr<float>();
    }
    return scales_;
  }

  const bool round_x_;
  std::vector<Tensor> held_;
  std::vector<std::pair<int, const std::uint8_t*>> packed_;
  const float *sums_ = nullptr, *floats_ = nullptr, *scales_ = nullptr;
};

}  // namespace

Tensor rows_of(const Tensor& bias, const std::vector<std::int64_t>& shape) {
  Tensor y = zeros(shape, Scalar::bf16);
  if (!bias.defined() || y.numel() == 0) return y;
  for (std::int64_t at = 0; at < y.numel(); at += bias.numel()) {
    std::memcpy(numbers(y) + at, bias.const_data_ptr(), bias.nbytes());
  }
  return y;
}

Tensor set_bias(Weight& w, const OptionalTensor& bias) {
  if (!bias.has_value()) return {};
  YOKE_CHECK(bias->scalar_type() == Scalar::bf16 && bias->dim() == 1 && bias->size(0) == w.n,
              "quant_linear: the bias must be bfloat16 [", w.n, "]");
  Tensor own = bias->contiguous();
  const bf16* from = own.const_data_ptr<bf16>();
  for (QuantArgs& a : w.parts) {
    a.bias = from;
    from += a.n;
  }
  return own;
}

Tensor set_x(Weight& w, const Tensor& x) {
  YOKE_CHECK(x.scalar_type() == Scalar::bf16, "quant_linear: takes bfloat16, not ", x.scalar_type());
  YOKE_CHECK(x.dim() >= 1 && x.size(-1) == w.k, "quant_linear: x ", x.sizes(), " does not fit a weight of [", w.n, ", ",
              w.k, "]");
  // Weights may end within a step and are padded with zeros; so is x.
  const std::int64_t k = w.parts[0].k, missing = k - w.k;
  Tensor rows = missing == 0 ? x.contiguous() : pad_last(x, missing);
  for (QuantArgs& a : w.parts) {
    a.m = k == 0 ? 0 : rows.numel() / k;
    a.x = rows.const_data_ptr<bf16>();
  }
  return rows;
}

void set_y(Weight& w, bf16* y) {
  for (QuantArgs& a : w.parts) {
    a.y = y;
    a.stride = w.n;
    y += a.n;
  }
}

void multiply(Weight& w, bool round_x) {
  const QuantKernels& kernels = chosen_quant();
  Inputs inputs(round_x);
  std::vector<std::int64_t> ends;
  std::int64_t panels = 0;
  for (QuantArgs& a : w.parts) {
    inputs.set(a);
    panels += panels_of(a.n) / (a.gate == nullptr ? 1 : 2);
    ends.push_back(panels);
  }
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / (kPanelRows * w.parts[0].k));
  parallel_for(0, panels, grain, [&](std::int64_t first, std::int64_t last) {
    std::int64_t start = 0;
    for (std::size_t i = 0; i < ends.size(); start = ends[i++]) {
      const std::int64_t from = std::max(first, start), to = std::min(last, ends[i]);
      if (from < to) kernels.linear(w.parts[i], from - start, to - start);
    }
  });
}

namespace {

Tensor quant_linear(const Tensor& x, const Tensor& data, Sizes parts, const OptionalTensor& bias, bool round_x) {
  Weight w = weight_of("quant_linear", data, parts);
  const Tensor rows = set_x(w, x), own_bias = set_bias(w, bias);
  std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = w.n;
  if (w.parts[0].m == 0 || w.n == 0) {
    return rows_of(own_bias, shape);
  }
  Tensor y = empty(shape, x.scalar_type());
  set_y(w, numbers(y));
  multiply(w, round_x);
  return y;
}

// For tests and measurements: the dequantized tiles of matmuls with many rows, [panels, k / 32, 2, 16, 16, 2].
Tensor quant_tiles(const Tensor& data, Sizes part) {
  const Weight w = weight_of("quant_tiles", data, part);
  const QuantArgs& a = w.parts[0];
  YOKE_CHECK(w.is_single() && a.codes != Codes::bf16 && chosen_quant().dequantize != nullptr,
              "quant_tiles: not available on ", current().name);
  const std::int64_t panels = panels_of(a.n);
  Tensor tiles = empty({panels, a.steps(), 2, 16, 16, 2}, Scalar::bf16);
  auto* to = tiles.mutable_data_ptr<bf16>();
  parallel_for(0, panels, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) chosen_quant().dequantize(a, i, 0, a.steps(), to + i * a.k * kPanelRows);
  });
  return tiles;
}

const Operators operators(
    "yoke_kernels",
    {
        op<quant_linear>(
            "quant_linear(Tensor x, Tensor data, int[] parts, Tensor? bias, bool round_x=False) -> Tensor"),
        op<quant_tiles>("quant_tiles(Tensor data, int[] parts) -> Tensor"),
    });

}  // namespace
}  // namespace yoke::kernels
