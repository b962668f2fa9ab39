// The most that a core's arithmetic does, against which products are measured: once per instruction set.
#pragma once

#include <cstdint>

namespace yoke::kernels::YOKE_ISA {
namespace {

// Products and sums of float vectors that stay in registers, in twelve chains: more than the latency times the
// number of units. Returns the floating-point operations of `rounds` times twelve.
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
  volatile float sink = seen;  // or the loop would be left out
  (void)sink;
  return static_cast<double>(rounds) * kChains * (kBytes / 4) * 2;
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
