"""Probes of this machine for `doctor`: limits, kernel settings, compiler, torch.

Each probe is independent and may raise; `doctor` reports the exception as a line. Probes that read
files take the `root` above them, so that tests can use other files. torch is probed in a separate
process (`launcher.doctor.probe_torch`).
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.compiler import find_compiler
from launcher.machine.cgroup import read_cgroup

TORCH_TIMEOUT_S = 60.0  # a first import from a cold disk is slow
_COMPILE_TIMEOUT_S = 30.0
# The same demands as Yoke's sources: language version, standard headers, a shared object.
_COMPILE_FLAGS = ("-std=c++20", "-fPIC", "-shared", "-pthread", "-x", "c++", "-")
_SOURCE = "#include <atomic>\n#include <string>\nstd::atomic<int> word; std::string text;\n"


@dataclass(frozen=True)
class Limits:
    """Limits of this process, in bytes and cpus. None: no limit (or, for `shm_`, no /dev/shm)."""

    shm_bytes: int | None
    shm_free_bytes: int | None
    memlock_bytes: int | None
    memory_limit_bytes: int | None
    memory_used_bytes: int | None
    cpu_quota: float | None
    open_files: int | None
    shm_writable: bool | None = None


@dataclass(frozen=True)
class Kernel:
    """Settings by which the kernel moves pages or changes clock rates. None: unknown."""

    numa_balancing: bool | None
    huge_pages: str | None
    swap_used_bytes: int
    governors: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler that builds Yoke's operators and that torch.compile calls. `error` says why
    it does not work; `python_headers`: Python.h is installed, which torch.compile needs too."""

    path: str | None
    version: str | None
    works: bool
    error: str | None
    python_headers: bool


def read_limits(root: Path = Path("/")) -> Limits:
    """Limits of this process and its cgroup."""
    try:
        shm = os.statvfs(root / "dev/shm")
        size, free = shm.f_frsize * shm.f_blocks, shm.f_frsize * shm.f_bavail
    except FileNotFoundError:
        size, free = None, None
    cgroup = read_cgroup(root)
    return Limits(
        shm_writable=None if size is None else os.access(root / "dev/shm", os.W_OK | os.X_OK),
        shm_bytes=size,
        shm_free_bytes=free,
        memlock_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        memory_limit_bytes=cgroup.memory_limit_bytes,
        memory_used_bytes=cgroup.memory_used_bytes,
        cpu_quota=cgroup.cpu_quota,
        open_files=_soft_limit(resource.RLIMIT_NOFILE),
    )


def read_kernel(cpus: Collection[int], root: Path = Path("/")) -> Kernel:
    """The kernel settings that affect `cpus`."""
    balancing = _read(root / "proc/sys/kernel/numa_balancing")
    huge_pages = re.search(
        r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    )
    swaps = (_read(root / "proc/swaps") or "").split("\n")[1:]
    governors: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        name = _read(root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor")
        if name:
            governors.setdefault(name, []).append(cpu)
    return Kernel(
        numa_balancing=None if balancing is None else balancing != "0",
        huge_pages=huge_pages[1] if huge_pages else None,
        swap_used_bytes=sum(int(line.split()[3]) for line in swaps) * 1024,
        governors={name: tuple(members) for name, members in governors.items()},
    )


def read_cpu(root: Path = Path("/")) -> dict[str, Any]:
    """The processor's name, and which of the instruction sets that speed up LLM inference it has."""
    text = (root / "proc/cpuinfo").read_text(errors="replace")
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    model = re.search(r"^model name\s*: *(.*)$", text, re.MULTILINE)
    return {
        "model": model[1] if model else None,
        "arch": os.uname().machine,
        "avx2": "avx2" in flags,
        "avx512": "avx512f" in flags,
        "bf16": bool(flags & {"avx512_bf16", "bf16"}),
        "vnni": bool(flags & {"avx512_vnni", "avx_vnni"}),
        "amx": "amx_tile" in flags and bool(flags & {"amx_bf16", "amx_int8"}),
        "asimd": "asimd" in flags,
        "i8mm": "i8mm" in flags,
        "sve": "sve" in flags,
    }


def try_memory_policy(nodes: Collection[int], checkout: Path) -> str:
    """Why memory cannot be bound to `nodes`; "" if it can. It is tried as ranks do it, in a process
    that ends at once."""
    code = (
        "import os, sys; from launcher.bind import set_mempolicy; "
        "error = set_mempolicy('bind', [int(node) for node in sys.argv[1:]]); "
        "print(os.strerror(error) if error else '')"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, nodes)],
        env=_environment(checkout),
        capture_output=True,
        errors="replace",
        timeout=20,
        check=True,
    )
    return result.stdout.strip()


def try_compiler(environ: dict[str, str] | None = None) -> Compiler:
    """Find the compiler as `comm.build` does, and compile a few lines with it."""
    found = os.environ if environ is None else environ
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    try:
        words = find_compiler(found)
    except ValueError as error:  # an unclosed quote
        return Compiler(found["CXX"], None, False, f"CXX is not a command: {error}", headers)
    if words is None:
        return Compiler(None, None, False, "there is none", headers)
    path = " ".join(words)
    try:
        version = _run([*words, "--version"]).stdout.partition("\n")[0]
        with tempfile.TemporaryDirectory(prefix="yoke-") as folder:
            built = _run([*words, *_COMPILE_FLAGS, "-o", f"{folder}/probe.so"], _SOURCE)
    except (OSError, subprocess.SubprocessError) as error:
        return Compiler(path, None, False, str(error), headers)
    error_line = next((line for line in built.stderr.splitlines() if "error" in line), "it failed")
    works = built.returncode == 0
    return Compiler(path, version, works, None if works else error_line, headers)


def start_torch_probe(checkout: Path) -> subprocess.Popen[str]:
    """Start the process that imports torch, which takes longer than all other probes."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "launcher.doctor.probe_torch"],
        env=_environment(checkout),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        errors="replace",
    )


def finish_torch_probe(
    process: subprocess.Popen[str], timeout_s: float = TORCH_TIMEOUT_S
) -> dict[str, Any]:
    """Wait for the torch probe and return its facts. Raises RuntimeError (one line) if it failed."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise RuntimeError(f"importing torch took more than {timeout_s:g} s") from error
    if process.returncode < 0:
        raise RuntimeError(f"importing torch died of {signal.Signals(-process.returncode).name}")
    if process.returncode != 0 or not out.strip():
        raise RuntimeError(next(reversed(err.strip().splitlines()), "importing torch failed"))
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input=text, capture_output=True, errors="replace", timeout=_COMPILE_TIMEOUT_S
    )


def _environment(checkout: Path) -> dict[str, str]:
    """The environment with the checkout first on PYTHONPATH."""
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def _soft_limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
