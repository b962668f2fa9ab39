"""From loaded models to runners that can start: caches allocated, steps compiled as the job asks.

`compile=true` waits until all steps are compiled, `compile=auto` starts at once and lets the compiler
work during the run (`engine.background`), `compile=false` compiles nothing. Our own models on CPUs,
with our own operators, are compiled ahead of time, to packages that a later start loads. Other models,
devices and transports go through torch.compile, which cannot compile during a run: there `auto` waits
too.

Not here: how models are loaded (`engine.opening`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from base.errors import InputError
from base.rank_settings import RankSettings
from base.streams import say
from comm import ops
from comm.group import Group
from engine import background
from engine.background import Upgrade
from engine.compiling import compiling, use_cache_folder
from engine.dtypes import kv_dtype_name
from engine.job import Job
from engine.packages import read_seconds
from engine.report import compile_progress
from engine.steps import EXTEND, GREEDY, AnyModel, Runner, make_runner, warm_up
from kernels.load import has_kernels
from models.decoder import Decoder


@dataclass(frozen=True)
class Ready:
    """Runners of the model and of the draft model, if there is one, and those models. `compile_s`:
    seconds of waiting for the compiler. `upgrades`: what is still compiled during the run."""

    runners: tuple[Runner, ...]
    models: tuple[AnyModel, ...]
    compile_s: float = 0.0
    upgrades: tuple[Upgrade, ...] = ()


def make_ready(
    env: RankSettings, job: Job, group: Group, models: Sequence[AnyModel], names: Sequence[str]
) -> Ready:
    """Allocate caches of `job.batch` slots for the models, and run the steps once: `names` of the first
    model, EXTEND and GREEDY of a draft model. Collective. Raises InputError, CompileError."""
    ahead = [job.compile != "false" and compiles_ahead(model, group) for model in models]
    by_torch = job.compile != "false" and not all(ahead)
    runners = tuple(
        _runner(job, model, group, by_torch and not packed)
        for model, packed in zip(models, ahead, strict=True)
    )
    wanted = [tuple(names), *[(EXTEND, GREEDY)] * (len(models) - 1)]
    return _with_steps(env, job, Ready(runners, tuple(models)), wanted)


def add_steps(env: RankSettings, job: Job, ready: Ready, names: Sequence[str]) -> Ready:
    """Run further steps of the first model once, which are compiled as the first ones were. They write
    into the cache. Collective. Raises InputError, CompileError."""
    return _with_steps(env, job, ready, [tuple(names), *[()] * (len(ready.runners) - 1)])


def _with_steps(env: RankSettings, job: Job, ready: Ready, wanted: Sequence[tuple[str, ...]]) -> Ready:
    """`wanted`: the steps of each runner."""
    group = ready.runners[0].group
    ahead = [job.compile != "false" and compiles_ahead(model, group) for model in ready.models]
    waits = job.compile == "true" or not all(ahead)
    by_torch = job.compile != "false" and not all(ahead)
    started = time.perf_counter()
    upgrades = []
    with _code_folder(env) if by_torch else nullcontext():
        ops.barrier(group)
        with compile_progress(job.compile != "false" and waits, enabled=group.rank == 0) as progress:
            parts = zip(ready.runners, ready.models, wanted, ahead, strict=True)
            for runner, model, steps, packed in parts:
                if packed and steps and isinstance(model, Decoder):
                    upgrades.append(_upgrade(job, runner, model, steps, progress))
            for runner, steps in zip(ready.runners, wanted, strict=True):
                warm_up(runner, steps, progress)
        ops.barrier(group)
    pending = [upgrade for upgrade in upgrades if upgrade.packages]
    if pending and group.rank == 0:
        say(_pending_line(pending))
    waited_s = time.perf_counter() - started if waits and job.compile != "false" else 0.0
    return replace(ready, compile_s=ready.compile_s + waited_s, upgrades=(*ready.upgrades, *upgrades))


def compiles_ahead(model: AnyModel, group: Group) -> bool:
    """Whether the model's steps, which call no operators but torch's and ours, go to packages."""
    return (
        isinstance(model, Decoder)
        and next(model.parameters()).device.type == "cpu"
        and (group.size == 1 or group.backend == "shm")
        and has_kernels()
    )


def _upgrade(
    job: Job, runner: Runner, model: Decoder, names: Sequence[str], progress: Callable[[str], object]
) -> Upgrade:
    # A text's first token needs `extend` once, and each token needs the other step.
    ordered = sorted(names, key=lambda name: name == EXTEND)
    try:
        if job.compile == "true":
            return background.compile_now(runner, model, ordered, progress)
        upgrade = background.start_upgrade(runner, model, ordered)
    except OSError as error:
        raise _no_folder(error) from error
    runner.at_check.append(lambda: background.advance(upgrade))
    return upgrade


def _pending_line(pending: Sequence[Upgrade]) -> str:
    steps = [name for upgrade in pending for name in upgrade.packages]
    last_s = sum(read_seconds(name) for name in steps)
    took = f" (last time {last_s:.0f} s)" if last_s else ""
    return (
        f"compiling during the run: {', '.join(steps)}{took}; until then steps run uncompiled, and "
        "compile=true would wait"
    )


def compile_state(ready: Ready, compile_key: str) -> str:
    """Returns a few words on whether the steps are compiled by now, for a line of figures."""
    if compile_key == "false":
        return "uncompiled"
    left = [name for upgrade in ready.upgrades for name in upgrade.packages]
    if left:
        return f"{', '.join(left)} not compiled yet"
    if failed := [name for upgrade in ready.upgrades for name in upgrade.failed]:
        return f"{', '.join(failed)} uncompiled"
    late = max((s for upgrade in ready.upgrades for s in upgrade.done_s.values()), default=0.0)
    if late > ready.compile_s + 1.0:
        return f"compiled after {late:.0f} s"
    return f"compile {ready.compile_s:.1f} s"


def _runner(job: Job, model: AnyModel, group: Group, compiled: bool) -> Runner:
    device = str(next(model.parameters()).device)
    kv_dtype: torch.dtype = getattr(torch, kv_dtype_name(job.kv_dtype, job.dtype, device))
    return make_runner(model, group, job.max_seq_len, compiled, max(job.batch, 1), kv_dtype)


def _no_folder(error: OSError) -> InputError:
    return InputError(
        f"no folder for compiled code: {error}; set XDG_CACHE_HOME to a folder that only you can "
        "write to, or use compile=false"
    )


@contextmanager
def _code_folder(env: RankSettings) -> Iterator[None]:
    """Wraps torch.compile. On each machine, local rank 0 checks and seals the folder of code."""
    try:
        folder = use_cache_folder()
    except OSError as error:
        raise _no_folder(error) from error
    if env.rank == 0 and folder.remark:
        say(folder.remark)
    with compiling(folder, say) if env.local_rank == 0 else nullcontext():
        yield
