// Included once by each kernels_<isa>.cpp. That file defines a vector type `V` of `kLanes` floats with add and
// mul, and for each DType rounded, load_pair, store_pair (of any numbers) and store_rounded (of numbers that
// are rounded already). A pair is 2 * kLanes adjacent numbers, divided between two vectors in the cheapest
// order; load and store use the same order. Everything is in an unnamed namespace, and nothing of the
// standard library is used: the linker would keep one copy of an inline function that two instruction sets
// share, whichever came first.

template <DType type, class T>
inline void sum_scalar(T* out, const T* const* source, int n, std::size_t begin, std::size_t count) {
  for (std::size_t i = begin; i < count; ++i) {
    float total = to_float<type>(source[0][i]);
    for (int r = 1; r < n; ++r) total += to_float<type>(source[r][i]);
    out[i] = from_float<type>(total);
  }
}

constexpr std::size_t kAhead = 1024;  // bytes

template <DType type, class T>
inline void sum_pair(const T* const* source, int num, std::size_t at, V& a, V& b) {
  load_pair<type>(source[0] + at, a, b);
  for (int r = 1; r < num; ++r) {
    V c, d;
    load_pair<type>(source[r] + at, c, d);
    a = add(a, c);
    b = add(b, d);
  }
}

// kNum sources, or `n` if kNum is 0. Loops over few ranks are unrolled.
template <DType type, class T, int kNum>
inline void sum_vectors(T* out, const T* const* source, int n, std::size_t count) {
  const int num = kNum ? kNum : n;
  std::size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    // Lines that a peer has just written come from its cache one at a time: prefetch them.
    for (int r = 0; r < num; ++r) __builtin_prefetch(source[r] + i + kAhead / sizeof(T));
    V a, b;
    sum_pair<type>(source, num, i, a, b);
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

// Sums squares, always in this order, so that two loops over a row get the same bits.
struct Squares {
  V even = zero(), odd = zero();
  void add_pair(V a, V b) {
    even = add(even, mul(a, a));
    odd = add(odd, mul(b, b));
  }
  float total() const { return horizontal_sum(add(even, odd)); }
};

template <DType type, class T, int kNum>
inline float add_sum_vectors(T* out, T* copy, const T* const* source, int n, const T* residual, std::size_t count) {
  const int num = kNum ? kNum : n;
  Squares squares;
  std::size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int r = 0; r < num; ++r) __builtin_prefetch(source[r] + i + kAhead / sizeof(T));
    V a, b, c, d;
    sum_pair<type>(source, num, i, a, b);
    load_pair<type>(residual + i, c, d);
    a = rounded<type>(add(c, a));
    b = rounded<type>(add(d, b));
    store_rounded<type>(out + i, a, b);
    if (copy != nullptr) store_rounded<type>(copy + i, a, b);
    squares.add_pair(a, b);
  }
  float total = squares.total();
  for (; i < count; ++i) {
    float sum = to_float<type>(source[0][i]);
    for (int r = 1; r < n; ++r) sum += to_float<type>(source[r][i]);
    out[i] = from_float<type>(to_float<type>(residual[i]) + sum);
    if (copy != nullptr) copy[i] = out[i];
    total += to_float<type>(out[i]) * to_float<type>(out[i]);
  }
  return total;
}

template <DType type, class T>
float add_sum(void* out, void* copy, const void* const* source, int n, const void* residual, std::size_t count) {
  T *const to = static_cast<T*>(out), *const more = static_cast<T*>(copy);
  const T* const* const from = reinterpret_cast<const T* const*>(source);
  const T* const base = static_cast<const T*>(residual);
  return n == 2 ? add_sum_vectors<type, T, 2>(to, more, from, n, base, count)
                : add_sum_vectors<type, T, 0>(to, more, from, n, base, count);
}

template <DType type, class T>
float copy(void* out, const void* x, std::size_t count) {
  T* const to = static_cast<T*>(out);
  const T* const from = static_cast<const T*>(x);
  Squares squares;
  std::size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    __builtin_prefetch(from + i + kAhead / sizeof(T));
    V a, b;
    load_pair<type>(from + i, a, b);
    store_rounded<type>(to + i, a, b);
    squares.add_pair(a, b);
  }
  float total = squares.total();
  for (; i < count; ++i) {
    to[i] = from[i];
    total += to_float<type>(from[i]) * to_float<type>(from[i]);
  }
  return total;
}

template <DType type, class T>
void rms_norm(void* out, const void* x, float squares, const void* weight, float eps, std::size_t count) {
  T* const to = static_cast<T*>(out);
  const T* const from = static_cast<const T*>(x);
  const T* const scale = static_cast<const T*>(weight);
  const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(count) + eps);
  const V factor = broadcast(inverse);
  std::size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    V a, b, c, d;
    load_pair<type>(from + i, a, b);
    load_pair<type>(scale + i, c, d);
    // Rounded before it is multiplied by the weight, as in the models' own code.
    store_rounded<type>(to + i, rounded<type>(mul(rounded<type>(mul(a, factor)), c)), rounded<type>(mul(rounded<type>(mul(b, factor)), d)));
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
          {copy<DType::kFloat32, float>, copy<DType::kBFloat16, std::uint16_t>, copy<DType::kFloat16, std::uint16_t>},
          {rms_norm<DType::kFloat32, float>, rms_norm<DType::kBFloat16, std::uint16_t>,
           rms_norm<DType::kFloat16, std::uint16_t>}};
}
