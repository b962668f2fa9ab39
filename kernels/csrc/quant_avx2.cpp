#if defined(__x86_64__)
#define YOKE_ISA isa_avx2
#include "gate.h"
#include "quant_impl.h"

namespace yoke::kernels {

const QuantKernels avx2_quant{isa_avx2::quant_linear, isa_avx2::gate_rows, nullptr, isa_avx2::layout};

}  // namespace yoke::kernels

#endif
