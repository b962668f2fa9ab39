// The collectives as torch operators. A group is named by a handle (a small integer), because an
// operator of a traced graph can carry an integer but not an object. The functional forms return new
// tensors and leave their inputs alone, so that a compiled graph needs no clone around them; the `out`
// forms write to a given tensor (an output may be its input) and return nothing.
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
#include "tensor.h"

namespace yoke {
namespace {

// The threads of torch's pool, which the launcher has bound.
const ParallelFor& torch_threads() {
  static const ParallelFor run = [](std::size_t size, std::size_t grain,
                                    const std::function<void(std::size_t, std::size_t)>& body) {
    const auto grains = static_cast<std::int64_t>((size + grain - 1) / grain);
    if (grains <= 1 || num_threads() == 1) {
      if (size != 0) body(0, size);
      return;
    }
    parallel_for(0, grains, 1, [&](std::int64_t begin, std::int64_t end) {
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
  static auto* const instance = new Registry;  // never destroyed: operators may run while the process exits
  return *instance;
}

std::shared_ptr<Group> find(std::int64_t handle) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.groups.find(handle);
  YOKE_CHECK(found != all.groups.end(), "shared-memory group ", handle, " does not exist or was closed");
  YOKE_CHECK(found->second->segment.is_mine(), "shared-memory group ", handle,
              " belongs to the process from which this one was forked; open a new group here");
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
  YOKE_CHECK_VALUE(world >= 1 && world <= kMaxWorld && rank >= 0 && rank < world, "rank ", rank, " of ", world,
                    ": the world must be within 1..", kMaxWorld, " and the rank within it");
  YOKE_CHECK_VALUE(slot_bytes > 0 && slot_bytes % 4096 == 0, "buffers of ", slot_bytes, " bytes: must be whole pages");
  std::shared_ptr<Group> group;
  try {
    group = std::make_shared<Group>(name, static_cast<int>(rank), static_cast<int>(world),
                                    static_cast<std::size_t>(slot_bytes), static_cast<std::size_t>(switch_bytes),
                                    timeout_s);
  } catch (const SpaceError& error) {
    YOKE_CHECK(false, "no space: ", error.what());
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
  YOKE_CHECK_VALUE(kernels != nullptr, "instruction set ", name, " was not built or does not run here");
  find(handle)->kernels = kernels;
}

DType summable(const char* what, const Tensor& x) {
  switch (x.scalar_type()) {
    case Scalar::f32:
      return DType::kFloat32;
    case Scalar::bf16:
      return DType::kBFloat16;
    case Scalar::f16:
      return DType::kFloat16;
    case Scalar::i32:
      return DType::kInt32;
    case Scalar::i64:
      return DType::kInt64;
    default:
      YOKE_CHECK(false, what, " of ", x.scalar_type(),
                  ": shared memory sums float32, bfloat16, float16, int32 and int64");
  }
}

DType floating(const char* what, const Tensor& x) {
  const DType dtype = summable(what, x);
  YOKE_CHECK(dtype <= DType::kFloat16, what, " of ", x.scalar_type(), ": must be float32, bfloat16 or float16");
  return dtype;
}

// These collectives only move bytes. The dtype is still part of the description, so that ranks whose dtypes
// differ get an error.
DType movable(const Tensor& x) { return static_cast<DType>(100 + static_cast<int>(x.scalar_type())); }

// Where the result is written: `out` itself if it is contiguous, else a buffer that is copied to it.
struct Output {
  const Tensor& out;
  Tensor buffer;

  Output(const char* what, const Tensor& out, Sizes sizes, Scalar dtype) : out(out) {
    YOKE_CHECK(out.sizes() == sizes && out.scalar_type() == dtype, what, ": out has shape ", out.sizes(),
                " and dtype ", out.scalar_type(), " where ", sizes, " and ", dtype, " are needed");
    buffer = out.is_contiguous() ? out.contiguous() : empty(sizes, dtype);
  }
  void* data() const { return buffer.mutable_data_ptr(); }
  void finish() const {
    if (!buffer.is_same(out)) out.copy_(buffer);
  }
};

std::size_t count_of(const Tensor& x) { return static_cast<std::size_t>(x.numel()); }

void all_reduce_into(const Tensor& x, void* out, std::int64_t handle) {
  const DType dtype = summable("all_reduce", x);
  const Use use(handle);
  all_reduce(*use, x.const_data_ptr(), out, count_of(x), dtype);
}

Tensor all_reduce_op(const Tensor& input, std::int64_t handle) {
  const Tensor x = input.contiguous();
  Tensor out = empty(x.sizes(), x.scalar_type());
  all_reduce_into(x, out.mutable_data_ptr(), handle);
  return out;
}

void all_reduce_out(const Tensor& input, std::int64_t handle, const Tensor& out) {
  const Tensor x = input.contiguous();
  const Output to("all_reduce", out, x.sizes(), x.scalar_type());
  all_reduce_into(x, to.data(), handle);
  to.finish();
}

std::vector<std::int64_t> scattered_sizes(const Tensor& x, std::int64_t group_size) {
  YOKE_CHECK(x.dim() > 0 && x.size(0) % group_size == 0, "reduce_scatter of shape ", x.sizes(),
              ": the first dimension must be a multiple of the group's size, ", group_size);
  std::vector<std::int64_t> sizes = x.sizes().vec();
  sizes[0] /= group_size;
  return sizes;
}

void check_size(const char* what, std::int64_t group_size, const Use& use) {
  YOKE_CHECK(group_size == use.world(), what, " over ", group_size, " ranks in a group of ", use.world());
}

void reduce_scatter_into(const Tensor& x, void* out, std::int64_t group_size, std::int64_t handle) {
  const DType dtype = summable("reduce_scatter", x);
  const Use use(handle);
  check_size("reduce_scatter", group_size, use);
  reduce_scatter(*use, x.const_data_ptr(), out, count_of(x) / static_cast<std::size_t>(group_size), dtype);
}

// The size of the group is an argument, so that the shape of the result is known while tracing.
Tensor reduce_scatter_op(const Tensor& input, std::int64_t group_size, std::int64_t handle) {
  const Tensor x = input.contiguous();
  Tensor out = empty(scattered_sizes(x, group_size), x.scalar_type());
  reduce_scatter_into(x, out.mutable_data_ptr(), group_size, handle);
  return out;
}

void reduce_scatter_out(const Tensor& input, std::int64_t group_size, std::int64_t handle, const Tensor& out) {
  const Tensor x = input.contiguous();
  const Output to("reduce_scatter", out, scattered_sizes(x, group_size), x.scalar_type());
  // Parts are read after other parts have been written, so input and output must not share memory.
  YOKE_CHECK(!to.buffer.is_alias_of(x), "reduce_scatter: out shares its memory with the input");
  reduce_scatter_into(x, to.data(), group_size, handle);
  to.finish();
}

std::vector<std::int64_t> gathered_sizes(const Tensor& x, std::int64_t group_size) {
  std::vector<std::int64_t> sizes = x.sizes().vec();
  sizes.insert(sizes.begin(), group_size);
  return sizes;
}

void all_gather_into(const Tensor& x, void* out, std::int64_t group_size, std::int64_t handle) {
  const Use use(handle);
  check_size("all_gather", group_size, use);
  all_gather(*use, x.const_data_ptr(), out, x.nbytes(), movable(x));
}

Tensor all_gather_op(const Tensor& input, std::int64_t group_size, std::int64_t handle) {
  const Tensor x = input.contiguous();
  Tensor out = empty(gathered_sizes(x, group_size), x.scalar_type());
  all_gather_into(x, out.mutable_data_ptr(), group_size, handle);
  return out;
}

void all_gather_out(const Tensor& input, std::int64_t group_size, std::int64_t handle, const Tensor& out) {
  const Tensor x = input.contiguous();
  const Output to("all_gather", out, gathered_sizes(x, group_size), x.scalar_type());
  YOKE_CHECK(!to.buffer.is_alias_of(x), "all_gather: out shares its memory with the input");
  all_gather_into(x, to.data(), group_size, handle);
  to.finish();
}

void broadcast_into(const Tensor& x, void* out, std::int64_t root, std::int64_t handle) {
  const Use use(handle);
  YOKE_CHECK(root >= 0 && root < use.world(), "broadcast from rank ", root, " in a group of ", use.world());
  broadcast(*use, x.const_data_ptr(), out, x.nbytes(), static_cast<int>(root), movable(x));
}

Tensor broadcast_op(const Tensor& input, std::int64_t root, std::int64_t handle) {
  const Tensor x = input.contiguous();
  Tensor out = empty(x.sizes(), x.scalar_type());
  broadcast_into(x, out.mutable_data_ptr(), root, handle);
  return out;
}

void broadcast_out(const Tensor& input, std::int64_t root, std::int64_t handle, const Tensor& out) {
  const Tensor x = input.contiguous();
  const Output to("broadcast", out, x.sizes(), x.scalar_type());
  broadcast_into(x, to.data(), root, handle);
  to.finish();
}

void barrier_op(std::int64_t handle) {
  const Use use(handle);
  barrier(*use);
}

std::tuple<Tensor, Tensor> all_reduce_add_rms_norm_op(const Tensor& input, const Tensor& residual_input,
                                                              const Tensor& weight_input, double eps,
                                                              std::int64_t handle) {
  const char* const name = "all_reduce_add_rms_norm";
  const DType dtype = floating(name, input);
  const auto type = input.scalar_type();
  YOKE_CHECK(input.dim() > 0 && residual_input.sizes() == input.sizes() && weight_input.dim() == 1 &&
                  weight_input.size(0) == input.size(-1),
              name, ": shapes ", input.sizes(), ", ", residual_input.sizes(), ", ", weight_input.sizes(),
              ": the residual's must be that of x, and the weight's the last of its dimensions");
  YOKE_CHECK(residual_input.scalar_type() == type && weight_input.scalar_type() == type, name, ": dtypes ", type, ", ",
              residual_input.scalar_type(), ", ", weight_input.scalar_type(), ": must be the same");
  const Tensor x = input.contiguous(), residual = residual_input.contiguous(), weight = weight_input.contiguous();
  Tensor normed = empty(x.sizes(), x.scalar_type()), new_residual = empty(x.sizes(), x.scalar_type());
  const auto width = static_cast<std::size_t>(x.size(-1));
  const std::size_t rows = width == 0 ? 0 : count_of(x) / width;
  const Use use(handle);
  all_reduce_add_rms_norm(*use, x.const_data_ptr(), residual.const_data_ptr(), weight.const_data_ptr(),
                          static_cast<float>(eps), normed.mutable_data_ptr(), new_residual.mutable_data_ptr(), rows,
                          width, dtype);
  return {std::move(normed), std::move(new_residual)};
}

// The best `k` of each row of [rows, columns], over the columns of all ranks.
std::vector<Candidate> best_of(const char* name, const Tensor& logits, std::size_t k, std::int64_t offset,
                               std::int64_t handle) {
  YOKE_CHECK(logits.dim() == 2, name, ": logits of shape ", logits.sizes(), ": must be [rows, columns]");
  floating(name, logits);
  const Tensor x = logits.to(Scalar::f32).contiguous();
  const auto rows = static_cast<std::size_t>(x.size(0)), columns = static_cast<std::size_t>(x.size(1));
  std::vector<Candidate> best(rows * k);
  const Use use(handle);
  best_candidates(*use, x.const_data_ptr<float>(), rows, columns, k, offset, best.data());
  YOKE_CHECK(best.empty() || best.back().index != kNoIndex, name, " of ", k, ": all ranks together have fewer columns");
  return best;
}

Tensor argmax_op(const Tensor& logits, std::int64_t offset, std::int64_t handle) {
  const auto best = best_of("argmax", logits, 1, offset, handle);
  Tensor out = empty({logits.size(0)}, Scalar::i64);
  for (std::size_t row = 0; row < best.size(); ++row) out.mutable_data_ptr<std::int64_t>()[row] = chosen(best[row]);
  return out;
}

std::tuple<Tensor, Tensor> topk_op(const Tensor& logits, std::int64_t k, std::int64_t offset,
                                           std::int64_t handle) {
  YOKE_CHECK(k >= 1, "topk of ", k, ": must be at least 1");
  const auto best = best_of("topk", logits, static_cast<std::size_t>(k), offset, handle);
  Tensor values = empty({logits.size(0), k}, Scalar::f32);
  Tensor indices = empty({logits.size(0), k}, Scalar::i64);
  for (std::size_t i = 0; i < best.size(); ++i) {
    values.mutable_data_ptr<float>()[i] = best[i].value;
    indices.mutable_data_ptr<std::int64_t>()[i] = best[i].index;
  }
  return {std::move(values), std::move(indices)};
}

const Operators operators(
    "yoke",
    {
        op<all_reduce_op>("all_reduce(Tensor x, int group) -> Tensor"),
        op<all_reduce_out>("all_reduce.out(Tensor x, int group, *, Tensor(a!) out) -> ()"),
        op<reduce_scatter_op>("reduce_scatter(Tensor x, int group_size, int group) -> Tensor"),
        op<reduce_scatter_out>("reduce_scatter.out(Tensor x, int group_size, int group, *, Tensor(a!) out) -> ()"),
        op<all_gather_op>("all_gather(Tensor x, int group_size, int group) -> Tensor"),
        op<all_gather_out>("all_gather.out(Tensor x, int group_size, int group, *, Tensor(a!) out) -> ()"),
        op<broadcast_op>("broadcast(Tensor x, int root, int group) -> Tensor"),
        op<broadcast_out>("broadcast.out(Tensor x, int root, int group, *, Tensor(a!) out) -> ()"),
        op<all_reduce_add_rms_norm_op>(
            "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int group) -> (Tensor, "
            "Tensor)"),
        op<argmax_op>("argmax(Tensor logits, int offset, int group) -> Tensor"),
        op<topk_op>("topk(Tensor logits, int k, int offset, int group) -> (Tensor, Tensor)"),
    },
    {
        op<shm_open_group>(
            "shm_open_group(str name, int rank, int world, int slot_bytes, int switch_bytes, float timeout_s) -> "
            "int"),
        op<shm_close_group>("shm_close_group(int group) -> ()"),
        op<shm_set_timeout>("shm_set_timeout(int group, float seconds) -> ()"),
        op<shm_switch_bytes>("shm_switch_bytes(int group) -> int"),
        op<shm_simd>("shm_simd() -> str"),
        op<shm_set_simd>("shm_set_simd(int group, str name) -> ()"),
        op<barrier_op>("barrier(int group) -> ()"),
    });

}  // namespace
}  // namespace yoke
