// The arithmetic of the collectives: sums of several buffers, and what is fused with them. Written once
// (kernels_impl.h), compiled for several instruction sets, chosen when the process runs.
//
// All sums are taken in fp32 in the order of the sources (the ranks) and rounded once, to nearest even,
// so the bits are the same on every rank and with every instruction set. There are two exceptions: which of
// several NaN survives, and norms, whose sums are taken in another order.
#pragma once

#include <cstddef>
#include <cstdint>

// The instruction sets that are built: 0 the baseline of the architecture, 1 AVX2 too, 2 AVX-512, 3 its bfloat16,
// 4 AMX. build.py passes the highest level that this processor supports.
#ifndef YOKE_LEVEL
#define YOKE_LEVEL 4
#endif

namespace yoke {

enum class DType : std::uint32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt32 = 3, kInt64 = 4, kBytes = 5 };

constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kInt64:
      return 8;
    case DType::kBytes:
      return 1;
  }
  return 0;
}

// out[i] = sum over r of source[r][i]. `out` may be one of the sources, or overlap none.
using SumFunction = void (*)(void* out, const void* const* source, int num_sources, std::size_t count);
// out[i] = residual[i] + sum over r of source[r][i], written to `copy` too unless it is null. Returns the sum of
// the squares of out. `out` may be `residual`.
using AddSumFunction = float (*)(void* out, void* copy, const void* const* source, int num_sources,
                                 const void* residual, std::size_t count);
// out[i] = x[i]. Returns the sum of their squares, with the same bits as add_sum for these numbers. `out` may be `x`.
using CopyFunction = float (*)(void* out, const void* x, std::size_t count);
// Root mean square norm of one row (Zhang and Sennrich, 2019), from the sum of its squares:
// out[i] = round(x[i] / rms) * weight[i].
using NormFunction = void (*)(void* out, const void* x, float squares, const void* weight, float eps,
                              std::size_t count);

struct Kernels {
  const char* name;
  SumFunction sum[5];          // by DType
  AddSumFunction add_sum[3];   // by DType, floating-point types only
  CopyFunction copy[3];
  NormFunction rms_norm[3];
};

// The kernels of the best instruction set that this processor supports.
const Kernels& best_kernels();
// By name ("avx512bf16", "avx512", "avx2", "base"); nullptr if it was not built or this processor does not support it.
const Kernels* find_kernels(const char* name);

}  // namespace yoke
