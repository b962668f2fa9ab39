"""Compile an extension of torch once, and find it again.

What: one shared library from a folder of sources, kept in the user's cache under a name made of
everything that it depends on (sources, torch version, compiler, machine), so that a stale library is
never loaded.
Why not torch's own extension builder: it brings setuptools and ninja and several seconds of imports
for what is one compiler call. What is not here: SIMD variants (the source carries them itself).

`python -m comm.build` builds that of the collectives ahead of the first run.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from comm.errors import BuildError

SOURCE_DIR = Path(__file__).parent / "csrc"
COMMON_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-pthread", "-Wall", "-Wextra")
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


def cache_dir() -> Path:
    """Where Yoke keeps what it has compiled: `$XDG_CACHE_HOME/yoke`, by default `~/.cache/yoke`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "yoke"


@dataclass(frozen=True)
class Extension:
    """A folder of C++ sources. `ops*.cpp` alone see torch; the files of `X86_FLAGS` get theirs."""

    name: str
    source_dir: Path
    flags: tuple[str, ...]


COMM = Extension("yoke_comm", SOURCE_DIR, FLAGS)


def build_extension(extension: Extension = COMM) -> Path:
    """Return the path of the compiled extension, compiling it first if need be.

    A file lock lets one process build while others wait for its result. Raises BuildError when there
    is no C++ compiler or it fails.
    """
    compiler = _compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found (Debian: apt-get install g++)")
    library = _library(compiler, extension)
    if library.exists():
        return library
    folder = library.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot make {folder} ({error}); set XDG_CACHE_HOME") from error
    with (folder / f"{library.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, library, extension)
    return library


def built_extension(extension: Extension = COMM) -> Path | None:
    """The compiled extension, if there is one for this torch, compiler and source; builds nothing."""
    compiler = _compiler()
    library = None if compiler is None else _library(compiler, extension)
    return library if library is not None and library.exists() else None


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _library(compiler: str, extension: Extension) -> Path:
    fingerprint = _fingerprint(compiler, extension)
    return cache_dir() / "extensions" / f"{extension.name}-{fingerprint}.so"


def _fingerprint(compiler: str, extension: Extension) -> str:
    digest = hashlib.sha256()
    for source in sorted(extension.source_dir.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {compiler} does not run: {error}") from error
    digest.update(version)
    own = [flag for flags in X86_FLAGS.values() for flag in flags]
    for part in (torch.__version__, platform.machine(), *extension.flags, *own, *_torch_flags()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _torch_flags() -> list[str]:
    root = Path(torch.__file__).parent
    return [
        # -isystem: warnings of torch's headers are not ours.
        f"-isystem{root / 'include'}",
        f"-isystem{root / 'include/torch/csrc/api/include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-fopenmp",  # torch's parallel_for is a template over it
    ]


def _compile(compiler: str, library: Path, extension: Extension) -> None:
    # Built beside its final name and moved there whole, so that a killed build leaves nothing loadable.
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        built = Path(folder) / library.name
        objects = []
        commands = []
        sources = extension.source_dir.glob("*.cpp")
        for source in sorted(sources, key=lambda path: not path.name.startswith("ops")):
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            flags = source_flags(source, extension)
            commands.append([compiler, *flags, "-c", str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_run, commands))  # the longest, which includes torch, first
        lib = Path(torch.__file__).parent / "lib"
        link = [f"-L{lib}", "-ltorch_cpu", "-lc10", "-fopenmp"]
        _run([compiler, "-shared", "-pthread", *objects, "-o", str(built), *link])
        os.replace(built, library)


def source_flags(source: Path, extension: Extension = COMM) -> list[str]:
    """The compiler's flags for one file of `csrc/`, but for those of torch where it needs none."""
    own = X86_FLAGS.get(source.name, ()) if platform.machine() == "x86_64" else ()
    return [*extension.flags, *own, *(_torch_flags() if source.name.startswith("ops") else ())]


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than 10 minutes") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed:\n{error.stderr[-4000:]}") from error


if __name__ == "__main__":
    try:
        print(build_extension())
    except BuildError as error:
        sys.exit(f"error: {error}")
