// Attention over a cache: the arguments of each instruction set's loops. Plain pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace yoke::kernels {

enum class Type { f32, bf16, f16, i8 };

// One token's attention: `group` query heads that share a KV head, over the cached positions [first, last).
// q [group, h] with heads `q_stride` numbers apart, out [group, h], both of `q_type`. The cache is of `cache_type`.
// Position t is at k and v + (sources[t] * row_stride + t) * h; without sources, at k and v + t * h. k_scale and
// v_scale (int8 only) have one number per position. Scores are multiplied by `scale`; with a cap they become
// cap * tanh(score / cap).
struct TokenArgs {
  const void* q;
  void* out;
  const void* k;
  const void* v;
  const float* k_scale;
  const float* v_scale;
  const std::int32_t* sources;
  float* scratch;  // token_scratch(...) floats
  Type q_type, cache_type;
  std::int64_t q_stride, row_stride, first, last, group, h;
  float scale, cap;
};

// The same for `tokens` tokens of one cache row at ascending `positions`. Each attends to the last `window` positions
// up to its own (0: all). Head g of token i is at q + i * token_stride + g * q_stride, and at
// out + i * out_stride + g * h.
struct ChunkArgs {
  const void* q;
  void* out;
  const void* k;
  const void* v;
  const float* k_scale;
  const float* v_scale;
  const std::int64_t* positions;
  float* scratch;  // chunk_scratch(...) floats, aligned to 64 bytes
  Type q_type, cache_type;
  std::int64_t tokens, token_stride, q_stride, out_stride, group, h, window;
  float scale, cap;
};

// Writes a key or value of `h` numbers to the cache. For int8, `scale` is set to the largest absolute value / 127.
struct WriteArgs {
  const void* from;
  void* to;
  float* scale;
  Type from_type, to_type;
  std::int64_t h;
};

// Rotary embedding of `heads` heads of a token, [heads, h] of `type`, from `from` to `to`. The first 2 * half numbers
// of each head are rotated: number i with number i + half or, if interleaved, number 2 i with 2 i + 1. cos and sin
// [half] are those of the angles. The other numbers are copied.
struct RotateArgs {
  const void* from;
  void* to;
  const float* cos;
  const float* sin;
  Type type;
  std::int64_t heads, h, half;
  bool interleaved;
};

constexpr std::int64_t kKeyBlock = 256;  // positions in a block of keys, which a chunk processes at a time

constexpr std::int64_t round_up(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit * unit; }

// The scratch sizes, in floats.
constexpr std::int64_t token_scratch(std::int64_t group, std::int64_t length, std::int64_t h) {
  return group * (2 * round_up(h, 16) + round_up(length, 16));
}

constexpr std::int64_t chunk_scratch(std::int64_t rows, std::int64_t h) {
  const std::int64_t tiled = round_up(rows, 32), wide = round_up(h, 32);
  return 2 * tiled * wide + 4 * tiled + 2 * kKeyBlock * (wide + 32 + 1);
}

struct Attention {
  void (*token)(const TokenArgs&);
  void (*chunk)(const ChunkArgs&);
  void (*write)(const WriteArgs&);
  void (*rotate)(const RotateArgs&);
};

extern const Attention base_attention;
#if defined(__x86_64__)
extern const Attention avx2_attention;
extern const Attention avx512_attention;
extern const Attention amx_attention;
#endif

}  // namespace yoke::kernels
