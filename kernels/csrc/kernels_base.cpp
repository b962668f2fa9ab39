#define YOKE_ISA isa_base
#include "impl.h"

namespace yoke::kernels {

const Kernels base_kernels{"base", isa_base::linear};

}  // namespace yoke::kernels
