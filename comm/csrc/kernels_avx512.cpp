// 16 lanes: x86 with AVX-512 F, BW, VL, DQ.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

namespace yoke {
namespace {

#include "kernels_scalar.h"

#include "kernels_avx512.h"

#include "kernels_impl.h"

}  // namespace

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = make_kernels("avx512");

}  // namespace yoke
#endif
