// Attention over a cache: what the loops of each instruction set take. Plain pointers and sizes, nothing of torch.
#pragma once

#include <cstdint>

namespace yoke::kernels {

enum class Type { f32, bf16, f16, i8 };

// One token's attention: `group` query heads that share a KV head, over the cached positions [first, last).
// q [group, h] with heads `q_stride` apart, out [group, h], both of `q_type`. Position t of the cache lies
// (sources[t] * row_stride + t) * h behind k and v, of which k_scale and v_scale (int8) have one number per
// position; without sources, at t * h. Scores are multiplied by `scale`; with a cap they become
// cap * tanh(score / cap).
struct TokenArgs {
  const void* q;
  void* out;
  const void* k;
  const void* v;
  const float* k_scale;
  const float* v_scale;
  const std::int32_t* sources;
  float* scratch;  // of token_scratch
  Type q_type, cache_type;
  std::int64_t q_stride, row_stride, first, last, group, h;
  float scale, cap;
};

// The same for `tokens` tokens of one row at ascending `positions`, which see each the last `window` positions
// up to their own (0: all). Token i and head g of q lie i * token_stride + g * q_stride behind q, those of out
// i * out_stride + g * h behind out.
struct ChunkArgs {
  const void* q;
  void* out;
  const void* k;
  const void* v;
  const float* k_scale;
  const float* v_scale;
  const std::int64_t* positions;
  float* scratch;  // of chunk_scratch, on a border of 64 bytes
  Type q_type, cache_type;
  std::int64_t tokens, token_stride, q_stride, out_stride, group, h, window;
  float scale, cap;
};

// A key or value of `h` numbers on its way into the cache; for int8, `scale` becomes the largest / 127.
struct WriteArgs {
  const void* from;
  void* to;
  float* scale;
  Type from_type, to_type;
  std::int64_t h;
};

// `heads` heads of a token, [heads, h] of `type`, on their way from the product to where they attend: the first
// 2 * half numbers of each are turned (rotary embedding), number i with number i + half, or interleaved number 2 i
// with 2 i + 1, by the angles of which cos and sin [half] are given; the rest is copied.
struct TurnArgs {
  const void* from;
  void* to;
  const float* cos;
  const float* sin;
  Type type;
  std::int64_t heads, h, half;
  bool interleaved;
};

constexpr std::int64_t kKeyBlock = 256;  // positions that a chunk attends to at a time

constexpr std::int64_t round_up(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit * unit; }

// In floats.
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
  void (*turn)(const TurnArgs&);
};

extern const Attention base_attention;
#if defined(__x86_64__)
extern const Attention avx2_attention;
extern const Attention avx512_attention;
extern const Attention amx_attention;
#endif

}  // namespace yoke::kernels
