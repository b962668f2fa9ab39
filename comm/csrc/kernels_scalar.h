// One number at a time: conversions that every instruction set shares, for the ends of rows and for the
// plain path. To be included inside an unnamed namespace (see kernels_impl.h).

#if defined(__aarch64__)
using Half = __fp16;  // which also compilers know that have no _Float16 in C++ there (g++ before 13)
#else
using Half = _Float16;
#endif

inline float bits_to_float(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <DType type, class T>
inline float to_float(T x) {
  if constexpr (type == DType::kFloat32) {
    return x;
  } else if constexpr (type == DType::kBFloat16) {
    return bits_to_float(static_cast<std::uint32_t>(x) << 16);
  } else {
    Half half;
    __builtin_memcpy(&half, &x, sizeof half);
    return static_cast<float>(half);
  }
}

template <DType type>
inline auto from_float(float x) {
  if constexpr (type == DType::kFloat32) {
    return x;
  } else if constexpr (type == DType::kBFloat16) {
    const std::uint32_t bits = float_to_bits(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry a NaN into infinity
    return static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded);
  } else {
    const auto half = static_cast<Half>(x);
    std::uint16_t bits;
    __builtin_memcpy(&bits, &half, sizeof bits);
    return bits;
  }
}
