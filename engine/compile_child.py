"""The process that compiles a model's steps into packages, while the rank runs.

It gets the model's structure without weights (`packages.describe`), exports each step as one graph,
compiles it, and moves the package to its place when it is complete. To standard output it writes one
line of JSON when it starts a step and one when the step is done. There are two reasons for a process of
its own: in a thread, the compiler's Python would stop the rank's, and its memory would stay allocated.

It is started by path: `python engine/compile_child.py FD`, with the request in the file FD.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from os.path import dirname, realpath
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Replace this folder (absent with -P): its files could be imported as top-level modules.
    sys.path[:] = [dirname(dirname(realpath(__file__))), *sys.path[not sys.flags.safe_path :]]

import torch
from torch import Tensor, nn

from comm.shm import load_extension
from engine.compile_request import CompileRequest
from engine.packages import (
    LIBRARY,
    MANIFEST,
    StepShape,
    checksum_of,
    in_use,
    is_complete,
    keep_seconds,
    packages_folder,
    partial_folder,
)  # fmt: skip
from engine.steps import BEAMS, EXTEND
from kernels.load import load_kernels
from models.decoder import Decoder

# The asserts on the size and alignment of every weight and operator result would run in every call.
# The calls of operators are compiled with little optimization: they do not compute.
_OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "size_asserts": False,
    "alignment_asserts": False,
    "compile_threads": 1,
    "cpp.vec_isa_ok": True,
    "cpp_cache_precompile_headers": False,
}


def main(fd: int) -> int:
    """Compile the steps of the request in file descriptor `fd`, in its order."""
    with os.fdopen(fd, "rb") as file:
        request: CompileRequest = pickle.load(file)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and remove what was begun
    os.nice(request.niceness)
    torch.set_num_threads(request.num_threads)
    load_kernels()
    if request.collectives:
        load_extension()
    model: Decoder = pickle.loads(request.model)
    with in_use(packages_folder()):
        for name, package in request.packages.items():
            started = time.monotonic()
            _report(step=name)
            compile_step(model, name, request.shape, Path(package))
            _report(step=name, seconds=time.monotonic() - started)
    return 0


def _report(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


class StepModule(nn.Module):
    """A step of a model as the module that torch exports."""

    def __init__(self, model: Decoder, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, *inputs: Tensor) -> Tensor:
        """The inputs and the result of the step, as `engine.steps.Runner` has them."""
        if self.name == EXTEND:
            where, wanted = inputs
            return self.model.extend(where[0], where[1], where[2], wanted)
        if self.name == BEAMS:
            return self.model.decode(*inputs)
        step = self.model.decode_greedy if self.name.endswith("greedy") else self.model.decode
        return step(*inputs)


@torch.no_grad()
def export_step(model: Decoder, name: str, shape: StepShape) -> torch.export.ExportedProgram:
    """Returns the step as one graph. Raises what torch.export raises, and RuntimeError if the graph
    holds values, which belong to the model without weights."""
    inputs, dynamic = example_inputs(name, shape)
    program = torch.export.export(
        StepModule(model, name), inputs, dynamic_shapes=(dynamic,), strict=False
    )
    own = {f"model.{name}" for name, _ in model.named_buffers(remove_duplicate=False)}
    if values := set(program.constants) - own:
        raise RuntimeError(
            f"the graph of {name} holds values that are no parameter or buffer: {min(values)}"
        )
    return program


def example_inputs(name: str, shape: StepShape) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Returns inputs of the step, and which of their sizes vary."""
    if name == EXTEND:
        count = min(5, shape.chunk)
        where = torch.zeros(3, count, dtype=torch.int64)
        where[1] = torch.arange(count)
        tokens = torch.export.Dim("tokens", min=2, max=shape.chunk)
        wanted = torch.export.Dim("wanted", min=2, max=shape.chunk)
        return (where, torch.arange(3)), ({1: tokens}, {0: wanted})
    zeros = torch.zeros(shape.num_rows, dtype=torch.int64)
    inputs: tuple[Tensor, ...] = (zeros, zeros.clone())
    if name == BEAMS:
        inputs = (*inputs, torch.zeros(shape.num_rows, shape.cache_len, dtype=torch.int32))
    return inputs, tuple({} for _ in inputs)


def compile_step(model: Decoder, name: str, shape: StepShape, package: Path) -> None:
    """Compile a step, and put its package in place. A damaged one there is replaced."""
    from torch._inductor import aoti_compile_and_package

    started = time.monotonic()
    with partial_folder(package) as work:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
        program = export_step(model, name, shape)
        made = work / "step.pt2"
        aoti_compile_and_package(program, package_path=str(made), inductor_configs=dict(_OPTIONS))
        whole = work / "package"
        whole.mkdir(mode=0o700)
        _unpack(made, whole)
        files = {path.name: checksum_of(path) for path in whole.iterdir()}
        facts = {"files": files, "step": name, "seconds": round(time.monotonic() - started, 1)}
        (whole / MANIFEST).write_text(json.dumps(facts))
        if not is_complete(package):  # another run may have been faster, and may be using its own
            shutil.rmtree(package, ignore_errors=True)
            whole.rename(package)
    keep_seconds(name, time.monotonic() - started)


def _unpack(archive: Path, folder: Path) -> None:
    """Take the shared object and its description of operators from torch's archive."""
    with zipfile.ZipFile(archive) as file:
        library = next(entry for entry in file.namelist() if entry.endswith(".so"))
        (folder / LIBRARY).write_bytes(file.read(library))
        described = f"{library.removesuffix('.so')}.json"
        if described in file.namelist():
            (folder / LIBRARY).with_suffix(".json").write_bytes(file.read(described))
    for path in folder.iterdir():
        path.chmod(0o600)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
