#if defined(__x86_64__)
#define YOKE_ISA isa_avx2
#include "attend_chunk.h"
#include "attend_rotate.h"

namespace yoke::kernels {

const Attention avx2_attention{isa_avx2::token, isa_avx2::chunk, isa_avx2::write, isa_avx2::rotate};

}  // namespace yoke::kernels

#endif
