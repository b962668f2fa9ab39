"""Which files an extension is made of on this machine, and the compiler's flags for each.

The operators' files see nothing of torch's headers, which take a compiler 10 to 25 seconds each time:
`bridge/` hands them what they need, and its one file is compiled once for all extensions that are built
together. Files for instruction sets that this processor does not have are left out.

What is not here: calling the compiler, and where the result is kept (`build`).
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "csrc"
BRIDGE_DIR = Path(__file__).parent / "bridge"
BRIDGE = BRIDGE_DIR / "bridge.cpp"
COMMON_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-pthread", "-Wall", "-Wextra")
BRIDGE_FLAGS = ("-O2", *COMMON_FLAGS[1:])
# Products and sums are not contracted: every instruction set must give the same bits.
FLAGS = (*COMMON_FLAGS, "-ffp-contract=off")
# Of files for one instruction set, which are run only where the processor has it.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
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
    """A folder of C++ sources. Those named `ops*.cpp` are operators, and see the bridge. `flags` are
    those of all files, `x86_flags` what files for one instruction set have besides, by name.
    `core_seconds`: what building it takes of one core, about. `slowest`: how the names of the files
    begin that take longest."""

    name: str
    source_dir: Path
    flags: tuple[str, ...]
    core_seconds: float
    x86_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    slowest: tuple[str, ...] = ()


COMM = Extension(
    "yoke_comm",
    SOURCE_DIR,
    FLAGS,
    core_seconds=30.0,
    x86_flags={
        "kernels_avx2.cpp": AVX2,
        "kernels_avx512.cpp": AVX512,
        "kernels_avx512bf16.cpp": (*AVX512, "-mavx512bf16"),
    },
)


def level_of(features: Collection[str]) -> int:
    """The highest of the levels of instruction sets that a processor with these features runs."""
    level = 0
    while level + 1 < len(_LEVELS) and _LEVELS[level + 1] <= set(features):
        level += 1
    return level


def read_level(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """This processor's level; the highest where it cannot be read."""
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
    slowest = ("bridge", *extension.slowest)
    return sorted(files, key=lambda path: (not path.name.startswith(slowest), path.name))


def sees_bridge(extension: Extension) -> bool:
    """Whether it has operators of torch."""
    return any(extension.source_dir.glob("ops*.cpp"))


def source_flags(source: Path, extension: Extension, level: int) -> list[str]:
    """The compiler's flags for one file, without the paths of torch's headers (for the bridge)."""
    if source == BRIDGE:
        return list(BRIDGE_FLAGS)
    x86 = platform.machine() == "x86_64"
    flags = [*extension.flags, *(extension.x86_flags.get(source.name, ()) if x86 else ())]
    if x86:
        flags.append(f"-DYOKE_LEVEL={level}")
    if level > 0 and source.stem.endswith("_base"):
        flags.append("-O1")  # a reference, where there is something better: built in half the time
    if source.name.startswith("ops"):
        flags.append(f"-I{BRIDGE_DIR}")
    return flags
