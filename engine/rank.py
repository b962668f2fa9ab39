"""What each rank runs: join the group, load its part, compile, generate, report.

Started by the launcher's child, by module name; `env` is the launcher's `RankEnv` (duck-typed, so
that nothing here depends on the launcher). Rank 0 alone reads the tokenizer, prints and samples.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comm import ops
from comm.group import Group, Rendezvous, open_group, set_timeout
from engine.job import Job, ResolvedJob, check_ranks, from_json
from engine.loop import AnyModel, check_prompt, generate, make_runner, warm_up
from engine.memory import dtype_name
from engine.report import Report, progress_bar, say, write_json, write_summary
from models.chat import apply_chat_template
from models.config import expected_shapes
from models.load import config_of, load_model
from models.sampling import Sampling
from models.tokenizer import TextCodec, byte_codec, load_codec
from weights.checkpoint import Checkpoint, open_checkpoint
from weights.errors import InputError
from weights.random_io import random_checkpoint
from weights.safetensors_io import open_safetensors

# Ranks reach their first collective when each has loaded and compiled its own part, which can be
# minutes apart where ranks share cores. A rank that dies meanwhile is the launcher's to notice.
START_TIMEOUT_S = 1800.0


def main(env: Any, payload: str) -> int:
    """Run one generation job on this rank; the exit code. Raises InputError, CommError."""
    # A rank that waits in C++ would not hear of Ctrl-C otherwise.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resolved = from_json(payload)
    # The launcher has chosen; torch may have counted the cores of the machine.
    torch.set_num_threads(env.plan.num_threads)
    rendezvous = Rendezvous(
        env.session, env.master_addr, env.master_port, env.store_fd, env.agent_store, env.node
    )
    with ExitStack() as unpinned:
        opened = open_group(
            env.rank, env.world_size, env.backend, rendezvous, START_TIMEOUT_S, on_fallback=say
        )
        # Left open on an error: the others would report that this rank is gone before it has said why.
        # It goes with the process.
        group = opened.__enter__()
        if env.bind_cores:
            unpinned.enter_context(all_cores(env.plan.cpus))
        _run(env, resolved, group, unpinned)
        opened.__exit__(None, None, None)
    return 0


@contextmanager
def all_cores(cpus: Collection[int]) -> Iterator[None]:
    """Let this thread run on all cores of its rank for a while.

    GNU's OpenMP pins the main thread to one core as torch is loaded, which is right for computing. But
    what the thread starts inherits that: all compilers would share that core.
    """
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)


def _run(env: Any, resolved: ResolvedJob, group: Group, unpinned: ExitStack) -> None:
    job = resolved.job
    source = _open_hf(resolved, group) if job.engine == "hf" else _open_own(resolved, group)
    if source.max_seq_len is not None and job.max_seq_len > source.max_seq_len:
        raise InputError(
            f"max_seq_len={job.max_seq_len}: this model was trained for {source.max_seq_len} at most"
        )
    codec, prompt = _prompt(job, source, group)

    started = time.perf_counter()
    with progress_bar("loading weights", enabled=group.rank == 0) as progress:
        model = source.load(progress)
    load_s = time.perf_counter() - started
    runner = make_runner(model, group, job.max_seq_len, job.compile)
    if group.rank == 0:
        say("compiling the prompt and token steps ..." if job.compile else "warming up ...")
    compile_s = warm_up(runner)
    unpinned.close()
    ops.barrier(group)
    set_timeout(group, env.comm_timeout_s)

    stream = codec.stream() if codec is not None and job.output == "text" else None
    shown: list[str] = []

    def show(token: int) -> None:
        if stream is not None:
            shown.append(stream(token))
            sys.stdout.write(shown[-1])
            sys.stdout.flush()

    sampling = Sampling(job.temperature, job.top_k, job.top_p)
    stop = codec.stop_tokens if codec is not None else frozenset()
    result = generate(runner, prompt, job.max_new_tokens, stop, sampling, job.seed, show)
    peaks = ops.all_gather(torch.tensor([peak_rss_bytes()]), group)
    if codec is None:
        return
    report = Report(
        text=codec.decode(result.tokens),
        prompt_tokens=len(prompt),
        tokens=len(result.tokens),
        token_ids=result.tokens,
        ttft_s=result.ttft_s,
        tpot_s=result.tpot_s,
        load_s=load_s,
        compile_s=compile_s if job.compile else 0.0,
        peak_rss_bytes=peaks.flatten().tolist(),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        comm=group.backend,
        plan=env.plans,
    )
    if job.output == "json":
        write_json(report)
    else:
        # What the stream held back: a character that its last token left incomplete.
        sys.stdout.write(report.text.removeprefix("".join(shown)))
        write_summary(report, env.placement)


@dataclass(frozen=True)
class _Source:
    """Where a job's model comes from. `load(progress)` builds and fills this rank's part of it."""

    checkpoint: Checkpoint
    vocab_size: int
    max_seq_len: int | None
    load: Callable[[Callable[[int, int], None]], AnyModel]


def _open_own(resolved: ResolvedJob, group: Group) -> _Source:
    """A model that `models` has code for, from any checkpoint or of random weights."""
    job = resolved.job
    if resolved.checkpoint is not None:
        checkpoint = open_checkpoint(Path(resolved.checkpoint))
        config = config_of(checkpoint)
    else:
        assert resolved.config is not None
        config = resolved.config
        checkpoint = random_checkpoint(expected_shapes(config), job.seed)
    check_ranks(ResolvedJob(job, resolved.checkpoint, config), group.size)
    return _Source(
        checkpoint,
        config.vocab_size,
        config.max_seq_len,
        lambda progress: load_model(config, checkpoint, group, _dtype(job.dtype), progress),
    )


def _open_hf(resolved: ResolvedJob, group: Group) -> _Source:
    """A model whose code is that of the transformers library."""
    from models.hf import build_model, fill_model  # transformers is needed here alone

    assert resolved.checkpoint is not None
    checkpoint = open_safetensors(resolved.checkpoint, translated=False)
    model, weights = build_model(checkpoint.folder, group, _dtype(resolved.job.dtype))
    return _Source(
        checkpoint,
        model.vocab_size,
        model.max_seq_len,
        lambda progress: fill_model(model, weights, checkpoint, group, progress),
    )


def _prompt(job: Job, source: _Source, group: Group) -> tuple[TextCodec | None, list[int]]:
    """The codec on rank 0 (None elsewhere), and the prompt's tokens on every rank."""
    codec = None
    tokens: list[int] = []
    if group.rank == 0:
        random = job.weights == "random"
        codec = byte_codec(source.vocab_size) if random else load_codec(source.checkpoint)
        text = job.prompt
        if job.chat:
            text = apply_chat_template(codec, [{"role": "user", "content": job.prompt}])
        tokens = codec.encode(text, not job.chat)
        check_prompt(len(tokens), job.max_new_tokens, job.max_seq_len)
    length = ops.broadcast(torch.tensor([len(tokens)]), 0, group)
    if group.rank != 0:
        tokens = [0] * int(length)
    return codec, ops.broadcast(torch.tensor(tokens), 0, group).tolist()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, dtype_name(name))
    assert isinstance(dtype, torch.dtype)
    return dtype


def peak_rss_bytes() -> int:
    """The most memory this process has had resident. Not ru_maxrss: that begins with what the process
    held that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
