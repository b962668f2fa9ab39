"""What the kernels are compiled from: `csrc/`, and the compiler's flags of its files for one
instruction set.

What is not here: how they are compiled (`comm.sources`, `comm.build`)."""

from __future__ import annotations

from pathlib import Path

from comm.sources import AVX2, AVX512, COMMON_FLAGS, Extension

# Loops marked `omp simd` may be summed in any order; nothing looks at errno or floating-point traps.
_MATH = ("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_BF16 = (*AVX512, "-mavx512bf16")
_AMX = (*_BF16, "-mamx-tile", "-mamx-bf16")
# Files with a loop for each form of codes. At -O3 some would take five times as long to compile.
_MANY = ("-O2", "-fpeel-loops")
KERNELS = Extension(
    "yoke_kernels",
    Path(__file__).parent / "csrc",
    (*COMMON_FLAGS, *_MATH),
    core_seconds=40.0,
    x86_flags={
        "kernels_avx2.cpp": AVX2,
        "kernels_avx512.cpp": AVX512,
        "kernels_avx512bf16.cpp": _BF16,
        "kernels_amx.cpp": _AMX,
        "attend_avx2.cpp": AVX2,
        "attend_avx512.cpp": AVX512,
        "attend_amx.cpp": _AMX,
        "quant_avx2.cpp": (*AVX2, *_MANY),
        "quant_avx512.cpp": (*AVX512, *_MANY),
        "quant_avx512vnni.cpp": (*AVX512, *_MANY, "-mavx512vnni"),
        "quant_avx512bf16.cpp": (*_BF16, *_MANY),
        "quant_amx.cpp": (*_AMX, *_MANY, "-mamx-int8"),
        "packed_amx.cpp": _AMX,
    },
    slowest=("attend",),
)
