// The inner loops, once per instruction set. Plain pointers and sizes: nothing of torch is seen here.
#pragma once

#include <cstdint>

// What is built: 0 what every processor runs, 1 AVX2 too, 2 AVX-512, 3 its bfloat16, 4 AMX. (build.py: what this one
// runs.)
#ifndef YOKE_LEVEL
#define YOKE_LEVEL 4
#endif

namespace yoke::kernels {

using bf16 = std::uint16_t;  // the upper half of a float

// Rows [first, last) of w in y = x W^T + bias. x [m, k], w [n, k], bias [n] or null,
// y [m, n]; sums in float. `packed`: x once more as `pack` has laid it out, or null.
struct LinearArgs {
  const bf16* x;
  const bf16* w;
  const bf16* bias;
  bf16* y;
  std::int64_t m, n, k;
  const std::uint32_t* packed = nullptr;
};
using Linear = void (*)(const LinearArgs&, std::int64_t first, std::int64_t last);

// Lays 32 rows of x out in `packed`, and those after them: [first, last) in units of 32. Of m and k rounded up to
// 32, two numbers a word.
using Pack = void (*)(const LinearArgs&, std::uint32_t* packed, std::int64_t first, std::int64_t last);

// Does arithmetic as fast as one core can, for a time proportional to `rounds`: floating-point operations done.
using Peak = double (*)(std::int64_t rounds);

struct Kernels {
  const char* name;
  Linear linear;
  Pack pack;                // or null; for products from `pack_from` rows of x on
  std::int64_t pack_from;
  std::int64_t few_rows;    // up to which `linear` is used; torch's product is the faster one above
  Peak peak;
};

// Those in use: see `use_instruction_set`.
const Kernels& current();

extern const Kernels base_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512bf16_kernels;
extern const Kernels amx_kernels;
#endif

}  // namespace yoke::kernels
