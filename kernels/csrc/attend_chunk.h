// Attention of a chunk of tokens over their cache row, one block of keys at a time, with an online softmax
// (FlashAttention: Dao et al., 2022; the running maximum: Milakov and Gimelshein, 2018).
//
// Everything is transposed: a lane is a query. The query heads that share a KV head are treated as further queries, so
// the rows are (token, head of the group), kLanes in a tile. Scores are [key][query], so the softmax needs no operation
// across lanes. Keys and values keep their layout; queries and results are transposed once each.
// An `Engine` does the matmuls; the one here uses floats and works on any instruction set.
#pragma once

#include "attend_token.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

constexpr int kTiles = 2;                     // tiles of queries at a time
constexpr int64_t kRow = kTiles * kLanes;     // scores [key][kRow]

// The buffers in ChunkArgs::scratch.
struct Room {
  float* queries;  // [tile][wide][kLanes], or the engine's own layout
  float* sums;     // [tile][wide][kLanes]
  float* largest;  // [row], like the next three
  float* total;
  int32_t* first;  // the first position that the row attends to
  int32_t* last;   // the last one, inclusive
  float* keys;     // [kKeyBlock][wide], or the engine's own layout; so are the values
  float* values;
  float* scores;   // [kKeyBlock][kRow]
  float* weights;  // the same size, for an engine whose weights have another layout than the scores
  float* k_factor;  // [kKeyBlock]
  float* v_factor;

  Room(float* at, int64_t rows, int64_t wide) {
    const int64_t tiled = round_up(rows, kRow), block = kKeyBlock;
    const auto take = [&at](int64_t count) {
      float* const found = at;
      at += count;
      return found;
    };
    queries = take(tiled * wide), sums = take(tiled * wide);
    largest = take(tiled), total = take(tiled);
    first = reinterpret_cast<int32_t*>(take(tiled)), last = reinterpret_cast<int32_t*>(take(tiled));
    keys = take(block * wide), values = take(block * wide);
    scores = take(block * kRow), weights = take(block * kRow);
    k_factor = take(block), v_factor = take(block);
  }
};

inline bool differ(Lanes x, Lanes y) { return memcmp(&x, &y, sizeof x) != 0; }

inline Ints load(const int32_t* from) {
  Ints x;
  memcpy(&x, from, sizeof x);
  return x;
}

// How dot products become scores. kRaw: unchanged, with one positive factor applied in the exponent. kFactors: times a
// factor for each key. kCapped: times a factor, and soft-capped.
enum Form { kRaw, kFactors, kCapped };

// Converts the scores of a tile's queries and keys [from, to) of the block at `base` to weights 2^(slope * (score -
// largest)), and rescales the sums so far to the new maximum. Scores are subtracted before they are multiplied, because
// differences are almost exact, and scores times a factor would be rounded.
template <class Engine, bool kScaled>
inline void softmax(const Room& room, int64_t tile, int j, int64_t base, int64_t from, int64_t to, int64_t wide,
                    Form form, float slope, float cap) {
  float* scores = room.scores + j * kLanes;
  float* const at_largest = room.largest + tile * kLanes;
  float* const at_total = room.total + tile * kLanes;
  const Lanes before = load(at_largest);
  const Ints first = load(room.first + tile * kLanes) - static_cast<int32_t>(base);
  const Ints last = load(room.last + tile * kLanes) - static_cast<int32_t>(base);
  const auto prepare = [&](Lanes largest, int64_t t, int64_t stop, auto form_of, auto is_masked) {
    const auto score_of = [&](int64_t key) {
      float* const at = scores + key * kRow;
      Lanes score = load(at);
      if constexpr (form_of != kRaw) score *= room.k_factor[key];
      if constexpr (form_of == kCapped) score = tanh(score) * cap;
      if constexpr (is_masked != 0) {
        const int32_t k = static_cast<int32_t>(key);
        score = ((first <= k) & (last >= k)) ? score : all(-INFINITY);
      }
      if constexpr (form_of != kRaw || is_masked != 0) store(score, at);
      return score;
    };
    Lanes second = largest, third = largest, fourth = largest;  // four chains: each maximum waits for the one before
    for (; t + 4 <= stop; t += 4) {
      largest = larger(score_of(t), largest);
      second = larger(score_of(t + 1), second);
      third = larger(score_of(t + 2), third);
      fourth = larger(score_of(t + 3), fourth);
    }
    for (; t < stop; ++t) largest = larger(score_of(t), largest);
    return larger(larger(largest, second), larger(third, fourth));
  };
  // Queries are in the order of their positions: keys that the first and the last attend to need no mask.
  const auto within = [](int64_t t, int64_t low, int64_t high) { return t < low ? low : t > high ? high : t; };
  const int64_t clear = within(room.first[tile * kLanes + kLanes - 1] - base, from, to);
  const int64_t masked = within(room.last[tile * kLanes] + 1 - base, clear, to);
  const auto prepare_all = [&](auto form_of) {
    const Lanes in_front = prepare(before, from, clear, form_of, Number<1>{});
    return prepare(prepare(in_front, clear, masked, form_of, Number<0>{}), masked, to, form_of, Number<1>{});
  };
  const Lanes now = form == kRaw       ? prepare_all(Number<kRaw>{})
                    : form == kFactors ? prepare_all(Number<kFactors>{})
                                       : prepare_all(Number<kCapped>{});
  const auto top = Engine::top(now, slope);
  const Lanes kept = Engine::weight(before, top, slope), none = all(-INFINITY);  // `kept` is 0 in the first block
  // Skipped if the maximum did not change, or if the sums are still zero.
  if (differ(before, now) && differ(before, none)) {
    float* sums = room.sums + tile * wide * kLanes;
    for (int64_t d = 0; d < wide * kLanes; d += kLanes) store(load(sums + d) * kept, sums + d);
  }
  store(now, at_largest);
  Lanes even = {}, odd = {};
  Engine::begin(room, tile, wide);
  constexpr int64_t kPart = Engine::kStep / Engine::kParts;
  for (int64_t step = from; step < to; step += Engine::kStep) {
#pragma GCC unroll 4
    for (int part = 0; part < Engine::kParts; ++part) {
      if (step > from) Engine::weigh_along(room, j, step - Engine::kStep, wide, part);
      for (int64_t t = step + part * kPart; t < step + (part + 1) * kPart; t += 2) {
        Lanes a = Engine::weight(load(scores + t * kRow), top, slope);
        Lanes b = Engine::weight(load(scores + (t + 1) * kRow), top, slope);
        even += a;
        odd += b;
        if constexpr (kScaled) {
          a *= room.v_factor[t];
          b *= room.v_factor[t + 1];
        }
        Engine::put(room, j, t, a, b);
      }
    }
  }
  for (int part = 0; part < Engine::kParts; ++part) Engine::weigh_along(room, j, to - Engine::kStep, wide, part);
  Engine::end(room, tile, wide);
  store(load(at_total) * kept + (even + odd), at_total);
}

// The offsets of a tile's rows (token, head), in numbers, computed without a division for each. The last row is
// repeated to fill the tile.
struct Places {
  int64_t count, at[kLanes];

  Places(const ChunkArgs& a, int64_t row, int64_t token_stride, int64_t head_stride) {
    const int64_t left = a.tokens * a.group - row;
    count = left < kLanes ? left : kLanes;
    int64_t token = row / a.group, head = row % a.group;
    for (int64_t i = 0; i < kLanes; ++i) {
      at[i] = i < count ? token * token_stride + head * head_stride : at[count - 1];
      if (++head == a.group) ++token, head = 0;
    }
  }
};

template <class Q>
inline void finish(const ChunkArgs& a, const Room& room, int64_t wide) {
  for (int64_t row = 0; row < a.tokens * a.group; row += kLanes) {
    const Places places(a, row, a.out_stride, a.h);
    const Lanes inverse = 1.0f / load(room.total + row);
    for (int64_t d = 0; d < a.h; d += kLanes) {
      Ints x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) x[i] = as<Ints>(load(room.sums + row * wide + (d + i) * kLanes) * inverse);
      transpose(x);
      const int64_t left = a.h - d;
      for (int64_t i = 0; i < places.count; ++i) {
        Q* const to = static_cast<Q*>(a.out) + places.at[i] + d;
        if (left >= kLanes) {
          store(as<Lanes>(x[i]), to);
        } else {
          store(as<Lanes>(x[i]), to, left);
        }
      }
    }
  }
}

template <class Engine, class T>
void attend_chunk(const ChunkArgs& a) {
  const int64_t rows = a.tokens * a.group, tiles = round_up(rows, kLanes) / kLanes, wide = round_up(a.h, 32);
  const Room room(a.scratch, rows, wide);
  for (int64_t row = 0; row < tiles * kLanes; ++row) {
    const int64_t position = a.positions[row < rows ? row / a.group : a.tokens - 1];
    const int64_t first = a.window > 0 && position >= a.window ? position + 1 - a.window : 0;
    room.first[row] = static_cast<int32_t>(first);
    room.last[row] = static_cast<int32_t>(position);
    room.largest[row] = -INFINITY;
    room.total[row] = 0;
  }
  memset(room.sums, 0, sizeof(float) * static_cast<size_t>(tiles * kLanes * wide));
  for (int64_t tile = 0; tile < tiles; ++tile) Engine::queries(a, room, tile * kLanes, wide);
  constexpr bool kScaled = sizeof(T) == 1;
  const float factor = a.cap != 0 ? a.scale / a.cap : a.scale;
  const Form form = a.cap != 0 ? kCapped : kScaled || !(factor > 0) ? kFactors : kRaw;
  const float slope = form == kRaw ? factor * kLog2E : kLog2E;
  const int64_t end = room.last[rows - 1] + 1;
  for (int64_t base = room.first[0] / kKeyBlock * kKeyBlock; base < end; base += kKeyBlock) {
    const int64_t count = end - base < kKeyBlock ? end - base : kKeyBlock;
    const auto* k = Engine::keys(static_cast<const T*>(a.k) + base * a.h, count, a.h, wide, room);
    const int64_t unseen = room.first[0] - base;  // keys before the first window: weights are 0, values may be anything
    Engine::values(static_cast<const T*>(a.v) + base * a.h, unseen, count, a.h, wide, room);
    for (int64_t t = 0; t < kKeyBlock; ++t) {
      room.k_factor[t] = kScaled && t < count ? factor * a.k_scale[base + t] : factor;
      room.v_factor[t] = kScaled && t < count ? a.v_scale[base + t] : 0;
    }
    for (int64_t tile = 0; tile < tiles; tile += kTiles) {
      const int64_t num = tiles - tile < kTiles ? tiles - tile : kTiles;
      int64_t to = room.last[(tile + num) * kLanes - 1] + 1 - base, from = room.first[tile * kLanes] - base;
      to = round_up(to < count ? to : count, Engine::kStep);
      from = from > 0 ? from / Engine::kStep * Engine::kStep : 0;
      if (from >= to) continue;
      Engine::scores(room, k, a.h, tile, num, from, to, wide);
      for (int j = 0; j < num; ++j) softmax<Engine, kScaled>(room, tile + j, j, base, from, to, wide, form, slope, a.cap);
      Engine::add(room, tile, num, from, to, wide);
    }
  }
  switch (a.q_type) {
    case Type::bf16: return finish<brain>(a, room, wide);
    case Type::f16: return finish<half>(a, room, wide);
    default: return finish<float>(a, room, wide);
  }
}

constexpr int kDeep = 4;  // so that sums [kDeep][kTiles] fit in registers

struct Floats {
  static constexpr int64_t kStep = 4, kParts = 1;  // keys in a step; calls of weigh_along for a step

  static void queries(const ChunkArgs& a, const Room& room, int64_t row, int64_t wide) {
    switch (a.q_type) {
      case Type::bf16: return queries_of<brain>(a, room, row, wide);
      case Type::f16: return queries_of<half>(a, room, row, wide);
      default: return queries_of<float>(a, room, row, wide);
    }
  }

  template <class Q>
  static void queries_of(const ChunkArgs& a, const Room& room, int64_t row, int64_t wide) {
    const Places places(a, row, a.token_stride, a.q_stride);
    for (int64_t d = 0; d < wide; d += kLanes) {
      const int64_t left = a.h - d;
      Ints x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const Q* const from = static_cast<const Q*>(a.q) + places.at[i] + d;
        x[i] = left >= kLanes ? as<Ints>(load(from)) : left > 0 ? as<Ints>(load(from, left)) : Ints{};
      }
      transpose(x);
      memcpy(room.queries + row * wide + d * kLanes, x, sizeof x);
    }
  }

  template <class T>
  static const float* keys(const T* k, int64_t count, int64_t h, int64_t wide, const Room& room) {
    copy(k, 0, count, h, wide, room.keys);
    return room.keys;
  }

  template <class T>
  static void values(const T* v, int64_t unseen, int64_t count, int64_t h, int64_t wide, const Room& room) {
    copy(v, unseen, count, h, wide, room.values);
  }

  template <class T>
  static void copy(const T* from, int64_t unseen, int64_t count, int64_t h, int64_t wide, float* to) {
    for (int64_t t = 0; t < round_up(count, kStep); ++t) {
      memset(to + t * wide, 0, sizeof(float) * static_cast<size_t>(wide));
      if (t >= unseen && t < count) to_floats(from + t * h, to + t * wide, h);
    }
  }

  static Lanes top(Lanes largest, float) { return largest; }
  static Lanes weight(Lanes score, Lanes largest, float slope) { return exp2((score - largest) * slope); }

  static void put(const Room& room, int j, int64_t t, Lanes a, Lanes b) {
    store(a, room.scores + t * kRow + j * kLanes);
    store(b, room.scores + (t + 1) * kRow + j * kLanes);
  }

  static void scores(const Room& room, const float* k, int64_t h, int64_t tile, int64_t num, int64_t from, int64_t to,
                     int64_t wide) {
    const float* q = room.queries + tile * wide * kLanes;
    if (num == 2) {
      multiply<2>(q, k, h, from, to, room.scores, wide);
    } else {
      multiply<1>(q, k, h, from, to, room.scores, wide);
    }
  }

  template <int W>
  static void multiply(const float* q, const float* k, int64_t h, int64_t from, int64_t to, float* scores,
                       int64_t wide) {
    for (int64_t t = from; t < to; t += kDeep) {
      Lanes sums[kDeep][W] = {};
      for (int64_t d = 0; d < h; ++d) {
        for (int w = 0; w < W; ++w) {
          const Lanes query = load(q + (w * wide + d) * kLanes);
          for (int i = 0; i < kDeep; ++i) sums[i][w] += query * k[(t + i) * wide + d];
        }
      }
      for (int i = 0; i < kDeep; ++i) {
        for (int w = 0; w < W; ++w) store(sums[i][w], scores + (t + i) * kRow + w * kLanes);
      }
    }
  }

  // This engine adds no values during the softmax.
  static void begin(const Room&, int64_t, int64_t) {}
  static void weigh_along(const Room&, int, int64_t, int64_t, int) {}
  static void end(const Room&, int64_t, int64_t) {}

  static void add(const Room& room, int64_t tile, int64_t num, int64_t from, int64_t to, int64_t wide) {
    float* sums = room.sums + tile * wide * kLanes;
    if (num == 2) {
      weigh<2>(room.values, room.scores, from, to, sums, wide);
    } else {
      weigh<1>(room.values, room.scores, from, to, sums, wide);
    }
  }

  template <int W>
  static void weigh(const float* values, const float* weights, int64_t from, int64_t to, float* into, int64_t wide) {
    for (int64_t d = 0; d < wide; d += kDeep) {
      Lanes sums[kDeep][W];
      for (int i = 0; i < kDeep; ++i) {
        for (int w = 0; w < W; ++w) sums[i][w] = load(into + (w * wide + d + i) * kLanes);
      }
      for (int64_t t = from; t < to; ++t) {
        for (int w = 0; w < W; ++w) {
          const Lanes weight = load(weights + t * kRow + w * kLanes);
          for (int i = 0; i < kDeep; ++i) sums[i][w] += weight * values[t * wide + d + i];
        }
      }
      for (int i = 0; i < kDeep; ++i) {
        for (int w = 0; w < W; ++w) store(sums[i][w], into + (w * wide + d + i) * kLanes);
      }
    }
  }
};

void chunk(const ChunkArgs& a) {
  switch (a.cache_type) {
    case Type::f32: return attend_chunk<Floats, float>(a);
    case Type::bf16: return attend_chunk<Floats, brain>(a);
    case Type::f16: return attend_chunk<Floats, half>(a);
    case Type::i8: return attend_chunk<Floats, int8_t>(a);
  }
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
