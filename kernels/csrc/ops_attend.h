// The arguments of the attention operators, checked: caches, heads, and the tokens' places in the cache. Included by
// ops_attend.cpp only.
#pragma once

#include <algorithm>

#include "attend.h"
#include "tensor.h"

namespace yoke::kernels {
namespace {

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case Scalar::f32: return Type::f32;
    case Scalar::bf16: return Type::bf16;
    case Scalar::f16: return Type::f16;
    case Scalar::i8: return Type::i8;
    default: YOKE_CHECK(false, "attend: takes float32, bfloat16, float16 and caches of int8, not ", x.scalar_type());
  }
}

inline const char* bytes(const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }

// Queries, keys or values of N tokens: `heads` heads of h contiguous numbers each. Strides are in numbers.
struct Heads {
  const char* data;
  Type type;
  std::int64_t tokens, heads, token_stride, head_stride, item;

  const char* at(std::int64_t token, std::int64_t head) const {
    return data + (token * token_stride + head * head_stride) * item;
  }
};

// x: [N, heads, h], contiguous in h.
inline Heads heads_of(const Tensor& x) {
  return {bytes(x), type_of(x), x.size(0), x.size(1), x.stride(0), x.stride(1), x.element_size()};
}

inline Tensor in_order(const Tensor& x) { return x.stride(2) == 1 ? x.view() : x.contiguous(); }

struct Cache {
  const Tensor &k, &v;
  const OptionalTensor &k_scale, &v_scale;
};

// Checks caches [R, K, S, h] and scales [R, K, S] for all operators.
inline void check_caches(const Tensor& k, const Tensor& v, const OptionalTensor& k_scale,
                         const OptionalTensor& v_scale) {
  YOKE_CHECK(k.dim() == 4 && v.sizes() == k.sizes() && v.scalar_type() == k.scalar_type(),
              "attend: the two caches must have the same shape [R, K, S, h], not ", k.sizes(), " and ", v.sizes());
  YOKE_CHECK(k.is_contiguous() && v.is_contiguous(), "attend: the caches must be contiguous");
  YOKE_CHECK(k_scale.has_value() == (k.scalar_type() == Scalar::i8) && v_scale.has_value() == k_scale.has_value(),
              "attend: int8 caches have scales, and no others; these are ", k.scalar_type());
  for (const OptionalTensor* scale : {&k_scale, &v_scale}) {
    if (!scale->has_value()) continue;
    YOKE_CHECK((*scale)->scalar_type() == Scalar::f32 && (*scale)->is_contiguous() &&
                    (*scale)->sizes() == k.sizes().first(3),
                "attend: scales must be float32 and contiguous ", k.sizes().first(3), ", not ", (*scale)->sizes());
  }
}

// The tokens' places in the cache: row and position of each, checked.
struct Places {
  Tensor held_rows, held_positions;
  const std::int64_t* rows = nullptr;  // null: token i in row i
  const std::int64_t* positions;

  Places(const OptionalTensor& given, const Tensor& at, std::int64_t tokens, const Tensor& cache, bool sourced)
      : held_positions(at.contiguous()) {
    YOKE_CHECK(at.scalar_type() == Scalar::i64 && at.dim() == 1 && at.size(0) == tokens,
                "attend: positions must be int64 [", tokens, "]");
    positions = held_positions.const_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < tokens; ++i) {
      YOKE_CHECK(0 <= positions[i] && positions[i] < cache.size(2), "attend: position ", positions[i],
                  " in a cache of ", cache.size(2));
    }
    if (sourced) return;
    if (!given.has_value()) {
      YOKE_CHECK(tokens == cache.size(0), "attend: without rows there must be one token for each of the cache's ",
                  cache.size(0), " rows, not ", tokens);
      return;
    }
    YOKE_CHECK(given->scalar_type() == Scalar::i64 && given->dim() == 1 && given->size(0) == tokens,
                "attend: rows must be int64 [", tokens, "]");
    held_rows = given->contiguous();
    rows = held_rows.const_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < tokens; ++i) {
      YOKE_CHECK(0 <= rows[i] && rows[i] < cache.size(0), "attend: row ", rows[i], " of a cache of ", cache.size(0),
                  " rows");
    }
  }

  std::int64_t row(std::int64_t token) const { return rows == nullptr ? token : rows[token]; }
};

// Which row holds position t of token i: int32 [N, S], checked, or null.
struct Sources {
  Tensor held;
  const std::int32_t* data = nullptr;
  std::int64_t stride = 0;

  Sources(const OptionalTensor& given, const Places& places, std::int64_t tokens, std::int64_t window,
          const Tensor& cache) {
    if (!given.has_value()) return;
    YOKE_CHECK(given->scalar_type() == Scalar::i32 && given->dim() == 2 && given->size(0) == tokens,
                "attend: sources must be int32 [", tokens, ", S]");
    held = given->contiguous();
    data = held.const_data_ptr<std::int32_t>();
    stride = held.size(1);
    for (std::int64_t i = 0; i < tokens; ++i) {
      const std::int64_t last = places.positions[i] + 1;
      const std::int64_t first = window > 0 ? std::max<std::int64_t>(0, last - window) : 0;
      YOKE_CHECK(last <= stride, "attend: position ", last - 1, " and sources for ", stride);
      const std::int32_t* found = data + i * stride;
      for (std::int64_t t = first; t < last; ++t) {
        YOKE_CHECK(0 <= found[t] && found[t] < cache.size(0), "attend: source ", found[t], " of a cache of ",
                    cache.size(0), " rows");
      }
    }
  }
};

inline void check_runs(Sizes runs, std::int64_t heads, std::int64_t num_kv) {
  bool fits = !runs.empty() && runs.size() % 4 == 0;
  std::int64_t next = 0;
  for (std::size_t i = 0; fits && i < runs.size(); i += 4) {
    fits = runs[i] == next && runs[i] < runs[i + 1] && 0 <= runs[i + 2] && runs[i + 2] < runs[i + 3] &&
           runs[i + 3] <= num_kv && (runs[i + 1] - runs[i]) % (runs[i + 3] - runs[i + 2]) == 0;
    next = runs[i + 1];
  }
  YOKE_CHECK(fits && next == heads, "attend: the runs of heads do not match q and the caches");
}

inline void check_types(const Tensor& q, const Tensor& k) {
  const Type q_type = type_of(q), cache_type = type_of(k);
  YOKE_CHECK(q_type != Type::i8 && (cache_type == q_type || cache_type == Type::f16 || cache_type == Type::i8),
              "attend: q is ", q.scalar_type(), " and the caches are ", k.scalar_type());
}

}  // namespace
}  // namespace yoke::kernels
