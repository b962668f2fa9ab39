"""Which files an extension is made of on this machine, and the compiler's flags for each.

The operators' files see nothing of torch's headers, which take a compiler 10 to 25 seconds each time:
`bridge/` hands them what they need, and its one file is compiled once for all extensions that are built
together. Files for instruction sets that this processor does not have are left out.

What is not here: calling the compiler, and where the result is kept (`build`).
"""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "csrc"
BRIDGE_DIR = Path(__file__).parent / "bridge"
BRIDGE = BRIDGE_DIR / "bridge.cpp"
COMMON_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-pthread", "-Wall", "-Wextra")
BRIDGE_FLAGS = ("-O2", *COMMON_FLAGS[1:])
# Products and sums are not contracted: every instruction set must give the same bits.
FLAGS = (*COMMON_FLAGS, "-ffp-contract=off")
# Files for one instruction set; they are run only where the processor has it.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
X86_FLAGS: dict[str, tuple[str, ...]] = {
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx512.cpp": _AVX512,
    "kernels_avx512bf16.cpp": (*_AVX512, "-mavx512bf16"),
    "kernels_amx.cpp": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "attend_avx2.cpp": _AVX2,
    "attend_avx512.cpp": _AVX512,
    "quant_avx2.cpp": _AVX2,
    "quant_avx512.cpp": _AVX512,
    "quant_avx512vnni.cpp": (*_AVX512, "-mavx512vnni"),
    "quant_avx512bf16.cpp": (*_AVX512, "-mavx512bf16"),
    "quant_amx.cpp": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "packed_amx.cpp": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "attend_amx.cpp": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
# Each has all before it; what Linux calls the features. The number is YOKE_LEVEL of the sources.
_LEVELS: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"avx2", "fma", "f16c"}),
    frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    frozenset({"avx512_bf16", "avx512_vnni"}),
    frozenset({"amx_tile", "amx_bf16", "amx_int8"}),
)
_LEVEL_OF = {"avx2": 1, "avx512": 2, "avx512bf16": 3, "avx512vnni": 3, "amx": 4}


@dataclass(frozen=True)
class Extension:
    """A folder of C++ sources. Those named `ops*.cpp` are operators, and see the bridge.
    `core_seconds`: what building it takes of one core, about."""

    name: str
    source_dir: Path
    flags: tuple[str, ...]
    core_seconds: float


COMM = Extension("yoke_comm", SOURCE_DIR, FLAGS, 30.0)


def level_of(features: Collection[str]) -> int:
    """The highest of the levels of instruction sets that a processor with these features runs."""
    level = 0
    while level + 1 < len(_LEVELS) and _LEVELS[level + 1] <= set(features):
        level += 1
    return level


def read_level(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """This processor's; all where nobody can tell."""
    if platform.machine() != "x86_64":
        return 0
    try:
        lines = cpuinfo.read_text().split("\n")
    except OSError:
        return len(_LEVELS) - 1
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), None)
    return len(_LEVELS) - 1 if flags is None else level_of(flags.split())


def sources(extension: Extension, level: int) -> list[Path]:
    """The files that are compiled, those that take longest first."""
    files = [
        path
        for path in extension.source_dir.glob("*.cpp")
        if _LEVEL_OF.get(path.stem.rpartition("_")[2], 0) <= level
    ]
    if sees_bridge(extension):
        files.append(BRIDGE)
    return sorted(files, key=lambda path: (not path.name.startswith(_SLOW), path.name))


_SLOW = ("bridge", "attend")


def sees_bridge(extension: Extension) -> bool:
    """Whether it has operators of torch."""
    return any(extension.source_dir.glob("ops*.cpp"))


def source_flags(source: Path, extension: Extension, level: int) -> list[str]:
    """The compiler's flags for one file, without the paths of torch's headers (for the bridge)."""
    if source == BRIDGE:
        return list(BRIDGE_FLAGS)
    x86 = platform.machine() == "x86_64"
    flags = [*extension.flags, *(X86_FLAGS.get(source.name, ()) if x86 else ())]
    if x86:
        flags.append(f"-DYOKE_LEVEL={level}")
    if level > 0 and source.stem.endswith("_base"):
        flags.append("-O1")  # a reference, where there is something better: built in half the time
    if source.name.startswith("ops"):
        flags.append(f"-I{BRIDGE_DIR}")
    return flags
