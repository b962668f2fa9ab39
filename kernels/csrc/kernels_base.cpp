#define YOKE_ISA isa_base
#include "impl.h"
#include "peak.h"

namespace yoke::kernels {

const Kernels base_kernels{"base", isa_base::linear, nullptr, 0, 3, isa_base::vector_peak};

}  // namespace yoke::kernels
