"""`python -P -m launcher.doctor.probe_torch`: facts about the installed torch, as one line of JSON.

This runs in a separate process, because importing torch takes a second, starts threads and can fail or
crash. No other file of the launcher loads torch. This one loads it by name inside `probe`, so importing
this module does not load torch. A fact that cannot be found is null; `failed` says why.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def loaded_openmp(maps: str) -> list[str]:
    """File names of the OpenMP runtimes in the text of a maps file. There should be only one."""
    # Wheels may contain a renamed copy: libgomp-a34b3233.so.1.
    return sorted(
        set(re.findall(r"/(lib(?:gomp|iomp5|omp)(?:-[0-9a-f]+)?\.so[.\d]*)$", maps, re.MULTILINE))
    )


def probe() -> dict[str, Any]:
    """Import torch and collect its facts. Raises what importing torch raises."""
    torch = importlib.import_module("torch")
    failed: list[str] = []

    def attempt(what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            failed.append(f"{what}: {type(error).__name__}: {error}")
            return None

    return {
        "version": str(torch.__version__),
        "openmp": attempt(
            "openmp", lambda: loaded_openmp(Path("/proc/self/maps").read_text(errors="replace"))
        ),
        "num_threads": attempt("num_threads", torch.get_num_threads),
        "cpu_capability": attempt("cpu_capability", torch.backends.cpu.get_cpu_capability),
        "mkl": attempt("mkl", torch.backends.mkl.is_available),
        "onednn": attempt("onednn", torch.backends.mkldnn.is_available),
        "cuda": torch.version.cuda,
        "cuda_devices": attempt("cuda_devices", lambda: _cuda_devices(torch)),
        "nccl": attempt("nccl", lambda: _nccl_version(torch)),
        "extension": attempt("extension", _built_extension),
        "segment_bytes_per_rank": attempt("segment_bytes_per_rank", _segment_bytes_per_rank),
        "failed": failed,
    }


def _cuda_devices(torch: Any) -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        devices.append(
            {"name": device.name, "memory_bytes": device.total_memory, "capability": capability}
        )
    return devices


def _nccl_version(torch: Any) -> str | None:
    distributed = importlib.import_module("torch.distributed")
    if not (distributed.is_available() and distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _built_extension() -> str | None:
    """The path of Yoke's compiled operators; None if they are not built for this torch and compiler."""
    library = importlib.import_module("comm.build").built_extension()
    return None if library is None else str(library)


def _segment_bytes_per_rank() -> int:
    """Bytes of /dev/shm per rank: each rank has two slots in the group's segment."""
    return 2 * int(importlib.import_module("comm.sizes").slot_bytes(2))


if __name__ == "__main__":
    print(json.dumps(probe()))
