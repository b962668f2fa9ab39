#include "collectives.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

namespace yoke {
namespace {

constexpr std::size_t kThreadGrain = 32 * 1024;  // bytes; fewer are not worth another thread

double now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

const std::byte* bytes_of(const void* p) { return static_cast<const std::byte*>(p); }
std::byte* bytes_of(void* p) { return static_cast<std::byte*>(p); }

struct Sources {
  std::array<const void*, kMaxWorld> at;

  void advance(int world, std::size_t bytes) {
    for (std::size_t rank = 0; rank < static_cast<std::size_t>(world); ++rank) at[rank] = bytes_of(at[rank]) + bytes;
  }
};

// How a message is divided: into chunks of `part` units for each rank. The last chunk and its last parts may
// be shorter. A unit is an element or a row.
struct Cut {
  std::size_t total;  // units
  std::size_t part;   // units of a rank in a chunk
  int world;

  std::size_t chunk() const { return part * static_cast<std::size_t>(world); }
  std::size_t num_chunks() const { return (total + chunk() - 1) / chunk(); }
  std::size_t begin(std::size_t chunk_index, int rank) const {
    return std::min(total, chunk_index * chunk() + static_cast<std::size_t>(rank) * part);
  }
  std::size_t size(std::size_t chunk_index, int rank) const {
    return std::min(total, begin(chunk_index, rank) + part) - begin(chunk_index, rank);
  }
};

// The pipeline of the large reductions. `unit` is the size of a unit in bytes. `reduce(sources, begin, size,
// result)` sums `size` units from unit `begin` of the message on, into `result` for the peers and into the
// output. `finish(begin, size, result)` copies a part that a peer has summed to the output.
template <typename Reduce, typename Finish>
void reduce_in_parts(const Collectives& c, const char* name, const StepDescription& description, const void* in,
                     std::size_t unit, const Cut& cut, const Reduce& reduce, const Finish& finish) {
  Channel& channel = c.channel;
  const int me = channel.rank(), world = channel.world();
  const std::size_t part_bytes = cut.part * unit;
  const std::size_t result_offset = part_bytes * static_cast<std::size_t>(world);
  const std::size_t grain = std::max<std::size_t>(1, kThreadGrain / unit);
  const std::size_t chunks = cut.num_chunks();
  for (std::size_t i = 0; i < chunks + 2; ++i) {
    std::byte* const slot = i <= chunks ? channel.begin() : nullptr;
    // All three stages run for the same range of a part, so that one start of the threads serves them.
    c.parallel_for(cut.part, grain, [&](std::size_t begin, std::size_t end) {
      const auto clip = [&](std::size_t chunk, int rank) {
        return std::min(end, std::max(begin, cut.size(chunk, rank))) - begin;
      };
      if (i < chunks) {
        for (int rank = 0; rank < world; ++rank) {
          const std::size_t size = rank == me ? 0 : clip(i, rank);
          if (size == 0) continue;
          std::memcpy(slot + static_cast<std::size_t>(rank) * part_bytes + begin * unit,
                      bytes_of(in) + (cut.begin(i, rank) + begin) * unit, size * unit);
        }
      }
      if (i >= 1 && i <= chunks) {
        if (const std::size_t size = clip(i - 1, me)) {
          const std::size_t at = cut.begin(i - 1, me) + begin;
          Sources sources;
          for (int rank = 0; rank < world; ++rank) {
            sources.at[static_cast<std::size_t>(rank)] =
                rank == me ? bytes_of(in) + at * unit
                           : channel.slot_of(rank) + static_cast<std::size_t>(me) * part_bytes + begin * unit;
          }
          reduce(sources, at, size, slot + result_offset + begin * unit);
        }
      }
      if (i >= 2) {
        for (int rank = 0; rank < world; ++rank) {
          const std::size_t size = rank == me ? 0 : clip(i - 2, rank);
          if (size == 0) continue;
          finish(cut.begin(i - 2, rank) + begin, size, channel.slot_of(rank) + result_offset + begin * unit);
        }
      }
    });
    if (i <= chunks) channel.commit(name, description);
  }
}

// The units in a part: a slot holds a part for every rank, and this rank's result.
std::size_t part_units(const Collectives& c, std::size_t unit) {
  const std::size_t units = c.channel.slot_bytes() / (static_cast<std::size_t>(c.channel.world()) + 1) / unit;
  const std::size_t line = std::max<std::size_t>(1, 64 / unit);  // parts start at cache lines
  return units >= line ? units / line * line : units;
}

// Exchanges a message in pieces of at most a slot: copies piece i in while it copies piece i-1 out.
template <typename TakeOut>
void exchange(const Collectives& c, const char* name, const StepDescription& description, const void* in,
              std::size_t bytes, bool contributes, const TakeOut& take_out) {
  Channel& channel = c.channel;
  const std::size_t piece = channel.slot_bytes();
  // A message of no bytes still takes a step, so that the ranks stay in step.
  const std::size_t pieces = std::max<std::size_t>(1, (bytes + piece - 1) / piece);
  const auto size_at = [&](std::size_t i) { return std::min(bytes, (i + 1) * piece) - std::min(bytes, i * piece); };
  for (std::size_t i = 0; i <= pieces; ++i) {
    std::byte* const slot = i < pieces ? channel.begin() : nullptr;
    const std::size_t mine = i < pieces && contributes ? size_at(i) : 0;
    const std::size_t theirs = i > 0 ? size_at(i - 1) : 0;
    const auto both = [&](std::size_t begin, std::size_t end) {
      if (const std::size_t stop = std::min(end, mine); begin < stop) {
        std::memcpy(slot + begin, bytes_of(in) + i * piece + begin, stop - begin);
      }
      if (const std::size_t stop = std::min(end, theirs); begin < stop) {
        take_out((i - 1) * piece + begin, begin, stop - begin);
      }
    };
    if (const std::size_t most = std::max(mine, theirs); most > 2 * kThreadGrain) {
      c.parallel_for(most, kThreadGrain, both);
    } else if (most > 0) {
      both(0, most);
    }
    if (i < pieces) channel.commit(name, description);
  }
}

StepDescription describe(Op op, DType dtype, std::size_t size, std::uint64_t argument = 0) {
  return {op, static_cast<std::uint32_t>(dtype), size, argument};
}

Sources slots(const Channel& channel, std::size_t offset) {
  Sources sources;
  for (int rank = 0; rank < channel.world(); ++rank) {
    sources.at[static_cast<std::size_t>(rank)] = channel.slot_of(rank) + offset;
  }
  return sources;
}

void all_reduce_one_step(const Collectives& c, const void* in, void* out, std::size_t count, DType dtype) {
  const std::size_t unit = size_of(dtype);
  if (count != 0) std::memcpy(c.channel.begin(), in, count * unit);
  else c.channel.begin();
  c.channel.commit("all_reduce", describe(kAllReduce, dtype, count));
  const SumFunction sum = c.kernels->sum[static_cast<std::size_t>(dtype)];
  const Sources sources = slots(c.channel, 0);
  if (count * unit <= 2 * kThreadGrain) {
    sum(out, sources.at.data(), c.channel.world(), count);
    return;
  }
  c.parallel_for(count, kThreadGrain / unit, [&](std::size_t begin, std::size_t end) {
    const Sources shifted = slots(c.channel, begin * unit);
    sum(bytes_of(out) + begin * unit, shifted.at.data(), c.channel.world(), end - begin);
  });
}

void all_reduce_in_parts(const Collectives& c, const void* in, void* out, std::size_t count, DType dtype) {
  const std::size_t unit = size_of(dtype);
  const Cut cut{count, part_units(c, unit), c.channel.world()};
  const SumFunction sum = c.kernels->sum[static_cast<std::size_t>(dtype)];
  reduce_in_parts(
      c, "all_reduce", describe(kAllReduce, dtype, count, 1), in, unit, cut,
      [&](const Sources& sources, std::size_t at, std::size_t size, void* result) {
        sum(result, sources.at.data(), c.channel.world(), size);
        std::memcpy(bytes_of(out) + at * unit, result, size * unit);
      },
      [&](std::size_t at, std::size_t size, const void* result) {
        std::memcpy(bytes_of(out) + at * unit, result, size * unit);
      });
}

}  // namespace

void all_reduce(const Collectives& c, const void* in, void* out, std::size_t count, DType dtype) {
  if (count * size_of(dtype) <= c.one_step_bytes) {
    all_reduce_one_step(c, in, out, count, dtype);
  } else {
    all_reduce_in_parts(c, in, out, count, dtype);
  }
}

void reduce_scatter(const Collectives& c, const void* in, void* out, std::size_t count, DType dtype) {
  Channel& channel = c.channel;
  const int me = channel.rank(), world = channel.world();
  const std::size_t unit = size_of(dtype);
  // A slot holds one piece of every rank's part.
  const std::size_t piece = std::max<std::size_t>(1, channel.slot_bytes() / static_cast<std::size_t>(world) / unit);
  const std::size_t pieces = std::max<std::size_t>(1, (count + piece - 1) / piece);
  const std::size_t grain = std::max<std::size_t>(1, kThreadGrain / unit);
  const SumFunction sum = c.kernels->sum[static_cast<std::size_t>(dtype)];
  const auto size_at = [&](std::size_t i) { return std::min(count, (i + 1) * piece) - std::min(count, i * piece); };
  for (std::size_t i = 0; i <= pieces; ++i) {
    std::byte* const slot = i < pieces ? channel.begin() : nullptr;
    c.parallel_for(piece, grain, [&](std::size_t begin, std::size_t end) {
      const std::size_t mine = i < pieces ? std::min(end, size_at(i)) : 0;
      for (int rank = 0; rank < world && begin < mine; ++rank) {
        if (rank == me) continue;
        const auto r = static_cast<std::size_t>(rank);
        std::memcpy(slot + (r * piece + begin) * unit, bytes_of(in) + (r * count + i * piece + begin) * unit,
                    (mine - begin) * unit);
      }
      const std::size_t stop = i > 0 ? std::min(end, size_at(i - 1)) : 0;
      if (begin >= stop) return;
      const std::size_t at = (i - 1) * piece + begin;
      Sources sources = slots(channel, (static_cast<std::size_t>(me) * piece + begin) * unit);
      sources.at[static_cast<std::size_t>(me)] = bytes_of(in) + (static_cast<std::size_t>(me) * count + at) * unit;
      sum(bytes_of(out) + at * unit, sources.at.data(), world, stop - begin);
    });
    if (i < pieces) channel.commit("reduce_scatter", describe(kReduceScatter, dtype, count));
  }
}

void all_gather(const Collectives& c, const void* in, void* out, std::size_t bytes, DType dtype, Op op) {
  const Channel& channel = c.channel;
  exchange(c, name_of(op), describe(op, dtype, bytes), in, bytes, true,
           [&](std::size_t at, std::size_t offset, std::size_t size) {
             for (int rank = 0; rank < channel.world(); ++rank) {
               std::memcpy(bytes_of(out) + static_cast<std::size_t>(rank) * bytes + at, channel.slot_of(rank) + offset,
                           size);
             }
           });
}

void broadcast(const Collectives& c, const void* in, void* out, std::size_t bytes, int root, DType dtype) {
  const Channel& channel = c.channel;
  const bool is_root = channel.rank() == root;
  exchange(c, "broadcast", describe(kBroadcast, dtype, bytes, static_cast<std::uint64_t>(root)), in, bytes, is_root,
           [&](std::size_t at, std::size_t offset, std::size_t size) {
             if (!is_root) std::memcpy(bytes_of(out) + at, channel.slot_of(root) + offset, size);
           });
  if (is_root && out != in && bytes != 0) std::memcpy(out, in, bytes);
}

void barrier(const Collectives& c) {
  c.channel.begin();
  c.channel.commit("barrier", describe(kBarrier, DType::kBytes, 0));
}

void all_reduce_add_rms_norm(const Collectives& c, const void* x, const void* residual, const void* weight, float eps,
                             void* normed, void* new_residual, std::size_t rows, std::size_t width, DType dtype) {
  Channel& channel = c.channel;
  const std::size_t type = static_cast<std::size_t>(dtype);
  const std::size_t unit = size_of(dtype), row = width * unit, total = rows * row;
  const int world = channel.world();
  const AddSumFunction add_sum = c.kernels->add_sum[type];
  const CopyFunction copy = c.kernels->copy[type];
  const NormFunction norm = c.kernels->rms_norm[type];
  // Row by row, so that the norm reads from the L1 cache. `shared` may be null.
  const auto sum_rows = [&](Sources sources, std::size_t at, std::size_t size, std::byte* shared) {
    for (std::size_t i = at * row; i < (at + size) * row; i += row) {
      const float squares =
          add_sum(bytes_of(new_residual) + i, shared, sources.at.data(), world, bytes_of(residual) + i, width);
      norm(bytes_of(normed) + i, bytes_of(new_residual) + i, squares, weight, eps, width);
      sources.advance(world, row);
      if (shared != nullptr) shared += row;
    }
  };
  const auto take_rows = [&](std::size_t at, std::size_t size, const std::byte* summed) {
    for (std::size_t i = at * row; i < (at + size) * row; i += row, summed += row) {
      const float squares = copy(bytes_of(new_residual) + i, summed, width);
      norm(bytes_of(normed) + i, bytes_of(new_residual) + i, squares, weight, eps, width);
    }
  };
  const auto description = [&](std::uint64_t algorithm) {
    return describe(kAddNorm, dtype, rows * width, algorithm + (static_cast<std::uint64_t>(width) << 2));
  };
  if (total <= c.one_step_bytes) {
    std::byte* const slot = channel.begin();
    if (total != 0) std::memcpy(slot, x, total);
    channel.commit("all_reduce_add_rms_norm", description(0));
    const auto some_rows = [&](std::size_t begin, std::size_t end) {
      sum_rows(slots(channel, begin * row), begin, end - begin, nullptr);
    };
    if (total <= 2 * kThreadGrain || row == 0) {
      some_rows(0, row == 0 ? 0 : rows);
    } else {
      c.parallel_for(rows, std::max<std::size_t>(1, kThreadGrain / row), some_rows);
    }
    return;
  }
  const std::size_t part = channel.slot_bytes() / (static_cast<std::size_t>(world) + 1) / row;
  if (part == 0) {  // a row is longer than a part: reduce by elements, then normalize the rows
    const Cut cut{rows * width, part_units(c, unit), world};
    reduce_in_parts(
        c, "all_reduce_add_rms_norm", description(1), x, unit, cut,
        [&](const Sources& sources, std::size_t at, std::size_t size, void* result) {
          add_sum(bytes_of(new_residual) + at * unit, result, sources.at.data(), world, bytes_of(residual) + at * unit,
                  size);
        },
        [&](std::size_t at, std::size_t size, const void* result) {
          std::memcpy(bytes_of(new_residual) + at * unit, result, size * unit);
        });
    c.parallel_for(rows, 1, [&](std::size_t begin, std::size_t end) {
      take_rows(begin, end - begin, bytes_of(new_residual) + begin * row);
    });
    return;
  }
  reduce_in_parts(c, "all_reduce_add_rms_norm", description(2), x, row, Cut{rows, part, world}, sum_rows, take_rows);
}

std::size_t measure_switch_point(const Collectives& c) {
  Channel& channel = c.channel;
  constexpr double kBudgetSeconds = 8e-3;
  constexpr std::size_t kLeast = 16 * 1024;  // below, one step always wins
  constexpr int kRepeats = 5;
  const std::size_t slot = channel.slot_bytes();
  std::vector<float> in(slot / sizeof(float)), out(slot / sizeof(float));
  const double start = now();
  // Goes down from the largest message that fits one step to the first size where one step wins: other work
  // on the machine can disturb a single measurement, and one step is never much slower.
  for (std::size_t bytes = slot; bytes > kLeast; bytes /= 2) {
    const std::size_t count = bytes / sizeof(float);
    double seconds[3] = {1e9, 1e9, 0.0};  // one step, in parts, and since the start
    for (int i = 0; i < kRepeats; ++i) {
      for (int in_parts = 0; in_parts < 2; ++in_parts) {
        const double before = now();
        (in_parts ? all_reduce_in_parts : all_reduce_one_step)(c, in.data(), out.data(), count, DType::kFloat32);
        seconds[in_parts] = std::min(seconds[in_parts], now() - before);
      }
    }
    seconds[2] = now() - start;
    // Each rank measured its own times; all ranks use the slowest rank's.
    std::vector<double> everyones(3 * static_cast<std::size_t>(channel.world()));
    all_gather(c, seconds, everyones.data(), sizeof seconds, DType::kBytes);
    for (std::size_t i = 0; i < everyones.size(); ++i) seconds[i % 3] = std::max(seconds[i % 3], everyones[i]);
    if (seconds[0] <= 1.15 * seconds[1]) return bytes;
    if (seconds[2] > kBudgetSeconds) return std::min<std::size_t>(bytes, 128 * 1024);  // shared cores
  }
  return std::min(slot, kLeast);
}

}  // namespace yoke
