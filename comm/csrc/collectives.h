// The collectives on a channel: plain bytes and counts, no torch.
//
// Messages of up to the group's switch point take one step: everybody copies in, waits once, and sums
// all buffers straight into its output. Larger ones are reduced in parts (each rank its own) and
// gathered, in chunks that stay in the caches, so that main memory sees the input once and the output
// once. Step i of that pipeline does three things for three chunks: copies chunk i in, reduces this
// rank's part of chunk i-1, and copies the peers' parts of chunk i-2 out; so a chunk costs one wait.
#pragma once

#include <cstddef>
#include <functional>

#include "channel.h"
#include "kernels.h"

namespace yoke {

// Calls body(begin, end) for parts of [0, size) on all threads of the rank. Ends are multiples of
// `grain`, but for the last.
using ParallelFor =
    std::function<void(std::size_t size, std::size_t grain, const std::function<void(std::size_t, std::size_t)>& body)>;

struct Collectives {
  Channel& channel;
  const Kernels* kernels;
  std::size_t one_step_bytes;  // messages up to this take one step; at most a slot
  const ParallelFor& parallel_for;
};

// Sum over ranks. `out` may be `in`. Throws what Channel::commit throws, as all of these do.
void all_reduce(const Collectives& c, const void* in, void* out, std::size_t count, DType dtype);

// in: world parts of `count` elements, one for each rank; out: this rank's part, summed.
void reduce_scatter(const Collectives& c, const void* in, void* out, std::size_t count, DType dtype);

// out: world parts of `bytes`, rank after rank. `dtype` is compared, not used, as for broadcast; `op` is
// what it is part of.
void all_gather(const Collectives& c, const void* in, void* out, std::size_t bytes, DType dtype, Op op = kAllGather);

// `out` may be `in`.
void broadcast(const Collectives& c, const void* in, void* out, std::size_t bytes, int root, DType dtype);

void barrier(const Collectives& c);

// new_residual = residual + sum over ranks of x, rounded once; normed = its root mean square norm, row
// by row: [rows, width]. `new_residual` may be `residual`.
void all_reduce_add_rms_norm(const Collectives& c, const void* x, const void* residual, const void* weight, float eps,
                             void* normed, void* new_residual, std::size_t rows, std::size_t width, DType dtype);

// Measures both algorithms on this group, a few milliseconds at most, and returns the same switch point
// on every rank. All ranks call it.
std::size_t measure_switch_point(const Collectives& c);

}  // namespace yoke
