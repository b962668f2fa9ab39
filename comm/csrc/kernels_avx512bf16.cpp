// 16 lanes, and the processor's conversions to bfloat16: AVX-512 with BF16.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#define YOKE_BF16
namespace yoke {
namespace {

#include "kernels_scalar.h"

#include "kernels_avx512.h"

#include "kernels_impl.h"

}  // namespace

extern const Kernels kernels_avx512bf16;
const Kernels kernels_avx512bf16 = make_kernels("avx512bf16");

}  // namespace yoke
#endif
