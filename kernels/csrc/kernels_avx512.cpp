#if defined(__x86_64__)
#define YOKE_ISA isa_avx512
#include "impl.h"

namespace yoke::kernels {

const Kernels avx512_kernels{"avx512", isa_avx512::linear};

}  // namespace yoke::kernels

#endif
