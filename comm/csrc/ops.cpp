// The collectives as torch operators. A group is named by a handle (a small integer), because an
// operator of a traced graph can carry an integer but not an object. The functional forms return new
// tensors and leave their inputs alone, so that a compiled graph needs no clone around them; the `out`
// forms write where they are told (an output may be its input) and return nothing.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "candidates.h"
#include "collectives.h"
#include "segment.h"

namespace yoke {
namespace {

// Threads of torch's own pool, which are where the launcher has put them.
const ParallelFor& torch_threads() {
  static const ParallelFor run = [](std::size_t size, std::size_t grain,
                                    const std::function<void(std::size_t, std::size_t)>& body) {
    const auto grains = static_cast<std::int64_t>((size + grain - 1) / grain);
    if (grains <= 1 || at::get_num_threads() == 1) {
      if (size != 0) body(0, size);
      return;
    }
    at::parallel_for(0, grains, 1, [&](std::int64_t begin, std::int64_t end) {
      body(static_cast<std::size_t>(begin) * grain, std::min(size, static_cast<std::size_t>(end) * grain));
    });
  };
  return run;
}

struct Group {
  Segment segment;
  Channel channel;
  const Kernels* kernels;
  std::size_t one_step_bytes;
  std::mutex mutex;  // two threads of this process in one group would share a step

  Group(const std::string& name, int rank, int world, std::size_t slot_bytes, std::size_t switch_bytes, double timeout_s)
      : segment(name, rank, world, Channel::control_bytes(world), 2 * slot_bytes, timeout_s),
        channel(segment.base(), rank, world, slot_bytes, [this](int peer) { return segment.is_alive(peer); }),
        kernels(&best_kernels()),
        one_step_bytes(std::min(switch_bytes, slot_bytes)) {
    channel.set_pid(getpid());
    channel.set_timeout(timeout_s);
    if (switch_bytes == 0) one_step_bytes = measure_switch_point(collectives());
  }

  Collectives collectives() { return {channel, kernels, one_step_bytes, torch_threads()}; }
};

// Handles count up from 1 in every process, so that ranks, and runs, give their groups the same
// handles and compiled graphs can be reused from the disk cache.
struct Registry {
  std::mutex mutex;
  std::map<std::int64_t, std::shared_ptr<Group>> groups;
  std::int64_t next = 1;
};

Registry& registry() {
  static auto* const instance = new Registry;  // never destroyed: operators may run while others end
  return *instance;
}

std::shared_ptr<Group> find(std::int64_t handle) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.groups.find(handle);
  TORCH_CHECK(found != all.groups.end(), "shared-memory group ", handle, " does not exist or was closed");
  TORCH_CHECK(found->second->segment.is_mine(), "shared-memory group ", handle,
              " belongs to the process that this one was forked from; open one here");
  return found->second;
}

// A group, locked for one operator.
struct Use {
  std::shared_ptr<Group> group;
  std::lock_guard<std::mutex> lock;

  explicit Use(std::int64_t handle) : group(find(handle)), lock(group->mutex) {}
  Collectives operator*() const { return group->collectives(); }
  int world() const { return group->channel.world(); }
};

std::int64_t shm_open_group(const std::string& name, std::int64_t rank, std::int64_t world, std::int64_t slot_bytes,
                            std::int64_t switch_bytes, double timeout_s) {
  TORCH_CHECK_VALUE(world >= 1 && world <= kMaxWorld && rank >= 0 && rank < world, "rank ", rank, " of ", world,
                    ": the world must be within 1..", kMaxWorld, " and the rank within it");
  TORCH_CHECK_VALUE(slot_bytes > 0 && slot_bytes % 4096 == 0, "buffers of ", slot_bytes, " bytes: must be whole pages");
  std::shared_ptr<Group> group;
  try {
    group = std::make_shared<Group>(name, static_cast<int>(rank), static_cast<int>(world),
                                    static_cast<std::size_t>(slot_bytes), static_cast<std::size_t>(switch_bytes),
                                    timeout_s);
  } catch (const SpaceError& error) {
    TORCH_CHECK(false, "no space: ", error.what());
  }
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

void shm_set_timeout(std::int64_t handle, double seconds) { find(handle)->channel.set_timeout(seconds); }

std::int64_t shm_switch_bytes(std::int64_t handle) { return static_cast<std::int64_t>(find(handle)->one_step_bytes); }

std::string shm_simd() { return best_kernels().name; }

// Chooses the instruction set of one group, for tests and measurements.
void shm_set_simd(std::int64_t handle, const std::string& name) {
  const Kernels* const kernels = find_kernels(name.c_str());
  TORCH_CHECK_VALUE(kernels != nullptr, "instruction set ", name, " was not built or does not run here");
  find(handle)->kernels = kernels;
}

DType summable(const char* what, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kInt:
      return DType::kInt32;
    case at::kLong:
      return DType::kInt64;
    default:
      TORCH_CHECK(false, what, " of ", x.scalar_type(),
                  ": shared memory sums float32, bfloat16, float16, int32 and int64");
  }
}

DType floating(const char* what, const at::Tensor& x) {
  const DType dtype = summable(what, x);
  TORCH_CHECK(dtype <= DType::kFloat16, what, " of ", x.scalar_type(), ": must be float32, bfloat16 or float16");
  return dtype;
}

// Bytes are moved whatever they mean; the type is still told, so that ranks that differ are found out.
DType movable(const at::Tensor& x) { return static_cast<DType>(100 + static_cast<int>(x.scalar_type())); }

// Where `out` is written: itself, if its memory is in order, else a buffer that is copied to it.
struct Output {
  const at::Tensor& out;
  at::Tensor buffer;

  Output(const char* what, const at::Tensor& out, at::IntArrayRef sizes, at::ScalarType dtype) : out(out) {
    TORCH_CHECK(out.sizes() == sizes && out.scalar_type() == dtype, what, ": out has shape ", out.sizes(),
                " and dtype ", out.scalar_type(), " where ", sizes, " and ", dtype, " are needed");
    buffer = out.is_contiguous() ? out : at::empty(sizes, out.options());
  }
  void* data() const { return buffer.mutable_data_ptr(); }
  void finish() const {
    if (!buffer.is_same(out)) out.copy_(buffer);
  }
};

std::size_t count_of(const at::Tensor& x) { return static_cast<std::size_t>(x.numel()); }

void all_reduce_into(const at::Tensor& x, void* out, std::int64_t handle) {
  const DType dtype = summable("all_reduce", x);
  const Use use(handle);
  all_reduce(*use, x.const_data_ptr(), out, count_of(x), dtype);
}

at::Tensor all_reduce_op(const at::Tensor& input, std::int64_t handle) {
  const at::Tensor x = input.contiguous();
  at::Tensor out = at::empty_like(x);
  all_reduce_into(x, out.mutable_data_ptr(), handle);
  return out;
}

void all_reduce_out(const at::Tensor& input, std::int64_t handle, const at::Tensor& out) {
  const at::Tensor x = input.contiguous();
  const Output to("all_reduce", out, x.sizes(), x.scalar_type());
  all_reduce_into(x, to.data(), handle);
  to.finish();
}

std::vector<std::int64_t> scattered_sizes(const at::Tensor& x, std::int64_t group_size) {
  TORCH_CHECK(x.dim() > 0 && x.size(0) % group_size == 0, "reduce_scatter of shape ", x.sizes(),
              ": the first dimension must be a multiple of the group's size, ", group_size);
  std::vector<std::int64_t> sizes = x.sizes().vec();
  sizes[0] /= group_size;
  return sizes;
}

void check_size(const char* what, std::int64_t group_size, const Use& use) {
  TORCH_CHECK(group_size == use.world(), what, " over ", group_size, " ranks in a group of ", use.world());
}

void reduce_scatter_into(const at::Tensor& x, void* out, std::int64_t group_size, std::int64_t handle) {
  const DType dtype = summable("reduce_scatter", x);
  const Use use(handle);
  check_size("reduce_scatter", group_size, use);
  reduce_scatter(*use, x.const_data_ptr(), out, count_of(x) / static_cast<std::size_t>(group_size), dtype);
}

// The size of the group is an argument, so that the shape of the result is known while tracing.
at::Tensor reduce_scatter_op(const at::Tensor& input, std::int64_t group_size, std::int64_t handle) {
  const at::Tensor x = input.contiguous();
  at::Tensor out = at::empty(scattered_sizes(x, group_size), x.options());
  reduce_scatter_into(x, out.mutable_data_ptr(), group_size, handle);
  return out;
}

void reduce_scatter_out(const at::Tensor& input, std::int64_t group_size, std::int64_t handle, const at::Tensor& out) {
  const at::Tensor x = input.contiguous();
  const Output to("reduce_scatter", out, scattered_sizes(x, group_size), x.scalar_type());
  // Parts are read after others have been written: they must not be the same memory.
  TORCH_CHECK(!to.buffer.is_alias_of(x), "reduce_scatter: out shares its memory with the input");
  reduce_scatter_into(x, to.data(), group_size, handle);
  to.finish();
}

std::vector<std::int64_t> gathered_sizes(const at::Tensor& x, std::int64_t group_size) {
  std::vector<std::int64_t> sizes = x.sizes().vec();
  sizes.insert(sizes.begin(), group_size);
  return sizes;
}

void all_gather_into(const at::Tensor& x, void* out, std::int64_t group_size, std::int64_t handle) {
  const Use use(handle);
  check_size("all_gather", group_size, use);
  all_gather(*use, x.const_data_ptr(), out, x.nbytes(), movable(x));
}

at::Tensor all_gather_op(const at::Tensor& input, std::int64_t group_size, std::int64_t handle) {
  const at::Tensor x = input.contiguous();
  at::Tensor out = at::empty(gathered_sizes(x, group_size), x.options());
  all_gather_into(x, out.mutable_data_ptr(), group_size, handle);
  return out;
}

void all_gather_out(const at::Tensor& input, std::int64_t group_size, std::int64_t handle, const at::Tensor& out) {
  const at::Tensor x = input.contiguous();
  const Output to("all_gather", out, gathered_sizes(x, group_size), x.scalar_type());
  TORCH_CHECK(!to.buffer.is_alias_of(x), "all_gather: out shares its memory with the input");
  all_gather_into(x, to.data(), group_size, handle);
  to.finish();
}

void broadcast_into(const at::Tensor& x, void* out, std::int64_t root, std::int64_t handle) {
  const Use use(handle);
  TORCH_CHECK(root >= 0 && root < use.world(), "broadcast from rank ", root, " in a group of ", use.world());
  broadcast(*use, x.const_data_ptr(), out, x.nbytes(), static_cast<int>(root), movable(x));
}

at::Tensor broadcast_op(const at::Tensor& input, std::int64_t root, std::int64_t handle) {
  const at::Tensor x = input.contiguous();
  at::Tensor out = at::empty_like(x);
  broadcast_into(x, out.mutable_data_ptr(), root, handle);
  return out;
}

void broadcast_out(const at::Tensor& input, std::int64_t root, std::int64_t handle, const at::Tensor& out) {
  const at::Tensor x = input.contiguous();
  const Output to("broadcast", out, x.sizes(), x.scalar_type());
  broadcast_into(x, to.data(), root, handle);
  to.finish();
}

void barrier_op(std::int64_t handle) {
  const Use use(handle);
  barrier(*use);
}

std::tuple<at::Tensor, at::Tensor> all_reduce_add_rms_norm_op(const at::Tensor& input, const at::Tensor& residual_input,
                                                              const at::Tensor& weight_input, double eps,
                                                              std::int64_t handle) {
  const char* const name = "all_reduce_add_rms_norm";
  const DType dtype = floating(name, input);
  const auto type = input.scalar_type();
  TORCH_CHECK(input.dim() > 0 && residual_input.sizes() == input.sizes() && weight_input.dim() == 1 &&
                  weight_input.size(0) == input.size(-1),
              name, ": shapes ", input.sizes(), ", ", residual_input.sizes(), ", ", weight_input.sizes(),
              ": the residual's must be that of x, and the weight's the last of its dimensions");
  TORCH_CHECK(residual_input.scalar_type() == type && weight_input.scalar_type() == type, name, ": dtypes ", type, ", ",
              residual_input.scalar_type(), ", ", weight_input.scalar_type(), ": must be the same");
  const at::Tensor x = input.contiguous(), residual = residual_input.contiguous(), weight = weight_input.contiguous();
  at::Tensor normed = at::empty_like(x), new_residual = at::empty_like(x);
  const auto width = static_cast<std::size_t>(x.size(-1));
  const std::size_t rows = width == 0 ? 0 : count_of(x) / width;
  const Use use(handle);
  all_reduce_add_rms_norm(*use, x.const_data_ptr(), residual.const_data_ptr(), weight.const_data_ptr(),
                          static_cast<float>(eps), normed.mutable_data_ptr(), new_residual.mutable_data_ptr(), rows,
                          width, dtype);
  return {normed, new_residual};
}

// The best `k` of each row of [rows, columns], over the columns of all ranks.
std::vector<Candidate> best_of(const char* name, const at::Tensor& logits, std::size_t k, std::int64_t offset,
                               std::int64_t handle) {
  TORCH_CHECK(logits.dim() == 2, name, ": logits of shape ", logits.sizes(), ": must be [rows, columns]");
  floating(name, logits);
  const at::Tensor x = logits.to(at::kFloat).contiguous();
  const auto rows = static_cast<std::size_t>(x.size(0)), columns = static_cast<std::size_t>(x.size(1));
  std::vector<Candidate> best(rows * k);
  const Use use(handle);
  best_candidates(*use, x.const_data_ptr<float>(), rows, columns, k, offset, best.data());
  TORCH_CHECK(best.empty() || best.back().index != kNoIndex, name, " of ", k, ": there are fewer columns in all");
  return best;
}

at::Tensor argmax_op(const at::Tensor& logits, std::int64_t offset, std::int64_t handle) {
  const auto best = best_of("argmax", logits, 1, offset, handle);
  at::Tensor out = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  for (std::size_t row = 0; row < best.size(); ++row) out.mutable_data_ptr<std::int64_t>()[row] = chosen(best[row]);
  return out;
}

std::tuple<at::Tensor, at::Tensor> topk_op(const at::Tensor& logits, std::int64_t k, std::int64_t offset,
                                           std::int64_t handle) {
  TORCH_CHECK(k >= 1, "topk of ", k, ": must be at least 1");
  const auto best = best_of("topk", logits, static_cast<std::size_t>(k), offset, handle);
  at::Tensor values = at::empty({logits.size(0), k}, logits.options().dtype(at::kFloat));
  at::Tensor indices = at::empty({logits.size(0), k}, logits.options().dtype(at::kLong));
  for (std::size_t i = 0; i < best.size(); ++i) {
    values.mutable_data_ptr<float>()[i] = best[i].value;
    indices.mutable_data_ptr<std::int64_t>()[i] = best[i].index;
  }
  return {values, indices};
}

}  // namespace
}  // namespace yoke

TORCH_LIBRARY(yoke, m) {
  m.def(
      "shm_open_group(str name, int rank, int world, int slot_bytes, int switch_bytes, float timeout_s) -> int",
      &yoke::shm_open_group);
  m.def("shm_close_group(int group) -> ()", &yoke::shm_close_group);
  m.def("shm_set_timeout(int group, float seconds) -> ()", &yoke::shm_set_timeout);
  m.def("shm_switch_bytes(int group) -> int", &yoke::shm_switch_bytes);
  m.def("shm_simd() -> str", &yoke::shm_simd);
  m.def("shm_set_simd(int group, str name) -> ()", &yoke::shm_set_simd);
  m.def("barrier(int group) -> ()", &yoke::barrier_op);
  m.def("all_reduce(Tensor x, int group) -> Tensor");
  m.def("all_reduce.out(Tensor x, int group, *, Tensor(a!) out) -> ()");
  m.def("reduce_scatter(Tensor x, int group_size, int group) -> Tensor");
  m.def("reduce_scatter.out(Tensor x, int group_size, int group, *, Tensor(a!) out) -> ()");
  m.def("all_gather(Tensor x, int group_size, int group) -> Tensor");
  m.def("all_gather.out(Tensor x, int group_size, int group, *, Tensor(a!) out) -> ()");
  m.def("broadcast(Tensor x, int root, int group) -> Tensor");
  m.def("broadcast.out(Tensor x, int root, int group, *, Tensor(a!) out) -> ()");
  m.def(
      "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int group) -> (Tensor, Tensor)");
  m.def("argmax(Tensor logits, int offset, int group) -> Tensor");
  m.def("topk(Tensor logits, int k, int offset, int group) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(yoke, CPU, m) {
  m.impl("all_reduce", &yoke::all_reduce_op);
  m.impl("all_reduce.out", &yoke::all_reduce_out);
  m.impl("reduce_scatter", &yoke::reduce_scatter_op);
  m.impl("reduce_scatter.out", &yoke::reduce_scatter_out);
  m.impl("all_gather", &yoke::all_gather_op);
  m.impl("all_gather.out", &yoke::all_gather_out);
  m.impl("broadcast", &yoke::broadcast_op);
  m.impl("broadcast.out", &yoke::broadcast_out);
  m.impl("all_reduce_add_rms_norm", &yoke::all_reduce_add_rms_norm_op);
  m.impl("argmax", &yoke::argmax_op);
  m.impl("topk", &yoke::topk_op);
}
