// The collectives on a channel: plain bytes and counts, no torch.
//
// Messages up to the group's switch point take one step: every rank copies its input in, waits once, and
// sums all buffers straight into its output. Larger messages are reduce-scattered and all-gathered in chunks
// that stay in the caches, so main memory is read once for the input and written once for the output. Step i
// of that pipeline copies chunk i in, reduces this rank's part of chunk i-1, and copies the peers' parts of
// chunk i-2 out. So a chunk costs one wait.
#pragma once

#include <cstddef>
#include <functional>

#include "channel.h"
#include "kernels.h"

namespace yoke {

// Calls body(begin, end) for parts of [0, size) on all threads of the rank. All ends except the last are
// multiples of `grain`.
using ParallelFor =
    std::function<void(std::size_t size, std::size_t grain, const std::function<void(std::size_t, std::size_t)>& body)>;

struct Collectives {
  Channel& channel;
  const Kernels* kernels;
  std::size_t one_step_bytes;  // messages up to this size take one step; at most a slot
  const ParallelFor& parallel_for;
};

// The sum over ranks. `out` may be `in`. All functions here throw the exceptions of Channel::commit.
void all_reduce(const Collectives& c, const void* in, void* out, std::size_t count, DType dtype);

// in: one part of `count` elements for each rank; out: this rank's part, summed.
void reduce_scatter(const Collectives& c, const void* in, void* out, std::size_t count, DType dtype);

// out: one part of `bytes` from each rank, in rank order. `dtype` is only compared between ranks, as in
// broadcast; `op` is the operator that this is part of.
void all_gather(const Collectives& c, const void* in, void* out, std::size_t bytes, DType dtype, Op op = kAllGather);

// `out` may be `in`.
void broadcast(const Collectives& c, const void* in, void* out, std::size_t bytes, int root, DType dtype);

void barrier(const Collectives& c);

// new_residual = residual + sum over ranks of x, rounded once; normed = RMSNorm of each row of
// new_residual, times weight. All are [rows, width], weight is [width]. `new_residual` may be `residual`.
void all_reduce_add_rms_norm(const Collectives& c, const void* x, const void* residual, const void* weight, float eps,
                             void* normed, void* new_residual, std::size_t rows, std::size_t width, DType dtype);

// Measures both algorithms on this group, which takes a few milliseconds at most, and returns the same
// switch point in bytes on every rank. All ranks must call it.
std::size_t measure_switch_point(const Collectives& c);

}  // namespace yoke
