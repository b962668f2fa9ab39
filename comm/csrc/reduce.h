// Sums of several buffers with one rounding, in rank order, so that every rank gets the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace yoke {

// out[i] = sum over r of source[r][i]. The 16-bit types are added in fp32 and rounded once, to nearest
// even. `source` holds `num_sources` pointers to `count` elements each; `out` may not overlap them.
void sum_f32(float* out, const float* const* source, int num_sources, std::size_t count);
void sum_bf16(std::uint16_t* out, const std::uint16_t* const* source, int num_sources, std::size_t count);
void sum_f16(std::uint16_t* out, const std::uint16_t* const* source, int num_sources, std::size_t count);

}  // namespace yoke
