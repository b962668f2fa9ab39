// One token over the cache: its own loops, since there is nothing to share among tokens, and reading the cache
// is what bounds it. Each key and value is read once and serves all heads of the group while it is near.
#pragma once

#include "attend.h"
#include "lanes.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kKeys = 4;   // at a time: as many as there are registers for
constexpr int kWidth = 4;  // in lanes, of the values at a time
#else
constexpr int kKeys = 2;
constexpr int kWidth = 2;
#endif

template <class T>
inline void to_floats(const T* from, float* to, int64_t count) {  // and zeros up to whole lanes
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load(from + i), to + i);
  if (i < count) store(load(from + i, count - i), to + i);
}

template <class T>
inline void from_floats(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load(from + i), to + i);
  if (i < count) store(load(from + i), to + i, count - i);
}

// Where position t lies in the cache.
template <bool kGathered>
inline int64_t place(const TokenArgs& a, int64_t t) {
  if constexpr (kGathered) return a.sources[t] * a.row_stride + t;
  return t;
}

// Products of G queries, `wide` apart, and N keys -> scores [G][N], `length` apart.
template <class T, int G, int N>
inline void products(const float* q, int64_t wide, const T* const* keys, int64_t h, float* scores, int64_t length) {
  Lanes sums[G][N] = {};
  int64_t d = 0;
  const auto add = [&](const Lanes(&key)[N]) {
    for (int g = 0; g < G; ++g) {
      const Lanes query = load(q + g * wide + d);
      for (int n = 0; n < N; ++n) sums[g][n] += query * key[n];
    }
  };
  Lanes key[N];
  for (; d + kLanes <= h; d += kLanes) {
    for (int n = 0; n < N; ++n) key[n] = load(keys[n] + d);
    add(key);
  }
  if (d < h) {
    for (int n = 0; n < N; ++n) key[n] = load(keys[n] + d, h - d);
    add(key);
  }
  for (int g = 0; g < G; ++g) {
    for (int n = 0; n < N; ++n) scores[g * length + n] = sum(sums[g][n]);
  }
}

// Sums of G heads [G][W lanes], `wide` apart, over `count` values from position t on.
template <class T, bool kGathered, int G, int W>
inline void weigh(const TokenArgs& a, int64_t t, int64_t count, int64_t d, const float* weights, int64_t length,
                  float* into, int64_t wide) {
  const T* v = static_cast<const T*>(a.v) + d;
  Lanes sums[G][W];
  for (int g = 0; g < G; ++g) {
    for (int w = 0; w < W; ++w) sums[g][w] = load(into + g * wide + w * kLanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* value = v + place<kGathered>(a, t + i) * a.h;
    for (int w = 0; w < W; ++w) {
      const Lanes part = W > 1 || d + kLanes <= a.h ? load(value + w * kLanes) : load(value, a.h - d);
      for (int g = 0; g < G; ++g) sums[g][w] += part * weights[g * length + i];
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int w = 0; w < W; ++w) store(sums[g][w], into + g * wide + w * kLanes);
  }
}

template <class T, bool kGathered, int G>
void scores_of(const TokenArgs& a, const float* q, int64_t wide, int64_t t, int64_t count, float* scores,
               int64_t length) {
  const T* k = static_cast<const T*>(a.k);
  const T* keys[kKeys];
  int64_t i = 0;
  for (; i + kKeys <= count; i += kKeys) {
    for (int n = 0; n < kKeys; ++n) keys[n] = k + place<kGathered>(a, t + i + n) * a.h;
    products<T, G, kKeys>(q, wide, keys, a.h, scores + i, length);
  }
  for (; i < count; ++i) {
    keys[0] = k + place<kGathered>(a, t + i) * a.h;
    products<T, G, 1>(q, wide, keys, a.h, scores + i, length);
  }
}

template <class T, bool kGathered, int G>
void values_of(const TokenArgs& a, int64_t t, int64_t count, const float* weights, int64_t length, float* into,
               int64_t wide) {
  int64_t d = 0;
  for (; d + kWidth * kLanes <= a.h; d += kWidth * kLanes) {
    weigh<T, kGathered, G, kWidth>(a, t, count, d, weights, length, into + d, wide);
  }
  for (; d < a.h; d += kLanes) weigh<T, kGathered, G, 1>(a, t, count, d, weights, length, into + d, wide);
}

// Scores, of which whole lanes are there, to weights before they are divided by their sum, which it returns.
inline float softmax(float* scores, int64_t length, float scale, float cap) {
  const float factor = cap != 0 ? scale / cap : scale * kLog2E;
  Lanes largest = all(-INFINITY);
  for (int64_t t = 0; t < length; t += kLanes) {
    Lanes score = load(scores + t) * factor;
    if (cap != 0) score = tanh(score) * (cap * kLog2E);
    for (int64_t i = length - t; i < kLanes; ++i) score[i] = -INFINITY;
    store(score, scores + t);
    largest = larger(score, largest);
  }
  const Lanes top = all(largest_of(largest));
  Lanes total = {};
  for (int64_t t = 0; t < length; t += kLanes) {
    const Lanes weight = exp2(load(scores + t) - top);
    store(weight, scores + t);
    total += weight;
  }
  return sum(total);
}

template <class T, bool kGathered>
void attend_token(const TokenArgs& a, const float* q, float* out) {
  const int64_t wide = round_up(a.h, kLanes), count = a.last - a.first, length = round_up(count, kLanes);
  float* scores = a.scratch + 2 * a.group * wide;
  constexpr int64_t kBlock = 64;  // keys or values that stay near for the heads of a group after the first four
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t size = count - i < kBlock ? count - i : kBlock;
    for (int64_t g = 0; g < a.group; g += 4) {
      const float* heads = q + g * wide;
      float* found = scores + g * length + i;
      switch (a.group - g) {
        case 1: scores_of<T, kGathered, 1>(a, heads, wide, a.first + i, size, found, length); break;
        case 2: scores_of<T, kGathered, 2>(a, heads, wide, a.first + i, size, found, length); break;
        case 3: scores_of<T, kGathered, 3>(a, heads, wide, a.first + i, size, found, length); break;
        default: scores_of<T, kGathered, 4>(a, heads, wide, a.first + i, size, found, length); break;
      }
    }
  }
  for (int64_t g = 0; g < a.group; ++g) {
    float* own = scores + g * length;
    if constexpr (sizeof(T) == 1) {
      for (int64_t i = 0; i < count; ++i) own[i] *= a.k_scale[place<kGathered>(a, a.first + i)];
    }
    const float inverse = 1 / softmax(own, count, a.scale, a.cap);
    for (int64_t i = 0; i < length; i += kLanes) store(load(own + i) * inverse, own + i);
    if constexpr (sizeof(T) == 1) {
      for (int64_t i = 0; i < count; ++i) own[i] *= a.v_scale[place<kGathered>(a, a.first + i)];
    }
  }
  memset(out, 0, sizeof(float) * static_cast<size_t>(a.group * wide));
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t size = count - i < kBlock ? count - i : kBlock;
    for (int64_t g = 0; g < a.group; g += 4) {
      const float* weights = scores + g * length + i;
      float* into = out + g * wide;
      switch (a.group - g) {
        case 1: values_of<T, kGathered, 1>(a, a.first + i, size, weights, length, into, wide); break;
        case 2: values_of<T, kGathered, 2>(a, a.first + i, size, weights, length, into, wide); break;
        case 3: values_of<T, kGathered, 3>(a, a.first + i, size, weights, length, into, wide); break;
        default: values_of<T, kGathered, 4>(a, a.first + i, size, weights, length, into, wide); break;
      }
    }
  }
}

template <class T>
void attend_token(const TokenArgs& a, const float* q, float* out) {
  if (a.sources != nullptr) return attend_token<T, true>(a, q, out);
  return attend_token<T, false>(a, q, out);
}

// Queries and results are few: they are floats in between, so that the loops are there once per cache.
template <class Q>
void token_of(const TokenArgs& a) {
  const int64_t wide = round_up(a.h, kLanes);
  float* q = a.scratch;
  float* out = q + a.group * wide;
  for (int64_t g = 0; g < a.group; ++g) to_floats(static_cast<const Q*>(a.q) + g * a.q_stride, q + g * wide, a.h);
  switch (a.cache_type) {
    case Type::f32: attend_token<float>(a, q, out); break;
    case Type::bf16: attend_token<brain>(a, q, out); break;
    case Type::f16: attend_token<half>(a, q, out); break;
    case Type::i8: attend_token<int8_t>(a, q, out); break;
  }
  for (int64_t g = 0; g < a.group; ++g) from_floats(out + g * wide, static_cast<Q*>(a.out) + g * a.h, a.h);
}

void token(const TokenArgs& a) {
  switch (a.q_type) {
    case Type::bf16: return token_of<brain>(a);
    case Type::f16: return token_of<half>(a);
    default: return token_of<float>(a);
  }
}

template <class From>
void quantise(const From* from, int8_t* to, float* scale, int64_t h) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < h; ++i) {
    const float size = fabsf(to_float(from[i]));
    largest = size > largest ? size : largest;
  }
  *scale = largest / 127;
  const float inverse = largest > 0x1p-100f ? 127 / largest : 0;
  for (int64_t i = 0; i < h; ++i) {
    const float x = to_float(from[i]) * inverse + 0x1.8p23f;  // rounded to a whole number, in the low bits
    to[i] = static_cast<int8_t>(as<uint32_t>(x) & 0xff);
  }
}

template <class From>
void write_from(const WriteArgs& a) {
  const From* from = static_cast<const From*>(a.from);
  const auto convert = [&](auto* to) {
    for (int64_t i = 0; i < a.h; ++i) store(to_float(from[i]), to + i);
  };
  switch (a.to_type) {
    case Type::f32: return convert(static_cast<float*>(a.to));
    case Type::bf16: return convert(static_cast<brain*>(a.to));
    case Type::f16: return convert(static_cast<half*>(a.to));
    case Type::i8: return quantise(from, static_cast<int8_t*>(a.to), a.scale, a.h);
  }
}

void write(const WriteArgs& a) {
  switch (a.from_type) {
    case Type::bf16: return write_from<brain>(a);
    case Type::f16: return write_from<half>(a);
    default: return write_from<float>(a);
  }
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
