"""Where the time of a decode step goes, by torch's profiler. `bench/decode.py --profile` uses this
module to record the steps, sort the events and draw the table.

Times are self times, without the operators that an operator calls. Inductor's kernels in compiled code
are recorded because they are compiled with RECORDED_KERNELS. Time outside operators and kernels is
Python: Dynamo's guard checks, which the profiler knows by name; the calls inside the compiled step; and
the loop around it. A rank in a collective waits for the slowest rank: of each call, the shortest time
among the ranks counts as work, the rest as waiting. The profiler itself takes time between operators,
which counts as Python; so the time of a step without the profiler is reported too.

What is not here: which line of a kernel takes the time (perf).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine.steps import Runner, StepFunction

RECORDED_KERNELS = {"cpp.enable_kernel_profile": True}
_STEP = "yoke: decode step"

MATMULS = "matmuls"
ATTENTION = "attention and cache"
KERNELS = "norms, rope, other kernels"
OTHERS = "other operators of the step"
GUARDS = "guards"
CALLS = "calls between them (Python)"
LOOP_OPS = "the loop's operators"
LOOP = "the loop (Python)"
WORK, WAIT = "collectives: work", "collectives: wait"
_COLLECTIVES = "collectives"
_ORDER = (MATMULS, ATTENTION, WORK, WAIT, KERNELS, OTHERS, GUARDS, CALLS, LOOP_OPS, LOOP)
# The parts that make up the overhead of a token, for which there is a limit.
OVERHEAD = (KERNELS, OTHERS, GUARDS, CALLS, LOOP_OPS, LOOP)

_BY_PREFIX = {
    "yoke_kernels::linear": MATMULS,
    "yoke_kernels::quant_linear": MATMULS,
    "yoke_kernels::gated_mlp": MATMULS,
    "aten::addmm": MATMULS,
    "aten::mm": MATMULS,
    "aten::bmm": MATMULS,
    "aten::linear": MATMULS,
    "mkldnn::": MATMULS,
    "yoke_models::run_experts": MATMULS,
    "yoke_kernels::write_and_attend": ATTENTION,
    "yoke_kernels::attend": ATTENTION,
    "yoke_kernels::write_kv": ATTENTION,
    "aten::scaled_dot_product": ATTENTION,
    "aten::_scaled_dot_product": ATTENTION,
    "yoke::": _COLLECTIVES,
    "_c10d_functional::": _COLLECTIVES,
    "c10d::": _COLLECTIVES,
    "gloo:": _COLLECTIVES,
    "TorchDynamo Cache Lookup": GUARDS,
}


@dataclass(frozen=True)
class Recorded:
    """A sample: microseconds per token, in total and by part (means over the steps), and of each call
    of a collective. `collective_us` holds the calls of all `steps`, in order."""

    steps: int
    token_us: float
    parts: dict[str, float]
    collective_us: list[float]


@dataclass(frozen=True)
class Event:
    """An operator, kernel or marked region; microseconds. `own_us`: the self time."""

    name: str
    start_us: float
    end_us: float
    own_us: float


def record_tokens(runner: Runner, run: Callable[[Runner], Any]) -> Recorded:
    """Record the decode steps that `run` takes with the runner that it is given. The last step is left
    out, because the time after it does not belong to a step. Raises ValueError for fewer than two."""

    def marked(step: StepFunction) -> StepFunction:
        def call(*args: torch.Tensor) -> torch.Tensor:
            with record_function(_STEP):
                return step(*args)

        return call

    steps = {name: step if name == "extend" else marked(step) for name, step in runner.steps.items()}
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        run(replace(runner, steps=steps))
    events = [
        Event(e.name, e.time_range.start, e.time_range.end, e.self_cpu_time_total)
        for e in seen.events() or ()
        if not e.is_async
    ]
    return sort_events(events)


def sort_events(events: Sequence[Event]) -> Recorded:
    """The parts of all steps except the last. Raises ValueError for fewer than two steps."""
    steps = sorted((e for e in events if e.name == _STEP), key=lambda e: e.start_us)
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} decode steps were recorded; a breakdown needs at least two")
    begin, end = steps[0].start_us, steps[-1].start_us
    steps = steps[:-1]
    parts = dict.fromkeys(_ORDER, 0.0)
    del parts[WORK], parts[WAIT]
    collectives: list[float] = []
    known_inside = known_outside = 0.0
    at = 0
    for event in sorted(events, key=lambda e: e.start_us):
        if not begin <= event.start_us < end or event.name == _STEP:
            continue
        while at + 1 < len(steps) and event.start_us >= steps[at + 1].start_us:
            at += 1
        inside = event.start_us < steps[at].end_us
        kind = _kind(event.name, inside)
        if kind is None:
            continue
        if kind == _COLLECTIVES:
            collectives.append(event.own_us)
        else:
            parts[kind] += event.own_us
        if inside:
            known_inside += event.own_us
        else:
            known_outside += event.own_us
    inside_us = sum(step.end_us - step.start_us for step in steps)
    parts[CALLS] = inside_us - known_inside
    parts[LOOP] = end - begin - inside_us - known_outside
    count = len(steps)
    means = {name: value / count for name, value in parts.items()}
    return Recorded(count, (end - begin) / count, means, collectives)


def _kind(name: str, inside: bool) -> str | None:
    """The part that an event's self time belongs to; None for regions, whose self time is Python's."""
    for prefix, kind in _BY_PREFIX.items():
        if name.startswith(prefix):
            return kind
    if "cpp_fused" in name or name.startswith("triton_"):
        return KERNELS
    if "::" not in name:
        return None
    return OTHERS if inside else LOOP_OPS


def work_and_wait(calls: Sequence[Sequence[float]], rank: int, steps: int) -> tuple[float, float]:
    """Microseconds per step that a rank works and waits in collectives. `calls`: times [ranks][calls];
    the shortest time of each call is work."""
    work = sum(min(times) for times in zip(*calls, strict=True))
    return work / steps, (sum(calls[rank]) - work) / steps


def overhead_us(parts: dict[str, float]) -> float:
    """Microseconds in parts that are neither matmul nor attention nor a collective."""
    return sum(parts[name] for name in OVERHEAD)


def draw(profiles: Sequence[dict[str, Any]], title: str) -> None:
    """Print a table with bars and one column per rank."""
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("us per token")
    for one in profiles:
        table.add_column(f"rank {one['rank']}", justify="right")
    table.add_column("share of rank 0's step", min_width=30)
    whole = profiles[0]["token_us"]
    for name in _ORDER:
        own = profiles[0]["parts"][name]
        values = [f"{one['parts'][name]:.0f}" for one in profiles]
        table.add_row(name, *values, Bar(whole, 0, max(own, 0.0), width=30))
    table.add_section()
    table.add_row("with the profiler", *(f"{one['token_us']:.0f}" for one in profiles))
    table.add_row("without it (best)", *(f"{one['plain_us']:.0f}" for one in profiles))
    table.add_row(
        "not matmul, attention, collective", *(f"{overhead_us(one['parts']):.0f}" for one in profiles)
    )
    Console(width=100).print(table)
