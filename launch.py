#!/usr/bin/env python3
"""The command line: run one language model on every socket, or every GPU, of this machine.

Flags place the ranks, `key=value` words describe the job. This file reads both, rejects what is wrong
(exit code 2) before any rank is started, and calls `launcher`. Nothing here imports torch.
"""

from __future__ import annotations

import sys
from os.path import dirname, realpath

if __name__ == "__main__":  # before any import: with `python -P` the checkout is not on sys.path
    checkout = dirname(realpath(__file__))
    sys.path[:] = [checkout, *sys.path[not getattr(sys.flags, "safe_path", False) :]]
    from base.venv import continue_in_venv

    continue_in_venv(checkout)

import os
import platform
import time
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from base.command import typed
from base.errors import LaunchError
from base.streams import is_writable, running, say, show, show_json, silence, writing
from base.venv import why_continued
from comm.sizes import segment_bytes
from launcher.chat.console import CHAT
from launcher.chat.terminal import is_interactive
from launcher.child import PROGRAM
from launcher.claims import locked, note, read_claims, runs_folder
from launcher.doctor.backends import require_backend
from launcher.draw import draw, plan_to_json, render_plain
from launcher.elastic import agent_command, become_agent, check_nodes
from launcher.fit import Fit, check_fit, machine_memory, require_fit, require_loopback, require_space
from launcher.flags import Flags, UnknownFlagError, parse_flags
from launcher.help import NOT_IN_CHAT, help_text
from launcher.join import join, local_plan
from launcher.machine.cgroup import read_cgroup
from launcher.machine.topology import Topology, read_topology
from launcher.manager import find_manager
from launcher.plan import LaunchPlan, plan_launch
from launcher.program import check_program
from launcher.share import overlaps
from launcher.shared_secret import shared_secret
from launcher.spawn import launch, new_session
from launcher.starter import is_typed_in_rank, was_started_by

if TYPE_CHECKING:
    from engine.resolve import ResolvedJob

CHECKOUT = Path(__file__).resolve().parent
# A manager kills all ranks when one exits, so the others wait until rank 0 has printed the error.
HEAR_SECONDS = 2.0


def main(argv: Sequence[str]) -> int:
    try:
        flags = parse_flags(argv)
        if not is_writable(sys.stdout):
            _do_without_output(flags)
        if (reason := why_continued()) and flags.verbose:
            say(f"note: {reason}")
        if flags.version:
            show(_version())
            return 0
        if flags.command in ("quantize", "reshard"):
            return _offline(flags)
        if flags.help or not argv:
            from engine.job import help_lines

            show(help_text(help_lines(), flags.command if flags.named else ""), end="")
            return 0
        return run(flags)
    except ModuleNotFoundError as error:
        say(f"error: the package {error.name} is missing; run: make setup")
        return 2
    except UnknownFlagError as error:
        from engine.job import KEYS

        say(f"error: {error.message(KEYS, argv)}")
        return 2
    except ValueError as error:
        if getattr(error, "exit_code", 1) != 2:
            raise
        # Every rank that torchrun or mpirun started gets here with the same error; one prints it.
        if _another_says_it():
            time.sleep(HEAR_SECONDS)
        else:
            say(typed(f"error: {error}"))
        return 2


def _version() -> str:
    """The versions of Yoke, and of torch and Python, on which its speed and results depend."""
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        own = tomllib.load(file)["project"]["version"]
    try:
        torch = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = "torch is missing"
    return f"yoke {own} ({torch}, Python {platform.python_version()})"


def _another_says_it() -> bool:
    """Whether a manager really started this process as a rank above 0: rank 0 prints the error."""
    try:
        place = find_manager(os.environ, os.getppid())
    except LaunchError:
        return False
    return place is not None and place.rank > 0 and was_started_by(place.manager, os.getpid())


def _do_without_output(flags: Flags) -> None:
    """Only `run` may go on: the user's program may print nothing. Raises LaunchError for the rest."""
    if flags.command != "run":
        raise LaunchError(
            "standard output is closed, so no result can be shown: redirect it to a file or /dev/null"
        )
    silence(sys.stdout)


def run(flags: Flags) -> int:
    """Run one command and return its exit code. Raises LaunchError and InputError if it cannot."""
    if flags.command == "doctor":
        from launcher.doctor.report import doctor

        request = replace(flags.request, bind_cores=True)
        return doctor(_topology(flags), flags.json, CHECKOUT, request, here=flags.sysfs is None)
    if flags.command == "models":
        return _models(flags)
    if flags.command == "cache":
        from launcher.cache import cache_command
        from models.find import hub_cache

        return cache_command(flags.names, flags.json, hub_cache())
    if flags.sysfs is None:
        require_backend(flags.request.comm)
    if flags.given.get("device") == "cuda" and flags.request.rank_per is None:
        request = replace(flags.request, rank_per="gpu", gpu_word="device=cuda")
        flags = replace(flags, request=request)
    if flags.command == "plan":
        return _plan(flags)
    place = find_manager(os.environ, os.getppid())
    if place is None and flags.nnodes == 1:
        flags = _without_prompt(flags)
    if flags.command == "chat" and (place is not None or flags.nnodes > 1):
        raise LaunchError(
            "chat needs a terminal of its own and ranks on one machine: start it without torchrun, "
            "srun, mpirun and --nnodes; generate works with all of them"
        )
    if flags.request.share and (place is not None or flags.nnodes > 1):
        raise LaunchError("--share is for runs that Yoke starts itself on one machine: leave it out")
    if place is not None:
        if place.world_size > 1 and is_typed_in_rank(dict(place.variables), os.getpid()):
            raise LaunchError(f"this shell is itself the rank, so this command is not: {place.claim}")
        job = _job(flags, place.world_size, attended=False)
        plan = local_plan(place, flags.request)
        return join(place, plan, flags.options, *_target(flags, job))
    with ExitStack() as stack:
        return _start_here(flags, stack)


def _start_here(flags: Flags, stack: ExitStack) -> int:
    """Start the ranks on this machine, and return the exit code of the run. Raises LaunchError and
    InputError."""
    topology, plan = _read_and_plan(flags, stack)
    check_nodes(flags.nnodes, flags.node_rank, flags.rdzv_endpoint)
    job = _job(flags, len(plan.ranks) * flags.nnodes)
    if flags.nnodes > 1:
        if flags.command != "run":  # the user's programs set up their own communication
            shared_secret(flags.options.secret_file, os.environ)
        assert flags.node_rank is not None and flags.rdzv_endpoint is not None
        become_agent(
            agent_command(
                Path(__file__).resolve(), flags.head, flags.program, flags.nnodes, flags.node_rank,
                flags.rdzv_endpoint, len(plan.ranks),
            )
        )  # fmt: skip
    if job is not None:
        job, fits = _fits(flags, job, topology, plan)
        require_fit(fits)
        if plan.backend == "shm" and len(plan.ranks) > 1:
            require_space(Path("/dev/shm"), segment_bytes(len(plan.ranks)))
        elif len(plan.ranks) > 1:
            require_loopback()
    console = CHAT if flags.command == "chat" else None
    return launch(plan, flags.options, new_session(), *_target(flags, job), console)


def _without_prompt(flags: Flags) -> Flags:
    """A generate command without a prompt: a chat at a terminal, else prompts from standard input. At a
    terminal, one that says `generate`, or has keys that a chat does not take, misses its prompt."""
    if flags.command != "generate" or flags.given.keys() & {"prompt", "prompts"}:
        return flags
    if not sys.stdin.isatty():
        return replace(flags, given=flags.given | {"prompts": "-"})
    given = {key: text for key, text in flags.given.items() if (key, text) != ("chat", "true")}
    if flags.named or not is_interactive() or given.keys() & NOT_IN_CHAT:
        return flags
    return replace(flags, command="chat", given=given)


def _offline(flags: Flags) -> int:
    """`quantize` or `reshard`: one process without ranks, so flags that place ranks are rejected."""
    words = [word for word in flags.head if word not in ("-v", "--verbose")]
    if flags.command == "reshard":
        from reshard.command import main as reshard

        if words != ["reshard"]:
            raise LaunchError(
                f"reshard runs in one process, without ranks: leave out {' '.join(words[:-1])}"
            )
        return reshard(flags.program)
    from quantize.command import main as quantize

    if flags.help:
        return quantize(["--help"])
    if len(words) > len(flags.words) + 1:
        raise LaunchError("quantize runs in one process, without ranks: it takes only key=value words")
    return quantize(flags.words)


def _read_and_plan(flags: Flags, stack: ExitStack | None = None) -> tuple[Topology, LaunchPlan]:
    """The machine and the plan. With `stack`, the plan is for a run: it is noted for other runs until
    the stack is closed, and what is wrong with it is said."""
    topology = _topology(flags)
    here = flags.sysfs is None and flags.nnodes == 1
    folder = runs_folder() if here and flags.request.binds else None
    if folder is None:
        plan = plan_launch(topology, flags.request)
        shared: list[str] = []
    else:
        with locked(folder):
            claims = read_claims(folder)
            plan = plan_launch(topology, replace(flags.request, claims=claims))
            bound = {cpu for rank in plan.ranks for cpu in rank.cpus}
            shared = overlaps(topology.cores, bound, claims)
            if stack is not None:
                note(folder, bound, stack)
    quota = read_cgroup(flags.sysfs or Path("/")).cpu_quota
    cpus = {cpu for rank in plan.ranks for cpu in rank.cpus}
    if quota is not None and quota < len(cpus):
        warning = f"the cgroup quota is {quota:g} cpus, and the ranks use {len(cpus)}: they will stall"
        plan = replace(plan, reasons=(*plan.reasons, warning))
        shared.append(f"{warning}; see: python launch.py doctor")
    if stack is not None:
        for line in shared:
            say(typed(f"warning: {line}"))
    return topology, plan


def _topology(flags: Flags) -> Topology:
    return read_topology(flags.sysfs or Path("/"), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _job(flags: Flags, world_size: int, attended: bool = True) -> ResolvedJob | None:
    """The job with its model located, and checked as far as possible; None for the user's program.
    `attended`: a person at the terminal may be asked whether to fetch the model."""
    if flags.command == "run":
        return None
    from engine.job import parse_job
    from engine.resolve import check_ranks, resolve

    chat = flags.command == "chat"
    for key in flags.given if chat else ():
        if key in NOT_IN_CHAT:
            raise LaunchError(
                f"{key}= goes with generate; leave it out: chat reads its messages from the terminal"
            )
    job = parse_job(flags.given, need_prompt=flags.command == "generate")
    if chat and "max_new_tokens" not in job.given:
        # An answer ends with a stop token, or when the sequence is full.
        job = replace(job, max_new_tokens=job.max_seq_len - 1)
    if job.device == "cpu" and flags.request.rank_per == "gpu":
        raise LaunchError("device=cpu contradicts --rank-per gpu: leave one of the two out")
    resolved = resolve(job, flags.command == "plan", attended)
    check_ranks(resolved, world_size)
    return resolved


def _target(flags: Flags, job: ResolvedJob | None) -> tuple[str, str]:
    """The module that each rank runs, and its payload."""
    if job is None:
        return PROGRAM, check_program(flags.program)
    from engine.memory import with_batch
    from engine.resolve import to_json

    return "engine.chat" if flags.command == "chat" else "engine.generate", to_json(with_batch(job))


def _fits(
    flags: Flags, job: ResolvedJob, topology: Topology, plan: LaunchPlan, thorough: bool = False
) -> tuple[ResolvedJob, tuple[Fit, ...]]:
    """The job with the largest batch that fits, if it gives none, and whether each rank fits in its
    memory; () if the needs or the memory sizes are unknown."""
    from engine.memory import job_needs, smaller_batch, with_batch

    limit = read_cgroup(flags.sysfs or Path("/")).memory_limit_bytes
    sized = with_batch(job)
    while True:
        needs = job_needs(sized, len(plan.ranks), thorough)
        on_gpus = any(rank.device != "cpu" for rank in plan.ranks)
        if not needs or on_gpus or not any(node.memory_bytes for node in topology.nodes):
            return sized, ()
        fits = check_fit(topology, plan, needs, limit)
        smaller = smaller_batch(job, sized)
        if smaller is None or all(fit.fits for fit in fits):
            return sized, fits
        sized = smaller


def _plan(flags: Flags) -> int:
    topology, plan = _read_and_plan(flags)
    fits: tuple[Fit, ...] = ()
    if flags.given:
        job = _job(flags, len(plan.ranks))
        assert job is not None
        if job.checkpoint is None:
            plan = replace(plan, reasons=(*plan.reasons, *job.notes))
        fits = _fits(flags, job, topology, plan, thorough=True)[1]
    if flags.json:
        show_json(plan_to_json(topology, plan, fits))
    elif sys.stdout.isatty():
        with writing():
            draw(topology, plan, fits)
    else:
        show(render_plain(topology, plan, fits))
    return 0


def _models(flags: Flags) -> int:
    from engine.catalog import WORLD_SIZES, catalog
    from launcher import models_view

    ranks = flags.request.ranks
    if ranks is not None and ranks < 1:
        raise LaunchError(f"--ranks {ranks}: must be at least 1")
    limit = read_cgroup(flags.sysfs or Path("/")).memory_limit_bytes
    memory = machine_memory(_topology(flags), limit) or None
    sizes = WORLD_SIZES if ranks is None else (ranks,)
    report = catalog(flags.names, flags.given, sizes, memory)
    if flags.json:
        show_json(report)
    elif sys.stdout.isatty():
        with writing():
            models_view.draw(report)
    else:
        show(models_view.render(report))
    return 0


if __name__ == "__main__":
    sys.exit(running(lambda: main(sys.argv[1:])))
