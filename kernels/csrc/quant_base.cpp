#define YOKE_ISA isa_base
#include "quant_impl.h"

namespace yoke::kernels {

const QuantKernels base_quant{isa_base::quant_linear, INT64_MAX, nullptr};

}  // namespace yoke::kernels
