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
Tensor gated_rows(QuantArgs& a, Activation activation, bool round_x, const Tensor& like) {
  const std::int64_t width = a.n / 2;
  Tensor both = empty({a.m, a.n}, like.scalar_type()), hidden = empty({a.m, width}, like.scalar_type());
  a.y = numbers(both);
  multiply(a, round_x);
  const bf16* from = a.y;
  bf16* to = numbers(hidden);
  parallel_for(0, a.m, std::max<std::int64_t>(1, 16384 / width), [&](std::int64_t first, std::int64_t last) {
    chosen_quant().gate(activation, from, width, to, first, last);
  });
  return hidden;
}

Tensor gated_mlp(const Tensor& x, const Tensor& up_data, const OptionalTensor& up_scale,
                     const OptionalTensor& up_offset, std::int64_t up_bits, std::int64_t up_group, std::int64_t up_rows,
                     const OptionalTensor& up_bias, const Tensor& down_data, const OptionalTensor& down_scale,
                     const OptionalTensor& down_offset, std::int64_t down_bits, std::int64_t down_group,
                     std::int64_t down_rows, const OptionalTensor& down_bias, const std::string& activation,
                     bool round_x) {
  const Activation act = activation_of(activation);
  QuantArgs up = weights(up_data, up_scale, up_offset, up_bits, up_group, up_rows);
  QuantArgs down = weights(down_data, down_scale, down_offset, down_bits, down_group, down_rows);
  const std::int64_t width = up.n / 2, missing = down.k - width;
  YOKE_CHECK(up.n % 2 == 0 && missing >= 0 && missing < (down.format == Format::bf16 ? kStep : 1), "gated_mlp: ", up.n,
              " rows of gate and up do not fit ", down.k, " columns of down");
  const Tensor rows = set_x(up, x), up_own = set_bias(up, up_bias), down_own = set_bias(down, down_bias);
  std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = down.n;
  if (up.m == 0 || width == 0 || down.n == 0) {
    return rows_of(down_own, shape);
  }
  Tensor y = empty(shape, x.scalar_type()), hidden, held;
  down.m = up.m;
  const QuantKernels& kernels = chosen_quant();
  const bool rounds = rounds_x(up, round_x) || rounds_x(down, round_x);
  if (kernels.gates != nullptr && kernels.gates(up) && kernels.packs(down) && !rounds) {
    static thread_local Room room;
    const Gate gate{act, room.of(packed_bytes(down))};
    up.gate = &gate;
    multiply(up, false);
    down.packed = gate.hidden;
  } else {
    hidden = gated_rows(up, act, round_x, rows);
    held = set_x(down, hidden);
  }
  down.y = numbers(y);
  multiply(down, round_x);
  return y;
}

const Operators operators(
    "yoke_kernels",
    {
        op<gated_mlp>(
            "gated_mlp(Tensor x, Tensor up_data, Tensor? up_scale, Tensor? up_offset, int up_bits, int "
            "up_group_size, int up_num_rows, Tensor? up_bias, Tensor down_data, Tensor? down_scale, Tensor? "
            "down_offset, int down_bits, int down_group_size, int down_num_rows, Tensor? down_bias, str "
            "activation, bool round_x=False) -> Tensor"),
    });

}  // namespace
}  // namespace yoke::kernels
