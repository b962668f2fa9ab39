// What operators with packed weights share.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "quant.h"

namespace yoke::kernels {

using OptionalTensor = std::optional<at::Tensor>;

constexpr std::int64_t kPrompt = 33;  // rows of x from which on they may be rounded: those of a prompt

inline const bf16* numbers(const at::Tensor& x) {
  return reinterpret_cast<const bf16*>(x.const_data_ptr<at::BFloat16>());
}
inline bf16* numbers(at::Tensor& x) { return reinterpret_cast<bf16*>(x.mutable_data_ptr<at::BFloat16>()); }

inline std::int64_t panels_of(std::int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// Of x, as `QuantKernels::pack` lays it out.
inline std::int64_t packed_bytes(const QuantArgs& a) { return panels_of(a.m) * kPanelRows * (a.k + kStep) * 2; }

inline bool rounds_x(const QuantArgs& a, bool wanted) { return wanted && a.m >= kPrompt && a.scaled_last(); }

// Memory that stays with a thread from call to call: that of the last layer is in the caches still.
class Room {
 public:
  std::uint8_t* of(std::int64_t bytes) {
    if (!held_.defined() || static_cast<std::int64_t>(held_.nbytes()) < bytes) held_ = at::empty({bytes}, at::kByte);
    return held_.mutable_data_ptr<std::uint8_t>();
  }

 private:
  at::Tensor held_;
};

const QuantKernels& chosen_quant();

// Of the weights of [panels, k / 32, 2, bytes]: everything but x, bias and y. `bits` is 4, 8 or 16 (bf16, which has
// no scales).
QuantArgs weights(const at::Tensor& data, const OptionalTensor& scale, const OptionalTensor& offset, std::int64_t bits,
                  std::int64_t group, std::int64_t n);

// Both check, and return what has to live as long as the arguments do. An x of no rows has m = 0.
at::Tensor set_x(QuantArgs& a, const at::Tensor& x);
at::Tensor set_bias(QuantArgs& a, const OptionalTensor& bias);

// Lays x out, unless it is, and multiplies. m and n are not 0.
void multiply(QuantArgs& a, bool round_x);

}  // namespace yoke::kernels
