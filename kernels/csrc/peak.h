// The peak arithmetic of a core, with which matmuls are compared. Compiled per instruction set.
#pragma once

#include <cstdint>

namespace yoke::kernels::YOKE_ISA {
namespace {

// Multiply-adds of float vectors that stay in registers, in twelve independent chains: more than the latency times
// the number of units. Returns the number of floating-point operations, `rounds` times twelve vectors' worth.
[[maybe_unused]] double vector_peak(std::int64_t rounds) {
#if defined(__AVX512F__)
  constexpr int kBytes = 64;
#elif defined(__AVX2__)
  constexpr int kBytes = 32;
#else
  constexpr int kBytes = 16;
#endif
  typedef float Vector __attribute__((vector_size(kBytes)));
  constexpr int kChains = 12;
  Vector sums[kChains], factor, term;
  for (int lane = 0; lane < kBytes / 4; ++lane) {
    factor[lane] = 0.5f;
    term[lane] = 1.0f;
  }
  for (int c = 0; c < kChains; ++c) sums[c] = term * static_cast<float>(c);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * factor + term;
  }
  float seen = 0;
  for (int c = 0; c < kChains; ++c) seen += sums[c][0];
  volatile float sink = seen;  // keeps the compiler from removing the loop
  (void)sink;
  return static_cast<double>(rounds) * kChains * (kBytes / 4) * 2;
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
