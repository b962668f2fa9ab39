#define YOKE_ISA isa_base
#include "gate.h"
#include "quant_impl.h"

namespace yoke::kernels {

const QuantKernels base_quant{isa_base::quant_linear, isa_base::gate_rows, nullptr, isa_base::layout};

}  // namespace yoke::kernels
