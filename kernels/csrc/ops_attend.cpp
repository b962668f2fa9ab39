// torch.ops.yoke_kernels.attend, write_kv and write_and_attend: the choice of the loops, and the division among
// threads. (ops_attend.h checks the arguments.)

#include <algorithm>
#include <atomic>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "ops_attend.h"

namespace yoke::kernels {
namespace {

const Attention& chosen_attention() {
  [[maybe_unused]] const std::string_view name = current().name;
#if defined(__x86_64__) && YOKE_LEVEL >= 4
  if (name == "amx") return amx_attention;
#endif
#if defined(__x86_64__) && YOKE_LEVEL >= 2
  if (name == "avx512" || name == "avx512bf16") return avx512_attention;
#endif
#if defined(__x86_64__) && YOKE_LEVEL >= 1
  if (name == "avx2") return avx2_attention;
#endif
  return base_attention;
}

// Tokens [first, last) of one row at ascending positions, and the query heads that share a KV head.
struct Work {
  std::int64_t first, last, kv, q_start, group;
};

// The most tokens of a chunk that are attended to one by one, with the loops for a single token: so a draft token is
// verified with the same bits that a step without it would have.
constexpr std::int64_t kFewTokens = 16;
constexpr std::int64_t kBlockRows = 256;  // queries of a chunk that one thread takes at a time

std::vector<Work> divide(const Places& places, std::int64_t tokens, bool sourced, Sizes runs) {
  std::vector<Work> works;
  for (std::int64_t first = 0, last; first < tokens; first = last) {
    last = first + 1;
    while (!sourced && last < tokens && places.row(last) == places.row(first) &&
           places.positions[last] > places.positions[last - 1]) {
      ++last;
    }
    for (std::size_t i = 0; i + 3 < runs.size(); i += 4) {
      const std::int64_t count = runs[i + 3] - runs[i + 2], group = (runs[i + 1] - runs[i]) / count;
      if (last - first <= kFewTokens) {
        for (std::int64_t j = 0; j < count; ++j) {
          for (std::int64_t token = first; token < last; ++token) {
            works.push_back({token, token + 1, runs[i + 2] + j, runs[i] + j * group, group});
          }
        }
        continue;
      }
      const std::int64_t block = std::max<std::int64_t>(2, kBlockRows / group);
      for (std::int64_t begin = first, end; begin < last; begin = end) {
        // No block has a single token, so all tokens of a chunk take the same loops.
        end = last - begin <= block + 1 ? last : begin + block;
        for (std::int64_t j = 0; j < count; ++j) {
          works.push_back({begin, end, runs[i + 2] + j, runs[i] + j * group, group});
        }
      }
    }
  }
  return works;
}

struct Call {
  const Heads& q;
  const Tensor &k, &v;
  char* out;  // [N, heads, h], of q's type
  const float *k_scale, *v_scale;
  const std::int32_t* sources;  // [N, sources_stride] or null
  std::int64_t sources_stride;
  const Places& places;
  float scale, cap;
  std::int64_t window;
};

// A thread's scratch memory, aligned to 64 bytes.
float* scratch(std::int64_t floats) {
  thread_local std::vector<float> held;
  if (held.size() < static_cast<std::size_t>(floats) + 16) held.resize(static_cast<std::size_t>(floats) + 16);
  return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(held.data()) + 63) / 64 * 64);
}

void carry_out(const Call& c, const Attention& loops, const Work& work) {
  const std::int64_t num_kv = c.k.size(1), length = c.k.size(2), h = c.k.size(3), tokens = work.last - work.first;
  // The offset of the row's and KV head's first position.
  const std::int64_t base = ((c.sources != nullptr ? 0 : c.places.row(work.first)) * num_kv + work.kv) * length;
  const char* q = c.q.at(work.first, work.q_start);
  char* out = c.out + (work.first * c.q.heads + work.q_start) * h * c.q.item;
  const char* k = bytes(c.k) + base * h * c.k.element_size();
  const char* v = bytes(c.v) + base * h * c.v.element_size();
  const float* k_scale = c.k_scale == nullptr ? nullptr : c.k_scale + base;
  const float* v_scale = c.v_scale == nullptr ? nullptr : c.v_scale + base;
  const Type cache_type = type_of(c.k);
  if (tokens > 1) {
    return loops.chunk(ChunkArgs{q, out, k, v, k_scale, v_scale, c.places.positions + work.first,
                                 scratch(chunk_scratch(tokens * work.group, h)), c.q.type, cache_type, tokens,
                                 c.q.token_stride, c.q.head_stride, c.q.heads * h, work.group, h, c.window, c.scale,
                                 c.cap});
  }
  const std::int64_t last = c.places.positions[work.first] + 1;
  const std::int64_t first = c.window > 0 ? std::max<std::int64_t>(0, last - c.window) : 0;
  loops.token(TokenArgs{q, out, k, v, k_scale, v_scale,
                        c.sources == nullptr ? nullptr : c.sources + work.first * c.sources_stride,
                        scratch(token_scratch(work.group, last - first, h)), c.q.type, cache_type, c.q.head_stride,
                        num_kv * length, first, last, work.group, h, c.scale, c.cap});
}

// Each thread takes the next block of work. The late blocks of a prompt come first: they attend to the most keys.
void carry_out(const Call& c, const std::vector<Work>& works) {
  const Attention& loops = chosen_attention();
  const std::int64_t count = static_cast<std::int64_t>(works.size());
  std::int64_t numbers = 0;  // an estimate of the work
  for (const Work& work : works) {
    numbers += (work.last - work.first) * (c.places.positions[work.last - 1] + 1) * work.group * c.k.size(3);
  }
  constexpr std::int64_t kAlone = 1 << 16;  // less work is done by one thread before another one wakes
  std::atomic<std::int64_t> next{count};
  const auto take = [&](std::int64_t, std::int64_t) {
    for (std::int64_t i = --next; i >= 0; i = --next) carry_out(c, loops, works[static_cast<std::size_t>(i)]);
  };
  const std::int64_t threads = numbers < kAlone ? 1 : std::min<std::int64_t>(num_threads(), count);
  parallel_for(0, threads, 1, take);
}

void attend_into(char* out, const Heads& q, const Cache& cache, const Places& places, Sizes runs,
                 double scale, double cap, std::int64_t window, const OptionalTensor& sources) {
  const Sources sourced(sources, places, q.tokens, window, cache.k);
  carry_out(Call{q, cache.k, cache.v, out, cache.k_scale.has_value() ? cache.k_scale->const_data_ptr<float>() : nullptr,
                 cache.v_scale.has_value() ? cache.v_scale->const_data_ptr<float>() : nullptr, sourced.data,
                 sourced.stride, places, static_cast<float>(scale), static_cast<float>(cap), window},
            divide(places, q.tokens, sources.has_value(), runs));
}

// Threads divide the KV heads; each head is written in the order of the tokens, so the last write wins.
void write_from(const Heads& k, const Heads& v, const Cache& cache, const Places& places) {
  const std::int64_t tokens = k.tokens, num_kv = cache.k.size(1), length = cache.k.size(2), h = cache.k.size(3);
  const Attention& loops = chosen_attention();
  const auto put = [&](const Heads& from, const Tensor& to, const OptionalTensor& scale, std::int64_t kv) {
    char* const data = static_cast<char*>(to.mutable_data_ptr());
    float* const scales = scale.has_value() ? scale->mutable_data_ptr<float>() : nullptr;
    WriteArgs args{nullptr, nullptr, nullptr, from.type, type_of(to), h};
    for (std::int64_t i = 0; i < tokens; ++i) {
      const std::int64_t place = (places.row(i) * num_kv + kv) * length + places.positions[i];
      args.from = from.at(i, kv);
      args.to = data + place * h * to.element_size();
      args.scale = scales == nullptr ? nullptr : scales + place;
      loops.write(args);
    }
  };
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / (tokens * h + 1));
  parallel_for(0, 2 * num_kv, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      if (i < num_kv) {
        put(k, cache.k, cache.k_scale, i);
      } else {
        put(v, cache.v, cache.v_scale, i - num_kv);
      }
    }
  });
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_scale,
                  const OptionalTensor& v_scale, const OptionalTensor& rows, const Tensor& positions,
                  Sizes runs, double scale, double cap, std::int64_t window,
                  const OptionalTensor& sources) {
  check_caches(k, v, k_scale, v_scale);
  YOKE_CHECK(q.dim() == 3 && q.size(2) == k.size(3), "attend: q ", q.sizes(), " does not fit caches of ",
              k.sizes());
  check_types(q, k);
  check_runs(runs, q.size(1), k.size(1));
  const Places places(rows, positions, q.size(0), k, sources.has_value());
  const Tensor own = in_order(q);
  Tensor out = empty(q.sizes(), q.scalar_type());
  attend_into(static_cast<char*>(out.mutable_data_ptr()), heads_of(own), {k, v, k_scale, v_scale}, places, runs, scale,
              cap, window, sources);
  return out;
}

void write_kv(const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
              const Tensor& k, const Tensor& v, const OptionalTensor& rows, const Tensor& positions) {
  check_caches(k_cache, v_cache, k_scale, v_scale);
  for (const Tensor* x : {&k, &v}) {
    YOKE_CHECK(x->dim() == 3 && x->size(0) == k.size(0) && x->size(1) == k_cache.size(1) &&
                    x->size(2) == k_cache.size(3) && type_of(*x) != Type::i8,
                "attend: keys or values ", x->sizes(), " of ", x->scalar_type(), " for caches of ", k_cache.sizes());
  }
  const Places places(rows, positions, k.size(0), k_cache, false);
  const Tensor own_k = in_order(k), own_v = in_order(v);
  write_from(heads_of(own_k), heads_of(own_v), {k_cache, v_cache, k_scale, v_scale}, places);
}

void prefetch(const char* from, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += 64) __builtin_prefetch(from + i);
}

// The first `heads` heads of each token, rotated: [N, heads * h].
Tensor rotated(const Heads& x, const Tensor& qkv, const Tensor& cos, const OptionalTensor& sin,
                  bool interleaved, std::int64_t heads, std::int64_t h, const Places& places, std::int64_t length) {
  YOKE_CHECK(sin.has_value() && cos.dim() == 2 && cos.sizes() == sin->sizes() && cos.size(0) >= length &&
                  2 * cos.size(1) <= h && cos.scalar_type() == Scalar::f32 && sin->scalar_type() == Scalar::f32,
              "attend: cos and sin must be float32 [", length, " or more, ", h / 2, " or fewer], not ", cos.sizes());
  YOKE_CHECK(cos.is_contiguous() && sin->is_contiguous(), "attend: cos and sin must be contiguous");
  Tensor to = empty({x.tokens, heads * h}, qkv.scalar_type());
  char* const data = static_cast<char*>(to.mutable_data_ptr());
  const float *const all_cos = cos.const_data_ptr<float>(), *const all_sin = sin->const_data_ptr<float>();
  const Attention& loops = chosen_attention();
  const std::int64_t half = cos.size(1), grain = std::max<std::int64_t>(1, 32768 / (heads * h));
  parallel_for(0, x.tokens, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      // The matmul has written its results past the caches, so they are prefetched.
      if (i + 1 < last) prefetch(x.at(i + 1, 0), heads * h * x.item);
      const std::int64_t place = places.positions[i] * half;
      loops.rotate(RotateArgs{x.at(i, 0), data + i * heads * h * x.item, all_cos + place, all_sin + place, x.type,
                              heads, h, half, interleaved});
    }
  });
  return to;
}

// Everything between two linears of a layer, in one call: qkv [N, (H + 2 K) h] -> [N, H h]. Rotates queries and keys
// (if cos and sin are given), writes keys and values to the cache, and attends.
Tensor write_and_attend(const Tensor& qkv, const OptionalTensor& cos, const OptionalTensor& sin,
                            bool interleaved, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_scale,
                            const OptionalTensor& v_scale, const OptionalTensor& rows, const Tensor& positions,
                            Sizes runs, double scale, double cap, std::int64_t window,
                            const OptionalTensor& sources) {
  check_caches(k_cache, v_cache, k_scale, v_scale);
  const std::int64_t num_kv = k_cache.size(1), h = k_cache.size(3);
  YOKE_CHECK(qkv.dim() == 2 && h > 0 && qkv.size(1) % h == 0 && qkv.size(1) / h > 2 * num_kv,
              "attend: queries, keys and values ", qkv.sizes(), " do not fit caches of ", k_cache.sizes());
  const std::int64_t tokens = qkv.size(0), num_q = qkv.size(1) / h - 2 * num_kv;
  check_types(qkv, k_cache);
  check_runs(runs, num_q, num_kv);
  const Places places(rows, positions, tokens, k_cache, false);
  const Tensor own = qkv.contiguous();
  const Heads all{bytes(own), type_of(own), tokens, num_q + 2 * num_kv, own.size(1), h, own.element_size()};
  const auto part = [&](const Heads& of, std::int64_t first, std::int64_t count) {
    return Heads{of.at(0, first), of.type, tokens, count, of.token_stride, h, of.item};
  };
  Heads qk = all;
  Tensor held;
  if (cos.has_value()) {
    held = rotated(all, own, *cos, sin, interleaved, num_q + num_kv, h, places, k_cache.size(2));
    qk.data = bytes(held);
    qk.token_stride = held.size(1);
  }
  const Cache cache{k_cache, v_cache, k_scale, v_scale};
  write_from(part(qk, num_q, num_kv), part(all, num_q + num_kv, num_kv), cache, places);
  Tensor out = empty({tokens, num_q * h}, own.scalar_type());
  attend_into(static_cast<char*>(out.mutable_data_ptr()), part(qk, 0, num_q), cache, places, runs, scale, cap, window,
              sources);
  return out;
}

const Operators operators(
    "yoke_kernels",
    {
        op<write_and_attend>(
            "write_and_attend(Tensor qkv, Tensor? cos, Tensor? sin, bool interleaved, Tensor(a!) k_cache, "
            "Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? rows, Tensor positions, int[] "
            "runs, float scale, float cap, int window, Tensor? sources) -> Tensor"),
        op<attend>(
            "attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, "
            "Tensor? rows, Tensor positions, int[] runs, float scale, float cap, int window, Tensor? sources) -> "
            "Tensor"),
        op<write_kv>(
            "write_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor "
            "k, Tensor v, Tensor? rows, Tensor positions) -> ()"),
    });

}  // namespace
}  // namespace yoke::kernels
