// Included once by each kernels_<isa>.cpp, which has defined a vector type `V` of `kLanes` floats with
// load/store for each DType, add, mul. Everything lies in an unnamed namespace, and nothing of the
// standard library is used: an inline function that two instruction sets share would be linked once,
// in whichever form came first.

template <DType type, class T>
inline void sum_scalar(T* out, const T* const* source, int n, std::size_t begin, std::size_t count) {
  for (std::size_t i = begin; i < count; ++i) {
    float total = to_float<type>(source[0][i]);
    for (int r = 1; r < n; ++r) total += to_float<type>(source[r][i]);
    out[i] = from_float<type>(total);
  }
}

constexpr std::size_t kAhead = 1024;  // bytes

// kNum sources, or `n` where kNum is 0: small worlds are unrolled.
template <DType type, class T, int kNum>
inline void sum_vectors(T* out, const T* const* source, int n, std::size_t count) {
  const int num = kNum ? kNum : n;
  std::size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    // Lines that a peer has just written come from its cache, one after the other: ask for them early.
    for (int r = 0; r < num; ++r) __builtin_prefetch(source[r] + i + kAhead / sizeof(T));
    V a = load<type>(source[0] + i), b = load<type>(source[0] + i + kLanes);
    for (int r = 1; r < num; ++r) {
      a = add(a, load<type>(source[r] + i));
      b = add(b, load<type>(source[r] + i + kLanes));
    }
    store_pair<type>(out + i, a, b);
  }
  sum_scalar<type>(out, source, num, i, count);
}

template <DType type, class T>
void sum_floats(void* out, const void* const* source, int n, std::size_t count) {
  T* const to = static_cast<T*>(out);
  const T* const* const from = reinterpret_cast<const T* const*>(source);
  switch (n) {
    case 2:
      return sum_vectors<type, T, 2>(to, from, n, count);
    case 4:
      return sum_vectors<type, T, 4>(to, from, n, count);
    default:
      return sum_vectors<type, T, 0>(to, from, n, count);
  }
}

template <class T>
void sum_integers(void* out, const void* const* source, int n, std::size_t count) {
  T* const to = static_cast<T*>(out);
  const T* const* const from = reinterpret_cast<const T* const*>(source);
  constexpr std::size_t kBlock = 256;
  T total[kBlock];
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t size = count - begin < kBlock ? count - begin : kBlock;
    for (std::size_t i = 0; i < size; ++i) total[i] = from[0][begin + i];
    for (int r = 1; r < n; ++r) {
      for (std::size_t i = 0; i < size; ++i) total[i] += from[r][begin + i];
    }
    for (std::size_t i = 0; i < size; ++i) to[begin + i] = total[i];
  }
}

template <DType type, class T>
void add_sum(void* out, const void* const* source, int n, const void* residual, std::size_t count) {
  T* const to = static_cast<T*>(out);
  const T* const* const from = reinterpret_cast<const T* const*>(source);
  const T* const base = static_cast<const T*>(residual);
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    V total = load<type>(from[0] + i);
    for (int r = 1; r < n; ++r) total = add(total, load<type>(from[r] + i));
    store<type>(to + i, add(load<type>(base + i), total));
  }
  for (; i < count; ++i) {
    float total = to_float<type>(from[0][i]);
    for (int r = 1; r < n; ++r) total += to_float<type>(from[r][i]);
    to[i] = from_float<type>(to_float<type>(base[i]) + total);
  }
}

template <DType type, class T>
void rms_norm(void* out, const void* x, const void* weight, float eps, std::size_t count) {
  T* const to = static_cast<T*>(out);
  const T* const from = static_cast<const T*>(x);
  const T* const scale = static_cast<const T*>(weight);
  V squares = zero();
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const V value = load<type>(from + i);
    squares = add(squares, mul(value, value));
  }
  float total = horizontal_sum(squares);
  for (; i < count; ++i) total += to_float<type>(from[i]) * to_float<type>(from[i]);
  const float inverse = 1.0f / __builtin_sqrtf(total / static_cast<float>(count) + eps);
  const V factor = broadcast(inverse);
  for (i = 0; i + kLanes <= count; i += kLanes) {
    // Rounded before the weight, as the models' own code does.
    const V normed = rounded<type>(mul(load<type>(from + i), factor));
    store<type>(to + i, mul(normed, load<type>(scale + i)));
  }
  for (; i < count; ++i) {
    const float normed = to_float<type>(from_float<type>(to_float<type>(from[i]) * inverse));
    to[i] = from_float<type>(normed * to_float<type>(scale[i]));
  }
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          {sum_floats<DType::kFloat32, float>, sum_floats<DType::kBFloat16, std::uint16_t>,
           sum_floats<DType::kFloat16, std::uint16_t>, sum_integers<std::uint32_t>, sum_integers<std::uint64_t>},
          {add_sum<DType::kFloat32, float>, add_sum<DType::kBFloat16, std::uint16_t>,
           add_sum<DType::kFloat16, std::uint16_t>},
          {rms_norm<DType::kFloat32, float>, rms_norm<DType::kBFloat16, std::uint16_t>,
           rms_norm<DType::kFloat16, std::uint16_t>}};
}
