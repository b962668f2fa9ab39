"""Transports from other packages, where they are installed: oneCCL, and DeepSpeed's operator.

Neither is needed: Yoke has its own collectives, and these are for comparison. A package is found by its
metadata and imported only if its version fits, because an extension built for another torch can crash
the process. These transports have no deadlines: DeepSpeed's operator waits for a dead peer forever, and
only the launcher notices.

    ccl        all collectives through the process group that oneCCL's bindings for PyTorch register
    deepspeed  sums through its shared-memory operator, everything else through gloo

What is not here: building oneCCL's bindings; more than one DeepSpeed group in a process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from comm.errors import CommError

NAMES = ("ccl", "deepspeed")
OLDEST_DEEPSPEED = (0, 15)  # the first in which the sum is a torch operator, which can be traced
_CCL = ("oneccl-bind-pt", "oneccl-bindings-for-pytorch")
# On x86, DeepSpeed's 16-bit kernels need AVX-512 and its fp32 kernels AVX2, and it does not check.
_CAPABILITY = torch.backends.cpu.get_cpu_capability() if platform.machine() == "x86_64" else ""
_DTYPES = {
    "DEFAULT": (),
    "AVX2": (torch.float32,),
}.get(_CAPABILITY, (torch.float32, torch.bfloat16, torch.float16))
# DeepSpeed keeps its buffers in global variables of its library: one group in a process.
_opened: list[tuple[int, int]] = []
_lock = threading.Lock()


class PackageError(CommError):
    """A requested package is missing, too old, or built for another torch."""

    exit_code = 2


def load_ccl() -> None:
    """Import oneCCL's bindings, which register the backend "ccl" with torch. Raises PackageError."""
    version = _version(_CCL)
    made_for = _release(version)[:2]
    if made_for != _release(torch.__version__)[:2]:
        wanted = ".".join(map(str, made_for))
        raise PackageError(
            f"oneCCL's bindings {version} are for torch {wanted}, not {torch.__version__}: "
            "install those for this torch, or use --comm auto"
        )
    try:
        importlib.import_module("oneccl_bindings_for_pytorch")
    except (ImportError, OSError) as error:
        raise PackageError(f"oneCCL's bindings {version} cannot be imported: {error}") from error


def open_deepspeed(rank: int, size: int, session: str, node: int, gloo: str) -> None:
    """Load DeepSpeed's operator, compiling it at its first use, and have the ranks map its buffers.

    `session` is the run's token, `node` this machine's number, `gloo` the name of a process group of
    the same ranks. Raises PackageError; CommError if the operator cannot be loaded, if the ranks are on
    several machines, or if this process already has another group of it.
    """
    version = _version(("deepspeed",))
    if _release(version) < OLDEST_DEEPSPEED:
        oldest = ".".join(map(str, OLDEST_DEEPSPEED))
        raise PackageError(
            f"deepspeed {version} has no traceable operator; {oldest} or newer is needed"
        )
    if len(set(_gather(node, size, gloo))) > 1:
        raise CommError(
            "DeepSpeed's operator works within one machine; these ranks are on several: use --comm auto"
        )
    with _lock:
        if _opened and _opened[0] != (rank, size):
            raise CommError(
                "DeepSpeed's operator serves one group of ranks in a process, and this process has "
                "another one open: use --comm auto"
            )
        if not _opened:
            _initialize(rank, size, session, gloo, version)
            _opened.append((rank, size))


def all_reduce(x: Tensor) -> Tensor:
    """The sum over the ranks of the open group, through DeepSpeed's operator, as a new tensor."""
    # The operator would return a non-contiguous tensor unreduced.
    return torch.ops.deepspeed.inference_all_reduce.default(x.contiguous())


def can_sum(x: Tensor) -> bool:
    """Whether DeepSpeed's operator can sum `x`: else it silently leaves `x` unreduced, or crashes."""
    return x.dtype in _DTYPES and x.numel() * x.element_size() < 2**31


def _initialize(rank: int, size: int, session: str, gloo: str, version: str) -> None:
    try:
        # Rank 0 compiles; the others find the result.
        module = _build() if rank == 0 else None
        _gather(rank, size, gloo)
        module = module or _build()
    except Exception as error:  # DeepSpeed's builder may fail at a compiler, ninja, a cache, ...
        line = str(error).strip().splitlines()
        why = line[0] if line else type(error).__name__
        raise CommError(
            f"deepspeed {version}: its operator cannot be loaded (--comm auto does not need it): {why}"
        ) from error
    # DeepSpeed names its buffers by these variables. Names of this run alone cannot meet leftovers.
    with _variables(LOCAL_SIZE=str(size), MASTER_ADDR="yoke", MASTER_PORT=session):
        module.initialize(size, rank)
    _gather(rank, size, gloo)  # now every rank has mapped all buffers
    # DeepSpeed never removes the names, so the memory would stay allocated after the processes end.
    own = f"deepspeed_allreduce_buffer_{os.getuid()}_yoke_{session}_{rank}"
    (Path("/dev/shm") / own).unlink(missing_ok=True)
    _gather(rank, size, gloo)  # no rank continues before all names are removed


def _build() -> ModuleType:
    """Run DeepSpeed's own builder, with its messages on stderr: stdout belongs to the program."""
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja is there
    with _variables(DS_ACCELERATOR="cpu", PATH=found), contextlib.redirect_stdout(sys.stderr):
        builder = importlib.import_module("deepspeed.ops.op_builder.cpu.comm")
        module: ModuleType = builder.ShareMemCommBuilder().load(verbose=False)
    return module


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _gather(number: int, size: int, gloo: str) -> list[int]:
    """The `number` of every rank; also a barrier."""
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    numbers = gather(torch.tensor([number]), size, gloo)
    return [int(one) for one in torch.ops._c10d_functional.wait_tensor(numbers)]


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    raise PackageError(f"{distributions[0]} is not installed; install it, or use --comm auto")


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
