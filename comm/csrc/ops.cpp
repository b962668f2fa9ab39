// The collectives as torch operators. A group is named by a handle (a small integer), because an
// operator of a traced graph can carry an integer but not an object. Every operator is functional: it
// returns a new tensor and leaves its input alone, so that a compiled graph needs no clone around it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "reduce.h"
#include "shm_group.h"

namespace yoke {
namespace {

enum Op : std::uint32_t { kAllReduce = 1, kAllGather = 2, kBroadcast = 3, kBarrier = 4 };

// Handles count up from 1 in every process, so that ranks, and runs, give their groups the same
// handles and compiled graphs can be reused from the disk cache.
struct Registry {
  std::mutex mutex;
  std::map<std::int64_t, std::shared_ptr<ShmGroup>> groups;
  std::int64_t next = 1;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

std::shared_ptr<ShmGroup> find(std::int64_t handle) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.groups.find(handle);
  TORCH_CHECK(found != all.groups.end(), "shared-memory group ", handle, " does not exist or was closed");
  return found->second;
}

std::int64_t shm_open_group(const std::string& name, std::int64_t rank, std::int64_t world,
                            std::int64_t slot_bytes, double timeout_s) {
  auto group = std::make_shared<ShmGroup>(name, static_cast<int>(rank), static_cast<int>(world),
                                          static_cast<std::size_t>(slot_bytes), timeout_s);
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.groups[all.next] = std::move(group);
  return all.next++;
}

void shm_close_group(std::int64_t handle) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.groups.erase(handle);  // closing twice is fine
}

void shm_set_timeout(std::int64_t handle, double seconds) { find(handle)->set_timeout(seconds); }

StepDescription describe(Op op, const at::Tensor& x, std::size_t bytes) {
  return {op, static_cast<std::uint32_t>(x.scalar_type()), bytes};
}

// Cuts `total` bytes into pieces of a slot; a message of no bytes still takes a step, so that the ranks
// stay in step.
template <typename Piece>
void for_each_piece(std::size_t total, std::size_t slot_bytes, const Piece& piece) {
  std::size_t begin = 0;
  do {
    const std::size_t size = std::min(slot_bytes, total - begin);
    piece(begin, size);
    begin += size;
  } while (begin < total);
}

template <typename T>
void sum_piece(void (*sum)(T*, const T* const*, int, std::size_t), std::byte* out, const std::byte* const* buffers,
               int world, std::size_t bytes) {
  sum(reinterpret_cast<T*>(out), reinterpret_cast<const T* const*>(buffers), world, bytes / sizeof(T));
}

at::Tensor all_reduce(const at::Tensor& input, std::int64_t handle) {
  const auto group = find(handle);
  const at::Tensor x = input.contiguous();
  at::Tensor out = at::empty_like(x);
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "all_reduce of ", dtype,
              ": the shared-memory backend sums float32, bfloat16 and float16");
  const auto* in = static_cast<const std::byte*>(x.const_data_ptr());
  auto* result = static_cast<std::byte*>(out.mutable_data_ptr());
  for_each_piece(x.nbytes(), group->slot_bytes(), [&](std::size_t begin, std::size_t bytes) {
    const auto* buffers = group->step("all_reduce", describe(kAllReduce, x, bytes), in + begin, bytes);
    if (dtype == at::kFloat) {
      sum_piece(sum_f32, result + begin, buffers, group->world(), bytes);
    } else {
      sum_piece(dtype == at::kBFloat16 ? sum_bf16 : sum_f16, result + begin, buffers, group->world(), bytes);
    }
  });
  return out;
}

// The size of the group is an argument, so that the shape of the result is known while tracing.
at::Tensor all_gather(const at::Tensor& input, std::int64_t group_size, std::int64_t handle) {
  const auto group = find(handle);
  TORCH_CHECK(group_size == group->world(), "all_gather over ", group_size, " ranks in a group of ", group->world());
  const at::Tensor x = input.contiguous();
  std::vector<std::int64_t> sizes = x.sizes().vec();
  sizes.insert(sizes.begin(), group->world());
  at::Tensor out = at::empty(sizes, x.options());
  const std::size_t total = x.nbytes();
  const auto* in = static_cast<const std::byte*>(x.const_data_ptr());
  auto* result = static_cast<std::byte*>(out.mutable_data_ptr());
  for_each_piece(total, group->slot_bytes(), [&](std::size_t begin, std::size_t bytes) {
    const auto* buffers = group->step("all_gather", describe(kAllGather, x, bytes), in + begin, bytes);
    if (bytes == 0) return;
    for (int peer = 0; peer < group->world(); ++peer) {
      std::memcpy(result + static_cast<std::size_t>(peer) * total + begin, buffers[peer], bytes);
    }
  });
  return out;
}

at::Tensor broadcast(const at::Tensor& input, std::int64_t root, std::int64_t handle) {
  const auto group = find(handle);
  TORCH_CHECK(root >= 0 && root < group->world(), "broadcast from rank ", root, " in a group of ", group->world());
  const at::Tensor x = input.contiguous();
  at::Tensor out = at::empty_like(x);
  const auto* in = static_cast<const std::byte*>(x.const_data_ptr());
  auto* result = static_cast<std::byte*>(out.mutable_data_ptr());
  for_each_piece(x.nbytes(), group->slot_bytes(), [&](std::size_t begin, std::size_t bytes) {
    const std::size_t mine = group->rank() == root ? bytes : 0;
    const auto* buffers = group->step("broadcast", describe(kBroadcast, x, bytes), in + begin, mine);
    if (bytes != 0) std::memcpy(result + begin, buffers[root], bytes);
  });
  return out;
}

void barrier(std::int64_t handle) {
  find(handle)->step("barrier", {kBarrier, 0, 0}, nullptr, 0);
}

}  // namespace
}  // namespace yoke

TORCH_LIBRARY(yoke, m) {
  m.def("shm_open_group(str name, int rank, int world, int slot_bytes, float timeout_s) -> int",
        &yoke::shm_open_group);
  m.def("shm_close_group(int group) -> ()", &yoke::shm_close_group);
  m.def("shm_set_timeout(int group, float seconds) -> ()", &yoke::shm_set_timeout);
  m.def("barrier(int group) -> ()", &yoke::barrier);
  m.def("all_reduce(Tensor x, int group) -> Tensor");
  m.def("all_gather(Tensor x, int group_size, int group) -> Tensor");
  m.def("broadcast(Tensor x, int root, int group) -> Tensor");
}

TORCH_LIBRARY_IMPL(yoke, CPU, m) {
  m.impl("all_reduce", &yoke::all_reduce);
  m.impl("all_gather", &yoke::all_gather);
  m.impl("broadcast", &yoke::broadcast);
}
