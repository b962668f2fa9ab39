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

// The most that x takes as `QuantKernels::pack` packs it.
inline std::int64_t packed_bytes(std::int64_t m, std::int64_t k) {
  return panels_of(m) * kPanelRows * (k + 2 * kStep) * 3;
}

inline bool rounds_x(const QuantArgs& a, bool wanted) {
  return wanted && a.m >= kPrompt && a.codes == Codes::i8 && a.scaled_last();
}

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

// A packed weight [n, k]: the arguments for each of its parts, without x, bias and y. All have the same k.
struct Weight {
  std::vector<QuantArgs> parts;
  std::int64_t n = 0, k = 0;  // k without padding

  bool is_single() const { return parts.size() == 1; }
};

// `numbers`: those of kernels.quant_linear.Part, for each part; checked against the size of `data`.
Weight weight_of(const char* name, const Tensor& data, Sizes numbers);

// Both check their argument, and return a tensor that must live as long as `w` is used. An x without rows sets m = 0.
Tensor set_x(Weight& w, const Tensor& x);
Tensor set_x(Weight& w, Tensor&& x) = delete;  // the result may be a view of x
Tensor set_bias(Weight& w, const OptionalTensor& bias);
// Where the results go, [m, n] contiguous.
void set_y(Weight& w, bf16* y);

// Packs x unless it is packed, and multiplies. m and n are not 0.
void multiply(Weight& w, bool round_x);

}  // namespace yoke::kernels
