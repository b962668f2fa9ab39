#if defined(__x86_64__)
#define YOKE_ISA isa_avx512
#include "impl.h"
#include "peak.h"

namespace yoke::kernels {

const Kernels avx512_kernels{"avx512", isa_avx512::linear, nullptr, 0, 3, isa_avx512::vector_peak};

}  // namespace yoke::kernels

#endif
