// torch.ops.yoke_kernels.*: the choice of an instruction set; products: checks and the division among threads.
// (Attention: ops_attend.cpp.)
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#if __has_include(<torch/csrc/shim_exception_state.h>)  // torch 2.13 has it
#include <torch/csrc/shim_exception_state.h>
#define YOKE_KNOWS_ERRORS
#endif

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "kernels.h"

namespace yoke::kernels {
namespace {

#if defined(__x86_64__)
// Whether the processor has AMX for bf16 and int8, and Linux lets this process have the registers (they are large, and
// not given without being asked for).
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  if ((d & kAll) != kAll) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found{&base_kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_kernels);
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) found.push_back(&avx512_kernels);
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    found.push_back(&avx512bf16_kernels);
    if (may_use_tiles()) found.push_back(&amx_kernels);
  }
#endif
  return found;
}

const Kernels*& chosen() {
  static const Kernels* best = runnable().back();
  return best;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable()) names.emplace_back(kernels->name);
  return names;
}

// For tests and measurements: all that follows uses this one.
void use_instruction_set(const std::string& name) {
  for (const Kernels* kernels : runnable()) {
    if (name == kernels->name) {
      chosen() = kernels;
      return;
    }
  }
  TORCH_CHECK(false, "instruction set '", name, "' does not run on this machine");
}

const bf16* data(const at::Tensor& x) { return reinterpret_cast<const bf16*>(x.const_data_ptr<at::BFloat16>()); }

// Torch's own product where that is the faster one: so a caller needs not know how many rows there are.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16,
              "linear: takes bfloat16, not ", x.scalar_type(), " and ", weight.scalar_type());
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "linear: x ", x.sizes(),
              " does not go with a weight of ", weight.sizes());
  TORCH_CHECK(weight.is_contiguous(), "linear: the weight must be contiguous");
  at::Tensor own_bias;
  if (bias.has_value()) {
    TORCH_CHECK(bias->scalar_type() == at::kBFloat16 && bias->dim() == 1 && bias->size(0) == weight.size(0),
                "linear: the bias must be bfloat16 [", weight.size(0), "]");
    own_bias = bias->contiguous();
  }
  const Kernels& kernels = *chosen();
  const at::Tensor rows = x.contiguous();
  const std::int64_t n = weight.size(0), k = weight.size(1), m = k == 0 ? 0 : rows.numel() / k;
  std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  if (m > kernels.few_rows) return at::linear(rows, weight, bias).contiguous();
  if (m == 0 || n == 0) {
    const at::Tensor zero = at::zeros(shape, x.options());
    return own_bias.defined() ? zero + own_bias : zero;
  }
  at::Tensor y = at::empty(shape, x.options());
  LinearArgs args{data(rows), data(weight), own_bias.defined() ? data(own_bias) : nullptr,
                  reinterpret_cast<bf16*>(y.mutable_data_ptr<at::BFloat16>()), m, n, k};
  constexpr std::int64_t kUnit = 32;  // rows of w: all kernels take them in whole parts of that; and rows of x
  const auto rounded = [](std::int64_t size) { return (size + kUnit - 1) / kUnit; };
  at::Tensor packed;
  if (kernels.pack != nullptr && m >= kernels.pack_from) {
    packed = at::empty({rounded(m) * rounded(k) * kUnit * kUnit / 2}, at::kInt);
    auto* room = reinterpret_cast<std::uint32_t*>(packed.mutable_data_ptr<std::int32_t>());
    at::parallel_for(0, rounded(m), 1, [&](std::int64_t first, std::int64_t last) {
      kernels.pack(args, room, first, last);
    });
    args.packed = room;
  }
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / (kUnit * k + 1));
  at::parallel_for(0, rounded(n), grain, [&](std::int64_t first, std::int64_t last) {
    kernels.linear(args, first * kUnit, std::min(last * kUnit, n));
  });
  return y;
}

// What reading costs at best: the exclusive or of all 64-bit words, in as many streams as `linear` has.
std::int64_t read(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), "read: the tensor must be contiguous");
  const auto* words = static_cast<const std::uint64_t*>(x.const_data_ptr());
  constexpr std::int64_t kStreams = 8, kRow = 512;  // of 4 KiB each
  const std::int64_t units = static_cast<std::int64_t>(x.nbytes()) / (kStreams * kRow * 8);
  std::atomic<std::uint64_t> found{0};
  at::parallel_for(0, units, 1, [&](std::int64_t first, std::int64_t last) {
    std::uint64_t sums[8] = {};
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::uint64_t* rows = words + unit * kStreams * kRow;
      for (std::int64_t i = 0; i < kRow; i += 8) {
        for (std::int64_t row = 0; row < kStreams; ++row) {
          __builtin_prefetch(rows + row * kRow + i + 128);
          for (std::int64_t j = 0; j < 8; ++j) sums[j] ^= rows[row * kRow + i + j];
        }
      }
    }
    for (const std::uint64_t sum : sums) found ^= sum;
  });
  return static_cast<std::int64_t>(found.load());
}

// All threads at their best arithmetic for `rounds` rounds: the floating-point operations done. The caller has
// the clock.
double peak(std::int64_t rounds) {
  std::atomic<double> done{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) done += chosen()->peak(rounds);
  });
  return done.load();
}

// Why the last call failed that this thread made from compiled C++, which itself tells only that it did.
std::string last_error() {
#ifdef YOKE_KNOWS_ERRORS
  return torch::csrc::shim::details::get_torch_exception_what_without_backtrace();
#else
  return {};
#endif
}

TORCH_LIBRARY(yoke_kernels, library) {
  library.def("last_error() -> str", last_error);
  library.def("read(Tensor x) -> int");
  library.def("instruction_sets() -> str[]", instruction_sets);
  library.def("few_rows() -> int", [] { return chosen()->few_rows; });
  library.def("peak(int rounds) -> float", peak);
  library.def("use_instruction_set(str name) -> ()", use_instruction_set);
  library.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(yoke_kernels, CPU, library) {
  library.impl("linear", linear);
  library.impl("read", read);
}

}  // namespace

const Kernels& current() { return *chosen(); }

}  // namespace yoke::kernels
