// The inner loops, once per instruction set. Plain pointers and sizes, no torch.
#pragma once

#include <cstdint>

// The instruction sets that are built: 0 the baseline of the architecture, 1 AVX2 too, 2 AVX-512, 3 its bfloat16,
// 4 AMX. build.py passes the highest level that this processor supports.
#ifndef YOKE_LEVEL
#define YOKE_LEVEL 4
#endif

namespace yoke::kernels {

using bf16 = std::uint16_t;  // the upper half of a float

// y = x W^T + bias for rows [first, last) of w. x [m, k], w [n, k], bias [n] or null, y [m, n]; sums in float.
// `packed`: x as `pack` has packed it too, or null.
struct LinearArgs {
  const bf16* x;
  const bf16* w;
  const bf16* bias;
  bf16* y;
  std::int64_t m, n, k;
  const std::uint32_t* packed = nullptr;
};
using Linear = void (*)(const LinearArgs&, std::int64_t first, std::int64_t last);

// Packs rows [first, last) of x, in units of 32 rows, into `packed`: two numbers per word, m and k rounded up to
// multiples of 32.
using Pack = void (*)(const LinearArgs&, std::uint32_t* packed, std::int64_t first, std::int64_t last);

// Runs arithmetic at the peak of one core, for a time proportional to `rounds`. Returns the number of floating-point
// operations.
using Peak = double (*)(std::int64_t rounds);

struct Kernels {
  const char* name;
  Linear linear;
  Pack pack;                // or null; used from `pack_from` rows of x on
  std::int64_t pack_from;
  std::int64_t few_rows;    // the most rows for which `linear` is used; torch's matmul is faster above
  Peak peak;
};

// The kernels in use: see `use_instruction_set`.
const Kernels& current();

extern const Kernels base_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512bf16_kernels;
extern const Kernels amx_kernels;
#endif

}  // namespace yoke::kernels
