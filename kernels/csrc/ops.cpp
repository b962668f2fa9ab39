// torch.ops.yoke_kernels.*: the choice of an instruction set, and linears with bfloat16 weights: checks, and the
// division among threads. (Attention: ops_attend.cpp.)
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif


#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "ops_quant.h"

namespace yoke::kernels {
namespace {

#if defined(__x86_64__) && YOKE_LEVEL >= 4
// Whether the processor has AMX for bf16 and int8, and Linux lets this process use the registers. (They are large, so
// a process must request them.)
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
#if defined(__x86_64__) && YOKE_LEVEL >= 1
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_kernels);
#if YOKE_LEVEL >= 2
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) found.push_back(&avx512_kernels);
#endif
#if YOKE_LEVEL >= 3
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    found.push_back(&avx512bf16_kernels);
#if YOKE_LEVEL >= 4
    if (may_use_tiles()) found.push_back(&amx_kernels);
#endif
  }
#endif
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

// For tests and measurements: all later calls use this instruction set.
void use_instruction_set(const std::string& name) {
  for (const Kernels* kernels : runnable()) {
    if (name == kernels->name) {
      chosen() = kernels;
      return;
    }
  }
  YOKE_CHECK(false, "instruction set '", name, "' does not run on this machine");
}

const bf16* data(const Tensor& x) { return x.const_data_ptr<bf16>(); }

// Uses torch's matmul where that is faster, so that callers need not know the number of rows.
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  YOKE_CHECK(x.scalar_type() == Scalar::bf16 && weight.scalar_type() == Scalar::bf16,
              "linear: takes bfloat16, not ", x.scalar_type(), " and ", weight.scalar_type());
  YOKE_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "linear: x ", x.sizes(),
              " does not fit a weight of ", weight.sizes());
  YOKE_CHECK(weight.is_contiguous(), "linear: the weight must be contiguous");
  Tensor own_bias;
  if (bias.has_value()) {
    YOKE_CHECK(bias->scalar_type() == Scalar::bf16 && bias->dim() == 1 && bias->size(0) == weight.size(0),
                "linear: the bias must be bfloat16 [", weight.size(0), "]");
    own_bias = bias->contiguous();
  }
  const Kernels& kernels = *chosen();
  const Tensor rows = x.contiguous();
  const std::int64_t n = weight.size(0), k = weight.size(1), m = k == 0 ? 0 : rows.numel() / k;
  std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  if (m > kernels.few_rows) return yoke::linear(rows, weight, bias);
  if (m == 0 || n == 0) {
    return rows_of(own_bias, shape);
  }
  Tensor y = empty(shape, x.scalar_type());
  LinearArgs args{data(rows), data(weight), own_bias.defined() ? data(own_bias) : nullptr,
                  y.mutable_data_ptr<bf16>(), m, n, k};
  constexpr std::int64_t kUnit = 32;  // all kernels take rows of w, and of x, in multiples of this
  const auto rounded = [](std::int64_t size) { return (size + kUnit - 1) / kUnit; };
  Tensor packed;
  if (kernels.pack != nullptr && m >= kernels.pack_from) {
    packed = empty({rounded(m) * rounded(k) * kUnit * kUnit / 2}, Scalar::i32);
    auto* room = reinterpret_cast<std::uint32_t*>(packed.mutable_data_ptr<std::int32_t>());
    parallel_for(0, rounded(m), 1, [&](std::int64_t first, std::int64_t last) {
      kernels.pack(args, room, first, last);
    });
    args.packed = room;
  }
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / (kUnit * k + 1));
  parallel_for(0, rounded(n), grain, [&](std::int64_t first, std::int64_t last) {
    kernels.linear(args, first * kUnit, std::min(last * kUnit, n));
  });
  return y;
}

// Reads memory as fast as a loop can: the exclusive or of all 64-bit words. Each thread reads its part as `streams`
// streams, 512 bytes of each in turn, and prefetches `ahead` bytes ahead in each. Which numbers are fastest depends on
// the processor: measure several.
std::int64_t read(const Tensor& x, std::int64_t streams, std::int64_t ahead) {
  YOKE_CHECK(x.is_contiguous() && streams > 0 && ahead >= 0, "read: the tensor must be contiguous, and ", streams,
             " streams and ", ahead, " bytes must be numbers from 1 and 0 on");
  constexpr std::int64_t kTurn = 512, kWords = kLineBytes / 8;
  const std::int64_t unit = streams * kTurn, units = static_cast<std::int64_t>(x.nbytes()) / unit;
  const auto* bytes = static_cast<const std::uint8_t*>(x.const_data_ptr());
  std::atomic<std::uint64_t> found{0};
  parallel_for(0, units, 1, [&](std::int64_t first, std::int64_t last) {
    std::uint64_t sums[kWords] = {};
    const std::int64_t length = (last - first) * kTurn;  // of a stream
    for (std::int64_t at = 0; at < length; at += kTurn) {
      for (std::int64_t stream = 0; stream < streams; ++stream) {
        const std::uint8_t* from = bytes + first * unit + stream * length + at;
        for (std::int64_t i = 0; i < kTurn; i += kLineBytes) {
          __builtin_prefetch(from + ahead + i);
          std::uint64_t line[kWords];
          std::memcpy(line, from + i, sizeof line);
          for (std::int64_t j = 0; j < kWords; ++j) sums[j] ^= line[j];
        }
      }
    }
    for (const std::uint64_t sum : sums) found ^= sum;
  });
  return static_cast<std::int64_t>(found.load());
}

// Runs arithmetic at the peak of all threads for `rounds` rounds. Returns the number of floating-point operations; the
// caller measures the time.
double peak(std::int64_t rounds) {
  std::atomic<double> done{0};
  parallel_for(0, num_threads(), 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) done += chosen()->peak(rounds);
  });
  return done.load();
}

// The error of the last failed call of this thread from compiled C++, which itself reports only that a call failed.
std::string last_error() { return last_error_of_compiled_code(); }

std::int64_t few_rows() { return chosen()->few_rows; }

const CompiledSteps steps("yoke_kernels");

const Operators operators(
    "yoke_kernels",
    {
        op<read>("read(Tensor x, int streams=8, int ahead=2048) -> int"),
        op<linear>("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"),
    },
    {
        op<last_error>("last_error() -> str"),
        op<instruction_sets>("instruction_sets() -> str[]"),
        op<few_rows>("few_rows() -> int"),
        op<peak>("peak(int rounds) -> float"),
        op<use_instruction_set>("use_instruction_set(str name) -> ()"),
    });

}  // namespace

const Kernels& current() { return *chosen(); }

}  // namespace yoke::kernels
