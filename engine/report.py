"""The output of a run: progress on stderr, and answers and figures at the end, as text or JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from base.streams import say, show, show_json
from comm.build import BuildProgress
from engine.prompts import Prompt


@dataclass(frozen=True)
class Result:
    """One answer. Times in seconds. Of `drafted` draft tokens `accepted` were accepted. `id` is copied
    from the prompt's line in its file."""

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    token_ids: list[int]
    ttft_s: float
    tpot_s: float
    drafted: int
    accepted: int
    logprobs: list[dict[str, Any]]
    id: Any


@dataclass(frozen=True)
class RunFacts:
    """Figures of a run. Times in seconds; `peak_rss_bytes` and `plan` have one entry for each rank.
    `quant`: the scheme of most weights, "" if they are not quantized. `compiled`: whether the steps are
    compiled by now, in words."""

    load_s: float
    compile_s: float
    compiled: str
    peak_rss_bytes: list[int]
    dtype: str
    quant: str
    comm: str
    plan: list[dict[str, Any]]


def write_json(result: Result, facts: RunFacts) -> None:
    """Write one JSON object to stdout."""
    show_json(asdict(result) | asdict(facts))


def write_answer(index: int, result: Result, prompt: Prompt, output: str) -> None:
    """Write one of many answers to stdout: a JSON object on a line, or the text below its prompt."""
    if output == "json":
        show_json({"index": index, **asdict(result)})
        return
    asked = prompt.text or prompt.messages[-1]["content"]
    show(f"[{index + 1}] {asked}\n{result.text.strip()}\n")


def write_summary(result: Result, facts: RunFacts, placement: str) -> None:
    """End the streamed text on stdout, and write one line of figures to stderr."""
    if not result.text.endswith("\n"):
        show("")
    rate = f"{1 / result.tpot_s:.1f} tokens/s" if result.tpot_s else "no rate"
    acceptance = ""
    if result.drafted:
        share = 100 * result.accepted / result.drafted
        acceptance = f"{result.accepted} of {result.drafted} draft tokens accepted, {share:.0f} % | "
    say(
        f"[{result.prompt_tokens} + {result.tokens} tokens | TTFT {result.ttft_s * 1e3:.0f} ms | "
        f"TPOT {result.tpot_s * 1e3:.1f} ms | {rate} | {acceptance}{facts.compiled} | "
        f"{_numbers(facts)} over {facts.comm} | {placement}]"
    )


def _numbers(facts: RunFacts) -> str:
    return f"{facts.quant} weights, {facts.dtype}" if facts.quant else facts.dtype


def write_batch_summary(
    results: Sequence[Result], facts: RunFacts, seconds: float, placement: str
) -> None:
    """Write one line of figures about all answers to stderr."""
    asked, made = (sum(getattr(r, name) for r in results) for name in ("prompt_tokens", "tokens"))
    say(
        f"[{len(results)} prompts | {asked} + {made} tokens | {seconds:.1f} s | "
        f"{made / seconds:.1f} tokens/s | {facts.compiled} | "
        f"{_numbers(facts)} over {facts.comm} | {placement}]"
    )


@contextmanager
def count_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with how many of `total` are done; draws a progress bar on stderr if
    that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def compile_progress(compiled: bool, enabled: bool) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with the name of the step that is compiled next; shows it on stderr: on
    a terminal with the seconds so far, elsewhere one line for each step."""
    verb = "compiling" if compiled else "running once"
    if not enabled:
        yield lambda name: None
    elif not sys.stderr.isatty():
        yield lambda name: say(f"{verb}: {name} ...")
    else:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(verb)
            yield lambda name: bar.update(task, description=f"{verb}: {name}")


@contextmanager
def build_progress(enabled: bool) -> Iterator[Callable[[BuildProgress], None]]:
    """Yields a function to call with the progress of the build of the operators; shows it on stderr: on
    a terminal in one line that is redrawn, elsewhere a line at the start, every ten seconds, and at the
    end."""
    if not enabled:
        yield lambda progress: None
    elif not sys.stderr.isatty():
        said: list[BuildProgress] = []

        def report(progress: BuildProgress) -> None:
            if not said or progress.seconds - said[-1].seconds >= 10 or progress.done == progress.total:
                said.append(progress)
                say(build_line(progress))

        yield report
    else:
        from rich.console import Console
        from rich.progress import Progress as Bar
        from rich.progress import SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"))
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", visible=False)
            yield lambda progress: bar.update(task, description=build_line(progress), visible=True)


def build_line(progress: BuildProgress) -> str:
    """Returns the progress as a line: building yoke_kernels: 7 of 22 files, 12 s (last time 40 s)."""
    expected = (
        f"about {progress.expected_s:.0f} s"
        if progress.estimated
        else (f"last time {progress.expected_s:.0f} s")
    )
    return (
        f"building {progress.names}: {progress.done} of {progress.total} files, "
        f"{progress.seconds:.0f} s ({expected})"
    )
