// Shared by the operators with packed weights.
#pragma once

#include <vector>

#include "quant.h"
#include "tensor.h"

namespace yoke::kernels {

constexpr std::int64_t kPrompt = 33;  // from this many rows of x on, which only prompts have, x may be rounded

inline const bf16* numbers(const Tensor& x) { return x.const_data_ptr<bf16>(); }
inline bf16* numbers(Tensor& x) { return x.mutable_data_ptr<bf16>(); }

inline std::int64_t panels_of(std::int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// The size of x as `QuantKernels::pack` packs it.
inline std::int64_t packed_bytes(const QuantArgs& a) { return panels_of(a.m) * kPanelRows * (a.k + kStep) * 2; }

inline bool rounds_x(const QuantArgs& a, bool wanted) { return wanted && a.m >= kPrompt && a.scaled_last(); }

// The result of a matmul without terms: the bias in every row of bfloat16 [.., n], or zeros.
Tensor rows_of(const Tensor& bias, const std::vector<std::int64_t>& shape);

// Memory that is kept between calls, so that it is in the caches already.
class Room {
 public:
  std::uint8_t* of(std::int64_t bytes) {
    if (!held_.defined() || static_cast<std::int64_t>(held_.nbytes()) < bytes) held_ = empty({bytes}, Scalar::u8);
    return held_.mutable_data_ptr<std::uint8_t>();
  }

 private:
  Tensor held_;
};

const QuantKernels& chosen_quant();

// The arguments for weights [panels, k / 32, 2, bytes], without x, bias and y. `bits` is 4, 8 or 16 (bf16, which has
// no scales).
QuantArgs weights(const Tensor& data, const OptionalTensor& scale, const OptionalTensor& offset, std::int64_t bits,
                  std::int64_t group, std::int64_t n);

// Both check their argument, and return a tensor that must live as long as `a`. An x without rows sets m = 0.
Tensor set_x(QuantArgs& a, const Tensor& x);
Tensor set_x(QuantArgs& a, Tensor&& x) = delete;  // the result may be a view of x
Tensor set_bias(QuantArgs& a, const OptionalTensor& bias);

// Packs x unless it is packed, and multiplies. m and n are not 0.
void multiply(QuantArgs& a, bool round_x);

}  // namespace yoke::kernels
