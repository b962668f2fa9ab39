#if defined(__x86_64__)
#define YOKE_ISA isa_avx512
#include "attend_chunk.h"
#include "attend_rotate.h"

namespace yoke::kernels {

const Attention avx512_attention{isa_avx512::token, isa_avx512::chunk, isa_avx512::write, isa_avx512::rotate};

}  // namespace yoke::kernels

#endif
