"""Steps that are compiled during the run, and the change from uncompiled steps to compiled ones.

Each rank looks for the packages of its steps (`engine.packages`) and starts a process that compiles the
missing ones (`engine.compile_child`), at a lower priority. Meanwhile steps run uncompiled. At each
synchronization of a loop the ranks compare what is there. A step changes on all ranks at once, between
two tokens, when every rank has its package. If compiling fails on a rank, all ranks keep the uncompiled
step, and rank 0 says so.

Not here: models and devices that torch.compile serves (`engine.steps`).
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from base.streams import say
from comm import ops
from engine.compile_request import CompileRequest
from engine.packages import (
    StepShape,
    describe,
    in_use,
    is_complete,
    key_of,
    load_package,
    packages_folder,
    read_seconds,
    remove_abandoned,
)  # fmt: skip
from engine.steps import Runner
from models.decoder import Decoder

NICENESS = 8  # of the compiler: where both want a core, it gets a seventh of it, the tokens the rest
_PROGRAM = Path(__file__).with_name("compile_child.py")
_END_S = 2.0  # for the compiling process to remove what it has begun
_MISSING, _READY, _FAILED = 0, 1, -1


class CompileError(RuntimeError):
    """A step could not be compiled although the run waits for it."""

    exit_code = 1


@dataclass
class Upgrade:
    """What a rank still compiles for a runner; mutable. `packages`: by the names of steps, in the order
    in which they are compiled; a step that has changed is not in it. `started`: on the clock of
    `time.monotonic`. `ready`: the steps whose packages this rank has checked. `done_s`: the seconds
    until each step changed. `failed`: steps that stay uncompiled. `holding`: until all have changed,
    the lock that keeps packages from being cleared."""

    runner: Runner
    model: Decoder
    packages: dict[str, Path]
    process: subprocess.Popen[bytes] | None
    errors: IO[bytes] | None
    started: float
    holding: ExitStack
    ready: set[str] = field(default_factory=set)
    done_s: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def start_upgrade(
    runner: Runner, model: Decoder, names: Sequence[str], niceness: int = NICENESS
) -> Upgrade:
    """Change to the compiled steps that are on disk on all ranks, and start to compile the others.
    Collective. Raises OSError if there is no private folder for packages."""
    shape = StepShape(runner.num_rows, runner.cache_len, runner.chunk)
    description = describe(model)
    folder = packages_folder()
    holding = ExitStack()
    holding.enter_context(in_use(folder))
    remove_abandoned(folder)
    packages = {name: folder / key_of(description, name, shape) for name in names}
    upgrade = Upgrade(runner, model, packages, None, None, time.monotonic(), holding)
    missing = {name: str(path) for name, path in packages.items() if not is_complete(path)}
    advance(upgrade)
    if missing:
        request = CompileRequest(
            description, shape, missing, torch.get_num_threads(), niceness, runner.group.size > 1
        )
        upgrade.errors = os.fdopen(os.memfd_create("yoke-compiler"), "w+b")
        upgrade.process = _start(request, upgrade.errors)
        atexit.register(stop, upgrade)
    return upgrade


def advance(upgrade: Upgrade) -> None:
    """Change the steps whose packages are there on all ranks. Collective, while any step is missing."""
    if not upgrade.packages:
        return
    runner = upgrade.runner
    ended = upgrade.process is not None and upgrade.process.poll() is not None
    upgrade.ready |= {
        name
        for name, path in upgrade.packages.items()
        if name not in upgrade.ready and is_complete(path)
    }
    absent = _FAILED if ended else _MISSING
    states = [_READY if name in upgrade.ready else absent for name in upgrade.packages]
    every = ops.all_gather(torch.tensor(states), runner.group)
    lowest, failed = every.amin(0).tolist(), (every == _FAILED).any(0).tolist()
    for name, state, has_failed in zip(list(upgrade.packages), lowest, failed, strict=True):
        if state == _READY:
            runner.steps[name] = load_package(upgrade.packages.pop(name), upgrade.model)
            upgrade.done_s[name] = time.monotonic() - upgrade.started
        elif has_failed:
            del upgrade.packages[name]
            upgrade.failed.append(name)
            if ended:
                say(f"rank {runner.group.rank}: {name} stays uncompiled: {reason(upgrade)}")
    if not upgrade.packages:
        upgrade.holding.close()


def compile_now(
    runner: Runner,
    model: Decoder,
    names: Sequence[str],
    progress: Callable[[str], object] = lambda line: None,
) -> Upgrade:
    """Compile the steps, or load them from disk, and wait for that. Collective. Raises CompileError;
    OSError if there is no private folder for packages."""
    upgrade = start_upgrade(runner, model, names, niceness=0)
    if failed := _finish(upgrade, progress):
        raise CompileError(
            f"rank {runner.group.rank}: {', '.join(failed)} cannot be compiled: {reason(upgrade)}; "
            "compile=false runs without"
        )
    return upgrade


def _finish(upgrade: Upgrade, progress: Callable[[str], object]) -> list[str]:
    """Wait until all steps are compiled; `progress` is called with a line for the user when another
    step is begun. Returns the names of those that failed."""
    process, total = upgrade.process, len(upgrade.packages)
    wanted = list(upgrade.packages)
    if process is not None and process.stdout is not None:
        for line in process.stdout:
            facts = json.loads(line)
            if "seconds" not in facts:
                number = wanted.index(facts["step"]) + 1
                last = read_seconds(facts["step"])
                took = f", {last:.0f} s last time" if last else ""
                progress(f"{facts['step']} ({number} of {total}{took})")
        process.wait()
    ops.barrier(upgrade.runner.group)  # within the start timeout: ranks may take minutes
    advance(upgrade)
    return upgrade.failed


def stop(upgrade: Upgrade) -> None:
    """End the process that compiles, if it still runs, and remove what it has begun."""
    process = upgrade.process
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    remove_abandoned(packages_folder())


def reason(upgrade: Upgrade) -> str:
    """The last line that the compiling process wrote about its error."""
    if upgrade.errors is None:
        return "another rank could not compile it"
    upgrade.errors.seek(0)
    lines = upgrade.errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "the compiling process was killed"


def _start(request: CompileRequest, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    fd = os.memfd_create("yoke-compile")
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            pickle.dump(request, file)
        os.lseek(fd, 0, os.SEEK_SET)
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(fd)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[fd],
        )
    finally:
        os.close(fd)
    return process
