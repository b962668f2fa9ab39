#define YOKE_ISA isa_base
#include "attend_chunk.h"
#include "attend_rotate.h"

namespace yoke::kernels {

const Attention base_attention{isa_base::token, isa_base::chunk, isa_base::write, isa_base::rotate};

}  // namespace yoke::kernels
