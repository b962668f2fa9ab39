#if defined(__x86_64__)
#define YOKE_ISA isa_avx2
#include "attend_chunk.h"

namespace yoke::kernels {

const Attention avx2_attention{isa_avx2::token, isa_avx2::chunk, isa_avx2::write};

}  // namespace yoke::kernels

#endif
