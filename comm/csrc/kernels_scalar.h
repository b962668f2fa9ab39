// One number at a time: conversions that every instruction set shares, for the ends of rows and for the
// plain path. To be included inside an unnamed namespace (see kernels_impl.h).

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

#if defined(__aarch64__) || defined(__F16C__)
#if defined(__aarch64__)
using Half = __fp16;  // which also compilers know that have no _Float16 in C++ there (g++ before 13)
#else
using Half = _Float16;
#endif
inline float half_to_float(std::uint16_t x) {
  Half half;
  __builtin_memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
}
inline std::uint16_t float_to_half(float x) {
  const auto half = static_cast<Half>(x);
  std::uint16_t bits;
  __builtin_memcpy(&bits, &half, sizeof bits);
  return bits;
}
#else
// Without an instruction for it, in steps that the compiler can do for several numbers at once (after
// Fabian Giesen's "float_to_half" notes); to nearest even, denormal numbers included.
inline float half_to_float(std::uint16_t x) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x & 0x7fffu) << 13;
  const std::uint32_t scaled = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  const std::uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : scaled;
  return bits_to_float(bits | static_cast<std::uint32_t>(x & 0x8000u) << 16);
}
inline std::uint16_t float_to_half(float x) {
  const std::uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffffu;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
  const std::uint32_t tiny = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t usual = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? tiny : usual;
  return static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000u));
}
#endif

template <DType type, class T>
inline float to_float(T x) {
  if constexpr (type == DType::kFloat32) {
    return x;
  } else if constexpr (type == DType::kBFloat16) {
    return bits_to_float(static_cast<std::uint32_t>(x) << 16);
  } else {
    return half_to_float(x);
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
    return float_to_half(x);
  }
}
