#define YOKE_ISA isa_base
#include "impl.h"
#include "peak.h"

namespace yoke::kernels {

const Kernels base_kernels{"base", isa_base::linear, isa_base::attend<bf16>, isa_base::attend<float>,
                           nullptr, 0, 3, isa_base::vector_peak};

}  // namespace yoke::kernels
