#if defined(__x86_64__)
#define YOKE_ISA isa_avx2
#include "impl.h"
#include "peak.h"

namespace yoke::kernels {

const Kernels avx2_kernels{"avx2", isa_avx2::linear, nullptr, 0, 3, isa_avx2::vector_peak};

}  // namespace yoke::kernels

#endif
