// Attention of one token over the cache. It has its own loops, because nothing is shared among tokens and it is
// memory-bound. Each key and value is read once and used by all heads of the group while it is in the caches.
#pragma once

#include "attend.h"
#include "lanes.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

constexpr int kKeys = 4;  // keys at a time
#if defined(__AVX512F__)
constexpr int kHeads = 4;  // heads at a time: as many as have registers for sums of kKeys, or kWidth, lanes
constexpr int kWidth = 4;
#else
constexpr int kHeads = 2;
constexpr int kWidth = 4;
#endif

template <class T>
inline void to_floats(const T* from, float* to, int64_t count) {  // pads with zeros to whole registers
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

template <int N>
struct Number {
  constexpr operator int() const { return N; }
};

// Calls `some` with the number of heads, at most kHeads, as a compile-time constant.
template <class Some>
inline void for_heads(int64_t left, const Some& some) {
  if constexpr (kHeads > 2) {
    if (left >= 4) return some(Number<4>{});
    if (left == 3) return some(Number<3>{});
  }
  if (left >= 2) return some(Number<2>{});
  some(Number<1>{});
}

// The index of position t in the cache.
template <bool kGathered>
inline int64_t place(const TokenArgs& a, int64_t t) {
  if constexpr (kGathered) return a.sources[t] * a.row_stride + t;
  return t;
}

constexpr int64_t kAhead = 32;  // the prefetch distance in positions

template <class T>
inline void ahead(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
}

// Dot products of G queries, `wide` numbers apart, with kKeys keys -> scores [G][kKeys], `length` numbers apart.
template <class T, int G>
inline void dot_products(const float* q, int64_t wide, const T* const (&keys)[kKeys], int64_t h, float* scores,
                         int64_t length) {
  Lanes found[G][kKeys] = {};
  Lanes key[kKeys];
  const auto add = [&](int64_t d) {
    for (int g = 0; g < G; ++g) {
      const Lanes query = load(q + g * wide + d);
      for (int n = 0; n < kKeys; ++n) found[g][n] += query * key[n];
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= h; d += kLanes) {
    for (int n = 0; n < kKeys; ++n) key[n] = load(keys[n] + d);
    add(d);
  }
  if (d < h) {
    for (int n = 0; n < kKeys; ++n) key[n] = load(keys[n] + d, h - d);
    add(d);
  }
  for (int g = 0; g < G; ++g) {
    const Four all_keys = sums(found[g]);
    memcpy(scores + g * length, &all_keys, sizeof all_keys);
  }
}

// Adds the weighted values of `count` positions from t on to the sums of G heads [G][W registers], `wide` numbers
// apart.
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
    ahead(value + kAhead * a.h, W * kLanes);
    for (int w = 0; w < W; ++w) {
      const Lanes part = W > 1 || d + kLanes <= a.h ? load(value + w * kLanes) : load(value, a.h - d);
      for (int g = 0; g < G; ++g) sums[g][w] += part * weights[g * length + i];
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int w = 0; w < W; ++w) store(sums[g][w], into + g * wide + w * kLanes);
  }
}

// The scores of `count` keys from position t on. It may write up to kKeys - 1 meaningless scores after the last.
template <class T, bool kGathered, int G>
void scores_of(const TokenArgs& a, const float* q, int64_t wide, int64_t t, int64_t count, float* scores,
               int64_t length) {
  const T* k = static_cast<const T*>(a.k);
  const T* keys[kKeys];
  for (int64_t i = 0; i < count; i += kKeys) {
    for (int n = 0; n < kKeys; ++n) keys[n] = k + place<kGathered>(a, t + (i + n < count ? i + n : count - 1)) * a.h;
    for (int n = 0; n < kKeys; ++n) ahead(keys[n] + kAhead * a.h, a.h);
    dot_products<T, G>(q, wide, keys, a.h, scores + i, length);
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

// Converts scores to weights that are not yet divided by their sum, and returns the sum. The buffer must have room for
// whole registers.
inline float softmax(float* scores, int64_t count, float scale, float cap) {
  const int64_t length = round_up(count, kLanes);
  const float factor = cap != 0 ? scale / cap : scale;
  Lanes largest = all(-INFINITY);
  for (int64_t t = 0; t < length; t += kLanes) {
    Lanes score = load(scores + t) * factor;
    if (cap != 0) score = tanh(score) * cap;
    store(score, scores + t);
    if (t + kLanes > count) {
      for (int64_t i = count; i < length; ++i) scores[i] = -INFINITY;
      score = load(scores + t);
    }
    largest = larger(score, largest);
  }
  const Lanes top = all(largest_of(largest));
  Lanes total = {};
  for (int64_t t = 0; t < length; t += kLanes) {
    const Lanes weight = exp(load(scores + t) - top);
    store(weight, scores + t);
    total += weight;
  }
  return sum(total);
}

template <class T, bool kGathered>
void attend_token(const TokenArgs& a, const float* q, float* out) {
  const int64_t wide = round_up(a.h, kLanes), count = a.last - a.first, length = round_up(count, kLanes);
  float* scores = a.scratch + 2 * a.group * wide;
  constexpr int64_t kBlock = 64;  // keys or values that stay in the caches for all heads of the group
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t size = count - i < kBlock ? count - i : kBlock;
    for (int64_t g = 0; g < a.group; g += kHeads) {
      const auto some = [&](auto num) {
        scores_of<T, kGathered, num>(a, q + g * wide, wide, a.first + i, size, scores + g * length + i, length);
      };
      for_heads(a.group - g, some);
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
    for (int64_t g = 0; g < a.group; g += kHeads) {
      const auto some = [&](auto num) {
        values_of<T, kGathered, num>(a, a.first + i, size, scores + g * length + i, length, out + g * wide, wide);
      };
      for_heads(a.group - g, some);
    }
  }
}

template <class T>
void attend_token(const TokenArgs& a, const float* q, float* out) {
  if (a.sources != nullptr) return attend_token<T, true>(a, q, out);
  return attend_token<T, false>(a, q, out);
}

// Queries and results are few, so they are converted to floats: the loops are compiled once per cache type.
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
void quantize(const From* from, int8_t* to, float* scale, int64_t h) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < h; ++i) {
    const float size = fabsf(to_float(from[i]));
    largest = size > largest ? size : largest;
  }
  *scale = largest / 127;
  const float inverse = largest > 0x1p-100f ? 127 / largest : 0;
  for (int64_t i = 0; i < h; ++i) {
    to[i] = static_cast<int8_t>(static_cast<int32_t>(rintf(to_float(from[i]) * inverse)));
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
    case Type::i8: return quantize(from, static_cast<int8_t*>(a.to), a.scale, a.h);
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
