// Plain loops over blocks that fit the first-level cache; the compiler vectorises them. On x86 each
// function is compiled for three levels of the instruction set and the loader picks one when the
// library is opened (GCC's function multiversioning); on Arm the baseline already has NEON.
#include "reduce.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define YOKE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define YOKE_SIMD
#endif
#define YOKE_INLINE inline __attribute__((always_inline))

namespace yoke {
namespace {

constexpr std::size_t kBlock = 1024;  // elements: 4 KiB of fp32 sums stay in the first-level cache

struct Float32 {
  using storage = float;
  static YOKE_INLINE float load(float x) { return x; }
  static YOKE_INLINE float store(float x) { return x; }
};

struct BFloat16 {
  using storage = std::uint16_t;
  static YOKE_INLINE float load(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static YOKE_INLINE std::uint16_t store(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry a NaN into infinity
    return static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  using storage = std::uint16_t;
  static YOKE_INLINE float load(std::uint16_t x) {
    _Float16 half;
    std::memcpy(&half, &x, sizeof half);
    return static_cast<float>(half);
  }
  static YOKE_INLINE std::uint16_t store(float x) {
    const auto half = static_cast<_Float16>(x);
    std::uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
  }
};

template <typename Type>
YOKE_INLINE void sum_blocks(typename Type::storage* out, const typename Type::storage* const* source,
                            int num_sources, std::size_t count) {
  float sum[kBlock];
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t size = std::min(kBlock, count - begin);
    const auto* first = source[0] + begin;
    for (std::size_t i = 0; i < size; ++i) sum[i] = Type::load(first[i]);
    for (int rank = 1; rank < num_sources; ++rank) {
      const auto* next = source[rank] + begin;
      for (std::size_t i = 0; i < size; ++i) sum[i] += Type::load(next[i]);
    }
    for (std::size_t i = 0; i < size; ++i) out[begin + i] = Type::store(sum[i]);
  }
}

}  // namespace

YOKE_SIMD void sum_f32(float* out, const float* const* source, int num_sources, std::size_t count) {
  sum_blocks<Float32>(out, source, num_sources, count);
}
YOKE_SIMD void sum_bf16(std::uint16_t* out, const std::uint16_t* const* source, int num_sources, std::size_t count) {
  sum_blocks<BFloat16>(out, source, num_sources, count);
}
YOKE_SIMD void sum_f16(std::uint16_t* out, const std::uint16_t* const* source, int num_sources, std::size_t count) {
  sum_blocks<Float16>(out, source, num_sources, count);
}

}  // namespace yoke
