// torch.ops.yoke_kernels.attend and write_kv: checks, which loops a token takes, and the division among threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <string_view>
#include <vector>

#include "attend.h"
#include "kernels.h"

namespace yoke::kernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

const Attention& chosen_attention() {
#if defined(__x86_64__)
  const std::string_view name = current().name;
  if (name == "amx") return amx_attention;
  if (name == "avx512" || name == "avx512bf16") return avx512_attention;
  if (name == "avx2") return avx2_attention;
#endif
  return base_attention;
}

Type type_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    case at::kChar: return Type::i8;
    default: TORCH_CHECK(false, "attend: takes float32, bfloat16, float16 and caches of int8, not ", x.scalar_type());
  }
}

const char* bytes(const at::Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }

// What `attend` and `write_kv` ask of caches [R, K, S, h] and scales [R, K, S].
void check_caches(const at::Tensor& k, const at::Tensor& v, const OptionalTensor& k_scale,
                  const OptionalTensor& v_scale) {
  TORCH_CHECK(k.dim() == 4 && v.sizes() == k.sizes() && v.scalar_type() == k.scalar_type(),
              "attend: the caches must be two alike [R, K, S, h], not ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK(k.is_contiguous() && v.is_contiguous(), "attend: the caches must be contiguous");
  TORCH_CHECK(k_scale.has_value() == (k.scalar_type() == at::kChar) && v_scale.has_value() == k_scale.has_value(),
              "attend: scales go with caches of int8, and these are ", k.scalar_type());
  for (const OptionalTensor* scale : {&k_scale, &v_scale}) {
    if (!scale->has_value()) continue;
    TORCH_CHECK((*scale)->scalar_type() == at::kFloat && (*scale)->is_contiguous() &&
                    (*scale)->sizes() == k.sizes().slice(0, 3),
                "attend: scales must be float32 and contiguous ", k.sizes().slice(0, 3), ", not ", (*scale)->sizes());
  }
}

// Where the tokens lie: row and position of each, checked.
struct Places {
  at::Tensor held_rows, held_positions;
  const std::int64_t* rows = nullptr;  // null: token i in row i
  const std::int64_t* positions;

  Places(const OptionalTensor& given, const at::Tensor& at, std::int64_t tokens, const at::Tensor& cache, bool sourced)
      : held_positions(at.contiguous()) {
    TORCH_CHECK(at.scalar_type() == at::kLong && at.dim() == 1 && at.size(0) == tokens,
                "attend: positions must be int64 [", tokens, "]");
    positions = held_positions.const_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < tokens; ++i) {
      TORCH_CHECK(0 <= positions[i] && positions[i] < cache.size(2), "attend: position ", positions[i],
                  " in a cache of ", cache.size(2));
    }
    if (sourced) return;
    if (!given.has_value()) {
      TORCH_CHECK(tokens == cache.size(0), "attend: without rows there must be a token for each of the cache's ",
                  cache.size(0), ", not ", tokens);
      return;
    }
    TORCH_CHECK(given->scalar_type() == at::kLong && given->dim() == 1 && given->size(0) == tokens,
                "attend: rows must be int64 [", tokens, "]");
    held_rows = given->contiguous();
    rows = held_rows.const_data_ptr<std::int64_t>();
    for (std::int64_t i = 0; i < tokens; ++i) {
      TORCH_CHECK(0 <= rows[i] && rows[i] < cache.size(0), "attend: row ", rows[i], " of a cache of ", cache.size(0),
                  " rows");
    }
  }

  std::int64_t row(std::int64_t token) const { return rows == nullptr ? token : rows[token]; }
};

// Tokens [first, last) of one row at ascending positions, and the query heads that share a KV head.
struct Work {
  std::int64_t first, last, kv, q_start, group;
};

// A chunk of so many tokens at most is attended to token by token, with the loops of a single one: what a draft
// guessed is verified with the very bits that a step without it would have.
constexpr std::int64_t kFewTokens = 16;
constexpr std::int64_t kBlockRows = 256;  // queries of a chunk that one thread takes at a time

std::vector<Work> divide(const Places& places, std::int64_t tokens, bool sourced, at::IntArrayRef runs) {
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
        // No token is left alone: those of a chunk all take the same loops.
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
  const at::Tensor &q, &k, &v, &out;
  const float *k_scale, *v_scale;
  const std::int32_t* sources;  // [N, sources_stride] or null
  std::int64_t sources_stride;
  const Places& places;
  float scale, cap;
  std::int64_t window;
};

// Scratch that stays with a thread, on a border of 64 bytes.
float* scratch(std::int64_t floats) {
  thread_local std::vector<float> held;
  if (held.size() < static_cast<std::size_t>(floats) + 16) held.resize(static_cast<std::size_t>(floats) + 16);
  return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(held.data()) + 63) / 64 * 64);
}

void carry_out(const Call& c, const Attention& loops, const Work& work) {
  const std::int64_t num_kv = c.k.size(1), length = c.k.size(2), h = c.k.size(3), tokens = work.last - work.first;
  // Positions in front of the row's and KV head's first.
  const std::int64_t base = ((c.sources != nullptr ? 0 : c.places.row(work.first)) * num_kv + work.kv) * length;
  const char* q = bytes(c.q) + (work.first * c.q.stride(0) + work.q_start * c.q.stride(1)) * c.q.element_size();
  char* out = static_cast<char*>(c.out.data_ptr()) + (work.first * c.out.size(1) + work.q_start) * h * c.out.element_size();
  const char* k = bytes(c.k) + base * h * c.k.element_size();
  const char* v = bytes(c.v) + base * h * c.v.element_size();
  const float* k_scale = c.k_scale == nullptr ? nullptr : c.k_scale + base;
  const float* v_scale = c.v_scale == nullptr ? nullptr : c.v_scale + base;
  const Type q_type = type_of(c.q), cache_type = type_of(c.k);
  if (tokens > 1) {
    return loops.chunk(ChunkArgs{q, out, k, v, k_scale, v_scale, c.places.positions + work.first,
                                 scratch(chunk_scratch(tokens * work.group, h)), q_type, cache_type, tokens,
                                 c.q.stride(0), c.q.stride(1), c.out.size(1) * h, work.group, h, c.window, c.scale,
                                 c.cap});
  }
  const std::int64_t last = c.places.positions[work.first] + 1;
  const std::int64_t first = c.window > 0 ? std::max<std::int64_t>(0, last - c.window) : 0;
  loops.token(TokenArgs{q, out, k, v, k_scale, v_scale,
                        c.sources == nullptr ? nullptr : c.sources + work.first * c.sources_stride,
                        scratch(token_scratch(work.group, last - first, h)), q_type, cache_type, c.q.stride(1),
                        num_kv * length, first, last, work.group, h, c.scale, c.cap});
}

// Each thread takes what comes next, the late blocks of a prompt first, which see the most.
void carry_out(const Call& c, const std::vector<Work>& works) {
  const Attention& loops = chosen_attention();
  const std::int64_t count = static_cast<std::int64_t>(works.size());
  std::int64_t numbers = 0;  // read and multiplied, about
  for (const Work& work : works) {
    numbers += (work.last - work.first) * (c.places.positions[work.last - 1] + 1) * work.group * c.k.size(3);
  }
  constexpr std::int64_t kAlone = 1 << 16;  // what takes less is done before another thread has woken
  std::atomic<std::int64_t> next{count};
  const auto take = [&](std::int64_t, std::int64_t) {
    for (std::int64_t i = --next; i >= 0; i = --next) carry_out(c, loops, works[static_cast<std::size_t>(i)]);
  };
  const std::int64_t threads = numbers < kAlone ? 1 : std::min<std::int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, take);
}

void check_runs(at::IntArrayRef runs, std::int64_t heads, std::int64_t num_kv) {
  bool fits = !runs.empty() && runs.size() % 4 == 0;
  std::int64_t next = 0;
  for (std::size_t i = 0; fits && i < runs.size(); i += 4) {
    fits = runs[i] == next && runs[i] < runs[i + 1] && 0 <= runs[i + 2] && runs[i + 2] < runs[i + 3] &&
           runs[i + 3] <= num_kv && (runs[i + 1] - runs[i]) % (runs[i + 3] - runs[i + 2]) == 0;
    next = runs[i + 1];
  }
  TORCH_CHECK(fits && next == heads, "attend: runs of heads that are not those of q and the caches");
}

at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& k_scale,
                  const OptionalTensor& v_scale, const OptionalTensor& rows, const at::Tensor& positions,
                  at::IntArrayRef runs, double scale, double cap, std::int64_t window,
                  const OptionalTensor& sources) {
  check_caches(k, v, k_scale, v_scale);
  TORCH_CHECK(q.dim() == 3 && q.size(2) == k.size(3), "attend: q ", q.sizes(), " does not go with caches of ",
              k.sizes());
  const Type q_type = type_of(q), cache_type = type_of(k);
  TORCH_CHECK(q_type != Type::i8 && (cache_type == q_type || cache_type == Type::f16 || cache_type == Type::i8),
              "attend: q is ", q.scalar_type(), " and the caches are ", k.scalar_type());
  check_runs(runs, q.size(1), k.size(1));
  const bool sourced = sources.has_value();
  const Places places(rows, positions, q.size(0), k, sourced);
  at::Tensor own_sources;
  if (sourced) {
    TORCH_CHECK(sources->scalar_type() == at::kInt && sources->dim() == 2 && sources->size(0) == q.size(0),
                "attend: sources must be int32 [", q.size(0), ", S]");
    own_sources = sources->contiguous();
    for (std::int64_t i = 0; i < q.size(0); ++i) {
      const std::int64_t last = places.positions[i] + 1, first = window > 0 ? std::max<std::int64_t>(0, last - window) : 0;
      TORCH_CHECK(last <= sources->size(1), "attend: position ", last - 1, " and sources for ", sources->size(1));
      const std::int32_t* found = own_sources.const_data_ptr<std::int32_t>() + i * sources->size(1);
      for (std::int64_t t = first; t < last; ++t) {
        TORCH_CHECK(0 <= found[t] && found[t] < k.size(0), "attend: source ", found[t], " of a cache of ", k.size(0),
                    " rows");
      }
    }
  }
  at::Tensor out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  const at::Tensor own = q.stride(2) == 1 ? q : q.contiguous();
  carry_out(Call{own, k, v, out, k_scale.has_value() ? k_scale->const_data_ptr<float>() : nullptr,
                 v_scale.has_value() ? v_scale->const_data_ptr<float>() : nullptr,
                 sourced ? own_sources.const_data_ptr<std::int32_t>() : nullptr, sourced ? sources->size(1) : 0, places,
                 static_cast<float>(scale), static_cast<float>(cap), window},
            divide(places, q.size(0), sourced, runs));
  return out;
}

// One thread after the other's KV heads, each in the order of the tokens: the last write wins.
void write_kv(at::Tensor k_cache, at::Tensor v_cache, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
              const at::Tensor& k, const at::Tensor& v, const OptionalTensor& rows, const at::Tensor& positions) {
  check_caches(k_cache, v_cache, k_scale, v_scale);
  for (const at::Tensor* x : {&k, &v}) {
    TORCH_CHECK(x->dim() == 3 && x->size(0) == k.size(0) && x->size(1) == k_cache.size(1) &&
                    x->size(2) == k_cache.size(3) && type_of(*x) != Type::i8,
                "attend: keys or values ", x->sizes(), " of ", x->scalar_type(), " for caches of ", k_cache.sizes());
  }
  const std::int64_t tokens = k.size(0), num_kv = k_cache.size(1), length = k_cache.size(2), h = k_cache.size(3);
  const Places places(rows, positions, tokens, k_cache, false);
  const Attention& loops = chosen_attention();
  const auto put = [&](const at::Tensor& from, at::Tensor& to, const OptionalTensor& scale, std::int64_t kv) {
    char* const data = static_cast<char*>(to.mutable_data_ptr());
    float* const scales = scale.has_value() ? scale->mutable_data_ptr<float>() : nullptr;
    WriteArgs args{nullptr, nullptr, nullptr, type_of(from), type_of(to), h};
    for (std::int64_t i = 0; i < tokens; ++i) {
      const std::int64_t place = (places.row(i) * num_kv + kv) * length + places.positions[i];
      args.from = bytes(from) + (i * from.stride(0) + kv * from.stride(1)) * from.element_size();
      args.to = data + place * h * to.element_size();
      args.scale = scales == nullptr ? nullptr : scales + place;
      loops.write(args);
    }
  };
  const at::Tensor own_k = k.stride(2) == 1 ? k : k.contiguous(), own_v = v.stride(2) == 1 ? v : v.contiguous();
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / (tokens * h + 1));
  at::parallel_for(0, 2 * num_kv, grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      if (i < num_kv) {
        put(own_k, k_cache, k_scale, i);
      } else {
        put(own_v, v_cache, v_scale, i - num_kv);
      }
    }
  });
}

// The two in one, as a layer does them: a call less for each of its tokens' steps.
at::Tensor write_and_attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor k_cache,
                            at::Tensor v_cache, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                            const OptionalTensor& rows, const at::Tensor& positions, at::IntArrayRef runs,
                            double scale, double cap, std::int64_t window, const OptionalTensor& sources) {
  write_kv(k_cache, v_cache, k_scale, v_scale, k, v, rows, positions);
  return attend(q, k_cache, v_cache, k_scale, v_scale, rows, positions, runs, scale, cap, window, sources);
}

TORCH_LIBRARY_FRAGMENT(yoke_kernels, library) {
  library.def(
      "write_and_attend(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, "
      "Tensor(d!)? v_scale, Tensor? rows, Tensor positions, int[] runs, float scale, float cap, int window, "
      "Tensor? sources) -> Tensor");
  library.def(
      "attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor? rows, "
      "Tensor positions, int[] runs, float scale, float cap, int window, Tensor? sources) -> Tensor");
  library.def(
      "write_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor k, "
      "Tensor v, Tensor? rows, Tensor positions) -> ()");
}

TORCH_LIBRARY_IMPL(yoke_kernels, CPU, library) {
  library.impl("attend", attend);
  library.impl("write_and_attend", write_and_attend);
  library.impl("write_kv", write_kv);
}

}  // namespace
}  // namespace yoke::kernels
