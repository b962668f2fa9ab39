"""What every rank does before the first token: join the group, load its shard of the model, compile."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from base.errors import InputError
from base.private import cache_folder
from base.progress import progress_bar
from base.rank_settings import RankSettings
from base.streams import say
from comm import ops
from comm.build import build_extensions
from comm.errors import BuildError, converting_errors
from comm.group import Group, GroupOptions, Rendezvous, open_group, set_timeout
from comm.sources import COMM
from engine.dtypes import dtype_name
from engine.job import Job, fitted_length
from engine.memory import keeps_quantized
from engine.ready import Ready, add_steps, make_ready
from engine.report import build_progress
from engine.resolve import ResolvedJob, check_draft, check_ranks
from engine.steps import BEAMS, DECODE, EXTEND, GREEDY, AnyModel, Runner
from kernels.load import has_kernels
from kernels.sources import KERNELS
from models.config import expected_shapes
from models.decoder import Decoder
from models.load import config_of, load_model
from models.quant_rules import Quant
from models.tokenizer.codec import TextCodec, byte_codec, within_vocabulary
from models.tokenizer.open import load_codec
from weights.checkpoint import Checkpoint
from weights.formats.random_io import random_checkpoint
from weights.formats.safetensors_io import open_safetensors
from weights.locate import locate
from weights.open import open_checkpoint

# Ranks reach their first collective after each has loaded and compiled its own shard. Where ranks share
# cores, these times can be minutes apart. The launcher notices a rank that dies meanwhile.
START_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Opened:
    """An engine that is ready to run. `codec` is None except on rank 0; `draft` runs the draft model,
    None without one. `quant`: the scheme of most weights, "" if not quantized. `ready`: how far
    compiling is. `load_s` in seconds."""

    group: Group
    runner: Runner
    draft: Runner | None
    codec: TextCodec | None
    dtype: str
    quant: str
    load_s: float
    ready: Ready


@contextmanager
def joined(env: RankSettings) -> Iterator[Group]:
    """Join the group of all ranks of this run, and leave it at the end."""
    # The launcher chose this number; torch's own default may count all cores of the machine.
    torch.set_num_threads(env.plan.num_threads)
    if env.plan.device != "cpu":
        torch.cuda.set_device(env.plan.device)
    rendezvous = Rendezvous(
        env.session, env.master_addr, env.master_port, env.store_fd, env.agent_store, env.node, env.run,
        env.secret,
    )  # fmt: skip
    _build_operators(env)
    opened = open_group(
        env.rank, env.world_size, env.backend, rendezvous, env.start_timeout_s or START_TIMEOUT_S,
        GroupOptions(device=env.plan.device, on_fallback=say),
    )  # fmt: skip
    group = opened.__enter__()
    set_timeout(group, START_TIMEOUT_S)
    with converting_errors(env.rank):
        yield group
    # On an error the group stays open until the process ends: if it were closed here, the other ranks
    # would report that this rank is gone before it has reported its error.
    opened.__exit__(None, None, None)


@contextmanager
def all_cores(cpus: Collection[int]) -> Iterator[None]:
    """Let this thread run on all cores of its rank, `cpus`, within the block.

    GNU's OpenMP pins the main thread to one core when torch is imported, which is right for computing.
    But threads and processes that it starts inherit the mask: all compilers would share that core.
    """
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)


def open_engine(env: RankSettings, resolved: ResolvedJob, group: Group, names: Sequence[str]) -> Opened:
    """Load the job's model (and its draft model), allocate caches of `job.batch` slots and compile the
    steps `names`. Raises InputError."""
    job = resolved.job
    with ExitStack() as unpinned:
        if env.bind_cores:
            unpinned.enter_context(all_cores(env.plan.cpus))
        source = _open(resolved, group, env.plan.device)
        length = fitted_length(job, source.max_seq_len, source.stretched_from)
        if group.rank == 0:
            about = about_length(job.max_seq_len, length, source.max_seq_len, source.stretched_from)
            for line in (*resolved.notes, *about):
                say(line)
        job = replace(job, max_seq_len=length)
        codec = None
        if group.rank == 0:
            random = job.weights == "random"
            codec = byte_codec(source.vocab_size) if random else load_codec(source.checkpoint)
            codec = within_vocabulary(codec, source.vocab_size, say)
        started = time.perf_counter()
        try:
            with progress_bar("loading weights", enabled=group.rank == 0) as progress:
                model = source.load(progress)
                draft = _load_draft(resolved, source, group, env.plan.device)
            load_s = time.perf_counter() - started
            parts = (model,) if draft is None else (model, draft)
            ready = make_ready(env, job, group, parts, names)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"rank {group.rank}: {env.plan.device} has too little memory for weights and cache "
                f"({str(error).splitlines()[0]}); use more GPUs, or a smaller max_seq_len or batch"
            ) from error
    set_timeout(group, env.comm_timeout_s)
    return Opened(
        group=group,
        runner=ready.runners[0],
        draft=ready.runners[1] if len(ready.runners) > 1 else None,
        codec=codec,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        quant=model.quantized if isinstance(model, Decoder) else "",
        load_s=load_s,
        ready=ready,
    )


def compile_more(env: RankSettings, job: Job, engine: Opened, names: Sequence[str]) -> Opened:
    """The engine with further steps, compiled as the job asks. They write into the cache. Collective.
    Raises InputError, CompileError."""
    set_timeout(engine.group, START_TIMEOUT_S)
    with all_cores(env.plan.cpus) if env.bind_cores else nullcontext():
        ready = add_steps(env, job, engine.ready, names)
    set_timeout(engine.group, env.comm_timeout_s)
    return replace(engine, ready=ready)


def _build_operators(env: RankSettings) -> None:
    """Compile the C++ operators, on all cores of this machine's ranks, before anything loads them. If
    that fails, loading them later reports the reason and the fallback."""
    wanted = [COMM] if env.world_size > 1 and env.backend.startswith("shm") else []
    wanted += [KERNELS] if env.plan.device == "cpu" else []
    cpus = {cpu for plan in env.plans for cpu in plan["cpus"]}
    with suppress(BuildError, OSError), build_progress(enabled=env.rank == 0) as report:
        remark = cache_folder()[1]
        if remark and env.rank == 0:
            say(remark)
        build_extensions(wanted, report, cpus)


def about_length(
    asked: int, length: int, limit: int | None, stretched_from: int | None
) -> Iterator[str]:
    """Yields lines for the user about max_seq_len: the job asked for `asked` tokens and gets `length`.
    `limit` and `stretched_from` as in `fitted_length`."""
    if length < asked:
        yield (
            f"max_seq_len={length}: the most that this model "
            + ("has" if length == limit else "has without changing short texts too")
            + f", less than the default of {asked}"
        )
    if stretched_from is not None and length > stretched_from:
        yield (
            f"max_seq_len={length} is more than the {stretched_from} tokens that this model's "
            "rotary embeddings were made for: they are stretched for all texts, so short texts differ "
            "from transformers', which stretches the embeddings of long texts only; "
            f"max_seq_len={stretched_from} does not stretch them"
        )


def step_names(job: Job, plain: bool) -> tuple[str, ...]:
    """Names of the steps that a job may run. `plain`: every request decodes greedily, without penalties
    or biases."""
    if job.num_beams > 1:
        return EXTEND, BEAMS
    if job.draft:
        return (EXTEND,)
    return EXTEND, GREEDY if plain else DECODE


@dataclass(frozen=True)
class _Source:
    """An opened model that is not loaded yet; `stretched_from` as in `ModelConfig`. `load(progress)`
    builds this rank's shard and fills it."""

    checkpoint: Checkpoint
    vocab_size: int
    max_seq_len: int | None
    stretched_from: int | None
    load: Callable[[Callable[[int, int], None]], AnyModel]


def _open(resolved: ResolvedJob, group: Group, device: str) -> _Source:
    opener = _open_hf if resolved.job.engine == "hf" else _open_own
    return opener(resolved, group, device)


def _open_own(resolved: ResolvedJob, group: Group, device: str) -> _Source:
    """Open a model that `models` implements, from any checkpoint or with random weights."""
    job = resolved.job
    report = say if group.rank == 0 else lambda line: None
    if resolved.checkpoint is not None:
        checkpoint = open_checkpoint(Path(resolved.checkpoint))
        config = config_of(checkpoint, group, report)
    else:
        assert resolved.config is not None
        config = resolved.config
        checkpoint = random_checkpoint(expected_shapes(config), job.seed)
    check_ranks(replace(resolved, config=config, draft=None), group.size)

    def load(progress: Callable[[int, int], None]) -> Decoder:
        dtype, quant = _dtype(job.dtype, device), _quant(resolved, device)
        model = load_model(config, checkpoint, group, dtype, progress, device, quant)
        for line in (*checkpoint.notes, *([model.about_quant] if model.about_quant else [])):
            report(line)
        return model

    return _Source(checkpoint, config.vocab_size, config.max_seq_len, config.stretched_from, load)


def _quant(resolved: ResolvedJob, device: str) -> Quant | None:
    """What the loader is asked for. quant=auto keeps quantized weights where our kernels run."""
    quant = resolved.quant
    if quant is None or quant.asked is not None:
        return quant
    return quant if keeps_quantized(resolved.job, device) and has_kernels() else None


def _open_hf(resolved: ResolvedJob, group: Group, device: str) -> _Source:
    """Open a model that runs the transformers library's code."""
    from models.hf.model import build_model, fill_model  # only this path needs transformers

    assert resolved.checkpoint is not None
    checkpoint = open_safetensors(locate(resolved.checkpoint), translated=False)
    dtype = _dtype(resolved.job.dtype, device)
    model, weights = build_model(checkpoint.folder, group, dtype)
    return _Source(
        checkpoint,
        model.vocab_size,
        model.max_seq_len,
        None,
        lambda progress: fill_model(model, weights, checkpoint, group, progress, device),
    )


def _load_draft(resolved: ResolvedJob, source: _Source, group: Group, device: str) -> AnyModel | None:
    if resolved.draft is None:
        return None
    own = _open_own(resolved.draft, group, device)
    check_draft(source.vocab_size, own.vocab_size, resolved.job.draft)
    return own.load(lambda done, total: None)


def _dtype(name: str, device: str) -> torch.dtype:
    dtype = getattr(torch, dtype_name(name, device))
    assert isinstance(dtype, torch.dtype)
    return dtype


def share(value: Any, group: Group, device: torch.device) -> Any:
    """Broadcast rank 0's `value`, anything that JSON can hold; returns it on every rank. The other
    ranks' `value` is ignored. `device` is where the group's tensors live."""
    data = json.dumps(value).encode() if group.rank == 0 else b""
    length = int(ops.broadcast(torch.tensor([len(data)], device=device), 0, group))
    buffer = torch.zeros(length, dtype=torch.uint8, device=device)
    if group.rank == 0:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    return json.loads(bytes(ops.broadcast(buffer, 0, group).tolist()))
