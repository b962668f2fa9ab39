// torch.ops.yoke_kernels.gated_mlp: down(act(gate(x)) * up(x)) with packed weights.
//
// If the kernels support a gate, the activations go through registers from the sums of the first matmul to the tiles
// of the second. They are never written as rows.

#include <algorithm>
#include <string>
#include <vector>

#include "ops_quant.h"

namespace yoke::kernels {
namespace {

Activation activation_of(const std::string& name) {
  YOKE_CHECK(name == "silu" || name == "gelu_tanh", "gated_mlp: no activation '", name, "'");
  return name == "silu" ? Activation::silu : Activation::gelu_tanh;
}

// The activations as rows, the input of `down`.
Tensor gated_rows(Weight& w, Activation activation, bool round_x, const Tensor& like) {
  const std::int64_t width = w.n / 2, m = w.parts[0].m;
  Tensor both = empty({m, w.n}, like.scalar_type()), hidden = empty({m, width}, like.scalar_type());
  set_y(w, numbers(both));
  multiply(w, round_x);
  const bf16* from = both.const_data_ptr<bf16>();
  bf16* to = numbers(hidden);
  parallel_for(0, m, std::max<std::int64_t>(1, 16384 / width), [&](std::int64_t first, std::int64_t last) {
    chosen_quant().gate(activation, from, width, to, first, last);
  });
  return hidden;
}

Tensor gated_mlp(const Tensor& x, const Tensor& up_data, Sizes up_parts, const OptionalTensor& up_bias,
                 const Tensor& down_data, Sizes down_parts, const OptionalTensor& down_bias,
                 const std::string& activation, bool round_x) {
  const Activation act = activation_of(activation);
  Weight up = weight_of("gated_mlp", up_data, up_parts), down = weight_of("gated_mlp", down_data, down_parts);
  const std::int64_t width = up.n / 2;
  YOKE_CHECK(up.n % 2 == 0 && down.k == width, "gated_mlp: ", up.n, " rows of gate and up do not fit ", down.k,
              " columns of down");
  const Tensor rows = set_x(up, x), up_own = set_bias(up, up_bias), down_own = set_bias(down, down_bias);
  std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = down.n;
  const std::int64_t m = up.parts[0].m;
  if (m == 0 || width == 0 || down.n == 0) {
    return rows_of(down_own, shape);
  }
  Tensor y = empty(shape, x.scalar_type()), hidden, held;
  for (QuantArgs& a : down.parts) a.m = m;
  const QuantKernels& kernels = chosen_quant();
  QuantArgs &only_up = up.parts[0], &only_down = down.parts[0];
  const bool rounds = rounds_x(only_up, round_x) || rounds_x(only_down, round_x);
  if (up.is_single() && down.is_single() && kernels.gates != nullptr && kernels.gates(only_up) &&
      kernels.layout(only_down) >= kPacked && !rounds) {
    static thread_local Room room;
    const Gate gate{act, room.of(packed_bytes(m, only_down.k))};
    only_up.gate = &gate;
    set_y(up, nullptr);
    multiply(up, false);
    only_down.packed = gate.hidden;
  } else {
    hidden = gated_rows(up, act, round_x, rows);
    held = set_x(down, hidden);
  }
  set_y(down, numbers(y));
  multiply(down, round_x);
  return y;
}

const Operators operators(
    "yoke_kernels",
    {
        op<gated_mlp>(
            "gated_mlp(Tensor x, Tensor up_data, int[] up_parts, Tensor? up_bias, Tensor down_data, int[] down_parts, "
            "Tensor? down_bias, str activation, bool round_x=False) -> Tensor"),
    });

}  // namespace
}  // namespace yoke::kernels
