#if defined(__x86_64__)
#define YOKE_ISA isa_avx2
#include "quant_impl.h"

namespace yoke::kernels {

const QuantKernels avx2_quant{isa_avx2::quant_linear, INT64_MAX, nullptr};

}  // namespace yoke::kernels

#endif
